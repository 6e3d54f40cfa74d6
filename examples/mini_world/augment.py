"""Blur, noise and brightness: so that networks trained on clean renders do not fail on generated images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor


def soften(rng: np.random.Generator, pictures: Tensor) -> Tensor:
    """Degrade images (batch, 3, side, side) in -1..1, each in its own way; half of them stay sharp."""
    count = len(pictures)
    blurred = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    halved = functional.interpolate(functional.avg_pool2d(pictures, 2), scale_factor=2, mode="bilinear")
    choice = torch.from_numpy(rng.integers(0, 4, count)).to(pictures.device).view(-1, 1, 1, 1)
    return jitter(rng, torch.where(choice == 1, blurred, torch.where(choice == 2, halved, pictures)))


def jitter(rng: np.random.Generator, pictures: Tensor) -> Tensor:
    """Change the contrast and brightness of images (batch, 3, side, side) in -1..1, and add noise to half of them."""
    count = len(pictures)

    def per_picture(low: float, high: float) -> Tensor:
        values = torch.from_numpy(rng.uniform(low, high, count)).float()
        return values.to(pictures.device).view(-1, 1, 1, 1)

    noise = torch.from_numpy(rng.standard_normal(pictures.shape, dtype=np.float32)).to(pictures.device)
    pictures = (
        pictures * per_picture(0.9, 1.1) + per_picture(-0.08, 0.08) + noise * per_picture(-0.1, 0.12).clamp(min=0)
    )
    return pictures.clamp(-1, 1)


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur maps (batch, channels, height, width) by a Gaussian of `sigma` cells, with replicated borders."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=maps.device, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(maps.dtype)
    channels = maps.shape[1]
    padded = functional.pad(maps, (reach, reach, reach, reach), mode="replicate")
    across = functional.conv2d(padded, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return functional.conv2d(across, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
