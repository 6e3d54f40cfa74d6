"""From noise to pictures: the student's single step, the teacher's guided x0, and `generate` for people.

Noise is always drawn on the CPU, from one generator per picture, so that a picture depends on its own seed alone: not
on the device, the batch size or its neighbours.
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
    """How pictures are drawn.

    Args:
        role: which of the two models draws. steps: denoising steps. guidance_scale: 0 or 1 mean without guidance.
        size: side in pixels. batch_size: pictures drawn at once; it changes speed, not pictures.
    """

    role: Role = "student"
    steps: int = 1
    guidance_scale: float = 0.0
    size: int = 512
    batch_size: int = 4


def student_x0(student: Denoiser, noise: Tensor, conditioning: Conditioning) -> Tensor:
    """The student's picture as a clean latent: one Euler step from the last timestep. Noise [B, C, h, w] is unit."""
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
    """The teacher's guided prediction of the clean latent at z_t; both halves of the guidance in one pass.

    Args:
        null: the empty prompt's conditioning, batch 1.
        guidance_scale: of classifier-free guidance; at 1 the empty prompt is not asked.
    """
    if guidance_scale == 1:
        output = teacher(noisy, timesteps, conditioning)
    else:
        both = conditioning.join(null.expand(len(noisy)))
        guided, unguided = teacher(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
        output = guide(guided, unguided, guidance_scale)
    return predict_x0(teacher.schedule, output, noisy, timesteps)


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Unit noise [len(seeds), *shape] on the CPU, each from its own seed."""
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
    picture: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Clean latents [B, C, h, w] from unit noise in `steps` deterministic steps, trailing spacing.

    Args:
        picture: latents to begin with instead, given as much of the noise as the last `strength` of the steps need
            (SDEdit, arXiv 2108.01073; at least one step is taken); at 1 they count for nothing.

    SDXL-Turbo is published with an ancestral scheduler, which adds new noise between steps. At one step the two are
    the same bit for bit; in more, the deterministic one keeps a picture a function of its seed and the steps alone.
    """
    scale = max(guidance_scale, 1.0)
    taken = steps if picture is None else max(1, round(strength * steps))
    timesteps = trailing_timesteps(denoiser.schedule, steps)[steps - taken :]
    if picture is None or taken == steps:
        noisy, _ = denoiser.pure_noise(noise)
    else:
        first = torch.full((len(noise),), timesteps[0], device=noise.device)
        noisy = add_noise(denoiser.schedule, picture, noise, first)
    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        at = torch.full((len(noise),), now, device=noise.device)
        x0 = teacher_x0(denoiser, noisy, at, conditioning, null, scale)
        noisy = ddim_step(denoiser.schedule, x0, noisy, now, then)
    return noisy


@torch.no_grad()
def generate(
    pair: ModelPair, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> Iterator[Tensor]:
    """Draw one picture per (prompt, seed), batch by batch.

    Args:
        prompts, seeds: of equal length.

    Yields:
        uint8 pictures [H, W, 3] on the CPU, in order.
    """
    denoiser = pair.role(settings.role)
    side = settings.size // pair.codec.factor
    null = pair.encoder.encode_null()
    for start in range(0, len(prompts), settings.batch_size):
        chunk = slice(start, start + settings.batch_size)
        noise = seeded_noise(seeds[chunk], (pair.codec.channels, side, side)).to(pair.device)
        conditioning = pair.encoder.encode(prompts[chunk])
        latents = sample_latents(
            denoiser, noise, conditioning, null, steps=settings.steps, guidance_scale=settings.guidance_scale
        )
        yield from to_uint8(_not_black(pair.codec.decode(latents)))


def _not_black(images: Tensor) -> Tensor:
    """The pictures; where there are none but overflowed numbers, which would be written as black, an error."""
    if torch.isfinite(images).all():
        return images
    raise EchoDistillError(
        "The picture is not finite: half precision overflowed in the VAE, or the LoRA had diverged.",
        "Draw with --precision fp32, or train with a VAE made for fp16: "
        "echodistill train --vae madebyollin/sdxl-vae-fp16-fix",
    )


def to_uint8(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3] on the CPU; what is outside the range is clipped."""
    scaled = (images.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
