"""`python -m examples.benchmark.many` (`make bench-many`): what `train-many` adds to `train`, and how it scales.

Toy subjects are trained with the `mini` preset: one after the other by `train`, then by `train-many` on this machine
with one and two workers, and on Ray with two. Wall time depends on what else the machine does; CPU seconds hardly do.

`--paper` prints what ten thousand subjects would take on a hundred GPUs instead, from times that were measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from examples.benchmark.subjects import DEV, TEST, class_name, write_photos

WAYS = ("train", "local-1", "local-2", "ray-2")


@dataclass(frozen=True)
class Timing:
    """What a way of training took.

    Attributes:
        way: one of `WAYS`.
        subjects: how many were trained.
        wall: seconds.
        cpu: seconds of all processes; None on Ray, whose workers are not children of the command.
    """

    way: str
    subjects: int
    wall: float
    cpu: float | None


def train_all(way: str, nouns: Sequence[str], folder: Path, flags: Sequence[str]) -> Timing:
    """Train subjects in one way, in an empty output.

    Args:
        way: one of `WAYS`.
        nouns: the subjects.
        folder: holds `photos` and gets the runs.
        flags: settings of all subjects.
    """
    output = folder / way
    if way == "train":
        commands = [
            ["train", str(folder / "photos" / noun), "--class-name", class_name(noun), "-o", str(output / noun)]
            for noun in nouns
        ]
    else:
        engine, _, workers = way.partition("-")
        commands = [["train-many", str(folder / "subjects.csv"), "-o", str(output), "--on", engine]]
        commands[0] += ["--workers", workers]
    started, before = time.monotonic(), _children()
    for words in commands:
        command = [sys.executable, "-m", "echodistill_cli", *words, *flags, "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    cpu = None if way.startswith("ray") else _children() - before
    return Timing(way, len(nouns), time.monotonic() - started, cpu)


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(timings: Sequence[Timing]) -> str:
    """Return a table: subjects per hour, and the time per subject beyond that of `train`."""
    plain = next(timing for timing in timings if timing.way == "train")
    assert plain.cpu is not None
    lines = [
        "| way | subjects per hour | wall seconds per subject | CPU seconds per subject | beyond `train` |",
        "|---|---|---|---|---|",
    ]
    for one in timings:
        wall = one.wall / one.subjects
        cells = [one.way, f"{3600 / wall:.0f}", f"{wall:.1f}"]
        if one.cpu is None:
            cells += ["", f"{wall - plain.wall / plain.subjects:+.1f} s wall"]
        else:
            extra = (one.cpu - plain.cpu) / one.subjects
            cells += [
                f"{one.cpu / one.subjects:.1f}",
                f"{extra:+.2f} s CPU ({100 * extra * plain.subjects / plain.cpu:+.1f} %)",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Paper:
    """Measured times, and what follows from them for many subjects.

    Attributes:
        pair: of models.
        step: seconds per training step on an H200, batch 2 (examples/benchmark/README.md).
        steps: training steps of a subject.
        start: seconds of a process before its first step: 3 imports, 1 weights from the page cache, 4 photos and views.
        push: seconds for the storage: 43 MiB took 1.1 s to a server on the same machine, four checkpoints and the end.
        subjects: how many.
        gpus: how many.
    """

    pair: str
    step: float
    steps: int = 1000
    start: float = 8.0
    push: float = 5.5
    subjects: int = 10_000
    gpus: int = 100

    @property
    def seconds(self) -> float:
        """Duration of one subject."""
        return self.steps * self.step + self.start + self.push

    @property
    def gpu_hours(self) -> float:
        """What is paid for."""
        return self.subjects * self.seconds / 3600

    @property
    def hours(self) -> float:
        """From start to end, where every GPU takes the next subject as soon as it is free."""
        return -(-self.subjects // self.gpus) * self.seconds / 3600

    def share(self, seconds: float) -> str:
        """Return a part of a subject's duration in percent."""
        return f"{100 * seconds / self.seconds:.1f} %"

    def row(self) -> str:
        """Return a row of the table."""
        cells = (
            self.pair,
            f"{self.seconds:.0f} s",
            self.share(self.start),
            self.share(self.push),
            # One GPU in two waits for the last subjects of the others, half a subject on average.
            f"{100 * 0.5 * self.seconds / (self.hours * 3600):.1f} %",
            f"{self.gpu_hours:,.0f}",
            f"{self.hours:.1f} h",
            f"{self.gpus / self.step:.0f}",
        )
        return f"| {' | '.join(cells)} |"


PAPERS = (Paper("SD-Turbo + SD 2.1", 0.54), Paper("SDXL-Turbo + SDXL base", 1.14))
PAPER_HEAD = (
    "| pair | one subject | start | storage | end of the queue | GPU hours | wall | steps per second |",
    "|---|---|---|---|---|---|---|---|",
)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.many", description=__doc__)
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--paper", action="store_true", help="print the calculation instead")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of train, such as --steps 8")
    options = parser.parse_args(arguments)
    if options.paper:
        print("\n".join([*PAPER_HEAD, *(paper.row() for paper in PAPERS)]))
        return
    nouns = (*DEV, *TEST)[: options.subjects]
    flags = ["--model", "mini", *options.flags]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for noun in nouns:
            write_photos(noun, folder / "photos" / noun)
        rows = [f"photos/{noun},{class_name(noun)}\n" for noun in nouns]
        (folder / "subjects.csv").write_text("photos,class_name\n" + "".join(rows), encoding="utf-8")
        ways = dict.fromkeys(("train", *options.ways))
        timings = list[Timing]()
        for way in ways:
            timings.append(train_all(way, nouns, folder, flags))
            print(timings[-1], file=sys.stderr)  # a run that is stopped has told something
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}, {os.cpu_count()} cores, load {load}")
    print(f"{len(nouns)} subjects, flags: {' '.join(flags)}")
    print(report(timings))


if __name__ == "__main__":
    main()
