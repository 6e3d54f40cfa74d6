"""LoRA and token files: keys, strength, header, atomic writing, and what is said about a bad file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.errors import ConfigError, EchoDistillError, ModelError
from echodistill_cli.lora import keys as lora_keys
from echodistill_cli.lora.header import LoraHeader, header
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import read_tensors, serialize, write_safetensors
from echodistill_cli.lora.tensors import LoraWeights, adapter_metadata, diffusers_tensors, kohya_tensors, token_tensors
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import fold_lora
from tests.helpers.runs import export_files

TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1"]
CARD = LoraHeader(
    name="sks-dog",
    family="sd",
    base_model="/home/somebody/models/sd-turbo",
    token="sks",
    class_name="dog",
    trigger="sks dog",
    rank=4,
    alpha=8.0,
    resolution=512,
    steps=1000,
    seed=7,
    photos=5,
    role="student",
    prediction_type="epsilon",
    usage="1 step, guidance 0, 512x512, use with SD-Turbo.",
    config_sha256="ab" * 32,
    version="0.1.0",
    started_at=1.7e9,
    finished_at=1.7e9 + 60,
    cover=b"\x89PNG picture",
)
# The published architectures, as far as they decide names: hub configs of stabilityai/sd-turbo and sdxl-turbo.
SD2_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY_SD_UNET = {
    "block_out_channels": (16, 32),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_SDXL_UNET = SDXL_UNET | {
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": (2, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}


def tiny_text_encoder(kind: type[nn.Module]) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    letters = list(string.ascii_lowercase)
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: index for index, word in enumerate(words)} | {"<|startoftext|>": 52, "<|endoftext|>": 53}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def tiny_sd() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=tiny_text_encoder(CLIPTextModel),
        tokenizer=tiny_tokenizer(),
        unet=UNet2DConditionModel(sample_size=8, **TINY_SD_UNET).eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=tiny_text_encoder(CLIPTextModel),
        text_encoder_2=tiny_text_encoder(CLIPTextModelWithProjection),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=UNet2DConditionModel(sample_size=8, **TINY_SDXL_UNET).eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


@torch.no_grad()
def predict(pipe: Any) -> Tensor:
    """The UNet's output through all text encoders, from fixed inputs."""
    ids = torch.tensor([[52, 5, 9, 40, 53]])
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    encoded = [pipe.text_encoder(ids, output_hidden_states=True)]
    extra = None
    if hasattr(pipe, "text_encoder_2"):
        encoded.append(pipe.text_encoder_2(ids, output_hidden_states=True))
        extra = {"text_embeds": encoded[1].text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    # The last hidden states, so that every layer's LoRA shows.
    hidden = torch.cat([output.hidden_states[-1] for output in encoded], dim=-1)
    return pipe.unet(sample, 999, hidden, added_cond_kwargs=extra).sample


def train_nothing(pipe: Any) -> list[LoraWeights]:
    """Give a pipeline random adapters, as if trained, and take them out as peft has them; α is 2.5 times the rank."""
    weights = []
    for component in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, component, None)
        if module is None:
            continue
        # The text side has another rank, as by default.
        rank, targets = (4, UNET_LAYERS) if component == "unet" else (2, TEXT_LAYERS)
        alpha = 2.5 * rank
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        module.add_adapter(config, adapter_name="default")
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        weights.append(LoraWeights(component, get_peft_model_state_dict(module), rank, alpha))
    return weights


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Everything that diffusers and transformers warn about."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector = Collector(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(collector)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(collector)


def random_weights(component: str, modules: dict[str, tuple[int, int]], rank: int = 2) -> LoraWeights:
    tensors = {}
    for path, (width_in, width_out) in modules.items():
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, width_in)
        tensors[f"{path}.lora_B.weight"] = torch.randn(width_out, rank)
    return LoraWeights(component, tensors, rank, float(rank))


def linear_modules(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return {
        name: (module.in_features, module.out_features)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in name
    }


SMALL = random_weights("unet", {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1024, 8)})
TEXT_LAYER = {f"encoder.layers.0.self_attn.{name}": (8, 8) for name in TEXT_LAYERS}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Strength and names, judged by diffusers itself


