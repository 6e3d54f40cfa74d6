"""Photos → augmented (image, mask, prompt) views from one seeded generator; prompt templates.

The teacher's augmentation is Custom Diffusion's (Kumari et al., CVPR 2023): the photo is either pasted small on an
empty canvas, where the loss counts on the photo alone, or zoomed into, and the prompt says which.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import TEMPLATES, UNFRAMED_TEMPLATES, with_subject

PASTE_PROBABILITY = 0.66
SMALL_SCALE = 0.6  # pasted below this scale, the prompt speaks of it
PASTE_SCALES = (1 / 3, 1.0)
ZOOMS = (1.2, 1.4)
REAL_ZOOMS = (1.0, 1.15)
SMALL_FRAMINGS = ("far away", "very small")
ZOOMED_FRAMINGS = ("zoomed in", "close up")
# Outside the subject mask the loss keeps this weight: at 0 the adapters could put anything there, and would.
BACKGROUND_WEIGHT = 0.1


@dataclass(frozen=True, eq=False)
class View:
    """One augmented photo.

    Attributes:
        image: float32 [3, H, W] in [-1, 1].
        mask: float32 [1, H, W] in 0…1, how much the denoising loss counts there.
        framing: "", "far away", "very small", "zoomed in" or "close up".
        caption: the photo's own caption, if it has one.
        photo: index of the photo.
        crop: (top, left) of the view in the whole photo, in pixels of the view, as SDXL is told; (0, 0) on a canvas.
        colour: "", or the one that the subject has been given.
    """

    image: Tensor
    mask: Tensor
    framing: str
    caption: str | None
    photo: int
    crop: tuple[int, int] = (0, 0)
    colour: str = ""


def teacher_views(photos: Sequence[Photo], *, resolution: int, count: int, generator: torch.Generator) -> list[View]:
    """Views for the teacher's denoising loss, each photo equally often (give or take one), in random order.

    Each is flipped with probability ½. With probability 0.66 its square crop is pasted at a scale of ⅓…1 of the side
    at a random place of an empty canvas (0, mid-grey); the mask is 0 outside and, below scale 0.6, the framing says so.
    Otherwise it is zoomed 1.2…1.4 into a random place of the crop. Subject masks weigh the background 0.1.

    Args:
        photos: at least one, unless `count` is 0.
        resolution: side H = W of the views in pixels.
        count: how many views.
        generator: a CPU generator, the only source of randomness: the same state gives bit-identical views.

    Raises:
        ValueError: views are wanted of no photos.
    """
    views = []
    for index in _balanced(len(photos), count, generator):
        flip = _uniform(0, 1, generator) < 0.5
        if _uniform(0, 1, generator) < PASTE_PROBABILITY:
            views.append(_pasted(photos[index], index, flip, resolution, generator))
        else:
            framing = _choice(ZOOMED_FRAMINGS, generator)
            box = _zoomed_box(photos[index].crop, _uniform(*ZOOMS, generator), generator)
            views.append(_framed(photos[index], index, box, flip, resolution, framing))
    return views


def real_views(photos: Sequence[Photo], *, resolution: int, count: int, generator: torch.Generator) -> list[View]:
    """Views as the discriminators' reals, for identity features, and for a teacher that sees plain photos: no canvas.

    The first `len(photos)` are the plain square crops in order, a reference set; the others are flipped with
    probability ½ and zoomed 1…1.15 into a random place, each photo equally often (give or take one). Arguments and
    errors are those of `teacher_views`.
    """
    plain = range(min(count, len(photos)))
    views = [_framed(photos[index], index, photos[index].crop, False, resolution, "") for index in plain]
    for index in _balanced(len(photos), count - len(views), generator):
        flip = _uniform(0, 1, generator) < 0.5
        box = _zoomed_box(photos[index].crop, _uniform(*REAL_ZOOMS, generator), generator)
        views.append(_framed(photos[index], index, box, flip, resolution, ""))
    return views


def prompt_for(view: View, subject: str, generator: torch.Generator) -> str:
    """A prompt for a view, such as "a photo of a sks dog, far away".

    A caption that holds the subject's token (the first word of `subject`) stands as it is; another one follows
    "a photo of a {subject}". Without a caption a template is drawn. A view's colour comes before the token.
    """
    token = rf"(?<!\w){re.escape(subject.split()[0])}(?!\w)"
    named = f"{view.colour} {subject}".lstrip()
    if view.caption is None:
        text = with_subject(_choice(UNFRAMED_TEMPLATES if view.framing else TEMPLATES, generator), named)
    elif re.search(token, view.caption, re.IGNORECASE):
        text = re.sub(token, lambda found: f"{view.colour} {found[0]}".lstrip(), view.caption, flags=re.IGNORECASE)
    else:
        text = f"{with_subject('a photo of a {}', named)}, {view.caption}"
    return f"{text}, {view.framing}" if view.framing else text


def _pasted(photo: Photo, index: int, flip: bool, resolution: int, generator: torch.Generator) -> View:
    scale = _uniform(*PASTE_SCALES, generator)
    side = max(1, round(scale * resolution))
    framing = _choice(SMALL_FRAMINGS, generator) if side < SMALL_SCALE * resolution else ""
    top, left = (_integer(resolution - side + 1, generator) for _ in range(2))
    small = _framed(photo, index, photo.crop, flip, side, framing)
    image, mask = torch.zeros(3, resolution, resolution), torch.zeros(1, resolution, resolution)
    image[:, top : top + side, left : left + side] = small.image
    mask[:, top : top + side, left : left + side] = small.mask
    return View(image, mask, framing, photo.caption, index)


def _framed(
    photo: Photo, index: int, box: tuple[float, float, float, float], flip: bool, side: int, framing: str
) -> View:
    """The part `box` of a photo, resized (antialiased) to `side` pixels."""
    pixels = np.asarray(photo.image.resize((side, side), Image.Resampling.LANCZOS, box=box), dtype=np.float32)
    image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()
    mask = torch.ones(1, side, side)
    if photo.mask is not None:
        resized = photo.mask.resize((side, side), Image.Resampling.BILINEAR, box=box)
        mask = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)[None].clamp(min=BACKGROUND_WEIGHT)
    if flip:
        image, mask = image.flip(-1), mask.flip(-1)
    left = photo.image.width - box[2] if flip else box[0]
    scale = side / (box[2] - box[0])
    return View(image, mask, framing, photo.caption, index, (round(box[1] * scale), round(left * scale)))


def _zoomed_box(
    crop: tuple[int, int, int, int], zoom: float, generator: torch.Generator
) -> tuple[float, float, float, float]:
    """A square 1 / zoom as wide as the crop, at a random place in it."""
    side = (crop[2] - crop[0]) / zoom
    left = _uniform(crop[0], crop[2] - side, generator)
    top = _uniform(crop[1], crop[3] - side, generator)
    # Pillow refuses a box that rounding lifts over the edge.
    return left, top, min(left + side, crop[2]), min(top + side, crop[3])


def _balanced(length: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` indices below `length`: shuffled rounds, each through all of them."""
    if count > 0 and length == 0:
        raise ValueError(f"{count} views are wanted, but there are no photos")
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
