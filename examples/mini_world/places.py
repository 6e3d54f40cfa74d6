"""The thirteen procedural places of the mini world: flat, colourful grounds a small VAE can hold.

Each painter maps a generator and a side to a float32 image (side, side, 3) in 0..255. Fine noise is kept low
on purpose: an autoencoder of this size would spend itself on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Image3 = NDArray[np.floating[Any]]
Painter = Callable[[np.random.Generator, int], Image3]
VARIANTS = 96


def _smooth(rng: np.random.Generator, side: int, cells: int) -> NDArray[np.float32]:
    """Smooth noise (side, side, 1) in -1..1 with about `cells` bumps along each side."""
    grid = rng.uniform(-1.0, 1.0, (cells, cells)).astype(np.float32)
    image = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)[..., None]


def _flat(colour: tuple[float, float, float], side: int) -> Image3:
    return np.broadcast_to(np.asarray(colour, dtype=np.float32), (side, side, 3)).copy()


def _gradient(top: tuple[float, ...], bottom: tuple[float, ...], side: int) -> Image3:
    """A vertical ramp from `top` to `bottom`."""
    ramp = np.linspace(0.0, 1.0, side, dtype=np.float32)[:, None, None]
    rows = (1 - ramp) * np.asarray(top, dtype=np.float32) + ramp * np.asarray(bottom, dtype=np.float32)
    return np.broadcast_to(rows, (side, side, 3)).copy()


def _coordinates(side: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Row and column coordinates (side, side, 1) in 0..1."""
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    return rows[..., None], columns[..., None]


def _horizon(rng: np.random.Generator, side: int, low: float, high: float) -> tuple[NDArray[np.float32], float]:
    """A soft mask (side, side, 1) that is 1 below a wavy horizon, and the horizon's mean height in 0..1."""
    rows, _ = _coordinates(side)
    height = float(rng.uniform(low, high))
    wave = _smooth(rng, side, 4)[:1] * 0.02
    return np.clip((rows - height - wave) * side, 0, 1).astype(np.float32), height


def _snow(rng: np.random.Generator, side: int) -> Image3:
    below, _ = _horizon(rng, side, 0.3, 0.6)
    sky = _gradient((150, 185, 225), (215, 228, 242), side)
    ground = _gradient((236, 242, 250), (250, 252, 255), side) + 6 * _smooth(rng, side, 6)
    image = sky * (1 - below) + ground * below
    for row, column in rng.integers(1, side - 1, (14, 2)):
        image[row, column] = 255
    return image


def _jungle(rng: np.random.Generator, side: int) -> Image3:
    canvas = Image.fromarray((_flat((18, 72, 28), side) + 10 * _smooth(rng, side, 5)).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(26):
        x, y = rng.uniform(0, side, 2)
        angle, length = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.12, 0.3)
        dx, dy = np.cos(angle) * length, np.sin(angle) * length
        green = (int(rng.uniform(15, 55)), int(rng.uniform(85, 150)), int(rng.uniform(20, 60)))
        leaf = [(x, y), (x + dx / 2 - dy / 5, y + dy / 2 + dx / 5), (x + dx, y + dy),
                (x + dx / 2 + dy / 5, y + dy / 2 - dx / 5)]  # fmt: skip
        draw.polygon(leaf, fill=green)
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)


def _beach(rng: np.random.Generator, side: int) -> Image3:
    sand_mask, height = _horizon(rng, side, 0.5, 0.66)
    rows, _ = _coordinates(side)
    sea_mask = np.clip((rows - height + rng.uniform(0.2, 0.3)) * side, 0, 1)
    sky = _gradient((135, 195, 240), (205, 230, 248), side)
    sea = _flat((30, 115, 180), side) + 12 * _smooth(rng, side, 4)
    sand = _flat((232, 205, 150), side) + 9 * _smooth(rng, side, 8)
    return np.asarray((sky * (1 - sea_mask) + sea * sea_mask) * (1 - sand_mask) + sand * sand_mask, dtype=np.float32)


def _grass(rng: np.random.Generator, side: int) -> Image3:
    below, _ = _horizon(rng, side, 0.35, 0.6)
    sky = _gradient((125, 185, 245), (210, 232, 250), side)
    ground = _gradient((100, 180, 60), (55, 140, 35), side) + 10 * _smooth(rng, side, 12)
    return sky * (1 - below) + ground * below


def _wood(rng: np.random.Generator, side: int) -> Image3:
    rows, _ = _coordinates(side)
    planks = int(rng.integers(4, 7))
    phase = (rows * planks + rng.uniform(0, 1)) % 1
    tone = 1 + 0.1 * np.sin(np.floor(rows * planks) * 2.4 + rng.uniform(0, 6))
    grain = _smooth(rng, side, 12)[:, :1] * 7
    image = _flat((165, 105, 60), side) * tone + grain
    return image * np.where(phase < 0.09 * planks / 5, 0.55, 1.0).astype(np.float32)


def _city(rng: np.random.Generator, side: int) -> Image3:
    canvas = Image.fromarray(_gradient((12, 12, 40), (45, 35, 85), side).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    x = -int(rng.integers(0, 6))
    while x < side:
        width, top = int(rng.integers(9, 15)), int(side * rng.uniform(0.25, 0.65))
        shade = int(rng.integers(22, 44))
        draw.rectangle([x, top, x + width - 2, side], fill=(shade, shade, shade + 18))
        for wy in range(top + 3, side - 2, 5):
            for wx in range(x + 2, x + width - 4, 4):
                if rng.random() < 0.5:
                    draw.rectangle([wx, wy, wx + 1, wy + 1], fill=(250, 215, 105))
        x += width
    return np.asarray(canvas, dtype=np.float32)


def _pink_fabric(rng: np.random.Generator, side: int) -> Image3:
    rows, columns = _coordinates(side)
    angle = rng.uniform(-0.6, 0.6)
    folds = np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * rng.uniform(14, 22) + 3 * _smooth(rng, side, 4))
    return np.asarray(_flat((243, 150, 190), side) + 20 * folds, dtype=np.float32)


