"""Augmented views of the photos and their prompts, from one seeded generator.

The teacher's augmentation is Custom Diffusion's (Kumari et al., CVPR 2023). The photo is either pasted at a small scale
on an empty canvas, which the loss ignores, or zoomed into. The prompt states which. Its random flips are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import TEMPLATES, UNFRAMED_TEMPLATES, with_subject

PASTE_PROBABILITY = 0.66
SMALL_SCALE = 0.6  # pasted below this scale, the prompt says so
PASTE_SCALES = (1 / 3, 1.0)
ZOOMS = (1.2, 1.4)
REAL_ZOOMS = (1.0, 1.15)
SMALL_FRAMINGS = ("far away", "very small")
ZOOMED_FRAMINGS = ("zoomed in", "close up")
# Weight of the loss outside of the subject mask. At 0, the adapters would generate arbitrary backgrounds.
BACKGROUND_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class View:
    """One augmented photo.

    Attributes:
        image: float32 [3, H, W] in [-1, 1].
        mask: float32 [1, H, W] in 0…1, weight of the denoising loss.
        framing: "", "far away", "very small", "zoomed in" or "close up".
        caption: the photo's caption, if it has one.
        photo: index of the photo.
        crop: SDXL's crop coordinates: (top, left) of the view in the photo, in pixels of the view; (0, 0) on a canvas.
    """

    image: Tensor
    mask: Tensor
    framing: str
    caption: str | None
    photo: int
    crop: tuple[int, int] = (0, 0)


def teacher_views(photos: Sequence[Photo], *, resolution: int, count: int, generator: torch.Generator) -> list[View]:
    """Return views for the teacher's denoising loss, all photos equally often (±1), in random order.

    With probability 0.66, the square crop is pasted at a scale of ⅓…1 at a random place of an empty gray canvas. The
    mask is 0 on the canvas, and below scale 0.6 the framing says so. Otherwise, the view zooms 1.2…1.4 into a random
    place of the crop. With a subject mask, the background has weight 0.1. No view is mirrored: that would teach
    mirrored writing and, in one step, images with a head on both ends.

    Args:
        photos: at least one, unless `count` is 0.
        resolution: side H = W of the views in pixels.
        count: number of views.
        generator: a CPU generator, the only source of randomness.

    Raises:
        ValueError: there are no photos, but `count` is not 0.
    """
    views = []
    for index in _balanced(len(photos), count, generator):
        if _uniform(0, 1, generator) < PASTE_PROBABILITY:
            views.append(_pasted(photos[index], index, resolution, generator))
        else:
            framing = _choice(ZOOMED_FRAMINGS, generator)
            box = _zoomed_box(photos[index].crop, _uniform(*ZOOMS, generator), generator)
            views.append(_framed(photos[index], index, box, resolution, framing))
    return views


def real_views(photos: Sequence[Photo], *, resolution: int, count: int, generator: torch.Generator) -> list[View]:
    """Return views without a canvas, for discriminators and identity features.

    The first `len(photos)` are the square crops in order, a reference set. The others are zoomed 1…1.15 into a random
    place, all photos equally often (±1). Arguments and errors are those of `teacher_views`.
    """
    plain = range(min(count, len(photos)))
    views = [_framed(photos[index], index, photos[index].crop, resolution, "") for index in plain]
    for index in _balanced(len(photos), count - len(views), generator):
        box = _zoomed_box(photos[index].crop, _uniform(*REAL_ZOOMS, generator), generator)
        views.append(_framed(photos[index], index, box, resolution, ""))
    return views


def latent_masks(masks: Tensor, side: int) -> Tensor:
    """Return the loss weights of latents, [B, 1, side, side] in 0…1.

    A latent at the edge of a pasted photo holds canvas too, because the VAE sees farther than its own cell. One whole
    cell on every side of the photo is therefore left out, as in Custom Diffusion.

    Args:
        masks: [B, 1, H, W] in 0…1, of the pixels; exactly 0 on the canvas.
        side: height and width of the latents.
    """
    is_photo = F.interpolate((masks > 0).float(), (side, side), mode="area") > 1 - 1e-6
    near_canvas = F.max_pool2d((~is_photo).float(), kernel_size=3, stride=1, padding=1)
    return F.interpolate(masks, (side, side), mode="area") * (1 - near_canvas)


def prompt_for(view: View, subject: str, generator: torch.Generator) -> str:
    """Return a prompt for a view, such as "a photo of a sks dog, far away".

    A caption with the token is used as it is. A caption without it is appended to "a photo of a {subject}". Without a
    caption, a random template is used.

    Args:
        view: the augmented view.
        subject: such as "sks dog"; its first word is the token.
        generator: picks the template.
    """
    token = rf"(?<!\w){re.escape(subject.split()[0])}(?!\w)"
    if view.caption is None:
        text = with_subject(_choice(UNFRAMED_TEMPLATES if view.framing else TEMPLATES, generator), subject)
    elif re.search(token, view.caption, re.IGNORECASE):
        text = view.caption
    else:
        text = f"{with_subject('a photo of a {}', subject)}, {view.caption}"
    return f"{text}, {view.framing}" if view.framing else text


def _pasted(photo: Photo, index: int, resolution: int, generator: torch.Generator) -> View:
    scale = _uniform(*PASTE_SCALES, generator)
    side = max(1, round(scale * resolution))
    framing = _choice(SMALL_FRAMINGS, generator) if side < SMALL_SCALE * resolution else ""
    top, left = (_integer(resolution - side + 1, generator) for _ in range(2))
    small = _framed(photo, index, photo.crop, side, framing)
    image, mask = torch.zeros(3, resolution, resolution), torch.zeros(1, resolution, resolution)
    image[:, top : top + side, left : left + side] = small.image
    mask[:, top : top + side, left : left + side] = small.mask
    return View(image, mask, framing, photo.caption, index)


def _framed(photo: Photo, index: int, box: tuple[float, float, float, float], side: int, framing: str) -> View:
    """Return the part `box` of a photo as a view of `side` pixels, antialiased."""
    pixels = np.asarray(photo.image.resize((side, side), Image.Resampling.LANCZOS, box=box), dtype=np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()
    mask = torch.ones(1, side, side)
    if photo.mask is not None:
        resized = photo.mask.resize((side, side), Image.Resampling.BILINEAR, box=box)
        mask = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)[None].clamp(min=BACKGROUND_WEIGHT)
    scale = side / (box[2] - box[0])
    return View(image, mask, framing, photo.caption, index, (round(box[1] * scale), round(box[0] * scale)))


def _zoomed_box(
    crop: tuple[int, int, int, int], zoom: float, generator: torch.Generator
) -> tuple[float, float, float, float]:
    """Return a square 1 / zoom as wide as the crop, at a random place in it."""
    side = (crop[2] - crop[0]) / zoom
    left = _uniform(crop[0], crop[2] - side, generator)
    top = _uniform(crop[1], crop[3] - side, generator)
    # Pillow rejects a box that crosses the edge, which rounding can cause.
    return left, top, min(left + side, crop[2]), min(top + side, crop[3])


def _balanced(length: int, count: int, generator: torch.Generator) -> list[int]:
    """Return `count` indices below `length`, in consecutive random permutations."""
    if count > 0 and length == 0:
        raise ValueError(f"There are no photos to make {count} views of.")
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(length, generator=generator).tolist()
    return order[: max(count, 0)]


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _choice(options: Sequence[str], generator: torch.Generator) -> str:
    return options[_integer(len(options), generator)]
