"""What a person sees: progress and errors on stderr; paths, a table or one JSON object on stdout."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from echodistill_cli.config.schema import Config
from echodistill_cli.pipeline import OnMessage

if TYPE_CHECKING:  # importing a result type imports torch
    from echodistill_cli.pipeline import Benchmark, Diagnosis, Evaluation, Inspection, PhotoReport, Plan
_STYLES = {"ok": "green", "warning": "yellow", "skipped": "red"}
_LOADS = {"fully": "green", "partly": "yellow", "hidden": "yellow", "no": "red"}


# Control characters and marks that change the direction of text, which names, headers and errors may hold.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class SafeConsole(Console):
    """A console on which text cannot control the terminal; rich's own codes pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments without control characters."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else _CONTROLS.sub("", segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


def print_paths(result: Mapping[str, Any], paths: Iterable[object], *, as_json: bool) -> None:
    """Print a command's result on stdout: a line per path, or one JSON object."""
    accept_any_text()
    for line in [json.dumps(result)] if as_json else map(str, paths):
        print(_CONTROLS.sub("", line) if sys.stdout.isatty() else line)


def print_table(result: Mapping[str, Any], table: RenderableType, *, as_json: bool) -> None:
    """Print a command's result on stdout: a table, or one JSON object."""
    accept_any_text()
    if as_json:
        print(json.dumps(result))
    else:
        SafeConsole().print(table)


