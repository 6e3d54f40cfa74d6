"""Bring many subjects to their end: skip, start, retry, stop, and note each attempt in results.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Protocol

from echodistill_cli.config.work import work_of
from echodistill_cli.errors import EchoDistillError, Interrupted
from echodistill_cli.files import explained, make_folder
from echodistill_cli.many.local import LocalEngine
from echodistill_cli.many.store import check_store
from echodistill_cli.many.subject import Event, Outcome, Subject, finished_result
from echodistill_cli.outputs.requests import LOCAL, EngineRequest

OnEvent = Callable[[Event], None]
RESULTS, LOGS = "results.jsonl", "logs"
_POLL_SECONDS = 0.5
_THREADS = 8  # look at files and storage at once


class Engine(Protocol):
    """Starts attempts and reports what becomes of them; each ends with an "end" or a "died" event."""

    @property
    def has_room(self) -> bool:
        """Whether another attempt can start now."""

    def start(self, subject: Subject) -> None:
        """Start an attempt."""

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what happened since the last call; waits for up to `seconds` if nothing did."""

    def stop(self) -> None:
        """Ask every running attempt to save and end."""

    def kill(self) -> None:
        """End every running attempt at once."""

    def close(self) -> None:
        """Free what the engine holds."""


def run_all(
    subjects: Sequence[Subject],
    finished: Mapping[str, Outcome],
    request: EngineRequest,
    output: Path,
    on_event: OnEvent,
) -> dict[str, Outcome]:
    """Bring subjects to their end and return how each ended, in their order.

    Args:
        subjects: with different names.
        finished: what `look_up` returned for them.
        request: where to run them.
        output: folder of results.jsonl and the logs.
        on_event: called with every event; the last one of a subject is "end".

    Raises:
        ConfigError: the engine cannot start.
        Interrupted: SIGINT or SIGTERM came; what ran is saved, and the same call continues.
    """
    for subject in subjects:
        on_event(Event(subject.name, "waiting", work_of(subject.config).lengths))
    for name, outcome in finished.items():
        on_event(Event(name, "end", outcome.to_dict()))
    waiting = [subject for subject in subjects if subject.name not in finished]
    run = _Running(deque(waiting), request.retries, make_folder(output), on_event, dict(finished))
    if waiting:
        with _Stop() as stop:
            engine = _start_engine(request, waiting, output)
            try:
                _loop(run, engine, stop)
            finally:
                engine.kill()
                engine.close()
        if stop.received:
            saved = sum(outcome.status == "stopped" for outcome in run.outcomes.values())
            left = len(subjects) - sum(outcome.exit_code == 0 for outcome in run.outcomes.values())
            message = f"Stopped. Not done: {left}, of which {saved} were running and are saved."
            raise Interrupted(f"{message} The same command continues.", stop.received)
    return {subject.name: run.outcomes[subject.name] for subject in subjects}


def look_up(subjects: Sequence[Subject]) -> dict[str, Outcome]:
    """Return the result of each subject that is finished already, here or in its storage.

    Raises:
        EchoDistillError: the storage cannot be reached.
    """
    for url in {subject.store for subject in subjects if subject.store}:
        check_store(url)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_finished, subjects))
    return {outcome.name: outcome for outcome in found if outcome}


def _finished(subject: Subject) -> Outcome | None:
    outcome = finished_result(subject)
    store = None if outcome else subject.open_store()
    text = store.read_result() if store else None
    return outcome if text is None else finished_result(subject, text)


def _start_engine(request: EngineRequest, subjects: Sequence[Subject], output: Path) -> Engine:
    # Whoever names a device by its number means that one.
    devices = {subject.config.model.device for subject in subjects}
    on_gpu = any(device not in ("cpu", "mps") and ":" not in device for device in devices)
    if request.on == LOCAL:
        return LocalEngine(output / LOGS, request.workers, request.gpus_per_subject, on_gpu=on_gpu)
    from echodistill_cli.many.on_ray import RayEngine

    return RayEngine(request.on, request.workers, request.gpus_per_subject, on_gpu=on_gpu)


