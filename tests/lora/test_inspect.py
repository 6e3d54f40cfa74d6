"""What a file is and what a person should know about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from echodistill_cli.errors import ModelError
from echodistill_cli.lora.header import header
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import write_safetensors
from echodistill_cli.lora.tensors import kohya_tensors, token_tensors
from tests.helpers.lora_files import READERS, by_reader, constant_weights, header_fields, inspection_of, kohya_pair


def test_the_card_of_our_file_is_told_in_full(tmp_path: Path) -> None:
    weights = [constant_weights(["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 1024)]
    tensors = kohya_tensors(weights, "sd", torch.bfloat16)
    found = inspection_of(tmp_path, tensors, header(header_fields("sd2"), tensors))
    assert found.triggers == ("sks dog",)
    assert found.base_model == "sd-turbo"
    assert found.resolution == "512x512"
    assert found.usage == "1 step, guidance 0, 512x512."
    assert found.made_by == "echodistill 0.1.0"
    assert found.role == "student"
    assert found.dtypes == ("BF16",)
    assert found.size == (tmp_path / "some.safetensors").stat().st_size
    assert json.loads(json.dumps(found.to_dict()))["readers"][0]["reader"] == "diffusers"
    assert str(tmp_path) not in json.dumps(found.to_dict())


def test_a_kohya_file_for_sd1_is_known_by_its_width_and_missing_alpha_means_rank(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tags = {"10_dog": {"sks dog": 12, " grass": 3}, "5_reg": {"dog": 1}}
    found = inspection_of(tmp_path, kohya_pair(module, 768), {"ss_tag_frequency": json.dumps(tags)})
    assert (found.format, found.family, found.scales) == ("kohya", "sd1", (1.0,))
    assert found.triggers == ("sks dog", "grass", "dog")
    scaled = kohya_pair(module, 768) | {f"{module}.alpha": torch.tensor(1.0)}
    assert inspection_of(tmp_path, scaled).scales == (0.5,)


def test_alpha_that_stands_only_in_diffusers_header_is_pointed_out(tmp_path: Path) -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{module}.lora.down.weight": torch.ones(4, 1024), f"{module}.lora.up.weight": torch.ones(8, 4)}
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    found = inspection_of(tmp_path, tensors, said)
    assert (found.ranks, found.alphas, found.scales) == ((4,), (8.0,), (2.0,))
    assert any("Other tools apply the LoRA at strength 1" in note for note in found.notes)
    (part,) = read_lora(tmp_path / "some.safetensors").to_peft()
    assert (part.rank, part.alpha) == (4, 8.0)


@pytest.mark.parametrize(
    ("key_format", "expected"),
    [
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight", "peft"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.default.weight", "peft"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight", "diffusers"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.{}.weight", "diffusers"),
    ],
)
def test_other_spellings_of_plain_lora_are_named_and_can_be_taken_apart(
    key_format: str, expected: str, tmp_path: Path
) -> None:
    down, up = ("down", "up") if "_lora." in key_format else ("A", "B")
    found = inspection_of(
        tmp_path, {key_format.format(down): torch.ones(2, 1024), key_format.format(up): torch.ones(4, 2)}
    )
    assert (found.kind, found.format, found.family) == ("lora", expected, "sd2")
    (part,) = read_lora(tmp_path / "some.safetensors").to_peft()
    assert next(iter(part.tensors)) == "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    # A pipeline looks for the component's name in front, which peft alone does not write.
    assert by_reader(found)["diffusers"].loads == ("no" if expected == "peft" else "fully")


def test_a_lycoris_file_is_named_as_such(tmp_path: Path) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    parts = {name: torch.ones(4, 4) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    tensors = {f"{module}.{name}": tensor for name, tensor in parts.items()} | {f"{module}.alpha": torch.tensor(1.0)}
    found = inspection_of(tmp_path, tensors)
    assert (found.kind, found.format, found.family, found.modules) == ("lora", "lycoris", "sdxl", {"unet": 1})
    assert any("LyCORIS" in note for note in found.notes)
    assert by_reader(found)["ComfyUI"].loads == "fully"
    assert by_reader(found)["diffusers"].loads == "no"
    with pytest.raises(ModelError, match=r"is not a plain LoRA \(format: lycoris\)"):
        read_lora(tmp_path / "some.safetensors").to_peft()


def test_a_dora_is_pointed_out(tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    found = inspection_of(tmp_path, kohya_pair(module) | {f"{module}.dora_scale": torch.ones(4, 1)}, {"ss_v2": "True"})
    assert any("DoRA" in note for note in found.notes)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "checkpoint"),
        ("some.other.weight", "unknown"),
        ("number", "unknown"),
    ],
)
def test_what_is_no_lora_is_not_called_one(key: str, kind: str, tmp_path: Path) -> None:
    found = inspection_of(tmp_path, {key: torch.tensor(1.0)})
    assert (found.kind, found.format) == (kind, "unknown")
    assert {verdict.loads for verdict in found.readers} == {"no"}


@pytest.mark.parametrize(
    ("vectors", "family", "expected", "diffusers"),
    [
        ({"text_encoder": torch.ones(2, 1024)}, "sd", "sd2", "fully"),
        ({"text_encoder": torch.ones(1, 768), "text_encoder_2": torch.ones(1, 1280)}, "sdxl", "sdxl", "partly"),
    ],
)
def test_a_token_file_says_which_word_calls_it(
    vectors: dict[str, Tensor], family: str, expected: str, diffusers: str, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "sks.safetensors", token_tensors("sks", vectors, family), {})
    found = inspect_file(tmp_path / "sks.safetensors")
    assert (found.kind, found.format, found.family, found.triggers) == ("token", "token", expected, ("sks",))
    assert [verdict.reader for verdict in found.readers] == [*READERS[:5], "InvokeAI"]
    assert found.readers[-1].loads == ("no" if vectors["text_encoder"].shape[0] == 2 else "fully")
    assert by_reader(found)["diffusers"].loads == diffusers
    assert "embedding:sks" in by_reader(found)["ComfyUI"].text


def test_a_token_of_no_published_width_fits_no_tool(tmp_path: Path) -> None:
    tensors = token_tensors("sks", {"text_encoder": torch.ones(1, 192)}, "sd")
    write_safetensors(tmp_path / "sks.safetensors", tensors, {})
    found = by_reader(inspect_file(tmp_path / "sks.safetensors"))
    assert {name for name, verdict in found.items() if verdict.loads != "no"} == {"diffusers"}
    assert (found["ComfyUI"].matched, found["ComfyUI"].unmatched) == (0, 1)
    assert "192 numbers" in found["ComfyUI"].text
    assert "192 numbers" in found["diffusers"].text


def test_a_lora_of_the_toy_is_said_to_be_for_no_other_tool(tmp_path: Path) -> None:
    tensors = kohya_pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 192)
    found = inspection_of(tmp_path, tensors, {"modelspec.architecture": "echodistill-mini/lora"})
    assert all(verdict.text.startswith("Made for mini") for verdict in found.readers)


@pytest.mark.parametrize("metadata", [{"ss_tag_frequency": "no json"}, {"lora_adapter_metadata": "[1]"}, {}])
def test_damaged_or_missing_metadata_is_no_error(metadata: dict[str, Any], tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(kohya_pair(module), tmp_path / "some.safetensors", metadata)
    assert inspect_file(tmp_path / "some.safetensors").triggers == ()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<html>" + bytes(100))
    with pytest.raises(ModelError, match="is a web page"):
        inspect_file(tmp_path / "x.safetensors")
