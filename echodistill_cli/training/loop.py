"""The training loop: resume, step, log, preview, save, stop on a signal; and the run's trackers."""

from __future__ import annotations

import functools
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from echodistill_cli.config.build import config_to_dict
from echodistill_cli.config.schema import Config
from echodistill_cli.config.warnings import check_trackers
from echodistill_cli.data.grids import grid
from echodistill_cli.data.images import save_png, to_image
from echodistill_cli.data.photos import Photo, photo_records
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.errors import (
    ConfigError,
    DeviceMemoryError,
    EchoDistillError,
    Interrupted,
    counted,
    is_out_of_memory,
)
from echodistill_cli.files import public_name, recover_below, remove
from echodistill_cli.models.compiling import compile_blocks, decide
from echodistill_cli.models.device import next_saving, peak_memory_mib
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.runs import OnMessage, OnStep, Run
from echodistill_cli.training.state import JOINT, PHASES, TrainingState
from echodistill_cli.training.steps import PHASE_STEPS

Stop = Callable[[], bool]  # called after each step; True saves the run and ends it


def never() -> bool:
    """Do not ask to stop."""
    return False


class StopRequest:
    """Context that records SIGINT and SIGTERM instead of raising them; a second SIGINT interrupts at once.

    Outside the main thread Python allows no handlers, and no signal is recorded.

    Args:
        announce: called when the first signal arrives, in a thread of its own: the signal may have interrupted a write
            to the very stream that it wants to write to, which Python refuses within one thread.
        asked: whether the caller of the training asks it to stop; this counts as a SIGINT.

    Attributes:
        received: number of the last signal, or None.
    """

    def __init__(self, announce: Callable[[], None] = lambda: None, asked: Stop = never) -> None:
        self.announce, self.asked = announce, asked
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._arrivals: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one kind that a signal handler may put into
        self._announcer = threading.Thread(target=self._announce, daemon=True)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._announcer.start()
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._announcer.is_alive():
            self._arrivals.put(0)
            self._announcer.join()

    def number(self) -> int | None:
        """Return the number of the signal to stop for; None to go on."""
        return self.received or (signal.SIGINT if self.asked() else None)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self._arrivals.put(number)
        self.received = number

    def _announce(self) -> None:
        if self._arrivals.get():
            self.announce()


@contextmanager
def removed_if_untrained(run: Run) -> Iterator[None]:
    """Context that deletes a new run again if an error ends it before anything was saved.

    The same command then works as soon as its cause is gone, where an empty run would be in the way.
    """
    try:
        yield
    except Exception:
        if not run.list_checkpoints() and not run.read_metrics():
            for entry in run.folder.iterdir():
                remove(entry)
            with suppress(OSError):  # it is a link, or a disk of its own
                run.folder.rmdir()
        raise


def resumable_state(
    run: Run, step: int | None, photos: Sequence[Photo], on_message: OnMessage = lambda _line: None
) -> dict[str, Any] | None:
    """Return the state to resume a run from; None if it stopped before its first checkpoint.

    Args:
        run: locked, because what a killed process left in its folder is settled first.
        step: of the checkpoint; None for the newest.
        photos: the usable photos now.
        on_message: called with a line if the checkpoint does not record its photos.

    Raises:
        ConfigError: the checkpoint does not exist, was made with other photos or settings, or is beyond `train.steps`.
        EchoDistillError: the checkpoint is damaged.
    """
    recover_below(run.folder)
    if step is None and not run.list_checkpoints():
        return None
    saved = run.load_checkpoint(step)
    if "photos" not in saved:
        on_message(f"An older version made the checkpoint of {run.folder}: whether the photos changed is not known")
    if saved["photo_count"] != len(photos):
        changes = f"{counted(saved['photo_count'], 'photo')}, but {run.config.concept.photos} has {len(photos)}"
    else:
        changes = photo_changes(saved.get("photos", []), photo_records(photos) if "photos" in saved else [])
        changes = changes and f"other photos: {changes}"
    if changes:
        raise ConfigError(
            f"{run.folder} was trained on {changes}.",
            "Resume with the same photos, or start a new run in another --output.",
        )
    if saved["step"] > run.config.train.steps:
        raise ConfigError(
            f"{run.folder} is at step {saved['step']} already, beyond --steps {run.config.train.steps}.",
            f"Finish there with --steps {saved['step']}, or go back with --from-step.",
        )
    return saved


