"""The mini world: one seeded generator of captioned 64 px images of drawings in places.

`World.draw` picks everything from a generator; `World.render` draws what it is told. Both are pure functions
of their arguments, so an image is reproduced by its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from examples.mini_world.nouns import EXCLUDED, HELD_OUT_VENDOR, TRAIN_VENDORS, chosen_nouns, noun_words
from examples.mini_world.places import PLACES, place_variants
from examples.mini_world.sprites import Sprites, load_sprites

SIDE = 64
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40), "blue": (45, 95, 230), "green": (50, 175, 70),
    "purple": (140, 60, 200), "yellow": (250, 205, 40), "pink": (250, 120, 180),
}  # fmt: skip
TEMPLATES = (
    "a photo of {a} {x}",
    "{a} {x}",
    "a photo of the {x}",
    "a good photo of {a} {x}",
    "a rendering of {a} {x}",
)
# Half of the captions use one of these instead: the neutral wordings of personalization prompts.
NEUTRAL_TEMPLATES = (
    "a photo of one {x}",
    "a photo of my {x}",
    "a photo of this {x}",
    "a picture of {a} {x}",
    "a picture of the {x}",
    "an image of {a} {x}",
    "a depiction of {a} {x}",
    "a rendition of the {x}",
    "a nice photo of the {x}",
    "a cool photo of the {x}",
    "a clean photo of {a} {x}",
    "a bright photo of the {x}",
    "a dark photo of the {x}",
    "a detailed photo of {a} {x}",
    "a snapshot of the {x}",
)
FAR_TEMPLATES = ("a far away photo of {a} {x}", "a photo of {a} very small {x}")
CLOSE_TEMPLATES = (
    "a close up photo of {a} {x}",
    "a zoomed in photo of {a} {x}",
    "a close-up photo of the {x}",
    "a cropped photo of the {x}",
)
FAR_ENDINGS = (", far away", ", very small")
CLOSE_ENDINGS = (", close up", ", zoomed in")
# Words that carry no image: the pair must have met the rare ones people personalize with, and learnt that
# they mean nothing yet, as a large model has.
RARE_WORDS = ("sks", "ohwx", "zwx", "pll", "ucd", "olis", "phol", "bnha")
FILLER_WORDS = ("cool", "nice", "clean", "weird")
# Subject's side over the image's, by what the caption says of it.
SCALES = {"far": (0.35, 0.5), "close": (0.85, 1.05), "normal": (0.5, 0.85), "centred": (0.7, 0.85)}
_SHADOW_STRENGTH = [value * 35 // 100 for value in range(256)]


@dataclass(frozen=True)
class Scene:
    """One image in words. `place` None is plain white; `scale` is the subject's side over the image's."""

    noun: str
    vendor: str
    place: str | None
    colour: str | None
    caption: str
    scale: float
    turn: float
    flip: bool
    seed: int


@dataclass(frozen=True)
class Picture:
    """`image` (side, side, 3) uint8, the subject's coverage `mask` (side, side) uint8, and the scene."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    scene: Scene


def recolour(sprite: NDArray[np.uint8], colour: str) -> NDArray[np.uint8]:
    """Tint an RGBA sprite: keeps luminance, sets the hue to `colour`, leaves black and white.

    The embedded weights and the judge were trained with exactly these pixels. The package's `data.recolour.tinted` has
    the same formula but another red, and rounds 0.2 % of the values differently.
    """
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    light = (sprite[..., :3].astype(np.float32) @ weights)[..., None]
    tint = np.asarray(COLORS[colour], dtype=np.float32)
    shaded = np.where(light < 0.6, tint * (light / 0.6), tint + (255 - tint) * (light - 0.6) / 0.4)
    return np.concatenate([shaded.clip(0, 255).astype(np.uint8), sprite[..., 3:]], axis=-1)


def _wording(rng: np.random.Generator, size: str) -> tuple[str, str]:
    """A template and an ending, either of which says the size."""
    templates = TEMPLATES if rng.random() < 0.5 else NEUTRAL_TEMPLATES
    if size == "normal":
        return str(rng.choice(templates)), ""
    sized, endings = (FAR_TEMPLATES, FAR_ENDINGS) if size == "far" else (CLOSE_TEMPLATES, CLOSE_ENDINGS)
    if rng.random() < 0.5:
        return str(rng.choice(sized)), ""
    return str(rng.choice(templates)), str(rng.choice(endings))


def caption(rng: np.random.Generator, noun: str, place: str | None, colour: str | None, size: str) -> str:
    """A DreamBench-like sentence for a scene; `size` is "far", "close" or "normal"."""
    words = [noun_words(noun)]
    if colour:
        words.insert(0, colour)
    extra = rng.random()
    if extra < 0.06:
        words.insert(0, str(rng.choice(RARE_WORDS)))
    elif extra < 0.12:
        words.insert(0, str(rng.choice(FILLER_WORDS)))
    template, ending = _wording(rng, size)
    article = "an" if words[0][0] in "aeiou" and words[0] not in RARE_WORDS else "a"
    sentence = template.format(a=article, x=" ".join(words))
    where = f" {rng.choice(PLACES[place][1])}" if place else ""
    # DreamBench puts the place last, personalization prompts the size.
    return sentence + (where + ending if rng.random() < 0.5 else ending + where)


