"""The benchmark's subjects, their reference images and the prompts: fixed, and the same for every method.

A subject is a drawing of a vendor that was held out of everything the embedded pair was trained with. The pair knows
the class, not the instance. Every third noun of the world is for development, the others are for reporting. The second
test set holds another vendor's drawings, and nothing was ever chosen by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.mini_world.nouns import CORE, HELD_OUT_VENDOR, SECOND_ICONS, SECOND_VENDOR, noun_words
from examples.mini_world.sprites import Sprites
from examples.mini_world.world import SCALES, Picture, Scene, World, subject_photos

DEV: tuple[str, ...] = CORE[::3]
TEST: tuple[str, ...] = tuple(noun for noun in CORE if noun not in DEV)
SPLITS: dict[str, tuple[str, ...]] = {"dev": DEV, "test": TEST, "vendor2": tuple(SECOND_ICONS)}
TOKEN = "sks"
REFERENCES = 5
SEEDS = (0, 1, 2, 3)
_DRAWINGS = {HELD_OUT_VENDOR: "subjects.npz", SECOND_VENDOR: "subjects_vendor2.npz"}


def vendor_of(split: str) -> str:
    """Return whose drawings the subjects of a split are."""
    return SECOND_VENDOR if split == "vendor2" else HELD_OUT_VENDOR


@dataclass(frozen=True)
class Ask:
    """One prompt and what an image of it must show.

    Args:
        sentence: with {} for the subject.
        place: a key of `places.PLACES`.
        color: one of `world.COLORS`, or None.
        size: "normal", "far" or "close".
    """

    sentence: str
    place: str
    colour: str | None = None
    size: str = "normal"

    def prompt(self, subject: str) -> str:
        """Return the sentence about a subject ("sks dog") or its class ("dog")."""
        return self.sentence.format(f"{self.colour} {subject}" if self.colour else subject)


# No training scene lists one of these places or gives the subject a color, and no wording is a template of training.
# The embedded pair knows every word.
PROMPTS: tuple[Ask, ...] = (
    Ask("a detailed picture of the {} in the snow", "snow"),
    Ask("an image of this {} in the jungle", "jungle"),
    Ask("this {} with a city in the background", "city"),
    Ask("a bright image of one {} on top of pink fabric", "pink fabric"),
    Ask("a cool rendering of my {} on a purple rug", "purple rug"),
    Ask("my {} floating on top of water", "water"),
    Ask("a nice image of the {} with a mountain in the background", "mountain"),
    Ask("a detailed snapshot of this {} in the city at night", "city"),
    Ask("one {} on pink fabric", "pink fabric"),
    Ask("a picture of one {} in the water", "water"),
    Ask("a clean rendering of the {} in the water", "water", "red"),
    Ask("an image of one {} in the jungle", "jungle", "blue"),
    Ask("a picture of my {} in the snow", "snow", "green"),
    Ask("a nice snapshot of one {} on top of a purple rug", "purple rug", "yellow"),
    Ask("a clean picture of my {} with a mountain in the background", "mountain", "purple"),
    Ask("a nice picture of a far away {} in the jungle", "jungle", None, "far"),
)


def subject_sprites(vendor: str = HELD_OUT_VENDOR) -> Sprites:
    """Return the drawings of a vendor's subjects by (noun, vendor), as RGBA (96, 96, 4)."""
    with np.load(Path(__file__).parent / _DRAWINGS[vendor]) as archive:
        return {(noun, vendor): archive[noun] for noun in archive.files}


def class_name(noun: str) -> str:
    """Return what prompts call a noun."""
    return noun_words(noun)


def references(noun: str, vendor: str = HELD_OUT_VENDOR) -> list[Picture]:
    """Return the five reference images of a subject, with their masks and scenes."""
    return subject_photos(subject_sprites(vendor), noun, REFERENCES, seed=CORE.index(noun), vendor=vendor)


def reference_pictures(noun: str, vendor: str = HELD_OUT_VENDOR) -> list[NDArray[np.uint8]]:
    """Return the five reference images of a subject, (64, 64, 3) each."""
    return [picture.image for picture in references(noun, vendor)]


def write_photos(noun: str, folder: Path, vendor: str = HELD_OUT_VENDOR) -> Path:
    """Write the references as PNGs and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(reference_pictures(noun, vendor)):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


def real_pictures(
    noun: str, asks: Sequence[Ask] = PROMPTS, seeds: Sequence[int] = SEEDS, vendor: str = HELD_OUT_VENDOR
) -> NDArray[np.uint8]:
    """Return the world's own images of the subject for each prompt and seed, (prompts × seeds, 64, 64, 3)."""
    world = World(subject_sprites(vendor), [noun], [vendor])
    pictures = []
    for index, ask in enumerate(asks):
        for seed in seeds:
            rng = np.random.default_rng((seed, index, 77))
            scene = Scene(noun, vendor, ask.place, ask.colour, "", float(rng.uniform(*SCALES[ask.size])),
                          float(rng.uniform(-15, 15)), bool(rng.random() < 0.5), int(rng.integers(2**31)))  # fmt: skip
            pictures.append(world.render(scene).image)
    return np.stack(pictures)
