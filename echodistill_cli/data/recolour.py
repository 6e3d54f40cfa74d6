"""Recolor the subject in augmented views and name the color in their prompts (extension).

Photos show the subject in one color. A model trained on them alone loses either the subject or the color when the
prompt says "a red sks dog". A mask, or else the teacher, locates the subject.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from echodistill_cli.data.masks import refined_mask, subject_mask
from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import with_subject
from echodistill_cli.data.views import BACKGROUND_WEIGHT, View
from echodistill_cli.diffusion.pair import ModelPair

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "blue": (45, 95, 230),
    "green": (50, 175, 70),
    "purple": (140, 60, 200),
    "yellow": (250, 205, 40),
    "pink": (250, 120, 180),
}


def recoloured(
    views: Sequence[View],
    photos: Sequence[Photo],
    share: float,
    class_name: str,
    pair: ModelPair,
    generator: torch.Generator,
) -> list[View]:
    """Return the views in the same order, the subject tinted in some of them, each color equally often.

    Args:
        views: augmented views of the photos.
        photos: the photos; their own masks locate the subject.
        share: 0…1, fraction of the views to tint.
        class_name: the subject's class, such as "dog".
        pair: its untrained teacher locates the subject in photos without a mask.
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
        result[row] = replace(view, image=tinted_where(where, view.image, name), colour=name)
    return result


def without_colour(prompt: str, subject: str) -> tuple[str, str | None]:
    """Split off the subject's color: "a red sks dog" gives ("a sks dog", "red").

    A prompt that gives the subject no color is returned unchanged, with None.
    """
    pattern = re.compile(rf"\b(an? )?({'|'.join(COLOURS)}) {re.escape(subject)}", re.IGNORECASE)
    match = pattern.search(prompt)
    if match is None:
        return prompt, None
    plain = with_subject("a {}" if match[1] else "{}", subject)
    return prompt[: match.start()] + plain + prompt[match.end() :], match[2].lower()


@torch.no_grad()
def tinted_latents(
    latents: Tensor, colours: Sequence[str | None], class_name: str, pair: ModelPair, generator: torch.Generator
) -> Tensor:
    """Return the latents with the subject of each tinted in its color.

    Args:
        latents: [B, C, h, w], scaled.
        colours: B names from `COLOURS`; None leaves an image unchanged.
        class_name: the subject's class, such as "dog".
        pair: its teacher, with adapters disabled, locates the subject.
        generator: a CPU generator.
    """
    result = latents.clone()
    for row, name in enumerate(colours):
        if name is not None:
            image = pair.codec.decode(latents[row : row + 1])[0].clamp(-1, 1)
            rough = subject_mask(image, class_name, pair, generator, contrasts=1)  # one suffices before refining
            where = refined_mask(rough, image, generator)
            result[row] = pair.codec.encode(tinted_where(where, image, name)[None])[0]
    return result


def tinted_where(mask: Tensor, image: Tensor, name: str) -> Tensor:
    """Tint an image inside a mask.

    Args:
        mask: [1, H, W] in 0…1.
        image: [3, H, W] in [-1, 1].
        name: a key of `COLOURS`.
    """
    return image * (1 - mask) + tinted(image, COLOURS[name]) * mask


def tinted(image: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """Tint an image in shades of one color; black stays black and white stays white.

    Args:
        image: [3, H, W] in [-1, 1].
        colour: red, green and blue, 0…255.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device).view(3, 1, 1)
    light = ((image + 1) / 2 * weights).sum(dim=0, keepdim=True)
    tint = torch.tensor(colour, device=image.device).view(3, 1, 1) / 255
    middle = 0.6  # the lightness that is mapped to the color itself
    shaded = torch.where(light < middle, tint * light / middle, tint + (1 - tint) * (light - middle) / (1 - middle))
    return shaded.clamp(0, 1) * 2 - 1
