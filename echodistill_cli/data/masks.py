"""Estimate subject masks with the untrained teacher; needs no segmentation model.

From the same noised photo, the teacher's x0 for "a red dog" and for "a blue dog" differ where the dog is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import with_subject
from echodistill_cli.data.views import real_views
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.schedule import add_noise, predict_x0

_CONTRASTS = (("red", "blue"), ("green", "pink"), ("yellow", "purple"))
# Timesteps as fractions of the schedule. Less noise leaves the color determined, more noise destroys the shape.
_NOISE_LEVELS = (0.35, 0.5, 0.65, 0.8)
# Quantiles of the difference over the image at which the mask is 0 and 1.
_BACKGROUND_QUANTILE, _SUBJECT_QUANTILE = 0.3, 0.9


def with_masks(
    photos: Sequence[Photo], class_name: str, pair: ModelPair, resolution: int, generator: torch.Generator
) -> list[Photo]:
    """Return the photos, each with a mask: its own, or the teacher's for the square crop (0 outside).

    Args:
        photos: the checked photos.
        class_name: the subject's class, such as "dog".
        pair: its teacher must not have been trained yet.
        resolution: side of the crop in pixels that the teacher sees.
        generator: a CPU generator.
    """
    crops = real_views(photos, resolution=resolution, count=len(photos), generator=generator)
    result = []
    for photo, view in zip(photos, crops, strict=True):
        if photo.mask is None:
            values = subject_mask(view.image.to(pair.device), class_name, pair, generator)[0].cpu().numpy()
            crop_mask = Image.fromarray((values * 255).round().astype(np.uint8))
            left, top, right, bottom = photo.crop
            mask = Image.new("L", photo.image.size)
            mask.paste(crop_mask.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
            photo = replace(photo, mask=mask)
        result.append(photo)
    return result


@torch.no_grad()
def subject_mask(
    image: Tensor, class_name: str, pair: ModelPair, generator: torch.Generator, contrasts: int = len(_CONTRASTS)
) -> Tensor:
    """Return a soft mask of the class, [1, H, W] in 0…1.

    This is DiffEdit (Couairon et al. 2022) with two colors of one class instead of two classes: both prompts describe
    the subject, and only its color differs.

    Args:
        image: [3, H, W] in [-1, 1].
        class_name: the subject's class, such as "dog".
        pair: its teacher is used as it is.
        generator: a CPU generator for the noise.
        contrasts: number of color pairs, 1…3; more are more reliable and proportionally slower.
    """
    teacher, levels = pair.teacher, len(_NOISE_LEVELS)
    latents = pair.codec.encode(image.unsqueeze(0)).expand(levels, -1, -1, -1)
    steps = len(teacher.schedule.alphas_cumprod)
    timesteps = torch.tensor([int(level * steps) for level in _NOISE_LEVELS], device=latents.device)
    total = torch.zeros(1, 1, *latents.shape[2:], device=latents.device)
    for colors in _CONTRASTS[:contrasts]:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = add_noise(teacher.schedule, latents, noise, timesteps)
        x0 = []
        for color in colors:
            prompt = with_subject("a photo of a {}", f"{color} {class_name}")
            output = teacher(noisy, timesteps, pair.encoder.encode([prompt] * levels))
            x0.append(predict_x0(teacher.schedule, output, noisy, timesteps).float())
        difference = (x0[0] - x0[1]).abs().mean(dim=1, keepdim=True)
        total += (difference / difference.mean(dim=(2, 3), keepdim=True).clamp(min=1e-8)).sum(dim=0, keepdim=True)
    low, high = (total.flatten().quantile(level) for level in (_BACKGROUND_QUANTILE, _SUBJECT_QUANTILE))
    mask = ((total - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    return F.interpolate(mask, image.shape[-2:], mode="bilinear")[0]


# Color models: Gaussian mixtures of subject and background, refitted in each round by expectation maximization.
_COMPONENTS = 4
_ROUNDS = 3
_EM_STEPS = 8
# Limits on the mask's probabilities and on the color's log odds, so that each can overrule the other.
_MAX_PROBABILITY = 0.98
_COLOR_WEIGHT, _MAX_LOG_ODDS = 0.7, 4.0
# Added to each covariance (images are in [-1, 1]), so that no component collapses onto one flat color.
_MIN_VARIANCE = 0.01
# Probabilities at which the refined mask becomes 0 and 1; nearly hard, since half a tint looks like neither color.
_OUTSIDE, _INSIDE = 0.3, 0.7
_MAX_SIDE = 128


def refined_mask(mask: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
    """Refine a rough mask with the image's colors; the result is nearly hard.

    Args:
        mask: [1, H, W] in 0…1, a rough estimate.
        image: [3, H, W] in [-1, 1].
        generator: a CPU generator; picks the pixels that initialize the mixtures.

    Returns:
        [1, H, W] in 0…1, computed at a side of at most 128 pixels.
    """
    scale = min(1.0, _MAX_SIDE / max(image.shape[-2:]))
    size = [round(side * scale) for side in image.shape[-2:]]
    small, guess = (F.interpolate(x.unsqueeze(0).float().cpu(), size, mode="area")[0] for x in (image, mask))
    pixels, guess = small.flatten(1).T, guess.flatten().clamp(1 - _MAX_PROBABILITY, _MAX_PROBABILITY)
    refined = guess
    for _ in range(_ROUNDS):
        log_odds = _log_likelihood(pixels, refined, generator) - _log_likelihood(pixels, 1 - refined, generator)
        log_odds = _COLOR_WEIGHT * log_odds.clamp(-_MAX_LOG_ODDS, _MAX_LOG_ODDS)
        probability = torch.sigmoid(guess.logit() + log_odds).view(1, 1, *size)
        smooth = F.avg_pool2d(probability, 3, 1, 1, count_include_pad=False)
        refined = smooth.flatten().clamp(1 - _MAX_PROBABILITY, _MAX_PROBABILITY)
    hard = ((refined - _OUTSIDE) / (_INSIDE - _OUTSIDE)).clamp(0, 1).view(1, 1, *size)
    return F.interpolate(hard, image.shape[-2:], mode="bilinear")[0].to(image.device)


def _log_likelihood(pixels: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Fit a Gaussian mixture to weighted pixels and return each pixel's log likelihood [N].

    Args:
        pixels: [N, 3].
        weights: [N].
        generator: picks the initial means.
    """
    means = pixels[torch.multinomial(weights, _COMPONENTS, generator=generator)]
    responsibilities = torch.softmax(-(pixels[:, None] - means).square().sum(dim=-1) / 0.1, dim=1)
    for _ in range(_EM_STEPS):
        weighted = responsibilities * weights[:, None]
        total = weighted.sum(dim=0) + 1e-3
        means = weighted.T @ pixels / total[:, None]
        centered = pixels[:, None] - means
        covariance = torch.einsum("nk,nki,nkj->kij", weighted, centered, centered) / total[:, None, None]
        root = torch.linalg.cholesky(covariance + _MIN_VARIANCE * torch.eye(3))
        white = torch.linalg.solve_triangular(root, centered.permute(1, 2, 0), upper=False)
        log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        each = -0.5 * white.square().sum(dim=1).T - log_root + (total / total.sum()).log() - 1.5 * math.log(2 * math.pi)
        responsibilities = torch.softmax(each, dim=1)
    return torch.logsumexp(each, dim=1)
