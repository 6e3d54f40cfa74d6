"""`python -m examples.benchmark.step_time` (`make bench`): time and memory of the embedded pair's joint training steps.

The settings are the `mini` preset's, replays included. The head start and the first targets are left out, so that every
timed step does the same work.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from datetime import UTC, datetime

import torch

from echodistill_cli.cli.options import quiet_libraries
from echodistill_cli.training.loop import timed_step
from echodistill_cli.training.state import TrainingState
from examples.benchmark.subjects import DEV
from examples.benchmark.training import Run

SETTINGS = {"train.head_start": 0, "train.first_targets": 0, "train.carry_over": False}
WARM_UP = 2


def prepare(steps: int) -> TrainingState:
    """Return a state that is ready for `steps` joint steps, without the echo phase."""
    settings = SETTINGS | {"echo.start": None, "echo.carry_back": 0}
    return Run("ours", "dev", DEV[0], 0, tuple(settings.items())).build(steps)


def main(arguments: list[str] | None = None) -> None:
    """Print the median step time on one thread and the peak memory."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.step_time", description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    state = prepare(WARM_UP + options.steps)
    records = [timed_step(state) for _ in range(WARM_UP + options.steps)]
    seconds = statistics.median(record["step_seconds"] for record in records[WARM_UP:])
    batch, replays = state.config.train.batch_size, state.config.replays
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}, 1 thread")
    print(f"step      {seconds:.3f} s  (batch {batch}, {replays} replays)")
    print(f"memory    {max(record['peak_memory_mib'] for record in records):.0f} MiB")


if __name__ == "__main__":
    quiet_libraries(offline=True, quiet=True)
    main()
