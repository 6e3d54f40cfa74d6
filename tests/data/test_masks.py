"""The teacher says where a photo shows its subject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_cli.data.masks import refined_mask, subject_mask, with_masks
from echodistill_cli.data.photos import Photo
from echodistill_cli.diffusion.pair import ModelPair
from examples.benchmark.subjects import REFERENCES
from examples.mini_world.world import Picture
from tests.helpers.runs import seeded

SUBJECT = "backpack"


def overlap(guess: torch.Tensor, picture: Picture) -> float:
    """Intersection over union of a soft mask [64, 64] with the true one."""
    true = torch.from_numpy(picture.mask > 127)
    return float((true & (guess > 0.5)).sum() / (true | (guess > 0.5)).sum())


@pytest.mark.parametrize("index", range(REFERENCES))
def test_the_teacher_finds_the_subject_in_a_photo_without_a_mask(
    mini_pair: ModelPair, backpack_pictures: list[Picture], index: int
) -> None:
    image = torch.from_numpy(backpack_pictures[index].image.copy()).permute(2, 0, 1) / 127.5 - 1
    found = subject_mask(image, SUBJECT, mini_pair, seeded())
    assert found.shape == (1, 64, 64)
    assert found.min() == 0
    assert found.max() <= 1
    assert overlap(found[0], backpack_pictures[index]) > 0.6


def test_the_pictures_own_colours_make_the_mask_better(mini_pair: ModelPair, backpack_pictures: list[Picture]) -> None:
    rough, refined = [], []
    for picture in backpack_pictures:
        image = torch.from_numpy(picture.image.copy()).permute(2, 0, 1) / 127.5 - 1
        found = subject_mask(image, SUBJECT, mini_pair, seeded())
        rough.append(overlap(found[0], picture))
        refined.append(overlap(refined_mask(found, image, seeded())[0], picture))
    assert np.mean(refined) > np.mean(rough) + 0.05


def test_a_photo_gets_the_mask_that_is_found_in_its_square_and_nothing_beside_it(
    mini_pair: ModelPair, backpack_pictures: list[Picture]
) -> None:
    # The world's picture enlarged, between two margins that are not trained on.
    wide = Image.new("RGB", (256, 128), "white")
    wide.paste(Image.fromarray(backpack_pictures[0].image).resize((128, 128)), (64, 0))
    (found,) = with_masks(
        [Photo(Path("wide.png"), wide, None, None, (64, 0, 192, 128))], SUBJECT, mini_pair, 64, seeded()
    )
    assert found.mask is not None
    values = torch.from_numpy(np.array(found.mask)) / 255
    assert values.shape == (128, 256)
    assert values[:, :64].max() == values[:, 192:].max() == 0
    assert overlap(values[::2, 64:192:2], backpack_pictures[0]) > 0.6


def test_a_mask_that_a_photo_has_stays(mini_pair: ModelPair, backpack_pictures: list[Picture]) -> None:
    own = Image.new("L", (64, 64), 255)
    photos = [Photo(Path("0.png"), Image.fromarray(backpack_pictures[0].image), own, None, (0, 0, 64, 64))]
    assert with_masks(photos, SUBJECT, mini_pair, 64, seeded()) == photos
