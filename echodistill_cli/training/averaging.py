"""The mean of trained weights over steps: it lies nearer to where they head than any one of them, at no step's cost.

Source: stochastic weight averaging, Izmailov et al. 2018 (arXiv 1803.05407).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class WeightMean:
    """A running mean of the same tensors at several moments.

    Args:
        count: how many moments. means: float32, in the order of the tensors; empty before the first moment.
    """

    count: int = 0
    means: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, weights: Sequence[Tensor]) -> None:
        """Take in one more moment of the same weights."""
        now = [weight.detach().float() for weight in weights]
        self.count += 1
        self.means = self.means or [torch.zeros_like(weight) for weight in now]
        for mean, weight in zip(self.means, now, strict=True):
            mean.add_(weight - mean, alpha=1 / self.count)

    @torch.no_grad()
    def move_into(self, weights: Sequence[Tensor]) -> None:
        """Write the mean into the weights, and forget it; without any moment nothing happens."""
        if self.count:
            for weight, mean in zip(weights, self.means, strict=True):
                weight.copy_(mean)
        self.count, self.means = 0, []

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """What `state_dict` gave, on a device."""
        self.count, self.means = state["count"], [mean.to(device) for mean in state["means"]]
