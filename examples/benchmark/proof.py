"""`python -m examples.benchmark.proof`: one-step personalization, method against method, on the embedded pair.

Every run is a row of `results.json` per picture-drawing model; a row that is there already is not made again, so a
stopped run goes on. `--set` tries other settings on the `dev` subjects, into `trials.json`. See README.md here.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from echodistill_cli import __version__
from echodistill_cli.cli.options import quiet_libraries
from echodistill_cli.config.build import build_config, config_hash
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import Photo, load_photos
from echodistill_cli.files import write_text
from echodistill_cli.training.batches import add_first_targets
from echodistill_cli.training.state import TrainingState, build_state
from echodistill_cli.training.steps import echo_step
from examples.benchmark.contestants import CONTESTANTS, TEACHERS, Contestant
from examples.benchmark.measure import JUDGE, STUDENT, TEACHER, Ruler, draw
from examples.benchmark.subjects import PROMPTS, SEEDS, SPLITS, TOKEN, class_name, write_photos
from examples.mini_world.judges import Examiner
from examples.mini_world.world import contact_sheet

HERE = Path(__file__).parent
PICTURES = Path("runs/benchmark")
RESULTS, TRIALS, COSTS = HERE / "results.json", HERE / "trials.json", HERE / "costs.json"
SMALL = ("untouched", "teacher-lora", "denoising", "sequential", "ours")
REAL = "real-renders"  # of the subject under the same prompts: the judge's own ceiling
MAIN = ("untouched", "teacher-lora", "denoising", "token-only", "pso", "sequential", "ours")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a contestant, a subject, a seed; a trial's settings over its own; `scale` of the length."""

    contestant: str
    split: str
    noun: str
    seed: int
    trial: tuple[tuple[str, Any], ...] = ()
    scale: float = 1.0

    @property
    def entry(self) -> Contestant:
        """The contestant's row of the table."""
        return CONTESTANTS[self.contestant]

    @property
    def lengths(self) -> dict[str, int]:
        """The preset's numbers of steps, a share of them each, by dotted key."""
        preset = build_config("mini")
        train = preset.train
        whole = {f"train.{key}": getattr(train, key) for key in ("steps", "head_start", "first_targets")}
        if preset.echo.start is not None:
            whole |= {"echo.start": preset.echo.start, "echo.carry_back": preset.echo.carry_back}
        return {key: max(1, round(value * self.scale)) if value else 0 for key, value in whole.items()}

    @property
    def head_start(self) -> int:
        """The teacher's steps alone, as its settings have them."""
        return int((self.lengths | dict(self.entry.settings) | dict(self.trial))["train.head_start"])

    def config(self, photos: Path, steps: int | None) -> Config:
        """The whole configuration; `steps` None keeps the preset's, and a trial's own go before any."""
        settings: dict[str, Any] = {
            "concept.photos": str(photos),
            "concept.token": TOKEN,
            "concept.class_name": class_name(self.noun),
            "run.seed": self.seed,
            **self.lengths,
            **self.entry.settings,
            **({} if steps is None else {"train.steps": steps}),
            **dict(self.trial),
        }
        return build_config("mini", overrides=settings)