@pytest.mark.parametrize(("build", "family"), [(tiny_sd, "sd"), (tiny_sdxl, "sdxl")])
def test_both_formats_loaded_by_plain_diffusers_draw_what_the_adapters_draw(
    build: Any, family: str, tmp_path: Path
) -> None:
    pipe = build()
    before = predict(pipe)
    weights = train_nothing(pipe)
    expected = predict(pipe)
    assert (expected - before).abs().max() > 0.01

    files = {
        "kohya": (kohya_tensors(weights, family, torch.float32), {}),
        "diffusers": (diffusers_tensors(weights, torch.float32), adapter_metadata(weights)),
    }
    for name, (tensors, metadata) in files.items():
        path = tmp_path / f"{name}.safetensors"
        write_safetensors(path, tensors, metadata)
        other = build()
        with log_lines() as lines:
            other.load_lora_weights(str(tmp_path), weight_name=path.name)
        assert lines == []
        torch.testing.assert_close(predict(other), expected, atol=1e-4, rtol=0)


def test_plain_diffusers_speaks_up_about_a_component_without_lora(tmp_path: Path) -> None:
    """Which is why the silence in the test above means something."""
    pipe = tiny_sd()
    unet = [part for part in train_nothing(tiny_sd()) if part.component == "unet"]
    write_safetensors(tmp_path / "unet.safetensors", kohya_tensors(unet, "sd", torch.float32), {})
    with log_lines() as lines:
        pipe.load_lora_weights(str(tmp_path), weight_name="unet.safetensors")
    assert len(lines) == 1
    assert "No LoRA keys associated to CLIPTextModel" in lines[0]


def test_a_diffusers_file_without_its_header_keeps_its_strength(tmp_path: Path) -> None:
    pipe = tiny_sd()
    other = tiny_sd()
    weights = train_nothing(pipe)
    write_safetensors(tmp_path / "bare.safetensors", diffusers_tensors(weights, torch.float32), {})
    other.load_lora_weights(str(tmp_path), weight_name="bare.safetensors")
    torch.testing.assert_close(predict(other), predict(pipe), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("build", "family"), [(tiny_sd, "sd"), (tiny_sdxl, "sdxl")])
def test_reading_our_files_back_gives_the_adapters_with_alpha_folded(build: Any, family: str, tmp_path: Path) -> None:
    pipe = build()
    names = {
        component: [name for name, _ in getattr(pipe, component).named_modules()]
        for component in ("unet", "text_encoder", "text_encoder_2")
        if hasattr(pipe, component)
    }
    weights = train_nothing(pipe)
    for tensors in (kohya_tensors(weights, family, torch.float32), diffusers_tensors(weights, torch.float32)):
        write_safetensors(tmp_path / "lora.safetensors", tensors, {})
        found = {part.component: part for part in read_lora(tmp_path / "lora.safetensors").to_peft(names)}
        assert found.keys() == {part.component for part in weights}
        for part in weights:
            other = found[part.component]
            assert (other.rank, other.alpha) == (part.rank, float(part.rank))
            assert other.tensors.keys() == part.tensors.keys()
            for key, tensor in part.tensors.items():
                scale = 2.5 if "lora_B" in key else 1.0
                torch.testing.assert_close(other.tensors[key], tensor * scale)


def test_text_encoder_keys_carry_text_model_whichever_layout_they_come_from() -> None:
    flat = random_weights("text_encoder", TEXT_LAYER)
    wrapped = random_weights("text_encoder", {f"text_model.{path}": size for path, size in TEXT_LAYER.items()})
    keys = kohya_tensors([flat], "sd", torch.float16).keys()
    assert keys == kohya_tensors([wrapped], "sd", torch.float16).keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in keys
    assert all(key.startswith("text_encoder.text_model.") for key in diffusers_tensors([flat], torch.float16))


# True architectures


@pytest.mark.parametrize(("family", "config"), [("sd2", SD2_UNET), ("sdxl", SDXL_UNET)])
def test_our_module_lists_are_the_modules_of_the_true_unets(family: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    true = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(lora_keys.unet_paths(family)) == true


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_unet_module_survives_the_way_into_sgm_names_and_back(family: str) -> None:
    paths = lora_keys.unet_paths(family)
    there = [lora_keys.to_sgm(path, first_upsampler=2 if family == "sdxl" else 1) for path in paths]
    assert len(set(there)) == len(paths)
    assert [lora_keys.from_sgm(path) for path in there] == list(paths)
    flat = [f"lora_unet_{path.replace('.', '_')}" for path in there]
    assert [lora_keys.locate(name) for name in flat] == [("unet", path) for path in paths]


@pytest.mark.parametrize(
    ("family", "config", "linears", "attention"), [("sd", SD2_UNET, 192, 128), ("sdxl", SDXL_UNET, 722, 560)]
)
def test_diffusers_own_converter_finds_every_linear_module_of_our_kohya_file(
    family: str, config: dict[str, Any], linears: int, attention: int
) -> None:
    modules = linear_modules(config)
    assert sum(".attn" in path for path in modules) == attention
    tensors = kohya_tensors([random_weights("unet", modules, rank=1)], family, torch.float16)
    assert len(tensors) == 3 * len(modules)
    assert len(modules) == linears
    if family == "sdxl":
        assert all(key.startswith(("lora_unet_input_", "lora_unet_middle_", "lora_unet_output_")) for key in tensors)
        shape = type("Config", (), {"layers_per_block": 2})
        tensors = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), shape)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    assert set(alphas.values()) == {1.0}
    found = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in converted.items()})
    found = {key.replace(".processor", ""): value for key, value in found.items()}
    assert set(found) == {f"{path}.lora_{half}.weight" for path in modules for half in "AB"}


