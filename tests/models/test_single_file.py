"""One-file checkpoints in the original layout: reading gives a folder's weights, writing gives the published names."""

from __future__ import annotations

import json
import shutil
import socket
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import echodistill_cli
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.errors import ModelError
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.single_file import prediction_in, sd_checkpoint, sdxl_checkpoint, shipped_configuration
from tests.helpers.models import assert_equal, model_config, weights, without_weights
from tests.helpers.original_layout import build_sd2_pair, build_sdxl, sd2_state, sdxl_state, write
from tests.helpers.random_models import small_tokenizer

State = dict[str, Tensor]
CONFIGURATIONS = Path(echodistill_cli.__file__).parent / "models" / "configurations"
CROSS_ATTENTION = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_sd2_pair(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def settings(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's folder without its weights."""
    return without_weights(folders[0], tmp_path_factory.mktemp("settings") / "student")


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> ModelPair:
    """The pair as the folders give it."""
    return load_pair(model_config(*folders))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_student_and_teacher_from_single_files_are_those_of_the_folders(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = (write(tmp_path / f"{folder.name}.safetensors", sd2_state(folder)) for folder in folders)
    teacher_settings = str(without_weights(folders[1], tmp_path / "teacher-settings"))
    found = load_pair(model_config(student, teacher, settings, teacher_single_file_config=teacher_settings))
    assert not caplog.messages
    assert_equal(weights(found), weights(pair))
    assert found.student.schedule.prediction_type == "epsilon"
    assert found.teacher.schedule.prediction_type == "v_prediction"
    prompts = ["a photo of sks dog", ""]
    assert torch.equal(found.encoder.encode(prompts).hidden, pair.encoder.encode(prompts).hidden)
    modules = (found.student.unet, found.codec.encoder, *found.encoder.encoders)
    assert not any(module.training for module in modules)
    assert not any(weight.requires_grad for module in modules for weight in module.parameters())


def test_an_sd2_file_written_by_the_code_of_sdxl_is_read_too(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path
) -> None:
    state = sd2_state(folders[0], text_prefix="conditioner.embedders.0.model.")
    file = write(tmp_path / "student.safetensors", state)
    found = load_pair(model_config(file, file, settings), teacher=False)
    assert_equal(weights(found), weights(replace(pair, loaded_teacher=None)))


def test_a_folder_and_a_single_file_make_a_pair(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path
) -> None:
    student = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    found = load_pair(model_config(student, folders[1], settings))
    assert_equal(weights(found), weights(pair))
    assert found.teacher.schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_half_precision_file_gives_the_rounded_weights(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path, precision: str
) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]), torch.float16)
    found = weights(load_pair(model_config(file, file, settings, precision=precision), teacher=False))
    expected = weights(replace(pair, loaded_teacher=None))
    assert_equal(
        {name: value.float() for name, value in found.items()},
        {name: value.half().float() for name, value in expected.items()},
    )
    assert found["text 0 final_layer_norm.weight"].dtype is (torch.float16 if precision == "fp16" else torch.float32)


def test_sdxl_with_both_text_encoders_comes_from_a_single_file(tmp_path: Path) -> None:
    folder = build_sdxl(tmp_path / "sdxl")
    file = write(tmp_path / "student.safetensors", sdxl_state(folder))
    settings = without_weights(folder, tmp_path / "settings")
    expected = load_pair(model_config(folder, folder), teacher=False)
    found = load_pair(model_config(file, file, settings), teacher=False)
    assert found.family == "sdxl"
    assert_equal(weights(found), weights(expected))


