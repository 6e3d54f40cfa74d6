"""LoRA and token tensors load in plain diffusers with the trained strength; incomplete ones are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file, save_file
from torch import nn

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.errors import ConfigError
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import read_tensors, write_safetensors
from echodistill_cli.lora.tensors import adapter_metadata, diffusers_tensors, kohya_tensors, token_tensors
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import fold_lora
from tests.helpers.lora_files import (
    SD2_UNET,
    SDXL_UNET,
    SMALL,
    TEXT_LAYER,
    TEXT_LAYERS,
    log_lines,
    predict,
    random_adapters,
    random_weights,
    tiny_sd,
    tiny_sdxl,
)
from tests.helpers.runs import export_files


def linear_modules(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return {
        name: (module.in_features, module.out_features)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in name
    }


@pytest.mark.parametrize(("build", "family"), [(tiny_sd, "sd"), (tiny_sdxl, "sdxl")])
def test_both_formats_loaded_by_plain_diffusers_draw_what_the_adapters_draw(
    build: Any, family: str, tmp_path: Path
) -> None:
    pipe = build()
    before = predict(pipe)
    weights = random_adapters(pipe)
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
    unet = [part for part in random_adapters(tiny_sd()) if part.component == "unet"]
    write_safetensors(tmp_path / "unet.safetensors", kohya_tensors(unet, "sd", torch.float32), {})
    with log_lines() as lines:
        pipe.load_lora_weights(str(tmp_path), weight_name="unet.safetensors")
    assert len(lines) == 1
    assert "No LoRA keys associated to CLIPTextModel" in lines[0]


def test_a_diffusers_file_without_its_header_keeps_its_strength(tmp_path: Path) -> None:
    pipe = tiny_sd()
    other = tiny_sd()
    weights = random_adapters(pipe)
    write_safetensors(tmp_path / "bare.safetensors", diffusers_tensors(weights, torch.float32), {})
    other.load_lora_weights(str(tmp_path), weight_name="bare.safetensors")
    torch.testing.assert_close(predict(other), predict(pipe), atol=1e-4, rtol=0)


def test_text_encoder_keys_carry_text_model_whichever_layout_they_come_from() -> None:
    flat = random_weights("text_encoder", TEXT_LAYER)
    wrapped = random_weights("text_encoder", {f"text_model.{path}": size for path, size in TEXT_LAYER.items()})
    keys = kohya_tensors([flat], "sd", torch.float16).keys()
    assert keys == kohya_tensors([wrapped], "sd", torch.float16).keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in keys
    assert all(key.startswith("text_encoder.text_model.") for key in diffusers_tensors([flat], torch.float16))


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
    with pytest.raises(ConfigError, match="does not have rank 3"):
        kohya_tensors([dataclasses.replace(SMALL, rank=3)], "sd", torch.float16)
    with pytest.raises(ConfigError, match="no text_encoder_2"):
        kohya_tensors([random_weights("text_encoder_2", TEXT_LAYER)], "sd", torch.float16)
    with pytest.raises(ConfigError, match="family 'flux'"):
        kohya_tensors([SMALL], "flux", torch.float16)


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
    with pytest.raises(ConfigError, match="'<sks>' cannot be used as a file name"):
        token_tensors("<sks>", {"text_encoder": torch.ones(1, 8)}, "sd")
    with pytest.raises(ConfigError, match="needs vectors for text_encoder, text_encoder_2"):
        token_tensors("sks", {"text_encoder": torch.ones(1, 8)}, "sdxl")
    with pytest.raises(ConfigError, match=r"shape \[8\], not \[n, width\]"):
        token_tensors("sks", {"text_encoder": torch.ones(8)}, "sd")