class Rows:
    """A file of rows, written after each one; several processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def rows(self) -> list[Row]:
        """All that is there now."""
        found: list[Row] = json.loads(self.path.read_text()) if self.path.exists() else []
        return found

    def has(self, run: Run, settings: str) -> bool:
        """Whether this run was made with these very settings."""
        wanted = (run.contestant, run.noun, run.seed, settings)
        return any((r["contestant"], r["subject"], r["training_seed"], r["settings"]) == wanted for r in self.rows)

    def add(self, row: Row) -> None:
        """Keep a row; an older one of the same contestant, subject, seed, trial and scale gives way."""
        key = ("contestant", "subject", "training_seed", "trial", "scale")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            others = [old for old in self.rows if any(old[name] != row[name] for name in key)]
            lines = ",\n".join(json.dumps(one) for one in (*others, row))
            write_text(self.path, f"[\n{lines}\n]\n")


def train(run: Run, state: TrainingState, ruler: Ruler, *, teachers: bool = True) -> Iterator[Row]:
    """Train a contestant and yield the scores of each model it stands for.

    Args:
        teachers: the teacher too, before the echo and in every way in which it may end.
    """
    untouched = draw(state.pair, run.noun, STUDENT, with_token=False)
    began, busy, measuring = time.perf_counter(), time.process_time(), 0.0
    echo = state.config.echo.start if teachers and run.contestant == "ours" else None
    if run.entry.step is None:
        yield {"contestant": REAL, **ruler.scores(ruler.real), "drift": None, "steps": None, "seconds": None}
        yield {"contestant": run.contestant, **ruler.scores(untouched), "drift": 0.0, "steps": 0, "seconds": 0.0}
        return
    while state.step < state.config.train.steps:
        step = state.step
        run.entry.step(state)
        state.step = step + 1
        if state.step == echo:
            paused = time.process_time()
            yield from _teacher_row("teacher-before-echo", run, state, ruler)
            measuring += time.process_time() - paused
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy - measuring
    run.entry.finish(state)
    ended = copy.deepcopy(state.state_dict())
    for teacher, ending in TEACHERS.get(run.contestant, {}).items() if teachers else ():
        ending(state)
        yield from _teacher_row(teacher, run, state, ruler)
        state.load_state_dict(copy.deepcopy(ended))  # optimizers go on with the very tensors they are given
    with state.at_export_scale():
        pictures = draw(state.pair, run.noun, STUDENT, with_token=True)
        drift = ruler.drift(untouched, draw(state.pair, run.noun, STUDENT, with_token=False))
    _keep(pictures, run)
    yield {
        "contestant": run.contestant,
        **ruler.scores(pictures),
        "drift": drift,
        "steps": state.step,
        "seconds": seconds,
        "cpu_seconds": cpu,
    }


def _keep(pictures: NDArray[np.uint8], run: Run) -> None:
    """A sheet to look at: a row per seed, a column per prompt."""
    if not run.trial:
        path = sheet_file(run.contestant, run.noun, run.seed, run.scale)
        path.parent.mkdir(parents=True, exist_ok=True)
        in_rows = pictures.reshape(len(PROMPTS), len(SEEDS), *pictures.shape[1:]).swapaxes(0, 1).reshape(pictures.shape)
        contact_sheet(list(in_rows), len(PROMPTS)).save(path)


def sheet_file(contestant: str, noun: str, seed: int, scale: float) -> Path:
    """Where a run's pictures are kept; runs of another length have theirs in another folder."""
    return PICTURES / f"{scale:g}" / f"{contestant}-{noun}-{seed}.png"


def _teacher_row(name: str, run: Run, state: TrainingState, ruler: Ruler) -> Iterator[Row]:
    scores = ruler.scores(draw(state.pair, run.noun, TEACHER, with_token=True))
    yield {"contestant": name, **scores, "drift": None, "steps": state.step, "seconds": None}


