"""`echodistill sample`: what is drawn, from which seeds, with which LoRA, and what the files say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echodistill_cli.config.build import build_config
from echodistill_cli.outputs.artifact import changed_models
from echodistill_cli.outputs.sample import _next_number
from tests.helpers.commands import Done, command, files_below, trained_run

Pair = tuple[Path, Path]
Backbones = dict[str, Path]

PROMPT = "a photo of a sks dog"


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, small_pair: Pair, small_backbones: Backbones, photo_folder: Path
) -> Path:
    """A finished run in a folder named runs/; not to be written to."""
    return trained_run(tmp_path_factory.mktemp("work"), small_pair, small_backbones, photo_folder)


def sample(folder: Path, *arguments: object) -> Done:
    done = command("sample", *arguments, "-o", folder)
    assert done.code == 0, done.err
    return done


def pixels(path: Path | str) -> Any:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)


def told(path: Path | str) -> dict[str, str]:
    """What a picture's file says of its making."""
    with Image.open(path) as picture:
        return {str(key): value for key, value in picture.info.items()}


def test_the_newest_run_is_meant_and_every_picture_says_how_it_was_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent.parent)
    done = sample(tmp_path, "-p", "ein süßer sks dog", "-n", 2, "--seed", 7)
    assert done.out.splitlines() == [
        f"{tmp_path}/{name}" for name in ("0000_s7.png", "0001_s8.png", "0000-0001_grid.png")
    ]
    assert "2 images" in done.error
    assert "images/s" in done.error
    assert pixels(tmp_path / "0001_s8.png").shape == (64, 64, 3)
    expected = {"prompt": "ein süßer sks dog", "seed": "8", "steps": "1", "guidance_scale": "0", "lora_scale": "1"}
    expected |= {"model": "student", "lora": "sks-dog.safetensors"}
    assert expected.items() <= told(tmp_path / "0001_s8.png").items()
    # The next call numbers on; nothing is overwritten.
    assert sample(tmp_path, "-p", PROMPT).out == f"{tmp_path}/0002_s0.png\n"


