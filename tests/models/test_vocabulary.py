"""What a single file does not hold: the vocabulary, the configuration, what it predicts; and CLIP's true vocabulary."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from echodistill_cli.config.families import FAMILIES
from echodistill_cli.diffusion.text import RARE_WORDS, check_token
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.single_file import prediction_in, shipped_configuration
from echodistill_cli.models.sources import find_vocabulary, vocabulary_in
from tests.helpers.commands import missing_flags
from tests.helpers.original_layout import build_sd2_pair, build_sdxl, sd2_state, sdxl_state, write
from tests.models.test_single_file import assert_equal, config, weights, without_weights

CROSS_ATTENTION = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(autouse=True)
def _empty_cache_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def header_only(path: Path, width: int, metadata: dict[str, str] | None = None, *more: str) -> Path:
    """A file that has of its UNet just enough to be recognized."""
    tensors = {name: torch.zeros(1) for name in more} | {CROSS_ATTENTION: torch.zeros(1, width)}
    save_file(tensors, path, metadata=metadata)
    return path


# --- the family, and what it predicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "family"), [(1024, "sd2"), (2048, "sdxl")])
def test_the_family_of_a_file_is_read_from_its_cross_attention(tmp_path: Path, width: int, family: str) -> None:
    folder = shipped_configuration(header_only(tmp_path / "mine.safetensors", width))
    settings = json.loads((folder / "unet" / "config.json").read_text())
    assert (folder.name, settings["cross_attention_dim"]) == (family, width)


def test_a_file_of_stable_diffusion_1_is_refused_by_name(tmp_path: Path) -> None:
    file = header_only(tmp_path / "dreamshaper.safetensors", 768)
    with pytest.raises(ModelError, match=r"dreamshaper\.safetensors is a Stable Diffusion 1 model.*sd_turbo"):
        load_pair(config(file, file))


def test_a_file_of_no_known_family_asks_for_its_configuration(tmp_path: Path) -> None:
    file = header_only(tmp_path / "refiner.safetensors", 1280)
    with pytest.raises(ModelError, match=r"family of its weights is unknown.*--set model\.single_file_config="):
        load_pair(config(file, file))


@pytest.mark.parametrize(
    ("metadata", "marker", "prediction"),
    [
        ({}, (), None),
        ({}, ("v_pred",), "v_prediction"),
        ({"modelspec.prediction_type": "v"}, (), "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction"),
    ],
)
def test_what_a_file_predicts_is_read_where_it_says_so(
    tmp_path: Path, metadata: dict[str, str], marker: tuple[str, ...], prediction: str | None
) -> None:
    assert prediction_in(header_only(tmp_path / "mine.safetensors", 1024, metadata, *marker)) == prediction


def test_what_a_person_says_of_the_prediction_goes_before_the_files(tmp_path: Path) -> None:
    student, teacher = build_sd2_pair(tmp_path / "sd2")
    pair = load_pair(config(student, teacher, student_prediction="v_prediction", teacher_prediction="epsilon"))
    assert pair.student.schedule.prediction_type == "v_prediction"
    assert pair.teacher.schedule.prediction_type == "epsilon"


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def in_cache(cache: Path, owner: str, vocabulary: Path, place: str) -> None:
    folder = cache / f"models--{owner.replace('/', '--')}" / "snapshots" / "0123abc" / place
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(vocabulary / name, folder)


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.random_models import small_tokenizer

    folder = tmp_path_factory.mktemp("words")
    small_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("owner", "place"),
    [("stabilityai/sdxl-turbo", "tokenizer"), ("openai/clip-vit-large-patch14", "")],
)
def test_the_vocabulary_is_found_in_the_cache_of_any_model_that_has_it(
    tmp_path: Path, small_vocabulary: Path, owner: str, place: str
) -> None:
    in_cache(tmp_path / "cache", owner, small_vocabulary, place)
    found = find_vocabulary(offline=True)
    assert CLIPTokenizer.from_pretrained(found)("a dog").input_ids


def test_without_a_vocabulary_both_ways_to_get_one_are_named() -> None:
    both_ways = r"not in the cache.*hf download stabilityai/sd-turbo.*--set model\.tokenizer=DIR"
    with pytest.raises(ModelError, match=both_ways) as caught:
        find_vocabulary(offline=True)
    assert missing_flags(str(caught.value.hint), "train", "sample", "evaluate", "export") <= {"--set"}


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.tokenizer: .*neither vocab\.json.*--set model\.tokenizer=DIR"):
        vocabulary_in(tmp_path)


def test_a_vocabulary_of_another_model_pads_as_the_family_does(tmp_path: Path, small_vocabulary: Path) -> None:
    folder = build_sdxl(tmp_path / "sdxl")
    pair = load_pair(config(folder, folder, tokenizer=str(small_vocabulary)), teacher=False)
    assert [tokenizer.pad_token for tokenizer in pair.encoder.tokenizers] == ["<|endoftext|>", "!"]
    assert [tokenizer.model_max_length for tokenizer in pair.encoder.tokenizers] == [32, 32]
    student = build_sd2_pair(tmp_path / "sd2")[0]
    pair = load_pair(config(student, student, tokenizer=str(small_vocabulary)), teacher=False)
    assert [tokenizer.pad_token for tokenizer in pair.encoder.tokenizers] == ["!"]


@pytest.mark.parametrize(("folder", "name"), [("sd2", "sd2"), ("sdxl", "sdxl")])
def test_a_single_file_of_a_known_family_needs_nothing_but_a_vocabulary(
    tmp_path: Path, small_vocabulary: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    # The true configurations want true-size weights; here the shipped ones are those of a small pair.
    model = build_sd2_pair(tmp_path / folder)[0] if folder == "sd2" else build_sdxl(tmp_path / folder)
    shipped = without_weights(model, tmp_path / "shipped" / name)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(shipped / part, ignore_errors=True)
    monkeypatch.setattr("echodistill_cli.models.single_file._SHIPPED", tmp_path / "shipped")
    families = {32: FAMILIES["sd"], 80: FAMILIES["sdxl"]}
    monkeypatch.setattr("echodistill_cli.models.single_file.family_of_width", families.get)
    state = sd2_state(model) if folder == "sd2" else sdxl_state(model)
    file = write(tmp_path / "mine.safetensors", state)
    with pytest.raises(ModelError, match="holds no vocabulary"):
        load_pair(config(file, file), teacher=False)
    found = load_pair(config(file, file, tokenizer=str(small_vocabulary)))
    assert_equal(weights(found), weights(load_pair(config(model, model))))
    assert found.student.schedule.prediction_type == "epsilon"


# --- CLIP's own -------------------------------------------------------------------------------------------------------


def published_vocabulary() -> Path | None:
    """CLIP's file as open_clip's wheel ships it; the package itself is never imported."""
    if named := os.environ.get("CLIP_BPE_FILE"):
        return Path(named)
    found = importlib.util.find_spec("open_clip")
    places = (found.submodule_search_locations or []) if found else []
    files = (Path(place) / "bpe_simple_vocab_16e6.txt.gz" for place in places)
    return next((file for file in files if file.is_file()), None)


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    file = published_vocabulary()
    if file is None:
        pytest.skip("CLIP's vocabulary is not here: set CLIP_BPE_FILE to open_clip's bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    from tests.helpers.random_models import byte_letters

    # OpenAI lists the bytes that print first.
    letters = sorted(byte_letters(), key=lambda letter: ord(letter) > 255)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def test_the_true_vocabulary_gives_openais_ids(clip_tokenizer: CLIPTokenizer) -> None:
    assert len(clip_tokenizer) == 49408
    assert clip_tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_rare_words_we_suggest_are_single_tokens_of_it(clip_tokenizer: CLIPTokenizer) -> None:
    assert clip_tokenizer("sks", add_special_tokens=False).input_ids == [48136]
    assert clip_tokenizer("ohwx", add_special_tokens=False).input_ids == [47993]
    for word in RARE_WORDS:
        check_token(clip_tokenizer, word, "dog", learned=False)


def test_a_word_of_two_tokens_is_refused_with_a_suggestion(clip_tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"--token 'zwx' is 2 tokens.*such as 'sks'.*--text token"):
        check_token(clip_tokenizer, "zwx", "dog", learned=False)
    check_token(clip_tokenizer, "zwx", "dog", learned=True)
    with pytest.raises(ConfigError, match="already means something"):
        check_token(clip_tokenizer, "backpack", "dog", learned=False)
