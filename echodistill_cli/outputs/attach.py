"""Put LoRA and token files on a loaded pair through diffusers' own readers, and so prove what a file means.

What `sample` draws with is therefore what any diffusers user gets from the same file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.errors import EchoDistillError, ModelError
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import read_tensors
from echodistill_cli.models.adapters import (
    ADAPTER,
    activate,
    at_strength,
    is_distilled,
    keep_on,
    lora_layers,
    trainable_parameters,
)
from echodistill_cli.models.load import ModelPair, Role

# Rounding the adapters to half precision moves few pixels by more than a level; a lost module moves many.
_MEAN_LEVELS = 1.5


def plain_pipeline(pair: ModelPair, role: Role) -> Any:
    """A stock diffusers pipeline over the pair's own modules: no copy is made."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    denoiser = pair.role(role)
    scheduler = EulerDiscreteScheduler(
        trained_betas=_betas(denoiser.schedule.alphas_cumprod),
        prediction_type=denoiser.schedule.prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    shared = {"vae": pair.codec.encoder, "unet": denoiser.unet, "scheduler": scheduler}
    encoders, tokenizers = pair.encoder.encoders, pair.encoder.tokenizers
    if pair.family == "sd":
        return StableDiffusionPipeline(
            **shared,
            text_encoder=encoders[0],
            tokenizer=tokenizers[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        **shared,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        force_zeros_for_empty_prompt=pair.encoder.zero_null,
    )


def attach_lora(pair: ModelPair, role: Role, file: Path, scale: float = 1.0) -> None:
    """Load a LoRA file of any common format into one role's UNet and the text encoders.

    Args:
        scale: strength; 1 is as trained.

    Raises:
        ModelError: the file is damaged, or made for other models; nothing of it is applied silently in part.
    """
    described = read_lora(file)
    if not described.modules or described.unmatched:
        odd = f" such as {described.unmatched[0]}" if described.unmatched else ""
        raise ModelError(f"{file} is not a plain LoRA: {len(described.unmatched)} of its keys are unknown{odd}.")
    pipeline = plain_pipeline(pair, role)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of a student made one-step
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{file} does not fit this model ({first_line}).", "Name the model it was made for."
        ) from error
    placed = sum(len(lora_layers(module)) for module in (pipeline.unet, *pair.encoder.encoders))
    if placed != len(described.modules):
        raise ModelError(
            f"{file} does not fit this model: only {placed} of its {len(described.modules)} modules match."
        )
    pipeline.set_adapters([ADAPTER], [scale])
    activate(pipeline.unet, scale)
    keep_on(pair.device, pipeline.unet)


def detach_lora(pair: ModelPair, role: Role) -> None:
    """Take every LoRA off one role's UNet and the text encoders; the modules are as they were loaded."""
    unet = pair.role(role).unet
    if is_distilled(unet):
        unet.delete_adapters(ADAPTER)
    elif lora_layers(unet):
        unet.unload_lora()
    for encoder in pair.encoder.encoders:
        if lora_layers(encoder):
            encoder.delete_adapter(ADAPTER)


def read_token_file(file: Path) -> list[Tensor]:
    """The vectors [n, width] of a token file, one per text encoder in the pipeline's order.

    Raises:
        ModelError: it is no token file.
    """
    described = read_lora(file)
    if described.format != "token":
        raise ModelError(f"{file} is not a token file (format: {described.format}).")
    tensors = dict(read_tensors(file, described.table))
    return [tensors["clip_l"], tensors["clip_g"]] if "clip_g" in tensors else list(tensors.values())


def check_same_pictures(
    pair: ModelPair, role: Role, file: Path, prompts: Sequence[str], settings: SamplingSettings, strength: float = 1.0
) -> None:
    """Take the trained adapters off, read `file` back in their place, and compare pictures; the file's stay on.

    The trained adapters are first rounded as a half-precision file and a reader of the base's precision round them, so
    that what remains to be seen is a module that was lost or scaled wrongly.

    Args:
        strength: that the file gives the UNet's LoRA, times as trained.

    Raises:
        EchoDistillError: the pictures differ by more than rounding.
        ModelError: diffusers does not take the file whole.
    """
    seeds = list(range(len(prompts)))
    for module in (pair.role(role).unet, *pair.encoder.encoders):
        for parameter in trainable_parameters(module):
            parameter.data = parameter.data.half().to(pair.dtype).float()
    with at_strength(pair.role(role).unet, strength):
        before = list(generate(pair, prompts, seeds, settings))
    detach_lora(pair, role)
    attach_lora(pair, role, file)
    after = list(generate(pair, prompts, seeds, settings))
    levels = max(float((a.float() - b.float()).abs().mean()) for a, b in zip(before, after, strict=True))
    if levels > _MEAN_LEVELS:
        raise EchoDistillError(f"{file} read back gives other pictures (by {levels:.1f} of 255 levels on average).")


def _betas(alphas_cumprod: Tensor) -> Any:
    previous = torch.cat((torch.ones(1), alphas_cumprod[:-1]))
    return (1 - alphas_cumprod / previous).numpy()
