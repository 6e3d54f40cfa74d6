"""`echodistill train`: the files of a run, how other tools read them, how a run is resumed, and bad input."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from echodistill_cli.config.build import build_config
from echodistill_cli.diffusion.sampling import seeded_noise
from echodistill_cli.runs import open_run
from echodistill_cli.training.state import JOINT
from echodistill_cli.training.steps import PHASE_STEPS
from tests.helpers.commands import Done, command, files_below, small_toml

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "photos"

Pair = tuple[Path, Path]
Backbones = dict[str, Path]


@pytest.fixture(scope="module", params=["lora", "token", "frozen"])
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_pair: Pair,
    small_backbones: Backbones,
    photo_folder: Path,
) -> tuple[Path, str, Done]:
    """A finished run of four steps, the form of its text side, and the command's output. Tests do not write to it."""
    folder = tmp_path_factory.mktemp(request.param)
    # alpha differs from the rank and strength from 1, so that a lost scale shows.
    scales = {"adapter__alpha": 6, "adapter__strength": 1.5}
    file = small_toml(folder, small_pair, small_backbones, text__form=request.param, **scales)
    done = command("train", photo_folder, "--config", file, "--output", folder / "run", "--lr", "1e-2")
    assert done.code == 0, done.err
    return folder / "run", request.param, done


# --- the files of a run -----------------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_it_promises_and_prints_its_lora(run: tuple[Path, str, Done]) -> None:
    folder, form, done = run
    expected = {
        *("sks-dog.safetensors", "teacher/sks-dog-teacher.safetensors", "config.toml", "metrics.jsonl", "README.md"),
        *(f"samples/step-{step:06d}.png" for step in (0, 2, 4)),
        *(f"checkpoints/step-{step:06d}/{name}" for step in (2, 4) for name in ("state.pt", "manifest.json")),
    }
    files = files_below(folder)
    assert expected <= files
    assert ("sks.safetensors" in files) == (form == "token")
    assert not [name for name in files if name.endswith(".tmp")]
    assert done.out == f"{folder}/sks-dog.safetensors\n"


def test_plain_lines_report_progress_without_a_terminal(run: tuple[Path, str, Done]) -> None:
    lines = run[2].err.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == [f"step {n}/4" for n in range(1, 5)]
    assert any("left" in line and "denoising" in line for line in lines)
    assert any(line.startswith("echo at step 3: generated 4") for line in lines)
    assert "\x1b" not in run[2].err
    assert not [line for line in lines if "warning" in line.lower() or "%|" in line]


def test_metrics_have_every_loss_norm_rate_and_cost_of_every_step(run: tuple[Path, str, Done]) -> None:
    folder, form, _ = run
    metrics = open_run(folder).read_metrics()
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]
    trained = {"student", "teacher", "discriminators"} | ({"text"} if form != "frozen" else set())
    expected = {"denoising", "latent", "identity", "sliced_wasserstein", "adversarial"}
    expected |= {"discriminator_dino", "discriminator_teacher", "step", "step_seconds", "peak_memory_mib"}
    expected |= {f"grad_norm_{name}" for name in trained} | {f"lr_{name}" for name in trained}
    for entry in metrics:
        assert expected <= set(entry)
        assert all(isinstance(value, int | float) for value in entry.values())
    assert metrics[0]["lr_student"] == 1e-2
    assert metrics[0]["peak_memory_mib"] > 50
    refreshes = [entry for entry in metrics if "echo_made" in entry]
    assert [entry["step"] for entry in refreshes] == [3]
    reasons = ("echo_identity", "echo_photo_copy", "echo_duplicate", "echo_crowded")
    assert refreshes[0]["echo_made"] == refreshes[0]["echo_kept"] + sum(refreshes[0][name] for name in reasons) == 4


def test_no_path_of_this_machine_is_in_what_people_pass_on(run: tuple[Path, str, Done], small_pair: Pair) -> None:
    folder, _, _ = run
    texts = [(folder / "README.md").read_text(), *open_run(folder).read_metrics()[0]]
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            texts += [*(opened.metadata() or {}).values(), *opened.keys()]
    for file in folder.rglob("*.png"):
        with Image.open(file) as picture:
            texts += [f"{key}={value}" for key, value in picture.info.items()]
    for place in (str(folder.parent), str(small_pair[0].parent), str(Path.home()) + "/"):
        assert not [text for text in texts if place in text]