# Refusals before anything is written


def test_an_incomplete_text_attention_is_refused_because_a1111_would_ignore_it() -> None:
    half = random_weights("text_encoder", dict.fromkeys(list(TEXT_LAYER)[:2], (8, 8)))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn has no v_proj, out_proj"):
        kohya_tensors([half], "sd", torch.float16)


def test_projections_of_several_ranks_are_whole_and_written_again_in_both_layouts(tmp_path: Path) -> None:
    """As kohya's dynamic rank has them, which cuts each module by itself."""
    layer = "lora_te_text_model_encoder_layers_0_self_attn"
    tensors = {}
    for name, rank in {"q_proj": 2, "k_proj": 3, "v_proj": 2, "out_proj": 4}.items():
        tensors[f"{layer}_{name}.lora_down.weight"] = torch.randn(rank, 1024)
        tensors[f"{layer}_{name}.lora_up.weight"] = torch.randn(1024, rank)
    save_file(tensors, tmp_path / "a.safetensors")
    for file in export_files(
        tmp_path / "a.safetensors", layouts=("kohya", "diffusers"), output=tmp_path / "b", dtype="fp32"
    ):
        found = read_lora(file)
        assert sorted(module.rank for module in found.modules) == [2, 2, 3, 4]
        assert {module.path.rpartition(".")[2] for module in found.modules} == set(TEXT_LAYERS)
    written = load_file(tmp_path / "b" / "a-kohya.safetensors")
    assert all(torch.equal(written[key], value) for key, value in tensors.items())


def test_what_a1111_needs_is_asked_only_of_the_encoder_in_which_it_joins_the_projections() -> None:
    two = dict.fromkeys(list(TEXT_LAYER)[:2], (8, 8))
    first, second = (random_weights(component, two) for component in ("text_encoder", "text_encoder_2"))
    assert len(kohya_tensors([first], "sdxl", torch.float16)) == 6
    with pytest.raises(ConfigError, match=r"text_encoder_2: .* has no v_proj, out_proj; A1111 .* --format diffusers"):
        kohya_tensors([first, second], "sdxl", torch.float16)
    sd1 = random_weights("text_encoder", dict.fromkeys(two, (768, 8)))
    assert len(kohya_tensors([sd1], "sd", torch.float16)) == 6
    for part in (first, second):
        assert len(diffusers_tensors([part], torch.float16)) == 4
        assert adapter_metadata([part])


def test_half_of_a_text_encoders_attention_is_folded_into_a_model(small_pair: tuple[Path, Path]) -> None:
    student = str(small_pair[0])
    config = ModelConfig(student=student, teacher=student, resolution=64, device="cpu", offline=True)
    pair = load_pair(config, teacher=False)
    part = random_weights("text_encoder", {"text_model.encoder.layers.0.self_attn.q_proj": (32, 32)})
    layer = pair.encoder.encoders[0].get_submodule("encoder.layers.0.self_attn.q_proj")
    before = layer.weight.clone()
    fold_lora(pair, "student", [part])
    down, up = part.tensors.values()
    torch.testing.assert_close(layer.weight, before + up @ down)


def test_a_missing_half_a_wrong_rank_and_a_foreign_component_are_refused() -> None:
    down_only = dict(list(SMALL.tensors.items())[:1])
    with pytest.raises(ConfigError, match=r"needs lora_A\.weight and lora_B\.weight"):
        kohya_tensors([dataclasses.replace(SMALL, tensors=down_only)], "sd", torch.float16)
    with pytest.raises(ConfigError, match="not of rank 3"):
        kohya_tensors([dataclasses.replace(SMALL, rank=3)], "sd", torch.float16)
    with pytest.raises(ConfigError, match="no text_encoder_2"):
        kohya_tensors([random_weights("text_encoder_2", TEXT_LAYER)], "sd", torch.float16)
    with pytest.raises(ConfigError, match="family 'flux'"):
        kohya_tensors([SMALL], "flux", torch.float16)


