"""What each tool makes of a LoRA file's keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echodistill_cli.lora import keys as lora_keys
from echodistill_cli.lora.header import header
from echodistill_cli.lora.tensors import adapter_metadata, diffusers_tensors, kohya_tensors
from tests.helpers.lora_files import (
    READERS,
    TEXT_LAYERS,
    by_reader,
    constant_weights,
    full_weights,
    header_fields,
    inspection_of,
    kohya_pair,
)


@pytest.mark.parametrize(("family", "attention", "text"), [("sd2", 128, 23 * 4), ("sdxl", 560, 12 * 4)])
def test_every_reader_loads_our_kohya_file_completely(family: str, attention: int, text: int, tmp_path: Path) -> None:
    weights = full_weights(family)
    tensors = kohya_tensors(weights, header_fields(family).family, torch.float16)
    found = inspection_of(tmp_path, tensors, header(header_fields(family), tensors))
    assert (found.kind, found.format, found.family) == ("lora", "kohya", family)
    assert (found.modules["unet"], found.modules["text_encoder"]) == (attention, text)
    assert (found.ranks, found.alphas, found.scales) == ((1,), (1.0,), (1.0,))
    assert [verdict.reader for verdict in found.readers] == list(READERS)
    for verdict in found.readers[:-1]:
        assert (verdict.loads, verdict.matched, verdict.unmatched) == ("fully", len(tensors), 0), verdict
    # stable-diffusion.cpp leaves query, key and value of SD 2's text encoder alone: 3 keys of 3 modules of 23 layers.
    unused = 207 if family == "sd2" else 0
    assert (found.readers[-1].reader, found.readers[-1].unmatched) == ("stable-diffusion.cpp", unused)
    assert found.readers[-1].loads == ("partly" if unused else "fully")


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_reader_loads_the_convolutions_too(family: str, tmp_path: Path) -> None:
    tensors = kohya_tensors(full_weights(family, ("conv1", "conv2")), header_fields(family).family, torch.float16)
    assert sum("in_layers" in key or "conv1" in key for key in tensors) == {"sd2": 22, "sdxl": 17}[family] * 3
    found = inspection_of(tmp_path, tensors, header(header_fields(family), tensors))
    for verdict in found.readers[: -1 if family == "sd2" else None]:
        assert (verdict.loads, verdict.matched, verdict.unmatched) == ("fully", len(tensors), 0), verdict


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_diffusers_format_reaches_nothing_but_text_encoders_outside_diffusers(family: str, tmp_path: Path) -> None:
    weights = full_weights(family)
    tensors = diffusers_tensors(weights, torch.float16)
    found = inspection_of(tmp_path, tensors, adapter_metadata(weights))
    assert (found.format, found.family, found.notes) == ("diffusers", family, ())
    verdicts = by_reader(found)
    assert verdicts["diffusers"].loads == "fully"
    # ComfyUI matches none of the UNet's attention (diffusers#10860), which is far more than Forge tolerates.
    unet_keys = 2 * found.modules["unet"]
    assert (verdicts["ComfyUI"].loads, verdicts["ComfyUI"].unmatched) == ("partly", unet_keys)
    for name in ("Forge", "A1111", "sd-scripts", "InvokeAI", "SD.Next"):
        assert verdicts[name].loads == "no"
    assert verdicts["stable-diffusion.cpp"].matched == unet_keys


def test_the_web_uis_hide_a_file_whose_header_does_not_name_its_family(tmp_path: Path) -> None:
    for family, said in (("sd2", "ss_v2 = True"), ("sdxl", "ss_base_model_version = sdxl_base_v1-0")):
        context = lora_keys.ARCHITECTURES[family].context
        weights = [constant_weights(["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], context)]
        tensors = kohya_tensors(weights, header_fields(family).family, torch.float16)
        verdicts = by_reader(inspection_of(tmp_path, tensors, {"format": "pt"}))
        assert said in verdicts["A1111"].text
        assert verdicts["Forge"].loads == "fully"
        assert verdicts["A1111"].loads == "hidden"
        assert verdicts["ComfyUI"].loads == "fully"
        minimal = header(header_fields(family), tensors, minimal=True)
        assert by_reader(inspection_of(tmp_path, tensors, minimal))["A1111"].loads == "fully"


def test_the_web_uis_hide_a_file_of_sd1_whose_header_says_sd2(tmp_path: Path) -> None:
    tensors = kohya_pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768)
    verdicts = by_reader(inspection_of(tmp_path, tensors, {"ss_v2": "True", "ss_base_model_version": "sd_v2"}))
    assert verdicts["A1111"].loads == "hidden"
    assert "Hidden with SD 1 models: the header says ss_v2 = True" in verdicts["A1111"].text
    assert [verdicts[reader].loads for reader in ("ComfyUI", "Forge")] == ["fully", "fully"]
    verdicts = by_reader(inspection_of(tmp_path, tensors, {"ss_v2": "False", "ss_base_model_version": "sd_v1"}))
    assert [verdicts[reader].loads for reader in ("A1111", "Forge")] == ["fully", "fully"]


def test_forge_gives_up_above_twelve_unknown_keys_and_not_before(tmp_path: Path) -> None:
    good = kohya_tensors(
        [constant_weights(["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 1024)], "sd", torch.float16
    )
    for unknown, loads in ((12, "partly"), (13, "no")):
        extra = {f"bundle_emb.sks.{index}": torch.ones(1) for index in range(unknown)}
        found = inspection_of(tmp_path, {**good, **extra}, {"ss_v2": "True"})
        assert by_reader(found)["Forge"].loads == loads
        assert by_reader(found)["Forge"].unmatched == unknown
        assert "Rejects the file because of" in by_reader(found)["diffusers"].text
        assert any("token is bundled" in note for note in found.notes)


def test_a1111_needs_all_four_projections_of_an_openclip_layer(tmp_path: Path) -> None:
    layer = "lora_te_text_model_encoder_layers_0_self_attn"
    half = kohya_pair(f"{layer}_q_proj") | kohya_pair(f"{layer}_k_proj")
    verdict = by_reader(inspection_of(tmp_path, half, {"ss_v2": "True"}))["A1111"]
    assert "Ignores 1 text-encoder layer lacking one of q, k, v and out" in verdict.text
    whole = half | kohya_pair(f"{layer}_v_proj") | kohya_pair(f"{layer}_out_proj")
    assert by_reader(inspection_of(tmp_path, whole, {"ss_v2": "True"}))["A1111"].loads == "fully"


def test_the_spelling_te1_on_sd2_reaches_comfyui_but_not_a1111(tmp_path: Path) -> None:
    keys = [f"lora_te1_text_model_encoder_layers_0_self_attn_{name}" for name in TEXT_LAYERS]
    tensors = {key: tensor for module in keys for key, tensor in kohya_pair(module).items()}
    verdicts = by_reader(inspection_of(tmp_path, tensors, {"ss_v2": "True"}))
    assert (verdicts["ComfyUI"].loads, verdicts["diffusers"].loads) == ("fully", "fully")
    assert (verdicts["A1111"].loads, verdicts["sd-scripts"].loads) == ("no", "no")


@pytest.mark.parametrize("spelling", ["sgm", "diffusers"])
def test_all_readers_know_both_spellings_of_sdxl_attention(spelling: str, tmp_path: Path) -> None:
    paths = [path for path in lora_keys.unet_paths("sdxl") if ".attentions." in path]
    assert len(paths) == 722
    names = [lora_keys.to_sgm(path) if spelling == "sgm" else path for path in paths]
    tensors = {
        key: tensor
        for path, name in zip(paths, names, strict=True)
        for key, tensor in kohya_pair(
            f"lora_unet_{name.replace('.', '_')}", 2048 if path.endswith(("attn2.to_k", "attn2.to_v")) else 4, 1
        ).items()
    }
    found = inspection_of(tmp_path, tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert [verdict.loads for verdict in found.readers] == ["fully"] * len(READERS)


def test_a_lora_for_another_model_is_not_judged_by_names_it_cannot_have(tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    found = inspection_of(tmp_path, kohya_pair(module, 32))
    assert found.family == "unknown"
    assert by_reader(found)["diffusers"].loads == "fully"
    assert "Unknown: the file fits no" in by_reader(found)["ComfyUI"].text


HALVES = {"down": (2, 1024), "up": (4, 2)}
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def test_diffusers_loses_what_another_naming_scheme_names_in_the_same_file(tmp_path: Path) -> None:
    tensors = {f"unet.{ATTENTION}.to_k.lora.{part}.weight": torch.ones(size) for part, size in HALVES.items()}
    tensors |= {f"unet.conv_in.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
    verdict = by_reader(inspection_of(tmp_path, tensors))["diffusers"]
    assert verdict.loads == "partly"
    assert "mix two naming schemes" in verdict.text


def test_kohya_names_with_an_old_suffix_are_read_by_comfyui_alone(tmp_path: Path) -> None:
    module = f"lora_unet_{ATTENTION.replace('.', '_')}_to_k_lora"
    tensors = {f"{module}.{part}.weight": torch.ones(size) for part, size in HALVES.items()}
    loads = {name: verdict.loads for name, verdict in by_reader(inspection_of(tmp_path, tensors)).items()}
    assert loads == {"diffusers": "no", "ComfyUI": "fully", "A1111": "no", "Forge": "fully", "sd-scripts": "no"}


def test_alpha_alone_is_nothing_that_a_reader_applies(tmp_path: Path) -> None:
    module = f"lora_unet_{ATTENTION.replace('.', '_')}_to_k"
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    tensors = {f"{module}.{part}": torch.ones(2, 2) for part in parts} | {f"{module}.alpha": torch.tensor(1.0)}
    tensors |= kohya_pair(f"lora_unet_{ATTENTION.replace('.', '_')}_to_v")
    verdict = by_reader(inspection_of(tmp_path, tensors))["sd-scripts"]
    assert verdict.matched == 2


def test_diffusers_gives_mixed_ranks_with_their_own_alphas_another_strength(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in (("k", 4), ("v", 2)):
        module = f"lora_unet_{ATTENTION.replace('.', '_')}_to_{name}"
        tensors |= kohya_pair(module, rank=rank) | {f"{module}.alpha": torch.tensor(float(rank))}
    inspection = inspection_of(tmp_path, tensors)
    assert inspection.scales == (1.0,)
    assert by_reader(inspection)["diffusers"].text.startswith("Loads 1 of 2 modules at another strength")
