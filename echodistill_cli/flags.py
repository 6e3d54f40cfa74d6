"""The flags of `train` as data: one row per configuration key, from which Typer's options are made. No torch here.

A flag that is not given leaves its key to the TOML file, the preset and the default, in that order.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from echodistill_cli.config import Config
from echodistill_cli.presets import OFF

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Flag:
    """A configuration key with its names on the command line; the first is the main one.

    Args:
        key: dotted, such as "train.lr". names: with dashes. panel: heading in the help. repeated: may come many times.
    """

    key: str
    names: tuple[str, ...]
    panel: str
    repeated: bool = False

    @property
    def parameter(self) -> str:
        """Name of the option as a Python parameter."""
        return self.key.replace(".", "_")


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
            "model.variant": "--variant",
            "model.student_revision": "--revision",
            "model.teacher_revision": "--teacher-revision",
            "model.single_file_config": "--single-file-config",
            "model.teacher_single_file_config": "--teacher-single-file-config",
            "model.offline": "--offline/--no-offline",
        },
    ),
    *_rows(
        "LoRA and text side",
        {
            "adapter.rank": "--rank --lora-rank --network-dim",
            "adapter.alpha": "--alpha --lora-alpha --network-alpha",
            "adapter.targets": "--targets",
            "text.form": "--text",
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
            "train.weight_decay": "--weight-decay",
            "train.max_grad_norm": "--max-grad-norm",
            "train.guidance_scale": "--guidance-scale",
            "train.gradient_checkpointing": "--gradient-checkpointing/--no-gradient-checkpointing",
            "train.max_bad_steps": "--max-bad-steps",
        },
    ),
    *_rows(
        "Losses and critics",
        {
            "loss.denoising": "--denoising-weight",
            "loss.latent": "--latent-weight",
            "loss.identity": "--identity-weight",
            "loss.sliced_wasserstein": "--sliced-wasserstein-weight --swd-weight",
            "loss.adversarial": "--adversarial-weight",
            "critic.discriminators": "--discriminators",
            "critic.identity": "--identity",
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
            "echo.real_weight": "--echo-real-weight",
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
    Flag("run.sample_prompts", ("--sample-prompt", "--validation-prompt"), "Run", repeated=True),
)


def with_flags(*keys: str) -> Callable[[Command], Command]:
    """Give a command an option for each flag (or for those of `keys`); it receives them as one `flags` mapping.

    The mapping has dotted keys, as `presets.build_config` wants its overrides, and only flags that were given.
    """
    chosen = [flag for flag in FLAGS if not keys or flag.key in keys]

    def decorate(command: Command) -> Command:
        def wrapped(**given: Any) -> Any:
            values = {flag.key: given.pop(flag.parameter) for flag in chosen}
            return command(**given, flags={key: _tidy(value) for key, value in values.items() if value is not None})

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
        options = [
            inspect.Parameter(flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(flag))
            for flag in chosen
        ]
        wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *options]}
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        return typing.cast(Command, wrapped)

    return decorate


def _option(flag: Flag) -> Any:
    """Typer's annotation of a flag: its type, names, help and default, all from the configuration."""
    section, _, name = flag.key.partition(".")
    entry = next(e for e in dataclasses.fields(_section(section)) if e.name == name)
    hint = typing.get_type_hints(_section(section))[name]
    default = OFF if entry.default is None else entry.default
    shown = ",".join(default) or "none" if isinstance(default, tuple) else default
    about = entry.metadata["about"] + ("" if isinstance(default, bool) else f" [dim]\\[{shown}][/dim]")
    parser, metavar = _parser(hint, flag)
    kind: Any = list[str] if flag.repeated else bool if hint is bool else str
    settings: dict[str, Any] = {"help": about, "rich_help_panel": flag.panel, "show_default": False}
    if parser is not None:
        settings |= {"parser": parser, "metavar": metavar}
    return Annotated[kind | None, typer.Option(*flag.names, **settings)]


def _section(name: str) -> type:
    section: type = typing.get_type_hints(Config)[name]
    return section


def _parser(hint: Any, flag: Flag) -> tuple[Callable[[str], Any] | None, str]:
    """How a flag's text becomes a value, and what stands for it in the help; None where Typer's own way will do."""
    if hint is bool or flag.repeated:
        return None, "TEXT"
    options = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is tuple:
        return _parse_list, "A,B,..."
    if int in options:
        return _number(int, "a whole number"), "INTEGER"
    if float in options:
        return _number(float, "a number"), "NUMBER"
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
