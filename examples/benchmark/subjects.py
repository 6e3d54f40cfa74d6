"""The benchmark's subjects, their reference pictures, and what is asked of them: fixed, and the same for every method.

A subject is a drawing of the vendor that was held out of everything the embedded pair was trained with; the pair knows
the class, not the instance. Every third noun of the world is for developing, the others are for reporting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.mini_world.nouns import CORE, HELD_OUT_VENDOR, noun_words
from examples.mini_world.sprites import Sprites
from examples.mini_world.world import SCALES, Picture, Scene, World, subject_photos

DEV: tuple[str, ...] = CORE[::3]
TEST: tuple[str, ...] = tuple(noun for noun in CORE if noun not in DEV)
SPLITS = {"dev": DEV, "test": TEST}
TOKEN = "sks"
REFERENCES = 5
SEEDS = (0, 1, 2, 3)
_DRAWINGS = Path(__file__).parent / "subjects.npz"


@dataclass(frozen=True)
class Ask:
    """One prompt and what a picture of it must show.

    Args:
        sentence: with {} for the subject. place: a key of `places.PLACES`. colour: one of `world.COLOURS`, or None.
        size: "normal", "far" or "close".
    """

    sentence: str
    place: str
    colour: str | None = None
    size: str = "normal"

    def prompt(self, subject: str) -> str:
        """The sentence about a subject such as "sks dog" or, untouched, "dog"."""
        return self.sentence.format(f"{self.colour} {subject}" if self.colour else subject)


# None of these wordings is a template of the method's training; the words are ones that the embedded pair knows.
PROMPTS: tuple[Ask, ...] = (
    Ask("a detailed picture of the {} in the snow", "snow"),
    Ask("an image of this {} in the jungle", "jungle"),
    Ask("a nice snapshot of one {} on a sandy beach", "beach"),
    Ask("a clean picture of my {} in a green meadow", "grass"),
    Ask("one {} on top of a wooden floor", "wood"),
    Ask("this {} with a city in the background", "city"),
    Ask("a bright image of one {} on top of pink fabric", "pink fabric"),
    Ask("a cool rendering of my {} on a purple rug", "purple rug"),
    Ask("my {} floating on top of water", "water"),
    Ask("a detailed snapshot of this {} in the desert", "desert"),
    Ask("a nice image of the {} with a mountain in the background", "mountain"),
    Ask("a picture of one {} on a cobblestone street", "brick"),
    Ask("a clean rendering of the {} on the beach", "beach", "red"),
    Ask("an image of one {} on a wooden floor", "wood", "blue"),
    Ask("a picture of my {} in the snow", "snow", "green"),
    Ask("a nice picture of a far away {} on the grass", "grass", None, "far"),
)


def subject_sprites() -> Sprites:
    """The drawings of all subjects, (noun, vendor) to RGBA (96, 96, 4)."""
    with np.load(_DRAWINGS) as archive:
        return {(noun, HELD_OUT_VENDOR): archive[noun] for noun in archive.files}


def class_name(noun: str) -> str:
    """How prompts call a noun."""
    return noun_words(noun)


def references(noun: str) -> list[Picture]:
    """The five pictures of a subject, with what only the world knows of them."""
    return subject_photos(subject_sprites(), noun, REFERENCES, seed=CORE.index(noun))


def reference_pictures(noun: str) -> list[NDArray[np.uint8]]:
    """The five pictures of a subject that a method may see, (64, 64, 3) each."""
    return [picture.image for picture in references(noun)]


def write_photos(noun: str, folder: Path) -> Path:
    """The references as a folder of PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(reference_pictures(noun)):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


def real_pictures(noun: str, asks: Sequence[Ask] = PROMPTS, seeds: Sequence[int] = SEEDS) -> NDArray[np.uint8]:
    """The world's own pictures of the subject for each prompt and seed, (prompts × seeds, 64, 64, 3): the ceiling."""
    world = World(subject_sprites(), [noun], [HELD_OUT_VENDOR])
    pictures = []
    for index, ask in enumerate(asks):
        for seed in seeds:
            rng = np.random.default_rng((seed, index, 77))
            scene = Scene(noun, HELD_OUT_VENDOR, ask.place, ask.colour, "", float(rng.uniform(*SCALES[ask.size])),
                          float(rng.uniform(-15, 15)), bool(rng.random() < 0.5), int(rng.integers(2**31)))  # fmt: skip
            pictures.append(world.render(scene).image)
    return np.stack(pictures)