def photo_changes(recorded: Sequence[Mapping[str, str]], current: Sequence[Mapping[str, str]]) -> str:
    """Return in words how the photos differ from those of a checkpoint; "" if they do not.

    Args:
        recorded: `photo_records` of the checkpoint.
        current: `photo_records` of the photos now.
    """
    before, now = ({record["name"]: record for record in records} for records in (recorded, current))
    changes = [f"{name} is missing" for name in before if name not in now]
    changes += [f"{name} is new" for name in now if name not in before]
    same = [name for name in now if name in before]
    changes += [
        f"the {part} of {name} changed"
        for name in same
        for part in now[name]
        if now[name][part] != before[name].get(part)
    ]
    if not changes and list(before) != list(now):
        changes = ["their order changed"]
    return ", ".join(changes)


def restore(state: TrainingState, saved: Mapping[str, Any], run: Run) -> None:
    """Load a checkpoint's content into a state.

    Raises:
        EchoDistillError: it does not fit the settings, because one of both was forged.
    """
    try:
        state.load_state_dict(saved)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EchoDistillError(
            f"The checkpoint of {run.folder} does not fit its settings ({reason}).",
            "Choose another with --from-step, or start again with train --overwrite.",
        ) from error


def train_to_end(
    state: TrainingState,
    run: Run,
    on_step: OnStep,
    on_message: OnMessage = lambda _line: None,
    stop: Stop = never,
) -> None:
    """Train until the last phase ends, and write into `run` what its configuration asks for.

    Args:
        state: fresh or loaded from a checkpoint.
        run: the folder of the run.
        on_step: called after each step with its metrics.
        on_message: called with a line when a signal arrives.
        stop: called after each step; True saves the run and ends it.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived, or `stop` returned True; a checkpoint has been written.
        DeviceMemoryError: the device ran out of memory; the hint names the next setting to try.
        EchoDistillError: training diverged, or a file could not be written.
    """
    every = state.config.run
    announce = functools.partial(
        on_message, "Stopping after this step to save it. Press Ctrl-C again to stop now without saving."
    )
    compile_models(state, on_message)
    with memory_watched(state), tracking(state.config, run.folder) as track, StopRequest(announce, stop) as request:
        if state.step in (0, state.config.train.steps):
            preview(state, run)
        for phase in PHASES:
            while state.phase is phase:
                metrics = timed_step(state)
                number, is_last = state.finished_in(phase), state.phase is not phase
                if phase is JOINT:
                    run.log(metrics)
                    track(metrics)
                on_step(metrics)
                if phase is JOINT and (is_last or number % every.sample_every == 0):
                    preview(state, run)
                signal_number = request.number()  # read once, because it can change between any two lines
                if signal_number or number % every.save_every == 0 or is_last:
                    checkpoint = run.save_checkpoint(state.step, state.state_dict())
                if signal_number and state.phase:
                    message = f"Stopped at {state.place}, saved in {checkpoint}."
                    raise Interrupted(f"{message} Resume: echodistill train --resume -o {run.folder}", signal_number)


def compile_models(state: TrainingState, on_message: OnMessage = lambda _line: None) -> None:
    """Compile the UNets and image encoders of a run if `train.compile` says so; report it in a line."""
    setting, pair = state.config.train.compile, state.pair
    wanted, line = decide(setting, pair.device, state.config.train.steps - state.step)
    if line:
        on_message(line)
    if wanted:
        encoders = [c.backbone for c in state.critics if isinstance(c.backbone, ImageBackbone)]
        encoders += [state.identity_encoder] if state.identity_encoder else []
        compile_blocks([pair.student.unet, pair.teacher.unet, *encoders], setting)


