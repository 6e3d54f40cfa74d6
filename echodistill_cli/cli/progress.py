"""What a person sees while something runs: stderr only; a rich bar on a terminal, plain lines elsewhere.

And the one line in which a command that fails says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from echodistill_cli.config.schema import Config

_PLAIN_LINES = 20  # lines that a whole run prints where there is no terminal

# What is counted in which phase; a step of the teacher alone has the joint ones' number besides, which stands last.
_PHASES = {"head_start_step": "head start", "carry_back_step": "carry back", "step": "training"}

# Shown beside the bar, in this order; the names are those of `metrics.jsonl`.
_SHOWN = ("denoising", "latent", "identity", "adversarial", "echo_pool")


def stderr_console() -> Console:
    """The console of stderr; rich asks the environment for NO_COLOR and the like."""
    return Console(stderr=True)


def say_to(console: Console, *, quiet: bool) -> Callable[[str], None]:
    """What prints a line as it stands, unless `quiet`."""
    if quiet:
        return lambda _line: None
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_error(message: str, label: str = "error: ") -> None:
    """Say in one line on stderr what went wrong."""
    line = " ".join(message.split())
    stderr_console().print(Text.assemble((label, "bold red"), line), highlight=False, soft_wrap=True)


class TrainingProgress:
    """A context that shows a training run's progress.

    Args:
        console: of stderr. config: of the run, for its steps and the teacher's alone. quiet: show nothing.
    """

    def __init__(self, console: Console, config: Config, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.lengths = {
            "step": config.train.steps,
            "head_start_step": config.train.head_start,
            "carry_back_step": config.echo.carry_back,
        }
        self.phase, self.steps = "", config.train.steps
        self.say = say_to(console, quiet=quiet)
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.started, self.first_step = 0.0, 0
        self.latest: dict[str, float] = {}

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Show one finished step, of the run or of the teacher alone."""
        if self.quiet:
            return
        counted = next(name for name in _PHASES if name in metrics)
        step, phase = int(metrics[counted]), _PHASES[counted]
        if self.phase != phase:
            self._start(phase, self.lengths[counted], step, metrics.get("step_seconds", 0.0))
        self.latest |= {name: metrics[name] for name in _SHOWN if name in metrics}
        skipped = [name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_")]
        if skipped:
            self.say(f"step {step}: skipped for {', '.join(skipped)}, whose loss or gradient is not finite")
        if "echo_made" in metrics:
            self.say(echo_line(metrics))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step)
        elif step % max(1, self.steps // _PLAIN_LINES) == 0 or step == self.steps:
            name = "step" if counted == "step" else phase
            self.say(f"{name} {step}/{self.steps}  {self._remaining(step)}  {self._losses()}")

    def _start(self, phase: str, steps: int, step: int, seconds: float) -> None:
        """Begin a phase: its own bar, its own clock."""
        self.phase, self.steps = phase, steps
        self.started, self.first_step = time.monotonic() - seconds, step - 1
        if not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        # Steps on a CPU may take minutes: the time left is told from all steps of the last hour.
        self.bar = Progress(TextColumn(phase), *columns, console=self.console, speed_estimate_period=3600)
        self.bar.add_task(phase, total=self.steps, completed=step)
        if self.live is None:
            self.live = Live(get_renderable=self._view, console=self.console)
            self.live.start()

    def _view(self) -> RenderableType:
        """The bar, and the losses in a line below it."""
        assert self.bar is not None
        return Group(self.bar, Text(self._losses(), "dim", no_wrap=True, overflow="ellipsis"))

    def _losses(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self.latest.items())

    def _remaining(self, step: int) -> str:
        done = max(step - self.first_step, 1)
        seconds = (time.monotonic() - self.started) / done * (self.steps - step)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def echo_line(metrics: Mapping[str, float]) -> str:
    """One line on what a refresh of the echo's pool made, kept and dropped."""
    reasons = {
        "echo_identity": "too little of the subject",
        "echo_photo_copy": "copies of a photo",
        "echo_duplicate": "alike",
        "echo_crowded": "worse than the pool",
    }
    fell = ", ".join(f"{metrics[key]:.0f} {words}" for key, words in reasons.items() if metrics[key])
    kept = f"kept {metrics['echo_kept']:.0f}" if metrics["echo_kept"] else "kept nothing"
    return f"echo at step {metrics['step']:.0f}: drew {metrics['echo_made']:.0f}, {kept}" + (
        f" ({fell})" if fell else ""
    )
