"""The training loop: step, log, preview, save, and stop when asked; everything it decides stands on one page."""

from __future__ import annotations

import functools
import importlib.util
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from echodistill_cli.config.build import config_to_dict
from echodistill_cli.config.schema import Config, nearest
from echodistill_cli.data.images import grid, save_png, to_image
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.errors import ConfigError, DeviceMemoryError, EchoDistillError, Interrupted, is_out_of_memory
from echodistill_cli.files import public_name
from echodistill_cli.models.device import next_saving, peak_memory_mib
from echodistill_cli.runs import OnStep, Run
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import carry_back_step, head_start_step, training_step


class StopRequest:
    """A context in which SIGINT and SIGTERM are remembered instead of raised; a second SIGINT interrupts at once.

    `received` is the signal's number, or None. Outside the main thread, where Python allows no handlers, it only stays
    None.

    Args:
        announce: called when the first signal comes.
    """

    def __init__(self, announce: Callable[[], None] = lambda: None) -> None:
        self.announce = announce
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.announce()
        self.received = number


def train_to_end(
    state: TrainingState, run: Run, on_step: OnStep, on_message: Callable[[str], None] = lambda _line: None
) -> None:
    """Take `state` to its last step, writing into `run` as its configuration says.

    Args:
        observe: called after each step with its metrics. say: called with a line when a signal came.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
        DeviceMemoryError: the device ran out of memory; the hint names the next thing to try.
        EchoDistillError: training diverged, or a file could not be written.
    """
    every, last = state.config.run, state.config.train.steps
    announce = functools.partial(
        on_message, "Stopping after this step, to save it; Ctrl-C again stops at once, unsaved."
    )
    with memory_watched(state), tracking(state.config, run.folder) as track, StopRequest(announce) as stop:
        if state.step in (0, last):
            preview(state, run)
        while state.step < last or state.in_carry_back:
            phase = state.phase
            joint = phase == "training"
            metrics = timed_step(state)
            if joint:
                run.log(metrics)
                track(metrics)
            on_step(metrics)
            student_done, number = joint and state.step == last, state.finished_in(phase)
            done = state.step == last and not state.in_carry_back
            if student_done or (joint and number % every.sample_every == 0):
                preview(state, run)
            signal_number = stop.received  # read once: it may come between any two lines
            if done or student_done or signal_number or number % every.save_every == 0:
                saved = run.save_checkpoint(state.step, state.state_dict())
            if signal_number and not done:
                message = f"Stopped at {state.place}, saved in {saved}."
                raise Interrupted(f"{message} Go on: echodistill train --resume -o {run.folder}", signal_number)


@contextmanager
def memory_watched(state: TrainingState) -> Iterator[None]:
    """Turn an exhausted memory into one line that names the peak and the next setting to try.

    Raises:
        DeviceMemoryError: the block ran out of memory.
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
    """One step's metrics, with its number, its seconds, the learning rates and the peak memory in MiB.

    A step of the teacher alone, in its head start or in the carry back, has a number of its own besides.
    """
    started = time.perf_counter()
    steps = {"head start": head_start_step, "training": training_step, "carry back": carry_back_step}
    metrics = steps[state.phase](state)
    rates = {f"lr_{name}": state.optimizers.rate(name) for name in state.optimizers}
    timing = {
        "step_seconds": time.perf_counter() - started,
        "peak_memory_mib": peak_memory_mib(state.pair.device),
    }
    return {"step": state.step, **metrics, **rates, **timing}


def preview(state: TrainingState, run: Run) -> None:
    """Write one grid: a row per prompt; first with the concept's word, then without it, so that drift is seen."""
    settings, config = state.config.run, state.config
    without = config.concept.class_name or "object"
    prompts = settings.sample_prompts or (
        f"a photo of a {config.subject}",
        f"a photo of a {config.subject} on the beach",
    )
    asked = [text for prompt in prompts for text in (prompt, prompt.replace(config.subject, without))]
    seeds = list(range(settings.sample_seeds))
    drawn = generate(
        state.pair,
        [prompt for prompt in asked for _ in seeds],
        seeds * len(asked),
        SamplingSettings(size=config.model.resolution, batch_size=config.train.batch_size),
    )
    with state.at_export_scale():
        sheet = grid([to_image(pixels) for pixels in drawn], columns=2 * len(seeds))
    texts = {"prompts": " | ".join(asked), "seeds": ", ".join(map(str, seeds)), "step": str(state.step)}
    save_png(run.samples / f"step-{state.step:06d}.png", sheet, texts)


TRACKERS = ("tensorboard", "wandb")
Track = Callable[[Mapping[str, float]], None]


def check_trackers(names: Sequence[str]) -> None:
    """See that every tracker of `run.report_to` is known and installed, before anything is loaded for it.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if name not in TRACKERS:
            near = nearest(name, TRACKERS)
            raise ConfigError(
                f"--report-to {name}: it is one of {', '.join(TRACKERS)}.", f"Did you mean {near}?" if near else None
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: its package is missing.", f"pip install 'echodistill[{name}]'")


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Track]:
    """Give a function that hands one step's metrics (with its "step") to every tracker of `run.report_to`.

    Raises:
        ConfigError: as `check_trackers`.
    """
    names = config.run.report_to
    check_trackers(names)
    if not names:
        yield lambda _metrics: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=list(names), project_dir=folder / "logs")
    try:
        accelerator.init_trackers("echodistill", config=_flat(config))
    except Exception as error:  # each tracker has its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EchoDistillError(
            f"--report-to {','.join(names)} did not start ({reason}).", "Or leave it out."
        ) from error
    try:
        yield lambda metrics: accelerator.log(dict(metrics), step=int(metrics["step"]))
    finally:
        accelerator.end_training()


def _flat(config: Config) -> dict[str, str | float]:
    """Settings by dotted key, as trackers want them; of paths on this machine only the last part."""
    tables = config_to_dict(config)
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {key: value if isinstance(value, (int, float)) else _public(value) for key, value in flat.items()}


def _public(value: str | list[str]) -> str:
    if isinstance(value, list):
        return ", ".join(map(_public, value))
    return public_name(value)
