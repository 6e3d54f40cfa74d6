"""Sampling: the student's single step, the teacher's guided x0, and `generate` from prompts and seeds.

Noise is always drawn on the CPU, from one generator per image. An image therefore depends on its own seed, not on the
device, the batch size or the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser, ModelPair, Role
from echodistill_cli.diffusion.schedule import add_noise, ddim_step, guide, predict_x0, trailing_timesteps
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import EchoDistillError


@dataclass(frozen=True)
class SamplingSettings:
    """How images are generated.

    Attributes:
        role: which model generates, "student" or "teacher".
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 0 and 1 both disable it.
        size: side of the images in pixels.
        batch_size: images per forward pass; it affects speed and memory only.
        width: of the images in pixels; None for `size`.
        height: of the images in pixels; None for `size`.
    """

    role: Role = "student"
    steps: int = 1
    guidance_scale: float = 0.0
    size: int = 512
    batch_size: int = 4
    width: int | None = None
    height: int | None = None


def student_x0(student: Denoiser, noise: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the student's one-step sample: its x0 at its first timestep, [B, C, h, w], differentiable.

    Args:
        student: the one-step model.
        noise: [B, C, h, w], standard normal.
        conditioning: of B prompts.
    """
    noisy, timesteps = student.pure_noise(noise)
    return predict_x0(student.schedule, student(noisy, timesteps, conditioning), noisy, timesteps)


def teacher_x0(
    teacher: Denoiser,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    null: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """Return the teacher's guided x0 at z_t, float32 [B, C, h, w].

    One forward pass evaluates both prompts.

    Args:
        teacher: the multi-step model.
        noisy: [B, C, h, w], z_t.
        timesteps: [B].
        conditioning: of B prompts.
        null: of the empty prompt, batch 1.
        guidance_scale: of classifier-free guidance; at 1 the empty prompt is not evaluated.
    """
    noisy = teacher.rounded(noisy)
    if guidance_scale == 1:
        output = teacher(noisy, timesteps, conditioning)
    else:
        both = conditioning.join(null.expand(len(noisy)))
        conditional, unconditional = teacher(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        output = guide(conditional, unconditional, guidance_scale)
    return predict_x0(teacher.schedule, output, noisy, timesteps)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal noise [len(seeds), *shape] on the CPU, one generator per seed."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    null: Conditioning,
    *,
    steps: int,
    guidance_scale: float,
    init_latents: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Sample clean latents [B, C, h, w] with DDIM (η = 0) in trailing spacing.

    SDXL-Turbo is published with an ancestral scheduler, which adds new noise between steps. At one step both are
    bit-identical. With more steps, only the deterministic sampler makes an image a function of its seed and steps.

    Args:
        denoiser: the student or the teacher.
        noise: [B, C, h, w], standard normal.
        conditioning: of B prompts.
        null: of the empty prompt, batch 1.
        steps: denoising steps of the whole schedule.
        guidance_scale: of classifier-free guidance; values up to 1 disable it.
        init_latents: [B, C, h, w], noised and used as the start (SDEdit, arXiv 2108.01073); None starts from noise.
        strength: 0…1, fraction of the steps to run on `init_latents`, at least one; at 1 they have no effect.
    """
    scale = max(guidance_scale, 1.0)
    steps_to_run = steps if init_latents is None else max(1, round(strength * steps))
    timesteps = trailing_timesteps(denoiser.schedule, steps, denoiser.timestep)[steps - steps_to_run :]
    if init_latents is None or steps_to_run == steps:
        noisy, _ = denoiser.pure_noise(noise)
    else:
        start = torch.full((len(noise),), timesteps[0], device=noise.device)
        noisy = add_noise(denoiser.schedule, init_latents, noise, start)
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        x0 = teacher_x0(denoiser, noisy, torch.full((len(noise),), t, device=noise.device), conditioning, null, scale)
        noisy = ddim_step(denoiser.schedule, x0, noisy, t, t_next)
    return noisy


@torch.no_grad()
def generate(
    pair: ModelPair, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> Iterator[Tensor]:
    """Generate one image per prompt and seed, batch by batch.

    Args:
        pair: the models.
        prompts: one per image.
        seeds: one per image.
        settings: how to generate.

    Yields:
        uint8 [H, W, 3] on the CPU, in the order of the prompts.

    Raises:
        EchoDistillError: an image is not finite.
        ModelError: the settings ask for the teacher, which was not loaded.
    """
    denoiser = pair.role(settings.role)
    sides = [(side or settings.size) // pair.codec.factor for side in (settings.height, settings.width)]
    null = pair.encoder.encode_null()
    for start in range(0, len(prompts), settings.batch_size):
        chunk = slice(start, start + settings.batch_size)
        noise = seeded_noise(seeds[chunk], (pair.codec.channels, *sides)).to(pair.device)
        conditioning = pair.encoder.encode(prompts[chunk])
        latents = sample_latents(
            denoiser, noise, conditioning, null, steps=settings.steps, guidance_scale=settings.guidance_scale
        )
        images = pair.codec.decode(latents)
        _require_finite(images)
        yield from to_uint8(images)


def _require_finite(images: Tensor) -> None:
    # NaN would be written as black pixels.
    if not torch.isfinite(images).all():
        raise EchoDistillError(
            "The image is not finite: half precision overflowed in the VAE, or the LoRA diverged in training.",
            "Generate with --precision fp32, or train with a VAE made for fp16: "
            "echodistill train --vae madebyollin/sdxl-vae-fp16-fix",
        )


def to_uint8(images: Tensor) -> Tensor:
    """Convert images to uint8 [B, H, W, 3] on the CPU, clipped.

    Args:
        images: [B, 3, H, W] in [-1, 1].
    """
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
