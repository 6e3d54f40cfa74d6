"""Options of the command line: the flags of `train`, `--set`, and options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import re
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
import typer.core

from echodistill_cli.config.build import OFF
from echodistill_cli.config.schema import Config, nearest
from echodistill_cli.errors import ConfigError

# Headings of `train --help`, in the order in which a person needs them. Options without a heading come first.
SUBJECT, RUN, TRAINING = "Subject", "Run", "Training"
MODELS_AND_MEMORY, LOSSES_AND_ECHO = "Models and memory", "Losses and echo"
PANELS = (SUBJECT, RUN, TRAINING, MODELS_AND_MEMORY, LOSSES_AND_ECHO)


@dataclass(frozen=True)
class Flag:
    """A setting that has an option of its own.

    Args:
        key: dotted key, such as "train.lr".
        names: names of the option, such as "--output -o" or "--captions/--no-captions".
        panel: heading in the help.
        repeated: the option may be given several times.
    """

    key: str
    names: str
    panel: str
    repeated: bool = False

    @property
    def parameter(self) -> str:
        """Name of the option as a Python parameter."""
        return self.key.replace(".", "_")


# What people type in a terminal. Everything else is a setting: --set or a file.
FLAGS: tuple[Flag, ...] = (
    Flag("concept.token", "--token", SUBJECT),
    Flag("concept.class_name", "--class-name", SUBJECT),
    Flag("concept.min_photos", "--min-photos", SUBJECT),
    Flag("concept.masks", "--masks", SUBJECT),
    Flag("concept.captions", "--captions/--no-captions", SUBJECT),
    Flag("run.name", "--name", RUN),
    Flag("run.output", "--output -o", RUN),
    Flag("run.seed", "--seed", RUN),
    Flag("run.save_every", "--save-every", RUN),
    Flag("run.keep", "--keep", RUN),
    Flag("run.sample_every", "--sample-every", RUN),
    Flag("run.sample_prompts", "--sample-prompt", RUN, repeated=True),
    Flag("run.report_to", "--report-to", RUN),
    Flag("train.steps", "--steps", TRAINING),
    Flag("train.batch_size", "--batch-size", TRAINING),
    Flag("train.lr", "--lr", TRAINING),
    Flag("train.teacher_lr", "--teacher-lr", TRAINING),
    Flag("train.text_lr", "--text-lr", TRAINING),
    Flag("train.lr_schedule", "--lr-schedule", TRAINING),
    Flag("train.guidance_scale", "--guidance-scale", TRAINING),
    Flag("adapter.rank", "--rank", TRAINING),
    Flag("adapter.alpha", "--alpha", TRAINING),
    Flag("adapter.targets", "--targets", TRAINING),
    Flag("text.form", "--text", TRAINING),
    Flag("model.teacher", "--teacher", MODELS_AND_MEMORY),
    Flag("model.student_lora", "--student-lora", MODELS_AND_MEMORY),
    Flag("model.student_timesteps", "--student-timesteps", MODELS_AND_MEMORY),
    Flag("model.vae", "--vae", MODELS_AND_MEMORY),
    Flag("model.resolution", "--resolution", MODELS_AND_MEMORY),
    Flag("model.precision", "--precision", MODELS_AND_MEMORY),
    Flag("model.device", "--device", MODELS_AND_MEMORY),
    Flag("model.decoder", "--decoder", MODELS_AND_MEMORY),
    Flag("train.gradient_checkpointing", "--gradient-checkpointing/--no-gradient-checkpointing", MODELS_AND_MEMORY),
    Flag("train.compile", "--compile", MODELS_AND_MEMORY),
    Flag("model.offline", "--offline/--no-offline", MODELS_AND_MEMORY),
    Flag("loss.prior", "--prior-weight", LOSSES_AND_ECHO),
    Flag("critic.discriminators", "--discriminators", LOSSES_AND_ECHO),
    Flag("critic.identity", "--identity", LOSSES_AND_ECHO),
    Flag("echo.start", "--echo-start", LOSSES_AND_ECHO),
)
# What users of kohya's scripts, diffusers' scripts, other trainers and older versions type.
ALIASES: Mapping[str, str] = {
    "--pretrained-model-name-or-path": "--model",
    "--trigger-word": "--token",
    "--class": "--class-name",
    "--output-dir": "--output",
    "--checkpointing-steps": "--save-every",
    "--validation-prompt": "--sample-prompt",
    "--max-train-steps": "--steps",
    "--train-batch-size": "--batch-size",
    "--learning-rate": "--lr",
    "--token-lr": "--text-lr",
    "--text-encoder-lr": "--text-lr",
    "--lr-scheduler": "--lr-schedule",
    "--lora-rank": "--rank",
    "--network-dim": "--rank",
    "--lora-alpha": "--alpha",
    "--network-alpha": "--alpha",
    "--mixed-precision": "--precision",
    "--prior-loss-weight": "--prior-weight",
    "--student-timestep": "--student-timesteps",
}
Command = TypeVar("Command", bound=Callable[..., Any])


def value_option(metavar: str, about: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """An option with a value. Its name is the parameter's own unless `names` are given."""
    return typer.Option(*names, metavar=metavar, help=about, rich_help_panel=panel, **more)


