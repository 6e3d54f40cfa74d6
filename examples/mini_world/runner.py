"""One loop for every stage of the mini world: budget, learning rate, EMA, resumable checkpoints, a log.

A stage says what to train and what its loss is; the runner does the rest, so that all stages stop on SIGTERM,
resume where they were and log alike.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from examples.mini_world.threads import ThreadGovernor


class Stage(Protocol):
    """What the runner needs to know about a stage."""

    name: str
    network: nn.Module
    batch_size: int
    learning_rate: float
    ema_decay: float

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of one fresh batch after `samples` were seen, and figures worth logging."""
        ...

    def report(self, directory: Path, samples: int) -> dict[str, float]:
        """Draw an image of the progress with the weights now in `network`; figures worth logging."""
        ...


@dataclass(frozen=True)
class Budget:
    """How long this session trains; `anneal` takes the learning rate down to zero over the session."""

    minutes: float | None = None
    samples: int | None = None
    anneal: bool = False
    warmup_updates: int = 300
    checkpoint_minutes: float = 3.0
    report_minutes: float = 10.0

    def progress(self, seconds: float, samples: int) -> float:
        """The part of the session that is over, 0..1; a session without limits never progresses."""
        parts = [0.0]
        if self.minutes is not None:
            parts.append(seconds / (60 * self.minutes))
        if self.samples is not None:
            parts.append(samples / self.samples)
        return max(parts)


@dataclass
class Progress:
    """Everything besides the weights that a resumed run needs; `more` are optimizers that the stage steps itself."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    more: Mapping[str, torch.optim.Optimizer] = field(default_factory=dict)
    samples: int = 0
    updates: int = 0
    average: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.average = [parameter.detach().clone() for parameter in self.network.parameters()]

    def update_average(self, decay: float) -> None:
        """Move the averaged weights; early on the average follows the weights closely."""
        decay = min(decay, (1 + self.updates) / (10 + self.updates))
        current = [parameter.detach() for parameter in self.network.parameters()]
        torch._foreach_lerp_(self.average, current, 1 - decay)

    def swap_average(self) -> None:
        """Exchange trained and averaged weights in place; calling it twice changes nothing."""
        with torch.no_grad():
            for averaged, parameter in zip(self.average, self.network.parameters(), strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(averaged)
                averaged.copy_(kept)

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its final name, then rename: a killed run leaves the old one whole."""
        names = [name for name, _ in self.network.named_parameters()]
        state = {
            "network": self.network.state_dict(),
            "average": dict(zip(names, self.average, strict=True)),
            "optimizer": self.optimizer.state_dict(),
            "more": {name: optimizer.state_dict() for name, optimizer in self.more.items()},
            "samples": self.samples,
            "updates": self.updates,
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(path)

    def load(self, path: Path) -> None:
        """Resume from `path`; the learning rate stays the caller's. A restored export has no optimizer state."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.network.load_state_dict(state["network"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        for name, saved in state.get("more", {}).items():
            self.more[name].load_state_dict(saved)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for averaged, (name, _) in zip(self.average, self.network.named_parameters(), strict=True):
            averaged.copy_(state["average"][name])
        self.samples, self.updates = state["samples"], state["updates"]
        if "rng" in state:
            self.rng.bit_generator.state = state["rng"]
            torch.set_rng_state(state["torch_rng"])


def load_average(path: Path, network: nn.Module) -> int:
    """Load a checkpoint's averaged weights into `network`; returns how many samples they have seen."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({**state["network"], **state["average"]})
    return int(state["samples"])


def _log(path: Path, **record: Any) -> None:
    line = json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()})
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def _update(stage: Stage, progress: Progress, rate: float) -> dict[str, float]:
    """One optimizer step at learning rate `rate`."""
    for group in progress.optimizer.param_groups:
        group["lr"] = rate
    loss, figures = stage.loss(progress.rng, progress.samples)
    progress.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(stage.network.parameters(), 1.0)
    progress.optimizer.step()
    progress.updates += 1
    progress.samples += stage.batch_size
    progress.update_average(stage.ema_decay)
    return {"loss": float(loss.detach()), "grad_norm": float(norm), **figures}


def _report(stage: Stage, progress: Progress, directory: Path) -> dict[str, float]:
    """The stage's own report, made with the averaged weights."""
    progress.swap_average()
    stage.network.eval()
    with torch.no_grad():
        figures = stage.report(directory, progress.samples)
    stage.network.train()
    progress.swap_average()
    return figures


def run_stage(stage: Stage, directory: Path, budget: Budget, seed: int) -> bool:
    """Train until the budget is spent or SIGTERM/SIGINT arrives; always leaves a checkpoint behind.

    Returns:
        Whether the budget was spent; False after a signal.
    """
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint, log = directory / "checkpoint.pt", directory / "log.jsonl"
    optimizer = torch.optim.AdamW(stage.network.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)  # fmt: skip
    torch.manual_seed(seed)
    more = getattr(stage, "more_optimizers", {})
    progress = Progress(stage.network, optimizer, np.random.default_rng(seed), more)
    if checkpoint.exists():
        progress.load(checkpoint)
    stage.network.train()
    with _signals() as stop:
        _loop(stage, progress, budget, directory, stop)
        progress.save(checkpoint)
        figures = _report(stage, progress, directory) if not stop else {}
    _log(log, event="stopped" if stop else "done", samples=progress.samples, **figures)
    return not stop


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Context in which SIGTERM and SIGINT end nothing; yields the numbers of those that came."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, lambda came, _frame: received.append(came)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _loop(stage: Stage, progress: Progress, budget: Budget, directory: Path, stop: list[int]) -> None:
    """The training loop proper; times are wall-clock seconds since the session's start."""
    log, first = directory / "log.jsonl", progress.samples
    began = saved = reported = logged = time.monotonic()
    governor = ThreadGovernor(torch.get_num_threads())
    sums: dict[str, float] = {}
    count = 0
    while not stop and (done := budget.progress(time.monotonic() - began, progress.samples - first)) < 1:
        rate = stage.learning_rate * min(1.0, (progress.updates + 1) / budget.warmup_updates)
        rate *= 1 - done if budget.anneal else 1
        for name, value in _update(stage, progress, rate).items():
            sums[name] = sums.get(name, 0.0) + value
        count += 1
        governor.tick()
        now = time.monotonic()
        if now - logged > 20:
            means = {name: value / count for name, value in sums.items()}
            speed = count * stage.batch_size / (now - logged)
            _log(
                log,
                samples=progress.samples,
                seconds=round(now - began),
                per_second=speed,
                rate=rate,
                **means,
            )
            sums, count, logged = {}, 0, now
        if now - saved > 60 * budget.checkpoint_minutes:
            progress.save(directory / "checkpoint.pt")
            saved = now
        if now - reported > 60 * budget.report_minutes:
            figures = _report(stage, progress, directory)
            _log(log, event="report", samples=progress.samples, **figures)
            reported = logged = time.monotonic()
            sums, count = {}, 0
