"""Selection for the echo pool on handmade features: what is rejected and why, what stays, and in which order."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.config.schema import EchoConfig
from echodistill_cli.training.losses import identity_scores, photo_similarity
from echodistill_cli.training.pools import EchoPool, refresh, select


def at(*degrees: float, tilt: float = 0.0) -> Tensor:
    """Features [N, 3] of unit length at angles in a plane; `tilt` lifts them out of it."""
    angles, lift = torch.tensor(degrees) * math.pi / 180, tilt * math.pi / 180
    flat = torch.stack((angles.cos(), angles.sin()), dim=1) * math.cos(lift)
    return torch.cat((flat, torch.full((len(degrees), 1), math.sin(lift))), dim=1)


PHOTOS = at(-20.0, 20.0)
SETTINGS = EchoConfig(min_identity=0.9, max_similarity=0.999, pool_size=3)


def pool_of(features: Tensor, names: str, critic_offset: float = 0.0) -> EchoPool:
    """A pool with identifiable parts: latents and critic features hold the code of the image's letter."""
    numbers = torch.tensor([float(ord(letter)) for letter in names])
    return EchoPool(
        latents=numbers.view(-1, 1, 1, 1).expand(-1, 4, 2, 2).clone(),
        features=features,
        scores=identity_scores(features, PHOTOS),
        prompts=list(names),
        critics={"dino": [numbers.view(-1, 1, 1) + critic_offset]},
    )


def assert_consistent(pool: EchoPool) -> None:
    numbers = [float(ord(letter)) for letter in pool.prompts]
    assert pool.latents[:, 0, 0, 0].tolist() == numbers
    assert pool.critics["dino"][0].flatten().tolist() == numbers
    torch.testing.assert_close(pool.scores, identity_scores(pool.features, PHOTOS))


# --- similarity -------------------------------------------------------------------------------------------------------


def test_photos_are_compared_with_each_other_and_not_with_themselves() -> None:
    assert photo_similarity(PHOTOS) == pytest.approx(math.cos(math.radians(40)))
    three = at(0.0, 60.0, 90.0)
    expected = sum(math.cos(math.radians(angle)) for angle in (60, 90, 30)) / 3
    assert photo_similarity(three) == pytest.approx(expected, abs=1e-6)
    assert photo_similarity(5 * three) == pytest.approx(expected, abs=1e-6)


def test_a_single_photo_has_similarity_1() -> None:
    assert photo_similarity(at(10.0)) == 1.0


def test_an_image_scores_its_mean_cosine_to_the_photos() -> None:
    scores = identity_scores(3 * at(0.0, 20.0, 110.0), PHOTOS)
    expected = [math.cos(math.radians(20)), (math.cos(math.radians(40)) + 1) / 2]
    assert scores[:2].tolist() == pytest.approx(expected, abs=1e-6)
    assert scores[2] < 0


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_good_image_is_kept() -> None:
    assert select(at(0.0), PHOTOS, SETTINGS) == ["kept"]


def test_an_image_with_too_little_of_the_subject_is_rejected() -> None:
    assert select(at(0.0, 70.0, 180.0), PHOTOS, SETTINGS) == ["kept", "identity", "identity"]


def test_the_threshold_is_a_fraction_of_the_photos_own_similarity() -> None:
    threshold = 0.9 * photo_similarity(PHOTOS)
    # In the plane between the photos the score is cos 20° times the cosine of the tilt.
    limit = math.degrees(math.acos(threshold / math.cos(math.radians(20))))
    assert select(at(0.0, tilt=limit - 0.5), PHOTOS, SETTINGS) == ["kept"]
    assert select(at(0.0, tilt=limit + 0.5), PHOTOS, SETTINGS) == ["identity"]
    # Photos that differ more from each other lower the threshold.
    assert select(at(0.0, tilt=limit + 0.5), at(-30.0, 30.0), SETTINGS) == ["kept"]


def test_a_copy_of_a_photo_is_rejected() -> None:
    assert select(at(20.5, 10.0), PHOTOS, SETTINGS) == ["photo_copy", "kept"]


def test_the_better_of_two_similar_images_stays() -> None:
    assert select(at(1.0, 0.0), PHOTOS, SETTINGS) == ["duplicate", "kept"]
    assert select(at(0.0, 1.0), PHOTOS, SETTINGS) == ["kept", "duplicate"]


