"""What a training step of each contestant costs, and how many steps the common budget of CPU time pays for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from echodistill_cli.config.build import build_config
from echodistill_cli.config.work import refreshes
from echodistill_cli.files import write_text
from echodistill_cli.training.batches import add_first_targets
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import echo_step
from examples.benchmark.contestants import CONTESTANTS
from examples.benchmark.subjects import SPLITS
from examples.benchmark.training import Run

COSTS = Path(__file__).parent / "costs.json"
MAIN = ("untouched", "teacher-lora", "denoising", "token-only", "pso", "sequential", "paper", "ours")


def read_costs(*, calibrate: bool) -> dict[str, float]:
    """Return `costs.json`; measure and write it first if it is missing or `calibrate` is set."""
    if calibrate or not COSTS.exists():
        print(f"Measuring what a step of each method costs, for {COSTS.name}", flush=True)
        costs = {name: round(cost, 4) for name, cost in measure_costs().items()}
        write_text(COSTS, json.dumps(costs, indent=2) + "\n")
    stored: dict[str, float] = json.loads(COSTS.read_text())
    return stored


def measure_costs(seed: int = 0, steps: int = 16) -> dict[str, float]:
    """Measure CPU seconds on a dev subject: a step of each main contestant, an echo, a batch of targets, the budget.

    Args:
        seed: training seed.
        steps: repeats, of which the median counts.
    """
    costs = {}
    for name in MAIN:
        run = Run(name, "dev", SPLITS["dev"][0], seed)
        if run.entry.step is None:
            continue
        state = run.build(None)
        state.step = 1  # step 0 would begin with the teacher's head start
        costs[name] = _cpu_seconds(run.entry.step, state, steps)
        if name == "ours":
            costs["echo"] = _cpu_seconds(echo_step, state, 3)
            costs["targets"] = _cpu_seconds(lambda state: add_first_targets(state, 0), state, 8)
    return costs | {"budget": cost_of_ours(costs)}


def cost_of_ours(costs: dict[str, float]) -> float:
    """Return the CPU seconds of `ours` at full length: head start, first targets, joint steps, echo.

    The carry back is not included: the student, which competes, is finished before it starts.
    """
    preset = build_config("mini")
    steps, echoes = preset.train.steps * costs["ours"], refreshes(preset) * costs["echo"]
    return _before_the_first_step(costs, preset.train.head_start) + steps + echoes


def _before_the_first_step(costs: dict[str, float], head_start: int, scale: float = 1.0) -> float:
    """Return the CPU seconds of the teacher's head start and of `scale` times the preset's first targets."""
    return head_start * costs["teacher-lora"] + scale * build_config("mini").train.first_targets * costs["targets"]


def _cpu_seconds(step: Callable[[TrainingState], object], state: TrainingState, repeats: int) -> float:
    """Return the median CPU seconds of `repeats` calls; the state's step number stays."""
    seconds = []
    for _ in range(repeats):
        began, number = time.process_time(), state.step
        step(state)
        state.step = number
        seconds.append(time.process_time() - began)
    return median(seconds)


def equal_steps(name: str, costs: dict[str, float], scale: float, head_start: int) -> int | None:
    """Return how many steps of a contestant the budget pays for.

    Args:
        name: the contestant.
        costs: CPU seconds by contestant, and the budget.
        scale: fraction of the budget.
        head_start: the teacher's steps before the first joint step, which `sequential` pays for too.

    Returns:
        None for `ours` and its variants, whose length the preset sets.
    """
    method = CONTESTANTS[name].costs_as or name
    if method not in costs or method == "ours":
        return None
    alone = _before_the_first_step(costs, head_start, scale) if method == "sequential" else 0.0
    return max(1, round((scale * costs["budget"] - alone) / costs[method]))
