"""Where a photo shows its subject, as the untouched teacher knows it: no other model and no user's mask is needed.

From one noisy photo the teacher predicts "a red dog" and "a blue dog", and the two differ where the dog is.
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
# Shares of the schedule: with less noise the photo leaves no colour open, with more no shape.
_NOISE_LEVELS = (0.35, 0.5, 0.65, 0.8)
# The differences at which a mask is 0 and 1, as quantiles over the picture.
_NOT_SUBJECT, _SUBJECT = 0.3, 0.9


def with_masks(
    photos: Sequence[Photo], class_name: str, pair: ModelPair, resolution: int, generator: torch.Generator
) -> list[Photo]:
    """The photos; those without a mask get the one that the teacher finds in their square crop, and nothing beside it.

    Args:
        class_name: the subject's class, such as dog. pair: its teacher is not yet trained.
        resolution: side of the crop in pixels as the teacher is to see it. generator: a CPU generator.
    """
    crops = real_views(photos, resolution=resolution, count=len(photos), generator=generator)
    result = []
    for photo, view in zip(photos, crops, strict=True):
        if photo.mask is None:
            values = subject_mask(view.image.to(pair.device), class_name, pair, generator)[0].cpu().numpy()
            found = Image.fromarray((values * 255).round().astype(np.uint8))
            left, top, right, bottom = photo.crop
            mask = Image.new("L", photo.image.size)
            mask.paste(found.resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
            photo = replace(photo, mask=mask)
        result.append(photo)
    return result


@torch.no_grad()
def subject_mask(
    image: Tensor, class_name: str, pair: ModelPair, generator: torch.Generator, contrasts: int = len(_CONTRASTS)
) -> Tensor:
    """Where a picture shows the class, as soft values [1, H, W] in 0…1.

    After DiffEdit (Couairon et al. 2022), with two colours of the class in place of two classes: the subject is in the
    picture either way, and its colour is all that the two prompts disagree about.

    Args:
        image: [3, H, W] in [-1, 1]. contrasts: pairs of colours to ask for, 1…3; more are surer, and as much slower.
    """
    teacher, levels = pair.teacher, len(_NOISE_LEVELS)
    latents = pair.codec.encode(image.unsqueeze(0)).expand(levels, -1, -1, -1)
    steps = len(teacher.schedule.alphas_cumprod)
    timesteps = torch.tensor([int(level * steps) for level in _NOISE_LEVELS], device=latents.device)
    total = torch.zeros(1, 1, *latents.shape[2:], device=latents.device)
    for pairing in _CONTRASTS[:contrasts]:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = add_noise(teacher.schedule, latents, noise, timesteps)
        drawn = []
        for colour in pairing:
            prompt = with_subject("a photo of a {}", f"{colour} {class_name}")
            output = teacher(noisy, timesteps, pair.encoder.encode([prompt] * levels))
            drawn.append(predict_x0(teacher.schedule, output, noisy, timesteps).float())
        apart = (drawn[0] - drawn[1]).abs().mean(dim=1, keepdim=True)
        total += (apart / apart.mean(dim=(2, 3), keepdim=True).clamp(min=1e-8)).sum(dim=0, keepdim=True)
    low, high = (total.flatten().quantile(level) for level in (_NOT_SUBJECT, _SUBJECT))
    mask = ((total - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)
    return F.interpolate(mask, image.shape[-2:], mode="bilinear")[0]


_COMPONENTS = 4
_ROUNDS = 3
_FITTING_STEPS = 8
# A mask is never sure of itself: what it says of a pixel can be outvoted by the pixel's colour, and the reverse.
_SUREST = 0.98
_COLOUR_WEIGHT, _LARGEST_VOTE = 0.7, 4.0
# Added to each covariance, in a picture's units of -1…1: no mixture sits on one flat colour.
_LEAST_VARIANCE = 0.01
# Where the result is made 0 and 1: half a tint is neither colour.
_OUTSIDE, _INSIDE = 0.3, 0.7
_SIDE = 128


def refined_mask(mask: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
    """A mask that follows the picture's colours, nearly hard.

    Args:
        mask: [1, H, W] in 0…1, a rough guess. image: [3, H, W] in [-1, 1].
        generator: a CPU generator; the mixtures begin with pixels that it picks.

    Returns:
        [1, H, W] in 0…1; found at 128 pixels a side at most.
    """
    scale = min(1.0, _SIDE / max(image.shape[-2:]))
    size = [round(side * scale) for side in image.shape[-2:]]
    small, guess = (F.interpolate(x.unsqueeze(0).float().cpu(), size, mode="area")[0] for x in (image, mask))
    pixels, guess = small.flatten(1).T, guess.flatten().clamp(1 - _SUREST, _SUREST)
    found = guess
    for _ in range(_ROUNDS):
        votes = _log_likelihood(pixels, found, generator) - _log_likelihood(pixels, 1 - found, generator)
        votes = _COLOUR_WEIGHT * votes.clamp(-_LARGEST_VOTE, _LARGEST_VOTE)
        smooth = F.avg_pool2d(torch.sigmoid(guess.logit() + votes).view(1, 1, *size), 3, 1, 1, count_include_pad=False)
        found = smooth.flatten().clamp(1 - _SUREST, _SUREST)
    hard = ((found - _OUTSIDE) / (_INSIDE - _OUTSIDE)).clamp(0, 1).view(1, 1, *size)
    return F.interpolate(hard, image.shape[-2:], mode="bilinear")[0].to(image.device)


def _log_likelihood(pixels: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Of pixels [N, 3] under the mixture that expectation maximization fits to them, weighted by `weights` [N]; [N]."""
    means = pixels[torch.multinomial(weights, _COMPONENTS, generator=generator)]
    shares = torch.softmax(-(pixels[:, None] - means).square().sum(dim=-1) / 0.1, dim=1)
    for _ in range(_FITTING_STEPS):
        counted = shares * weights[:, None]
        total = counted.sum(dim=0) + 1e-3
        means = counted.T @ pixels / total[:, None]
        apart = pixels[:, None] - means
        spread = torch.einsum("nk,nki,nkj->kij", counted, apart, apart) / total[:, None, None]
        root = torch.linalg.cholesky(spread + _LEAST_VARIANCE * torch.eye(3))
        white = torch.linalg.solve_triangular(root, apart.permute(1, 2, 0), upper=False)
        log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        each = -0.5 * white.square().sum(dim=1).T - log_root + (total / total.sum()).log() - 1.5 * math.log(2 * math.pi)
        shares = torch.softmax(each, dim=1)
    return torch.logsumexp(each, dim=1)