def test_the_pool_is_bounded_and_the_best_stay() -> None:
    features = torch.cat([at(0.0, tilt=tilt) for tilt in (24.0, 3.0, 18.0, 8.0, 13.0)])
    assert select(features, PHOTOS, SETTINGS) == ["crowded", "kept", "crowded", "kept", "kept"]


def test_a_copy_of_a_rejected_image_is_no_duplicate() -> None:
    # The best two are copies of a photo; the third resembles them, but neither is in the pool.
    settings = EchoConfig(min_identity=0.5, max_similarity=0.99, pool_size=3)
    assert select(at(20.0, 19.0, 8.0), PHOTOS, settings) == ["photo_copy", "photo_copy", "kept"]


def test_with_the_default_settings_random_features_are_rejected() -> None:
    generator = torch.Generator().manual_seed(0)
    subject = torch.randn(1, 64, generator=generator)
    photos = subject + 0.5 * torch.randn(5, 64, generator=generator)
    strangers = torch.randn(50, 64, generator=generator)
    assert set(select(strangers, photos, EchoConfig())) == {"identity"}
    likenesses = subject + 0.5 * torch.randn(10, 64, generator=generator)
    assert select(likenesses, photos, EchoConfig()) == ["kept"] * 10


def test_with_the_default_settings_a_collapsed_student_fills_no_pool() -> None:
    generator = torch.Generator().manual_seed(0)
    subject = torch.randn(1, 64, generator=generator)
    photos = subject + 0.5 * torch.randn(5, 64, generator=generator)
    always_the_same = subject + 0.01 * torch.randn(20, 64, generator=generator)
    verdicts = select(always_the_same, photos, EchoConfig())
    assert verdicts.count("kept") == 1
    assert verdicts.count("duplicate") == 19


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_the_pool_is_best_first_and_its_parts_stay_together() -> None:
    candidates = pool_of(torch.cat([at(0.0, tilt=tilt) for tilt in (9.0, 1.0, 80.0, 15.0)]), "abcd")
    pool, verdicts = refresh(None, candidates, PHOTOS, SETTINGS)
    assert pool.prompts == ["b", "a", "d"]
    assert verdicts == ["kept", "kept", "identity", "kept"]
    assert_consistent(pool)


def test_an_empty_pool_is_false_and_can_be_filled_later() -> None:
    pool, verdicts = refresh(None, pool_of(at(180.0, 170.0), "ab"), PHOTOS, SETTINGS)
    assert verdicts == ["identity", "identity"]
    assert len(pool) == 0
    assert not pool
    assert_consistent(pool)
    pool, _ = refresh(pool, pool_of(at(0.0), "c"), PHOTOS, SETTINGS)
    assert pool.prompts == ["c"]


def test_a_refresh_keeps_what_is_better_of_old_and_new() -> None:
    old = pool_of(torch.cat([at(0.0, tilt=tilt) for tilt in (0.0, 12.0, 18.0)]), "abc")
    pool, _ = refresh(None, old, PHOTOS, SETTINGS)
    new = pool_of(torch.cat([at(0.0, tilt=tilt) for tilt in (24.0, 6.0, 0.1)]), "xyz")
    pool, verdicts = refresh(pool, new, PHOTOS, SETTINGS)
    assert pool.prompts == ["a", "y", "b"]
    assert verdicts == ["crowded", "kept", "duplicate"]
    assert_consistent(pool)
    assert pool.scores.tolist() == sorted(pool.scores.tolist(), reverse=True)


def test_taking_and_joining_carry_every_part() -> None:
    pool = pool_of(F.normalize(torch.rand(3, 3, generator=torch.Generator().manual_seed(0))), "abc")
    turned = pool.take([2, 0]).join(pool.take([1]))
    assert turned.prompts == ["c", "a", "b"]
    assert_consistent(turned)
    assert len(pool.take([])) == 0


def test_a_pool_moves_to_a_device_whole() -> None:
    pool = pool_of(at(0.0, 5.0), "ab").to(torch.device("meta"))
    tensors = [pool.latents, pool.features, pool.scores, *pool.critics["dino"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert pool.prompts == ["a", "b"]