def test_prompts_come_from_flags_and_a_file_and_the_result_is_one_object(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a sks dog\n\n  a dog in snow  \n", encoding="utf-8")
    done = sample(
        tmp_path / "out", "--lora", run, "-p", PROMPT, "--prompt-file", tmp_path / "prompts.txt", "--json", "-q"
    )
    assert done.err == ""
    assert len(done.result["files"]) == 3
    assert done.result["images_per_second"] > 0
    assert [told(file)["prompt"] for file in done.result["files"]] == [PROMPT, "a sks dog", "a dog in snow"]
    assert Path(done.result["grid"]).is_file()


def test_a_picture_depends_on_its_own_seed_alone(run: Path, tmp_path: Path) -> None:
    sample(tmp_path / "one", "--lora", run, "-p", PROMPT, "-n", 3, "--batch-size", 1)
    sample(tmp_path / "all", "--lora", run, "-p", PROMPT, "-n", 3, "--batch-size", 3)
    sample(tmp_path / "last", "--lora", run, "-p", PROMPT, "--seed", 2)
    for index in range(3):
        one, together = (pixels(tmp_path / kind / f"000{index}_s{index}.png") for kind in ("one", "all"))
        assert np.abs(one - together).max() <= 1
    assert np.abs(pixels(tmp_path / "one" / "0002_s2.png") - pixels(tmp_path / "last" / "0000_s2.png")).max() <= 1
    assert np.abs(pixels(tmp_path / "one" / "0000_s0.png") - pixels(tmp_path / "one" / "0001_s1.png")).max() > 1


def test_a_scale_of_0_draws_the_base_models_picture_and_compare_shows_it_beside(run: Path, tmp_path: Path) -> None:
    sample(tmp_path / "zero", "--lora", run, "-p", PROMPT, "--lora-scale", 0)
    sample(tmp_path / "pair", "--lora", run, "-p", PROMPT, "--compare")
    sample(tmp_path / "full", "--lora", run, "-p", PROMPT)
    zero, pair, full = (pixels(tmp_path / kind / "0000_s0.png") for kind in ("zero", "pair", "full"))
    assert pair.shape[1:] == (192 + 2 + 192, 3)  # images of 64 pixels, enlarged
    assert (pair[:192:3, :192:3] == zero).all()
    assert (pair[:192:3, 194::3] == full).all()
    assert pair[192:].min() < 128  # the captions
    assert (pixels(tmp_path / "pair" / "0000_s0_lora.png") == full).all()
    assert np.abs(full - zero).mean() > 0.5


def test_a_scale_of_0_leaves_a_learned_word_out_too(
    tmp_path: Path, small_pair: Pair, small_backbones: Backbones, photo_folder: Path
) -> None:
    changes: dict[str, Any] = {"text__form": "token", "train__text_lr": 0.5}
    learned = trained_run(tmp_path, small_pair, small_backbones, photo_folder, **changes)
    sample(tmp_path / "zero", "--lora", learned, "-p", PROMPT, "--lora-scale", 0)
    sample(tmp_path / "pair", "--lora", learned, "-p", PROMPT, "--compare")
    zero, pair = (pixels(tmp_path / kind / "0000_s0.png") for kind in ("zero", "pair"))
    assert (pair[:192:3, :192:3] == zero).all()


def test_pictures_are_drawn_with_the_full_decoder_whatever_the_run_was_trained_with() -> None:
    trained = dataclasses.replace(build_config("sdxl-turbo").model, decoder="tiny")
    assert changed_models(trained, {}).decoder == "full"
    assert changed_models(trained, {"decoder": "tiny"}).decoder == "tiny"


def test_another_teacher_has_not_the_revision_of_the_first() -> None:
    model = build_config("sdxl-turbo").model
    assert model.teacher_revision is not None
    other = changed_models(model, {"teacher": "someone/else"})
    assert (other.teacher, other.teacher_revision) == ("someone/else", None)
    same = changed_models(model, {"teacher": model.teacher})
    assert same.teacher_revision == model.teacher_revision


def test_pictures_are_numbered_on_beyond_four_digits(tmp_path: Path) -> None:
    for name in ("0007_s0.png", "9999_s3.png", "10000_s0.png", "0000-0001_grid.png", "notes_1.png"):
        (tmp_path / name).touch()
    assert _next_number(tmp_path) == 10001


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_number_of_steps_can_be_chosen(run: Path, tmp_path: Path, steps: int) -> None:
    done = sample(tmp_path, "--lora", run, "-p", PROMPT, "--steps", steps)
    assert told(done.out.strip())["steps"] == str(steps)


def test_the_teacher_draws_in_25_guided_steps(run: Path, tmp_path: Path) -> None:
    done = sample(tmp_path, "--lora", run, "-p", PROMPT, "--role", "teacher")
    expected = {"model": "teacher", "lora": "sks-dog-teacher.safetensors", "steps": "25", "guidance_scale": "7.5"}
    assert expected.items() <= told(done.out.strip()).items()
    # Its file with the other model is most likely a slip, and said to be.
    mixed = sample(tmp_path, "--lora", run / "teacher" / "sks-dog-teacher.safetensors", "-p", PROMPT)
    assert "--role teacher" in mixed.err


def test_a_lora_file_draws_the_same_as_its_run_and_elsewhere_needs_its_model(
    run: Path, tmp_path: Path, small_pair: Pair
) -> None:
    sample(tmp_path / "run", "--lora", run, "-p", PROMPT)
    sample(tmp_path / "file", "--lora", run / "sks-dog.safetensors", "-p", PROMPT)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((run / "sks-dog.safetensors").read_bytes())
    done = command("sample", "--lora", moved, "-p", PROMPT, "-o", tmp_path / "moved")
    assert (done.code, done.out) == (2, "")
    assert "--model" in done.error
    assert not (tmp_path / "moved").exists()
    sample(tmp_path / "moved", "--lora", moved, "-p", PROMPT, "--model", small_pair[0], "--size", 64)
    pictures = [pixels(tmp_path / kind / "0000_s0.png") for kind in ("run", "file", "moved")]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] == pictures[2]).all()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--precision", "fp61"), 2, "fp16"),
        (("--device", "cuda:99"), 2, "--device auto"),
        (("--size", 70), 2, "70"),
        (("--model", "nobody/has-this", "--offline"), 4, "echodistill download nobody/has-this --critic none"),
        (("--size", 4_000_000), 2, "'--size': Input should be less than or equal to 16384"),
    ],
)
def test_what_cannot_be_drawn_ends_with_one_line_and_writes_nothing(
    run: Path, tmp_path: Path, flags: tuple[object, ...], code: int, words: str
) -> None:
    done = command("sample", "--lora", run, "-p", PROMPT, *flags, "-o", tmp_path / "out", "-q")
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done.err
    assert words in done.err
    assert not (tmp_path / "out").exists()


