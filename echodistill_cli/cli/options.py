"""Typer's options: those of `train` made from the flags, and short forms for those that a command declares itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from echodistill_cli.config.build import OFF
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError

# Headings of `train --help`, in the order in which a person needs them; options without one come first.
PANELS = ("Subject", "Run", "Training", "LoRA and text side", "Models", "Losses and critics", "Echo phase")


@dataclass(frozen=True)
class Flag:
    """A configuration key with its names on the command line.

    Args:
        key: dotted, such as "train.lr". names: with dashes; the first is the one in the help. panel: heading there.
        repeated: may come many times.
    """

    key: str
    names: tuple[str, ...]
    panel: str
    repeated: bool = False

    @property
    def parameter(self) -> str:
        """Name of the option as a Python parameter."""
        return self.key.replace(".", "_")

    @property
    def shown(self) -> tuple[str, ...]:
        """The names in the help: the first, and a single letter."""
        return tuple(name for name in self.names if name == self.names[0] or not name.startswith("--"))


def _rows(panel: str, rows: Mapping[str, str]) -> list[Flag]:
    return [Flag(key, tuple(names.split()), panel) for key, names in rows.items()]


# The extra names are what users of kohya's scripts, diffusers' and other trainers type.
FLAGS: tuple[Flag, ...] = (
    *_rows(
        "Subject",
        {
            "concept.token": "--token --trigger-word",
            "concept.class_name": "--class-name --class",
            "concept.min_photos": "--min-photos",
            "concept.masks": "--masks",
            "concept.captions": "--captions/--no-captions",
            "concept.views": "--views",
            "concept.augmentation": "--augmentation",
            "concept.recolour": "--recolour",
            "concept.tint_scenes": "--tint-scenes/--no-tint-scenes",
        },
    ),
    *_rows(
        "Models",
        {
            "model.teacher": "--teacher",
            "model.resolution": "--resolution",
            "model.precision": "--precision --mixed-precision",
            "model.device": "--device",
            "model.decoder": "--decoder",
            "model.tiny_decoder": "--tiny-decoder",
            "model.vae": "--vae",
            "model.tokenizer": "--tokenizer",
            "model.variant": "--variant",
            "model.student_lora": "--student-lora",
            "model.student_revision": "--revision",
            "model.teacher_revision": "--teacher-revision",
            "model.single_file_config": "--single-file-config",
            "model.teacher_single_file_config": "--teacher-single-file-config",
            "model.student_prediction": "--student-prediction",
            "model.teacher_prediction": "--teacher-prediction",
            "model.teacher_original_size": "--teacher-original-size",
            "model.offload": "--offload/--no-offload",
            "model.offline": "--offline/--no-offline",
        },
    ),
    *_rows(
        "LoRA and text side",
        {
            "adapter.rank": "--rank --lora-rank --network-dim",
            "adapter.alpha": "--alpha --lora-alpha --network-alpha",
            "adapter.targets": "--targets",
            "adapter.strength": "--strength",
            "text.form": "--text",
            "text.trained_by": "--text-trained-by",
            "text.rank": "--text-rank",
            "text.initializer": "--initializer",
        },
    ),
    *_rows(
        "Training",
        {
            "train.steps": "--steps --max-train-steps",
            "train.batch_size": "--batch-size --train-batch-size",
            "train.lr": "--lr --learning-rate",
            "train.teacher_lr": "--teacher-lr",
            "train.text_lr": "--text-lr --token-lr --text-encoder-lr",
            "train.discriminator_lr": "--discriminator-lr --disc-lr",
            "train.lr_schedule": "--lr-schedule --lr-scheduler",
            "train.weight_decay": "--weight-decay",
            "train.max_grad_norm": "--max-grad-norm",
            "train.target_steps": "--target-steps",
            "train.target_strength": "--target-strength",
            "train.replays": "--replays",
            "train.first_targets": "--first-targets",
            "train.head_start": "--head-start",
            "train.carry_over": "--carry-over/--no-carry-over",
            "train.scene_share": "--scene-share",
            "train.class_share": "--class-share",
            "train.pair_share": "--pair-share",
            "train.guidance_scale": "--guidance-scale",
            "train.gradient_checkpointing": "--gradient-checkpointing/--no-gradient-checkpointing",
        },
    ),
    *_rows(
        "Losses and critics",
        {
            "loss.denoising": "--denoising-weight",
            "loss.latent": "--latent-weight",
            "loss.identity": "--identity-weight",
            "loss.sliced_wasserstein": "--sliced-wasserstein-weight --swd-weight",
            "loss.prior": "--prior-weight --prior-loss-weight",
            "loss.adversarial": "--adversarial-weight",
            "critic.discriminators": "--discriminators",
            "critic.identity": "--identity",
            "critic.identity_target": "--identity-target",
            "critic.head_width": "--head-width",
            "critic.swd_scales": "--swd-scales",
            "critic.swd_projections": "--swd-projections",
            "critic.swd_patch": "--swd-patch",
        },
    ),
    *_rows(
        "Echo phase",
        {
            "echo.start": "--echo-start",
            "echo.every": "--echo-every",
            "echo.candidates": "--echo-candidates",
            "echo.pool_size": "--echo-pool-size",
            "echo.min_identity": "--echo-min-identity",
            "echo.max_similarity": "--echo-max-similarity",
            "echo.teacher_share": "--echo-teacher-share",
            "echo.teacher_noise": "--echo-teacher-noise",
            "echo.real_weight": "--echo-real-weight",
            "echo.carry_back": "--carry-back",
        },
    ),
    *_rows(
        "Run",
        {
            "run.name": "--name",
            "run.output": "--output -o --output-dir",
            "run.seed": "--seed",
            "run.save_every": "--save-every --checkpointing-steps",
            "run.keep": "--keep",
            "run.sample_every": "--sample-every",
            "run.sample_seeds": "--sample-seeds",
            "run.report_to": "--report-to",
        },
    ),
    Flag("concept.scenes", ("--scene",), "Subject", repeated=True),
    Flag("concept.class_prompts", ("--class-prompt",), "Subject", repeated=True),
    Flag("run.sample_prompts", ("--sample-prompt", "--validation-prompt"), "Run", repeated=True),
)
ALIASES: Mapping[str, str] = {
    name: flag.names[0] for flag in FLAGS for name in flag.names[1:] if name not in flag.shown
} | {"--pretrained-model-name-or-path": "--model"}
Command = TypeVar("Command", bound=Callable[..., Any])


def value_option(metavar: str, about: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """Typer's option with a value; its names are the parameter's own unless given."""
    return typer.Option(*names, metavar=metavar, help=about, rich_help_panel=panel, **more)


def bool_option(names: str, about: str, panel: str | None = None) -> Any:
    """Typer's option for something to turn on or off."""
    return typer.Option(*names.split(), metavar="", help=about, rich_help_panel=panel, show_default=False)


