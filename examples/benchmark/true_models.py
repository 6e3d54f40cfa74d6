"""The true architectures of SD-Turbo, SDXL-Turbo and their critics with random weights. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import echodistill_cli
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.family import VAE
from echodistill_cli.diffusion.pair import Denoiser, Family, LatentCodec, ModelPair
from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.models.device import DTYPES
from echodistill_cli.models.load import as_denoiser
from echodistill_cli.models.parts import load_schedule
from echodistill_cli.models.sources import embedded_folder
from echodistill_cli.models.vision import ImageBackbone

CONFIGURATIONS = Path(echodistill_cli.__file__).parent / "models" / "configurations"
# The embedded pair's: the vocabulary does not change what a step costs, and CLIP's would have to be downloaded.
TOKENIZER = embedded_folder("mini:student") / "tokenizer"


@contextmanager
def created_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Context in which modules are created on this device in this precision, without a float32 copy first."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def frozen_module(module: Any) -> Any:
    """Return a module in the state in which the loader leaves it: eval mode, no gradients."""
    return module.eval().requires_grad_(False)


def random_denoiser(family: Family, dtype: torch.dtype, device: torch.device, side: int) -> Denoiser:
    """Return a UNet of the family's true architecture for images of `side` pixels."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    folder = CONFIGURATIONS / FAMILIES[family].configuration
    with created_as(dtype, device):
        unet = frozen_module(UNet2DConditionModel(**_settings(folder / "unet")))
    assert parameters(unet) == FAMILIES[family].size.unet
    sizes = (side, side, 0, 0, side, side) if family == "sdxl" else None
    return as_denoiser(unet, load_schedule(folder / "scheduler"), sizes)


def random_pair(
    family: Family, precision: str, device: torch.device, side: int, *, decoder: str, teacher: bool = True
) -> ModelPair:
    """Return a student and a teacher of the true architectures; only the vocabulary is small.

    Args:
        family: sd or sdxl.
        precision: a key of DTYPES.
        device: where the models are created.
        side: of the images, in pixels.
        decoder: full or tiny.
        teacher: False leaves the teacher out.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    dtype, folder = DTYPES[precision], CONFIGURATIONS / FAMILIES[family].configuration
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = []
    with created_as(dtype, device):
        vae = frozen_module(AutoencoderKL(**_settings(folder / "vae")))
        tiny = frozen_module(AutoencoderTiny()) if decoder == "tiny" else vae
        for part, kind in list(kinds.items())[: 1 + (family == "sdxl")]:
            encoders.append(frozen_module(kind(CLIPTextConfig(**_settings(folder / part)))))
    assert parameters(vae) == VAE
    assert sum(map(parameters, encoders)) == FAMILIES[family].size.text
    tokenizers = [CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77) for _ in encoders]
    return ModelPair(
        family=family,
        encoder=PromptEncoder(tokenizers, encoders, zero_null=family == "sdxl"),
        codec=LatentCodec(vae, tiny),
        student=random_denoiser(family, dtype, device, side),
        loaded_teacher=random_denoiser(family, dtype, device, side) if teacher else None,
        device=device,
        dtype=dtype,
    )


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def random_backbones(names: Sequence[str], dtype: torch.dtype, device: torch.device) -> dict[str, ImageBackbone]:
    """Return DINO ViT-S/16, DINOv2 ViT-L/14, CLIP ViT-L/14 or ViT-H/14 with random weights, by name.

    Args:
        names: dino, dinov2, clip or clip-h.
        dtype: of the weights.
        device: where the models are created.
    """
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTModel,
    )

    def clip(width: int, layers: int, projection: int) -> Any:
        size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        shape = {"num_attention_heads": 16, "patch_size": 14, "image_size": 224, "projection_dim": projection}
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**size, **shape))

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    makers: dict[str, Callable[[], Any]] = {
        "dino": lambda: ViTModel(ViTConfig(**small), add_pooling_layer=False),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**large, image_size=518)),
        "clip": lambda: clip(1024, 24, 768),
        "clip-h": lambda: clip(1280, 32, 1024),
    }
    half = [0.5] * 3
    backbones = {}
    for name in names:
        with created_as(dtype, device):
            model = frozen_module(makers[name]())
        backbones[name] = ImageBackbone(model, half, half, 224).to(device).eval().requires_grad_(False)
    return backbones