def test_a_lora_for_another_model_is_refused(run: Path, tmp_path: Path, small_sdxl_pair: Pair) -> None:
    done = command("sample", "--lora", run, "-p", PROMPT, "--model", small_sdxl_pair[0], "--size", 64, "-o", tmp_path)
    assert (done.code, done.out) == (4, "")
    assert "matches no module of this model's unet" in done.error
    assert files_below(tmp_path) == set()


def test_a_run_that_is_not_finished_says_how_to_finish_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((run / "config.toml").read_bytes())
    done = command("sample", "--lora", tmp_path, "-p", PROMPT)
    assert done.code == 2
    assert f"train --resume -o {tmp_path}" in done.error


# --- one folder for several calls -------------------------------------------------------------------------------------


def test_a_name_that_another_process_takes_meanwhile_is_left_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(tmp_path, "--lora", run, "-p", PROMPT, "-n", 2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # What a call sees that counts the files before the other one has written its own.
    monkeypatch.setattr("echodistill_cli.outputs.sample._next_number", lambda _folder: 0)
    done = sample(tmp_path, "--lora", run, "-p", "a cat", "-n", 2)
    assert [Path(line).name for line in done.out.splitlines()] == ["0001_s0.png", "0002_s1.png", "0001-0002_grid.png"]
    assert {path: path.read_bytes() for path in before} == before
    assert told(tmp_path / "0001_s0.png")["prompt"] == "a cat"


def test_more_images_than_a_list_holds_are_refused_at_once(run: Path, tmp_path: Path) -> None:
    done = command("sample", "--lora", run, "-p", PROMPT, "-n", 1_000_000_000, "-o", tmp_path / "many")
    assert done.code == 2
    assert done.error == "error: 1000000000 images are too many for one call. Ask for at most 100000."
    assert not (tmp_path / "many").exists()


def test_a_grid_has_a_limit_and_its_tiles_too(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.outputs.sample._MOST_TILES", 4)
    monkeypatch.setattr("echodistill_cli.data.grids._MOST_PIXELS", 4 * 32 * 32)
    sample(tmp_path / "few", "--lora", run, "-p", PROMPT, "-n", 4)
    assert pixels(tmp_path / "few" / "0000-0003_grid.png").shape[1] == 4 * 160 + 3 * 2  # 32 pixels, enlarged
    done = sample(tmp_path / "many", "--lora", run, "-p", PROMPT, "-n", 5)
    assert len(done.out.splitlines()) == 5
    assert "no grid" in done.err


# --- what a person is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-p", "a dog"), "The prompt 'a dog' is without the token 'sks'"),
        (("-p", "a dog", "-p", "a cat"), "The prompt 'a dog' and 1 more are without the token 'sks'"),
        (("-p", "a " * 28 + "sks dog on a cat"), "the model reads 32 tokens. It does not read 'on a cat'"),
        (("-p", PROMPT, "--size", 128), "--size 128 is far from the 64 pixels in training"),
        (("-p", PROMPT, "--steps", 3), "--steps 3 and --guidance 0 may make the images worse"),
        (("-p", PROMPT, "--guidance", 7), "--steps 1 and --guidance 7 may make the images worse"),
        (("-p", "a (sks:1.3) dog <lora:x:1>"), "weights and <lora:...> tags have no effect"),
    ],
)
def test_a_request_that_may_not_do_what_it_seems_to_is_answered_with_a_line(
    run: Path, tmp_path: Path, flags: tuple[object, ...], words: str
) -> None:
    done = sample(tmp_path, "--lora", run, *flags)
    assert sum(words in line for line in done.err.splitlines()) == 1, done.err


