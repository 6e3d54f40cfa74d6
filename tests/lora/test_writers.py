"""`inspect` on files that other tools' own code writes: diffusers, peft, diffusers' converter for kohya's keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.inspect import Inspection, inspect_file
from echodistill_cli.lora.read import read_lora
from echodistill_cli.runs import open_run
from tests.helpers.lora_files import TINY_SD_UNET, TINY_SDXL_UNET, by_reader, full_weights

PIPELINES: Mapping[str, Any] = {"sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
TINY: Mapping[str, dict[str, Any]] = {"sd2": TINY_SD_UNET | {"cross_attention_dim": 1024}, "sdxl": TINY_SDXL_UNET}
families = pytest.mark.parametrize("family", PIPELINES)


def layers_of(family: str) -> dict[str, dict[str, torch.Tensor]]:
    return {f"{part.component}_lora_layers": dict(part.tensors) for part in full_weights(family)}


def loads(inspection: Inspection) -> dict[str, str]:
    return {reader: verdict.loads for reader, verdict in by_reader(inspection).items()}


@families
@pytest.mark.parametrize("alpha", [None, 2])
def test_a_file_that_diffusers_saves(tmp_path: Path, family: str, alpha: int | None) -> None:
    settings = {} if alpha is None else {"unet_lora_adapter_metadata": LoraConfig(r=1, lora_alpha=alpha).to_dict()}
    PIPELINES[family].save_lora_weights(tmp_path, **layers_of(family), **settings)
    found = inspect_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert (found.format, found.family, found.ranks) == ("diffusers", family, (1,))
    assert found.scales == ((1.0,) if alpha is None else (1.0, 2.0))  # of the text encoders, and of the UNet
    assert any("Other tools apply the LoRA at strength 1" in note for note in found.notes) == (alpha is not None)
    verdicts = loads(found)
    assert (verdicts["diffusers"], verdicts["A1111"], verdicts["Forge"]) == ("fully", "no", "no")


@families
def test_a_folder_that_peft_saves(tmp_path: Path, family: str) -> None:
    unet = UNet2DConditionModel(sample_size=8, **TINY[family])
    config = LoraConfig(r=2, lora_alpha=4, alpha_pattern={"attn2.to_v": 1}, target_modules=["attn2.to_k", "attn2.to_v"])
    get_peft_model(unet, config).save_pretrained(str(tmp_path))
    found = inspect_file(tmp_path / "adapter_model.safetensors")
    assert (found.format, found.ranks, found.scales) == ("peft", (2,), (0.5, 2.0))
    assert "Its alpha is in adapter_config.json, which only peft reads." in found.notes[-1]
    assert {part.alpha for part in read_lora(tmp_path / "adapter_model.safetensors").to_peft()} == {1.0, 4.0}
    with pytest.raises(ConfigError, match=r"is not a run folder: .* Name the LoRA file: .*adapter_model\.safetensors"):
        open_run(tmp_path)
    for content in (b"[]", b"{", b'{"use_dora": true}', b'{"lora_alpha": "x"}'):
        (tmp_path / "adapter_config.json").write_bytes(content)
        assert "adapter_config.json" in inspect_file(tmp_path / "adapter_model.safetensors").notes[-1]
        with pytest.raises(ModelError, match=r"adapter_config\.json"):
            read_lora(tmp_path / "adapter_model.safetensors").to_peft()
    assert set(loads(found).values()) == {"no"}  # no tool reads the prefix base_model.model.


@families
def test_a_file_in_kohyas_keys_from_diffusers_converter(tmp_path: Path, family: str) -> None:
    state = dict[str, torch.Tensor]()
    for part in full_weights(family):
        state |= {f"{part.component}.{key}": value for key, value in part.tensors.items()}
    header = {"ss_network_dim": "1", "ss_tag_frequency": json.dumps({"1_dog": {"sks": 2}})}
    save_file(convert_state_dict_to_kohya(state), tmp_path / "kohya.safetensors", header)
    found = inspect_file(tmp_path / "kohya.safetensors")
    assert (found.format, found.family, found.ranks, found.triggers) == ("kohya", family, (1,), ("sks",))
    verdicts = loads(found)
    assert (verdicts["diffusers"], verdicts["ComfyUI"]) == ("fully", "fully")
    # The converter calls the only text encoder lora_te1, which kohya's scripts and A1111 know of SDXL alone. A header
    # without a base model hides a file of SDXL.
    assert verdicts["A1111"] == ("partly" if family == "sd2" else "hidden")
    assert verdicts["sd-scripts"] == ("partly" if family == "sd2" else "fully")


@families
def test_a_token_file_as_textual_inversion_scripts_save_it(tmp_path: Path, family: str) -> None:
    vectors = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    save_file({"sks": torch.ones(1, 1024)} if family == "sd2" else vectors, tmp_path / "sks.safetensors")
    found = inspect_file(tmp_path / "sks.safetensors")
    assert (found.format, found.family) == ("token", "sdxl" if family == "sdxl" else "sd2")