def bool_option(names: str, about: str, panel: str | None = None) -> Any:
    """An option that is turned on or off."""
    return typer.Option(*names.split(), metavar="", help=about, rich_help_panel=panel, show_default=False)


Json = Annotated[bool, bool_option("--json", "print one JSON object on stdout")]
Quiet = Annotated[bool, bool_option("--quiet -q", "print no progress on stderr")]


def with_flags(command: Command) -> Command:
    """Add an option for each of `FLAGS` to a command, but for those that it declares itself.

    Typer reads a command's signature, so the options are appended to it. The command receives the values of those
    that a person typed as `flags`, by dotted key, as `build_config` takes its overrides.
    """
    added = [flag for flag in FLAGS if flag.parameter not in inspect.signature(command).parameters]

    def wrapped(**values: Any) -> Any:
        flags = {flag.key: values.pop(flag.parameter) for flag in added}
        flags = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
        return command(**values, flags={key: value for key, value in flags.items() if value is not None})

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    parameters += [inspect.Parameter(flag.parameter, kind, default=None, annotation=_option(flag)) for flag in added]
    wrapped.__signature__ = inspect.Signature(sorted(parameters, key=_panel_index))  # type: ignore[attr-defined]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return typing.cast(Command, wrapped)


def _panel_index(parameter: inspect.Parameter) -> int:
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _option(flag: Flag) -> Any:
    """Typer's annotation of a flag: its type, names, description and default come from the settings."""
    hint, entry = known_settings()[flag.key]
    kind: Any = list[str] if flag.repeated else bool if hint is bool else str
    parser, metavar = (None, "TEXT") if flag.repeated else _parser(hint)
    more: dict[str, Any] = {"parser": parser} if parser else {}
    if choices := entry.metadata["choices"]:
        more["autocompletion"] = lambda incomplete: [word for word in choices if word.startswith(incomplete)]
    about = entry.metadata["about"] + "; repeatable" * flag.repeated + _shown_default(entry.default)
    return Annotated[
        kind | None, value_option(metavar, about, *flag.names.split(), panel=flag.panel, show_default=False, **more)
    ]


@functools.cache
def known_settings() -> Mapping[str, tuple[Any, dataclasses.Field[Any]]]:
    """Type and dataclass field of each setting by dotted key."""
    return {
        f"{section}.{entry.name}": (typing.get_type_hints(kind)[entry.name], entry)
        for section, kind in typing.get_type_hints(Config).items()
        for entry in dataclasses.fields(kind)
    }


def _shown_default(default: Any) -> str:
    """A default for the help; empty for none, as the description says what happens then."""
    if default in (None, ()):
        return ""
    shown = ",".join(default) if isinstance(default, tuple) else default
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else shown
    return f" [dim]\\[{f'{shown:g}' if isinstance(shown, float) else shown}][/dim]"


def _parser(hint: Any) -> tuple[Callable[[str], Any] | None, str]:
    """Return how the text of an option becomes a value, None for Typer's own way, and its metavar."""
    kinds = typing.get_args(hint) or (hint,)
    if hint is bool:
        return None, ""
    if typing.get_origin(hint) is tuple:
        return (_parse_integers, "N,N") if int in kinds else (_parse_list, "A,B,...")
    if int in kinds:
        return _number(int, "an integer"), "N"
    return (_number(float, "a number"), "X") if float in kinds else (None, "TEXT")


