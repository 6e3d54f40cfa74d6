"""Views of the photos with the subject in another colour and the colour's name in the prompt, so that it stays a word.

Photos show a subject in one colour only; a model that learns from them alone soon forgets the subject or the word when
it is asked for "a red sks dog". Where the colour belongs a mask says, or the teacher.
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
        result[row] = replace(view, image=tinted_where(where, view.image, name), colour=name)
    return result


def without_colour(prompt: str, subject: str) -> tuple[str, str | None]:
    """A prompt without the colour that it gives the subject, and that colour; or as it is, and None.

    "a red sks dog in the snow" becomes "a sks dog in the snow", and "red".
    """
    coloured = re.compile(rf"\b(an? )?({'|'.join(COLOURS)}) {re.escape(subject)}", re.IGNORECASE)
    found = coloured.search(prompt)
    if found is None:
        return prompt, None
    plain = with_subject("a {}" if found[1] else "{}", subject)
    return prompt[: found.start()] + plain + prompt[found.end() :], found[2].lower()


@torch.no_grad()
def tinted_latents(
    latents: Tensor, colours: Sequence[str | None], class_name: str, pair: ModelPair, generator: torch.Generator
) -> Tensor:
    """Pictures as latents [B, C, h, w], the subject of each in its colour; None leaves one as it is.

    Args:
        pair: its teacher, as if not trained, says where the subject is. generator: a CPU generator.
    """
    result = latents.clone()
    for row, name in enumerate(colours):
        if name is not None:
            image = pair.codec.decode(latents[row : row + 1])[0].clamp(-1, 1)
            rough = subject_mask(image, class_name, pair, generator, contrasts=1)  # refining makes up for the others
            where = refined_mask(rough, image, generator)
            result[row] = pair.codec.encode(tinted_where(where, image, name)[None])[0]
    return result


def tinted_where(mask: Tensor, image: Tensor, name: str) -> Tensor:
    """A picture [3, H, W] in [-1, 1], inside a mask [1, H, W] in [0, 1] in shades of the colour of that name."""
    return image * (1 - mask) + tinted(image, COLOURS[name]) * mask


def tinted(image: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """A picture [3, H, W] in [-1, 1] in shades of one colour, dark stays dark and bright stays bright."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device).view(3, 1, 1)
    light = ((image + 1) / 2 * weights).sum(dim=0, keepdim=True)
    tint = torch.tensor(colour, device=image.device).view(3, 1, 1) / 255
    middle = 0.6  # the lightness that has the colour itself
    shaded = torch.where(light < middle, tint * light / middle, tint + (1 - tint) * (light - middle) / (1 - middle))
    return shaded.clamp(0, 1) * 2 - 1
