"""Sampling: the student's steps, the teacher's guided x0, and `generate` from prompts and seeds.

Noise is always drawn on the CPU, from one generator per image. An image therefore depends on its own seed, not on the
device, the batch size or the other images of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser, ModelPair, Role
from echodistill_cli.diffusion.schedule import (
    add_noise,
    ddim_step,
    guide,
    noise_from_x0,
    predict_x0,
    trailing_timesteps,
)
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import EchoDistillError

# Draws new standard normal noise of the batch's shape.
FreshNoise = Callable[[], Tensor]


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


def student_x0(student: Denoiser, latents: Tensor, conditioning: Conditioning, places: Sequence[int] = ()) -> Tensor:
    """Return the student's x0 in one of its steps, [B, C, h, w], differentiable.

    In the last step, or the only one, that is its image.

    Args:
        student: the distilled model.
        latents: [B, C, h, w], standard normal noise for a first step, z_t for a later one.
        conditioning: of B prompts.
        places: of each row's step among those of the student; empty for first steps.
    """
    noisy, timesteps = student.start(latents, places)
    return predict_x0(student.schedule, student(noisy, timesteps, conditioning), noisy, timesteps)


@dataclass(frozen=True)
class StudentStart:
    """What a batch of the student starts a step from.

    Attributes:
        latents: [B, C, h, w], standard normal noise for the first step, z_t for a later one.
        noise: [B, C, h, w], the noise in `latents`.
        place: of the step among those of the student.
    """

    latents: Tensor
    noise: Tensor
    place: int = 0

    @property
    def places(self) -> list[int]:
        """The place of each row."""
        return [self.place] * len(self.latents)


@torch.no_grad()
def student_start(
    student: Denoiser, noise: Tensor, conditioning: Conditioning, place: int, fresh: FreshNoise
) -> StudentStart:
    """Sample with the student down to one of its steps: what it will start from there when it generates.

    Trained on noised photos instead, it would never see its own errors (Yin et al. 2024, arXiv 2405.14867, 4.5).

    Args:
        student: the distilled model.
        noise: [B, C, h, w], standard normal.
        conditioning: of B prompts.
        place: of the step; 0 samples nothing.
        fresh: draws the noise between two steps.
    """
    latents, level = noise, noise
    noisy, _ = student.pure_noise(noise)
    for index in range(place):
        x0 = student_x0(student, latents, conditioning, [index] * len(noise))
        latents = noisy = _next(student, x0, noisy, student.timesteps[index], student.timesteps[index + 1], fresh)
        at = torch.full((len(noise),), student.timesteps[index + 1], device=noise.device)
        level = noise_from_x0(student.schedule, x0, latents, at)
    return StudentStart(latents, level, place)


def student_sample(student: Denoiser, noise: Tensor, conditioning: Conditioning, fresh: FreshNoise) -> Tensor:
    """Return the student's images after all of its steps; see `student_start` for the arguments."""
    start = student_start(student, noise, conditioning, student.steps - 1, fresh)
    return student_x0(student, start.latents, conditioning, start.places)


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


def seeded_noises(seeds: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """Yield standard normal noise [len(seeds), *shape] on the CPU forever, one generator per seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the first noise of `seeded_noises`."""
    return next(seeded_noises(seeds, shape))


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
    first: int | None = None,
    fresh: FreshNoise | None = None,
) -> Tensor:
    """Sample clean latents [B, C, h, w] at the model's own timesteps, or in trailing spacing.

    SDXL-Turbo is published with an ancestral scheduler, which adds new noise between steps. At one step both are
    bit-identical. With more steps, only the deterministic sampler makes an image a function of its noise and steps.

    Args:
        denoiser: the student or the teacher.
        noise: [B, C, h, w], standard normal.
        conditioning: of B prompts.
        null: of the empty prompt, batch 1.
        steps: denoising steps of the whole schedule.
        guidance_scale: of classifier-free guidance; values up to 1 disable it.
        init_latents: [B, C, h, w], noised and used as the start (SDEdit, arXiv 2108.01073); None starts from noise.
        strength: 0…1, fraction of the steps to run on `init_latents`, at least one; at 1 they have no effect.
        first: timestep at which the whole schedule starts, from `init_latents`; None for that of the model.
        fresh: draws the noise between two steps; for the sampler "lcm" only.
    """
    scale = max(guidance_scale, 1.0)
    steps_to_run = steps if init_latents is None else max(1, round(strength * steps))
    spaced = denoiser.spaced_timesteps(steps) if first is None else trailing_timesteps(denoiser.schedule, steps, first)
    timesteps = spaced[steps - steps_to_run :]
    if init_latents is None or (first is None and steps_to_run == steps):
        noisy, _ = denoiser.pure_noise(noise)
    else:
        start = torch.full((len(noise),), timesteps[0], device=noise.device)
        noisy = add_noise(denoiser.schedule, init_latents, noise, start)
    for t, t_next in zip(timesteps, [*timesteps[1:], None], strict=True):
        x0 = teacher_x0(denoiser, noisy, torch.full((len(noise),), t, device=noise.device), conditioning, null, scale)
        noisy = x0 if t_next is None else _next(denoiser, x0, noisy, t, t_next, fresh)
    return noisy


def _next(denoiser: Denoiser, x0: Tensor, noisy: Tensor, t: int, t_next: int, fresh: FreshNoise | None) -> Tensor:
    """Return z at the next timestep, with the noise in z_t or, for the sampler "lcm", with new noise."""
    if denoiser.sampler != "lcm":
        return ddim_step(denoiser.schedule, x0, noisy, t, t_next)
    assert fresh is not None
    return add_noise(denoiser.schedule, x0, fresh(), torch.full((len(x0),), t_next, device=x0.device))


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
        ModelError: a model's weights are not finite, or the settings ask for the teacher, which was not loaded.
    """
    denoiser = pair.role(settings.role)
    sides = [(side or settings.size) // pair.codec.factor for side in (settings.height, settings.width)]
    null = pair.encoder.encode_null()
    for start in range(0, len(prompts), settings.batch_size):
        chunk = slice(start, start + settings.batch_size)
        noises = (noise.to(pair.device) for noise in seeded_noises(seeds[chunk], (pair.codec.channels, *sides)))
        latents = sample_latents(
            denoiser,
            next(noises),
            pair.encoder.encode(prompts[chunk]),
            null,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            fresh=noises.__next__,
        )
        images = pair.codec.decode(latents)
        _require_finite(images, pair)
        yield from to_uint8(images)


def _require_finite(images: Tensor, pair: ModelPair) -> None:
    # NaN would be written as black pixels.
    if not torch.isfinite(images).all():
        pair.blame_weights()
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
