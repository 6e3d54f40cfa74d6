"""Build a `Config` from presets, files and flags, and write it as TOML.

Later sources win: the defaults, a preset, a memory plan, a TOML file, overrides.

TOML has no null: the text "off" stands for `None`, in files and on the command line alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from echodistill_cli.config.distilled import known_settings
from echodistill_cli.config.families import FAMILIES, family_of_source, native_resolution
from echodistill_cli.config.family import FamilyName
from echodistill_cli.config.schema import Config, nearest, shown
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import expanded, host_mark, read_small

OFF = "off"
_BACKSLASHES = r"In TOML, write a Windows path in single quotes ('C:\dog') or with forward slashes (C:/dog)."
Tables = dict[str, dict[str, Any]]
_CONTROLS = r"[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"  # the last ones turn the direction of a text
# Settings of older versions that are gone, with the value at which each had no effect. A file with that value is still
# read, and `config_hash` still counts it, so that the hashes in LoRA headers and benchmark rows stay valid.
RETIRED: Mapping[str, Any] = {
    "model.student_original_size": None,
    "model.student_target_size": None,
    "model.teacher_target_size": None,
    "train.joint_text_share": 1.0,
    "train.teacher_mean": False,
    "train.max_bad_steps": 5,
    "echo.teacher_steps": 1,
    "echo.null_share": 0.0,
    "concept.recolour": 0.0,
    "concept.tint_scenes": False,
}
# Keys that came after the first hashes, with the value at which each does nothing. `config_hash` leaves a key out at
# that value, so that adding a setting does not change the hash of a run that does not use it.
ADDED: Mapping[str, Any] = {
    "model.student_timesteps": (),
    "model.student_sampler": "auto",
    "loss.paired": 0.0,
    "train.compile": "off",
}


@dataclass(frozen=True)
class Preset:
    """A pair of models that has a short name, with the settings for it.

    Args:
        about: what it is, in one line.
        settings: plain values by section and key.
        family: of models of published size, whose memory needs are known; None for the embedded toy pair.
        nouns: the only things that a toy can generate; empty for models of published size.
    """

    about: str
    settings: Mapping[str, Mapping[str, Any]]
    family: FamilyName | None
    nouns: tuple[str, ...] = ()


def _read_preset(name: str) -> Preset:
    tables = tomllib.loads((Path(__file__).parent / "presets" / f"{name}.toml").read_text(encoding="utf-8"))
    header = tables.pop("preset")
    return Preset(header["about"], tables, header.get("family"), tuple(header.get("nouns", ())))


_NAMES = ("sd-turbo", "sdxl-turbo", "sana-sprint", "flux2-klein", "mini")  # as the help orders them
PRESETS: Mapping[str, Preset] = {name: _read_preset(name) for name in _NAMES}
DEFAULT = "sd-turbo"


def build_config(
    model: str | None = None,
    toml_file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> Config:
    """Build a `Config` from defaults, a preset, a memory plan, a TOML file and overrides; later ones win.

    Args:
        model: name of a preset, or hub id, folder or file of a student.
        toml_file: sections and keys of `Config`. Its `model.student` may name a preset, and it may be a preset's file.
        overrides: values by dotted key, such as `{"train.steps": 500}`.
        fitted: values by dotted key that a memory plan chose; they win over the preset only.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong.
    """
    file_tables = read_toml(toml_file) if toml_file else {}
    file_tables.pop("preset", None)
    file_model = file_tables.get("model", {})
    if model and file_model.get("student", model) != model:
        # `model` replaces the student of the file, and with it the student's revision.
        file_model = {key: value for key, value in file_model.items() if key not in ("student", "student_revision")}
    # Without any name, the default is the preset itself, whose models have pinned revisions.
    default = None if "model.student" in (overrides or {}) else DEFAULT
    student = file_model.get("student", default) if model is None else model
    preset = PRESETS.get(student) if isinstance(student, str) else None
    tables: Tables = {}
    if preset:
        _merge(tables, preset.settings)
        file_model = {key: value for key, value in file_model.items() if key != "student"}
    elif student is not None:
        student_lora = (overrides or {}).get("model.student_lora", file_model.get("student_lora"))
        _merge(tables, _family_settings(student, student_lora))
        _merge(tables, {"model": {"student": student}})
    preset_model = dict(tables.get("model", {}))
    _merge_dotted(tables, fitted or {})
    _merge(tables, file_tables | {"model": file_model})
    _merge_dotted(tables, overrides or {})
    _settle_teacher(tables.setdefault("model", {}), preset_model, is_preset=preset is not None)
    return config_from_dict(tables)


def _settle_teacher(model: dict[str, Any], preset_model: Mapping[str, Any], *, is_preset: bool) -> None:
    """Make a base model with a distillation LoRA its own teacher.

    For a teacher other than the preset's, drop the preset's revision.
    """
    has_lora = model.get("student_lora", OFF) not in (None, OFF)
    if has_lora and not is_preset and model.get("teacher") == preset_model.get("teacher"):
        model |= {"teacher": model.get("student"), "teacher_revision": model.get("student_revision")}
    elif model.get("teacher") != preset_model.get("teacher"):
        revision = preset_model.get("teacher_revision")
        if revision is not None and model.get("teacher_revision") == revision:
            del model["teacher_revision"]


def _family_settings(student: Any, student_lora: Any) -> Tables:
    """Return the teacher, sizes and steps that suit a student that was named without a preset, by section.

    Args:
        student: as typed; a value that is no string is refused later.
        student_lora: the distillation LoRA that makes the student of a base model; None or "off" for none.
    """
    if not isinstance(student, str):
        return {}
    models = {name: preset.settings["model"] for name, preset in PRESETS.items()}
    by_name = (name for name, model in models.items() if student in (model["student"], model["teacher"]))
    preset = PRESETS[next(by_name, (family_of_source(student) or FAMILIES["sd"]).preset)]
    settings = {key: value for key, value in preset.settings["model"].items() if key != "student_revision"}
    is_base = student_lora not in (None, OFF)
    settings |= known_settings(str(student_lora) if is_base else student)
    # A base model generates at the resolution that it was trained at, not at that of the family's one-step model.
    side = native_resolution(student) if is_base else None
    others = {name: dict(table) for name, table in preset.settings.items() if preset.family}
    return {**others, "model": settings if side is None else settings | {"resolution": side}}


def read_toml(path: Path) -> Tables:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has a setting outside of any section.
    """
    try:
        tables = tomllib.loads(read_small(path).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply.") from error
    except ValueError as error:  # of TOML, of UTF-8, or an integer of thousands of digits
        is_escape = re.search(r"hex value|Unescaped|escape", str(error))
        raise ConfigError(f"{path} is not valid TOML: {error}.", _BACKSLASHES if is_escape else None) from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {name} is outside of any section.", "Move it under its section, such as [train]."
            )
    return tables


