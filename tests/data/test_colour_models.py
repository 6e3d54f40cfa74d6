"""A rough mask is made to follow the picture's colours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.data.masks import refined_mask
from tests.helpers.runs import seeded


def disc(side: int, *, radius: float, shift: float = 0.0) -> Tensor:
    """[1, side, side], 1 inside of a circle; lengths as shares of the side."""
    across = (torch.arange(side) + 0.5) / side - 0.5
    return (((across[:, None] - shift) ** 2 + (across[None] - shift) ** 2).sqrt() < radius).float()[None]


def picture(where: Tensor) -> Tensor:
    """A disc of two colours on a ground of two others, with some noise."""
    side = where.shape[-1]
    stripes = (torch.arange(side) // (side // 8) % 2).float().expand(1, side, side)
    inside = torch.tensor([0.8, -0.7, -0.6]).view(3, 1, 1) * stripes + 0.6 * (1 - stripes)
    ground = torch.tensor([-0.8, 0.1, 0.5]).view(3, 1, 1) * stripes + torch.tensor([-0.5, -0.2, -0.7]).view(3, 1, 1) * (
        1 - stripes
    )
    grain = 0.05 * torch.randn(3, side, side, generator=seeded())
    return (inside * where + ground * (1 - where) + grain).clamp(-1, 1)


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of soft masks."""
    return float(torch.minimum(one, other).sum() / torch.maximum(one, other).sum())


@pytest.mark.parametrize("side", [64, 300])
def test_a_coarse_and_shifted_mask_comes_to_lie_on_the_subject(side: int) -> None:
    where = disc(side, radius=0.3)
    rough = F.interpolate(disc(8, radius=0.3, shift=0.06)[None], (side, side), mode="bilinear")[0]
    assert overlap(rough, where) < 0.75
    found = refined_mask(rough, picture(where), seeded())
    assert found.shape == (1, side, side)
    assert 0 <= found.min() <= found.max() <= 1
    assert overlap(found, where) > 0.85
    assert torch.equal(found, refined_mask(rough, picture(where), seeded()))


def test_it_is_nearly_hard() -> None:
    where = disc(64, radius=0.3)
    found = refined_mask(0.2 + 0.6 * where, picture(where), seeded())
    assert float(((found > 0.05) & (found < 0.95)).float().mean()) < 0.1


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_picture_of_one_flat_colour_leaves_the_mask_as_it_is(level: float) -> None:
    where = disc(64, radius=0.3)
    found = refined_mask(where, torch.full((3, 64, 64), level), seeded())
    assert torch.isfinite(found).all()
    assert overlap(found, where) > 0.85
