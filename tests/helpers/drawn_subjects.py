"""Images of a backpack that the embedded pair never saw, with their true masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUBJECT = "backpack"
SIDE = 64
# Drawings that were held out of everything the embedded pair was trained with: RGBA (96, 96, 4) by noun.
_DRAWINGS = Path(__file__).parent.parent.parent / "examples" / "benchmark" / "subjects.npz"
# Top and bottom color of each ground: snow, grass, sand, dusk, wood.
_GROUNDS = (
    ((205, 225, 245), (245, 248, 252)),
    ((150, 200, 240), (80, 150, 70)),
    ((120, 190, 235), (235, 210, 150)),
    ((60, 50, 90), (190, 120, 110)),
    ((150, 105, 70), (120, 80, 50)),
)


@dataclass(frozen=True)
class DrawnSubject:
    """`image` uint8 [64, 64, 3], and the subject's coverage `mask` uint8 [64, 64]."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def drawn_subjects() -> list[DrawnSubject]:
    """Five images of the backpack, each on another ground, at another size, place and angle."""
    with np.load(_DRAWINGS) as archive:
        drawing = Image.fromarray(archive[SUBJECT])
    rng = np.random.default_rng(0)
    return [_composed(drawing, ground, rng) for ground in _GROUNDS]


def _composed(
    drawing: Image.Image, ground: tuple[tuple[int, ...], tuple[int, ...]], rng: np.random.Generator
) -> DrawnSubject:
    down = np.linspace(0, 1, SIDE)[:, None, None]
    colors = (1 - down) * np.array(ground[0]) + down * np.array(ground[1]) + rng.normal(0, 6, (SIDE, SIDE, 1))
    image = Image.fromarray(colors.clip(0, 255).astype(np.uint8))
    length = round(float(rng.uniform(0.6, 0.85)) * SIDE)
    left, top = (int(rng.integers(SIDE - length + 1)) for _ in range(2))
    layer = Image.new("RGBA", (SIDE, SIDE))
    layer.paste(drawing.resize((length, length), Image.Resampling.BILINEAR), (left, top))
    center = (left + length / 2, top + length / 2)
    layer = layer.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC, center=center)
    image.paste(layer, (0, 0), layer)
    return DrawnSubject(np.asarray(image), np.asarray(layer.getchannel("A")))
