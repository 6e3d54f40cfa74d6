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
    pictures = torch.where(choice == 1, blurred, torch.where(choice == 2, halved, pictures))

    def per_picture(low: float, high: float) -> Tensor:
        values = torch.from_numpy(rng.uniform(low, high, count)).float()
        return values.to(pictures.device).view(-1, 1, 1, 1)

    noise = torch.from_numpy(rng.standard_normal(pictures.shape, dtype=np.float32)).to(pictures.device)
    pictures = (
        pictures * per_picture(0.9, 1.1) + per_picture(-0.08, 0.08) + noise * per_picture(-0.1, 0.12).clamp(min=0)
    )
    return pictures.clamp(-1, 1)
