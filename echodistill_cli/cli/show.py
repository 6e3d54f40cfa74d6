"""What a person sees: progress on stderr; on stdout paths, one JSON object, or a table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from echodistill_cli.config.build import OFF
from echodistill_cli.config.schema import Config

if TYPE_CHECKING:  # for their annotations only: these tables must not cost an import of torch
    from echodistill_cli.data.photos import PhotoReport
    from echodistill_cli.evaluation.dreambench import Benchmark
    from echodistill_cli.evaluation.evaluate import Evaluation
    from echodistill_cli.lora.inspect import Inspection
    from echodistill_cli.planning import Diagnosis
_STYLES = {"ok": "green", "warning": "yellow", "skipped": "red"}
_LOADS = {"fully": "green", "partly": "yellow", "hidden": "yellow", "no": "red"}


def print_paths(result: Mapping[str, Any], paths: Iterable[Path], *, as_json: bool) -> None:
    """A command's result on stdout: a line per path, or one JSON object."""
    for line in [json.dumps(result)] if as_json else paths:
        print(line)


def print_table(result: Mapping[str, Any], table: RenderableType, *, as_json: bool) -> None:
    """A command's result on stdout: a table, or one JSON object."""
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(table)


def photo_table(report: PhotoReport) -> RenderableType:
    """A row per file with its verdict, then what concerns the folder as a whole."""
    table = Table("file", "verdict", "size", "notes", box=None, pad_edge=False)
    for file in report.files:
        size = f"{file.size[0]} x {file.size[1]}" if file.size else ""
        table.add_row(file.name, Text(file.verdict, _STYLES[file.verdict]), size, Text("; ".join(file.notes)))
    usable = f"{len(report.photos)} of {len(report.files)} files can be trained on."
    return Group(table, *(Text(warning, "yellow") for warning in report.warnings), Text(usable))


def plan_table(plan: Mapping[str, Any]) -> RenderableType:
    """What `train` would do, a row per thing."""
    settings = plan["config"]
    train, adapter, text = settings["train"], settings["adapter"], settings["text"]
    echo, run, critic = settings["echo"], settings["run"], settings["critic"]
    learned = {"lora": f"LoRA of rank {text['rank']}", "token": "one learned vector", "frozen": "nothing"}
    taken = " (exists: needs --resume or --overwrite)" if plan["output_exists"] else ""
    alpha = adapter["rank"] if adapter["alpha"] == OFF else adapter["alpha"]
    facts = {
        "photos": f"{plan['photos']} usable, in {settings['concept']['photos']}",
        "subject": plan["subject"],
        "models": "\n".join(f"{source} ({place})" for source, place in plan["models"].items()),
        "downloads": _downloads(plan["downloads"]),
        "memory": _memory(plan["memory"]),
        "UNets": f"LoRA of rank {adapter['rank']}, alpha {alpha:g}, on {adapter['targets']}",
        "text side": learned[text["form"]],
        "training": f"{train['steps']} steps of {train['batch_size']} at {settings['model']['resolution']} pixels",
        "critics": f"{', '.join(critic['discriminators']) or 'no discriminators'}; identity by {critic['identity']}",
        "echo": "never" if echo["start"] == OFF else f"from step {echo['start']}, every {echo['every']} steps",
        "previews": f"every {run['sample_every']} steps",
        "checkpoints": f"every {run['save_every']} steps, the last {run['keep']} kept",
        "output": plan["output"] + taken,
    }
    done = Text("Nothing was loaded or written.")
    notes = (*plan["warnings"], *plan["assumptions"])
    return Group(*(Text(note, "yellow") for note in notes), _facts(facts), Text(), done)


def _downloads(files: Mapping[str, int | None]) -> str:
    """A line per file that would be fetched, and their sum as far as it is known."""
    if not files:
        return "none"
    lines = [f"{file} ({'size unknown' if size is None else _bytes(size)})" for file, size in files.items()]
    known = [size for size in files.values() if size is not None]
    return "\n".join([*lines, *([f"{_bytes(sum(known))} in all"] if len(known) > 1 else [])])


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _memory(expected: Mapping[str, Any] | None) -> str:
    if expected is None:
        return "not known for models of this size"
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in expected["parts"].items())
    return f"about {expected['gib']:.1f} GiB ({parts})"


def inspection_table(found: Inspection) -> RenderableType:
    """What a file is, then a row per reader."""
    facts = {
        "file": f"{found.file} ({found.size / 1e6:.1f} MB, {', '.join(found.dtypes)})",
        "kind": f"{found.kind}, {found.format} keys, family {found.family}",
        "made by": found.made_by,
        "role": found.role,
        "base model": found.base_model,
        "rank": _list(found.ranks),
        "alpha / rank": _list(found.scales),
        "modules": ", ".join(f"{count} in {name}" for name, count in found.modules.items()),
        "trigger": _list(found.triggers),
        "use with": found.usage,
    }
    readers = Table("tool", "loads", "keys", "", box=None, pad_edge=False)
    for verdict in found.readers:
        keys = f"{verdict.matched} of {verdict.matched + verdict.unmatched}"
        readers.add_row(verdict.reader, Text(verdict.loads, _LOADS.get(verdict.loads, "")), keys, Text(verdict.text))
    return Group(_facts(facts), Text(), readers, *(Text(note, "yellow") for note in found.notes))


