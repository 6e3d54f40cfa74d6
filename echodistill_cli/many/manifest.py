"""Read a manifest: one row per subject, as .csv, .jsonl or .toml, with the line of each row.

Columns: `photos` (relative to the manifest), `class_name`, `token`, `name`, `model`, and any setting by its dotted key.
A row wins over flags, flags over a settings file, the file over the preset. A subject without a name has that of the
folder of its photos.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echodistill_cli.config.schema import Config, nearest
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import expanded, read_small

COLUMNS = {
    "photos": "concept.photos",
    "class_name": "concept.class_name",
    "token": "concept.token",
    "name": "run.name",
    "model": "model.student",
}
FORMS = (".csv", ".jsonl", ".toml")
# Names that OUTPUT holds for itself.
RESERVED = ("logs", "results.jsonl")
_TABLE = "subject"
Build = Callable[[Mapping[str, Any]], Config]


@dataclass(frozen=True)
class Row:
    """A row of a manifest.

    Attributes:
        config: of the subject.
        place: file and line, for messages.
    """

    config: Config
    place: str


def read_manifest(file: Path, output: Path, build: Build) -> tuple[Row, ...]:
    """Return the subjects of a manifest.

    Args:
        file: to read.
        output: folder of the run folders.
        build: makes a configuration of a row's settings by dotted key.

    Raises:
        ConfigError: the file cannot be read, or a row is wrong; the message names its line.
    """
    rows, names = list[Row](), dict[str, str]()
    for place, values in read_rows(file):
        with located(place):
            config = build(_settings(values, file.parent, output))
        if config.name in RESERVED:
            raise ConfigError(
                f"{place}: {config.name!r} is a name that the output uses itself.", "Choose another name."
            )
        earlier = names.setdefault(config.name.casefold(), place)  # many disks ignore case
        if earlier != place:
            raise ConfigError(
                f"{place}: the name {config.name!r} is also that of {earlier}.", "Give each subject a name of its own."
            )
        rows.append(Row(config, place))
    if not rows:
        raise ConfigError(f"{file} has no subject.", "Write one row per subject, with at least its folder of photos.")
    return tuple(rows)


class located:  # noqa: N801 - reads as a statement
    """Context that puts the place of a row before an error about it.

    Args:
        place: file and line.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, EchoDistillError):
            raise type(error)(f"{self.place}: {error.message}", error.hint) from error


def _settings(values: Mapping[str, Any], folder: Path, output: Path) -> dict[str, Any]:
    """Return a row's settings by dotted key.

    Raises:
        ConfigError: a column is unknown, or the row has no photos or an output of its own.
    """
    settings = {COLUMNS.get(name, name): value for name, value in values.items()}
    for key in settings:
        if key not in _hints():
            near = nearest(key, [*COLUMNS, *_hints()])
            raise ConfigError(f"{key!r} is neither a column nor a setting.", f"Did you mean {near}?" if near else None)
    if "run.output" in settings:
        raise ConfigError("run.output cannot be set for one subject.", "Use --output for all, and name for each.")
    photos = settings.get("concept.photos")
    if not isinstance(photos, str) or not photos.strip():
        raise ConfigError("the row has no photos.", "Name their folder, relative to the manifest.")
    path = folder / expanded(photos.strip())
    name = settings.setdefault("run.name", path.resolve().name)
    return settings | {"concept.photos": str(path), "run.output": str(output / str(name))}


def read_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the values of each row; settings in tables become dotted keys.

    Raises:
        ConfigError: the file cannot be read or is damaged; the message names the line.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".toml": _toml_rows}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(f"{file} is no manifest: its name ends in none of {', '.join(FORMS)}.")
    try:
        text = read_small(file).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error}).", "Save it as UTF-8.") from error
    for line, values in reader(file, text):
        yield f"{file}, line {line}", _flat(values)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict[str, Any]()
    for name, value in values.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line and values of each row. An empty cell sets nothing; cells may end with ; or tab too."""
    header = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(keepends=True), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"{file}, line 1: the column {twice[0]!r} is there twice.", "Remove one of them.")
        end = reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num
            values = {name: cell.strip() for name, cell in zip(names, cells, strict=False) if cell.strip()}
            if len(cells) > len(names) and any(cell.strip() for cell in cells[len(names) :]):
                raise ConfigError(
                    f"{file}, line {line}: it has {len(cells)} cells for {len(names)} columns.",
                    "Put a cell with a comma in double quotes.",
                )
            if values:
                yield line, {name: _cell(name, cell) for name, cell in values.items()}
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: it is not valid CSV ({error}).") from error


def _cell(name: str, text: str) -> Any:
    """Return the text of a cell as a TOML value, unless its setting is a text itself."""
    hint = _hints().get(COLUMNS.get(name, name))
    if hint is None or (str in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not tuple):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text.lower() == "true" if text.lower() in ("true", "false") else text


def _jsonl_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: it is not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file}, line {number}: it is not an object.", 'Write {"photos": "dog"}.')
        yield number, values


def _toml_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the error names the line
        raise ConfigError(f"{file} is not valid TOML: {error}.") from error
    tables = document.pop(_TABLE, [])
    if document or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        wrong = next(iter(document), _TABLE)
        raise ConfigError(f"{file}: {wrong!r} is not a table [[{_TABLE}]].", f"Write one [[{_TABLE}]] per subject.")
    yield from zip(_lines_of_tables(text, len(tables)), tables, strict=True)


def _lines_of_tables(text: str, count: int) -> Sequence[int]:
    """Return the line of each table's header, which the parser does not tell."""
    header = re.compile(rf"\s*\[\[\s*[\"']?{_TABLE}[\"']?\s*\]\]")
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if header.match(line)]
    return lines if len(lines) == count else [1] * count  # written inline, or quoted in a text


@functools.cache
def _hints() -> Mapping[str, Any]:
    """Return the type of each setting by dotted key."""
    return {
        f"{section}.{key}": hint
        for section, kind in typing.get_type_hints(Config).items()
        for key, hint in typing.get_type_hints(kind).items()
    }
