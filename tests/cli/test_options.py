"""The options of `train`: which settings are flags, how `--set` is read, and what a flag that is gone is answered."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from echodistill_cli.cli.app import app
from echodistill_cli.cli.options import ALIASES, FLAGS, PANELS, with_settings
from echodistill_cli.config.build import RETIRED, build_config
from echodistill_cli.config.schema import Config
from tests.helpers.commands import command

KEYS = [
    f"{section.name}.{entry.name}"
    for section in dataclasses.fields(Config)
    for entry in dataclasses.fields(getattr(Config(), section.name))
]


@functools.cache
def commands() -> Any:
    """Typer's group of commands."""
    return get_command(app)


def parsed(*arguments: str) -> Any:
    """What `train` receives from Typer for these arguments; nothing runs."""
    group = commands()
    with group.make_context("echodistill", ["train"]) as parent:
        return group.commands["train"].make_context("train", list(arguments), parent=parent).params


def planned(*arguments: object) -> Any:
    """The configuration, as nested tables, that `train` would run with these arguments."""
    done = command("train", *arguments, "--class-name", "dog", "--offline", "--dry-run", "--json")
    assert done.code == 0, done.err
    return done.result["config"]


# --- help -------------------------------------------------------------------------------------------------------------


def test_the_help_of_train_has_seven_headings_and_50_options() -> None:
    text = command("train", "--help").out
    headings = re.findall(r"─ ([A-Z][\w ]+) ─", text)
    assert headings == ["Arguments", "Options", *PANELS]
    assert len(headings) <= 7
    assert len(re.findall(r"^│ --", text, re.MULTILINE)) == 51
    assert all(f"│ {flag.names.split('/')[0].split()[0]} " in text for flag in FLAGS)
    assert "[off]" in text  # the default of an option that is turned on
    assert "--max-train-steps" not in text
    assert "unset: the rank\n" in re.sub(r" *│", "", text)  # no default of None


