"""`python -m examples.benchmark.many` (`make bench-many`): what `train-many` adds to `train`, and how it scales.

Toy subjects are trained with the `mini` preset: one after the other by `train`, then by `train-many` on this machine
with one and two workers, and on Ray with two. Wall time depends on what else the machine does; CPU seconds hardly do.

What `train-many` adds to a subject does not depend on the number of its steps, except for a line of progress per step.
`--short-runs` therefore trains each subject for one cheap step, and one more with the whole preset for scale. All ways
run at the same time, so that each meets the same load; the wall times then say little.

`--paper` prints what ten thousand subjects would take on a hundred GPUs instead, from the times in many.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from examples.benchmark.subjects import DEV, TEST, class_name, write_photos

RESULTS = Path(__file__).with_name("many.json")
WAYS = ("train", "local-1", "local-2", "ray-2")
RAY_START = "ray-start"
# One step that costs little: loading, encoding of photos and writing of files are as in a whole run.
SHORT = (
    *("--steps", "1", "--batch-size", "1", "--echo-start", "off", "--set", "train.head_start=0"),
    *("--set", "train.replays=0", "--set", "train.first_targets=1", "--set", "train.target_steps=1"),
    *("--set", "concept.views=1", "--set", "loss.adversarial=0", "--set", "loss.paired=0"),
    *("--set", "run.sample_every=1000", "--set", "run.sample_seeds=1"),
)
_SAMPLE_SECONDS = 0.2
_STARTED = list[subprocess.Popen[bytes]]()
_START_RAY = """
from echodistill_cli.many.on_ray import RayEngine
RayEngine("ray", 2, None, on_gpu=False).close()
"""


@dataclass(frozen=True)
class Timing:
    """What a way of training took.

    Attributes:
        way: one of `WAYS`, or `RAY_START`.
        subjects: how many were trained.
        wall: seconds.
        cpu: seconds of all processes, user and system.
    """

    way: str
    subjects: int
    wall: float
    cpu: float


@dataclass(frozen=True)
class Report:
    """All of one run of this benchmark.

    Attributes:
        machine: date, processor, load and versions.
        flags: of every subject.
        timings: by way; the first is `train`.
        whole_run: CPU seconds of one `train` with the whole preset.
        ray_start: CPU seconds to start and end Ray; None without Ray.
    """

    machine: str
    flags: str
    timings: tuple[Timing, ...]
    whole_run: float
    ray_start: float | None = None

    @classmethod
    def read(cls, file: Path = RESULTS) -> Report:
        """Return a report from its JSON."""
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(**{**values, "timings": tuple(Timing(**timing) for timing in values["timings"])})

    def write(self, file: Path) -> None:
        """Write the report as JSON."""
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    def overhead(self, way: str) -> float:
        """CPU seconds per subject beyond `train`, without the start of Ray."""
        plain, one = (next(timing for timing in self.timings if timing.way == name) for name in ("train", way))
        once = (self.ray_start or 0.0) if way.startswith("ray") else 0.0
        return (one.cpu - once) / one.subjects - plain.cpu / plain.subjects

    def table(self) -> str:
        """Subjects per hour, and the CPU time per subject beyond that of `train`."""
        lines = [
            "| way | subjects per hour | wall seconds per subject | CPU seconds per subject | beyond `train` |",
            "|---|---|---|---|---|",
        ]
        for one in self.timings:
            wall, extra = one.wall / one.subjects, self.overhead(one.way)
            beyond = "" if one.way == "train" else f"{extra:+.2f} s ({100 * extra / self.whole_run:+.1f} %)"
            cells = (one.way, f"{3600 / wall:.0f}", f"{wall:.1f}", f"{one.cpu / one.subjects:.2f}", beyond)
            lines.append(f"| {' | '.join(cells).rstrip()} |")
        return "\n".join(lines)

    def note(self) -> str:
        """Say what the percentages are of, and what Ray costs once."""
        once = f" Ray starts once, for {self.ray_start:.1f} CPU seconds more." if self.ray_start else ""
        return f"Percentages are of a whole run, {self.whole_run:.0f} CPU seconds.{once}"


def measure(way: str, subjects: int, *commands: Sequence[str]) -> Timing:
    """Run commands one after the other and return what they took.

    The processes of Ray's workers are not waited for by the command, so that the system does not add up their time.
    There, the time of every process below the command is sampled, which misses up to 0.2 s of each.
    """
    started, cpu = time.monotonic(), 0.0
    for words in commands:
        # A session of its own, as the processes of train-many have: some systems share the CPU between sessions.
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.DEVNULL,
            env=os.environ | {"RAY_ADDRESS": "local"},  # another cluster that runs here would do the work unseen
            start_new_session=True,
        )
        _STARTED.append(process)
        sampled = _sampled(process.pid) if way.startswith("ray") else lambda: 0.0
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        cpu += max(usage.ru_utime + usage.ru_stime, sampled())
    return Timing(way, subjects, time.monotonic() - started, cpu)


def _sampled(pid: int) -> Callable[[], float]:
    """Sample the CPU time of a process and all below it, and return a function that ends this and returns the sum."""
    seconds, over = dict[tuple[int, float], float](), threading.Event()

    def sample() -> None:
        top = psutil.Process(pid)
        while not over.wait(_SAMPLE_SECONDS):
            try:
                for process in (top, *top.children(recursive=True)):
                    times = process.cpu_times()
                    seconds[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:  # it ended meanwhile
                continue

    def end() -> float:
        over.set()
        thread.join()
        return sum(seconds.values())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    return end


def train_all(way: str, nouns: Sequence[str], folder: Path, flags: Sequence[str]) -> Timing:
    """Train subjects in one way, in an empty output.

    Args:
        way: one of `WAYS`.
        nouns: the subjects.
        folder: holds `photos` and `subjects.csv`, and gets the runs.
        flags: settings of all subjects.
    """
    more = ("--model", "mini", *flags, "--quiet")
    output = folder / f"{way}-{len(flags)}"
    if way != "train":
        engine, _, workers = way.partition("-")
        words = ("train-many", str(folder / "subjects.csv"), "-o", str(output), "--on", engine, "--workers", workers)
        return measure(way, len(nouns), ("-m", "echodistill_cli", *words, *more))
    photos = {noun: str(folder / "photos" / noun) for noun in nouns}
    ends = {noun: ("--class-name", class_name(noun), "-o", str(output / noun), *more) for noun in nouns}
    return measure(way, len(nouns), *(("-m", "echodistill_cli", "train", photos[noun], *ends[noun]) for noun in nouns))


@dataclass(frozen=True)
class Paper:
    """Measured times, and what follows from them for many subjects.

    Attributes:
        pair: of models.
        step: seconds per training step on an H200, batch 2 (examples/benchmark/README.md).
        overhead: seconds that `train-many` adds to a subject on Ray (many.json).
        steps: training steps of a subject.
        start: seconds of a process before its first step: 3 imports, 1 weights from the page cache, 4 photos and views.
        push: seconds for the storage: 43 MiB took 1.1 s to a server on the same machine, four checkpoints and the end.
        subjects: how many.
        gpus: how many.
    """

    pair: str
    step: float
    overhead: float
    steps: int = 1000
    start: float = 8.0
    push: float = 5.5
    subjects: int = 10_000
    gpus: int = 100

    @property
    def seconds(self) -> float:
        """Duration of one subject."""
        return self.steps * self.step + self.start + self.push + self.overhead

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
            self.share(self.overhead),
            # One GPU in two waits for the last subjects of the others, half a subject on average.
            f"{100 * 0.5 * self.seconds / (self.hours * 3600):.1f} %",
            f"{self.gpu_hours:,.0f}",
            f"{self.hours:.1f} h",
            f"{self.gpus / self.step:.0f}",
        )
        return f"| {' | '.join(cells)} |"


STEPS = {"SD-Turbo + SD 2.1": 0.54, "SDXL-Turbo + SDXL base": 1.14}
PAPER_HEAD = (
    "| pair | one subject | start | storage | `train-many` | end of the queue | GPU hours | wall | steps per second |",
    "|---|---|---|---|---|---|---|---|---|",
)


def papers(report: Report) -> list[Paper]:
    """Return the calculation of each pair with a measured overhead."""
    overhead = max(report.overhead("ray-2"), 0.0)
    return [Paper(pair, step, overhead) for pair, step in STEPS.items()]


def machine() -> str:
    """Return date, processor, load and versions in a line."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8") if info.is_file() else "")
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ray") if _is_there(name))
    processor = f"{os.cpu_count()} × {name[1].strip() if name else platform.machine()}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {processor}, load {load}, Python {platform.python_version()}, {versions}"


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def run(nouns: Sequence[str], ways: Sequence[str], flags: Sequence[str], *, short: bool) -> Report:
    """Train subjects in every way and return what it took; tells each on stderr.

    Args:
        nouns: the subjects.
        ways: of `WAYS`; `train` comes first in any case.
        flags: settings of all subjects.
        short: train cheap steps in all ways at the same time, and one whole run beside them.
    """
    ways = tuple(dict.fromkeys(("train", *ways)))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(ways) + 1 if short else 1) as pool:
        folder = Path(name)
        for noun in nouns:
            write_photos(noun, folder / "photos" / noun)
        rows = [f"photos/{noun},{class_name(noun)}\n" for noun in nouns]
        (folder / "subjects.csv").write_text("photos,class_name\n" + "".join(rows), encoding="utf-8")
        whole = pool.submit(_told, train_all, "train", nouns[:1], folder, flags) if short else None
        flags = (*SHORT, *flags) if short else flags
        jobs = [pool.submit(_told, train_all, way, nouns, folder, flags) for way in ways]
        try:
            timings = tuple(job.result() for job in jobs)
            scale = whole.result() if whole else timings[0]
            has_ray = any(way.startswith("ray") for way in ways)
            ray_start = _told(measure, RAY_START, 1, ("-c", _START_RAY)).cpu if has_ray else None
        finally:  # a Ctrl-C does not reach other sessions
            for process in _STARTED:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGTERM)
    return Report(machine(), " ".join(flags), timings, scale.cpu / scale.subjects, ray_start)


def _told(work: Callable[..., Timing], *arguments: object) -> Timing:
    timing = work(*arguments)
    print(timing, file=sys.stderr, flush=True)  # a run that is stopped has told something
    return timing


def main(arguments: list[str] | None = None) -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.many", description=__doc__)
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument(
        "--short-runs", action="store_true", help="one cheap step per subject, and one whole run, all at once"
    )
    parser.add_argument("--results", type=Path, help=f"write the times here too, as {RESULTS.name}")
    parser.add_argument("--paper", action="store_true", help=f"print the calculation from {RESULTS.name} instead")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of train, such as --steps 8")
    options = parser.parse_args(arguments)
    if options.paper:
        print("\n".join([*PAPER_HEAD, *(paper.row() for paper in papers(Report.read()))]))
        return
    nouns = (*DEV, *TEST)[: options.subjects]
    report = run(nouns, options.ways, options.flags, short=options.short_runs)
    if options.results:
        report.write(options.results)
    print(f"{report.machine}\n{len(nouns)} subjects, flags: {report.flags}\n\n{report.table()}\n\n{report.note()}")


if __name__ == "__main__":
    main()