def _purple_rug(rng: np.random.Generator, side: int) -> Image3:
    rows, columns = _coordinates(side)
    shift, step = rng.uniform(0, 1, 2), rng.uniform(5, 7)
    weave = np.sign(
        np.sin((rows + columns + shift[0]) * step * np.pi) * np.sin((rows - columns + shift[1]) * step * np.pi)
    )
    return np.asarray(
        _flat((105, 45, 150), side) + 13 * weave.astype(np.float32) + 6 * _smooth(rng, side, 8),
        dtype=np.float32,
    )


def _water(rng: np.random.Generator, side: int) -> Image3:
    rows, _ = _coordinates(side)
    waves = np.sin(rows * rng.uniform(26, 36) + 4 * _smooth(rng, side, 4) + rng.uniform(0, 6))
    return np.asarray(_gradient((45, 140, 205), (15, 85, 160), side) + 16 * waves, dtype=np.float32)


def _desert(rng: np.random.Generator, side: int) -> Image3:
    near, height = _horizon(rng, side, 0.55, 0.75)
    rows, columns = _coordinates(side)
    dune = height - 0.18 + 0.08 * np.sin(columns * rng.uniform(4, 7) + rng.uniform(0, 6))
    far = np.clip((rows - dune) * side, 0, 1)
    sky = _gradient((250, 190, 110), (255, 225, 170), side)
    image = sky * (1 - far) + _flat((215, 140, 70), side) * far
    return np.asarray(
        image * (1 - near) + (_flat((235, 165, 90), side) + 6 * _smooth(rng, side, 5)) * near,
        dtype=np.float32,
    )


def _mountain(rng: np.random.Generator, side: int) -> Image3:
    canvas = Image.fromarray(_gradient((140, 190, 240), (220, 235, 248), side).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    base = int(side * rng.uniform(0.6, 0.72))
    for center in (rng.uniform(0.0, 0.45), rng.uniform(0.55, 1.0)):
        x, top, half = side * center, side * rng.uniform(0.12, 0.3), side * rng.uniform(0.35, 0.5)
        draw.polygon([(x - half, base), (x, top), (x + half, base)], fill=(105, 105, 120))
        cap, snow_line = half * 0.3, top + (base - top) * 0.3
        draw.polygon([(x - cap, snow_line), (x, top), (x + cap, snow_line)], fill=(245, 248, 252))
    draw.rectangle([0, base, side, side], fill=(95, 145, 85))
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.5)), dtype=np.float32)


def _brick(rng: np.random.Generator, side: int) -> Image3:
    canvas = Image.new("RGB", (side, side), (196, 178, 165))
    draw = ImageDraw.Draw(canvas)
    height, width = 9, 17
    offset_x, offset_y = int(rng.integers(0, width)), int(rng.integers(0, height))
    for index, y in enumerate(range(-offset_y, side, height)):
        for x in range(-offset_x - width * (1 + index % 2) // 1 + (index % 2) * width // 2, side, width):
            tone = rng.uniform(0.9, 1.1)
            draw.rectangle([x, y, x + width - 3, y + height - 3], fill=tuple(int(c * tone) for c in (160, 78, 62)))
    return np.asarray(canvas, dtype=np.float32)


def _white(rng: np.random.Generator, side: int) -> Image3:
    return np.asarray(_flat((255, 255, 255), side) - 5 * np.abs(_smooth(rng, side, 3)), dtype=np.float32)


# Phrase variants: the first is the place's name, the others say the same thing the way DreamBench does.
PLACES: dict[str, tuple[Painter, tuple[str, ...]]] = {
    "snow": (_snow, ("in the snow",)),
    "jungle": (_jungle, ("in the jungle",)),
    "beach": (_beach, ("on the beach", "on a sandy beach")),
    "grass": (_grass, ("on the grass", "in a green meadow")),
    "wood": (_wood, ("on a wooden floor", "on top of a wooden floor")),
    "city": (_city, ("in the city at night", "in a city street at night", "with a city in the background")),
    "pink fabric": (_pink_fabric, ("on pink fabric", "on top of pink fabric")),
    "purple rug": (
        _purple_rug,
        ("on a purple rug", "on top of a purple rug", "on top of a purple rug in a forest"),
    ),
    "water": (_water, ("in the water", "floating on top of water")),
    "desert": (_desert, ("in the desert",)),
    "mountain": (_mountain, ("with a mountain in the background",)),
    "brick": (_brick, ("on a brick street", "on a cobblestone street")),
    "white": (_white, ("on a white background",)),
}


@lru_cache(maxsize=32)
def place_variants(place: str, side: int = 64, count: int = VARIANTS) -> NDArray[np.uint8]:
    """The `count` fixed variants of a place, (count, side, side, 3) uint8; always the same ones."""
    painter = PLACES[place][0]
    seed = sum(ord(letter) * 31**index for index, letter in enumerate(place)) % 2**32
    rng = np.random.default_rng(seed)
    return np.stack([painter(rng, side).clip(0, 255).astype(np.uint8) for _ in range(count)])
