"""`python -m examples.benchmark.gpu` (`make gpu`): everything that a machine with a GPU is needed for, in ten minutes.

It runs the tests that need a GPU, times training steps and sampling at true size, and compares the peak memory with the
memory plan. It needs no network. The results are one JSON file and one table for the README. A stage that exceeds its
time is stopped and noted; the others still run.

    python -m examples.benchmark.gpu --dry-run      # on any machine: the same stages in small, to test this script
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

SECONDS = 600
_TRUE_SIZE = ("-m", "examples.benchmark.true_size", "--device", "cuda")
_SAMPLING = ("-m", "examples.benchmark.sampling_speed", "--json")
_MEASURED = ("--json", "--steps", "5", "--batch", "1", "2", "4")


@dataclass(frozen=True)
class Stage:
    """One command of the run.

    Args:
        name: in the results.
        command: arguments of Python.
        small: those of the dry run.
        seconds: after which it is stopped.
    """

    name: str
    command: tuple[str, ...]
    small: tuple[str, ...]
    seconds: int


STAGES = (
    Stage("steps sd", (*_TRUE_SIZE, "--family", "sd", *_MEASURED, "--design", "lean", "compiled", "reference"),
          (*_TRUE_SIZE, "--family", "sd", "--plan"), 170),
    Stage("steps sdxl", (*_TRUE_SIZE, "--family", "sdxl", *_MEASURED, "--design", "lean", "compiled", "reference"),
          (*_TRUE_SIZE, "--family", "sdxl", "--plan"), 220),
    Stage("sampling sd", (*_SAMPLING, "--family", "sd", "--device", "cuda", "--cold-turns", "1"),
          (*_SAMPLING, "--turns", "1", "--cold-turns", "0"), 60),
    Stage("sampling sdxl", (*_SAMPLING, "--family", "sdxl", "--device", "cuda", "--cold-turns", "0"), (), 60),
    Stage("tests", ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"), (), 90),
)  # fmt: skip


def run(stage: Stage, seconds: float, *, dry: bool) -> dict[str, Any]:
    """Run one stage, and return how it ended and the JSON objects that it printed.

    Args:
        stage: to run.
        seconds: after which it is stopped.
        dry: run its small command.
    """
    command = [sys.executable, *(stage.small if dry else stage.command)]
    started, process = time.perf_counter(), subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += f"\nstopped after {seconds:.0f} s"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    took = round(time.perf_counter() - started, 1)
    # The last lines tell what a test or a crash had to say.
    said = "\n".join((output if not rows else "").splitlines()[-3:] + errors.splitlines()[-3:])
    return {"name": stage.name, "code": process.returncode, "seconds": took, "rows": rows, "said": said}


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table of the measured steps, and a line per other stage."""
    yield "| pair | design | batch | step | peak of tensors (planned in all) | one-step sampling |"
    yield "|---|---|---|---|---|---|"
    for row in (row for result in results for row in result["rows"] if "seconds" in row):
        plan = f" ({row['planned']:.1f})" if row["planned"] else ""
        yield (
            f"| {row['family']} | {row['design']} | {row['batch']} | {row['seconds']:.3f} s "
            f"| {row['peak']:.1f} GiB{plan} | {row['images']:.1f} images/s |"
        )
    yield ""
    for result in results:
        for row in (row for row in result["rows"] if "warm" in row):
            yield f"{result['name']}: {row['warm']['ratio']:.3f} times the seconds of diffusers"
        if result["code"]:
            yield f"{result['name']}: ended with {result['code']} after {result['seconds']} s"


def main(arguments: list[str] | None = None) -> None:
    """Run all stages within the time, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.gpu")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES])
    parser.add_argument("--dry-run", action="store_true", help="run small commands, on any machine")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("This machine has no CUDA device. Try the script with --dry-run.")
    end = time.perf_counter() + options.seconds
    results = []
    for stage in STAGES:
        if (options.only and stage.name not in options.only) or (options.dry_run and not stage.small):
            continue
        results.append(run(stage, min(stage.seconds, end - time.perf_counter()), dry=options.dry_run))
        print(f"{stage.name}: {results[-1]['code']} after {results[-1]['seconds']} s", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "device": device, "torch": torch.__version__}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps(about | {"stages": results}, indent=1) + "\n")
    text = "\n".join((f"{about['date']}, {device}, torch {torch.__version__}", "", *table(results)))
    (options.output / "gpu.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
