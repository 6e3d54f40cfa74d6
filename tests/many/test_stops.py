"""What may happen between any two lines of `train-many`: signals, kills, and a second command on the same output."""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import pytest

from echodistill_cli import pipeline
from echodistill_cli.config.build import build_config
from echodistill_cli.many.batch import subject_of
from echodistill_cli.many.manifest import Row
from echodistill_cli.many.schedule import _Running
from echodistill_cli.many.subject import Event, Outcome, Subject, attempt
from echodistill_cli.many.worker import Stop
from echodistill_cli.training.loop import StopRequest
from tests.many.helpers import NAMES, PATIENCE, ROOT, Batch


def until(is_so: Callable[[], object]) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def program(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python program as a process, which is killed in the end."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def stop() -> Iterator[Stop]:
    """A `Stop` that handles SIGTERM."""
    stop = Stop()
    before = signal.signal(signal.SIGTERM, stop.record)
    yield stop
    signal.signal(signal.SIGTERM, before)


class Swallows:
    """Has a destructor in which a signal arrives; Python ignores what a destructor raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_a_library_swallowed_comes_again_at_the_next_step(stop: Stop) -> None:
    Swallows()
    assert stop.received
    events: list[str] = []
    emit = stop.repeated(lambda kind, _data: events.append(kind))
    emit("message", "goes on")
    with StopRequest() as request:
        emit("step", {})
        emit("step", {})
        assert request.number() == signal.SIGTERM
    assert events == ["message", "step", "step"]


def test_an_error_that_a_stop_caused_is_no_failure(stop: Stop) -> None:
    failed = Outcome("one", "failed", 1, "ImportError: partially initialized")
    assert stop.explain(failed) == failed
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    stopped = stop.explain(failed)
    assert (stopped.status, stopped.exit_code) == ("stopped", 143)
    assert "ImportError" in stopped.error
    done = Outcome("one", "done")
    assert stop.explain(done) == done


WORKER = """
import json, signal, sys
from echodistill_cli.many import worker
def attempt(subject, on_step, on_message):
    signal.raise_signal(signal.SIGTERM)
worker.attempt = attempt
worker.main()
"""


def test_a_worker_that_is_stopped_before_it_begins_ends_without_a_traceback(batch: Batch) -> None:
    subject = subjects(batch)[0]
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=Batch.line(subject),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (143, "")


def subjects(batch: Batch) -> Sequence[Subject]:
    """The subjects of a batch."""

    def one(name: str) -> Subject:
        places = {"run.name": name, "run.output": str(batch.output / name)}
        places["concept.photos"] = str(batch.folder / "photos" / name)
        return subject_of(Row(build_config(None, batch.toml, places), name), pipeline.train)

    return [one(name) for name in NAMES]


HOLD = """
import sys
from pathlib import Path
from echodistill_cli.locks import locked
with locked(Path(sys.argv[1]), "held"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_subject_that_another_process_has_is_busy(batch: Batch) -> None:
    subject = subjects(batch)[0]
    batch.output.mkdir()
    with program(HOLD, batch.output / ".one.lock") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        busy = attempt(subject, lambda _metrics: None, lambda _line: None)
    assert (busy.status, busy.exit_code) == ("busy", 1)
    assert f"is being trained by process {holder.pid} on {platform.node()}." in busy.error


class Started:
    """An engine with room for one, which starts nothing."""

    has_room = True

    def __init__(self) -> None:
        self.names: list[tuple[str, int]] = []

    def start(self, subject: Subject) -> None:
        """Note a start."""
        self.names.append((subject.name, subject.attempts))
        self.has_room = False


def test_a_busy_subject_comes_again_after_the_others_and_a_killed_one_at_once(batch: Batch) -> None:
    events: list[Event] = []
    running, engine = _Running(deque(subjects(batch)), 1, batch.output, events.append, {}), Started()
    for status in ("busy", "died", "done", "done", "busy"):
        engine.has_room = True
        running.start(engine)  # type: ignore[arg-type]
        name, attempts = engine.names[-1]
        running.handle(Event(name, "begin", {"host": "here", "pid": 7}), is_stopping=False)
        outcome = Outcome(name, status, status != "done", attempt=attempts + 1)
        running.handle(Event(name, "end", dataclasses.asdict(outcome)), is_stopping=False)
    assert engine.names == [("one", 0), ("two", 0), ("two", 1), ("three", 0), ("one", 1)]
    assert {name: outcome.status for name, outcome in running.outcomes.items()} == {
        "two": "done",
        "three": "done",
        "one": "failed",
    }
    assert [row["status"] for row in batch.attempts("one")] == ["busy", "busy"]
    log = (batch.output / "logs" / "one.log").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in log[::2]] == [
        f"attempt {number} on here, process 7" for number in (1, 2)
    ]


POOL = """
import os, sys
from echodistill_cli.many.batch import _processes
with _processes(1) as compute:
    print(*compute(len, [b"1"]), flush=True)
    sys.stdin.read()
"""


def test_a_killed_command_leaves_no_process_that_checks_photos() -> None:
    with program(POOL) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "1\n"
        (child,) = psutil.Process(command.pid).children()
        command.kill()
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_two_commands_on_one_output_train_every_subject_once(batch: Batch) -> None:
    batch.write("one", "two")
    flags = ("--steps", 4, "--json")
    with batch.process(*flags) as first, batch.process(*flags) as second:
        codes = [first.end(), second.end()]
    assert codes == [0, 0], first.text + second.text
    for name in ("one", "two"):
        rows = [row["status"] for row in batch.attempts(name)]
        assert rows.count("done") == 1
        assert set(rows) <= {"done", "busy", "was finished"}
        assert batch.steps(name) == [1, 2, 3, 4]