def test_a_preview_has_a_row_per_prompt_with_the_token_and_without(run: tuple[Path, str, Done]) -> None:
    with Image.open(run[0] / "samples" / "step-000004.png") as sheet:
        assert sheet.width == 4 * 3 * 64 + 3 * 2  # enlarged, so that the prompts are readable
        assert sheet.height > 2 * 3 * 64 + 2  # each image has its prompt below it
        assert sheet.info["step"] == "4"
        assert sheet.info["prompts"].split(" | ")[:2] == ["a photo of a sks dog", "a photo of a dog"]


def test_the_model_card_says_how_to_use_the_files(run: tuple[Path, str, Done]) -> None:
    folder, form, _ = run
    card = (folder / "README.md").read_text()
    assert "samples/step-000004.png" in card
    assert "sks-dog.safetensors" in card
    assert ("load_textual_inversion" in card) == (form == "token")


# --- other tools read it ----------------------------------------------------------------------------------------------


def generated_by_diffusers(model: Path, lora: Path, prompt: str, token: Path | None, **settings: Any) -> Any:
    """Return an image in 0…1 by a stock pipeline that loads the files as a user would."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    if token:
        pipeline.load_textual_inversion(str(token), token="<sks>")
    noise = seeded_noise([5], (4, 8, 8))
    return pipeline(prompt, latents=noise, output_type="np", **settings).images[0]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_plain_diffusers_loads_the_files_and_generates_the_same_image(
    run: tuple[Path, str, Done],
    role: str,
    small_pair: Pair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, form, _ = run
    done = command("sample", "--lora", folder, "-p", "a photo of a sks dog", "--seed", 5, "--role", role,
                   "--steps", 1, "--guidance", 0, "-o", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    image = np.asarray(Image.open(tmp_path / "0000_s5.png"), dtype=np.float32) / 255
    lora = folder / ("sks-dog.safetensors" if role == "student" else "teacher/sks-dog-teacher.safetensors")
    token = folder / "sks.safetensors" if form == "token" else None
    prompt = f"a photo of a {'<sks>' if token else 'sks'} dog"
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    try:
        for logger in loggers:
            logger.propagate = True
        reference = generated_by_diffusers(
            small_pair[role == "teacher"], lora, prompt, token, num_inference_steps=1, guidance_scale=0.0
        )
    finally:
        for logger in loggers:
            logger.propagate = False
    assert np.abs(image - reference).max() < 1e-2
    remarks = [record.getMessage() for record in caplog.records]
    assert not [text for text in remarks if "key" in text.lower() and "safe to ignore" not in text]


def test_the_lora_changes_the_image(run: tuple[Path, str, Done], tmp_path: Path) -> None:
    # Otherwise the agreement above would prove nothing.
    command("sample", "--lora", run[0], "-p", "a photo of a sks dog", "--compare", "-o", tmp_path)
    pair = np.asarray(Image.open(tmp_path / "0000_s0.png"), dtype=np.float32)
    assert np.abs(pair[:192, :192] - pair[:192, 194:]).mean() > 1


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_run(tmp_path: Path, small_pair: Pair, small_backbones: Backbones, photo_folder: Path) -> Path:
    """A finished run of two steps, whose folder a test may change."""
    file = small_toml(tmp_path, small_pair, small_backbones, train__steps=2, run__save_every=1)
    assert command("train", photo_folder, "--config", file, "-o", tmp_path / "run", "-q").code == 0
    return tmp_path / "run"


def test_a_run_goes_on_to_more_steps_with_its_folder_alone(short_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("train", "--resume", "-o", short_run, "--steps", 4, "--json")
    assert done.code == 0, done.err
    assert done.result["steps"] == 4
    assert [entry["step"] for entry in open_run(short_run).read_metrics()] == [1, 2, 3, 4]
    assert open_run(short_run).config.train.steps == 4
    assert "continuing after step 2" in done.err
    # Without any name the newest run is resumed. It is finished, and its files are written again.
    (short_run.parent / "runs").mkdir()
    short_run.rename(short_run.parent / "runs" / "run")
    monkeypatch.chdir(short_run.parent)
    assert command("train", "--resume", "-q").out == "runs/run/sks-dog.safetensors\n"


def test_a_changed_setting_is_refused_by_name_and_a_learning_rate_is_taken(short_run: Path, photo_folder: Path) -> None:
    before = (short_run / "config.toml").read_bytes()
    done = command("train", photo_folder, "--resume", "-o", short_run, "--rank", 4)
    assert (done.code, done.out) == (2, "")
    assert "adapter.rank = 2, not 4" in done.error
    done = command("train", photo_folder, "--resume", "-o", short_run, "--steps", 1)
    assert done.code == 2
    assert "--steps 2" in done.error
    assert (short_run / "config.toml").read_bytes() == before
    line = ("train", "--resume", "-o", short_run, "--steps", 3)
    done = command(*line, "--set", "adapter.strength=2")
    assert done.code == 2
    assert "adapter.strength = 1.0, not 2" in done.error
    assert command(*line, "--lr", "1e-5", "--set", "train.discriminator_lr=1e-6", "-q").code == 0
    assert [entry["lr_student"] for entry in open_run(short_run).read_metrics()] == [1e-3, 1e-3, 1e-5]
    assert [entry["lr_discriminators"] for entry in open_run(short_run).read_metrics()] == [1e-3, 1e-3, 1e-6]


def test_other_photos_than_the_run_was_trained_on_are_refused(
    short_run: Path, photo_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "fewer").mkdir()
    for index in range(3):
        name = f"photo-{index}.jpg"
        (tmp_path / "fewer" / name).write_bytes((photo_folder / name).read_bytes())
    done = command("train", tmp_path / "fewer", "--resume", "-o", short_run, "--steps", 3)
    assert done.code == 2
    assert "4 photos" in done.error


def test_an_output_that_exists_is_refused_without_overwrite(
    short_run: Path, photo_folder: Path, tmp_path: Path
) -> None:
    before = files_below(short_run)
    line = ("train", photo_folder, "--config", tmp_path / "run.toml", "-o", short_run)
    done = command(*line)
    assert (done.code, done.out) == (2, "")
    assert "--resume" in done.error
    assert "--overwrite" in done.error
    assert files_below(short_run) == before
    assert command(*line, "--overwrite", "--steps", 1, "-q").code == 0
    assert "checkpoints/step-000002/state.pt" not in files_below(short_run)
    # A folder that is not a run is never replaced.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = command("train", photo_folder, "--config", tmp_path / "run.toml", "-o", tmp_path / "mine", "--overwrite")
    assert done.code == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(short_run: Path) -> None:
    state = short_run / "checkpoints" / "step-000002" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 255
    state.write_bytes(content)
    done = command("train", "--resume", "-o", short_run, "--steps", 3)
    assert (done.code, done.out) == (1, "")
    assert "step-000002 is damaged" in done.error
    assert "--from-step 1" in done.error
    assert command("train", "--resume", "--from-step", 1, "-o", short_run, "--steps", 3, "-q").code == 0
    assert [entry["step"] for entry in open_run(short_run).read_metrics()] == [1, 2, 3]
    done = command("train", "--resume", "--from-step", 9, "-o", short_run, "--steps", 10)
    assert done.code == 2
    assert "no checkpoint of step 9" in done.error


def test_json_and_quiet_print_no_progress(short_run: Path) -> None:
    done = command("train", "--resume", "-o", short_run, "--json", "--quiet")
    assert done.err == ""
    assert {"run", "lora", "teacher_lora", "token", "steps", "seconds"} <= set(done.result)
    assert json.dumps(done.result) + "\n" == done.out


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_line(tmp_path: Path, small_pair: Pair, small_backbones: Backbones) -> tuple[object, ...]:
    """Flags of a small run into a folder that does not exist yet."""
    return ("--config", small_toml(tmp_path, small_pair, small_backbones), "-o", tmp_path / "run")


def fails(done: Done, code: int, *words: str) -> None:
    """A command ended with `code`, with these words in one last line on stderr, and nothing on stdout."""
    assert (done.code, done.out) == (code, ""), done.err
    assert done.error.startswith("error: ")
    for word in words:
        assert word in done.error


@pytest.mark.parametrize("kind", ["missing", "empty", "no picture", "file"])
def test_a_folder_without_photos_ends_with_3(kind: str, tmp_path: Path, small_line: tuple[object, ...]) -> None:
    photos = tmp_path / "photos"
    if kind == "file":
        photos.write_text("a file")
    elif kind != "missing":
        photos.mkdir()
    if kind == "no picture":
        (photos / "notes.txt").write_text("no picture")
    done = command("train", photos, *small_line)
    fails(done, 3, str(photos))
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_broken_photos_are_named_and_skipped_and_training_goes_on(
    tmp_path: Path, photo_folder: Path, small_line: tuple[object, ...]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        (photos / f"good-{index}.jpg").write_bytes((photo_folder / f"photo-{index}.jpg").read_bytes())
    (photos / "truncated.jpg").write_bytes((photo_folder / "photo-3.jpg").read_bytes()[:700])
    (photos / "zero.png").touch()
    (photos / "text.jpg").write_text("no picture")
    Image.new("1", (20000, 20000)).save(photos / "bomb.png")
    done = command("train", photos, *small_line, "--steps", 1)
    assert done.code == 0, done.err
    for name in ("truncated.jpg", "zero.png", "text.jpg", "bomb.png"):
        assert any(line.startswith(f"{name}: skipped: ") for line in done.err.splitlines())
    assert "encoding 3 photos" in done.err
    (photos / "good-2.jpg").unlink()
    fails(command("train", photos, *small_line, "--overwrite"), 3, "2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--token", "zzqq"), ("'zzqq' is", "tokens", "--text token")),
        (("--token", "dog"), ("'dog' is part of the class name", "Use a rare single token such as")),
        (("--token", "a/b"), ("'a/b'",)),
        (("--token", "sk s"), ("'sk s'", "letters, digits")),
    ],
)
def test_a_token_that_cannot_work_ends_with_2_and_a_suggestion(
    flags: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, photo_folder: Path, small_line: tuple[object, ...]
) -> None:
    fails(command("train", photo_folder, *small_line, *flags), 2, *words)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_missing_ends_with_4_and_the_command_that_fetches_it(
    tmp_path: Path, photo_folder: Path, small_line: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    teacher = ("--teacher", "nobody/has-this", "--offline")
    fails(
        command("train", photo_folder, *small_line, *teacher),
        4,
        "nobody/has-this",
        "echodistill download",
        "--teacher nobody/has-this",
    )
    fails(
        command("train", photo_folder, *small_line, "--identity", "dino"),
        4,
        "facebook/dino-vits16",
        "echodistill download",
    )
    fails(command("train", photo_folder, *small_line, "--teacher", "./no-such"), 4, "./no-such")
    assert not (tmp_path / "run").exists()


def test_half_a_model_and_one_of_another_family_end_with_4(
    tmp_path: Path,
    photo_folder: Path,
    small_pair: Pair,
    small_sdxl_pair: Pair,
    small_line: tuple[object, ...],
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for part in small_pair[1].iterdir():
        if part.name != "unet":
            (half / part.name).symlink_to(part)
    fails(command("train", photo_folder, *small_line, "--teacher", half), 4, "half/unet")
    fails(command("train", photo_folder, *small_line, "--teacher", small_sdxl_pair[1]), 4, "another family")
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(
    tmp_path: Path, photo_folder: Path, small_line: tuple[object, ...]
) -> None:
    assert command("train", photo_folder, *small_line, "--steps", 2, "--no-echo", "-q").code == 0
    kept = (tmp_path / "run" / "checkpoints" / "step-000002" / "state.pt").read_bytes()
    again = ("train", "--resume", "-o", tmp_path / "run", "--steps", 9, "--keep", 9)
    done = command(*again, "--lr", "1e30", "--teacher-lr", "1e30")
    fails(done, 1, "not finite", "Lower --lr", "--resume")
    assert any(": skipped " in line for line in done.err.splitlines())
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "state.pt").read_bytes() == kept
    # The remedy in the message works.
    back = ("train", "--resume", "--from-step", 2, "-o", tmp_path / "run", "--steps", 3)
    assert command(*back, "--lr", "1e-4", "--teacher-lr", "1e-4", "-q").code == 0


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ((), "Try --decoder tiny."),
        (("--precision", "fp32"), "Try --precision bf16."),
    ],
)
def test_an_exhausted_memory_ends_with_5_and_the_next_setting_to_try(
    flags: tuple[object, ...],
    remedy: str,
    photo_folder: Path,
    small_line: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhausted(_state: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setitem(PHASE_STEPS, JOINT, exhausted)
    done = command("train", photo_folder, *small_line, *flags)
    fails(done, 5, "Out of memory", "MiB", remedy)


def test_an_exhausted_memory_while_models_are_loaded_ends_with_5(
    tmp_path: Path, photo_folder: Path, small_line: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_arguments: object, **_more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("echodistill_cli.training.state.load_pair", exhausted)
    fails(command("train", photo_folder, *small_line), 5, "while allocating 2.00 GiB", "--batch-size")
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder_in_the_way(
    tmp_path: Path, small_pair: Pair, photo_folder: Path, small_line: tuple[object, ...]
) -> None:
    damaged = Path(shutil.copytree(small_pair[0], tmp_path / "damaged"))
    file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"].fill_(torch.nan)
    save_file(weights, file)
    line = ("train", photo_folder, *small_line)
    before = files_below(tmp_path)
    fails(command(*line, "--model", damaged), 4, "The student is damaged", "holds NaN")
    assert (files_below(tmp_path), (tmp_path / "run").exists()) == (before, False)
    assert command(*line, "--steps", 1, "--no-echo", "-q").code == 0  # without --overwrite


# --- places that cannot be written ------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Any:
    """A file system of a few pages, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_when_there_is_room(
    full_disk: Path, photo_folder: Path, small_line: tuple[object, ...]
) -> None:
    line = ("train", photo_folder, *small_line[:2], "-o", full_disk / "run")
    done = command(*line)
    fails(done, 1, "The disk is", "full: free some space", str(full_disk / "run"))
    left = files_below(full_disk)
    assert not [name for name in left if name.endswith((".tmp", ".safetensors"))]
    assert {name.replace("state.pt", "manifest.json") for name in left if "state.pt" in name} <= left
    subprocess.run(["mount", "-o", "remount,size=20m", str(full_disk)], check=True)
    done = command("train", "--resume", "-o", full_disk / "run")
    assert done.code == 0, done.err
    assert [entry["step"] for entry in open_run(full_disk / "run").read_metrics()] == [1, 2, 3, 4]