def test_the_help_of_train_fits_two_screens_of_50_lines_and_100_columns() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "echodistill_cli", "train", "--help"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=os.environ | {"COLUMNS": "100"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100


# --- flags ------------------------------------------------------------------------------------------------------------


def test_a_flag_is_a_setting_and_no_setting_has_two_flags() -> None:
    keys = [flag.key for flag in FLAGS]
    assert len(set(keys)) == len(keys) == 39
    # --model and PHOTOS are declared by `train` itself: they may name a preset, and a folder.
    assert set(keys) <= set(KEYS) - {"model.student", "concept.photos"}
    names = [name for flag in FLAGS for name in re.split(r"[ /]", flag.names)]
    assert len(set(names)) == len(names)


def test_every_boolean_flag_can_be_turned_off() -> None:
    for flag in FLAGS:
        section, name = flag.key.split(".")
        if isinstance(getattr(getattr(Config(), section), name), bool):
            on, off = flag.names.split("/")
            assert off == f"--no-{on[2:]}"
            assert parsed(on)[flag.parameter] is True
            assert parsed(off)[flag.parameter] is False


def test_18_names_of_other_trainers_and_one_of_an_older_version_are_known() -> None:
    assert len(ALIASES) == 18 + 1


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_a_name_of_another_trainer_means_the_same_with_dashes_and_underscores(alias: str) -> None:
    for written in (alias, "--" + alias[2:].replace("-", "_")):
        assert parsed(written, "7") == parsed(ALIASES[alias], "7")


def test_underscores_in_a_value_stay() -> None:
    assert parsed("--class_name=toy_dog", "my_photos")["concept_class_name"] == "toy_dog"
    assert str(parsed("my_photos")["photos"]) == "my_photos"


def test_off_and_none_and_lists_are_understood() -> None:
    values = parsed("--echo-start", "off", "--discriminators", "dino, teacher", "--report-to", "none")
    assert values["echo_start"] == "off"
    assert values["critic_discriminators"] == ("dino", "teacher")
    assert values["run_report_to"] == ()
    assert parsed("--sample-prompt", "a", "--sample-prompt", "b")["run_sample_prompts"] == ["a", "b"]


def test_flags_go_over_the_file_and_the_file_over_the_preset(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nsteps = 7\nbatch_size = 3\n[echo]\nstart = 'off'\n")
    config = planned(photo_folder, "--config", tmp_path / "run.toml", "--steps", 9)
    assert (config["train"]["steps"], config["train"]["batch_size"], config["echo"]["start"]) == (9, 3, "off")


def test_echo_keeps_the_start_that_is_planned(photo_folder: Path, tmp_path: Path) -> None:
    def start(*arguments: object) -> Any:
        return planned(photo_folder, "--echo", *arguments)["echo"]["start"]

    (tmp_path / "off.toml").write_text("[echo]\nstart = 'off'\n")
    assert start() == Config().echo.start
    assert start("--model", "mini") == build_config("mini").echo.start
    assert start("--config", tmp_path / "off.toml") == Config().echo.start
    assert start("--echo-start", 7) == start("--set", "echo.start=7") == 7
    for contradiction in (("--echo-start", "off"), ("--set", "echo.start=off")):
        assert "--echo contradicts" in command("train", photo_folder, "--echo", *contradiction).err


def test_a_setting_without_effect_is_reported(photo_folder: Path) -> None:
    line = (
        "train",
        photo_folder,
        "--class-name",
        "dog",
        "--set",
        "train.replays=2",
        "--set",
        "train.target_steps=1",
        "--offline",
        "--dry-run",
        "--json",
    )
    assert "train.replays has no effect while train.target_steps is 1." in command(*line).result["warnings"]


# --- --set ------------------------------------------------------------------------------------------------------------


def test_set_takes_any_setting_as_toml_and_a_bare_word_as_text(photo_folder: Path) -> None:
    texts = {
        "train.target_steps=5": 5,
        "train.target_strength = 0.8": 0.8,
        "train.carry_over=true": True,
        "text.initializer=puppy": "puppy",
        "model.variant=off": "off",
        'concept.scenes=["a {} on the moon", "a {}, asleep"]': ["a {} on the moon", "a {}, asleep"],
        "model.tokenizer=/some/folder = 1": "/some/folder = 1",
    }
    config = planned(photo_folder, *(word for text in texts for word in ("--set", text)))
    for text, value in texts.items():
        section, _, name = text.partition("=")[0].strip().partition(".")
        assert config[section][name] == value


def test_set_goes_over_the_file(photo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nsteps = 7\nbatch_size = 3\n")
    line = (photo_folder, "--config", tmp_path / "run.toml", "--set", "train.steps=10")
    assert planned(*line)["train"]["steps"] == 10
    assert planned(*line)["train"]["batch_size"] == 3


def test_set_takes_switches_and_lists_as_flags_spell_them(photo_folder: Path) -> None:
    texts = ("critic.discriminators=none", "model.offload=on", "concept.captions=off", "concept.scenes=none")
    config = planned(photo_folder, *(word for text in texts for word in ("--set", text)))
    assert (config["critic"]["discriminators"], config["concept"]["scenes"]) == ([], [])
    assert (config["model"]["offload"], config["concept"]["captions"]) == (True, False)
    assert planned(photo_folder, "--set", "critic.discriminators=dino, clip")["critic"]["discriminators"] == [
        "dino",
        "clip",
    ]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("train p --steps 3 --steps 5", "--steps"),
        ("train p --network_dim 3 --rank 4", "--rank"),
        ("train p --echo --no-echo", "--echo/--no-echo"),
        ("sample text --size 64 --size 32", "--size"),
        ("evaluate --photos a --photos b", "--photos"),
        ("check p --min-photos=3 --min-photos=4", "--min-photos"),
    ],
)
def test_an_option_that_counts_once_is_refused_if_it_is_given_twice(line: str, name: str) -> None:
    done = command(*line.split())
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {name} is given 2 times, and one would be ignored. Give it once.\n"


def test_options_that_may_be_repeated_and_switches_are_not(photo_folder: Path) -> None:
    line = ("--sample-prompt", "a", "--sample-prompt", "b", "--json", "--json", "-q", "-q")
    assert planned(photo_folder, *line)["run"]["sample_prompts"] == ["a", "b"]


@pytest.mark.parametrize("name", ["", "train", "sample", "export", "evaluate", "check", "download"])
def test_the_help_shows_no_type_for_a_switch_and_no_braces(name: str) -> None:
    help_text = command(*name.split(), "--help").out
    assert "<bool>" not in help_text
    assert "{" not in help_text.split("Options")[0]


def test_set_wins_over_a_memory_plan(photo_folder: Path) -> None:
    fitted = planned(photo_folder, "--vram", 24)["train"]["batch_size"]
    assert fitted > 1
    assert planned(photo_folder, "--vram", 24, "--set", "train.batch_size=1")["train"]["batch_size"] == 1


def test_set_names_the_model_and_the_photos_too(photo_folder: Path) -> None:
    line = ("--set", "model.student=mini", "--set", f"concept.photos={photo_folder}")
    assert planned(*line)["model"]["student"] == "mini:student"
    assert planned(*line)["train"] == planned(photo_folder, "--model", "mini")["train"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("p --set train.target_steps=0", "train.target_steps = 0 is below 1"),
        ("p --set train.target_steps=five", "train.target_steps = 'five' is not an integer"),
        ("p --set concept.scenes=dino", "is not a list of strings"),
        ("p --set train.steps=9 --set train.steps=10", "train.steps is given twice by --set."),
        ("p --no-echo --set echo.start=3", "--no-echo contradicts --set echo.start=3."),
        ("p --no-echo --echo-start 3", "--no-echo contradicts --echo-start 3."),
        ("p --set train.stpes=5", "Unknown setting train.stpes. Did you mean train.steps?"),
        ("p --set trian.steps=5", "Unknown section [trian]. Did you mean train?"),
        ("p --set target_steps=5", "Write --set train.target_steps=VALUE."),
        ("p --set train.target_steps", "Write --set train.target_steps=VALUE."),
        ("p --set model.student=", "model.student is empty."),
        ("p --model mini --set model.vae=", "model.vae is empty."),
        ("p --model mini --set run.output=", "run.output is empty."),
        ('p --set model.student=["a"]', "model.student = ('a',) is not a string"),
        ("p --set train.max_bad_steps=9", "train.max_bad_steps = 9 was a setting of an older echodistill."),
        ("p --steps 5 --set train.steps=7", "train.steps is given by --steps and by --set train.steps=7."),
        ("p -o x --set run.output=y", "run.output is given by --output and by --set run.output=y."),
        ("p --model mini --set model.student=x", "model.student is given by --model and by --set model.student=x."),
        ("p --set concept.photos=q", "concept.photos is given by PHOTOS and by --set concept.photos=q."),
    ],
)
def test_a_wrong_set_ends_with_2_and_one_line_that_helps(line: str, words: str) -> None:
    done = command("train", *line.split())
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("p --steps 0", "error: --steps 0 is below 1 (training steps)."),
        ("p --rank -1", "error: --rank -1 is below 1"),
        ("p --seed -1", "error: --seed -1 is below 0"),
        ("p --text lore", "error: --text 'lore' is not one of token, lora, frozen"),
        ("p --lr nan", "error: --lr nan is not a number."),
        ("p --alpha 1e39", 'error: --alpha 1e+39 is not a number or "off".'),
        ("p --lr 0 --teacher-lr 0", "error: --lr and --teacher-lr are both 0"),
        ("p --identity none", "but --identity is none."),
        ("p --set train.steps=0", "error: train.steps = 0 is below 1"),
        ("p --rank 4 --set train.steps=0", "error: train.steps = 0 is below 1"),
    ],
)
def test_an_error_names_what_was_typed(line: str, words: str) -> None:
    done = command("train", *line.split())
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err


