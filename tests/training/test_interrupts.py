"""An interrupted run resumes to the same bits as an uninterrupted one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from echodistill_cli import pipeline
from echodistill_cli.config.build import build_config, config_from_dict
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import photo_records
from echodistill_cli.errors import ConfigError, Interrupted
from echodistill_cli.runs import Run, create_run, open_run
from echodistill_cli.training.loop import StopRequest, resumable_state
from tests.helpers.commands import command, files_below, small_toml
from tests.helpers.runs import small_photos

ROOT = Path(__file__).parents[2]
STEPS = 6

Pair = tuple[Path, Path]
Backbones = dict[str, Path]


@pytest.fixture(scope="module", params=["lora"])
def unbroken(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_pair: Pair,
    small_backbones: Backbones,
    photo_folder: Path,
) -> tuple[Path, Path]:
    """A configuration file, and the finished run that it gives without an interruption."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"train__steps": STEPS, "echo__start": 2, "run__sample_every": 6, "text__form": request.param}
    file = small_toml(folder, small_pair, small_backbones, **changes, concept__photos=str(photo_folder))
    assert command("train", "--config", file, "-o", folder / "run", "-q").code == 0
    return file, folder / "run"


def differences(first: Any, second: Any, *, where: str = "state") -> list[str]:
    """The places where two nested values are not equal to the bit."""
    if isinstance(first, Mapping):
        if first.keys() != second.keys():
            return [f"{where}: {set(first) ^ set(second)}"]
        return [place for key in first for place in differences(first[key], second[key], where=f"{where}.{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{where}: {len(first)} and {len(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [place for index, (a, b) in pairs for place in differences(a, b, where=f"{where}[{index}]")]
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    return [] if same else [where]


def assert_same_run(first: Path, second: Path) -> None:
    """Compare the last checkpoints (LoRA, token, heads, optimizers, pool, generator), the metrics and the files."""
    states = [open_run(folder).load_checkpoint() for folder in (first, second)]
    assert {"lora", "token", "heads", "optimizers", "pool", "generator", "step"} <= states[0].keys()
    assert states[0]["pool"] is not None
    assert differences(*states) == []
    costs = {"step_seconds", "peak_memory_mib"}
    logs = [
        [{key: value for key, value in entry.items() if key not in costs} for entry in open_run(folder).read_metrics()]
        for folder in (first, second)
    ]
    assert [entry["step"] for entry in logs[0]] == list(range(1, STEPS + 1))
    assert logs[0] == logs[1]
    assert files_below(first) == files_below(second)
    for name in ("sks-dog.safetensors", "teacher/sks-dog-teacher.safetensors"):
        assert differences(load_file(first / name), load_file(second / name)) == []


def config_of(unbroken: tuple[Path, Path], output: Path) -> Config:
    return build_config(None, unbroken[0], {"run.output": str(output)})


def killing(number: signal.Signals, step: int, times: int = 1) -> Callable[[Mapping[str, float]], None]:
    """A callback that sends this process a signal after a step."""

    def on_step(metrics: Mapping[str, float]) -> None:
        if metrics["step"] == step:
            for _ in range(times):
                signal.raise_signal(number)

    return on_step


# --- the state to resume from -----------------------------------------------------------------------------------------


def run_of_photos(folder: Path, steps: int = 20, *, old: bool = False) -> Run:
    """A run with checkpoints of two steps, trained on `small_photos`."""
    tables = {"run": {"output": str(folder)}, "concept": {"photos": "my/photos"}, "train": {"steps": steps}}
    run = create_run(config_from_dict(tables), overwrite=False)
    for step in (5, 10):
        state = {"step": step, "photo_count": 4, "photos": photo_records(small_photos())}
        run.save_checkpoint(step, {key: value for key, value in state.items() if key != "photos" or not old})
    return run


@pytest.mark.parametrize(
    ("step", "photos", "steps", "message"),
    [
        (None, 3, 20, r"was trained on 4 photos, but my/photos has 3\. Resume with the same photos"),
        (None, 4, 7, r"is at step 10 already, beyond --steps 7\. Finish there with --steps 10"),
        (7, 4, 20, r"has no checkpoint of step 7\. Choose one of 5, 10\."),
    ],
)
def test_a_state_is_resumed_only_with_its_photos_and_before_the_last_step(
    tmp_path: Path, step: int | None, photos: int, steps: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resumable_state(run_of_photos(tmp_path / "run", steps), step, small_photos(photos))


def test_the_newest_or_a_named_state_is_resumed(tmp_path: Path) -> None:
    run = run_of_photos(tmp_path / "run")
    for step, expected in ((None, 10), (5, 5)):
        saved = resumable_state(run, step, small_photos())
        assert saved is not None
        assert saved["step"] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: [replace(p[0], image=p[1].image), *p[1:]], r"other photos: the image of 0\.png changed\."),
        (lambda p: [p[0], replace(p[1], caption=None), *p[2:]], r"the caption of 1\.png changed\."),
        (lambda p: [*p[:2], replace(p[2], mask=None), p[3]], r"the mask of 2\.png changed\."),
        (lambda p: [*p[:3], replace(p[3], crop=(0, 0, 32, 32))], r"the image of 3\.png changed\."),
        (lambda p: [*p[:3], replace(p[3], path=Path("4.png"))], r"3\.png is missing, 4\.png is new\."),
        (lambda p: [p[1], p[0], *p[2:]], r"their order changed\."),
        (lambda p: [replace(p[0], path=p[1].path), replace(p[1], path=p[0].path), *p[2:]], r"their order|the image of"),
    ],
)
def test_a_run_is_not_resumed_with_photos_that_changed(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resumable_state(run_of_photos(tmp_path / "run"), None, change(small_photos()))


def test_a_checkpoint_of_an_older_version_is_resumed_with_a_word_about_its_photos(tmp_path: Path) -> None:
    messages: list[str] = []
    assert resumable_state(run_of_photos(tmp_path / "run", old=True), None, small_photos(), messages.append)
    assert len(messages) == 1
    assert "whether the photos changed is not known" in messages[0]


# --- in this process: the signal comes after exactly the third step ---------------------------------------------------


@pytest.mark.parametrize(
    ("unbroken", "number"), [("lora", signal.SIGTERM), ("token", signal.SIGINT)], indirect=["unbroken"]
)
def test_a_signal_saves_the_run_and_it_resumes_to_the_same_bits(
    unbroken: tuple[Path, Path], number: signal.Signals, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    messages: list[str] = []
    with pytest.raises(Interrupted) as stopped:
        pipeline.train(config_of(unbroken, run), on_step=killing(number, 3), on_message=messages.append)
    assert stopped.value.signal_number == number
    assert "step 3 of 6" in stopped.value.message
    assert f"--resume -o {run}" in stopped.value.message
    assert any("Stopping after this step" in line for line in messages)
    assert open_run(run).list_checkpoints()[-1].name == "step-000003"
    assert command("train", "--resume", "-o", run, "-q").code == 0
    assert_same_run(run, unbroken[1])


@pytest.mark.parametrize(
    ("phase", "changes", "joint_steps"),
    [
        ("head start", {"train.head_start": 4, "train.steps": 1}, 0),
        ("carry back", {"train.steps": 2, "echo.start": 1, "echo.min_identity": 0.0, "echo.carry_back": 4}, 2),
    ],
)
def test_a_signal_while_the_teacher_is_alone_saves_that_too(
    unbroken: tuple[Path, Path], phase: str, changes: dict[str, Any], joint_steps: int, tmp_path: Path
) -> None:
    counted = f"{phase.replace(' ', '_')}_step"

    def config(name: str) -> Config:
        places = {"run.output": str(tmp_path / name), "train.carry_over": True}
        return build_config(None, unbroken[0], places | changes)

    def stop(metrics: Mapping[str, float]) -> None:
        if metrics.get(counted) == 3:
            signal.raise_signal(signal.SIGTERM)

    pipeline.train(config("whole"))
    with pytest.raises(Interrupted, match=f"Stopped at step 3 of the {phase}, saved"):
        pipeline.train(config("stopped"), on_step=stop)
    stopped = open_run(tmp_path / "stopped")
    assert (stopped.load_checkpoint()[counted], len(stopped.read_metrics())) == (3, joint_steps)
    messages: list[str] = []
    pipeline.train(config("stopped"), resume=True, on_message=messages.append)
    assert any(f"continuing after step 3 of the {phase}" in line for line in messages)
    assert differences(*(open_run(tmp_path / name).load_checkpoint() for name in ("stopped", "whole"))) == []


def test_a_caller_in_another_thread_stops_a_run_which_is_saved_and_resumes(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    # A server or a notebook trains outside the main thread, where Python delivers no signal.
    run, steps, raised = tmp_path / "run", list[float](), list[Interrupted]()

    def train() -> None:
        with pytest.raises(Interrupted, match=r"Stopped at step 3 of 6, saved in .*step-000003") as info:
            pipeline.train(
                config_of(unbroken, run),
                on_step=lambda metrics: steps.append(metrics["step"]),
                stop=lambda: len(steps) == 3,
            )
        raised.append(info.value)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert [error.signal_number for error in raised] == [signal.SIGINT]
    assert command("train", "--resume", "-o", run, "-q").code == 0
    assert_same_run(run, unbroken[1])


class SignalsInWrites(io.RawIOBase):
    """A file whose first write is interrupted by SIGINT before anything is written."""

    def __init__(self) -> None:
        self.text = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.text:
            self.text = b"> "
            signal.raise_signal(signal.SIGINT)
        self.text += bytes(data)
        return len(data)


def test_a_signal_during_a_write_is_announced_on_the_same_stream() -> None:
    raw = SignalsInWrites()
    stream = io.TextIOWrapper(io.BufferedWriter(raw), write_through=True)

    def say(line: str) -> None:
        stream.write(line)
        stream.flush()

    with StopRequest(lambda: say("stopping ")) as request:
        say("step 1 ")
        assert request.number() == signal.SIGINT
    assert raw.text.split() == [b">", b"step", b"1", b"stopping"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_announced_without_a_signal() -> None:
    said = list[str]()
    with StopRequest(lambda: said.append("stopping")) as request:
        assert request.number() is None
    assert said == []


def test_a_second_ctrl_c_stops_at_once_and_the_run_resumes_from_its_last_checkpoint(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(config_of(unbroken, run), on_step=killing(signal.SIGINT, 3, times=2))
    assert [path.name for path in open_run(run).list_checkpoints()] == ["step-000002"]
    assert len(open_run(run).read_metrics()) == 3
    assert command("train", "--resume", "-o", run, "-q").code == 0
    assert_same_run(run, unbroken[1])


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(config_of(unbroken, run), on_step=killing(signal.SIGINT, 1, times=2))
    assert open_run(run).list_checkpoints() == []
    # A killed process leaves a truncated line and files with temporary names.
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "denois')
    (run / f".config.toml.{2**31 - 1}.tmp").write_text("half")
    (run / "samples" / f".step-000006.png.{2**31 - 1}.tmp").write_text("half")
    done = command("train", "--resume", "-o", run)
    assert done.code == 0
    assert "from the start" in done.err
    assert_same_run(run, unbroken[1])


def test_ctrl_c_while_models_are_loaded_leaves_no_files(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    def on_message(line: str) -> None:
        if line.startswith("Loading"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pipeline.train(config_of(unbroken, tmp_path / "run"), on_message=on_message)
    assert not (tmp_path / "run").exists()


# --- a separate process, as in a shell --------------------------------------------------------------------------------


def start_and_stop(number: signal.Signals, after: str, *arguments: object) -> tuple[int, str, str]:
    """Run a command and signal it when a line of stderr starts with `after`; its return code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from echodistill_cli.cli.app import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert process.stderr is not None
    before = []
    for line in process.stderr:
        before.append(line)
        if line.startswith(after):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    return process.returncode, out, "".join(before) + err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_process_can_be_resumed(
    unbroken: tuple[Path, Path], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    status, out, err = start_and_stop(number, "step 3/6", "train", "--config", unbroken[0], "-o", run)
    assert (status, out) == (code, "")
    if number != signal.SIGKILL:
        last = err.splitlines()[-1]
        assert last.startswith("Stopped at step ")
        assert last.endswith(f"echodistill train --resume -o {run}")
        assert "Traceback" not in err
    assert command("train", "--resume", "-o", run, "-q").code == 0
    states = [open_run(folder).load_checkpoint() for folder in (run, unbroken[1])]
    assert differences(*states) == []
    assert [entry["step"] for entry in open_run(run).read_metrics()] == list(range(1, STEPS + 1))


def test_ctrl_c_in_a_shell_before_the_first_step_is_one_line_and_130(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    status, out, err = start_and_stop(
        signal.SIGINT, "Loading", "train", "--config", unbroken[0], "-o", tmp_path / "run"
    )
    assert (status, out) == (130, "")
    assert err.splitlines()[1:] == ["Interrupted."]
    assert not (tmp_path / "run").exists()
