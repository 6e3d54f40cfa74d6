"""Warnings about a valid configuration: settings without effect, unsuitable toys. Also two checks."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence

from echodistill_cli.config.build import PRESETS
from echodistill_cli.config.schema import Config, TrainConfig, nearest
from echodistill_cli.errors import ConfigError, ModelError


def warnings(config: Config) -> Iterator[str]:
    """Yield a sentence for each setting without effect, defaults left out."""
    concept, train, start, single = config.concept, config.train, config.echo.start, config.train.target_steps == 1
    usual = TrainConfig()
    nameless = concept.class_name is None
    without_effect = (
        (single and train.target_strength < 1, "target_strength", "train.target_steps is 1"),
        (single, "replays", "train.target_steps is 1"),
        (not config.loss.latent, "replays", "loss.latent is 0"),
        (not train.replays, "first_targets", "train.replays is 0"),
        (not train.replays, "class_share", "train.replays is 0"),
        (not train.replays, "pair_share", "train.replays is 0"),
    )
    of_the_class = (
        (concept.masks == "teacher", "concept.masks = 'teacher'"),
        (config.loss.prior, "loss.prior"),
        (config.replays and train.class_share, "train.class_share"),
        (config.replays and train.pair_share, "train.pair_share"),
    )
    if nameless:
        idle = ", ".join(key for is_set, key in of_the_class if is_set)
        effect = f" No effect without it: {idle}." if idle else ""
        yield f"Without --class-name, such as dog, the prompts do not say what the subject is.{effect}"
    for is_idle, key, reason in without_effect:
        if is_idle and getattr(train, key) not in (0, getattr(usual, key)):
            yield f"train.{key} has no effect while {reason}."
    if train.scene_share == 1 and config.loss.adversarial and config.critic.discriminators:
        yield "loss.adversarial has no effect while train.scene_share is 1: discriminators judge photo prompts only."
    if start is not None and start > train.steps:
        yield f"No echo phase: it starts at step {start}, after the last step ({train.steps}). Lower --echo-start."


def toy_warning(config: Config, longest_side: int) -> str | None:
    """Return a warning if the student is a toy model that was not made for this subject, else None.

    Args:
        config: of the run.
        longest_side: of the photos, in pixels.
    """
    toys = (preset for preset in PRESETS.values() if preset.nouns)
    toy = next((toy for toy in toys if toy.settings["model"]["student"] == config.model.student), None)
    if toy is None:
        return None
    name, side = config.concept.class_name, config.model.resolution
    is_known = bool(set((name or "").lower().split()) & set(toy.nouns))
    if is_known and longest_side <= side:
        return None
    what = "no class name was given" if name is None else f"{name!r} is {'' if is_known else 'not '}among them"
    known = f"The toy model knows {len(toy.nouns)} nouns: {', '.join(toy.nouns)}; {what}."
    if longest_side <= side:
        return known
    return (
        f"{known} It draws {side}-pixel cartoons of these alone: of real photos expect a smear, even with good scores. "
        "To see the method work, train on examples/photos of a checkout: make demo"
    )


# Of accelerate's trackers, those that start without an account, and Weights & Biases, which can (WANDB_MODE=offline).
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "aim")
_NEED_ACCOUNTS = ("comet_ml", "clearml", "swanlab", "dvclive")


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker is known and installed, before models are loaded.

    Args:
        names: as in `run.report_to`.

    Raises:
        ConfigError: a tracker is unknown or its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            near = nearest(name, TRACKERS)
            raise ConfigError(
                f"--report-to {name} is {_why_not(name)}; choose from {', '.join(TRACKERS)}.",
                f"Did you mean {near}?" if near else None,
            )
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report-to {name} needs the package {name}.", f"Install it: pip install {name}")


def _why_not(name: str) -> str:
    return "not supported, as it needs an account or a repository" if name in _NEED_ACCOUNTS else "unknown"


def check_vram(student: str, text: str) -> None:
    """Check what --vram names, as far as that needs no device.

    Raises:
        ConfigError: it is neither a number nor "auto".
        ModelError: the student is embedded, so there is no plan for it.
    """
    parse_gib(text)
    if student.startswith("mini:"):
        raise ModelError(f"The memory that {student} needs is small.", "Omit --vram.")


def parse_gib(text: str) -> float | None:
    """Return the amount of memory that --vram names in GiB; None for "auto".

    Raises:
        ConfigError: it is neither a number nor "auto".
    """
    if text == "auto":
        return None
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    raise ConfigError(f"--vram {text} is not an amount of memory.", "Use GiB, such as 8, 12, 16 or 24, or auto.")
