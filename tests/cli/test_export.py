"""`echodistill export` of LoRA files, and `inspect` of what it wrote; merged models have their own tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers.models import WordLevel

from echodistill_cli.errors import EchoDistillError
from echodistill_cli.files import atomically, explained
from echodistill_cli.lora.safetensors_io import serialize
from tests.helpers.commands import command, files_below, missing_flags, trained_run

Pair = tuple[Path, Path]
Backbones = dict[str, Path]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, small_pair: Pair, small_backbones: Backbones, photo_folder: Path
) -> Path:
    """A finished run with a learned word, alpha not its rank, and two checkpoints; not to be written to."""
    changes = {"run__save_every": 1, "text__form": "token", "adapter__alpha": 6}
    return trained_run(tmp_path_factory.mktemp("work"), small_pair, small_backbones, photo_folder, **changes)


def names(folder: Path) -> set[str]:
    """The safetensors files in a folder."""
    return {name for name in files_below(folder) if name.endswith(".safetensors")}


def test_both_roles_and_layouts_are_written_with_the_learned_word(run: Path, tmp_path: Path) -> None:
    done = command("export", run, "--role", "both", "--format", "both", "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    loras = {f"sks-dog{role}{layout}.safetensors" for role in ("", "-teacher") for layout in ("", "-diffusers")}
    assert names(tmp_path) == loras | {"sks.safetensors"}
    assert {Path(file).name for file in done.result["files"]} >= loras | {"sks.safetensors"}
    for name in loras:
        found = command("inspect", tmp_path / name, "--json").result
        assert (found["kind"], found["role"]) == ("lora", "teacher" if "teacher" in name else "student")
        assert found["format"] == ("diffusers" if "diffusers" in name else "kohya")
        diffusers = next(reader for reader in found["readers"] if reader["reader"] == "diffusers")
        assert (diffusers["loads"], diffusers["unmatched"]) == ("fully", 0)
    assert command("inspect", tmp_path / "sks.safetensors", "--json").result["kind"] == "token"


def test_the_newest_run_and_its_newest_checkpoint_are_meant(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    newest, first = tmp_path / "newest", tmp_path / "first"
    assert command("export", "-o", newest).out.splitlines()[0] == f"{newest}/sks-dog.safetensors"
    assert command("export", "--step", 1, "-o", first).code == 0
    finished = load_file(run / "sks-dog.safetensors")
    same, earlier = (load_file(folder / "sks-dog.safetensors") for folder in (newest, first))
    assert all(torch.equal(same[key], finished[key]) for key in finished)
    assert not all(torch.equal(earlier[key], finished[key]) for key in finished)
    done = command("export", "--step", 9, "-o", tmp_path / "none")
    assert (done.code, done.out) == (2, "")
    assert "no checkpoint of step 9" in done.error


def test_files_that_are_there_are_refused_before_any_is_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sks-dog-teacher.safetensors").write_text("mine")
    done = command("export", run, "--role", "both", "-o", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "sks-dog-teacher.safetensors" in done.error
    assert "--overwrite" in done.error
    assert files_below(tmp_path) == {"sks-dog-teacher.safetensors"}
    assert command("export", run, "--role", "both", "-o", tmp_path, "--overwrite").code == 0
    for name in files_below(tmp_path):
        (tmp_path / name).unlink()
    (tmp_path / "sks.safetensors").write_text("mine")
    assert "sks.safetensors" in command("export", run, "-o", tmp_path).error  # the token's file counts too
    assert files_below(tmp_path) == {"sks.safetensors"}


def test_files_that_are_equal_are_kept(run: Path, tmp_path: Path) -> None:
    done = command("export", run, "-o", tmp_path)
    assert (done.code, "Writing" in done.err, "exists already" in done.err) == (0, True, False)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_below(tmp_path)}
    done = command("export", run, "-o", tmp_path)
    assert (done.code, "Writing" in done.err, "exists already and is kept" in done.err) == (0, False, True)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_below(tmp_path)} == before


@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precision_and_metadata_are_as_asked(run: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    file = tmp_path / "sks-dog.safetensors"
    assert command("export", run, "--dtype", dtype, "--no-metadata", "-o", tmp_path).code == 0
    assert {tensor.dtype for key, tensor in load_file(file).items() if not key.endswith("alpha")} == {kind}
    with safe_open(file, "pt") as opened:
        assert not [key for key in opened.metadata() if key.startswith(("echodistill.", "modelspec."))]
    assert names(tmp_path) == {"sks-dog.safetensors", "sks.safetensors"}


def test_the_table_of_a_file_says_how_it_is_used(run: Path) -> None:
    text = command("inspect", run / "sks-dog.safetensors").out
    for words in ("1 step, guidance 0", "sks dog", "diffusers", "fully"):
        assert words in text


def test_a_lora_file_folded_into_both_models_gives_two(run: Path, tmp_path: Path) -> None:
    line = ("export", run / "sks-dog.safetensors", "--format", "pipeline", "--dtype", "fp32", "-q")
    done = command(*line, "--role", "both", "-o", tmp_path)
    assert done.code == 0, done.err
    student, teacher = (tmp_path / f"sks-dog{role}-merged" for role in ("", "-teacher"))
    assert done.out.split() == [str(student), str(teacher)]
    ours, theirs = (load_file(made / "unet/diffusion_pytorch_model.safetensors") for made in (student, teacher))
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    # Of one role alone the file's own name tells which.
    assert command(*line, "--role", "teacher", "-o", tmp_path / "one").out.split()[0].endswith(student.name)


def test_a_lora_file_written_again_is_of_one_role(run: Path, tmp_path: Path) -> None:
    done = command("export", run / "sks-dog.safetensors", "--role", "both", "-o", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "sks-dog.safetensors is one LoRA, and --role both asks for two" in done.error
    assert not files_below(tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_names_flags_that_are_there(bad: float) -> None:
    with pytest.raises(EchoDistillError, match=r"holds NaN or infinity.*--lr.*--dtype fp32") as told:
        serialize({"broken.weight": torch.tensor([1.0, bad])}, {})
    assert not missing_flags(str(told.value.hint), "train")


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Have the operating system refuse what a file would have beyond so many bytes, as a full disk does."""
    resource = pytest.importorskip("resource", reason="this system has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


BIG = {"weight": torch.ones(200, 200)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file(BIG, path),
    "torch": lambda path: torch.save(BIG, path),
    "torch, many": lambda path: torch.save({str(index): torch.ones(100) for index in range(200)}, path),
    "tokenizers": lambda path: tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(9999)}, "w0")).save(str(path)),
    "numpy": lambda path: np.ones(20_000).tofile(path),
    "python": lambda path: path.write_bytes(bytes(100_000)),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_write_that_any_library_cannot_finish_is_one_line_with_a_remedy(library: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    refused = pytest.raises(EchoDistillError, match=r"file could not be written \(.+\)\. .*another place with --output")
    with refused, no_file_above(20_000), atomically(tmp_path / "file") as temporary:
        WRITERS[library](temporary)
    assert files_below(tmp_path) == {"file"}
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("layout", ["kohya", "pipeline"])
def test_a_disk_that_is_too_small_for_an_export_ends_it_with_one_line(run: Path, tmp_path: Path, layout: str) -> None:
    with no_file_above(10_000):
        done = command("export", run, "--format", layout, "-o", tmp_path / "new", "-q")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done.err
    assert "could not be written (File too large)" in done.err
    assert not files_below(tmp_path)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        # Seen on a full disk: safetensors now, and before 0.6; tokenizers; torch, with nothing written at all.
        (SafetensorError("Error while serializing: I/O error: No space (os error 28)"), "The disk is full"),
        (SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), "The disk is full"),
        (Exception("No space left on device (os error 28)"), "The disk is full"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "may not write there"),
        (RuntimeError("basic_ios::clear: iostream error"), "The disk is probably full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "probably full"),
    ],
)
def test_a_librarys_words_for_a_failed_write_are_understood(error: Exception, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(EchoDistillError, match=f"could not be written.*{remedy}"), explained(tmp_path / "file"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
        SafetensorError("Error while deserializing header: invalid JSON in header"),
        ValueError("nothing about a disk"),
    ],
)
def test_an_error_that_is_not_about_the_disk_passes_as_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as told, explained(tmp_path / "file"):
        raise error
    assert told.value is error


def test_a_failed_export_leaves_no_folder(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "export"
    done = command("export", run, "--format", "pipeline", "--model", tmp_path / "none", "-o", output)
    assert done.code != 0
    assert not output.parent.exists()
