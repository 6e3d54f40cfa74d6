"""A setting as a dataclass field: its description, its bounds, and the check of a value against both. No torch here."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from echodistill_cli.errors import ConfigError


def setting(
    default: Any,
    about: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with its description and its bounds (both ends included)."""
    bounds = {"about": about, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=bounds)


def share(default: float, about: str) -> Any:
    """A setting from 0 to 1."""
    return setting(default, about, minimum=0.0, maximum=1.0)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The one of `known` that `word` was most likely meant to be, if any is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return near[0] if near else None


def check_section(section: str, values: Any) -> None:
    """Check the types and bounds of one section's values.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    hints = typing.get_type_hints(type(values))
    for entry in dataclasses.fields(values):
        name, value = f"{section}.{entry.name}", getattr(values, entry.name)
        if not _fits(value, hints[entry.name]):
            raise ConfigError(f"{name} = {value!r} is not {_describe(hints[entry.name])}.")
        _check_bounds(name, value, **entry.metadata)


def _check_bounds(
    name: str,
    value: Any,
    *,
    about: str,
    minimum: float | None,
    maximum: float | None,
    choices: Sequence[str] | None,
) -> None:
    if value is None:
        return
    if choices is not None and value not in choices:
        near = nearest(str(value), choices)
        raise ConfigError(
            f"{name} = {value!r} is not one of {', '.join(choices)} ({about}).",
            f"Did you mean {near!r}?" if near else None,
        )
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name} = {value!r} is below {minimum:g} ({about}).")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} = {value!r} is above {maximum:g} ({about}).")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return True
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return True
    return False


def _describe(hint: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): '"off"',
    }
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    return " or ".join(words.get(option, "a list of texts") for option in options)