def _number(kind: type[int] | type[float], name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return OFF if text == OFF else kind(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not {name}.") from error

    return parse


def _parse_list(text: str) -> tuple[str, ...]:
    return () if text in ("none", OFF) else tuple(part.strip() for part in text.split(",") if part.strip())


def _parse_integers(text: str) -> tuple[int, ...]:
    return tuple(_number(int, "an integer")(part) for part in _parse_list(text))


def with_settings(flags: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Join the values of flags with those of `--set`.

    Args:
        flags: values by dotted key.
        settings: texts such as "train.target_steps=5".

    Raises:
        ConfigError: a text is not KEY=VALUE, or a flag or another text gives the same key.
    """
    values: dict[str, Any] = {}
    for text in settings:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or "." not in key:
            known = {name.partition(".")[2]: name for name in known_settings()}
            near = known.get(key) or nearest(key, list(known_settings())) or "train.target_steps"
            raise ConfigError(f"--set {text} is not KEY=VALUE with a dotted key.", f"Write --set {near}=VALUE.")
        if key in flags:
            raise ConfigError(f"{key} is given by {_typed_name(key)} and by --set {text}.", "Use one of them.")
        if key in values:
            raise ConfigError(f"{key} is given twice by --set.", "Give it once.")
        values[key] = _setting_value(key, value)
    return {**flags, **values}


def _typed_name(key: str) -> str:
    names = {"model.student": "--model", "concept.photos": "PHOTOS"}
    return (names | {flag.key: re.split(r"[ /]", flag.names)[0] for flag in FLAGS})[key]


@contextmanager
def naming_flags(flags: Iterable[str]) -> Iterator[None]:
    """Make an error about a setting name the flag that gave it: --steps 0, not train.steps = 0.

    Args:
        flags: dotted keys of the settings that flags gave.

    Raises:
        ConfigError: a setting is wrong.
    """
    try:
        yield
    except ConfigError as error:
        message = error.message
        for key in flags:
            message = re.sub(rf"\b{re.escape(key)}\b( =)?", _typed_name(key), message)
        if message == error.message:
            raise
        raise ConfigError(message, error.hint) from error


def _setting_value(key: str, text: str) -> Any:
    """Return the value of a setting, which may be spelled as TOML or as a flag takes it."""
    value = _toml_value(text)
    hint = known_settings()[key][0] if key in known_settings() else None
    if hint is bool and value in ("on", OFF):
        return value == "on"
    if typing.get_origin(hint) is tuple and int in typing.get_args(hint) and not isinstance(value, list):
        return () if value in ("none", OFF) else _toml_value(f"[{text}]")
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        is_list = any(flag.key == key and not flag.repeated for flag in FLAGS)  # a prompt may hold commas
        return _parse_list(value) if is_list or value in ("none", OFF) else value
    return value


def _toml_value(text: str) -> Any:
    """Return a text as a TOML value, or the text itself if it is not TOML, such as a bare word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def echo_setting(
    echo: bool | None, overrides: Mapping[str, Any], flags: Mapping[str, Any], planned: Callable[[], Config]
) -> dict[str, Any]:
    """Return what `--echo` or `--no-echo` overrides.

    Args:
        echo: True for `--echo`, False for `--no-echo`, None for neither.
        overrides: values by dotted key that flags and `--set` give.
        flags: those of them that flags give.
        planned: returns the configuration without the option. Its echo, if it has one, starts when it says.

    Raises:
        ConfigError: the option contradicts `overrides`, or `planned` raised it.
    """
    start = overrides.get("echo.start")
    if echo is not None and start is not None and echo is (start == OFF):
        name = "--echo" if echo else "--no-echo"
        other = f"--echo-start {start}" if "echo.start" in flags else f"--set echo.start={start}"
        raise ConfigError(f"{name} contradicts {other}.", "Use one of them.")
    if echo is False:
        return {"echo.start": None}
    return {"echo.start": Config().echo.start} if echo and planned().echo.start is None else {}


def quiet_libraries(*, offline: bool, quiet: bool) -> None:
    """Set the environment of other libraries, best before they are imported.

    Args:
        offline: let the hub's library and trackers open no connection.
        quiet: show no download progress.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Threads that spin while they wait starve each other as soon as another process needs a core: next to one busy
    # process a step of the small pair took 5 to 20 s, and 0.3 s with sleeping threads. OpenMP reads this with torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for library in ("transformers", "diffusers"):
        wanted = os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        if library in sys.modules:  # which has read its variable already, as in a script that imports it first
            logging.getLogger(library).setLevel(logging.getLevelNamesMapping().get(wanted.upper(), logging.ERROR))
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        # Trackers of settings that somebody else wrote: Weights & Biases then writes files, MLflow reports no usage.
        os.environ |= {"WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "GRADIO_ANALYTICS_ENABLED": "False"}
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
