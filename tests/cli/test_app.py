"""The program: help, flags, exit codes, and what reaches stdout and stderr."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from echodistill_cli import __version__
from echodistill_cli.cli.options import quiet_libraries
from echodistill_cli.cli.progress import TrainingProgress
from echodistill_cli.config.schema import Config, EchoConfig, TrainConfig
from tests.helpers.commands import command, small_toml

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "sample", "export", "evaluate", "check", "inspect", "doctor")


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_help_names_every_command_and_imports_no_heavy_library() -> None:
    program = (
        "import sys; from echodistill_cli.cli.app import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'accelerate', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"
    assert all(f" {name} " in done.stdout for name in COMMANDS)
    assert done.stderr == ""


def test_no_arguments_give_the_help() -> None:
    done = command()
    assert (done.code, done.err) == (0, "")
    assert "Commands" in done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_has_json(name: str) -> None:
    done = command(name, "-h")
    assert (done.code, done.err) == (0, "")
    assert "--json" in done.out
    assert done.out == command(name, "--help").out


def test_the_version_is_printed() -> None:
    assert command("--version").out == f"echodistill {__version__}\n"


def test_shell_completion_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = command("--show-completion", "bash")
    assert done.code == 0
    assert "_ECHODISTILL_COMPLETE=complete_bash" in done.out


# --- bad lines: exit 2, one line, nothing on stdout -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train p --stpes 3", "--steps"),
        ("trian p", "Did you mean 'train', 'train-many'?"),
        ("train p --steps many", "'many' is not an integer"),
        ("train p --lr fast", "'fast' is not a number"),
        ("train p --lr", "requires an argument"),
        ("train p q", "unexpected extra argument"),
        ("train p --rank 0", "--rank 0 is below 1"),
        ("train p --set echo.teacher_share=1.5", "above 1"),
        ("train p --precision fp61", "Did you mean 'fp16'?"),
        ("train p --text tokens", "Did you mean 'token'?"),
        ("train p --resume --overwrite", "contradict"),
        ("train p --from-step 3", "--resume"),
        ("train p --no-echo --echo-start 5", "contradict"),
        ("train p --identity none", "--no-echo"),
        ("train p --config none.toml", "none.toml cannot be read"),
        ("train p --report-to tensorbord --dry-run", "Did you mean tensorboard?"),
        ("train p --name none --dry-run", "Choose another --name"),
        ("train p --token a/b --dry-run", "--token 'a/b'"),
        ("train p --class-name a:b --dry-run", "--class-name 'a:b'"),
        ("train p --text token --name sks --dry-run", "Choose another --name"),
        ("train", "train PHOTOS --token"),
        ("train --resume", "There is no run under runs/"),
        ("train p --resume -o nowhere", "nowhere is not a run folder"),
        ("sample", "--prompt"),
        ("sample -p x --steps 0", "greater than or equal to 1"),
        ("sample -p x --role judge", "'student', 'teacher'"),
        ("sample --prompt-file none.txt", "none.txt"),
        ("sample -p x", "There is no run under runs/"),
        ("sample -p x --lora none.safetensors", "no such run folder or LoRA file"),
        ("export", "There is no run under runs/"),
        ("check", "Missing argument 'PHOTOS'"),
        ("inspect", "Missing argument 'FILE'"),
        ("train-many", "Missing argument 'MANIFEST'. Help: echodistill train-many --help"),
    ],
)
def test_a_bad_line_ends_with_2_and_one_line_that_helps(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*line.split())
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstpes = 3\n", "Unknown setting train.stpes. Did you mean train.steps?"),
        ("[trian]\nsteps = 3\n", "Unknown section [trian]. Did you mean train?"),
        ("[train]\nsteps = 0\n", "train.steps = 0 is below 1"),
        ("[train\n", "not valid TOML"),
    ],
)
def test_a_bad_configuration_file_ends_with_2(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    done = command("train", "photos", "--config", tmp_path / "run.toml")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err


# --- what is wrong without torch is told without torch ----------------------------------------------------------------

_WITHOUT_TORCH = """
import json, sys
from echodistill_cli.cli.app import main
for line in json.loads(sys.argv[1]):
    try:
        main(line)
    except SystemExit as ended:
        print(ended.code, "torch" in sys.modules, *line)
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (("train", "", "--dry-run"), "PHOTOS"),
        (("train", "photos", "--output=", "--dry-run"), "--output"),
        (("train", "photos", "--output_dir", ""), "--output"),
        (("train", "photos", "--sample-prompt", "x", "--sample-prompt", ""), "--sample-prompt"),
        (("train-many", "subjects.csv", "-o", ""), "--output"),
        (("sample", "x", "-o", ""), "--output"),
        (("sample", "x", "--prompt-file", ""), "--prompt-file"),
        (("export", "-o", ""), "--output"),
        (("export", ""), "RUN|FILE"),
        (("evaluate", "-o", ""), "--output"),
        (("live", "run", ""), "RUN"),
        (("check", ""), "PHOTOS"),
        (("inspect", ""), "FILE"),
        (("download", ""), "MODEL"),
        (("config", "--model", ""), "--model"),
    ],
)
def test_an_empty_value_is_refused_by_name_and_is_no_folder(
    line: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*line)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"error: {name} is empty. Give it a value")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize(
    "line",
    [
        ("sample", "--prompt-file", "pipe.jsonl"),
        ("evaluate", "--prompts", "pipe.jsonl"),
        ("train", "photos", "--config", "pipe.jsonl"),
        ("train-many", "pipe.jsonl"),
    ],
)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(
    line: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    done = command(*line)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "nothing writes to this pipe" in done.err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_read_until_its_writer_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "settings.toml")
    writer = os.open(tmp_path / "settings.toml", os.O_RDWR)
    os.write(writer, b"[train]\nste")

    def finish() -> None:
        os.write(writer, b"ps = 77\n")
        os.close(writer)

    ending = threading.Timer(0.3, finish)
    ending.start()
    done = command("config", "--config", tmp_path / "settings.toml")
    ending.join()
    assert done.code == 0, done.err
    assert "\nsteps = 77\n" in done.out


