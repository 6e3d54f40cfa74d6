"""`echodistill export` of LoRA files, and `inspect` of what it wrote; merged models have their own tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.commands import command, files_below, trained_run

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
    for name in files_below(tmp_path) - {"sks.safetensors"}:
        (tmp_path / name).unlink()
    assert "sks.safetensors" in command("export", run, "-o", tmp_path).error  # the word's file counts too


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