def test_the_configuration_may_be_a_hub_id_of_which_only_the_small_files_are_cached(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--student"
    without_weights(settings, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    found = load_pair(model_config(file, file, "someone/student"), teacher=False)
    assert_equal(weights(found), weights(replace(pair, loaded_teacher=None)))
    (repository / "snapshots" / "0123abc" / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"vae/config.json is not in the cache.* hf download someone/student"):
        load_pair(model_config(file, file, "someone/student"), teacher=False)
    with pytest.raises(ModelError, match="someone/else is not in the cache"):
        load_pair(model_config(file, file, "someone/else"), teacher=False)


def test_without_a_configuration_its_setting_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    with pytest.raises(ModelError, match=r"student\.safetensors.* --set model\.single_file_config=NAME") as caught:
        load_pair(model_config(file, folders[1], tokenizer=str(folders[0] / "tokenizer")))
    assert caught.value.exit_code == 4


def test_a_wrong_configuration_of_the_teachers_file_is_refused_and_its_setting_is_named(
    folders: tuple[Path, Path], small_pair: tuple[Path, Path], settings: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "teacher.safetensors", sd2_state(folders[1]))
    incomplete = without_weights(settings, tmp_path / "incomplete")
    (incomplete / "unet" / "config.json").unlink()
    cases = {
        str(small_pair[0]): r"teacher\.safetensors: its unet does not fit the configuration in",
        str(incomplete): r"incomplete/unet/config\.json is missing\.",
        str(file): r"teacher\.safetensors is a file, not a model's configuration\.",
    }
    for configuration, message in cases.items():
        with pytest.raises(ModelError, match=rf"{message}.* model\.teacher_single_file_config for the teacher"):
            load_pair(model_config(folders[0], file, teacher_single_file_config=configuration))


def lacking(state: State, start: str) -> State:
    """The state without the first weight whose name starts so."""
    gone = next(name for name in state if name.startswith(start))
    return {name: value for name, value in state.items() if name != gone}


@pytest.mark.parametrize(
    ("start", "part"),
    [
        ("model.diffusion_model.input_blocks.4.0", "unet"),
        ("first_stage_model.decoder.up.2", "vae"),
        ("cond_stage_model.model.transformer.resblocks.1", "text_encoder"),
        ("cond_stage_model.model.positional_embedding", "text_encoder"),
    ],
)
def test_a_file_that_lacks_a_weight_is_refused_by_part(
    folders: tuple[Path, Path], settings: Path, tmp_path: Path, start: str, part: str
) -> None:
    file = write(tmp_path / "student.safetensors", lacking(sd2_state(folders[0]), start))
    with pytest.raises(ModelError, match=rf"student\.safetensors: its {part} does not fit the configuration"):
        load_pair(model_config(file, file, settings), teacher=False)


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("model.", "unet"), ("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")],
)
def test_a_file_that_lacks_a_part_is_refused_by_name(
    folders: tuple[Path, Path], settings: Path, tmp_path: Path, prefix: str, part: str
) -> None:
    state = {name: value for name, value in sd2_state(folders[0]).items() if not name.startswith(prefix)}
    file = write(tmp_path / "student.safetensors", state)
    with pytest.raises(ModelError, match=rf"student\.safetensors has no {part} in the original"):
        load_pair(model_config(file, file, settings), teacher=False)


