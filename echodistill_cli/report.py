"""Tables for people: the verdicts on photos, what a file is, what a machine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # for their annotations only: these tables must not cost an import of torch
    from echodistill_cli.doctor import Diagnosis
    from echodistill_cli.inspection import Inspection
    from echodistill_cli.photos import PhotoReport

_STYLES = {"ok": "green", "warning": "yellow", "skipped": "red"}
_LOADS = {"fully": "green", "partly": "yellow", "hidden": "yellow", "no": "red"}


def photo_table(report: PhotoReport) -> RenderableType:
    """A row per file with its verdict, then what concerns the folder as a whole."""
    table = Table("file", "verdict", "size", "notes", box=None, pad_edge=False)
    for file in report.files:
        size = f"{file.size[0]} x {file.size[1]}" if file.size else ""
        table.add_row(file.name, Text(file.verdict, _STYLES[file.verdict]), size, Text("; ".join(file.notes)))
    usable = f"{len(report.photos)} of {len(report.files)} files can be trained on."
    return Group(table, *(Text(warning, "yellow") for warning in report.warnings), Text(usable))


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
    facts |= {model: "in the cache" if there else "not in the cache" for model, there in found.cached_models.items()}
    return Group(_facts(facts), Text(), *(Text(line) for line in found.advice))


def _facts(facts: Mapping[str, str | None]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts.items():
        if value:
            table.add_row(Text(name, "dim"), Text(value))
    return table


def _list(values: Iterable[object]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