def test_a_read_only_place_is_named(full_disk: Path, photo_folder: Path, small_line: tuple[object, ...]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    done = command("train", photo_folder, *small_line[:2], "-o", full_disk / "run")
    fails(done, 1, "Read-only", "--output")


# --- the network, and real photos -------------------------------------------------------------------------------------


def test_offline_opens_no_socket(photo_folder: Path, small_line: tuple[object, ...], tmp_path: Path) -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*_arguments): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "from echodistill_cli.cli.app import main\n"
        "main(sys.argv[1:])"
    )
    line = ["train", photo_folder, *small_line, "--steps", 1, "--no-echo", "--offline"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, line)],
        capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/run/sks-dog.safetensors\n"
    # No line of another library reaches the user.
    starts = (
        "Loading ",
        "Training in ",
        "step 1/1",
        "Reading the files back",
        "Photos, previews and losses",
        "Done in ",
    )
    assert [line for line in done.stderr.splitlines() if not line.startswith(starts)] == []


@pytest.mark.photos
@pytest.mark.skipif(not (PHOTOS / "dog").is_dir(), reason="the folder of real photos is not here")
def test_real_photos_are_learned_from(small_line: tuple[object, ...]) -> None:
    done = command("train", PHOTOS / "dog", *small_line, "--steps", 1)
    assert done.code == 0, done.err
    assert "encoding 5 photos" in done.err


# --- the settings of a run, printed -----------------------------------------------------------------------------------


def test_config_prints_settings_that_give_the_same_run_when_read_back(tmp_path: Path) -> None:
    done = command("config", "--model", "mini", "--set", "train.steps=7")
    assert (done.code, done.err) == (0, "")
    (tmp_path / "run.toml").write_text(done.out, encoding="utf-8")
    assert build_config(toml_file=tmp_path / "run.toml") == build_config("mini", overrides={"train.steps": 7})
    assert command("config", "--config", tmp_path / "run.toml").out == done.out
    assert command("config", "--set", "train.steps=0").code == 2


def test_config_prints_a_json_schema() -> None:
    schema = json.loads(command("config", "--schema").out)
    assert schema["properties"]["adapter"]["properties"]["rank"]["minimum"] == 1
