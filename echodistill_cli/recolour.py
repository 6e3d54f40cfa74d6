"""Views of the photos with the subject in another colour and the colour's name in the prompt, so that it stays a word.

Photos show a subject in one colour only; a model that learns from them alone soon forgets the subject or the word when
it is asked for "a red sks dog". Where the colour belongs needs no mask: from one noisy photo the teacher predicts
"a red dog" and "a blue dog", and the two differ where the dog is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.dataset import BACKGROUND_WEIGHT, View, with_subject
from echodistill_cli.diffusion import add_noise, predict_x0
from echodistill_cli.pair import ModelPair
from echodistill_cli.photos import Photo

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "blue": (45, 95, 230),
    "green": (50, 175, 70),
    "purple": (140, 60, 200),
    "yellow": (250, 205, 40),
    "pink": (250, 120, 180),
}
_CONTRASTS = (("red", "blue"), ("green", "pink"), ("yellow", "purple"))
# Shares of the schedule: with less noise the photo leaves no colour open, with more no shape.
_NOISE_LEVELS = (0.35, 0.5, 0.65, 0.8)
# The differences at which a mask is 0 and 1, as quantiles over the picture.
_NOT_SUBJECT, _SUBJECT = 0.3, 0.9


def recoloured(
    views: Sequence[View],
    photos: Sequence[Photo],
    share: float,
    class_name: str,
    pair: ModelPair,
    generator: torch.Generator,
) -> list[View]:
    """The views, a share of them with the subject tinted, each colour equally often; the order stays.

    Args:
        photos: those the views are of; a photo's own mask says where its subject is.
        share: 0…1. class_name: the subject's class, such as dog.
        pair: its teacher, not yet trained, says where the subject is in photos without a mask.
        generator: a CPU generator, the only source of randomness.
    """
    rows = torch.randperm(len(views), generator=generator)[: round(share * len(views))].tolist()
    names = [list(COLOURS)[index % len(COLOURS)] for index in range(len(rows))]
    result = list(views)
    for row, name in zip(rows, names, strict=True):
        view = views[row]
        if photos[view.photo].mask is None:
            mask = subject_mask(view.image.to(pair.device), class_name, pair, generator).cpu()
        else:
            mask = (view.mask - BACKGROUND_WEIGHT) / (1 - BACKGROUND_WEIGHT)
        where = mask.clamp(min=0) * (view.mask > 0)
        image = view.image * (1 - where) + tinted(view.image, COLOURS[name]) * where
        result[row] = replace(view, image=image, colour=name)
    return result


@torch.no_grad()
def subject_mask(image: Tensor, class_name: str, pair: ModelPair, generator: torch.Generator) -> Tensor:
    """Where a picture shows the class, as soft values [1, H, W] in 0…1.

    After DiffEdit (Couairon et al. 2022), with two colours of the class in place of two classes: the subject is in the
    picture either way, and its colour is all that the two prompts disagree about.

    Args:
        image: [3, H, W] in [-1, 1].
    """
    teacher, levels = pair.role("teacher"), len(_NOISE_LEVELS)
    latents = pair.codec.encode(image.unsqueeze(0)).expand(levels, -1, -1, -1)
    steps = len(teacher.schedule.alphas_cumprod)
    timesteps = torch.tensor([int(level * steps) for level in _NOISE_LEVELS], device=latents.device)
    total = torch.zeros(1, 1, *latents.shape[2:], device=latents.device)
    for pairing in _CONTRASTS:
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


def tinted(image: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """A picture [3, H, W] in [-1, 1] in shades of one colour, dark stays dark and bright stays bright."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    light = ((image + 1) / 2 * weights).sum(dim=0, keepdim=True)
    tint = torch.tensor(colour).view(3, 1, 1) / 255
    middle = 0.6  # the lightness that has the colour itself
    shaded = torch.where(light < middle, tint * light / middle, tint + (1 - tint) * (light - middle) / (1 - middle))
    return shaded.clamp(0, 1) * 2 - 1