@contextmanager
def memory_watched(state: TrainingState) -> Iterator[None]:
    """Context that reports exhausted memory in one line, with the peak and the next setting to try.

    Raises:
        DeviceMemoryError: the device ran out of memory inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        device = state.pair.device
        raise DeviceMemoryError(
            f"Out of memory on {device}, after a peak of {peak_memory_mib(device):,.0f} MiB.", next_saving(state.config)
        ) from error


def timed_step(state: TrainingState) -> dict[str, float]:
    """Take the next step and return its metrics, number, seconds, learning rates and peak memory in MiB.

    A step of the teacher alone, in the head start or the carry back, also has the number of its own phase.
    """
    started = time.perf_counter()
    metrics = state.settle(PHASE_STEPS[state.phase or JOINT](state))
    rates = {f"lr_{name}": state.optimizers.rate(name) for name in state.optimizers}
    timing = {
        "step_seconds": time.perf_counter() - started,
        "peak_memory_mib": peak_memory_mib(state.pair.device),
    }
    return {"step": state.step, **metrics, **rates, **timing}


def preview(state: TrainingState, run: Run) -> None:
    """Write an image grid with one row per prompt: the subject on the left, its class on the right.

    The images of the class show drift.
    """
    settings, config = state.config.run, state.config
    class_name = config.concept.class_name or "object"
    prompts = settings.sample_prompts or (
        f"a photo of a {config.subject}",
        f"a photo of a {config.subject} on the beach",
    )
    texts = [text for prompt in prompts for text in (prompt, prompt.replace(config.subject, class_name))]
    seeds = list(range(settings.sample_seeds))
    labels = [text for text in texts for _ in seeds]
    images = generate(
        state.pair,
        labels,
        seeds * len(texts),
        SamplingSettings(
            size=config.model.resolution, batch_size=config.train.batch_size, steps=state.pair.student.steps
        ),
    )
    with state.at_export_scale():
        sheet = grid([to_image(image) for image in images], columns=2 * len(seeds), labels=labels)
    metadata = {"prompts": " | ".join(texts), "seeds": ", ".join(map(str, seeds)), "step": str(state.step)}
    save_png(run.samples / f"step-{state.step:06d}.png", sheet, metadata)


Track = Callable[[Mapping[str, float]], None]


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Track]:
    """Context that provides a function which sends a step's metrics to every tracker of `run.report_to`.

    Args:
        config: of the run.
        folder: of the run; local trackers write into its `logs`.

    Raises:
        ConfigError: a tracker is unknown or its package is missing.
        EchoDistillError: a tracker could not start.
    """
    names = config.run.report_to
    check_trackers(names)
    if not names:
        yield lambda _metrics: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder / "logs")
    try:
        with redirect_stdout(sys.stderr):  # stdout is for the result; trackio greets there
            accelerator.init_trackers("echodistill", config=_flat(config))
    except Exception as error:  # each tracker raises other errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EchoDistillError(
            f"--report-to {','.join(names)} could not start ({reason}).", "Fix this, or omit --report-to."
        ) from error
    try:
        yield lambda metrics: accelerator.log(dict(metrics), step=int(metrics["step"]))
    finally:
        with redirect_stdout(sys.stderr):
            accelerator.end_training()


def _flat(config: Config) -> dict[str, str | float]:
    """Return the settings by dotted key for trackers; local paths are reduced to their last part."""
    tables = config_to_dict(config)
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {key: value if isinstance(value, (int, float)) else _public(value) for key, value in flat.items()}


def _public(value: str | list[str]) -> str:
    if isinstance(value, list):
        return ", ".join(map(_public, value))
    return public_name(value)