def test_an_ordinary_request_is_answered_without_a_remark(run: Path, tmp_path: Path) -> None:
    lines = sample(tmp_path, "--lora", run, "-p", "SKS dog, at sea").err.splitlines()
    assert [line.split()[0] for line in lines] == ["Loading", "1"]


def test_the_newest_run_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert f"Using the newest run, runs/{run.name}" in sample(tmp_path, "-p", PROMPT).err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-p", " "), "The prompt is empty"),
        (("-p", PROMPT, "--guidance", "inf"), "--guidance inf is not a finite number"),
        (("-p", PROMPT, "--guidance", "nan"), "Invalid value for '--guidance'"),
        (("-p", PROMPT, "--lora-scale", "nan"), "--lora-scale nan is not a finite number"),
        (("-p", PROMPT, "--lora-scale=-inf"), "--lora-scale -inf is not a finite number"),
        (("-p", PROMPT, "--lora-scale", "1e39"), "--lora-scale 1e+39 is not a finite number"),
        (("-p", PROMPT, "--guidance", "1e39"), "--guidance 1e+39 is not a finite number"),
        (("-p", PROMPT, "--size", 65), "--size 65 is not a multiple of 16, which this model needs. Try --size 64."),
        (("-p", PROMPT, "--width", 72), "--width 72 is not a multiple of 16, which this model needs. Try --width 64."),
        (("-p", PROMPT, "--seed", "abc"), "--seed 'abc' is not an integer"),
        (("-p", PROMPT, "--seed", 2**64), "--seed 18446744073709551616 is out of range"),
        (("-p", PROMPT, "--seed", "-1"), "--seed -1 is out of range"),
        (("-p", "a sks dog --w 512"), "holds the option --w, which is not read there. Remove it and use --width"),
        (("a sks dog --ar 16:9",), "holds the option --ar"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_that_was_typed(
    run: Path, tmp_path: Path, flags: tuple[object, ...], words: str
) -> None:
    done = command("sample", "--lora", run, *flags, "-o", tmp_path / "out", "-q")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
    assert words in done.err
    assert not (tmp_path / "out").exists()


# --- prompts, seeds and sizes -----------------------------------------------------------------------------------------


def test_a_prompt_may_be_an_argument_and_a_seed_random(run: Path, tmp_path: Path) -> None:
    done = sample(tmp_path, PROMPT, "--lora", run, "--seed", "random", "-p", "a sks cat", "--json")
    seeds = {image["seed"] for image in done.result["images"]}
    assert [image["prompt"] for image in done.result["images"]] == [PROMPT, "a sks cat"]
    assert len(seeds) == 1
    assert done.err.splitlines()[0] == f"--seed {seeds.pop()}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_prompts_may_have_comments_and_a_byte_order_mark(run: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\n a sks dog \n\n #2\nsüßer sks dog #1\n", encoding=encoding)
    done = sample(tmp_path / "out", "--lora", run, "--prompt-file", tmp_path / "prompts.txt", "--json")
    assert [image["prompt"] for image in done.result["images"]] == ["a sks dog", "süßer sks dog #1"]


def test_the_options_of_a_kohya_prompt_file_are_refused_with_their_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na sks dog --n blurry --w 64 --d 7\n")
    done = command("sample", "--lora", run, "--prompt-file", tmp_path / "prompts.txt")
    assert (done.code, done.out) == (2, "")
    assert "prompts.txt: line 2 holds the option --n" in done.error


def test_width_and_height_may_differ(run: Path, tmp_path: Path) -> None:
    done = sample(tmp_path, "--lora", run, "-p", PROMPT, "--width", 96, "--height", 48)
    assert pixels(done.out.strip()).shape == (48, 96, 3)
    assert "Size: 96x48" in told(done.out.strip())["parameters"]
    square = sample(tmp_path / "square", "--lora", run, "-p", PROMPT, "--width", 64)
    assert (pixels(square.out.strip()) == pixels(sample(tmp_path, "--lora", run, "-p", PROMPT).out.strip())).all()


