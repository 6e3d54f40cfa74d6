"""Share a busy machine: fewer torch threads while others compute, all of them again when they stop.

A network's layers wait for their slowest thread. On a core that somebody else keeps busy a polite (niced)
process gets a tenth of the time, and two threads are then far slower than the one that has a core of its own.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_STAT = Path("/proc/stat")


def _busy_seconds() -> float:
    """Seconds that all cores together have spent working since boot (Linux)."""
    fields = [int(field) for field in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


class ThreadGovernor:
    """Call `tick` often: every `period` seconds it sets torch's threads to the cores others leave free."""

    def __init__(self, threads: int, period: float = 4.0) -> None:
        self.threads, self.period = threads, period
        self.enabled = _STAT.exists() and threads > 1
        self._remember()

    def _remember(self) -> None:
        self._wall, self._own = time.monotonic(), time.process_time()
        self._busy = _busy_seconds() if self.enabled else 0.0

    def tick(self) -> None:
        """Measure how many cores others used since the last decision, and decide."""
        elapsed = time.monotonic() - self._wall
        if not self.enabled or elapsed < self.period:
            return
        others = (_busy_seconds() - self._busy - (time.process_time() - self._own)) / elapsed
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, min(self.threads, round(cores - others + 0.1))))
        self._remember()
