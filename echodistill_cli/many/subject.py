"""One subject and one attempt at it: fetch, resume or start, train, write `result.json`, push.

OUTPUT/
  results.jsonl          an object per attempt
  logs/dog.log           what the attempts at a subject reported
  dog/                   the run folder
  dog/result.json        written last: a run that has it is whole
  .dog.lock              ID and host of the process that attempts the subject
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import config_from_dict, config_to_dict
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import DeviceMemoryError, EchoDistillError, Interrupted, is_out_of_memory
from echodistill_cli.files import make_folder, read_small, remove, write_text
from echodistill_cli.locks import locked
from echodistill_cli.many.checks import check_resumable, photos_fingerprint
from echodistill_cli.many.store import Store
from echodistill_cli.runs import OnMessage, OnStep, Run

RESULT = "result.json"
# The server of a network disk frees the lock of a host that died after its lease, which is 90 s in NFS 4.
_LEASE_SECONDS = 100.0
_INTERRUPTED = 130


@dataclass(frozen=True)
class Subject:
    """A subject, as a worker anywhere needs to know it.

    Attributes:
        config: settings of its run. The name of the run is that of the subject.
        fingerprint: hash of what decides the result; a result with another one counts for nothing.
        train: function that trains a run, as "module:function".
        origin: place in the manifest, for messages.
        after: function that makes something of a finished run, as "module:function"; "" for none.
        extra: plain values for `after`.
        store: URL below which the run is stored too; "" for none.
        environment: variables to set before libraries are imported.
        attempts: earlier attempts of this command.
    """

    config: Config
    fingerprint: str
    train: str
    origin: str = ""
    after: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    store: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    attempts: int = 0

    @property
    def name(self) -> str:
        """Name of the subject, its run and its folder."""
        return self.config.name

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return values | {"config": config_to_dict(self.config)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Subject:
        """Return the subject that `to_dict` wrote."""
        return cls(**{**values, "config": config_from_dict(values["config"])})

    def open_store(self) -> Store | None:
        """Return the subject's place in the shared storage; None without one."""
        return Store(f"{self.store.rstrip('/')}/{self.name}", self.config.output) if self.store else None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: a line of results.jsonl, and for "done" the content of result.json.

    Attributes:
        name: of the subject.
        status: done, failed, stopped, died (its process was killed), busy (another process has it) or was finished.
        exit_code: what `train` would have ended with. 2, 3, 4 and 5 would fail again.
        error: why it did not succeed; "" if it did.
        host: where it ran.
        pid: of its process.
        attempt: number of the attempt, from 1.
        begun_from: joint training steps that an earlier attempt had saved.
        steps: joint training steps in the end.
        seconds: duration.
        lora: the student's LoRA file; "" unless done.
        config_hash: hash of what decides the result.
        photos: hash of the names and sizes of the photos.
        finished: when it ended, in UTC.
        values: what the function after the training returned.
    """

    name: str
    status: str
    exit_code: int = 0
    error: str = ""
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    attempt: int = 1
    begun_from: int = 0
    steps: int = 0
    seconds: float = 0.0
    lora: str = ""
    config_hash: str = ""
    photos: str = ""
    finished: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    values: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Event:
    """What happened to a subject.

    Attributes:
        name: of the subject.
        kind: what happened, see below.
        data: depends on the kind. "waiting": steps of each phase by its name. "begin": host, pid. "message": a line.
            "step": metrics. "end" and "retry": fields of an `Outcome`. "died", which only engines send: a sentence.
    """

    name: str
    kind: str
    data: Any


def finished_result(subject: Subject, text: str | None = None) -> Outcome | None:
    """Return the result of a subject that is whole and was made with these settings and photos, else None.

    Args:
        subject: to look up.
        text: of its result.json; None to read that of its run folder.
    """
    try:
        text = text if text is not None else read_small(subject.config.output / RESULT).decode()
        outcome = Outcome(**json.loads(text))
    except (OSError, ValueError, TypeError):  # damaged: make it again
        return None
    expected = (subject.fingerprint, photos_fingerprint(Path(subject.config.concept.photos)))
    is_ours = (outcome.config_hash, outcome.photos) == expected
    return dataclasses.replace(outcome, status="was finished") if is_ours else None


def attempt(subject: Subject, on_step: OnStep, on_message: OnMessage) -> Outcome:
    """Bring a subject to its end from wherever it is, and return how that went. Raises no errors.

    Args:
        subject: to train.
        on_step: called with the metrics of each step.
        on_message: called with lines about progress.
    """
    os.environ.update(subject.environment)
    progress = _Progress(on_step)
    outcome = functools.partial(_outcome, subject, time.monotonic(), progress)
    try:
        with _locked(subject):
            return _attempt(subject, progress, on_message, outcome)
    except Interrupted as error:
        return outcome("stopped", exit_code=128 + error.signal_number, error=error.message)
    except KeyboardInterrupt:
        return outcome("stopped", exit_code=_INTERRUPTED, error="Stopped outside of the training steps.")
    except EchoDistillError as error:
        status = "busy" if isinstance(error, Busy) else "failed"
        return outcome(status, exit_code=error.exit_code, error=str(error))
    except Exception as error:  # a bug, or an error of a library: the other subjects go on
        code = DeviceMemoryError.exit_code if is_out_of_memory(error) else EchoDistillError.exit_code
        return outcome("failed", exit_code=code, error=f"{type(error).__name__}: {error}")


class Busy(EchoDistillError):
    """Another process attempts the subject."""


class _Progress:
    """Counts steps on their way to a callback, and notices new checkpoints.

    Args:
        on_step: receives the metrics.
    """

    def __init__(self, on_step: OnStep) -> None:
        self.on_step = on_step
        self.begun_from, self.steps = None, 0  # type: int | None, int
        self.on_checkpoint: Callable[[], None] = lambda: None
        self.newest: Callable[[], object] = lambda: None
        self._seen: object = None

    def watch(self, run: Run, on_checkpoint: Callable[[], None]) -> None:
        """Call a function at the first step after each new checkpoint."""
        self.newest = lambda: run.list_checkpoints()[-1:]
        self.on_checkpoint, self._seen = on_checkpoint, self.newest()

    def __call__(self, metrics: Mapping[str, float]) -> None:
        is_joint = not {"head_start_step", "carry_back_step"} & set(metrics)
        self.steps = int(metrics["step"])
        if self.begun_from is None:
            self.begun_from = self.steps - is_joint
        if (newest := self.newest()) != self._seen:
            self._seen = newest
            self.on_checkpoint()
        self.on_step(metrics)


def _outcome(subject: Subject, started: float, progress: _Progress, status: str, **fields: Any) -> Outcome:
    steps = subject.config.train.steps if status == "done" else progress.steps
    # Without a step of its own, a finished attempt found all of them saved.
    begun_from = steps if status == "done" else 0
    return Outcome(
        subject.name,
        status,
        attempt=subject.attempts + 1,
        begun_from=begun_from if progress.begun_from is None else progress.begun_from,
        steps=steps,
        seconds=round(time.monotonic() - started, 2),
        config_hash=subject.fingerprint,
        photos=photos_fingerprint(Path(subject.config.concept.photos)),
        **fields,
    )


def _attempt(subject: Subject, progress: _Progress, on_message: OnMessage, outcome: Callable[..., Outcome]) -> Outcome:
    """Train what is left of a subject under its lock, and write its result."""
    config, store = subject.config, subject.open_store()
    if store:
        store.fetch()
    if done := finished_result(subject):
        return done
    remove(config.output / RESULT)
    if store:
        store.delete_result()
        progress.watch(Run(config.output, config), lambda: _push_or_say(store, on_message))
    exists = check_resumable(config)
    if exists and is_trained(config):
        on_message("is trained already")
    else:
        on_message("continuing its training" if exists else "training")
        try:
            _function(subject.train)(config, resume=exists, on_step=progress, on_message=on_message)
        except Interrupted:
            if store:
                store.push()
            raise
    values = _function(subject.after)(config, subject.extra, on_message) if subject.after else {}
    done = outcome("done", lora=str(config.output / f"{config.name}.safetensors"), values=values)
    write_text(config.output / RESULT, json.dumps(done.to_dict(), indent=2) + "\n")
    if store:
        store.push()
        store.push_result()
    return done


def _push_or_say(store: Store, on_message: OnMessage) -> None:
    """Push a checkpoint; a storage that is away for a moment must not end a training."""
    try:
        store.push()
    except EchoDistillError as error:
        on_message(f"{error} The next checkpoint tries again.")


def is_trained(config: Config) -> bool:
    """Return whether the LoRA file of a run, which is written last, is that of the last step."""
    from echodistill_cli.outputs.artifact import find

    artifact = find(config.output)
    return artifact.is_finished and artifact.metadata("student").get("echodistill.steps") == str(config.train.steps)


@contextlib.contextmanager
def _locked(subject: Subject) -> Iterator[None]:
    """Context in which no other process attempts the subject.

    A retry waits for the other's end, or for the end of a dead host's lock.

    Raises:
        Busy: another process attempts it.
    """
    output = subject.config.output
    file = make_folder(output.parent) / f".{subject.name}.lock"
    deadline = time.monotonic() + (_LEASE_SECONDS if subject.attempts else 0)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(file, f"{output} is being trained"))
                break
            except EchoDistillError as error:
                if time.monotonic() > deadline:
                    raise Busy(error.message, error.hint) from error
                time.sleep(1)
        yield


def _function(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