def config_from_dict(tables: Mapping[str, Any]) -> Config:
    """Return the `Config` of nested tables such as `config_to_dict` returns.

    Raises:
        ConfigError: a section, key or value is wrong; for a wrong name, the most similar one is given.
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
    """Return nested tables of plain values; `None` becomes "off"."""
    return {
        section: {key: _to_plain(value) for key, value in table.items()}
        for section, table in dataclasses.asdict(config).items()
    }


def config_to_toml(config: Config) -> str:
    """Return all settings as TOML; reading it back gives an equal `Config`."""
    return tomli_w.dumps(config_to_dict(config))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file: types, bounds, choices, defaults, descriptions."""
    defaults = config_to_dict(Config())
    sections = {
        section: {
            "type": "object",
            "description": kind.__doc__,
            "additionalProperties": False,
            "properties": {
                entry.name: _key_schema(typing.get_type_hints(kind)[entry.name], entry.metadata)
                | {"default": defaults[section][entry.name]}
                for entry in dataclasses.fields(kind)
            },
        }
        for section, kind in typing.get_type_hints(Config).items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of echodistill train",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _key_schema(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    is_list, is_optional = typing.get_origin(hint) is tuple, type(None) in typing.get_args(hint)
    kind = kinds[0] if is_list or is_optional else hint
    schema: dict[str, Any] = {"type": _JSON_TYPES[kind]}
    schema |= {bound: metadata[bound] for bound in ("minimum", "maximum") if metadata[bound] is not None}
    if metadata["choices"]:
        schema["enum"] = list(metadata["choices"])
    if is_list:
        schema = {"type": "array", "items": schema}
    elif is_optional and kind is not str:
        schema = {"anyOf": [schema, {"const": OFF}]}
    return schema | {"description": metadata["about"]}


def config_hash(config: Config) -> str:
    """Return the SHA-256, in hex, of the settings that decide the result, so not of paths and reports."""
    tables = config_to_dict(config)
    tables["run"] = {"seed": config.run.seed}
    del tables["concept"]["photos"]
    model = tables["model"]
    if len(model["student_timesteps"]) == 1:  # under the name that it had when there could be only one
        (model["student_timestep"],) = model["student_timesteps"]
        model["student_timesteps"] = []
    for key, neutral in ADDED.items():
        section, _, name = key.partition(".")
        if tables[section][name] == _to_plain(neutral):
            del tables[section][name]
    _merge_dotted(tables, {key: _to_plain(neutral) for key, neutral in RETIRED.items()})
    return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def _section_from_dict(section: str, kind: type, table: Mapping[str, Any]) -> Any:
    hints, table = typing.get_type_hints(kind), _renamed(section, _without_retired(section, table))
    for key in table:
        if key not in hints:
            near = nearest(key, list(hints))
            raise _unknown(f"setting {section}.{key}", f"{section}.{near}" if near else None)
        _check_characters(f"{section}.{key}", table[key])
    return kind(**{key: _from_plain(value, hints[key]) for key, value in table.items()})


def _check_characters(name: str, value: Any) -> None:
    """Reject empty text, invalid Unicode and control characters, as those from an unescaped Windows path."""
    if value == "" and name != "concept.photos":  # a run may be described without its photos
        raise ConfigError(f"{name} is empty.", "Give it a value, or remove it.")
    is_list = isinstance(value, list | tuple)
    for text in filter(lambda item: isinstance(item, str), value if is_list else [value]):
        if re.search(r"[\ud800-\udfff]", text):
            raise ConfigError(f"{name} = {shown(text)} is not valid Unicode.", "Use UTF-8.")
        if re.search(r"\0" if is_list else _CONTROLS, text):  # a prompt may have several lines
            remedy = _BACKSLASHES if re.search(r"[\b\t\n\f\r]", text) else "Remove it."
            raise ConfigError(f"{name} = {shown(text)} holds a control character.", remedy)


def _without_retired(section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table without retired keys that have their neutral value.

    Raises:
        ConfigError: a retired key has another value.
    """
    settings = {}
    for key, value in table.items():
        name = f"{section}.{key}"
        if name not in RETIRED:
            settings[key] = value
        elif value not in (RETIRED[name], _to_plain(RETIRED[name])):
            raise ConfigError(
                f"{name} = {value!r} was a setting of an older echodistill.",
                f"Remove it: every run does what {_to_plain(RETIRED[name])!r} did.",
            )
    return settings


def _renamed(section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table with the one timestep of older versions as a list."""
    if section != "model" or "student_timestep" not in table:
        return dict(table)
    value = table["student_timestep"]
    old = {} if value in (None, OFF) else {"student_timesteps": [value]}
    return {key: value for key, value in table.items() if key != "student_timestep"} | old


def _from_plain(value: Any, hint: Any) -> Any:
    if value == OFF and type(None) in typing.get_args(hint):
        return None
    return tuple(value) if isinstance(value, list) else value


def _to_plain(value: Any) -> Any:
    return OFF if value is None else list(value) if isinstance(value, tuple) else value


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


_MODELS = ("student", "teacher", "student_lora", "tiny_decoder", "vae", "tokenizer", "single_file_config")
# Settings that may name local files.
_LOCAL = {
    "concept": ("photos",),
    "critic": ("discriminators", "identity"),
    "model": (*_MODELS, "teacher_single_file_config"),
}
_ENCODERS = {"clip", "dino", "dinov2", "teacher", "none"}  # names, even where a folder is called so


def with_absolute_paths(config: Config) -> Config:
    """Return the settings with local models and photos by absolute paths, to use from any folder."""
    sections = {}
    for section, keys in _LOCAL.items():
        settings = getattr(config, section)
        sections[section] = dataclasses.replace(settings, **{key: absolute(getattr(settings, key)) for key in keys})
    return dataclasses.replace(config, **sections)


def absolute(value: Any) -> Any:
    """Return a setting with absolute paths of existing files and folders; a list becomes a tuple."""
    if isinstance(value, (tuple, list)):
        return tuple(map(absolute, value))
    if not isinstance(value, str) or not value or value in _ENCODERS:
        return value
    path = expanded(value)
    try:
        return str(path.absolute()) if path.exists() else value
    except OSError:  # for example, too long for a file name
        return value


_NOT_IN_NAMES = {*'\\/:*?"<>|', *map(chr, range(32)), *map(chr, range(127, 160))}  # on at least one system
_LONGEST_NAME, _DEVICES = 255, re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # bytes; names of Windows


def is_file_name(text: str) -> bool:
    """Return whether a text may be a file's name, or a part of it, on every system; no path is."""
    return bool(text.strip(" .")) and not set(text) & _NOT_IN_NAMES and not _DEVICES.fullmatch(text)


def is_too_long(name: str) -> bool:
    """Return whether a name is too long for a file while it is written."""
    return len(os.fsencode(f".{name}.{10**7 - 1}-{host_mark()}.tmp")) > _LONGEST_NAME