def diagnosis_table(found: Diagnosis) -> RenderableType:
    """Versions, devices, room, models in the cache, advice."""
    facts = dict(found.versions) | found.devices
    facts |= {
        "memory": f"{found.memory_gib:g} GiB",
        "model cache": f"{found.cache} ({found.disk_free_gib:g} GiB free)",
    }
    there = (f"{model} ({'in' if cached else 'not in'} the cache)" for model, cached in found.cached_models.items())
    facts["models"] = "\n".join(there)
    return Group(_facts(facts), Text(), *(Text(line) for line in found.advice))


def _facts(facts: Mapping[str, str | None]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(Text(name, "dim"), Text(value))
    return table


def _list(values: Iterable[object]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


_PLAIN_LINES = 20  # lines that a whole run prints where there is no terminal
# What is counted in which phase; a step of the teacher alone has the joint ones' number besides, which stands last.
_PHASES = {"head_start_step": "head start", "carry_back_step": "carry back", "step": "training"}
# Shown beside the bar, in this order; the names are those of `metrics.jsonl`.
_SHOWN = ("denoising", "latent", "identity", "adversarial", "echo_pool")


def stderr_console() -> Console:
    """The console of stderr; rich asks the environment for NO_COLOR and the like."""
    return Console(stderr=True)


def say_to(console: Console, *, quiet: bool) -> Callable[[str], None]:
    """What prints a line as it stands, unless `quiet`."""
    if quiet:
        return lambda _line: None
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_error(message: str, label: str = "error: ") -> None:
    """Say in one line on stderr what went wrong."""
    line = " ".join(message.split())
    stderr_console().print(Text.assemble((label, "bold red"), line), highlight=False, soft_wrap=True)


class TrainingProgress:
    """A context that shows a training run's progress.

    Args:
        console: of stderr. config: of the run, for its steps and the teacher's alone. quiet: show nothing.
    """

    def __init__(self, console: Console, config: Config, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.lengths = {
            "step": config.train.steps,
            "head_start_step": config.train.head_start,
            "carry_back_step": config.echo.carry_back,
        }
        self.phase, self.steps = "", config.train.steps
        self.on_message = say_to(console, quiet=quiet)
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.started, self.first_step, self.step = 0.0, 0, 0
        self.latest: dict[str, float] = {}

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def on_step(self, metrics: Mapping[str, float]) -> None:
        """Show one finished step, of the run or of the teacher alone."""
        if self.quiet:
            return
        counted = next(name for name in _PHASES if name in metrics)
        step, phase = int(metrics[counted]), _PHASES[counted]
        if self.phase != phase or step <= self.step:  # a benchmark trains one run after another
            self._start(phase, self.lengths[counted], step, metrics.get("step_seconds", 0.0))
        self.step = step
        self.latest |= {name: metrics[name] for name in _SHOWN if name in metrics}
        skipped = [name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_")]
        if skipped:
            self.on_message(f"step {step}: skipped for {', '.join(skipped)}, whose loss or gradient is not finite")
        if "echo_made" in metrics:
            self.on_message(echo_line(metrics))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step)
        elif step % max(1, self.steps // _PLAIN_LINES) == 0 or step == self.steps:
            name = "step" if counted == "step" else phase
            self.on_message(f"{name} {step}/{self.steps}  {self._remaining(step)}  {self._losses()}")

    def _start(self, phase: str, steps: int, step: int, seconds: float) -> None:
        """Begin a phase: its own bar, its own clock."""
        self.phase, self.steps = phase, steps
        self.started, self.first_step = time.monotonic() - seconds, step - 1
        if not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        # Steps on a CPU may take minutes: the time left is told from all steps of the last hour.
        self.bar = Progress(TextColumn(phase), *columns, console=self.console, speed_estimate_period=3600)
        self.bar.add_task(phase, total=self.steps, completed=step)
        if self.live is None:
            self.live = Live(get_renderable=self._view, console=self.console)
            self.live.start()

    def _view(self) -> RenderableType:
        """The bar, and the losses in a line below it."""
        assert self.bar is not None
        return Group(self.bar, Text(self._losses(), "dim", no_wrap=True, overflow="ellipsis"))

    def _losses(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self.latest.items())

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


def evaluation_table(found: Evaluation) -> RenderableType:
    """A row per prompt, then all of them together, and the photos among themselves."""
    table = _score_table("prompt")
    for one in found.per_prompt:
        _add(table, one.prompt, one.scores.clip_i, one.scores.dino, one.scores.clip_t)
    table.add_section()
    _add(table, f"all {found.pictures} pictures", found.scores.clip_i, found.scores.dino, found.scores.clip_t)
    _add(table, f"the {found.photos} photos among themselves", found.photos_clip_i, found.photos_dino, None)
    return Group(table, Text(), Text(str(found.file)))


def benchmark_table(benchmark: Benchmark) -> RenderableType:
    """A row per subject, then their mean, the photos compared with each other, and the paper's mean."""
    table = _score_table("subject")
    for name, entry in benchmark.subjects.items():
        _add(table, name, entry["clip_i"], entry["dino"], entry["clip_t"])
    table.add_section()
    mean, paper = benchmark.mean, benchmark.to_dict()["paper_sd_turbo"]
    _add(table, f"mean of {len(benchmark.subjects)}", mean["clip_i"], mean["dino"], mean["clip_t"])
    _add(table, "photos among themselves", mean["photos_clip_i"], mean["photos_dino"], None)
    _add(table, "paper: SD-Turbo, all 30", paper["clip_i"], paper["dino"], None)
    return Group(table, Text(), Text(str(benchmark.file)))


def _score_table(first: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for name in ("CLIP-I", "DINO", "CLIP-T"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, *scores: float | None) -> None:
    table.add_row(Text(name), *("" if score is None else f"{score:.3f}" for score in scores))
