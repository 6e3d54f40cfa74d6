"""Transformers as stock diffusers pipelines: to read LoRA files with, and to write whole models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from echodistill_cli.config.families import FAMILIES
from echodistill_cli.diffusion.pair import Denoiser, ModelPair, Role
from echodistill_cli.diffusion.sampling import sample_latents, seeded_noise
from echodistill_cli.diffusion.schedule import FLOW_TIMESTEPS, NoiseSchedule
from echodistill_cli.errors import EchoDistillError

# Latents per side of the images that test a written folder, and their mean difference, of at most 1. Half precision
# gives some thousandths, a wrong scheduler tenths.
_TEST_SIDE = 8
_MOST_DIFFERENCE = 0.05
_STEPS = 2


def flow_pipeline(pair: ModelPair, role: Role) -> Any:
    """Return a stock diffusers pipeline that shares the modules of the pair.

    Args:
        pair: of a family of transformers.
        role: whose transformer it has.
    """
    import diffusers

    denoiser, family = pair.role(role), FAMILIES[pair.family]
    parts = {
        "vae": pair.codec.encoder,
        "transformer": denoiser.unet,
        "text_encoder": pair.encoder.encoders[0],
        "tokenizer": pair.encoder.tokenizers[0],
    }
    if pair.family == "flux2":
        # Its shift depends on the size of the image.
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return diffusers.Flux2KleinPipeline(**parts, scheduler=scheduler, is_distilled=role == "student")
    if _is_sprint(denoiser):
        return getattr(diffusers, family.pipeline)(**parts, scheduler=diffusers.SCMScheduler())
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": _shift(denoiser.schedule)}
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings)
    return getattr(diffusers, family.teacher_pipeline)(**parts, scheduler=scheduler)


def _is_sprint(denoiser: Denoiser) -> bool:
    return getattr(denoiser, "guidance", None) is not None


def _shift(schedule: NoiseSchedule) -> float:
    """Return the shift of a flow's schedule: s = σ / (1 - σ) at u = 1/2."""
    assert schedule.sigmas is not None
    middle = float(schedule.sigmas[FLOW_TIMESTEPS // 2 - 1])
    return round(middle / (1 - middle), 6)


@torch.no_grad()
def check_flow_images(pair: ModelPair, role: Role, folder: Path, parts: Mapping[str, Any]) -> None:
    """Generate with a written folder's scheduler, tokenizer and settings; compare with our sampler.

    Args:
        pair: what was written.
        role: whose transformer.
        folder: the written pipeline.
        parts: its modules, which need not be read again.

    Raises:
        EchoDistillError: the images differ by more than rounding.
    """
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    denoiser, prompt = pair.role(role), "a photo"
    steps = denoiser.steps if role == "student" else _STEPS
    noise = seeded_noise([0], (pair.codec.channels, _TEST_SIDE, _TEST_SIDE))
    conditioning, null = pair.encoder.encode([prompt]), pair.encoder.encode_null()
    latents = sample_latents(denoiser, noise, conditioning, null, steps=steps, guidance_scale=0.0)
    expected = (pair.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    side = _TEST_SIDE * pair.codec.factor
    settings: dict[str, Any] = {"height": side, "width": side, "output_type": "pt", "latents": noise.clone()}
    if pair.family == "sana":
        settings["use_resolution_binning"] = False
    if _is_sprint(denoiser):
        settings["intermediate_timesteps"] = None
    else:
        settings["guidance_scale"] = 1.0
    images = pipeline(prompt=prompt, num_inference_steps=steps, **settings).images
    difference = float((torch.as_tensor(images).float() - expected).abs().mean())
    if not difference < _MOST_DIFFERENCE:
        raise EchoDistillError(
            f"{folder.name}: diffusers generates other images with it (mean difference {difference:.0%}).",
            "Report this, with the versions that echodistill doctor lists.",
        )