@dataclass
class _Running:
    """What is known while subjects run.

    Attributes:
        waiting: subjects to start, in order.
        retries: how often a subject is tried again.
        output: folder of results.jsonl and the logs.
        on_event: receives every event.
        outcomes: how subjects ended.
        active: subjects that run, and where.
    """

    waiting: deque[Subject]
    retries: int
    output: Path
    on_event: OnEvent
    outcomes: dict[str, Outcome]
    active: dict[str, tuple[Subject, dict[str, Any]]] = field(default_factory=dict)

    def start(self, engine: Engine) -> None:
        """Start what has room."""
        while self.waiting and engine.has_room:
            subject = self.waiting.popleft()
            self.active[subject.name] = subject, {}
            engine.start(subject)

    def handle(self, event: Event, *, is_stopping: bool) -> None:
        """Note an event, and decide what becomes of a subject whose attempt ended."""
        if event.name not in self.active:  # late news of an attempt that was given up
            return
        subject, about = self.active[event.name]
        if event.kind == "begin":
            about |= event.data
            place = f"on {about['host']}, process {about['pid']}"
            self._log(event.name, f"attempt {subject.attempts + 1} {place}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
        if event.kind == "message":
            self._log(event.name, event.data)
        if event.kind == "step":
            about["steps"] = int(event.data["step"])
        if event.kind not in ("end", "died"):
            self.on_event(event)
            return
        del self.active[event.name]
        if event.kind == "died" and is_stopping and "steps" not in about:  # it had no time to begin
            return
        outcome = Outcome(**event.data) if event.kind == "end" else _died(subject, about, event.data)
        self._record(outcome)
        if outcome.status in ("died", "stopped", "busy") and not is_stopping and subject.attempts < self.retries:
            # A process that is killed, or another command, needs time: first do what nobody else does.
            again = self.waiting.append if outcome.status == "busy" else self.waiting.appendleft
            again(dataclasses.replace(subject, attempts=subject.attempts + 1))
            self.on_event(Event(event.name, "retry", outcome.to_dict()))
            return
        outcome = dataclasses.replace(outcome, status="failed") if outcome.status == "busy" else outcome
        self.outcomes[event.name] = outcome
        self.on_event(Event(event.name, "end", outcome.to_dict()))

    def _record(self, outcome: Outcome) -> None:
        self._log(outcome.name, f"{outcome.status}. {outcome.error}".strip())
        self._append(RESULTS, json.dumps(outcome.to_dict()))

    def _log(self, name: str, line: str) -> None:
        make_folder(self.output / LOGS)
        self._append(f"{LOGS}/{name}.log", line)

    def _append(self, file: str, line: str) -> None:
        """Append a line in one write, so that lines of several commands do not mix."""
        with explained(self.output / file), (self.output / file).open("ab", buffering=0) as opened:
            _wait_for_others(opened)
            opened.write(f"{line}\n".encode("utf-8", "backslashreplace"))


def _wait_for_others(opened: BinaryIO) -> None:
    """Lock a file until it is closed: on a network disk, appends of two hosts may overwrite each other."""
    with contextlib.suppress(ImportError, OSError):  # Windows, and disks without locks
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX)


def _died(subject: Subject, about: Mapping[str, Any], reason: str) -> Outcome:
    where = {key: about[key] for key in ("host", "pid", "steps") if key in about}
    fields: dict[str, Any] = {"host": "", "pid": 0} | where
    code = EchoDistillError.exit_code
    return Outcome(
        subject.name,
        "died",
        code,
        reason,
        attempt=subject.attempts + 1,
        config_hash=subject.fingerprint,
        **fields,
    )


def _loop(run: _Running, engine: Engine, stop: _Stop) -> None:
    """Start and watch attempts until none is left."""
    is_told = is_killed = False
    while run.active or (run.waiting and not stop.received):
        if not stop.received:
            run.start(engine)
        for event in engine.events(_POLL_SECONDS):
            run.handle(event, is_stopping=bool(stop.received))
        if stop.received and not is_told:
            engine.stop()
            is_told = True
        if stop.interrupts > 1 and not is_killed:
            engine.kill()
            is_killed = True


class _Stop:
    """Context that records SIGINT and SIGTERM instead of raising them.

    Outside the main thread Python allows no handlers, and none is recorded.

    Attributes:
        received: number of the first signal, or 0.
        interrupts: how often SIGINT came.
    """

    def __init__(self) -> None:
        self.received = self.interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        self.interrupts += number == signal.SIGINT
