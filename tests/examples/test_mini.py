"""The embedded pair: complete, small, openable by diffusers, and really drawing what it is asked for."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.errors import ModelError
from echodistill_cli.models.downloads import Source, downloads
from echodistill_cli.models.sources import embedded_folder, resolve, where
from examples.benchmark.measure import JUDGE
from examples.mini_world.judges import Examiner
from examples.mini_world.nouns import CORE
from examples.mini_world.places import PLACES
from examples.mini_world.score import STUDENT, TEACHER, Asked, drawn, every_scene
from tests.helpers.commands import Done, command

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "examples" / "photos"


def test_the_embedded_models_are_found_by_name_and_nothing_is_downloaded() -> None:
    assert (embedded_folder("mini:student") / "model_index.json").is_file()
    assert resolve("mini:identity", ("",)) == embedded_folder("mini:identity")
    assert where("mini:teacher") == "in the package"
    assert downloads(Source("mini:student", ("unet", "vae"))) == []
    with pytest.raises(ModelError, match="no model of this name") as caught:
        resolve("mini:teecher", ("unet",))
    assert "mini:teacher" in str(caught.value.hint)


def test_the_embedded_models_are_small_and_say_where_they_come_from() -> None:
    home = embedded_folder("mini:student").parent
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 54e6
    notice = (home / "NOTICE").read_text()
    assert all(name in notice for name in ("Noto", "Twemoji", "EmojiOne", "Fluent", "CC BY 4.0", "MIT", "Apache"))


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_diffusers_opens_the_pair_as_it_is(name: str) -> None:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    # Both share text encoder, tokenizer and VAE, which stand in the student's folder.
    unet = UNet2DConditionModel.from_pretrained(embedded_folder(f"mini:{name}") / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_folder("mini:student"), unet=unet, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("a photo of a frog on the beach", num_inference_steps=1, guidance_scale=0.0, output_type="np")
    assert drawn.images.shape == (1, 64, 64, 3)
    assert drawn.images.std() > 0.1


def shares(pictures: np.ndarray, asked: list[Asked]) -> tuple[float, float]:
    reading = Examiner(JUDGE).read(pictures)
    return reading.right("noun", [one.noun for one in asked]), reading.right("place", [one.place for one in asked])


def test_the_student_draws_nouns_in_places_in_one_step(mini_pair: ModelPair) -> None:
    asked = every_scene()[: len(CORE) * len(PLACES) : 4]  # every noun and every place, not all of their pairs
    noun, place = shares(drawn(mini_pair, asked, [*range(len(asked))], STUDENT), asked)
    assert noun >= 0.75
    assert place >= 0.9


def test_the_teacher_draws_them_in_many(mini_pair: ModelPair) -> None:
    asked = every_scene()[: len(CORE) * len(PLACES) : 7]
    noun, place = shares(drawn(mini_pair, asked, [*range(len(asked))], replace(TEACHER, steps=12)), asked)
    assert noun >= 0.85
    assert place >= 0.9


# Every phase of the preset, each as short as possible.
SHORT = """
[concept]
views = 4
class_prompts = ["a red {}", "a {} far away"]
[train]
steps = 2
head_start = 1
first_targets = 1
replays = 1
batch_size = 1
[echo]
start = 1
candidates = 4
carry_back = 1
[run]
sample_every = 2
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run on the example photos, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "short.toml").write_text(SHORT)
    settings = ("--config", folder / "short.toml", "--model", "mini", "-o", folder / "run", "--offline", "--json")
    done = command("train", PHOTOS, "--class-name", "dog", *settings)
    assert done.code == 0, done.err
    return folder / "run", done


def test_a_run_on_the_example_photos_needs_nothing_but_the_package(trained: tuple[Path, Done], tmp_path: Path) -> None:
    run, done = trained
    assert "64-pixel toy" in done.err
    assert done.result["steps"] == 2
    drawn = command("sample", "--lora", run, "--prompt", "a sks dog in the snow", "-o", tmp_path / "out", "--json")
    assert drawn.code == 0, drawn.err
    assert len(drawn.result["files"]) == 1


def test_what_a_run_writes_says_that_no_other_tool_has_the_pair(trained: tuple[Path, Done]) -> None:
    run = trained[0]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "Only echodistill generates images with this LoRA" in card
    assert "ComfyUI" not in card
    assert "from_pretrained" not in card
    sidecar = json.loads((run / "sks-dog.json").read_text(encoding="utf-8"))
    assert sidecar["sd version"] == "Unknown"
    assert sidecar["notes"].startswith("in echodistill only, 1 step")
    found = command("inspect", run / "sks-dog.safetensors", "--json")
    assert {one["loads"] for one in found.result["readers"] if one["reader"] != "diffusers"} == {"no"}


def test_the_cards_command_generates_an_image_in_the_runs_folder(
    trained: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = re.findall(r"^echodistill (sample .*)$", (trained[0] / "README.md").read_text(encoding="utf-8"), re.M)
    monkeypatch.chdir(trained[0])
    done = command(*shlex.split(line), "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert len(done.result["files"]) == 1


def test_evaluate_uses_the_embedded_encoders(trained: tuple[Path, Done], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a {} on the beach\na photo of a {} in the snow\n")
    found = command("evaluate", trained[0], "--photos", PHOTOS, "--prompts", prompts, "--seeds", 1, "--json")
    assert found.code == 0, found.err
    assert "mini:clip" in found.out