def test_sdxl_is_conditioned_on_width_and_height(small_sdxl_pair: Pair) -> None:
    from echodistill_cli.config.schema import ModelConfig
    from echodistill_cli.diffusion.sampling import SamplingSettings
    from echodistill_cli.models.load import load_pair
    from echodistill_cli.outputs.sample import _set_sides

    models = ModelConfig(student=str(small_sdxl_pair[0]), resolution=64, device="cpu", offline=True)
    pair = load_pair(models, teacher=False)
    _set_sides(pair, SamplingSettings(size=64, width=96, height=32))
    assert pair.student.time_ids == (32, 96, 0, 0, 32, 96)


def test_the_result_and_the_file_say_how_each_image_was_made(run: Path, tmp_path: Path) -> None:
    result = sample(tmp_path, "--lora", run, "-p", PROMPT, "--seed", 5, "--compare", "--json").result
    (image,) = result["images"]
    assert result["files"] == [image["file"]]
    expected = {"prompt": PROMPT, "seed": 5, "run": str(run), "model": "student", "lora": "sks-dog.safetensors"}
    assert expected.items() <= image.items()
    assert pixels(image["alone"]).shape == (64, 64, 3)
    prompt, settings = told(image["alone"])["parameters"].splitlines()
    assert prompt == f"{PROMPT} <lora:sks-dog:1>"
    for field in ("Steps: 1", "Sampler: Euler", "CFG scale: 1", "Seed: 5", "Size: 64x64", "Model: student"):
        assert field in settings.split(", ")


# --- several LoRAs ----------------------------------------------------------------------------------------------------


def test_several_loras_are_added_with_their_scales(run: Path, tmp_path: Path) -> None:
    first, second = run / "sks-dog.safetensors", tmp_path / "copy.safetensors"
    second.write_bytes(first.read_bytes())
    once = sample(tmp_path / "once", "--lora", first, "-p", PROMPT, "--lora-scale", 1)
    halves = sample(tmp_path / "halves", "--lora", f"{first}:0.25", "--lora", f"{second}:0.75", "-p", PROMPT)
    none = sample(tmp_path / "none", "--lora", f"{first}:1", "--lora", f"{second}:-1", "-p", PROMPT)
    base = sample(tmp_path / "base", "--lora", f"{first}:0", "-p", PROMPT)
    images = [pixels(done.out.strip()) for done in (once, halves, none, base)]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[2] - images[3]).max() <= 1
    assert np.abs(images[0] - images[3]).max() > 1
    texts = told(halves.out.strip())
    assert texts["lora"] == "sks-dog.safetensors, copy.safetensors"
    assert texts["lora_scale"] == "0.25, 0.75"
    assert "<lora:sks-dog:0.25> <lora:copy:0.75>" in texts["parameters"]


def test_two_loras_of_different_families_are_refused(
    run: Path, tmp_path: Path, small_sdxl_pair: Pair, small_backbones: Backbones, photo_folder: Path
) -> None:
    other = trained_run(tmp_path, small_sdxl_pair, small_backbones, photo_folder)
    done = command("sample", "--lora", run, "--lora", other, "-p", PROMPT, "-o", tmp_path / "out")
    assert (done.code, done.out) == (4, "")
    assert f"{other / 'sks-dog.safetensors'} does not fit this model" in done.error


# --- other programs' settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[other]\nkey = 1\n", "key = 1\n", "", "not TOML", '[model]\nname = "x"\n'])
def test_a_lora_below_the_settings_of_another_program_is_no_runs(
    run: Path, tmp_path: Path, small_pair: Pair, text: str
) -> None:
    (tmp_path / "loras").mkdir()
    lora = tmp_path / "loras" / "dog.safetensors"
    lora.write_bytes((run / "sks-dog.safetensors").read_bytes())
    (tmp_path / "config.toml").write_text(text)
    sample(tmp_path / "out", "--lora", lora, "-p", PROMPT, "--model", small_pair[0], "--size", 64, "--device", "cpu")
    done = command("sample", "--lora", lora, "-p", PROMPT)
    assert done.code == 2
    assert "--model" in done.error