def test_what_needs_no_torch_is_told_before_it_is_imported(tmp_path: Path, photo_folder: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello, this is a text")
    (tmp_path / "sparse.txt").touch()
    os.truncate(tmp_path / "sparse.txt", 2**40)
    (tmp_path / "long.txt").write_text("x" * 10_001)
    (tmp_path / "photos").symlink_to(photo_folder)
    lines = """
        2 train photos --vram 12GB
        4 train photos --vram 12 --model mini
        2 train photos --report-to nonsense
        2 train photos --model mini --set model.student=x.safetensors
        4 train photos --model mini:nothing
        4 train photos --model text.safetensors --teacher mini:teacher
        4 train photos --model weights.safetensors
        2 train photos --config sparse.txt
        2 sample --prompt-file sparse.txt
        2 sample --prompt-file long.txt
        2 sample x --backend onnx --role teacher
        2 sample x --backend onnx
        4 sample x --lora text.safetensors
        4 inspect text.safetensors
        2 inspect nowhere
        4 export text.safetensors
        2 export text.safetensors --step 3
        2 export text.safetensors --role both
        2 export text.safetensors --format onnx --role teacher
        2 export text.safetensors --push-to-hub nobody
        4 evaluate text.safetensors
    """
    expected = [line.split() for line in lines.strip().splitlines()]
    words = json.dumps([line[1:] for line in expected])
    done = echodistill(words, program=("-c", _WITHOUT_TORCH), cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert done.stdout.splitlines() == [" ".join((code, "False", *line)) for code, *line in expected], done.stderr
    assert done.stderr.count("error: ") == len(expected)


# --- signals outside of a training loop -------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_any_command_with_its_code_and_one_line(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    writer = os.open(tmp_path / "prompts.txt", os.O_RDWR)  # reading waits for what it writes, for ever
    before = signal.getsignal(number)
    sender = threading.Timer(0.3, os.kill, (os.getpid(), number))
    sender.start()
    done = command("sample", "--prompt-file", tmp_path / "prompts.txt")
    sender.join()
    os.close(writer)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert signal.getsignal(number) is before


def test_a_signal_does_not_interrupt_the_line_about_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    program = sys.modules["echodistill_cli.cli.app"]
    printed = program.print_error

    def interrupted(message: str, label: str = "error: ") -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        printed(message, label)

    monkeypatch.setattr(program, "print_error", interrupted)
    done = command("sample", "x", "--seed", "x")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_a_command_ends_the_program_without_a_traceback(number: signal.Signals) -> None:
    code = f"import atexit, os; atexit.register(os.kill, os.getpid(), {int(number)})\nimport echodistill_cli.__main__"
    done = echodistill(program=("-c", code))
    assert (done.returncode, done.stderr) == (-number, "")


def echodistill(
    *arguments: str | bytes, program: Sequence[str] = ("-m", "echodistill_cli"), **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, with streams or surroundings that a test chooses."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more.pop("env", {})
    line = [sys.executable, "-W", "ignore", *program, *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.run(line, text=True, check=False, env=environment, timeout=120, **streams)


@pytest.mark.parametrize(
    "line", [("inspect", b"caf\xe9"), ("sample", "-p", b"\xff"), ("train", "p", "--name", b"\xff", "--dry-run")]
)
def test_an_argument_that_is_not_utf_8_ends_with_2(line: tuple[str | bytes, ...]) -> None:
    done = command(*(os.fsdecode(argument) for argument in line))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "is not UTF-8 text" in done.err


@pytest.mark.parametrize(
    "line", [("inspect",), ("check",), ("sample", "-p", "x", "--lora"), ("export",), ("train", "p", "-o")]
)
@pytest.mark.parametrize("name", ["x" * 300, "loop/x"])
def test_a_path_that_no_file_has_is_one_line(
    line: tuple[str, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "p").symlink_to(photo_folder)
    done = command(*line, name)
    assert (done.code in (1, 2, 3), done.out) == (True, ""), done.err
    assert done.error.startswith("error: ")
    assert not [line for line in done.err.splitlines() if line.startswith("error: ")][1:]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "unet/config.json"), 1, "unet/config.json: Permission denied."),
        (OSError(36, "File name too long", "x"), 2, "x: File name too long. Use a shorter name."),
        (OSError(28, "No space left on device"), 1, "No space left on device. Free some space"),
        (OSError("a library's own"), 1, "a library's own."),
        (RuntimeError("could not create a primitive"), 5, "Out of memory."),
        (ImportError("libtorch.so: failed to map segment from shared object"), 5, "Out of memory."),
    ],
)
def test_an_error_of_the_system_is_one_line_at_the_border_of_a_command(
    error: Exception, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: Path) -> None:
        raise error

    monkeypatch.setattr("echodistill_cli.pipeline.inspect", fail)
    done = command("inspect", "x")
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert words in done.err


def test_a_signal_that_a_library_turns_into_its_own_error_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_file: Path) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("echodistill_cli.pipeline.inspect", interrupted)
    done = command("inspect", "x")
    assert (done.code, done.out, done.err) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_stdout_cannot_say_is_escaped(encoding: str, photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "фото 犬").mkdir()
    for photo in photo_folder.iterdir():
        (tmp_path / "фото 犬" / f"犬-{photo.name}").write_bytes(photo.read_bytes())
    environment = {"PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8", "COLUMNS": "200"}
    done = echodistill("check", str(tmp_path / "фото 犬"), env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u72ac-photo-0.jpg" in done.stdout
    assert echodistill("train", "--help", env=environment).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_printed_ends_with_1_and_one_line(photo_folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = echodistill("check", str(photo_folder), stdout=full)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "The result could not be printed (No space left on device)." in done.stderr
        assert echodistill("check", "nowhere", stderr=full).returncode == 3


def test_a_reader_that_is_gone_ends_a_command_quietly(photo_folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = echodistill("check", str(photo_folder), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_a_command_works_with_its_streams_closed_and_says_that_its_folder_is_gone(
    photo_folder: Path, tmp_path: Path
) -> None:
    start = f"PYTHONPATH='{ROOT}' '{sys.executable}' -m echodistill_cli"
    closed = subprocess.run(f"{start} check '{photo_folder}' 2>&- >&-", shell=True, check=False)
    assert closed.returncode == 0
    gone = f"mkdir gone && cd gone && rmdir ../gone && {start} check '{photo_folder}'"
    done = subprocess.run(gone, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "The working directory cannot be used" in done.stderr


# --- check, inspect, doctor -------------------------------------------------------------------------------------------


def test_check_gives_a_verdict_per_file_and_3_when_too_few_can_be_used(photo_folder: Path, tmp_path: Path) -> None:
    assert command("check", photo_folder).code == 0
    assert [file["name"] for file in command("check", photo_folder, "--json").result["files"]] == [
        f"photo-{index}.jpg" for index in range(4)
    ]
    for name in ("photo-0.jpg", "photo-1.jpg"):
        (tmp_path / name).write_bytes((photo_folder / name).read_bytes())
    (tmp_path / "broken.jpg").write_bytes((photo_folder / "photo-2.jpg").read_bytes()[:500])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a picture")
    done = command("check", tmp_path, "--json")
    assert done.code == 3
    skipped = [file["name"] for file in done.result["files"] if file["verdict"] == "skipped"]
    assert skipped == ["broken.jpg", "empty.png", "text.jpg"]
    assert done.err.count("\n") == 1
    assert command("check", tmp_path, "--min-photos", 2).code == 0


def test_inspect_names_a_file_that_is_missing_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing of the kind")
    for name, code in (("missing.safetensors", 2), ("damaged.safetensors", 4)):
        done = command("inspect", tmp_path / name)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
        assert name in done.err


def test_doctor_tells_versions_and_what_this_machine_can_train() -> None:
    found = command("doctor", "--json").result
    assert found["versions"]["echodistill"] == __version__
    assert "cpu" in found["devices"]
    table = command("doctor").out
    assert "torch" in table
    assert "sd-turbo" in table


# --- progress ---------------------------------------------------------------------------------------------------------

LOSSES = {"denoising": 0.279, "latent": 8.91, "identity": 0.00123, "adversarial": 1.38, "step_seconds": 0.5}
ECHO = {
    "echo_made": 4,
    "echo_kept": 1,
    "echo_identity": 2,
    "echo_photo_copy": 0,
    "echo_duplicate": 1,
    "echo_crowded": 0,
}


def shown(
    steps: int, *, terminal: bool, quiet: bool = False, first: int = 1, more: dict[str, int] | None = None
) -> str:
    """What a run's progress writes on a console of 80 columns."""
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=terminal, no_color=True)
    with TrainingProgress(console, Config(train=TrainConfig(steps=steps)), quiet=quiet) as progress:
        for step in range(first, steps + 1):
            progress.on_step({"step": step, **LOSSES, **((more or {}) if step == steps else {})})
    return text.getvalue()


def test_a_terminal_shows_a_bar_with_the_time_left_and_the_losses_within_80_columns() -> None:
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", shown(20, terminal=True)).splitlines()[-2:]
    assert re.fullmatch(r"training ━+ 20/20 0:00:00 left *", last[0])
    assert last[1].split() == ["denoising", "0.279", "latent", "8.91", "identity", "0.00123", "adversarial", "1.38"]
    assert max(map(len, last)) <= 80


def test_without_a_terminal_there_are_about_twenty_plain_lines() -> None:
    lines = shown(1000, terminal=False).splitlines()
    assert len([line for line in lines if line.startswith("step")]) == 20
    assert len(lines) == 21  # and the time of the whole run
    assert lines[-1].startswith("step 1000/1000  0 s left  denoising 0.279")
    assert "\x1b" not in "".join(lines)
    assert shown(1000, terminal=False, first=991).count("\n") == 1
    assert shown(20, terminal=False, quiet=True) == shown(20, terminal=True, quiet=True) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_the_teachers_own_phases_have_their_own_count_and_clock(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=terminal, no_color=True)
    config = Config(train=TrainConfig(steps=5, head_start=40), echo=EchoConfig(start=None, carry_back=20))
    with TrainingProgress(console, config, quiet=False) as progress:
        for step in range(1, 41):
            progress.on_step({"step": 0, "head_start_step": step, "denoising": 0.5})
        progress.on_step({"step": 1, **LOSSES, "step_seconds": 2.0})
        if terminal:
            assert progress.live
            progress.live.refresh()
        for step in range(1, 21):
            progress.on_step({"step": 5, "carry_back_step": step, "denoising": 0.25})
    shown = text.getvalue()
    if terminal:
        assert re.search(r"head start ━+ 40/40", shown)
        assert re.search(r"training ━+.* 1/5", shown)
        assert re.search(r"carry back ━+ 20/20", shown)
    else:
        lines = shown.splitlines()
        assert len(lines) == 42
        assert lines[19].startswith("head start 40/40  0 s left  denoising 0.5")
        assert lines[20] == "Generating the first targets (20 batches)"
        assert lines[21].startswith("step 1/5  denoising 0.279")  # the first targets took a part of it
        assert lines[-1].startswith("carry back 20/20  0 s left  denoising 0.25")


@pytest.mark.parametrize("terminal", [True, False])
def test_each_run_of_a_benchmark_has_its_own_count_and_clock(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=terminal, no_color=True)
    with TrainingProgress(console, Config(train=TrainConfig(steps=3)), quiet=False) as progress:
        for subject in ("teapot", "dog"):
            progress.on_message(f"{subject}: training")
            for step in (1, 2, 3):
                progress.on_step({"step": step, **LOSSES})
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", text.getvalue()).splitlines()
    for subject, next_line in (("teapot", lines.index("dog: training")), ("dog", len(lines))):
        lines_of_run = lines[lines.index(f"{subject}: training") : next_line]
        assert sum("3/3" in line for line in lines_of_run) == 1
        assert any("3/3 0:00:00 left" in line or "step 3/3  0 s left" in line for line in lines_of_run)


def test_an_echo_and_a_skipped_step_are_reported() -> None:
    text = shown(3, terminal=False, more=ECHO | {"skipped_student": 1})
    assert "echo at step 3: generated 4, kept 1 (dropped: 2 unlike the subject, 1 duplicates)" in text
    assert "step 3: skipped student, because the loss or gradient is not finite" in text
    assert "generated 4, kept 0" in shown(3, terminal=False, more=ECHO | {"echo_kept": 0})


# --- dry run ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_is_a_table_or_json_and_writes_nothing(
    small_pair: tuple[Path, Path],
    small_backbones: dict[str, Path],
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = small_toml(tmp_path, small_pair, small_backbones)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    line = ("train", photo_folder, "--config", file, "--dry-run")
    plan = command(*line, "--json").result
    assert (plan["photos"], plan["steps"], plan["output"], plan["output_exists"]) == (4, 4, "runs/sks-dog", False)
    assert plan["models"][str(small_pair[0])] == "on this disk"
    assert plan["config"]["train"]["steps"] == 4
    assert (plan["device"], plan["precision"]) == ("cpu", "fp32")
    assert command(*line, "--precision", "bf16", "--json").result["precision"] == "bf16"
    table = command(*line).out
    assert "4 usable" in table
    assert re.search(r"^device +cpu, weights in fp32 *$", table, re.MULTILINE)
    assert "{" not in table
    assert list(Path().iterdir()) == []


def test_a_dry_run_knows_what_would_have_to_be_fetched(photo_folder: Path) -> None:
    models = command("train", photo_folder, "--offline", "--dry-run", "--json").result["models"]
    assert {"stabilityai/sd-turbo", "facebook/dino-vits16@refs/pr/1"} <= set(models)


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")  # restored afterwards
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    quiet_libraries(offline=False, quiet=False)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    quiet_libraries(offline=False, quiet=False)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_libraries_that_were_imported_before_are_quiet_too() -> None:
    program = """
import diffusers, transformers, logging
from echodistill_cli.cli.options import quiet_libraries
quiet_libraries(offline=True, quiet=True)
for library in (diffusers, transformers):
    library.utils.logging.get_logger(f"{library.__name__}.configuration_utils").warning("The config attributes")
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "The config attributes" not in done.stderr


def test_inspect_takes_a_run_folder_and_refuses_another_folder(tmp_path: Path) -> None:
    done = command("inspect", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "is not a run folder" in done.error


@pytest.mark.parametrize("line", ["sample a --lora none", "export none", "evaluate none --photos x", "sample a"])
def test_a_source_that_does_not_exist_is_named_without_torch(line: str, tmp_path: Path) -> None:
    program = (
        f"from echodistill_cli.cli import main\ntry: main({line.split()})\nexcept SystemExit as end: print(end.code)\n"
        "import sys; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines() == ["2", "set()"]


@pytest.mark.parametrize(
    "line", ["sample a --lora LORA", "export LORA", "live", "train-many none.csv", "train-many x -n"]
)
def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(line: str, tmp_path: Path) -> None:
    file, lora = tmp_path / "images", tmp_path / "a.safetensors"
    file.touch()
    lora.touch()
    words = [str(lora) if word == "LORA" else word for word in line.replace("-n", "--dry-run").split()]
    done = command(*words, "-o", file)
    assert (done.code, done.err) == (2, f"error: --output {file} is a file. Name a folder with --output.\n")


def test_an_output_where_nothing_can_be_written_is_refused_before_models_are_loaded(tmp_path: Path) -> None:
    lora = tmp_path / "a.safetensors"
    lora.touch()
    (tmp_path / "link").symlink_to("nowhere")
    done = command("sample", "a", "--lora", lora, "-o", tmp_path / "link")
    assert (done.code, done.err.partition(" is a ")[2]) == (2, "link to nowhere. Name a folder with --output.\n")
    for words in (("sample", "a", "--lora", lora), ("export", lora)):
        done = command(*words, "-o", "/proc/none/images")
        assert (done.code, done.error.partition(" (")[0]) == (1, "error: /proc/none/images cannot be written")
