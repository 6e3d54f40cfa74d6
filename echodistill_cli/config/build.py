"""How a `Config` comes about: defaults, then a model's preset, then a TOML file, then flags; and back to TOML.

TOML has no null: the text "off" stands for `None`, in files and on the command line alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from echodistill_cli.config.catalogue import PRESETS
from echodistill_cli.config.families import FAMILIES, family_of_source
from echodistill_cli.config.schema import RETIRED, Config, nearest
from echodistill_cli.errors import ConfigError

OFF = "off"
Tables = dict[str, dict[str, Any]]


def build_config(
    model: str | None = None,
    toml_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    suited: Mapping[str, Any] | None = None,
) -> Config:
    """Layer the defaults, a preset, what suits the device, a TOML file and overrides into a `Config`.

    Args:
        model: a preset's name, or a hub id, folder or file for the student.
        toml_file: a file with the sections and keys of `Config`; its `model.student` may name a preset too.
        overrides: values by dotted key, such as `{"train.steps": 500}`.
        suited: the same, for what nobody has set, such as a memory plan's settings.

    Raises:
        ConfigError: the file is unreadable, or a key or value is wrong.
    """
    file_tables = read_toml(toml_file) if toml_file else {}
    in_file = file_tables.get("model", {})
    if model and in_file.get("student", model) != model:
        # The flag replaces the file's student, whose revision would not be its own.
        in_file = {key: value for key, value in in_file.items() if key not in ("student", "student_revision")}
    named = model or in_file.get("student")
    tables: Tables = {}
    if named in PRESETS:
        _merge(tables, PRESETS[str(named)].settings)
        in_file = {key: value for key, value in in_file.items() if key != "student"}
    elif named:
        own = PRESETS[_family_preset(str(named))].settings["model"]
        unlike = ("student", "student_revision")
        _merge(tables, {"model": {key: value for key, value in own.items() if key not in unlike}})
        _merge(tables, {"model": {"student": named}})
    suggested = dict(tables.get("model", {}))
    _merge_dotted(tables, suited or {})
    _merge(tables, file_tables | {"model": in_file})
    _merge_dotted(tables, overrides or {})
    _settle_teacher(tables.setdefault("model", {}), suggested, keep=named in PRESETS)
    return config_from_dict(tables)


def _settle_teacher(model: dict[str, Any], suggested: Mapping[str, Any], *, keep: bool) -> None:
    """A base model that a LoRA makes one-step is its own teacher; another teacher has not the suggested revision."""
    is_base = model.get("student_lora", OFF) not in (None, OFF)
    if is_base and not keep and model.get("teacher") == suggested.get("teacher"):
        model |= {"teacher": model.get("student"), "teacher_revision": model.get("student_revision")}
    elif model.get("teacher") != suggested.get("teacher"):
        pinned = suggested.get("teacher_revision")
        if pinned is not None and model.get("teacher_revision") == pinned:
            del model["teacher_revision"]


def _family_preset(student: str) -> str:
    """Return the preset whose teacher and sizes suit a student that was named without a preset."""
    by_name = (name for name, preset in PRESETS.items() if preset.settings["model"]["student"] == student)
    return next(by_name, (family_of_source(student) or FAMILIES["sd"]).preset)


def read_toml(path: Path) -> Tables:
    """The tables of a TOML file.

    Raises:
        ConfigError: it is missing, not TOML, or has a setting outside of any section.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {name} stands in no section.", "Put it under its own, such as [train].")
    return tables


def config_from_dict(tables: Mapping[str, Any]) -> Config:
    """A `Config` from nested tables, as `config_to_dict` gives them.

    Raises:
        ConfigError: an unknown section or key (the nearest right one is named), or a wrong value.
    """
    kinds = typing.get_type_hints(Config)
    sections: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in kinds:
            raise _unknown(f"section [{name}]", nearest(name, list(kinds)))
        if not isinstance(table, Mapping):
            raise ConfigError(f"[{name}] is {table!r}, not a table of settings.")
        sections[name] = _section_from_dict(name, kinds[name], table)
    return Config(**sections)


def config_to_dict(config: Config) -> Tables:
    """Nested tables of plain values; `None` becomes "off"."""
    return {
        section: {key: _to_plain(value) for key, value in table.items()}
        for section, table in dataclasses.asdict(config).items()
    }


def config_to_toml(config: Config) -> str:
    """The whole resolved configuration; reading it back gives an equal `Config`."""
    return tomli_w.dumps(config_to_dict(config))


def config_hash(config: Config) -> str:
    """SHA-256, in hex, of the settings that decide the result: not where the run lives or what it reports."""
    tables = config_to_dict(config)
    tables["run"] = {"seed": config.run.seed}
    del tables["concept"]["photos"]
    _merge_dotted(tables, {key: _to_plain(neutral) for key, neutral in RETIRED.items()})
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def _section_from_dict(section: str, kind: type, table: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    table = _without_retired(section, table)
    for key in table:
        if key not in hints:
            near = nearest(key, list(hints))
            raise _unknown(f"setting {section}.{key}", f"{section}.{near}" if near else None)
    return kind(**{key: _from_plain(value, hints[key]) for key, value in table.items()})


def _without_retired(section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without retired keys that hold their neutral value.

    Raises:
        ConfigError: one holds another value.
    """
    kept = {}
    for key, value in table.items():
        name = f"{section}.{key}"
        if name not in RETIRED:
            kept[key] = value
        elif value not in (RETIRED[name], _to_plain(RETIRED[name])):
            raise ConfigError(
                f"{name} = {value!r} was a setting until echodistill 0.1.",
                f"Remove it, or set it to {_to_plain(RETIRED[name])!r}, which is what every run does now.",
            )
    return kept


def _from_plain(value: Any, hint: Any) -> Any:
    if value == OFF and type(None) in typing.get_args(hint):
        return None
    return tuple(value) if isinstance(value, list) else value


def _to_plain(value: Any) -> Any:
    if value is None:
        return OFF
    return list(value) if isinstance(value, tuple) else value


def _merge_dotted(tables: Tables, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        section, _, name = key.partition(".")
        _merge(tables, {section: {name: value}})


def _merge(tables: Tables, more: Mapping[str, Any]) -> None:
    for section, table in more.items():
        if isinstance(table, Mapping):
            tables.setdefault(section, {}).update(table)
        else:
            tables[section] = table


def _unknown(what: str, near: str | None) -> ConfigError:
    return ConfigError(f"Unknown {what}.", f"Did you mean {near}?" if near else None)
