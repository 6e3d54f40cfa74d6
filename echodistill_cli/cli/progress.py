"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from echodistill_cli.cli.show import say_to
from echodistill_cli.config.schema import Config
from echodistill_cli.config.work import CARRY_BACK, HEAD_START, JOINT, work_of
from echodistill_cli.errors import counted

_PLAIN_LINES = 20  # per phase, without a terminal
# The counter of each phase. Metrics of a head-start or carry-back step also hold the joint "step", so it comes last.
_PHASES = {"head_start_step": HEAD_START, "carry_back_step": CARRY_BACK, "step": JOINT}
# Metrics below the bar, in this order.
_SHOWN = ("denoising", "latent", "identity", "adversarial", "paired", "echo_pool")
# The time of the whole run is estimated from these steps; the one before them may load and tune kernels.
_TIMED_STEPS = 4


def phase_of(metrics: Mapping[str, float]) -> tuple[str, int]:
    """Return the phase of a step with these metrics, and the number of the step in that phase."""
    counter = next(name for name in _PHASES if name in metrics)
    return _PHASES[counter], int(metrics[counter])


class TrainingProgress:
    """Context that shows the progress of one training run, or of several with the same number of steps.

    Args:
        console: of stderr.
        config: of the run, for the lengths of its phases.
        quiet: show nothing.
    """

    def __init__(self, console: Console, config: Config, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.work = work_of(config)
        self.phase, self.steps = "", config.train.steps
        self.on_message = say_to(console, quiet=quiet)
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.started, self.first_step, self.step = 0.0, 0, 0
        self.latest: dict[str, float] = {}
        self.began, self.config = time.monotonic(), config
        self.first_targets = config.train.first_targets if config.replays else 0
        self.timed: list[float] | None = []  # seconds of steps of a phase; None after the estimate

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def on_step(self, metrics: Mapping[str, float]) -> None:
        """Show one finished step of any phase."""
        if self.quiet:
            return
        phase, step = phase_of(metrics)
        if self.phase != phase or step <= self.step:  # the next phase, or the next run of a benchmark
            targets = self.first_targets and phase == JOINT and step == 1
            self._start(phase, self.work.lengths[phase], step, None if targets else metrics.get("step_seconds", 0.0))
        self.step = step
        self._estimate(metrics)
        self.latest |= {name: metrics[name] for name in _SHOWN if name in metrics}
        skipped = [name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_")]
        if skipped:
            self.on_message(f"step {step}: skipped {', '.join(skipped)}, because the loss or gradient is not finite")
        if "echo_made" in metrics:
            self.on_message(echo_line(metrics))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step)
            if step == self.steps:
                self._stop()
        elif step % max(1, self.steps // _PLAIN_LINES) == 0 or step == self.steps:
            name = "step" if phase == JOINT else phase
            parts = (f"{name} {step}/{self.steps}", self._remaining(step), self._losses())
            self.on_message("  ".join(filter(None, parts)))
        if phase == HEAD_START and step == self.steps and self.first_targets:
            self.on_message(f"Generating the first targets ({counted(self.first_targets, 'batch', 'batches')})")

    def show_end(self, run: Path) -> None:
        """Print how long the training took and the next command."""
        seconds = round(time.monotonic() - self.began)
        minutes = f"{seconds // 60} min " if seconds >= 60 else ""
        prompt = f"a photo of a {self.config.subject} on the beach"
        following = f"echodistill sample --lora {shlex.quote(str(run))} --prompt {_quoted(prompt)}"
        if not self.quiet:
            self.on_message(f"Done in {minutes}{seconds % 60} s. Next: {following}")

    def _start(self, phase: str, steps: int, step: int, seconds: float | None) -> None:
        """Begin a phase with a bar and a clock; with `seconds` of None, the clock omits its first step."""
        self._stop()
        self.phase, self.steps, self.latest = phase, steps, {}
        self.timed = None if self.timed is None else []
        self.started, self.first_step = time.monotonic() - (seconds or 0), step if seconds is None else step - 1
        if not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        # A step may take minutes on a CPU: estimate the time left from the last hour.
        self.bar = Progress(TextColumn(phase), *columns, console=self.console, speed_estimate_period=3600)
        self.bar.add_task(phase, total=self.steps, completed=step)
        self.live = Live(get_renderable=self._view, console=self.console)
        self.live.start()

    def _stop(self) -> None:
        """End the live display; its last state stays on the screen."""
        if self.live:
            self.live.stop()
        self.live = None

    def _view(self) -> RenderableType:
        """The bar, with the losses in a line below it."""
        assert self.bar is not None
        return Group(self.bar, Text(self._losses(), "dim", no_wrap=True, overflow="ellipsis"))

    def _estimate(self, metrics: Mapping[str, float]) -> None:
        """Say once how long the run takes, after a few steps of its first phase; nothing below a minute."""
        if self.timed is None or "step_seconds" not in metrics:
            return
        self.timed.append(metrics["step_seconds"])
        if len(self.timed) > _TIMED_STEPS:
            seconds = sum(self.timed[1:]) / _TIMED_STEPS
            left, self.timed = self.work.seconds_left(self.phase, self.step, seconds), None
            if left >= 60:
                self.on_message(f"The whole training takes about {left / 60:.0f} min more")

    def _losses(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self.latest.items())

    def _remaining(self, step: int) -> str:
        """Return the time left; nothing before a step on the clock."""
        if step == self.first_step and step < self.steps:
            return ""
        seconds = (time.monotonic() - self.started) / max(step - self.first_step, 1) * (self.steps - step)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def _quoted(text: str) -> str:
    """Return a text in quotes for a shell, in double quotes if they suffice."""
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


class ImageProgress:
    """Context that counts generated images: a bar on a terminal, about ten plain lines elsewhere.

    Args:
        console: of stderr.
        quiet: show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.on_message = say_to(console, quiet=quiet)
        self.bar: Progress | None = None

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def on_image(self, done: int, total: int) -> None:
        """Show that `done` of `total` images are finished."""
        if self.quiet or total == 1:
            return
        if not self.console.is_terminal:
            if done % max(1, total // 10) == 0:
                self.on_message(f"image {done}/{total}")
            return
        if self.bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
            self.bar = Progress(TextColumn("images"), *columns, console=self.console, speed_estimate_period=3600)
            self.bar.add_task("images", total=total)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=done)


def echo_line(metrics: Mapping[str, float]) -> str:
    """Return a line on how many images a refresh of the echo pool generated, kept and dropped."""
    reasons = {
        "echo_identity": "unlike the subject",
        "echo_photo_copy": "copies of a photo",
        "echo_duplicate": "duplicates",
        "echo_crowded": "worse than the pool",
    }
    dropped = ", ".join(f"{metrics[key]:.0f} {words}" for key, words in reasons.items() if metrics[key])
    line = f"echo at step {metrics['step']:.0f}: generated {metrics['echo_made']:.0f}, kept {metrics['echo_kept']:.0f}"
    return f"{line} (dropped: {dropped})" if dropped else line
