"""The teacher estimates subject masks, and the image's colors refine them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from echodistill_cli.data.masks import refined_mask, subject_mask, with_masks
from echodistill_cli.data.photos import Photo
from echodistill_cli.diffusion.pair import ModelPair
from tests.helpers.drawn_subjects import SUBJECT, DrawnSubject
from tests.helpers.runs import seeded


def overlap(guess: Tensor, subject: DrawnSubject) -> float:
    """Intersection over union of a soft mask [64, 64] with the true one."""
    true = torch.from_numpy(subject.mask > 127)
    return float((true & (guess > 0.5)).sum() / (true | (guess > 0.5)).sum())


def pixels(subject: DrawnSubject) -> Tensor:
    """The image as [3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(subject.image.copy()).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("index", range(5))
def test_the_teacher_finds_the_subject_in_a_photo_without_a_mask(
    mini_pair: ModelPair, backpacks: list[DrawnSubject], index: int
) -> None:
    mask = subject_mask(pixels(backpacks[index]), SUBJECT, mini_pair, seeded())
    assert mask.shape == (1, 64, 64)
    assert mask.min() == 0
    assert mask.max() <= 1
    assert overlap(mask[0], backpacks[index]) > 0.6


def test_the_colors_of_an_image_refine_the_mask(mini_pair: ModelPair, backpacks: list[DrawnSubject]) -> None:
    rough, refined = [], []
    for subject in backpacks:
        mask = subject_mask(pixels(subject), SUBJECT, mini_pair, seeded())
        rough.append(overlap(mask[0], subject))
        refined.append(overlap(refined_mask(mask, pixels(subject), seeded())[0], subject))
    assert np.mean(refined) > np.mean(rough) + 0.05


def test_a_photo_gets_the_mask_that_is_found_in_its_square_and_nothing_beside_it(
    mini_pair: ModelPair, backpacks: list[DrawnSubject]
) -> None:
    # The image enlarged, between two margins outside of the crop.
    wide = Image.new("RGB", (256, 128), "white")
    wide.paste(Image.fromarray(backpacks[0].image).resize((128, 128)), (64, 0))
    photo = Photo(Path("wide.png"), wide, None, None, (64, 0, 192, 128))
    (masked,) = with_masks([photo], SUBJECT, mini_pair, 64, seeded())
    assert masked.mask is not None
    values = torch.from_numpy(np.array(masked.mask)) / 255
    assert values.shape == (128, 256)
    assert values[:, :64].max() == values[:, 192:].max() == 0
    assert overlap(values[::2, 64:192:2], backpacks[0]) > 0.6


def test_a_mask_that_a_photo_has_stays(mini_pair: ModelPair, backpacks: list[DrawnSubject]) -> None:
    mask = Image.new("L", (64, 64), 255)
    photos = [Photo(Path("0.png"), Image.fromarray(backpacks[0].image), mask, None, (0, 0, 64, 64))]
    assert with_masks(photos, SUBJECT, mini_pair, 64, seeded()) == photos


def disc(side: int, *, radius: float, shift: float = 0.0) -> Tensor:
    """[1, side, side], 1 inside of a circle; lengths in fractions of the side."""
    across = (torch.arange(side) + 0.5) / side - 0.5
    return (((across[:, None] - shift) ** 2 + (across[None] - shift) ** 2).sqrt() < radius).float()[None]


def disc_image(where: Tensor) -> Tensor:
    """A disc of two colors on a ground of two others, with noise."""
    side = where.shape[-1]
    stripes = (torch.arange(side) // (side // 8) % 2).float().expand(1, side, side)
    inside = torch.tensor([0.8, -0.7, -0.6]).view(3, 1, 1) * stripes + 0.6 * (1 - stripes)
    ground = torch.tensor([-0.8, 0.1, 0.5]).view(3, 1, 1) * stripes + torch.tensor([-0.5, -0.2, -0.7]).view(3, 1, 1) * (
        1 - stripes
    )
    grain = 0.05 * torch.randn(3, side, side, generator=seeded())
    return (inside * where + ground * (1 - where) + grain).clamp(-1, 1)


def soft_overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of soft masks."""
    return float(torch.minimum(one, other).sum() / torch.maximum(one, other).sum())


@pytest.mark.parametrize("side", [64, 300])
def test_a_coarse_and_shifted_mask_comes_to_lie_on_the_subject(side: int) -> None:
    where = disc(side, radius=0.3)
    rough = F.interpolate(disc(8, radius=0.3, shift=0.06)[None], (side, side), mode="bilinear")[0]
    assert soft_overlap(rough, where) < 0.75
    mask = refined_mask(rough, disc_image(where), seeded())
    assert mask.shape == (1, side, side)
    assert 0 <= mask.min() <= mask.max() <= 1
    assert soft_overlap(mask, where) > 0.85
    assert torch.equal(mask, refined_mask(rough, disc_image(where), seeded()))


def test_a_refined_mask_is_nearly_hard() -> None:
    where = disc(64, radius=0.3)
    mask = refined_mask(0.2 + 0.6 * where, disc_image(where), seeded())
    assert float(((mask > 0.05) & (mask < 0.95)).float().mean()) < 0.1


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_an_image_of_one_flat_color_leaves_the_mask_as_it_is(level: float) -> None:
    where = disc(64, radius=0.3)
    mask = refined_mask(where, torch.full((3, 64, 64), level), seeded())
    assert torch.isfinite(mask).all()
    assert soft_overlap(mask, where) > 0.85
