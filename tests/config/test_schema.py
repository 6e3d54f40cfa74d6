"""Settings: bounds, contradictions, and what is said of a setting without effect."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.config.build import build_config, config_from_dict
from echodistill_cli.config.schema import Config, TrainConfig
from echodistill_cli.config.warnings import warnings
from echodistill_cli.errors import ConfigError

SETTINGS = [
    (section.name, entry)
    for section in dataclasses.fields(Config)
    for entry in dataclasses.fields(getattr(Config(), section.name))
]
BOUNDED = [(s, e, side) for s, e in SETTINGS for side in ("minimum", "maximum") if e.metadata[side] is not None]
CHOSEN = [(s, e) for s, e in SETTINGS if e.metadata["choices"]]


def key_name(value: Any) -> str | None:
    return value.name if isinstance(value, dataclasses.Field) else None


def test_the_defaults_are_valid_and_cause_no_warning() -> None:
    assert list(warnings(build_config(overrides={"concept.class_name": "dog"}))) == []


@pytest.mark.parametrize("entry", [entry for _, entry in SETTINGS], ids=key_name)
def test_a_description_stands_alone_and_names_every_choice(entry: dataclasses.Field[Any]) -> None:
    about = entry.metadata["about"]
    assert about
    assert not about.startswith(("of ", "the same"))
    assert not about.endswith(".")
    assert all(choice in about for choice in entry.metadata["choices"])


@pytest.mark.parametrize(("section", "entry", "side"), BOUNDED, ids=key_name)
def test_a_bound_itself_is_allowed_and_what_lies_beyond_is_not(
    section: str, entry: dataclasses.Field[Any], side: str
) -> None:
    bound = entry.metadata[side]
    number: Any = float if "float" in str(entry.type) else int
    if "tuple" in str(entry.type):  # each of its numbers has the bound
        number = lambda value: (int(value),)  # noqa: E731
    beyond = bound - 1 if side == "minimum" else bound + 1
    # Alone, some of these contradict other settings; none of the others is the one under test.
    others: dict[str, dict[str, Any]] = {"train": {"lr": 1.0, "teacher_lr": 1.0}, "critic": {"swd_patch": 1}}
    table = others.get(section, {}) | {entry.name: number(bound)}
    allowed = config_from_dict(others | {section: table})
    assert getattr(getattr(allowed, section), entry.name) == number(bound)
    with pytest.raises(
        ConfigError, match=f"{section}.{entry.name} = .* is {'below' if side == 'minimum' else 'above'}"
    ):
        config_from_dict(others | {section: table | {entry.name: number(beyond)}})


@pytest.mark.parametrize(("section", "entry"), CHOSEN, ids=key_name)
def test_a_choice_is_refused_with_the_nearest_right_one(section: str, entry: dataclasses.Field[Any]) -> None:
    for choice in entry.metadata["choices"]:
        config_from_dict({section: {entry.name: choice}})
    wrong = entry.metadata["choices"][0] + "x"
    with pytest.raises(ConfigError, match=rf"{section}.{entry.name} = '{wrong}' is not one of .* Did you mean"):
        config_from_dict({section: {entry.name: wrong}})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"train": {"steps": 5.0}}, "train.steps = 5.0 is not an integer"),
        ({"train": {"steps": True}}, "train.steps = True is not an integer"),
        ({"train": {"lr": "fast"}}, "train.lr = 'fast' is not a number"),
        ({"train": {"lr": float("nan")}}, "train.lr = nan is not a number"),
        ({"run": {"seed": 10**20}}, "run.seed = 10+ is too large"),
        ({"adapter": {"rank": 10**9}}, "adapter.rank = 10+ is above 4096"),
        ({"train": {"lr": float("inf")}}, "train.lr = inf is not a number"),
        ({"train": {"gradient_checkpointing": 1}}, "is not true or false"),
        ({"critic": {"discriminators": "dino"}}, "is not a list of strings"),
        ({"critic": {"discriminators": ["dino", 3]}}, "is not a list of strings"),
        ({"concept": {"class_name": 3}}, 'is not a string or "off"'),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tables)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"critic": {"identity": "none"}}, "critic.identity is none.*--no-echo"),
        ({"text": {"form": "frozen", "initializer": "dog"}}, "learns no token"),
        (
            {"concept": {"class_prompts": ["a dog"]}},
            "'a dog' in .*class_prompts does not contain {} exactly once",
        ),
        ({"train": {"lr": 0.0, "teacher_lr": 0.0}}, "nothing would be trained"),
        ({"train": {"carry_over": False}}, "train.carry_over is false.*echo.carry_back to 0"),
        ({"model": {"resolution": 16}, "critic": {"swd_patch": 17}}, "swd_patch exceeds"),
        ({"critic": {"discriminators": ["dino", "dino"]}}, "lists the same name twice"),
        ({"model": {"student_lora": "x.safetensors"}}, "one base model is student and teacher"),
        (
            {"model": {"offload": True}, "critic": {"discriminators": ["teacher"]}},
            "cannot be a discriminator while model.offload.*--set model.offload=false",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tables)


def test_an_error_says_what_to_do() -> None:
    for tables, remedy in (
        ({"train": {"lr": 0.0, "teacher_lr": 0.0}}, "Set --lr or --teacher-lr."),
        ({"concept": {"scenes": ["a {} beside a {}"]}}, "Write {} once, where the subject belongs."),
        ({"concept": {"scenes": [""]}}, "Write {} once, where the subject belongs."),
    ):
        with pytest.raises(ConfigError, match=re.escape(remedy)):
            config_from_dict(tables)


def test_no_identity_encoder_is_fine_without_the_echo() -> None:
    config_from_dict({"critic": {"identity": "none"}, "echo": {"start": "off"}})


def test_offload_allows_the_teacher_among_discriminators_that_are_switched_off() -> None:
    tables = {"model": {"offload": True}, "critic": {"discriminators": ["teacher"]}, "loss": {"adversarial": 0}}
    config_from_dict(tables)


def test_carrying_back_needs_no_carry_over_without_the_echo() -> None:
    config_from_dict({"train": {"carry_over": False}, "echo": {"start": "off"}})


def test_names_and_places_follow_from_the_subject() -> None:
    config = config_from_dict({"concept": {"token": "ohwx", "class_name": "toy dog"}})
    assert (config.subject, config.name, config.output) == ("ohwx toy dog", "ohwx-toy-dog", Path("runs/ohwx-toy-dog"))
    assert Config().subject == "sks"
    elsewhere = config_from_dict({"run": {"name": "mine", "output": "out"}})
    assert (elsewhere.name, elsewhere.output) == ("mine", Path("out"))
    word = config_from_dict({"text": {"form": "token"}})
    assert word.name == f"{word.concept.token}-lora"  # the word's own file is named after the token


def test_alpha_is_the_rank_unless_it_is_set() -> None:
    assert config_from_dict({"adapter": {"rank": 4}}).lora_alpha == 4.0
    assert config_from_dict({"adapter": {"rank": 4, "alpha": 8}}).lora_alpha == 8


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"train.target_steps": 1}, None),
        ({"train.target_steps": 1, "train.replays": 2}, "train.replays has no effect while train.target_steps is 1."),
        (
            {"train.target_steps": 1, "train.target_strength": 0.5},
            "train.target_strength has no effect while train.target_steps is 1.",
        ),
        (
            {"train.replays": 2, "loss.latent": 0},
            "train.replays has no effect while loss.latent is 0.",
        ),
        (
            {"train.replays": 0, "train.first_targets": 2},
            "train.first_targets has no effect while train.replays is 0.",
        ),
        ({"train.replays": 0, "train.class_share": 0.1}, "train.class_share has no effect while train.replays is 0."),
        ({"train.replays": 0, "train.pair_share": 0.1}, "train.pair_share has no effect while train.replays is 0."),
        (
            {"train.scene_share": 1},
            "loss.adversarial has no effect while train.scene_share is 1: discriminators judge photo prompts only.",
        ),
        (
            {"train.steps": 50},
            "No echo phase: it starts at step 60, after the last step (50). Lower --echo-start.",
        ),
        (
            {"train.target_steps": 2, "train.replays": 1, "train.first_targets": 2, "train.scene_share": 0.5},
            None,
        ),
        ({"train.steps": 50, "echo.start": None}, None),
    ],
)
def test_a_setting_without_effect_is_reported_with_what_it_depends_on(
    overrides: dict[str, Any], expected: str | None
) -> None:
    config = build_config(overrides={"concept.class_name": "dog", **overrides})
    assert list(warnings(config)) == ([] if expected is None else [expected])


def test_a_missing_class_name_is_reported_in_one_line() -> None:
    assert list(warnings(Config())) == [
        "Without --class-name, such as dog, the prompts do not say what the subject is. No effect without it: "
        "train.class_share, train.pair_share."
    ]


def test_settings_that_need_a_class_name_are_reported_without_one() -> None:
    overrides = {"concept.masks": "teacher", "loss.prior": 1.0}
    sentences = list(warnings(build_config("mini", overrides=overrides)))
    assert sentences == [
        "Without --class-name, such as dog, the prompts do not say what the subject is. No effect without it: "
        "concept.masks = 'teacher', loss.prior, train.class_share, train.pair_share."
    ]
    assert not list(warnings(build_config("mini", overrides={"concept.class_name": "dog", **overrides})))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("share", "of_twenty"), [(0.0, 20), (0.5, 10), (0.75, 5), (0.9, 2), (1.0, 0)])
def test_the_share_of_scenes_is_kept_over_steps_at_every_batch_size(size: int, share: float, of_twenty: int) -> None:
    train = TrainConfig(batch_size=size, scene_share=share)
    numbers = [train.photo_prompts(step) for step in range(20)]
    assert sum(numbers) == of_twenty * size
    assert (numbers[0] > 0) == (share < 1)
    assert max(numbers) - min(numbers) <= 1
