"""`echodistill evaluate`: what is measured, with which eyes, what is reused, and what cannot be measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_cli.data.prompts import EVALUATION_TEMPLATES, fill
from echodistill_cli.evaluation.evaluate import score_encoder_names
from echodistill_cli.models.downloads import CLIP, DINO
from echodistill_cli.models.vision import ClipScorer, DinoScorer
from tests.helpers.commands import command, files_below, overriding, trained_run, without_a_network
from tests.helpers.random_models import CLIP_SEES, DINO_SEES, build_score_encoders

Pair = tuple[Path, Path]
Backbones = dict[str, Path]
ScoreEncoders = tuple[Path, Path]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, small_backbones: Backbones) -> ScoreEncoders:
    """See `build_score_encoders`; not to be written to."""
    return build_score_encoders(tmp_path_factory.mktemp("encoders"), small_backbones)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, small_pair: Pair, small_backbones: Backbones, photo_folder: Path
) -> Path:
    """A finished run; not to be written to."""
    return trained_run(tmp_path_factory.mktemp("work"), small_pair, small_backbones, photo_folder)


@pytest.fixture
def flags(run: Path, encoders: ScoreEncoders, photo_folder: Path, tmp_path: Path) -> list[object]:
    """Arguments with which an evaluation of two prompts works and writes below tmp_path."""
    (tmp_path / "prompts.txt").write_text("a {} on the beach\n\n  the {subject} in snow\n", encoding="utf-8")
    clip, dino = encoders
    where = ["--photos", photo_folder, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out"]
    return [run, *where, "--clip", clip, "--dino", dino, "--seeds", 2]


def apart(found: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """All that an evaluation says beside its scores, and those: of the whole, then of each prompt."""
    names, rows = ("clip_i", "dino", "clip_t"), [found, *found["per_prompt"]]
    rest = [{key: value for key, value in row.items() if key not in (*names, "per_prompt")} for row in rows]
    return rest, [row[name] for row in rows for name in names]


def pictures(folder: Path) -> dict[str, int]:
    """The drawn pictures, with the time of writing."""
    return {file.name: file.stat().st_mtime_ns for file in (folder / "pictures").glob("*/*.png")}


# --- the encoders -----------------------------------------------------------------------------------------------------


def seen(image: Image.Image, size: tuple[int, int], how: Image.Resampling, sees: dict[str, Any]) -> torch.Tensor:
    """A picture resized, cropped to the middle 32 x 32 and normalized, by hand: [1, 3, 32, 32]."""
    resized = image.resize(size, how)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float64) / 255
    normal = (pixels - np.array(sees["image_mean"])) / np.array(sees["image_std"])
    return torch.tensor(normal, dtype=torch.float32).permute(2, 0, 1).unsqueeze(0)


def test_the_encoders_preprocess_images_as_their_own_files_say(encoders: ScoreEncoders) -> None:
    from transformers import CLIPModel, ViTModel

    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    wide = Image.fromarray(noise)
    clip, dino = ClipScorer(encoders[0], torch.device("cpu")), DinoScorer(encoders[1], torch.device("cpu"))

    pixels = seen(wide, (48, 32), Image.Resampling.BICUBIC, CLIP_SEES)
    assert torch.allclose(clip.pixels([wide]), pixels, atol=1e-5)
    ids = clip.tokenizer(["a dog", "a dog on the beach"], padding=True, return_tensors="pt")
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(encoders[0])(pixel_values=pixels, **ids)
    for ours, theirs in (
        (clip.embed([wide]), whole.image_embeds),
        (clip.embed_texts(["a dog", "a dog on the beach"]), whole.text_embeds),
    ):
        assert torch.allclose(torch.nn.functional.normalize(ours, dim=-1), theirs, atol=1e-5)

    pixels = seen(wide, (32, 32), Image.Resampling.BILINEAR, DINO_SEES)
    assert torch.allclose(dino.pixels([wide]), pixels, atol=1e-5)
    with torch.no_grad():
        states = ViTModel.from_pretrained(encoders[1], add_pooling_layer=False)(pixel_values=pixels).last_hidden_state
    assert torch.allclose(dino.embed([wide]), states[:, 0], atol=1e-5)


def test_a_text_that_is_too_long_for_clip_is_cut_off(encoders: ScoreEncoders) -> None:
    assert ClipScorer(encoders[0], torch.device("cpu")).embed_texts(["dog " * 100]).shape == (1, 24)


def test_the_encoders_are_the_papers_unless_the_student_is_of_the_package() -> None:
    assert score_encoder_names("auto", "auto", ["stabilityai/sd-turbo", "sd-turbo"]) == (CLIP, DINO)
    assert score_encoder_names("auto", "auto", ["mini:student", ""]) == ("mini:clip", "mini:vit")
    assert score_encoder_names("auto", "auto", ["folder", "mini:student"]) == ("mini:clip", "mini:vit")
    assert score_encoder_names("a", "b", ["mini:student"]) == ("a", "b")


# --- an evaluation ----------------------------------------------------------------------------------------------------


def test_a_run_is_measured_and_the_result_says_on_what_it_hangs(flags: list[object], tmp_path: Path) -> None:
    done = command("evaluate", *flags, "--json")
    assert done.code == 0, done.err
    found = done.result
    assert (found["subject"], found["photos"], found["pictures"]) == ("sks dog", 4, 4)
    assert [one["prompt"] for one in found["per_prompt"]] == ["a sks dog on the beach", "the sks dog in snow"]
    assert [one["text"] for one in found["per_prompt"]] == ["a dog on the beach", "the dog in snow"]
    for name in ("clip_i", "dino", "clip_t"):
        assert -1 <= found[name] <= 1
        assert found[name] == pytest.approx(sum(one[name] for one in found["per_prompt"]) / 2)
    assert 0 < found["photos_own"]["dino"] < 1
    expected = {"lora": "sks-dog.safetensors", "steps": "1", "guidance_scale": "0", "seed": 0, "count": 2}
    expected |= {"role": "student", "clip": "clip", "dino": "dino"}
    assert expected.items() <= found["settings"].items()
    assert found["settings"]["model"]["student"] == "student"
    assert {"echodistill", "torch", "transformers", "diffusers"} <= set(found["versions"])
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert found == {"file": str(tmp_path / "out" / "evaluation.json"), **written}
    assert str(tmp_path) not in json.dumps(written)


def test_the_scores_are_those_of_a_plain_loop_over_the_pictures(
    flags: list[object], encoders: ScoreEncoders, photo_folder: Path, tmp_path: Path
) -> None:
    found = command("evaluate", *flags, "--json").result
    device = torch.device("cpu")
    clip, dino = ClipScorer(encoders[0], device), DinoScorer(encoders[1], device)
    photos = [Image.open(file).convert("RGB") for file in sorted(photo_folder.glob("*.jpg"))]
    drawn = [Image.open(file) for file in sorted((tmp_path / "out" / "pictures").glob("*/a-sks-dog-on-the-beach*"))]
    assert [image.info["seed"] for image in drawn] == ["0", "1"]

    def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
        return float(first @ second / (first.norm() * second.norm()))

    first = found["per_prompt"][0]
    for name, scorer in (("clip_i", clip), ("dino", dino)):
        pairs = [cosine(scorer.embed([one])[0], scorer.embed([photo])[0]) for one in drawn for photo in photos]
        assert first[name] == pytest.approx(sum(pairs) / 8, abs=1e-5)
        own = [cosine(scorer.embed([a])[0], scorer.embed([b])[0]) for a in photos for b in photos if a is not b]
        assert found["photos_own"][name] == pytest.approx(sum(own) / 12, abs=1e-5)
    text = clip.embed_texts(["a dog on the beach"])[0]
    asked = [cosine(clip.embed([one])[0], text) for one in drawn]
    assert first["clip_t"] == pytest.approx(sum(asked) / 2, abs=1e-5)


def test_prompts_that_were_cut_off_are_reported_for_images_that_exist_too(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(f"a photo of a {{}} {'in deep snow ' * 40}beyond\n")
    line = overriding(flags, "--prompts", tmp_path / "long.txt")
    first, second = (command("evaluate", *line) for _ in range(2))
    assert (first.code, second.code) == (0, 0), second.err
    assert "images exist already" in second.err
    for done in (first, second):
        assert "is too long" in done.err
        assert "beyond" in done.err


def test_pictures_are_reused_and_only_what_is_missing_is_drawn(flags: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = command("evaluate", *flags, "--json")
    before = pictures(out)
    assert len(before) == 4
    second = command("evaluate", *flags, "--json")
    assert second.result == first.result
    assert pictures(out) == before
    assert "4 images exist already" in second.err
    assert "Replacing the earlier" in second.err
    assert "Loading" not in second.err

    lost = next(file for file in (out / "pictures").glob("*/a-sks-dog-on-the-beach*_s1.png"))
    lost.unlink()
    third = command("evaluate", *flags, "--json", "-q")
    assert third.err == ""
    (told, scores), (told_first, scores_first) = (apart(done.result) for done in (third, first))
    assert told == told_first
    assert scores == pytest.approx(scores_first, abs=1e-4)  # in another batch a pixel may be rounded to the next level
    after = pictures(out)
    assert {name for name in before if after[name] != before[name]} == {n for n in before if "beach" in n}


def test_another_way_of_drawing_has_its_own_pictures_and_scores(flags: list[object], tmp_path: Path) -> None:
    trained = command("evaluate", *flags, "--json").result
    base = command("evaluate", *flags, "--lora-scale", 0, "--json").result
    assert base["clip_i"] != trained["clip_i"]
    assert base["photos_own"] == trained["photos_own"]
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2


def test_a_person_sees_a_row_per_prompt_the_whole_and_the_photos_own(flags: list[object], tmp_path: Path) -> None:
    done = command("evaluate", *flags)
    assert done.code == 0, done.err
    for words in (
        "CLIP-I",
        "DINO",
        "CLIP-T",
        "a sks dog on the beach",
        "all 4 images",
        "no upper limit: the 4 photos among",
    ):
        assert words in done.out
    assert done.out.splitlines()[-1] == str(tmp_path / "out" / "evaluation.json")
    assert "image 4/4" in done.err


def test_the_newest_run_is_meant_and_a_lora_file_needs_its_model(
    run: Path, flags: list[object], small_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = [*flags[1:5], *flags[7:]]  # without -o
    shutil.copytree(run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    newest = command("evaluate", *rest, "--json").result
    assert Path(newest["file"]) == Path("runs/mine/evaluation/evaluation.json")

    alone = tmp_path / "alone" / "dog.safetensors"
    alone.parent.mkdir()
    shutil.copy(run / "sks-dog.safetensors", alone)
    done = command("evaluate", alone, *rest)
    assert (done.code, done.out) == (2, "")
    assert "--model" in done.error
    ours = ["--model", small_pair[0], "--size", 64, "--device", "cpu", "--offline", "--json"]
    found = command("evaluate", alone, *rest, *ours).result
    assert Path(found["file"]) == alone.parent / "dog-evaluation" / "evaluation.json"
    assert found["subject"] == "sks dog"
    assert found["dino"] == pytest.approx(newest["dino"], abs=1e-3)

    bare = tmp_path / "bare"
    assert command("export", run, "--no-metadata", "-o", bare, "-q").code == 0
    done = command("evaluate", bare / "sks-dog.safetensors", *rest, *ours)
    assert (done.code, "--token sks" in done.error) == (2, True)
    done = command("evaluate", bare / "sks-dog.safetensors", *rest, *ours, "--token", "sks")
    assert (done.code, "--class-name dog" in done.error) == (2, True)
    done = command("evaluate", bare / "sks-dog.safetensors", *rest, *ours, "--token", "sks", "--class-name", "cat")
    assert done.result["per_prompt"][0]["text"] == "a cat on the beach"


def test_our_own_prompts_have_a_place_for_the_subject_each() -> None:
    assert len(set(EVALUATION_TEMPLATES)) == 16
    assert all(fill(template, "") != template for template in EVALUATION_TEMPLATES)
    assert fill("a {} and {subject}", "sks dog") == "a sks dog and sks dog"


# --- what cannot be measured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("--photos", "nowhere"), 3, "nowhere does not exist"),
        (("--clip", "nobody/has-this@main", "--offline"), 4, "hf download nobody/has-this --revision main"),
        (("--dino", "nobody/has-this", "--offline"), 4, "nobody/has-this is not in the cache"),
        (("--device", "cuda:99"), 2, "--device auto"),
        (("--prompts", "nowhere.txt"), 2, "nowhere.txt: it cannot be read"),
        (("--subject", "dog2"), 2, "--subject has no effect without --dreambench"),
        (("--dreambench", "nowhere"), 2, "RUN|LORA cannot be combined with --dreambench"),
    ],
)
def test_what_cannot_be_measured_ends_with_one_line_and_no_result(
    flags: list[object], tmp_path: Path, change: tuple[object, ...], code: int, words: str
) -> None:
    done = command("evaluate", *overriding(flags, *change, "-q"))
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), done.err
    assert words in done.err
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ((), "nobody/has-this is not in the cache, and this is offline"),
        (("--offline",), "nobody/has-this is not in the cache, and this is offline"),
        (("--no-offline",), "nobody/has-this is not in the cache, and the hub cannot be reached"),
    ],
)
def test_a_run_that_was_trained_offline_is_measured_so_unless_no_offline_is_said(
    flags: list[object], monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...], words: str
) -> None:
    without_a_network(monkeypatch)
    done = command("evaluate", *overriding(flags, "--clip", "nobody/has-this", *how))
    assert (done.code, done.out) == (4, "")
    assert words in done.error


@pytest.mark.parametrize("flag", ["--clip", "--dino"])
def test_a_damaged_encoder_ends_with_4(flags: list[object], tmp_path: Path, flag: str) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    done = command("evaluate", *overriding(flags, flag, tmp_path / "damaged", "-q"))
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1), done.err


def test_a_damaged_earlier_result_is_replaced(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("{")
    found = command("evaluate", *flags, "--json").result
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["dino"] == found["dino"]


def test_templates_are_read_as_prompts_of_sample_are(flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na {} at sea\n", encoding="utf-8-sig")
    done = command("evaluate", *flags, "--json")
    assert [one["prompt"] for one in done.result["per_prompt"]] == ["a sks dog at sea"]
    (tmp_path / "prompts.txt").write_text("a {} at sea --w 512\n")
    assert "line 1 holds the option --w" in command("evaluate", *flags).error


def test_photos_are_those_of_the_training_unless_others_are_named(
    run: Path, flags: list[object], tmp_path: Path, small_pair: Pair
) -> None:
    own = [word for index, word in enumerate(flags) if "--photos" not in flags[max(index - 1, 0) : index + 1]]
    assert command("evaluate", *own, "--json").result["photos"] == 4
    alone = Path(shutil.copy(run / "sks-dog.safetensors", tmp_path / "dog.safetensors"))
    done = command("evaluate", alone, "--model", small_pair[0], "--size", 64, "--offline")
    assert (done.code, done.out) == (2, "")
    assert "--photos DIR" in done.error


@pytest.mark.parametrize(("text", "words"), [("a dog on the beach\n", "no place for the subject"), ("\n", "no prompt")])
def test_prompts_without_a_subject_are_refused(flags: list[object], tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    done = command("evaluate", *flags)
    assert (done.code, done.out) == (2, "")
    assert words in done.error
    assert "{}" in done.error


@pytest.mark.parametrize(
    ("flag", "without", "words"),
    [
        ("--clip", "tokenizer_config.json vocab.json merges.txt", "it has no tokenizer"),
        ("--clip", "preprocessor_config.json", "it has no preprocessor_config.json"),
        ("--dino", "preprocessor_config.json", "it has no preprocessor_config.json"),
        ("--dino", "model.safetensors", "the .safetensors file is missing"),
    ],
)
def test_a_part_that_an_encoder_lacks_is_named_before_anything_is_drawn(
    flags: list[object], encoders: ScoreEncoders, tmp_path: Path, flag: str, without: str, words: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(encoders[flag == "--dino"], broken)
    for name in without.split():
        (broken / name).unlink()
    done = command("evaluate", *overriding(flags, flag, broken))
    assert (done.code, done.out) == (4, "")
    assert words in done.error
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_another_kind_or_with_lost_weights_is_refused(
    flags: list[object], encoders: ScoreEncoders, small_backbones: Backbones, tmp_path: Path
) -> None:
    done = command("evaluate", *overriding(flags, "--clip", small_backbones["clip"]))
    assert (done.code, done.out) == (4, "")
    assert "'clip_vision_model'" in done.error
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(encoders[0], broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = command("evaluate", *overriding(flags, "--clip", broken))
    assert (done.code, done.out) == (4, "")
    assert "text_projection.weight" in done.error


def test_a_damaged_picture_is_named(flags: list[object], tmp_path: Path) -> None:
    assert command("evaluate", *flags).code == 0
    damaged = next((tmp_path / "out" / "pictures").glob("*/*_s1.png"))
    damaged.write_bytes(b"not a picture")
    done = command("evaluate", *flags)
    assert (done.code, done.out) == (1, "")
    assert damaged.name in done.error
    assert not [name for name in files_below(tmp_path / "out") if name.endswith(".tmp")]
