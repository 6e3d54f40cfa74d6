"""Students of several steps: their settings, the published files that have them, and older names of both."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from echodistill_cli.cli.options import with_settings
from echodistill_cli.config.build import build_config, config_from_dict, config_hash, config_to_dict
from echodistill_cli.config.distilled import known_settings, sampling_in_words, settings_in_header, student_sampler
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError
from tests.cli.test_options import parsed

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
FOUR = (999, 749, 499, 249)


@pytest.mark.parametrize(
    ("file", "timesteps", "sampler", "words"),
    [
        ("dmd2_sdxl_4step_lora_fp16", FOUR, "lcm", "4 steps, guidance 0 (CFG 1), timesteps 999, 749, 499, 249 (LCM"),
        ("sdxl_lightning_8step_lora", (999, 874, 749, 624, 499, 374, 249, 124), "euler", "8 steps"),
        ("Hyper-SDXL-2steps-lora", (999, 499), "ddim", "2 steps, guidance 0 (CFG 1), timesteps 999, 499 (DDIM"),
        ("Hyper-SDXL-1step-lora", (999,), "ddim", "1 step, guidance 0 (CFG 1), timestep 999 with unit noise"),
        ("Hyper-SDXL-8steps-CFG-lora", (), "euler", "1 step, guidance 0 (CFG 1), trailing timesteps"),
        ("my-own", (), "euler", "1 step"),
    ],
)
def test_a_published_lora_makes_the_base_the_student_that_its_card_describes(
    file: str, timesteps: tuple[int, ...], sampler: str, words: str
) -> None:
    model = build_config(BASE, overrides={"model.student_lora": f"/loras/{file}.safetensors"}).model
    assert (model.student_timesteps, student_sampler(model)) == (timesteps, sampler)
    assert (model.teacher, model.resolution) == (BASE, 1024)
    assert sampling_in_words(model).startswith(words)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        (r"C:\models\sdxl_lightning_4step.safetensors", {"student_timesteps": FOUR, "student_sampler": "euler"}),
        ("sdxl_lightning_1step_x0.safetensors", {"student_prediction": "sample"}),
        ("someone/Hyper-SDXL-1step-Unet", {"student_timesteps": (800,)}),
        ("models/dmd2_sdxl_1step_unet_fp16/", {"student_timesteps": (399,)}),
    ],
)
def test_a_published_student_is_known_by_its_file_too(file: str, settings: dict[str, Any]) -> None:
    assert known_settings(file) == settings | {"resolution": 1024}
    model = build_config(file).model
    assert {key: getattr(model, key) for key in settings} == settings


def test_what_a_person_sets_wins_over_what_a_file_is_known_for() -> None:
    lora = {"model.student_lora": "dmd2_sdxl_4step_lora.safetensors"}
    model = build_config(BASE, overrides=lora | {"model.student_timesteps": [999], "model.resolution": 768}).model
    assert (model.student_timesteps, model.resolution) == ((999,), 768)


@pytest.mark.parametrize(
    ("words", "timesteps"),
    [
        ("--student-timesteps 999,749", (999, 749)),
        ("--student-timestep 399", (399,)),
        ("--student-timesteps none", ()),
        ("--set model.student_timesteps=[999,749]", (999, 749)),
        ("--set model.student_timesteps=999,749", (999, 749)),
        ("--set model.student_timesteps=399", (399,)),
        ("--set model.student_timesteps=off", ()),
        ("--set model.student_timestep=399", (399,)),
        ("--set model.student_timestep=off", ()),
    ],
)
def test_timesteps_can_be_typed_in_every_usual_way(words: str, timesteps: tuple[int, ...]) -> None:
    typed = parsed("p", *shlex.split(words))
    flag = typed["model_student_timesteps"]
    overrides = with_settings({} if flag is None else {"model.student_timesteps": flag}, typed["settings"] or ())
    assert build_config(overrides=overrides).model.student_timesteps == timesteps


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([749, 999], "does not fall from step to step"),
        ([999, 999], "does not fall from step to step"),
        ([999, 0], "is below 1"),
        (["999"], "is not a list of integers"),
        (999, "is not a list of integers"),
    ],
)
def test_timesteps_that_cannot_be_sampled_at_are_refused(timesteps: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.student_timesteps .*{message}"):
        config_from_dict({"model": {"student_timesteps": timesteps}})


def test_the_one_timestep_of_older_files_is_read_and_has_its_hash() -> None:
    tables = config_to_dict(Config())
    del tables["model"]["student_timesteps"], tables["model"]["student_sampler"]
    assert config_from_dict(tables | {"model": tables["model"] | {"student_timestep": "off"}}) == Config()
    old = config_from_dict(tables | {"model": tables["model"] | {"student_timestep": 399}})
    assert old.model.student_timesteps == (399,)
    # As version 0.3 computed it.
    assert config_hash(old) == "ef9acdfa17ab28b29b4e30f280e87b67eb8bba97f725ad21d6851dc320b5cce3"


def test_a_lora_file_says_the_steps_of_its_student_and_nothing_else_is_believed() -> None:
    header = {"echodistill.student_timesteps": "999,749,499,249", "echodistill.student_sampler": "lcm"}
    assert settings_in_header(header) == {"student_timesteps": FOUR, "student_sampler": "lcm"}
    assert settings_in_header({"echodistill.student_timestep": "399"}) == {"student_timesteps": (399,)}
    for text in ("", "0", "999,", "249,999", "1e3", "[999]", "9" * 9):
        assert settings_in_header({"echodistill.student_timesteps": text}) == {}
    assert "student_sampler" not in settings_in_header(header | {"echodistill.student_sampler": "../x"})
