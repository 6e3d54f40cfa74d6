"""Train every subject of a manifest: read it, check all of it, and bring each subject to its end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import build_config, config_hash, with_absolute_paths
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import EchoDistillError, counted
from echodistill_cli.files import check_folder
from echodistill_cli.many.checks import check_before, check_resumable
from echodistill_cli.many.manifest import Row, read_manifest
from echodistill_cli.many.schedule import RESULTS, OnEvent, look_up, run_all
from echodistill_cli.many.subject import Outcome, Subject
from echodistill_cli.outputs.requests import LOCAL, ManyRequest
from echodistill_cli.runs import OnMessage, Run

# What the command line sets for other libraries; workers on other machines do not inherit it.
_LIBRARIES = (
    *("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_OFFLINE"),
    *("OMP_WAIT_POLICY", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"),
)
_CHECKS_PER_LINE = 100
_FEW = 16  # subjects that this process checks: five 12-megapixel photos take 1.4 s


@dataclass(frozen=True)
class PlannedSubject:
    """What would become of a subject.

    Attributes:
        name: of the subject.
        class_name: what it is; None if it was not said.
        photos: number of usable photos; None for a finished subject, whose photos are not read again.
        steps: training steps in all.
        state: new, resumes (with the step) or finished.
        output: its run folder.
        origin: file and line of its row.
    """

    name: str
    class_name: str | None
    photos: int | None
    steps: int
    state: str
    output: str
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Many:
    """How every subject ended.

    Attributes:
        output: folder of the run folders.
        outcomes: of the subjects by name, in the order of the manifest.
    """

    output: Path
    outcomes: Mapping[str, Outcome]

    @property
    def exit_code(self) -> int:
        """0 if all are done; the code of the only subject; else 1."""
        codes = [outcome.exit_code for outcome in self.outcomes.values()]
        if len(codes) == 1:
            return codes[0]
        return EchoDistillError.exit_code if any(codes) else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        counts = Counter(outcome.status for outcome in self.outcomes.values())
        subjects = {name: outcome.to_dict() for name, outcome in self.outcomes.items()}
        return {"results": str(self.output / RESULTS), "counts": dict(counts), "subjects": subjects}


Train = Callable[..., object]


def train_many(request: ManyRequest, train: Train, on_event: OnEvent, on_message: OnMessage) -> Many:
    """Train every subject of a manifest; a second call skips what is finished and resumes the rest.

    Args:
        request: subjects, settings and engine.
        train: trains one run; a function of a module, because workers import it.
        on_event: called with every event of every subject.
        on_message: called with lines about the checks.

    Raises:
        ConfigError: the manifest, a setting or the engine is wrong. Nothing was started.
        PhotoError: a subject has too few usable photos. Nothing was started.
        EchoDistillError: the storage cannot be reached.
        Interrupted: SIGINT or SIGTERM came; the same call continues.
    """
    subjects = read_subjects(request, train, on_message)
    finished = look_up(subjects)
    check_all([subject for subject in subjects if subject.name not in finished], on_message)
    return Many(request.output, run_all(subjects, finished, request.engine, request.output, on_event))


def plan_many(request: ManyRequest, train: Train, on_message: OnMessage) -> tuple[PlannedSubject, ...]:
    """Return what `train_many` would do, after the same checks; loads and writes nothing."""
    subjects = read_subjects(request, train, on_message)
    finished = look_up(subjects)
    photos = check_all([subject for subject in subjects if subject.name not in finished], on_message)
    return tuple(
        PlannedSubject(
            subject.name,
            subject.config.concept.class_name,
            photos.get(subject.name),
            subject.config.train.steps,
            "finished" if subject.name in finished else _state(subject.config),
            str(subject.config.output),
            subject.origin,
        )
        for subject in subjects
    )


def read_subjects(request: ManyRequest, train: Train, on_message: OnMessage) -> tuple[Subject, ...]:
    """Return the subjects of a request's shard, and report the settings that were fitted to the memory.

    Raises:
        ConfigError: the manifest or a setting is wrong.
        ModelError: the size of a model is not known, whose settings were to fit the memory.
    """
    check_folder(request.output)
    told = set[str]()

    def build(values: Mapping[str, Any]) -> Config:
        overrides = {**request.overrides, **values}
        layers = overrides.pop("model.student", request.model), request.config_file, overrides
        if not request.vram:
            return with_absolute_paths(build_config(*layers))
        ((fitted, *lines),) = compute(_fitted, [request.vram], [layers])
        for line in lines:
            if line not in told:  # most rows have the same
                on_message(line)
        told.update(lines)
        return with_absolute_paths(build_config(*layers, fitted))

    # Workers on other machines have another working directory.
    output = request.output if request.engine.on == LOCAL else request.output.absolute()
    with _processes(1) as compute:
        rows = read_manifest(request.manifest, output, build)
    index, count = request.shard
    return tuple(subject_of(row, train, request.store) for row in rows[index::count])


def subject_of(row: Row, train: Train, store: str = "", **fields: Any) -> Subject:
    """Return what a worker needs to know of a row.

    Args:
        row: settings and place.
        train: trains one run; a function of a module.
        store: URL of the shared storage; "" for none.
        fields: other fields of `Subject`.
    """
    environment = {name: os.environ[name] for name in _LIBRARIES if name in os.environ}
    reference = f"{train.__module__}:{getattr(train, '__qualname__', '')}"
    fields = {"fingerprint": config_hash(row.config), "environment": environment} | fields
    return Subject(row.config, train=reference, origin=row.place, store=store, **fields)


def check_all(subjects: Sequence[Subject], on_message: OnMessage) -> dict[str, int]:
    """Check all that needs no model, and return the number of usable photos by subject.

    Raises:
        ConfigError: a name, a tracker or an earlier run does not fit; the message names the line.
        PhotoError: a subject has too few usable photos; the message names the line.
    """
    photos, errors = dict[str, int](), list[tuple[str, EchoDistillError]]()
    with _processes(0 if len(subjects) < _FEW else None) as compute:
        for number, (subject, found) in enumerate(zip(subjects, compute(_checked, subjects), strict=True), start=1):
            if number % _CHECKS_PER_LINE == 0:
                on_message(f"Checked the photos of {number} of {counted(len(subjects), 'subject')}")
            if isinstance(found, EchoDistillError):
                errors.append((subject.origin, found))
            else:
                photos[subject.name] = found
    if errors:
        place, first = errors[0]
        more = f" {len(errors) - 1} more rows are wrong, the next is {errors[1][0]}." if len(errors) > 1 else ""
        raise type(first)(f"{place}: {first.message}", f"{first.hint or ''}{more}".strip() or None)
    return photos


def _checked(subject: Subject) -> int | EchoDistillError:
    """Return the number of usable photos, or what is wrong."""
    try:
        count = len(check_before(subject.config).photos)
        check_resumable(subject.config)
    except EchoDistillError as error:
        return error
    return count


def _fitted(vram: str, layers: tuple[str | None, Path | None, Mapping[str, Any]]) -> tuple[Any, ...]:
    """Return the settings that fit a memory, and lines about them."""
    from echodistill_cli.models import device

    plan = device.fit_to_memory(functools.partial(build_config, *layers), vram)
    return dict(plan.settings), *device.memory_lines(plan)


@contextlib.contextmanager
def _processes(count: int | None) -> Iterator[Callable[..., Iterator[Any]]]:
    """Context that provides `map`, in other processes where that is possible.

    Torch and CUDA then stay out of this one. A fork is safe only as long as nothing has started threads, as torch does.

    Args:
        count: of the processes; None for one per core, 0 to compute here.
    """
    if count == 0 or "torch" in sys.modules or "fork" not in multiprocessing.get_all_start_methods():
        yield map
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, mp_context=fork, initializer=_follow, initargs=(os.getpid(),)) as pool:
        yield pool.map


def _follow(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it; a pool's process would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _state(config: Config) -> str:
    if not check_resumable(config):
        return "new"
    checkpoints = Run(config.output, config).list_checkpoints()
    return f"resumes after {checkpoints[-1].name}" if checkpoints else "resumes"