def measure_run(run: Run, steps: int | None, rows: Rows, examiner: Examiner, *, teachers: bool = True) -> None:
    """One run from photos to rows, unless its rows are there already; `teachers` as in `train`."""
    with tempfile.TemporaryDirectory() as folder:
        config = run.config(write_photos(run.noun, Path(folder)), steps)
        settings = config_hash(config)[:12]
        if rows.has(run, settings):
            print(f"{run.contestant} {run.noun} {run.seed}: is there already", flush=True)
            return
        state = build_state(config, _photos(Path(folder)))
    about: Row = {
        "split": run.split,
        "subject": run.noun,
        "training_seed": run.seed,
        "scale": run.scale,
        "trial": ", ".join(f"{key}={value}" for key, value in run.trial),
        "settings": settings,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "versions": {"echodistill": __version__, "torch": torch.__version__},
    }
    for scores in train(run, state, Ruler(run.noun, examiner), teachers=teachers):
        row = scores | about
        rows.add({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(_line(row), flush=True)


def _photos(folder: Path) -> tuple[Photo, ...]:
    return tuple(load_photos(folder, min_photos=3, resolution=64, masks="auto", captions=True).photos)


def measure_costs(seed: int = 0, steps: int = 16) -> dict[str, float]:
    """CPU seconds of a step of each main contestant, an echo and a batch of targets, on a dev subject; the budget."""
    costs = {}
    for name in MAIN:
        run = Run(name, "dev", SPLITS["dev"][0], seed)
        if run.entry.step is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            config = run.config(write_photos(run.noun, Path(folder)), None)
            state = build_state(config, _photos(Path(folder)))
        state.step = 1  # step 0 would begin with the teacher's head start
        costs[name] = _cpu_seconds(run.entry.step, state, steps)
        if name == "ours":
            costs["echo"] = _cpu_seconds(echo_step, state, 3)
            costs["targets"] = _cpu_seconds(add_first_targets, state, 8)
    return costs | {"budget": cost_of_ours(costs)}


def cost_of_ours(costs: dict[str, float]) -> float:
    """CPU seconds of the whole of ours at the preset's length: head start, first targets, joint steps, echo.

    The carry back is not counted: the student, which competes, is done before it.
    """
    preset = build_config("mini")
    joint, start = preset.train.steps, preset.echo.start
    echoes = 0 if start is None else len(range(start, joint + 1, preset.echo.every))
    return _before_the_first_step(costs, preset.train.head_start) + joint * costs["ours"] + echoes * costs["echo"]


def _before_the_first_step(costs: dict[str, float], head_start: int, scale: float = 1.0) -> float:
    """CPU seconds of the teacher's head start, and of a share of the preset's first targets."""
    return head_start * costs["teacher-lora"] + scale * build_config("mini").train.first_targets * costs["targets"]


def _cpu_seconds(step: Callable[[TrainingState], object], state: TrainingState, repeats: int) -> float:
    """The median of some steps."""
    seconds = []
    for _ in range(repeats):
        began, at = time.process_time(), state.step
        step(state)
        state.step = at
        seconds.append(time.process_time() - began)
    return median(seconds)


def equal_steps(name: str, costs: dict[str, float], scale: float, head_start: int) -> int | None:
    """As many steps as the budget pays for, at this scale; sequential pays for its head start too.

    None for ours, whose length the preset says, and for what is left out of it.
    """
    method = CONTESTANTS[name].costs_as or name
    if method not in costs or method == "ours":
        return None
    alone = _before_the_first_step(costs, head_start, scale) if method == "sequential" else 0.0
    return max(1, round((scale * costs["budget"] - alone) / costs[method]))


def _line(row: Row) -> str:
    keys = (
        "recognition",
        "subject_fidelity",
        "prompt_fidelity",
        "copy_rate",
        "diversity",
        "sharpness",
        "drift",
        "steps",
        "seconds",
    )
    shown = " ".join(f"{key.split('_')[0]} {row[key]:.3g}" for key in keys if row.get(key) is not None)
    trial = f" [{row['trial']}]" if row["trial"] else ""
    return f"{row['contestant']} {row['subject']} {row['training_seed']}{trial}: {shown}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.proof", description=__doc__)
    parser.add_argument("--split", choices=[*SPLITS], default="test")
    parser.add_argument("--contestants", nargs="+", choices=[*CONTESTANTS], default=[*MAIN])
    parser.add_argument("--subjects", nargs="+", help="of the split; all of them unless given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="a trial with other settings")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the preset's steps, for every method")
    parser.add_argument("--small", action="store_true", help="four subjects, a quarter of the steps, five students")
    parser.add_argument("--results", type=Path, help="file of rows; unset: results.json, or trials.json with --set")
    parser.add_argument("--processes", type=int, default=1, help="as many at once, of one thread each, a share each")
    parser.add_argument(
        "--calibrate", action=argparse.BooleanOptionalAction, help="measure anew what a step of each method costs"
    )
    options = parser.parse_args(arguments)
    if options.set and options.split == "test":
        parser.error("--set tries settings; trials are made on --split dev")
    known = SPLITS[options.split]
    options.subjects = options.subjects or known[: 4 if options.small else None]
    if strange := [noun for noun in options.subjects if noun not in known]:
        parser.error(f"{strange[0]} is no subject of {options.split}; there are {', '.join(known)}")
    if options.small:
        options.contestants = [name for name in options.contestants if name in SMALL]
        options.scale = 0.25
    return options


def shares(arguments: Sequence[str], subjects: Sequence[str], processes: int) -> list[list[str]]:
    """The arguments with which each of some processes does its share of the subjects; all write the same file."""
    parts = [subjects[first::processes] for first in range(min(processes, len(subjects)))]
    return [[*arguments, "--no-calibrate", "--processes", "1", "--subjects", *part] for part in parts]


def at_once(shared: Sequence[Sequence[str]]) -> None:
    """Run this module with each of these arguments, a process of one thread each, until all have ended."""
    command, alone = [sys.executable, "-m", "examples.benchmark.proof"], os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, *arguments], env=alone) for arguments in shared]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a process failed, see above; the same command goes on from the rows that are there")


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for and is not there yet."""
    options = parse(arguments)
    if options.calibrate or not COSTS.exists():
        write_text(COSTS, json.dumps({name: round(cost, 4) for name, cost in measure_costs().items()}, indent=2) + "\n")
    if options.processes > 1:
        at_once(shares(sys.argv[1:] if arguments is None else arguments, options.subjects, options.processes))
        return
    costs = json.loads(COSTS.read_text())
    trial = tuple((key, json.loads(value)) for key, _, value in (text.partition("=") for text in options.set))
    rows = Rows(options.results or (TRIALS if trial else RESULTS))
    examiner = Examiner(JUDGE)
    for seed in options.seeds:
        for noun in options.subjects:
            for name in options.contestants:
                run = Run(name, options.split, noun, seed, trial, options.scale)
                steps = equal_steps(name, costs, run.scale, run.head_start)
                measure_run(run, steps, rows, examiner, teachers=not options.small)


if __name__ == "__main__":
    quiet_libraries(offline=True, quiet=True)
    main()
