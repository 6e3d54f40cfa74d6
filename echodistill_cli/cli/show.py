"""What a person sees: lines and errors on stderr; paths, a table or one JSON object on stdout."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from echodistill_cli.config.families import about, expected_bytes, size_in_words
from echodistill_cli.errors import counted
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
    usable = f"{len(report.photos)} of {counted(len(report.files), 'file is', 'files are')} usable for training."
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
        "device": f"{plan.device}, weights in {plan.precision}",
        "memory": _memory(plan),
        "UNets": f"LoRA of rank {adapter.rank}, alpha {config.lora_alpha:g}, on {adapter.targets}",
        "text side": text_side[text.form],
        "training": f"{counted(train.steps, 'step')} of {train.batch_size} at {config.model.resolution} pixels",
        "critics": f"{', '.join(critic.discriminators) or 'no discriminators'}; identity by {critic.identity}",
        "echo": "never"
        if config.echo.start is None
        else f"from step {config.echo.start}, every {counted(config.echo.every, 'step')}",
        "previews": f"every {counted(run.sample_every, 'step')}",
        "checkpoints": f"every {counted(run.save_every, 'step')}, the last {run.keep} kept",
        "output": f"{config.output} ({fate})" if plan.output_exists else str(config.output),
    }
    notes = (Text(note, "yellow") for note in (*plan.warnings, *plan.assumptions))
    return Group(*notes, _facts(facts), Text(), Text("Nothing was loaded or written."))


def _downloads(files: Mapping[str, int | None]) -> str:
    """A line per file to download, and the sum of their sizes."""
    if not files:
        return "none"
    lines = [f"{file} ({about(file) if size is None else size_in_words(size)})" for file, size in files.items()]
    sizes = [expected_bytes(file) if size is None else size for file, size in files.items()]
    total = size_in_words(sum(size for size in sizes if size is not None))
    # Only the hub knows which files a part has; the lines without its word are expectations.
    is_exact, is_whole = None not in files.values(), None not in sizes
    how = "" if is_exact else "about " if is_whole else "more than "
    return "\n".join([*lines, *([f"{how}{total} in total"] if len(lines) > 1 else [])])


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


def evaluation_table(evaluation: Evaluation) -> RenderableType:
    """A row per prompt, then the mean of all, and the photos compared with each other."""
    table = _score_table("prompt")
    for one in evaluation.per_prompt:
        _add(table, one.prompt, one.scores.clip_i, one.scores.dino, one.scores.clip_t)
    table.add_section()
    scores = evaluation.scores
    _add(table, f"all {counted(evaluation.pictures, 'image')}", scores.clip_i, scores.dino, scores.clip_t)
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
