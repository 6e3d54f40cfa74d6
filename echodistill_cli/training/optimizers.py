"""Everything that moves weights: one AdamW per trained part, learning rates, clipping, and averages of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Metrics = dict[str, float]
# Half-precision gradients of small losses vanish below 6e-8; this keeps them above. Exact, being a power of two.
FP16_LOSS_SCALE = 1024.0


class Optimizers(Mapping[str, torch.optim.AdamW]):
    """One AdamW per trained part, by the part's name; a part with nothing to train has none.

    Args:
        parts: parameters by part. rates: the learning rate that each part starts from.
        weight_decay: AdamW's. max_grad_norm: clipping norm per part; 0 for none.
        loss_scale: factor on the loss while gradients are computed; a power of two.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Parameter]],
        rates: Mapping[str, float],
        *,
        weight_decay: float,
        max_grad_norm: float,
        loss_scale: float = 1.0,
    ) -> None:
        self.rates, self.max_grad_norm, self.loss_scale = dict(rates), max_grad_norm, loss_scale
        self._parts = {
            name: torch.optim.AdamW(parameters, lr=rates[name], weight_decay=weight_decay)
            for name, parameters in parts.items()
            if parameters
        }

    def __getitem__(self, part: str) -> torch.optim.AdamW:
        return self._parts[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def step(self, loss: Tensor, parts: Sequence[str]) -> Metrics:
        """The one place where anything is trained: zero, backward, clip, step, for the named parts.

        Returns:
            the gradient norm of each part before clipping; or, where loss or gradient was not finite and nothing has
            been moved, `skipped_<part>` = 1.
        """
        moving = {name: self._parts[name] for name in parts if name in self._parts}
        if not moving or not loss.requires_grad:
            return {}
        for optimizer in moving.values():
            optimizer.zero_grad(set_to_none=True)
        (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]
        norms = {name: self._unscale_and_clip(optimizer) for name, optimizer in moving.items()}
        if not all(math.isfinite(value) for value in (float(loss.detach()), *norms.values())):
            return {f"skipped_{name}": 1.0 for name in moving}
        for optimizer in moving.values():
            optimizer.step()
        return {f"grad_norm_{name}": norm for name, norm in norms.items()}

    def set_rates(self, shares: Mapping[str, float]) -> None:
        """Give each part a share of the learning rate that it started from; a part that is not named keeps its own."""
        for name in self._parts.keys() & shares.keys():
            for group in self._parts[name].param_groups:
                group["lr"] = shares[name] * self.rates[name]

    def rate(self, part: str) -> float:
        """The present learning rate of a part."""
        return float(self._parts[part].param_groups[0]["lr"])

    def weights(self, parts: Sequence[str]) -> list[nn.Parameter]:
        """All parameters of the named parts, in a fixed order."""
        return [p for name in parts if name in self._parts for p in _parameters(self._parts[name])]

    def state_dict(self) -> dict[str, Any]:
        """Moments and rates by part, for a checkpoint."""
        return {name: optimizer.state_dict() for name, optimizer in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave; the learning rates stay the present ones."""
        for name, optimizer in self._parts.items():
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state[name])
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _unscale_and_clip(self, optimizer: torch.optim.Optimizer) -> float:
        parameters = [parameter for parameter in _parameters(optimizer) if parameter.grad is not None]
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.div_(self.loss_scale)
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm or math.inf))


def schedule_share(schedule: str, done: float) -> float:
    """Share of the learning rate at a share `done` of the steps: 1 for "constant"; "cosine" falls from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if schedule == "cosine" else 1.0


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
