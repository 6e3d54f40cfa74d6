"""`python -m examples.benchmark.run`: one-step personalization, method against method, on the embedded pair.

Each run adds one row to `results.json` per model that generates images. A row that exists is not made again, so a
stopped command continues where it was. On the `dev` subjects `--grid` tries every contestant's learning rates, and
`--set` other settings; both write to `trials.json`. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from echodistill_cli import __version__
from echodistill_cli.cli.options import quiet_libraries
from echodistill_cli.config.build import config_hash
from echodistill_cli.errors import counted
from echodistill_cli.files import write_text
from echodistill_cli.training.state import TrainingState
from examples.benchmark.contestants import CONTESTANTS, RATES, TEACHERS
from examples.benchmark.costs import MAIN, equal_steps, read_costs
from examples.benchmark.measure import JUDGE, STUDENT, TEACHER, Ruler, draw
from examples.benchmark.subjects import PROMPTS, SEEDS, SPLITS
from examples.benchmark.training import Run
from examples.mini_world.judges import Examiner
from examples.mini_world.world import contact_sheet

HERE = Path(__file__).parent
PICTURES = Path("runs/benchmark")
RESULTS, TRIALS, FLOW = HERE / "results.json", HERE / "trials.json", HERE / "flow.json"
SMALL = ("untouched", "teacher-lora", "denoising", "sequential", "ours")
REAL = "real-renders"  # the world's own images of the subject for the same prompts: the judge's upper bound
Row = dict[str, Any]


class Rows:
    """A JSON file of rows, rewritten after each one; several processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[Row]:
        """All rows in the file now."""
        rows: list[Row] = json.loads(self.path.read_text()) if self.path.exists() else []
        return rows

    def has(self, run: Run, settings: str) -> bool:
        """Return whether the file has this run with these settings, by the present judge."""
        names = ("contestant", "split", "subject", "training_seed", "settings", "judge")
        key = (run.contestant, run.split, run.noun, run.seed, settings, JUDGE.name)
        return any(tuple(row.get(name) for name in names) == key for row in self.rows)

    def add(self, row: Row) -> None:
        """Add a row; it replaces an older one of the same contestant, split, subject, seed, trial and scale."""
        key = ("contestant", "split", "subject", "training_seed", "trial", "scale")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            others = [old for old in self.rows if any(old[name] != row[name] for name in key)]
            lines = ",\n".join(json.dumps(one) for one in (*others, row))
            write_text(self.path, f"[\n{lines}\n]\n")


