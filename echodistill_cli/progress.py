"""What a person sees while something runs: stderr only; a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_LINES = 20  # lines that a whole run prints where there is no terminal

# Shown beside the bar, in this order; the names are those of `metrics.jsonl`.
_SHOWN = ("denoising", "latent", "identity", "adversarial", "echo_pool")


class TrainingProgress:
    """A context that shows a training run's progress.

    Args:
        console: of stderr. steps: of the whole run. quiet: show nothing.
    """

    def __init__(self, console: Console, steps: int, *, quiet: bool) -> None:
        self.console, self.steps, self.quiet = console, steps, quiet
        self.bar: Progress | None = None
        self.started, self.first_step = 0.0, 0
        self.latest: dict[str, float] = {}

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Show one finished step."""
        if self.quiet:
            return
        step = int(metrics["step"])
        if not self.started:
            self._start(step)
        self.latest |= {name: metrics[name] for name in _SHOWN if name in metrics}
        losses = "  ".join(f"{name} {value:.3g}" for name, value in self.latest.items())
        if "echo_made" in metrics:
            self.say(echo_line(metrics))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, losses=losses)
        elif step % max(1, self.steps // _PLAIN_LINES) == 0 or step == self.steps:
            self.say(f"step {step}/{self.steps}  {self._remaining(step)}  {losses}")

    def _start(self, step: int) -> None:
        self.started, self.first_step = time.monotonic() - 1e-3, step - 1
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}", style="dim"),
                console=self.console,
            )
            self.bar.add_task("training", total=self.steps, losses="", completed=step)
            self.bar.start()

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
