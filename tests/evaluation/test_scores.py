"""CLIP-I, DINO and CLIP-T against cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from echodistill_cli.evaluation.evaluate import own_similarity, pairwise_cosine, prompt_fidelity, subject_fidelity

DRAWN = torch.tensor([[3, 4], [1, 0]])
PHOTOS = torch.tensor([[1, 0], [0, 2], [-1, 0]])


def test_every_drawn_picture_is_compared_with_every_photo() -> None:
    # (3, 4) has length 5, so its cosines with the axes are 3/5 and 4/5.
    expected = torch.tensor([[0.6, 0.8, -0.6], [1.0, 0.0, -1.0]], dtype=torch.float64)
    assert torch.allclose(pairwise_cosine(DRAWN, PHOTOS), expected, atol=1e-12)


def test_subject_fidelity_is_the_mean_of_all_pairs() -> None:
    assert subject_fidelity(DRAWN, PHOTOS) == pytest.approx((0.6 + 0.8 - 0.6 + 1 + 0 - 1) / 6)


def test_prompt_fidelity_compares_each_picture_with_its_own_prompt_alone() -> None:
    # 3*4 + 4*3 = 24 of 5*5; then opposite directions.
    drawn, prompts = torch.tensor([[3, 4], [0, 5]]), torch.tensor([[4, 3], [0, -1]])
    assert prompt_fidelity(drawn, prompts) == pytest.approx((24 / 25 - 1) / 2)


def test_the_photos_own_similarity_leaves_out_each_photo_with_itself() -> None:
    photos = torch.tensor([[1, 0], [0, 1], [1, 1]])
    assert own_similarity(photos) == pytest.approx((0 + math.sqrt(0.5) + math.sqrt(0.5)) / 3)
    assert own_similarity(photos[:1]) is None
    assert own_similarity(torch.tensor([[2.0, 2.0], [7.0, 7.0]])) == pytest.approx(1)


def test_lengths_of_embeddings_do_not_matter() -> None:
    assert subject_fidelity(DRAWN * 100, PHOTOS * 0.01) == pytest.approx(subject_fidelity(DRAWN, PHOTOS))
    assert prompt_fidelity(DRAWN * 7, PHOTOS[:2] * 3) == pytest.approx(prompt_fidelity(DRAWN, PHOTOS[:2]))


def test_the_mean_over_prompts_of_equally_many_pictures_is_that_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, photos = torch.randn(12, 5, generator=generator), torch.randn(3, 5, generator=generator)
    per_prompt = [subject_fidelity(drawn[start : start + 4], photos) for start in (0, 4, 8)]
    assert sum(per_prompt) / 3 == pytest.approx(subject_fidelity(drawn, photos))