def train(run: Run, state: TrainingState, ruler: Ruler, *, teachers: bool = True) -> Iterator[Row]:
    """Train a contestant and yield the scores of each model it stands for.

    Args:
        run: what to train.
        state: its state, from `Run.build`.
        ruler: measures images of the subject.
        teachers: measure the teacher too, before the echo and after each way in which its training may end.
    """
    base = draw(state.pair, run.noun, STUDENT, with_token=False)
    if run.entry.step is None:
        yield {"contestant": REAL, **ruler.scores(ruler.real), "drift": None, "steps": None, "seconds": None}
        yield {"contestant": run.contestant, **ruler.scores(base), "drift": 0.0, "steps": 0, "seconds": 0.0}
        return
    began, busy, measuring = time.perf_counter(), time.process_time(), 0.0
    echo = state.config.echo.start if teachers and run.contestant == "ours" else None
    while state.step < state.config.train.steps:
        step = state.step
        state.settle(run.entry.step(state))
        state.step = step + 1
        if state.step == echo:
            paused = time.process_time()
            yield _teacher_row("teacher-before-echo", run, state, ruler)
            measuring += time.process_time() - paused
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy - measuring
    run.entry.finish(state)
    yield from _teacher_ends(run, state, ruler) if teachers else ()
    with state.at_export_scale():
        images = draw(state.pair, run.noun, STUDENT, with_token=True)
        drift = ruler.drift(base, draw(state.pair, run.noun, STUDENT, with_token=False))
    if not run.about_trial:
        _save_sheet(images, sheet_file(run.contestant, run.noun, run.seed, run.scale, run.split))
    yield {
        "contestant": run.contestant,
        **ruler.scores(images),
        "drift": drift,
        "steps": state.step,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def _teacher_ends(run: Run, state: TrainingState, ruler: Ruler) -> Iterator[Row]:
    """Yield the scores of the teacher after each way in which its training may end; the state is restored each time."""
    end_of_training = copy.deepcopy(state.state_dict())
    for name, ending in TEACHERS.get(run.contestant, {}).items():
        ending(state)
        yield _teacher_row(name, run, state, ruler)
        state.load_state_dict(copy.deepcopy(end_of_training))  # optimizers keep using the tensors they are given


def _teacher_row(name: str, run: Run, state: TrainingState, ruler: Ruler) -> Row:
    scores = ruler.scores(draw(state.pair, run.noun, TEACHER, with_token=True))
    return {"contestant": name, **scores, "drift": None, "steps": state.step, "seconds": None}


def _save_sheet(images: NDArray[np.uint8], path: Path) -> None:
    """Write images (prompts × seeds) as a sheet with one row per seed and one column per prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    in_rows = images.reshape(len(PROMPTS), len(SEEDS), *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
    contact_sheet(list(in_rows), len(PROMPTS)).save(path)


def sheet_file(contestant: str, noun: str, seed: int, scale: float, split: str = "test") -> Path:
    """Return where a run's sheet of images is saved; each scale, and the second vendor, has its own folder."""
    folder = f"{scale:g}-vendor2" if split == "vendor2" else f"{scale:g}"
    return PICTURES / folder / f"{contestant}-{noun}-{seed}.png"


def measure_run(run: Run, steps: int | None, rows: Rows, examiner: Examiner, *, teachers: bool = True) -> None:
    """Train one run and add its rows, unless they exist.

    Args:
        run: what to train.
        steps: joint steps; None for the preset's.
        rows: the file to add to.
        examiner: the judge.
        teachers: as in `train`.
    """
    config = run.config(Path("photos"), steps)
    settings = config_hash(config)[:12]  # the hash does not depend on the photos' folder
    if rows.has(run, settings):
        print(f"{run.contestant} {run.noun} {run.seed}: row exists", flush=True)
        return
    about: Row = {
        "split": run.split,
        "subject": run.noun,
        "training_seed": run.seed,
        "scale": run.scale,
        "trial": run.about_trial,
        "settings": settings,
        "date": date.today().isoformat(),
        "machine": machine_kind(),
        "judge": JUDGE.name,
        "versions": {"echodistill": __version__, "torch": torch.__version__},
    }
    trial = f" [{run.about_trial}]" if run.about_trial else ""
    doing = f"training, {counted(config.train.steps, 'step')}" if run.entry.step else "generating, without training"
    print(f"{run.contestant} {run.noun} {run.seed}{trial}: {doing}", flush=True)
    for scores in train(run, run.build(steps), Ruler(run.noun, examiner, run.split), teachers=teachers):
        row = scores | about
        rows.add({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(row_line(row), flush=True)


def machine_kind() -> str:
    """Return processor, vector instructions and threads: rows are comparable if this is equal, so it never changes."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model or platform.processor() or platform.machine()} {capability}, {torch.get_num_threads()} threads"


def row_line(row: Row) -> str:
    """Return a row's scores as one line of text."""
    scores = (
        *("recognition", "named", "subject_fidelity", "prompt_fidelity", "copy_rate", "diversity"),
        *("sharpness_share", "drift", "steps", "cpu_seconds"),
    )
    keys = [key for key in scores if row.get(key) is not None]
    values = " ".join(f"{key.split('_')[0]} {row[key]:.3g}" for key in keys)
    trial = f" [{row['trial']}]" if row["trial"] else ""
    return f"{row['contestant']} {row['subject']} {row['training_seed']}{trial}: {values}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.run", description=__doc__)
    parser.add_argument("--split", choices=[*SPLITS], default="test")
    parser.add_argument("--contestants", nargs="+", choices=[*CONTESTANTS], default=[*MAIN])
    parser.add_argument("--subjects", nargs="+", help="subjects of the split (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to try, on dev only")
    parser.add_argument("--grid", action="store_true", help=f"try the learning rates times {RATES}, on dev only")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the preset's steps, for every method")
    parser.add_argument("--small", action="store_true", help="four subjects, a quarter of the steps, five methods")
    parser.add_argument("--flow", action="store_true", help="train the pair as rectified flows")
    parser.add_argument(
        "--results", type=Path, help="file of rows (default: results.json; trials.json for trials; flow.json for flows)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of one thread each; they share the subjects"
    )
    parser.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, help="measure again what a step of each method costs"
    )
    options = parser.parse_args(arguments)
    if (options.set or options.grid) and options.split != "dev":
        parser.error("--set and --grid try settings, which is for --split dev only")
    known = SPLITS[options.split]
    options.subjects = options.subjects or known[: 4 if options.small else None]
    if strange := [noun for noun in options.subjects if noun not in known]:
        parser.error(f"{strange[0]} is not a subject of {options.split}. Choose from {', '.join(known)}")
    if options.small:
        options.contestants = [name for name in options.contestants if name in SMALL]
        options.scale = 0.25
    return options


def shares(arguments: Sequence[str], subjects: Sequence[str], processes: int) -> list[list[str]]:
    """Return each process's arguments: the same command with its share of the subjects. All write the same file."""
    parts = [subjects[first::processes] for first in range(min(processes, len(subjects)))]
    return [[*arguments, "--no-calibrate", "--processes", "1", "--subjects", *part] for part in parts]


def run_processes(shared: Sequence[Sequence[str]]) -> None:
    """Run this module once per list of arguments, all at the same time with one thread each, and wait for all."""
    command, environment = [sys.executable, "-m", "examples.benchmark.run"], os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, *arguments], env=environment) for arguments in shared]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("A process failed, see above. The same command continues from the rows that exist.")


def main(arguments: list[str] | None = None) -> None:
    """Make the rows of the command line that do not exist yet."""
    options = parse(arguments)
    costs = read_costs(calibrate=bool(options.calibrate))
    if options.processes > 1:
        run_processes(shares(sys.argv[1:] if arguments is None else arguments, options.subjects, options.processes))
        return
    trial = tuple((key, json.loads(value)) for key, _, value in (text.partition("=") for text in options.set))
    file = FLOW if options.flow else TRIALS if trial or options.grid else RESULTS
    rows = Rows(options.results or file)
    examiner = Examiner(JUDGE)
    for seed, noun, name in itertools.product(options.seeds, options.subjects, options.contestants):
        is_trained = CONTESTANTS[name].step is not None
        for rate in RATES if options.grid and is_trained else (None,):
            run = Run(name, options.split, noun, seed, trial, options.scale, rate, options.flow)
            steps = equal_steps(name, costs, run.scale, run.head_start)
            measure_run(run, steps, rows, examiner, teachers=not (options.small or options.grid))


if __name__ == "__main__":
    quiet_libraries(offline=True, quiet=True)
    main()
