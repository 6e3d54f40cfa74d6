"""How a command line is parsed: aliases of options, options that count once, and flags of version 0.1."""

from __future__ import annotations

import json
import re
import shlex
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer.core

from echodistill_cli.cli.options import FLAGS, known_settings
from echodistill_cli.config.build import OFF, RETIRED
from echodistill_cli.errors import ConfigError

# Flags of version 0.1 whose names do not follow from the setting's key.
_OLD_NAMES: Mapping[str, str] = {
    "revision": "model.student_revision",
    "scene": "concept.scenes",
    "class-prompt": "concept.class_prompts",
    "disc-lr": "train.discriminator_lr",
    "swd-weight": "loss.sliced_wasserstein",
}


class Program(typer.core.TyperGroup):
    """The program, whose help names no type for options without a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options."""
        return _without_types(super().get_params(ctx))


class Command(typer.core.TyperCommand):
    """A command that refuses empty values, and twice an option that does not take several values."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return arguments and options."""
        return _without_types(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line, with required arguments as they are, without braces."""
        return [re.sub(r"^{(.*)}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command.

        Raises:
            ConfigError: an option that counts once was given twice, or a value is empty.
        """
        arguments = list(args)  # parsing consumes the list
        remaining = super().parse_args(ctx, args)
        typed, _, order = self.make_parser(ctx).parse_args(list(arguments))
        for option, count in Counter(order).items():
            is_switch = getattr(option, "is_flag", False) and not getattr(option, "secondary_opts", ())
            if count > 1 and option.param_type_name == "option" and not (option.multiple or is_switch):
                name = "/".join([*option.opts[:1], *option.secondary_opts[:1]])
                raise ConfigError(f"{name} is given {count} times, and one would be ignored.", "Give it once.")
        for param in self.params:  # an empty path would be the working directory, an empty text often the default
            if _is_empty(typed.get(param.name)):
                label = param.opts[0] if param.param_type_name == "option" else param.metavar
                remedy = "Give it a value." if param.required else "Give it a value, or omit it."
                raise ConfigError(f"{label} is empty.", remedy)
        return remaining


def _is_empty(typed: Any) -> bool:
    """Return whether a typed value is empty, as from a variable of the shell that is not set."""
    return "" in typed if isinstance(typed, (list, tuple)) else typed == ""


def _without_types(params: list[Any]) -> list[Any]:
    for option in params:
        if getattr(option, "is_flag", False) and option.metavar is None:
            option.metavar = ""
    return params


class CommandWithSettings(Command):
    """A command that answers a flag of version 0.1 with the setting that replaces it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command.

        Raises:
            ConfigError: an argument is a flag that became a setting or was removed.
        """
        arguments = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            raise _former_flag(getattr(error, "option_name", None) or "", arguments) or error from error


def accepting_aliases(aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Typer's context settings for a command that takes `--batch_size` for `--batch-size`, and aliases.

    Args:
        aliases: from an alias to the option's own name, both with dashes.
    """
    known = {alias.lstrip("-"): name.lstrip("-") for alias, name in (aliases or {}).items()}

    def normalize(name: str) -> str:
        dashed = name.replace("_", "-") if len(name) > 1 else name
        return known.get(dashed, dashed)

    return {"token_normalize_func": normalize}


def _former_flag(option: str, arguments: Sequence[str]) -> ConfigError | None:
    """Return the error for a flag that version 0.1 had, or None for an option that never existed."""
    name = option.removeprefix("--").replace("_", "-")
    positive = name.removeprefix("no-")
    flags = {flag.key for flag in FLAGS} | {"model.student", "concept.photos"}
    keys = [key for key in (*known_settings(), *RETIRED) if key not in flags and positive in _names_of(key)]
    if not keys:
        return None
    if keys[0] in RETIRED:
        neutral = json.dumps(RETIRED[keys[0]] if RETIRED[keys[0]] is not None else OFF)
        return ConfigError(f"{option} was removed.", f"Omit it: every run does what {keys[0]} = {neutral} did.")
    value = _value_of(keys[0], option, arguments) if positive == name else "false"
    return ConfigError(f"{option} is a setting now: --set {shlex.quote(f'{keys[0]}={value}')}.")


def _names_of(key: str) -> set[str]:
    section, _, name = key.replace("_", "-").partition(".")
    old = {name for name, old_key in _OLD_NAMES.items() if old_key == key}
    return {name, f"{section}-{name}", f"{name}-weight" if section == "loss" else name} | old


def _value_of(key: str, option: str, arguments: Sequence[str]) -> str:
    """Return the value that a person typed for a former flag, as TOML."""
    hint, _ = known_settings()[key]
    if hint is bool:
        return "true"
    values = list(_typed_values(option, arguments))
    return json.dumps(values) if typing.get_origin(hint) is tuple else values[-1] if values else "VALUE"


def _typed_values(option: str, arguments: Sequence[str]) -> Iterator[str]:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == option.replace("_", "-"):
            following = arguments[index + 1 : index + 2]
            yield from [value] if equals else [word for word in following if not word.startswith("--")]