Json = Annotated[bool, bool_option("--json", "print one JSON object on stdout")]
Quiet = Annotated[bool, bool_option("--quiet -q", "no progress on stderr")]


def with_flags(command: Command) -> Command:
    """Give a command an option for each flag; it receives them as one `flags` mapping.

    The mapping has dotted keys, as `presets.build_config` wants its overrides, and only flags that were given.
    """

    def wrapped(**given: Any) -> Any:
        values = {flag.key: given.pop(flag.parameter) for flag in FLAGS}
        return command(**given, flags={key: _tidy(value) for key, value in values.items() if value is not None})

    named = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    options = [inspect.Parameter(flag.parameter, named, default=None, annotation=_option(flag)) for flag in FLAGS]
    by_panel = sorted([*(p.replace(kind=named) for p in own), *options], key=_place)
    wrapped.__signature__ = inspect.Signature(by_panel)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in by_panel}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return typing.cast(Command, wrapped)


def accepting_aliases(aliases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Typer's context settings of a command that takes `--batch_size` as `--batch-size`, and aliases as what they mean.

    Args:
        aliases: from a name to the option's own, both with dashes.
    """
    known = {alias.lstrip("-"): name.lstrip("-") for alias, name in (aliases or {}).items()}

    def normalize(name: str) -> str:
        dashed = name.replace("_", "-") if len(name) > 1 else name
        return known.get(dashed, dashed)

    return {"token_normalize_func": normalize}


def echo_setting(echo: bool | None, flags: Mapping[str, Any], planned: Callable[[], Config]) -> dict[str, Any]:
    """What --echo and --no-echo override.

    Args:
        planned: the configuration without them: its echo, if it has one, begins when it says.

    Raises:
        ConfigError: one of them contradicts --echo-start. What `planned` raises.
    """
    start = flags.get("echo.start")
    if echo is not None and start is not None and echo is (start == OFF):
        name = "--echo" if echo else "--no-echo"
        raise ConfigError(f"{name} and --echo-start {start} contradict each other.", "Use one of them.")
    if echo is False:
        return {"echo.start": None}
    return {"echo.start": Config().echo.start} if echo and planned().echo.start is None else {}


def _place(parameter: inspect.Parameter) -> int:
    """Where a command's parameter stands in its help: arguments and options without a panel first."""
    panel = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return PANELS.index(panel) if panel in PANELS else -1


def _option(flag: Flag) -> Any:
    """Typer's annotation of a flag: its type, names, help and default, all from the configuration."""
    section, _, name = flag.key.partition(".")
    hints, fields = _section(section)
    hint, entry = hints[name], fields[name]
    parser, metavar = _parser(hint, flag)
    choices = entry.metadata["choices"]
    about = _about(entry.metadata["about"], choices) + _shown_default(entry.default)
    settings: dict[str, Any] = {"help": about, "rich_help_panel": flag.panel, "metavar": metavar}
    if parser is not None:
        settings["parser"] = parser
    if choices:
        settings["autocompletion"] = _completing(choices)
    kind: Any = list[str] if flag.repeated else bool if hint is bool else str
    return Annotated[kind | None, typer.Option(*flag.shown, show_default=False, **settings)]


def _completing(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def _about(about: str, choices: Sequence[str] | None) -> str:
    """A setting's description, with its choices if it does not name them itself."""
    return about if all(choice in about for choice in choices or ()) else f"{about}: {', '.join(choices or ())}"


def _shown_default(default: Any) -> str:
    """A setting's default for the help; nothing where there is none, as the description says what that means."""
    if default in (None, ()):
        return ""
    words = {bool: "on" if default else "off", tuple: ",".join(map(str, default)) if type(default) is tuple else ""}
    shown = words.get(type(default)) or (f"{default:g}" if type(default) is float else default)
    return f" [dim]\\[{shown}][/dim]"


@functools.cache
def _section(name: str) -> tuple[Mapping[str, Any], Mapping[str, dataclasses.Field[Any]]]:
    """The types and the fields of a section's settings."""
    section = typing.get_type_hints(Config)[name]
    return typing.get_type_hints(section), {entry.name: entry for entry in dataclasses.fields(section)}


def _parser(hint: Any, flag: Flag) -> tuple[Callable[[str], Any] | None, str]:
    """How a flag's text becomes a value, and what stands for it in the help; None where Typer's own way will do."""
    if hint is bool:
        return None, ""
    if flag.repeated:
        return None, "TEXT"
    options = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        return _parse_list, "A,B,..."
    if int in options:
        return _number(int, "a whole number"), "N"
    if float in options:
        return _number(float, "a number"), "X"
    return None, "TEXT"


def _number(kind: type[int] | type[float], words: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text == OFF:
            return OFF
        try:
            return kind(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is not {words}.") from error

    return parse


def _parse_list(text: str) -> tuple[str, ...]:
    return () if text in ("none", OFF) else tuple(part.strip() for part in text.split(",") if part.strip())


def _tidy(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def quiet_libraries(*, offline: bool, quiet: bool) -> None:
    """Set the other libraries' environment before they are imported: no telemetry, no chatter, no socket if offline."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Threads that wait by spinning starve each other as soon as anything else wants a core: a step of the small pair
    # took 5 to 20 s beside one busy process, and 0.3 s with threads that sleep. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
