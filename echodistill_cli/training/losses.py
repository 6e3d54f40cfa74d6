"""The losses as pure functions: tensors in, one value per sample out, randomness passed in.

Symbols follow the paper (EchoDistill, arXiv 2510.20512). Alignment pulls the student's one-step image towards the
teacher's guided x0 of that image; the adversarial loss pulls it towards the photos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.diffusion.schedule import send

_PROJECTED_AT_ONCE = 2**22  # values per image of the sliced Wasserstein distance: 16 projections of 512 pixels


def denoising(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error over the valid region per sample, [B], float32.

    Args:
        output: [B, C, H, W], the model's prediction.
        target: [B, C, H, W], ε or v.
        mask: [B, 1, H, W] in 0…1, the weight of each place; a sample whose mask is all 0 has loss 0.
    """
    squared = (output.float() - target.float()).square() * mask
    covered = mask.sum(dim=(1, 2, 3)) * output.shape[1]
    return squared.sum(dim=(1, 2, 3)) / covered.clamp(min=1e-8)


def latent_alignment(student_x0: Tensor, teacher_target: Tensor) -> Tensor:
    """Return half the mean squared distance per sample, [B].

    Args:
        student_x0: [B, C, h, w].
        teacher_target: [B, C, h, w].
    """
    return 0.5 * (student_x0.float() - teacher_target.float()).square().mean(dim=(1, 2, 3))


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine similarity, averaged over the tokens of each sample, [B] in 0…2.

    Args:
        features: [B, N, D].
        target: [B, N, D].
    """
    return 1 - F.cosine_similarity(features.float(), target.float(), dim=-1).mean(dim=1)


def photo_distance(features: Tensor, photos: Tensor) -> Tensor:
    """Identity hinge [B]: max(0, similarity among the photos - similarity of the image to them).

    Args:
        features: [B, D] of the images.
        photos: [P, D], the same encoder's features of the photos.
    """
    return F.relu(_similarity(photos) - identity_scores(features, photos))


def identity_scores(features: Tensor, photos: Tensor) -> Tensor:
    """Return the mean cosine similarity of each image to the photos, [N].

    Args:
        features: [N, D] of the images.
        photos: [P, D], the same encoder's features of the photos.
    """
    return (F.normalize(features.float(), dim=-1) @ F.normalize(photos.float(), dim=-1).T).mean(dim=1)


def photo_similarity(photos: Tensor) -> float:
    """Return the mean cosine similarity of all pairs of different photos; 1 for a single photo.

    This is what "the same subject" scores; DreamBooth's table lists it as "real images".

    Args:
        photos: [P, D], features of the photos; the result has their precision.
    """
    return float(_similarity(photos))


def _similarity(photos: Tensor) -> Tensor:
    count = len(photos)
    if count < 2:
        return torch.ones((), device=photos.device)
    unit = F.normalize(photos, dim=-1)
    return ((unit @ unit.T).sum() - count) / (count * (count - 1))


def adversarial_generator(logits: Sequence[Tensor]) -> Tensor:
    """Return the non-saturating generator loss -log D(x̂) [B] (Goodfellow et al. 2014).

    Args:
        logits: of one discriminator, [B, N] per head.
    """
    return torch.stack([F.softplus(-scores.float()).mean(dim=1) for scores in logits]).mean(dim=0)


def adversarial_discriminator(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], real_weight: Tensor
) -> Tensor:
    """Return the cross-entropy of one discriminator, the mean of its real and its fake half; a scalar.

    Args:
        real_logits: [R, N] per head.
        fake_logits: [B, N] per head.
        real_weight: [R], the weight of each real sample: 1 for photos, less for echo images.
    """
    real = torch.stack([F.softplus(-scores.float()).mean(dim=1) for scores in real_logits]).mean(dim=0)
    fake = torch.stack([F.softplus(scores.float()).mean(dim=1) for scores in fake_logits]).mean(dim=0)
    return 0.5 * ((real * real_weight).sum() / real_weight.sum() + fake.mean())


def paired_adversarial(logits: Tensor, compared: Tensor) -> Tensor:
    """Return -log σ(D(first) - D(second)) of each pair, [B], which wants the first more real.

    What both images of a pair share cancels, so the critic judges only what regression leaves out: detail. Sources:
    Jolicoeur-Martineau 2018 (arXiv 1807.00734); Huang et al. 2024 (R3GAN, arXiv 2501.05441).

    Args:
        logits: [B, N] of the critic, one per patch of the first image.
        compared: [B, N], of the second.
    """
    return F.softplus(compared.float() - logits.float()).mean(dim=1)


def sliced_wasserstein(images: Tensor, target: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """Return the multi-scale sliced Wasserstein distance [B] between image patches in CIE Lab.

    At each scale (half the size of the one before) all patches are projected onto random unit directions. The distance
    is the mean absolute difference of the sorted projections, so it compares content regardless of position.
    Sources: Rabin et al. 2011 for the distance, Karras et al. 2018 for its use over scales.

    Args:
        images: [B, 3, H, W] in [-1, 1].
        target: [B, 3, H, W] in [-1, 1].
        directions: [P, 3, K, K] per scale, from `patch_directions`; scales smaller than a patch are skipped.

    Returns:
        [B], in units of Lab, where L is 0…100.
    """
    both = rgb_to_lab(torch.cat((images, target)))
    distances = []
    for kernels in directions:
        if min(both.shape[-2:]) < kernels.shape[-1]:
            break
        distances.append(_ProjectionDistance.apply(both, kernels))  # type: ignore[no-untyped-call]
        both = F.avg_pool2d(both, 2)
    return torch.stack(distances).mean(dim=0)


class _ProjectionDistance(torch.autograd.Function):
    """The mean absolute difference [B] of sorted projections of patches, for one scale.

    Its gradient is computed with its value, a few projections at a time. Autograd would keep all of them, sorted and
    with their indices of 8 bytes, until the backward pass: 1.4 GiB per image of 512 pixels. The target has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, both: Tensor, kernels: Tensor) -> Tensor:
        """Arguments are images and then targets, [2 B, 3, H, W] in Lab, and directions of this scale."""
        batch, places = len(both) // 2, [side - kernels.shape[-1] + 1 for side in both.shape[2:]]
        totals, slope = [], torch.zeros_like(both)
        of_images = slope[:batch]
        for some in kernels.split(max(1, _PROJECTED_AT_ONCE // both[0, 0].numel())):  # type: ignore[no-untyped-call]
            values, order = F.conv2d(both, some).flatten(2).sort(dim=-1)
            difference = values[:batch] - values[batch:]
            totals.append(torch.linalg.vector_norm(difference, 1, dim=(1, 2)))
            if ctx.needs_input_grad[0]:
                signs = torch.empty_like(difference).scatter_(-1, order[:batch], difference.sign_())
                of_images += F.conv_transpose2d(signs.view(batch, -1, *places), some)
        count = len(kernels) * math.prod(places)
        ctx.save_for_backward(slope.div_(count))
        return torch.stack(totals).sum(dim=0) / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Scale the stored gradient."""
        (slope,) = ctx.saved_tensors
        return gradient.repeat(2).view(-1, 1, 1, 1) * slope, None


def patch_directions(scales: int, projections: int, patch: int, generator: torch.Generator) -> list[Tensor]:
    """Return unit directions [projections, 3, patch, patch] per scale for `sliced_wasserstein`."""
    normal = [torch.randn(projections, 3, patch, patch, generator=generator) for _ in range(scales)]
    return [kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for kernels in normal]


# sRGB (D65) to XYZ, rows X, Y, Z, each divided by the white point so that white is (1, 1, 1). Source: IEC 61966-2-1.
_RGB_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return CIE L*a*b* (D65) of sRGB images, [B, 3, H, W]: L in 0…100, a and b about -128…127.

    The input is clamped to its range. Each branch of the two curves is evaluated only where it applies, so that
    gradients stay finite.

    Args:
        images: [B, 3, H, W] in [-1, 1].
    """
    srgb = (images.float().clamp(-1, 1) + 1) / 2
    linear = torch.where(srgb > 0.04045, ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    matrix = send(torch.tensor(_RGB_TO_XYZ), images.device)
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear)
    edge = (6 / 29) ** 3
    curve = torch.where(xyz > edge, xyz.clamp(min=edge) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curve.unbind(dim=1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)