def test_the_configuration_of_another_model_is_refused(
    folders: tuple[Path, Path], small_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    with pytest.raises(ModelError, match="its unet does not fit the configuration in"):
        load_pair(model_config(file, file, small_pair[0]), teacher=False)


def test_an_incomplete_configuration_is_refused(folders: tuple[Path, Path], settings: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    for lost in ("unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        copy = without_weights(settings, tmp_path / Path(lost).parent.name)
        (copy / lost).unlink()
        with pytest.raises(ModelError, match=Path(lost).name):
            load_pair(model_config(file, file, copy), teacher=False)
    with pytest.raises(ModelError, match="is a file, not a model's configuration"):
        load_pair(model_config(file, file, file), teacher=False)


def test_a_tiny_decoder_is_not_read_from_a_single_file(
    folders: tuple[Path, Path], settings: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    with pytest.raises(ModelError, match="AutoencoderTiny cannot be read from a single file"):
        load_pair(model_config(file, file, settings, decoder="tiny", tiny_decoder=str(file)), teacher=False)


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
        load_pair(model_config(file, file))


def test_a_file_of_no_known_family_asks_for_its_configuration(tmp_path: Path) -> None:
    file = header_only(tmp_path / "refiner.safetensors", 1280)
    with pytest.raises(ModelError, match=r"family of its weights is unknown.*--set model\.single_file_config="):
        load_pair(model_config(file, file))


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
    pair = load_pair(model_config(student, teacher, student_prediction="v_prediction", teacher_prediction="epsilon"))
    assert pair.student.schedule.prediction_type == "v_prediction"
    assert pair.teacher.schedule.prediction_type == "epsilon"


@pytest.mark.parametrize(("folder", "name"), [("sd2", "sd2"), ("sdxl", "sdxl")])
def test_a_single_file_of_a_known_family_needs_nothing_but_a_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str
) -> None:
    # The shipped configurations need weights of the published size; here they are replaced by those of a small pair.
    model = build_sd2_pair(tmp_path / folder)[0] if folder == "sd2" else build_sdxl(tmp_path / folder)
    shipped = without_weights(model, tmp_path / "shipped" / name)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(shipped / part, ignore_errors=True)
    monkeypatch.setattr("echodistill_cli.models.single_file._SHIPPED", tmp_path / "shipped")
    families = {32: FAMILIES["sd"], 80: FAMILIES["sdxl"]}
    monkeypatch.setattr("echodistill_cli.models.single_file.family_of_width", families.get)
    state = sd2_state(model) if folder == "sd2" else sdxl_state(model)
    file = write(tmp_path / "mine.safetensors", state)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    small_tokenizer(vocabulary := tmp_path / "words")
    with pytest.raises(ModelError, match=r"Missing: stabilityai/sd-turbo/tokenizer\.") as caught:
        load_pair(model_config(file, file), teacher=False)
    assert "echodistill download" in str(caught.value.hint)
    found = load_pair(model_config(file, file, tokenizer=str(vocabulary)))
    assert_equal(weights(found), weights(load_pair(model_config(model, model))))
    assert found.student.schedule.prediction_type == "epsilon"


# --- the names that are written, at the published sizes ---------------------------------------------------------------


def states(family: str) -> list[State]:
    """The published models' weights without memory: UNet, VAE, text encoders."""

    def settings(part: str) -> dict[str, Any]:
        values = json.loads((CONFIGURATIONS / family / part / "config.json").read_text())
        return {key: value for key, value in values.items() if not key.startswith("_")}

    with torch.device("meta"):
        models = [
            UNet2DConditionModel(**settings("unet")),
            AutoencoderKL(**settings("vae")),
            CLIPTextModel(CLIPTextConfig(**settings("text_encoder"))),
        ]
        if family == "sdxl":
            models.append(CLIPTextModelWithProjection(CLIPTextConfig(**settings("text_encoder_2"))))
    return [model.state_dict() for model in models]


def test_sdxl_has_as_many_tensors_as_the_published_file() -> None:
    named = sdxl_checkpoint(*states("sdxl"))
    parts = Counter(".".join(name.split(".")[:2]) if "cond" in name else name.split(".")[0] for name in named)
    # stabilityai/sd_xl_base_1.0.safetensors: 2,515.
    assert parts == {
        "model": 1680,
        "first_stage_model": 248,
        "conditioner.embedders": 587,
    }
    for name, shape in {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.bias": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }.items():
        assert tuple(named[name].shape) == shape, name


def test_sd2_has_the_whole_of_openclip_with_its_last_layer() -> None:
    named = sd_checkpoint(*states("sd2"))
    assert Counter(name.split(".")[0] for name in named) == {
        "model": 686,
        "first_stage_model": 248,
        "cond_stage_model": 294,
    }
    for name, shape in {
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.positional_embedding": (77, 1024),
    }.items():
        assert tuple(named[name].shape) == shape, name


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_text_encoder_of_either_transformers_layout_gets_the_same_names(family: str) -> None:
    unet, vae, *encoders = states(family)
    mapped = sd_checkpoint if family == "sd2" else sdxl_checkpoint
    flat = [{name.removeprefix("text_model."): value for name, value in state.items()} for state in encoders]
    wrapped = [
        {name if "text_projection" in name else f"text_model.{name}": value for name, value in state.items()}
        for state in flat
    ]
    assert mapped(unet, vae, *flat).keys() == mapped(unet, vae, *wrapped).keys()
