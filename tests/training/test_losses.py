"""The losses against values computed by hand, reference implementations and their documented properties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.training.losses import (
    adversarial_discriminator,
    adversarial_generator,
    denoising,
    feature_distance,
    latent_alignment,
    paired_adversarial,
    patch_directions,
    photo_distance,
    rgb_to_lab,
    sliced_wasserstein,
)
from tests.helpers.runs import seeded


def textured(seed: int, side: int = 48) -> Tensor:
    """An image [1, 3, side, side] of blurred noise in [-1, 1]."""
    noise = torch.rand(1, 3, side // 4, side // 4, generator=seeded(seed)) * 2 - 1
    return F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)


def color(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1) * 2 - 1


# --- denoising --------------------------------------------------------------------------------------------------------


def test_the_denoising_loss_is_the_mean_square_over_the_masked_region() -> None:
    output, target = torch.zeros(1, 2, 2, 2), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])
    top = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    assert denoising(output, target, torch.ones(1, 1, 2, 2)).tolist() == [pytest.approx((204) / 8)]
    assert denoising(output, target, top).tolist() == [pytest.approx((1 + 4 + 25 + 36) / 4)]


def test_a_soft_mask_weights_the_error() -> None:
    output, target = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
    mask = torch.tensor([[[[1.0, 0.1]]]])
    assert denoising(output, target, mask).item() == pytest.approx((1 + 0.1 * 9) / 1.1)


def test_outside_the_mask_loss_and_gradient_are_0() -> None:
    output = torch.randn(2, 4, 8, 8, generator=seeded(), requires_grad=True)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1
    denoising(output, torch.zeros_like(output), mask).sum().backward()
    assert output.grad is not None
    assert (output.grad[..., 3:] == 0).all()
    assert (output.grad[..., :3] != 0).all()


def test_an_empty_mask_costs_nothing_and_leaves_the_gradient_finite() -> None:
    output = torch.randn(1, 4, 8, 8, generator=seeded(), requires_grad=True)
    loss = denoising(output, torch.zeros_like(output), torch.zeros(1, 1, 8, 8))
    loss.sum().backward()
    assert loss.tolist() == [0]
    assert output.grad is not None
    assert (output.grad == 0).all()


# --- alignment --------------------------------------------------------------------------------------------------------


def test_latent_alignment_is_half_the_mean_square_per_sample() -> None:
    student, teacher = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]]), torch.zeros(2, 1, 1, 2)
    assert latent_alignment(student, teacher).tolist() == [pytest.approx(2.5), 0.0]


def test_the_feature_distance_is_0_for_the_same_direction_1_across_and_2_for_the_opposite() -> None:
    same = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    other = torch.tensor([[[5.0, 0.0]], [[0.0, 2.0]], [[-1.0, 0.0]]])
    torch.testing.assert_close(feature_distance(same, other), torch.tensor([0.0, 1.0, 2.0]))


def test_the_feature_distance_is_averaged_over_tokens() -> None:
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    second = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert feature_distance(first, second).tolist() == [pytest.approx(0.5)]


@pytest.mark.parametrize("loss", [latent_alignment, denoising, feature_distance])
def test_half_precision_is_compared_in_single(loss: object) -> None:
    values = torch.full((1, 1, 8, 8), 300.0, dtype=torch.float16)  # its square overflows float16
    if loss is denoising:
        result = denoising(values, torch.zeros_like(values), torch.ones(1, 1, 8, 8))
    elif loss is latent_alignment:
        result = latent_alignment(values, torch.zeros_like(values))
    else:
        result = feature_distance(values[0], values[0])
    assert result.dtype == torch.float32
    assert result.isfinite().all()


def test_the_distance_to_the_photos_is_what_an_image_lacks_of_their_similarity() -> None:
    def at(*degrees: float) -> Tensor:
        return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    photos = at(0.0, 40.0)
    distances = photo_distance(at(20.0, 20.0, 110.0), photos)
    apart = math.cos(math.radians(40)) - (math.cos(math.radians(110)) + math.cos(math.radians(70))) / 2
    assert distances.tolist() == pytest.approx([0.0, 0.0, apart], abs=1e-6)
    assert photo_distance(3 * at(60.0), at(0.0)).item() == pytest.approx(0.5)


# --- adversarial ------------------------------------------------------------------------------------------------------


def logits(batch: int, seed: int) -> list[Tensor]:
    return [3 * torch.randn(batch, tokens, generator=seeded(seed + tokens)) for tokens in (1, 6)]


def cross_entropy(scores: list[Tensor], label: float) -> Tensor:
    """Per sample [B], the mean over heads of the mean over tokens."""
    heads = [
        F.binary_cross_entropy_with_logits(x, torch.full_like(x, label), reduction="none").mean(dim=1) for x in scores
    ]
    return torch.stack(heads).mean(dim=0)


def test_the_generator_loss_is_the_cross_entropy_of_being_called_real() -> None:
    torch.testing.assert_close(adversarial_generator(logits(5, 0)), cross_entropy(logits(5, 0), 1.0))


def test_the_discriminator_loss_is_the_mean_cross_entropy_of_both_halves() -> None:
    real, fake = logits(5, 1), logits(3, 2)
    expected = (cross_entropy(real, 1.0).mean() + cross_entropy(fake, 0.0).mean()) / 2
    torch.testing.assert_close(adversarial_discriminator(real, fake, torch.ones(5)), expected)


def test_a_real_sample_counts_by_its_weight() -> None:
    real, fake = logits(4, 1), logits(2, 2)
    per_sample = cross_entropy(real, 1.0)
    weights = torch.tensor([1.0, 1.0, 0.25, 0.0])
    expected = (per_sample[0] + per_sample[1] + 0.25 * per_sample[2]) / 2.25 + cross_entropy(fake, 0.0).mean()
    torch.testing.assert_close(adversarial_discriminator(real, fake, weights), expected / 2)
    without = adversarial_discriminator([x[:3] for x in real], fake, weights[:3])
    torch.testing.assert_close(adversarial_discriminator(real, fake, weights), without)


def test_confident_verdicts_keep_their_gradient_finite() -> None:
    scores = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    (adversarial_generator([scores]).sum() + adversarial_discriminator([scores], [scores], torch.ones(2))).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


# --- colors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((1, 1, 1), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((1, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 1, 0), (87.74, -86.18, 83.18)),
        ((0, 0, 1), (32.30, 79.19, -107.86)),
        ((0.5, 0.5, 0.5), (53.39, 0, 0)),
        ((0.02, 0.02, 0.02), (1.40, 0, 0)),  # on the linear side of both curves
    ],
)
def test_known_colors_have_their_lab_values(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    torch.testing.assert_close(
        rgb_to_lab(color(*rgb)).flatten(), torch.tensor(lab, dtype=torch.float32), rtol=0, atol=0.02
    )


def test_the_gradient_of_lab_is_finite_at_black_white_and_beyond() -> None:
    values = torch.tensor([-3.0, -1.0, -0.999, -0.92, 0.0, 0.999, 1.0, 3.0])
    images = values.view(1, 1, 1, -1).repeat(1, 3, 1, 1).requires_grad_()
    rgb_to_lab(images).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    inside = images.grad[0, :, 0, 2:6]
    assert (inside.abs().sum(dim=0) > 0).all()


def test_values_outside_the_range_are_clamped() -> None:
    assert torch.equal(rgb_to_lab(torch.full((1, 3, 1, 1), 5.0)), rgb_to_lab(torch.ones(1, 3, 1, 1)))


# --- sliced Wasserstein -----------------------------------------------------------------------------------------------

DIRECTIONS = patch_directions(3, 32, 5, seeded())


def test_directions_are_unit_vectors_decided_by_the_generator() -> None:
    assert [tuple(kernels.shape) for kernels in DIRECTIONS] == [(32, 3, 5, 5)] * 3
    for kernels in DIRECTIONS:
        torch.testing.assert_close(kernels.flatten(1).norm(dim=1), torch.ones(32))
    assert all(torch.equal(a, b) for a, b in zip(DIRECTIONS, patch_directions(3, 32, 5, seeded()), strict=True))
    assert not torch.equal(DIRECTIONS[0], DIRECTIONS[1])


def test_an_image_is_at_distance_0_from_itself_and_farther_from_another() -> None:
    first, second = textured(0), textured(1)
    assert sliced_wasserstein(first, first, DIRECTIONS).tolist() == [0]
    assert sliced_wasserstein(first, second, DIRECTIONS).item() > 1
    torch.testing.assert_close(
        sliced_wasserstein(first, second, DIRECTIONS), sliced_wasserstein(second, first, DIRECTIONS)
    )


def test_the_distance_is_in_units_of_lab_as_its_reference_weight_expects() -> None:
    # CIE 1976: black has L* = 0 and white L* = 100, both a* = b* = 0. The reference's weight of 0.1 is on these units.
    lightness = torch.zeros(1, 3, 5, 5)
    lightness[0, 0, 2, 2] = 1
    black, white = -torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert sliced_wasserstein(black, white, [lightness]).item() == pytest.approx(100, abs=0.01)


def test_the_distance_is_per_sample() -> None:
    both = sliced_wasserstein(torch.cat((textured(0), textured(1))), textured(1).repeat(2, 1, 1, 1), DIRECTIONS)
    torch.testing.assert_close(both[:1], sliced_wasserstein(textured(0), textured(1), DIRECTIONS))
    assert both[1] == 0


def test_moving_an_object_costs_little_compared_with_changing_it() -> None:
    def with_object(top: int, left: int, seed: int) -> Tensor:
        image = torch.zeros(1, 3, 48, 48)
        image[..., top : top + 12, left : left + 12] = textured(seed, 12)
        return image

    first = with_object(16, 16, seed=0)
    moved = sliced_wasserstein(first, with_object(20, 16, seed=0), DIRECTIONS).item()
    changed = sliced_wasserstein(first, with_object(16, 16, seed=1), DIRECTIONS).item()
    assert moved < 1e-4
    assert changed > 1e-1


def test_a_single_scale_equals_the_mean_distance_of_sorted_projections() -> None:
    first, second, kernels = textured(0, 8), textured(1, 8), DIRECTIONS[0][:2]
    total = 0.0
    for kernel in kernels:
        projected = []
        for image in (first, second):
            lab = rgb_to_lab(image)[0]
            patches = [lab[:, y : y + 5, x : x + 5] for y in range(4) for x in range(4)]
            projected.append(sorted(float((patch * kernel).sum()) for patch in patches))
        total += sum(abs(a - b) for a, b in zip(*projected, strict=True)) / 16
    assert sliced_wasserstein(first, second, [kernels]).item() == pytest.approx(total / 2, rel=1e-4)


def test_scales_smaller_than_a_patch_are_skipped() -> None:
    # 8 pixels, then 4: only the first scale holds a 5-pixel patch.
    first, second = textured(0, 8), textured(1, 8)
    assert torch.equal(sliced_wasserstein(first, second, DIRECTIONS), sliced_wasserstein(first, second, DIRECTIONS[:1]))
    assert not torch.equal(
        sliced_wasserstein(textured(0), textured(1), DIRECTIONS),
        sliced_wasserstein(textured(0), textured(1), DIRECTIONS[:1]),
    )


def test_the_gradient_moves_an_image_towards_the_target() -> None:
    images, target = torch.zeros(1, 3, 16, 16, requires_grad=True), torch.full((1, 3, 16, 16), 0.5)
    before = sliced_wasserstein(images, target, DIRECTIONS[:1])
    before.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    after = sliced_wasserstein(images - 0.2 * images.grad / images.grad.abs().max(), target, DIRECTIONS[:1])
    assert after.item() < before.item()
    assert not math.isclose(after.item(), before.item(), rel_tol=1e-3)


def test_the_paired_loss_is_the_cross_entropy_of_which_of_two_is_real() -> None:
    # By hand: -log σ(2 - 0) and -log σ(-1 - 1), averaged over the patches of one pair.
    loss = paired_adversarial(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.0, 1.0]]))
    assert loss.tolist() == pytest.approx([(0.126928 + 2.126928) / 2], rel=1e-5)
    equal = paired_adversarial(torch.ones(3, 5), torch.ones(3, 5))
    assert equal.tolist() == pytest.approx([0.693147] * 3, rel=1e-5)