def accept_any_text() -> None:
    """Let stdout print characters that its encoding lacks, and bytes of file names that are no text."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        is_utf = sys.stdout.encoding.lower().startswith("utf")
        reconfigure(errors="surrogateescape" if is_utf else "backslashreplace")


def photo_table(report: PhotoReport) -> RenderableType:
    """A row per file with its verdict, then the warnings about the whole folder."""
    table = Table("file", "verdict", "size", "notes", box=None, pad_edge=False)
    for file in report.files:
        size = f"{file.size[0]} x {file.size[1]}" if file.size else ""
        table.add_row(Text(file.name), Text(file.verdict, _STYLES[file.verdict]), size, Text("; ".join(file.notes)))
    usable = f"{len(report.photos)} of {len(report.files)} files are usable for training."
    return Group(table, *(Text(warning, "yellow") for warning in report.warnings), Text(usable))


def plan_table(plan: Plan, *, resume: bool = False, overwrite: bool = False) -> RenderableType:
    """What `train` would do, with --resume or --overwrite or neither: a row per topic, below the warnings."""
    config = plan.config
    train, adapter, text, critic, run = config.train, config.adapter, config.text, config.critic, config.run
    text_side = {"lora": f"LoRA of rank {text.rank}", "token": "one learned token", "frozen": "frozen"}
    fate = "continued" if resume else "replaced" if overwrite else "exists: needs --resume or --overwrite"
    facts = {
        "photos": f"{plan.photos} usable, in {config.concept.photos}",
        "subject": config.subject,
        "models": "\n".join(f"{source} ({place})" for source, place in plan.models.items()),
        "downloads": _downloads(plan.downloads),
        "memory": _memory(plan),
        "UNets": f"LoRA of rank {adapter.rank}, alpha {config.lora_alpha:g}, on {adapter.targets}",
        "text side": text_side[text.form],
        "training": f"{train.steps} steps of {train.batch_size} at {config.model.resolution} pixels",
        "critics": f"{', '.join(critic.discriminators) or 'no discriminators'}; identity by {critic.identity}",
        "echo": "never"
        if config.echo.start is None
        else f"from step {config.echo.start}, every {config.echo.every} steps",
        "previews": f"every {run.sample_every} steps",
        "checkpoints": f"every {run.save_every} steps, the last {run.keep} kept",
        "output": f"{config.output} ({fate})" if plan.output_exists else str(config.output),
    }
    notes = (Text(note, "yellow") for note in (*plan.warnings, *plan.assumptions))
    return Group(*notes, _facts(facts), Text(), Text("Nothing was loaded or written."))


def _downloads(files: Mapping[str, int | None]) -> str:
    """A line per file to download, and the sum of the known sizes."""
    if not files:
        return "none"
    lines = [f"{file} ({'size unknown' if size is None else _bytes(size)})" for file, size in files.items()]
    known = [size for size in files.values() if size is not None]
    return "\n".join([*lines, *([f"{_bytes(sum(known))} in total"] if len(known) > 1 else [])])


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _memory(plan: Plan) -> str:
    if plan.memory is None:
        return "unknown for models of this size"
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in plan.memory.parts.items())
    return f"about {plan.memory.total:.1f} GiB ({parts})"


def inspection_table(inspection: Inspection) -> RenderableType:
    """What a file is, then a row per tool."""
    facts = {
        "file": f"{inspection.file} ({inspection.size / 1e6:.1f} MB, {', '.join(inspection.dtypes)})",
        "kind": f"{inspection.kind}, {inspection.format} keys, family {inspection.family}",
        "made by": inspection.made_by,
        "role": inspection.role,
        "base model": inspection.base_model,
        "rank": _list(inspection.ranks),
        "alpha / rank": _list(inspection.scales),
        "modules": ", ".join(f"{count} in {name}" for name, count in inspection.modules.items()),
        "trigger": _list(inspection.triggers),
        "use with": inspection.usage,
    }
    readers = Table("tool", "loads", "keys", "", box=None, pad_edge=False)
    for verdict in inspection.readers:
        keys = f"{verdict.matched} of {verdict.matched + verdict.unmatched}"
        readers.add_row(
            Text(verdict.reader), Text(verdict.loads, _LOADS.get(verdict.loads, "")), keys, Text(verdict.text)
        )
    return Group(_facts(facts), Text(), readers, *(Text(note, "yellow") for note in inspection.notes))


def diagnosis_table(diagnosis: Diagnosis) -> RenderableType:
    """Versions, devices, memory, cached models, and a line of advice per preset."""
    facts = dict(diagnosis.versions) | diagnosis.devices
    facts |= {
        "memory": f"{diagnosis.memory_gib:g} GiB",
        "model cache": f"{diagnosis.cache} ({diagnosis.disk_free_gib:g} GiB free)",
    }
    models = diagnosis.cached_models.items()
    facts["models"] = "\n".join(f"{model} ({'in' if cached else 'not in'} the cache)" for model, cached in models)
    return Group(_facts(facts), Text(), *(Text(line) for line in diagnosis.advice))


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


_PLAIN_LINES = 20  # per phase, without a terminal
# The counter of each phase. Metrics of a head-start or carry-back step also hold the joint "step", so it comes last.
_PHASES = {"head_start_step": "head start", "carry_back_step": "carry back", "step": "training"}
# Metrics below the bar, in this order.
_SHOWN = ("denoising", "latent", "identity", "adversarial", "echo_pool")


def stderr_console() -> Console:
    """Return a console for stderr. rich reads NO_COLOR and similar variables."""
    return SafeConsole(stderr=True)


def say_to(console: Console, *, quiet: bool) -> OnMessage:
    """Return a function that prints a line without markup, or nothing if `quiet`."""
    if quiet:
        return lambda _line: None
    return lambda line: console.print(Text(line), soft_wrap=True)


def print_error(message: str, label: str = "error: ") -> None:
    """Print an error on stderr, as one line."""
    line = " ".join(message.split())
    stderr_console().print(Text.assemble((label, "bold red"), line), highlight=False, soft_wrap=True)


class TrainingProgress:
    """Context that shows the progress of one training run, or of several with the same number of steps.

    Args:
        console: of stderr.
        config: of the run, for the lengths of its phases.
        quiet: show nothing.
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
        self.began, self.config = time.monotonic(), config
        self.first_targets = config.train.first_targets if config.replays else 0

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def on_step(self, metrics: Mapping[str, float]) -> None:
        """Show one finished step of any phase."""
        if self.quiet:
            return
        counter = next(name for name in _PHASES if name in metrics)
        step, phase = int(metrics[counter]), _PHASES[counter]
        if self.phase != phase or step <= self.step:  # the next phase, or the next run of a benchmark
            targets = self.first_targets and counter == "step" and step == 1
            self._start(phase, self.lengths[counter], step, None if targets else metrics.get("step_seconds", 0.0))
        self.step = step
        self.latest |= {name: metrics[name] for name in _SHOWN if name in metrics}
        skipped = [name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_")]
        if skipped:
            self.on_message(f"step {step}: skipped {', '.join(skipped)}, because the loss or gradient is not finite")
        if "echo_made" in metrics:
            self.on_message(echo_line(metrics))
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step)
            if step == self.steps:
                self._stop()
        elif step % max(1, self.steps // _PLAIN_LINES) == 0 or step == self.steps:
            name = "step" if counter == "step" else phase
            parts = (f"{name} {step}/{self.steps}", self._remaining(step), self._losses())
            self.on_message("  ".join(filter(None, parts)))
        if counter == "head_start_step" and step == self.steps and self.first_targets:
            self.on_message(f"Generating the first targets ({self.first_targets} batches)")

    def show_end(self, run: Path) -> None:
        """Print how long the training took and the next command."""
        seconds = round(time.monotonic() - self.began)
        minutes = f"{seconds // 60} min " if seconds >= 60 else ""
        prompt = f"a photo of a {self.config.subject} on the beach"
        following = f"echodistill sample --lora {shlex.quote(str(run))} {_quoted(prompt)}"
        if not self.quiet:
            self.on_message(f"Done in {minutes}{seconds % 60} s. Next: {following}")

    def _start(self, phase: str, steps: int, step: int, seconds: float | None) -> None:
        """Begin a phase with a bar and a clock; with `seconds` of None, the clock omits its first step."""
        self._stop()
        self.phase, self.steps, self.latest = phase, steps, {}
        self.started, self.first_step = time.monotonic() - (seconds or 0), step if seconds is None else step - 1
        if not self.console.is_terminal:
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
        # A step may take minutes on a CPU: estimate the time left from the last hour.
        self.bar = Progress(TextColumn(phase), *columns, console=self.console, speed_estimate_period=3600)
        self.bar.add_task(phase, total=self.steps, completed=step)
        self.live = Live(get_renderable=self._view, console=self.console)
        self.live.start()

    def _stop(self) -> None:
        """End the live display; its last state stays on the screen."""
        if self.live:
            self.live.stop()
        self.live = None

    def _view(self) -> RenderableType:
        """The bar, with the losses in a line below it."""
        assert self.bar is not None
        return Group(self.bar, Text(self._losses(), "dim", no_wrap=True, overflow="ellipsis"))

    def _losses(self) -> str:
        return "  ".join(f"{name} {value:.3g}" for name, value in self.latest.items())

    def _remaining(self, step: int) -> str:
        """Return the time left; nothing before a step on the clock."""
        if step == self.first_step and step < self.steps:
            return ""
        seconds = (time.monotonic() - self.started) / max(step - self.first_step, 1) * (self.steps - step)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def _quoted(text: str) -> str:
    """Return a text in quotes for a shell, in double quotes if they suffice."""
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


class ImageProgress:
    """Context that counts generated images: a bar on a terminal, about ten plain lines elsewhere.

    Args:
        console: of stderr.
        quiet: show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.on_message = say_to(console, quiet=quiet)
        self.bar: Progress | None = None

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def on_image(self, done: int, total: int) -> None:
        """Show that `done` of `total` images are finished."""
        if self.quiet or total == 1:
            return
        if not self.console.is_terminal:
            if done % max(1, total // 10) == 0:
                self.on_message(f"image {done}/{total}")
            return
        if self.bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
            self.bar = Progress(TextColumn("images"), *columns, console=self.console, speed_estimate_period=3600)
            self.bar.add_task("images", total=total)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=done)


def echo_line(metrics: Mapping[str, float]) -> str:
    """Return a line on how many images a refresh of the echo pool generated, kept and dropped."""
    reasons = {
        "echo_identity": "unlike the subject",
        "echo_photo_copy": "copies of a photo",
        "echo_duplicate": "duplicates",
        "echo_crowded": "worse than the pool",
    }
    dropped = ", ".join(f"{metrics[key]:.0f} {words}" for key, words in reasons.items() if metrics[key])
    line = f"echo at step {metrics['step']:.0f}: generated {metrics['echo_made']:.0f}, kept {metrics['echo_kept']:.0f}"
    return f"{line} (dropped: {dropped})" if dropped else line


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """A row per prompt, then the mean of all, and the photos compared with each other."""
    table = _score_table("prompt")
    for one in evaluation.per_prompt:
        _add(table, one.prompt, one.scores.clip_i, one.scores.dino, one.scores.clip_t)
    table.add_section()
    scores = evaluation.scores
    _add(table, f"all {evaluation.pictures} images", scores.clip_i, scores.dino, scores.clip_t)
    photos = f"for comparison, no upper limit: the {evaluation.photos} photos among themselves"
    _add(table, photos, evaluation.photos_clip_i, evaluation.photos_dino, None)
    return Group(table, Text(), Text("\n".join(map(str, filter(None, (evaluation.file, evaluation.report))))))


def benchmark_table(benchmark: Benchmark) -> RenderableType:
    """A row per subject, then their mean, the photos compared with each other, and the paper's mean."""
    table = _score_table("subject")
    for name, entry in benchmark.subjects.items():
        _add(table, name, entry["clip_i"], entry["dino"], entry["clip_t"])
    table.add_section()
    mean, paper = benchmark.mean, benchmark.to_dict()["paper_sd_turbo"]
    _add(table, f"mean of {len(benchmark.subjects)}", mean["clip_i"], mean["dino"], mean["clip_t"])
    _add(
        table,
        "for comparison, no upper limit: photos among themselves",
        mean["photos_clip_i"],
        mean["photos_dino"],
        None,
    )
    _add(table, "paper: SD-Turbo, all 30, encoders unclear", paper["clip_i"], paper["dino"], None)
    return Group(table, Text(), Text(str(benchmark.file)))


def _score_table(first: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for name in ("CLIP-I", "DINO", "CLIP-T"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, *scores: float | None) -> None:
    table.add_row(Text(name), *("" if score is None else f"{score:.3f}" for score in scores))
