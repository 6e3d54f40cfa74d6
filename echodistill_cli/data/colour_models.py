"""A soft mask made to follow a picture's colours, as GrabCut does (Rother et al. 2004) but for its cut.

The colours inside and outside of a mask are each a mixture of Gaussians; every pixel goes where its colour is likelier,
as far as the mask allows; and again from the mask so found.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_COMPONENTS = 4
_ROUNDS = 3
_FITTING_STEPS = 8
# A mask is never sure of itself: what it says of a pixel can be outvoted by the pixel's colour, and the reverse.
_SUREST = 0.98
_COLOUR_WEIGHT, _LARGEST_VOTE = 0.7, 4.0
# Added to each covariance, in a picture's units of -1…1: no mixture sits on one flat colour.
_LEAST_VARIANCE = 0.01
# Where the result is made 0 and 1: half a tint is neither colour.
_OUTSIDE, _INSIDE = 0.3, 0.7
_SIDE = 128


def refined_mask(mask: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
    """A mask that follows the picture's colours, nearly hard.

    Args:
        mask: [1, H, W] in 0…1, a rough guess. image: [3, H, W] in [-1, 1].
        generator: a CPU generator; the mixtures begin with pixels that it picks.

    Returns:
        [1, H, W] in 0…1; found at 128 pixels a side at most.
    """
    scale = min(1.0, _SIDE / max(image.shape[-2:]))
    size = [round(side * scale) for side in image.shape[-2:]]
    small, guess = (F.interpolate(x.unsqueeze(0).float().cpu(), size, mode="area")[0] for x in (image, mask))
    pixels, guess = small.flatten(1).T, guess.flatten().clamp(1 - _SUREST, _SUREST)
    found = guess
    for _ in range(_ROUNDS):
        votes = _log_likelihood(pixels, found, generator) - _log_likelihood(pixels, 1 - found, generator)
        votes = _COLOUR_WEIGHT * votes.clamp(-_LARGEST_VOTE, _LARGEST_VOTE)
        smooth = F.avg_pool2d(torch.sigmoid(guess.logit() + votes).view(1, 1, *size), 3, 1, 1, count_include_pad=False)
        found = smooth.flatten().clamp(1 - _SUREST, _SUREST)
    hard = ((found - _OUTSIDE) / (_INSIDE - _OUTSIDE)).clamp(0, 1).view(1, 1, *size)
    return F.interpolate(hard, image.shape[-2:], mode="bilinear")[0].to(image.device)


def _log_likelihood(pixels: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Of pixels [N, 3] under the mixture that expectation maximization fits to them, weighted by `weights` [N]; [N]."""
    means = pixels[torch.multinomial(weights, _COMPONENTS, generator=generator)]
    shares = torch.softmax(-(pixels[:, None] - means).square().sum(dim=-1) / 0.1, dim=1)
    for _ in range(_FITTING_STEPS):
        counted = shares * weights[:, None]
        total = counted.sum(dim=0) + 1e-3
        means = counted.T @ pixels / total[:, None]
        apart = pixels[:, None] - means
        spread = torch.einsum("nk,nki,nkj->kij", counted, apart, apart) / total[:, None, None]
        root = torch.linalg.cholesky(spread + _LEAST_VARIANCE * torch.eye(3))
        white = torch.linalg.solve_triangular(root, apart.permute(1, 2, 0), upper=False)
        log_root = root.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        each = -0.5 * white.square().sum(dim=1).T - log_root + (total / total.sum()).log() - 1.5 * math.log(2 * math.pi)
        shares = torch.softmax(each, dim=1)
    return torch.logsumexp(each, dim=1)
