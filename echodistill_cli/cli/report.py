"""What a command prints on stdout as its result: paths, one JSON object, or a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from echodistill_cli.config.build import OFF

if TYPE_CHECKING:  # for their annotations only: these tables must not cost an import of torch
    from echodistill_cli.data.photos import PhotoReport
    from echodistill_cli.doctor import Diagnosis
    from echodistill_cli.lora.inspect import Inspection

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
