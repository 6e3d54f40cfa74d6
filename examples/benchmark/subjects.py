"""The benchmark's subjects, their reference images and the prompts: fixed, and the same for every method.

A subject is a drawing of the vendor that was held out of everything the embedded pair was trained with. The pair knows
the class, not the instance. Every third noun of the world is for development, the others are for reporting.
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
    """One prompt and what an image of it must show.

    Args:
        sentence: with {} for the subject.
        place: a key of `places.PLACES`.
        colour: one of `world.COLOURS`, or None.
        size: "normal", "far" or "close".
    """

    sentence: str
    place: str
    colour: str | None = None
    size: str = "normal"

    def prompt(self, subject: str) -> str:
        """Return the sentence about a subject ("sks dog") or its class ("dog")."""
        return self.sentence.format(f"{self.colour} {subject}" if self.colour else subject)


# No wording is a template of the method's training. The embedded pair knows every word.
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
    """Return the drawings of all subjects by (noun, vendor), as RGBA (96, 96, 4)."""
    with np.load(_DRAWINGS) as archive:
        return {(noun, HELD_OUT_VENDOR): archive[noun] for noun in archive.files}


def class_name(noun: str) -> str:
    """Return what prompts call a noun."""
    return noun_words(noun)


def references(noun: str) -> list[Picture]:
    """Return the five reference images of a subject, with their masks and scenes."""
    return subject_photos(subject_sprites(), noun, REFERENCES, seed=CORE.index(noun))


def reference_pictures(noun: str) -> list[NDArray[np.uint8]]:
    """Return the five reference images of a subject, (64, 64, 3) each."""
    return [picture.image for picture in references(noun)]


def write_photos(noun: str, folder: Path) -> Path:
    """Write the references as PNGs and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(reference_pictures(noun)):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


def real_pictures(noun: str, asks: Sequence[Ask] = PROMPTS, seeds: Sequence[int] = SEEDS) -> NDArray[np.uint8]:
    """Return the world's own images of the subject for each prompt and seed, (prompts × seeds, 64, 64, 3)."""
    world = World(subject_sprites(), [noun], [HELD_OUT_VENDOR])
    pictures = []
    for index, ask in enumerate(asks):
        for seed in seeds:
            rng = np.random.default_rng((seed, index, 77))
            scene = Scene(noun, HELD_OUT_VENDOR, ask.place, ask.colour, "", float(rng.uniform(*SCALES[ask.size])),
                          float(rng.uniform(-15, 15)), bool(rng.random() < 0.5), int(rng.integers(2**31)))  # fmt: skip
            pictures.append(world.render(scene).image)
    return np.stack(pictures)