# Header


def test_the_header_is_all_text_and_says_nothing_about_the_machine() -> None:
    metadata = header(CARD, kohya_tensors([SMALL], "sd", torch.float16))
    assert all(isinstance(value, str) for value in metadata.values())
    assert not any("somebody" in value or "/home" in value for value in metadata.values())
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_base_model_version"] == "sd_v2"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert metadata["ss_sd_model_name"] == "sd-turbo"
    # The files hold alpha folded, so their alpha is the rank; the trained one is kept under our own key.
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert metadata["echodistill.alpha"] == "8"
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"sks dog": 5}}
    assert metadata["modelspec.date"] == "2023-11-14T22:14:20+00:00"
    assert float(metadata["ss_training_started_at"]) == CARD.started_at
    assert len(json.loads(metadata["ssmd_cover_images"])) == 1


def test_the_header_names_the_sdxl_family_as_each_reader_wants_it() -> None:
    card = dataclasses.replace(CARD, family="sdxl", base_model="stabilityai/sdxl-turbo")
    metadata = header(card, kohya_tensors([SMALL], "sdxl", torch.float16))
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_sd_model_name"] == "sdxl-turbo"


def test_a_teacher_that_predicts_v_is_labelled_so() -> None:
    card = dataclasses.replace(CARD, role="teacher", prediction_type="v_prediction")
    metadata = header(card, kohya_tensors([SMALL], "sd", torch.float16))
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.prediction_type"] == "v"


def test_no_metadata_keeps_the_six_keys_that_kohyas_tools_need() -> None:
    metadata = header(CARD, kohya_tensors([SMALL], "sd", torch.float16), minimal=True)
    assert set(metadata) == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }


def test_a_header_is_refused_for_an_unknown_family_a_reserved_name_and_a_huge_cover() -> None:
    tensors = kohya_tensors([SMALL], "sd", torch.float16)
    for change, message in (
        ({"family": "flux"}, "family 'flux'"),
        ({"name": "None"}, "A1111 cannot load"),
        ({"cover": bytes(2**21)}, "cover picture"),
    ):
        with pytest.raises(ConfigError, match=message):
            header(dataclasses.replace(CARD, **change), tensors)


def test_the_hash_is_that_of_the_bytes_after_the_header(tmp_path: Path) -> None:
    tensors = kohya_tensors([SMALL], "sd", torch.float16)
    metadata = header(CARD, tensors)
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    content = (tmp_path / "a.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"


def test_equal_content_gives_equal_bytes_in_whatever_order_it_comes() -> None:
    tensors = kohya_tensors([SMALL], "sd", torch.float16)
    metadata = header(CARD, tensors)
    backwards = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert len({serialize(tensors, metadata), serialize(tensors, metadata), serialize(*backwards)}) == 1


# Writing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_written_file_holds_the_same_bits_and_can_be_read_by_everybody(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = kohya_tensors([SMALL], "sd", dtype)
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors.items())
    alphas = [tensor for key, tensor in found.items() if key.endswith(".alpha")]
    assert all(alpha.ndim == 0 and alpha.dtype == torch.float32 and alpha == 2.0 for alpha in alphas)
    assert names_in(tmp_path) == ["a.safetensors"]


def test_views_that_share_memory_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_safetensors(tmp_path / "a.safetensors", {"whole": base, "turned": base.T}, {})
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")["turned"], base.T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name_and_the_old_file_stays(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(EchoDistillError, match=r"broken\.weight holds NaN or infinity"):
        write_safetensors(path, {"fine": torch.ones(2), "broken.weight": torch.tensor([1.0, bad])}, {})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on file sizes are a POSIX thing")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EchoDistillError, match="could not be written") as caught:
            write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 1
    assert names_in(tmp_path) == []


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(EchoDistillError, match="could not be written"):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_missing_folder_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(EchoDistillError, match=r"could not be written .* Its folder does not exist"):
        write_safetensors(tmp_path / "nowhere" / "a.safetensors", {"x": torch.ones(2)}, {})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named_with_its_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EchoDistillError, match="You may not write there"):
            write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        tmp_path.chmod(0o700)


# Reading


def whole_file() -> bytes:
    return serialize(kohya_tensors([SMALL], "sd", torch.float16), {})