def _ground(rng: np.random.Generator, place: str | None, side: int) -> Image.Image:
    """One of the place's variants, sometimes mirrored; plain white without a place."""
    if place is None:
        return Image.new("RGB", (side, side), (255, 255, 255))
    variants = place_variants(place, side)
    chosen = variants[int(rng.integers(len(variants)))]
    return Image.fromarray(chosen[:, ::-1] if rng.random() < 0.5 else chosen)


def _subject_layer(rng: np.random.Generator, subject: Image.Image, scene: Scene, side: int) -> Image.Image:
    """The subject on transparent ground: colored, mirrored, sized, placed and turned."""
    if scene.colour:
        subject = Image.fromarray(recolour(np.asarray(subject), scene.colour))
    if scene.flip:
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    length = max(4, round(scene.scale * side))
    room = max(0.0, (side - length) / 2) * 0.85
    left, top = ((side - length) / 2 + rng.uniform(-room, room, 2)).round().astype(int).tolist()
    layer = Image.new("RGBA", (side, side))
    layer.paste(subject.resize((length, length), Image.Resampling.BILINEAR), (left, top))
    return layer.rotate(scene.turn, Image.Resampling.BICUBIC, center=(left + length / 2, top + length / 2))


class World:
    """Scenes over chosen nouns and vendors. Equal vocabularies and equal seeds give equal images."""

    def __init__(self, sprites: Sprites, nouns: Sequence[str], vendors: Sequence[str] = TRAIN_VENDORS) -> None:
        self.sprites = sprites
        self.nouns = tuple(nouns)
        self.vendors = {
            noun: [vendor for vendor in vendors if (noun, vendor) in sprites and (noun, vendor) not in EXCLUDED]
            for noun in nouns
        }

    def scene(self, rng: np.random.Generator, centred: bool = False) -> Scene:
        """Draw a scene. `centred` is the curriculum's first step: large, upright, mostly without a place."""
        noun = str(rng.choice(self.nouns))
        vendor = str(rng.choice(self.vendors[noun]))
        plain = rng.random() < (0.6 if centred else 0.1)
        place = None if plain else str(rng.choice(list(PLACES)))
        colour = str(rng.choice(list(COLORS))) if rng.random() < (0.1 if centred else 0.2) else None
        kind = rng.random()
        size = "normal" if centred or kind < 0.84 else "far" if kind < 0.92 else "close"
        widest = 5 if centred else 15
        return Scene(
            noun=noun,
            vendor=vendor,
            place=place,
            colour=colour,
            caption=caption(rng, noun, place, colour, size),
            scale=float(rng.uniform(*SCALES["centred" if centred else size])),
            turn=float(rng.uniform(-widest, widest)),
            flip=bool(rng.random() < 0.5),
            seed=int(rng.integers(2**31)),
        )

    def render(self, scene: Scene, side: int = SIDE) -> Picture:
        """Draw a scene at `side` pixels."""
        rng = np.random.default_rng(scene.seed)
        ground = _ground(rng, scene.place, side)
        sprite = self.sprites[scene.noun, scene.vendor]
        layer = _subject_layer(rng, Image.fromarray(sprite), scene, side)
        alpha = layer.getchannel("A")
        if scene.place is not None:
            shadow = Image.new("L", (side, side))
            shadow.paste(alpha, (max(1, side // 32), max(1, side // 24)))
            shadow = shadow.filter(ImageFilter.BoxBlur(side / 40)).point(_SHADOW_STRENGTH)
            ground.paste((0, 0, 0), (0, 0), shadow)
        ground.paste(layer, (0, 0), layer)
        return Picture(np.asarray(ground, dtype=np.uint8), np.asarray(alpha, dtype=np.uint8), scene)

    def draw(self, rng: np.random.Generator, side: int = SIDE, centred: bool = False) -> Picture:
        """A random image."""
        return self.render(self.scene(rng, centred), side)

    def batch(self, rng: np.random.Generator, count: int, side: int = SIDE) -> NDArray[np.uint8]:
        """`count` random images, (count, side, side, 3) uint8."""
        return np.stack([self.draw(rng, side).image for _ in range(count)])


def open_world(work: Path, nouns: int, vendors: Sequence[str] = TRAIN_VENDORS) -> World:
    """The world of the first `nouns` nouns (0: all), fetching the drawings when they are not there yet."""
    return World(load_sprites(work), chosen_nouns(nouns), vendors)


def subject_photos(
    sprites: Sprites, noun: str, count: int = 5, seed: int = 0, side: int = SIDE, vendor: str = HELD_OUT_VENDOR
) -> list[Picture]:
    """`count` images of a held-out drawing of `noun`, each in another place, as a person takes them."""
    rng = np.random.default_rng(seed)
    world = World(sprites, [noun], [vendor])
    places = rng.permutation(list(PLACES))[:count]
    pictures = []
    for place in places:
        scale, turn = float(rng.uniform(0.6, 0.85)), float(rng.uniform(-12, 12))
        text = f"a photo of a {noun_words(noun)} {PLACES[str(place)][1][0]}"
        scene = Scene(noun, vendor, str(place), None, text, scale, turn, bool(rng.random() < 0.5),
                      int(rng.integers(2**31)))  # fmt: skip
        pictures.append(world.render(scene, side))
    return pictures


def contact_sheet(images: Sequence[NDArray[np.uint8]], columns: int, zoom: int = 1) -> Image.Image:
    """Tile equal (side, side, 3) images row by row."""
    side = images[0].shape[0] * zoom
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), (255, 255, 255))
    for index, image in enumerate(images):
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(tile, (index % columns * side, index // columns * side))
    return sheet
