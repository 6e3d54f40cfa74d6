"""The losses of the method as pure functions: tensors in, one value per sample out, randomness passed in.

Symbols follow the paper (EchoDistill, arXiv 2510.20512): the student's one-step picture is pulled towards the teacher's
guided x0 of the renoised picture (alignment) and towards the photos (adversarial).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the valid region, per sample.

    Args:
        output, target: [B, C, H, W], the model's prediction and ε or v.
        mask: [B, 1, H, W] in 0…1, where the picture counts; a sample whose mask is all 0 has loss 0.

    Returns:
        [B], float32.
    """
    squared = (output.float() - target.float()).square() * mask
    covered = mask.sum(dim=(1, 2, 3)) * output.shape[1]
    return squared.sum(dim=(1, 2, 3)) / covered.clamp(min=1e-8)


def latent_alignment(student_x0: Tensor, teacher_target: Tensor) -> Tensor:
    """Half the mean squared distance of two latents [B, C, H, W]; returns [B]."""
    return 0.5 * (student_x0.float() - teacher_target.float()).square().mean(dim=(1, 2, 3))


def feature_distance(features: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity of features [B, N, D], averaged over their N tokens; returns [B] in 0…2."""
    return 1 - F.cosine_similarity(features.float(), target.float(), dim=-1).mean(dim=1)


def photo_distance(features: Tensor, photos: Tensor) -> Tensor:
    """How much less a picture is like the photos than they are like each other; 0 once it is as much the subject.

    Args:
        features: [B, D] of the pictures. photos: [P, D] of the photos.

    Returns:
        [B] in 0…2: mean cosine among different photos (1 for a single one) - mean cosine to the photos, at least 0.
    """
    return F.relu(photo_similarity(photos) - identity_scores(features, photos))


def identity_scores(features: Tensor, photos: Tensor) -> Tensor:
    """Mean cosine of each picture's features [N, D] to the photos' [P, D]; returns [N]."""
    return (F.normalize(features.float(), dim=-1) @ F.normalize(photos.float(), dim=-1).T).mean(dim=1)


def photo_similarity(photos: Tensor) -> float:
    """Mean cosine between the judge's features [P, D] of different photos: what "the same subject" scores.

    A single photo has nothing to be compared with; its similarity is 1.
    """
    count = len(photos)
    if count < 2:
        return 1.0
    unit = F.normalize(photos.float(), dim=-1)
    return float(((unit @ unit.T).sum() - count) / (count * (count - 1)))


def adversarial_generator(logits: Sequence[Tensor]) -> Tensor:
    """Non-saturating generator loss (Goodfellow et al. 2014), -log D(x̂), of one discriminator: logits [B, N] per head.

    Returns:
        [B], the mean over tokens and heads.
    """
    return torch.stack([F.softplus(-scores.float()).mean(dim=1) for scores in logits]).mean(dim=0)


def adversarial_discriminator(
    real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor], real_weight: Tensor
) -> Tensor:
    """Cross-entropy of one discriminator, the mean of its real and its fake half.

    Args:
        real_logits: per head [R, N]. fake_logits: per head [B, N].
        real_weight: [R], the weight of each real sample; photos count 1, echoed pictures less.

    Returns:
        a scalar.
    """
    real = torch.stack([F.softplus(-scores.float()).mean(dim=1) for scores in real_logits]).mean(dim=0)
    fake = torch.stack([F.softplus(scores.float()).mean(dim=1) for scores in fake_logits]).mean(dim=0)
    return 0.5 * ((real * real_weight).sum() / real_weight.sum() + fake.mean())


def sliced_wasserstein(images: Tensor, target: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """Multi-scale sliced Wasserstein distance between the patches of two pictures, in CIE Lab.

    At each scale (halved from one to the next) all patches are projected on random unit directions; the distance is the
    mean absolute difference of the sorted projections. It compares what is there, not where it is.
    Source: Rabin et al. 2011 for the distance, Karras et al. 2018 for its use over scales.

    Args:
        images, target: [B, 3, H, W] in [-1, 1].
        directions: per scale [P, 3, K, K] from `patch_directions`; scales smaller than a patch are left out.

    Returns:
        [B], in units of Lab, where L is 0…100.
    """
    first, second = rgb_to_lab(images), rgb_to_lab(target)
    distances = []
    for kernels in directions:
        if min(first.shape[-2:]) < kernels.shape[-1]:
            break
        sorted_first, sorted_second = (F.conv2d(x, kernels).flatten(2).sort(dim=-1).values for x in (first, second))
        distances.append((sorted_first - sorted_second).abs().mean(dim=(1, 2)))
        first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return torch.stack(distances).mean(dim=0)


def patch_directions(scales: int, projections: int, patch: int, generator: torch.Generator) -> list[Tensor]:
    """Random unit directions for `sliced_wasserstein`: per scale [projections, 3, patch, patch], on the CPU."""
    drawn = [torch.randn(projections, 3, patch, patch, generator=generator) for _ in range(scales)]
    return [kernels / kernels.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for kernels in drawn]


# sRGB (D65) to XYZ, rows X, Y, Z, each divided by the white point so that white is (1, 1, 1). Source: IEC 61966-2-1.
_RGB_TO_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)


def rgb_to_lab(images: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB pictures [B, 3, H, W] in [-1, 1]: L in 0…100, a and b about -128…127.

    The input is clamped to its range; both curves are evaluated on their own side only, so that gradients stay finite.
    """
    srgb = (images.float().clamp(-1, 1) + 1) / 2
    linear = torch.where(srgb > 0.04045, ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    matrix = torch.tensor(_RGB_TO_XYZ, device=images.device)
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear)
    edge = (6 / 29) ** 3
    curve = torch.where(xyz > edge, xyz.clamp(min=edge) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curve.unbind(dim=1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=1)