BAD_FILES = {
    "empty": (b"", "is empty"),
    "a few bytes": (b"\x10\x00", "cut off inside its header"),
    "header cut off": (whole_file()[:60], "cut off inside its header"),
    "body cut off": (whole_file()[:-8], "cut off or damaged"),
    "header no JSON": ((16).to_bytes(8, "little") + b"{not json at all" + bytes(8), "cut off or damaged"),
    "absurd length": (b"\xff" * 7 + b"\x7f" + b"{}" + bytes(100), "claims a header of"),
    "pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00state" + bytes(100), "is a Python pickle"),
    "zip": (b"PK\x03\x04\x14\x00\x08\x08" + bytes(100), "is a zip archive"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in to download</body></html>" + bytes(100), "is a web page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_by_name_and_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        read_lora(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 4


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="is a folder"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_down.weight": torch.full((2, 8), float("nan"))}, r"lora_down\.weight holds NaN"),
        ({"lora_down.weight": torch.ones(3, 8)}, "do not have one rank"),
        ({"lora_down.weight": torch.ones(2)}, "do not have one rank"),
        ({"lora_down.weight": torch.ones(0, 8), "lora_up.weight": torch.ones(8, 0)}, "do not have one rank"),
        ({"lora_down.weight": None}, "has no down weight"),
        ({"lora_up.weight": None}, "has no up weight"),
    ],
)
def test_a_broken_pair_is_refused_by_its_key(changes: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "alpha": torch.tensor(2.0)}
    parts |= changes
    save_file({f"{module}.{part}": tensor for part, tensor in parts.items() if tensor is not None}, tmp_path / "x")
    with pytest.raises(ModelError, match=reason):
        read_lora(tmp_path / "x")


def test_keys_that_match_no_module_of_the_model_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, kohya_tensors([SMALL], "sd", torch.float16), {})
    with pytest.raises(ModelError, match=r"lora_unet_mid_block_\S+ matches no module.*family sd2"):
        read_lora(path).to_peft({"unet": ["conv_in"]})
    write_safetensors(path, kohya_tensors([SMALL], "sd", torch.float16) | {"bundle_emb.sks.clip_l": torch.ones(2)}, {})
    with pytest.raises(ModelError, match=r"such as bundle_emb\.sks\.clip_l are not"):
        read_lora(path).to_peft()


def test_a_file_of_several_ranks_comes_back_in_several_parts(tmp_path: Path) -> None:
    other = random_weights("unet", {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (1024, 8)}, rank=3)
    write_safetensors(tmp_path / "a", kohya_tensors([SMALL, other], "sd", torch.float16), {})
    file = read_lora(tmp_path / "a")
    assert (file.format, file.family) == ("kohya", "sd2")
    assert [(part.rank, part.alpha, len(part.tensors)) for part in file.to_peft()] == [(2, 2.0, 2), (3, 3.0, 2)]


# Token files


def test_an_sd_token_file_loads_in_plain_diffusers_under_its_own_name(tmp_path: Path) -> None:
    vectors = torch.randn(2, 32)
    write_safetensors(tmp_path / "sks.safetensors", token_tensors("sks", {"text_encoder": vectors}, "sd"), {})
    pipe = tiny_sd()
    pipe.load_textual_inversion(str(tmp_path / "sks.safetensors"))
    rows = pipe.tokenizer.convert_tokens_to_ids(["sks", "sks_1"])
    torch.testing.assert_close(pipe.text_encoder.get_input_embeddings().weight[rows].detach(), vectors)
    assert read_lora(tmp_path / "sks.safetensors").format == "token"


def test_an_sdxl_token_file_loads_in_plain_diffusers_one_encoder_at_a_time(tmp_path: Path) -> None:
    vectors = {"text_encoder": torch.randn(1, 32), "text_encoder_2": torch.randn(1, 32)}
    write_safetensors(tmp_path / "sks.safetensors", token_tensors("sks", vectors, "sdxl"), {})
    pipe = tiny_sdxl()
    stored = dict(read_tensors(tmp_path / "sks.safetensors", ["clip_l", "clip_g"]))
    for key, component, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(stored[key], token="sks", text_encoder=component, tokenizer=tokenizer)
        row = tokenizer.convert_tokens_to_ids("sks")
        torch.testing.assert_close(component.get_input_embeddings().weight[row].detach(), stored[key][0])
    assert read_lora(tmp_path / "sks.safetensors").family == "sdxl"


def test_a_token_that_cannot_name_a_file_and_wrong_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="'<sks>' cannot name a file"):
        token_tensors("<sks>", {"text_encoder": torch.ones(1, 8)}, "sd")
    with pytest.raises(ConfigError, match="needs vectors for text_encoder, text_encoder_2"):
        token_tensors("sks", {"text_encoder": torch.ones(1, 8)}, "sdxl")
    with pytest.raises(ConfigError, match=r"shape \[8\], not \[n, width\]"):
        token_tensors("sks", {"text_encoder": torch.ones(8)}, "sd")
