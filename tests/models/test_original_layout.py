"""The names in one-file checkpoints at the published architectures; what they hold is checked in `test_exporting`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import echodistill_cli
from echodistill_cli.models.single_file import sd_checkpoint, sdxl_checkpoint

State = dict[str, torch.Tensor]
CONFIGURATIONS = Path(echodistill_cli.__file__).parent / "models" / "configurations"


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