def test_an_error_names_the_key_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nsteps = 0\n")
    done = command("train", "p", "--config", tmp_path / "run.toml")
    assert "error: train.steps = 0 is below 1" in done.err


def test_a_run_folder_in_the_place_of_photos_is_answered_with_the_command_that_resumes_it(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    done = command("train", "--resume", tmp_path, "--steps", 9)
    assert done.code == 2
    assert f"is a run folder. Run echodistill train --resume --output {tmp_path}" in done.err


# --- flags that are gone ----------------------------------------------------------------------------------------------

# Every flag of version 0.1 that has become a setting, as a person would type it, and what replaces it.
FORMER = """
--views 8 | concept.views=8
--augmentation plain | concept.augmentation=plain
--scene "a {} here" --scene "a {} there" | concept.scenes=["a {} here", "a {} there"]
--class-prompt "a red {}" | concept.class_prompts=["a red {}"]
--tiny-decoder madebyollin/taesd | model.tiny_decoder=madebyollin/taesd
--tokenizer ./clip | model.tokenizer=./clip
--variant off | model.variant=off
--revision main | model.student_revision=main
--teacher-revision main | model.teacher_revision=main
--single-file-config ./sd | model.single_file_config=./sd
--teacher-single-file-config ./sd | model.teacher_single_file_config=./sd
--student-prediction epsilon | model.student_prediction=epsilon
--teacher-prediction=v_prediction | model.teacher_prediction=v_prediction
--teacher-original-size 1024 | model.teacher_original_size=1024
--offload | model.offload=true
--no-offload | model.offload=false
--strength 1.2 | adapter.strength=1.2
--text-trained-by both | text.trained_by=both
--text-rank 4 | text.rank=4
--initializer puppy | text.initializer=puppy
--discriminator-lr 1e-3 | train.discriminator_lr=1e-3
--disc-lr 1e-3 | train.discriminator_lr=1e-3
--weight-decay 0 | train.weight_decay=0
--max-grad-norm 2 | train.max_grad_norm=2
--target-steps 5 | train.target_steps=5
--target_steps=5 | train.target_steps=5
--target-strength 0.8 | train.target_strength=0.8
--replays 12 | train.replays=12
--first-targets 20 | train.first_targets=20
--head-start 200 | train.head_start=200
--carry-over | train.carry_over=true
--no-carry-over | train.carry_over=false
--scene-share 0.5 | train.scene_share=0.5
--class-share 0.05 | train.class_share=0.05
--pair-share 0.25 | train.pair_share=0.25
--denoising-weight 2 | loss.denoising=2
--latent-weight 5 | loss.latent=5
--identity-weight 0 | loss.identity=0
--sliced-wasserstein-weight 0 | loss.sliced_wasserstein=0
--swd-weight 0 | loss.sliced_wasserstein=0
--adversarial-weight 0.1 | loss.adversarial=0.1
--identity-target photos | critic.identity_target=photos
--head-width 128 | critic.head_width=128
--swd-scales 3 | critic.swd_scales=3
--swd-projections 32 | critic.swd_projections=32
--swd-patch 7 | critic.swd_patch=7
--echo-every 50 | echo.every=50
--echo-candidates 8 | echo.candidates=8
--echo-pool-size 8 | echo.pool_size=8
--echo-min-identity 0.8 | echo.min_identity=0.8
--echo-max-similarity -1 | echo.max_similarity=-1
--echo-teacher-share 0 | echo.teacher_share=0
--echo-teacher-noise 0.5 | echo.teacher_noise=0.5
--echo-real-weight 0 | echo.real_weight=0
--carry-back 40 | echo.carry_back=40
--sample-seeds 3 | run.sample_seeds=3
--sample-seeds | run.sample_seeds=VALUE
"""
FORMER_LINES = [tuple(line.split(" | ")) for line in FORMER.strip().splitlines()]
REMOVED = """
--student-original-size 512 | model.student_original_size = "off"
--student-target-size 512 | model.student_target_size = "off"
--teacher-target-size 512 | model.teacher_target_size = "off"
--joint-text-share 0.3 | train.joint_text_share = 1.0
--teacher-mean | train.teacher_mean = false
--no-teacher-mean | train.teacher_mean = false
--max_bad_steps 2 | train.max_bad_steps = 5
--echo-teacher-steps 3 | echo.teacher_steps = 1
--echo-null-share=0.8 | echo.null_share = 0.0
--recolour 0.15 | concept.recolour = 0.0
--tint-scenes | concept.tint_scenes = false
--no-tint-scenes | concept.tint_scenes = false
"""


def test_every_setting_without_a_flag_is_among_the_former_flags() -> None:
    from_the_beginning = {"loss.paired", "model.student_sampler"}
    former = {text.partition("=")[0] for _, text in FORMER_LINES} | from_the_beginning
    assert former == set(KEYS) - {flag.key for flag in FLAGS} - {"model.student", "concept.photos"}
    assert {line.split(" | ")[1].split(" = ")[0] for line in REMOVED.strip().splitlines()} == set(RETIRED)


@pytest.mark.parametrize(("line", "setting"), FORMER_LINES)
def test_a_flag_that_became_a_setting_is_answered_with_the_setting(line: str, setting: str) -> None:
    words = shlex.split(line)
    flag = words[0].partition("=")[0].replace("_", "-")
    done = command("train", "p", "--steps", "3", *words, "--rank", "4")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {flag} is a setting now: --set {shlex.quote(setting)}.\n"


@pytest.mark.parametrize("line", [line for line, setting in FORMER_LINES if "VALUE" not in setting])
def test_what_the_answer_says_is_accepted(line: str) -> None:
    answer = command("train", "p", *shlex.split(line)).err.partition("now: ")[2].removesuffix(".\n")
    overrides = with_settings({}, parsed("p", *shlex.split(answer))["settings"])
    assert len(overrides) == 1
    build_config(overrides={"echo.carry_back": 0, **overrides})  # which needs the default of train.carry_over


@pytest.mark.parametrize("line", REMOVED.strip().splitlines())
def test_a_flag_that_was_removed_is_answered_with_what_every_run_does(line: str) -> None:
    words, setting = line.split(" | ")
    flag = words.split()[0].partition("=")[0].replace("_", "-")
    done = command("train", "p", *words.split())
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {flag} was removed. Omit it: every run does what {setting} did.\n"


@pytest.mark.parametrize("line", ["--stpes 3", "--student x", "--photos p", "--no-steps"])
def test_a_flag_that_never_was_is_still_an_unknown_option(line: str) -> None:
    done = command("train", "p", *line.split())
    assert (done.code, done.out) == (2, "")
    assert f"No such option: {line.split()[0]}" in done.err
