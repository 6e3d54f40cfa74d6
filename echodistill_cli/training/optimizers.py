"""Everything that updates weights: AdamW per trained part, learning rates, clipping, averages.

No step reads a value from the device, because the host would wait for all work that is queued there. Losses, norms and
the decision to skip an update stay on the device until `Optimizers.fetch` reads them in one transfer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Metrics = dict[str, float | Tensor]  # tensors are scalars on the device
# Half-precision gradients of small losses underflow below 6e-8. Scaling by a power of two is exact and prevents it.
FP16_LOSS_SCALE = 1024.0


# The paired critic is trained from nothing, as in GANs, and has to forget early gradients soon.
# It is as large for every model, so its rate is too.
PAIRED_LR = 1e-3
_BETAS = {"paired": (0.5, 0.99)}


class Optimizers(Mapping[str, torch.optim.AdamW]):
    """One AdamW per trained part, by the part's name; a part with nothing to train has none.

    Args:
        parts: the parameters of each part.
        rates: the initial learning rate of each part.
        schedule: "constant" or "cosine", of `set_rates`.
        weight_decay: of AdamW.
        max_grad_norm: clipping norm per part; 0 for none.
        loss_scale: factor on the loss while gradients are computed; a power of two.

    Attributes:
        mean: of the weights that `average` has gathered so far.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Parameter]],
        rates: Mapping[str, float],
        *,
        schedule: str = "constant",
        weight_decay: float,
        max_grad_norm: float,
        loss_scale: float = 1.0,
    ) -> None:
        self.rates, self.schedule = dict(rates), schedule
        self.max_grad_norm, self.loss_scale = max_grad_norm, loss_scale
        self.mean = WeightMean()
        self._skipped: dict[str, Tensor] = {}
        self._parts = {
            name: torch.optim.AdamW(
                parameters, lr=rates[name], weight_decay=weight_decay, betas=_BETAS.get(name, (0.9, 0.999)), fused=True
            )
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
        """Zero, backward, clip and step for the named parts. Nothing is trained anywhere else.

        Returns:
            the gradient norm of each part before clipping. If the loss or a gradient was not finite, no weight has
            moved and every norm is NaN; `fetch` then reports `skipped_<part>`.
        """
        stepping = {name: self._parts[name] for name in parts if name in self._parts}
        if not stepping or not loss.requires_grad:
            return {}
        for optimizer in stepping.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward(torch.full_like(loss, self.loss_scale))  # type: ignore[no-untyped-call]
        norms = [self._unscale_and_clip(optimizer) for optimizer in stepping.values()]
        values = torch.stack([loss.detach().float(), *norms])
        finite = torch.linalg.vector_norm(values, math.inf) < math.inf  # NaN is below nothing
        skipped = torch.where(finite, 0.0, 1.0)
        for name, optimizer in stepping.items():
            # AdamW's fused kernel leaves weights, moments and its count as they are where this is 1.
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
            self._skipped[name] = torch.maximum(self._skipped[name], skipped) if name in self._skipped else skipped
        norms = list(torch.where(finite, values, math.nan).unbind()[1:])
        return {f"grad_norm_{name}": norm for name, norm in zip(stepping, norms, strict=True)}

    def forget_gradients(self) -> None:
        """Free the gradients of the last updates, before a graph takes their place in memory."""
        for optimizer in self._parts.values():
            optimizer.zero_grad(set_to_none=True)

    def fetch(self, metrics: Metrics) -> dict[str, float]:
        """Read metrics from the device in one transfer.

        Args:
            metrics: of the updates since the last call.

        Returns:
            the same as numbers. `skipped_<part>` = 1 is added for each part of which an update was skipped, and the
            norm of a skipped update is left out.
        """
        skipped = {f"skipped_{name}": value for name, value in self._skipped.items()}
        self._skipped = {}
        waiting = {name: value for name, value in (metrics | skipped).items() if isinstance(value, Tensor)}
        numbers = torch.stack([value.float() for value in waiting.values()]).tolist() if waiting else []
        values = {name: float(value) for name, value in (metrics | dict(zip(waiting, numbers, strict=True))).items()}
        if not any(values[name] for name in skipped):
            return {name: value for name, value in values.items() if name not in skipped}
        left_out = {name for name in values if name.startswith("grad_norm_") and math.isnan(values[name])}
        left_out |= {name for name in skipped if not values[name]}
        return {name: value for name, value in values.items() if name not in left_out}

    def set_rates(self, progress: float) -> None:
        """Set the learning rate of every part by the schedule.

        Args:
            progress: finished fraction of the steps, 0…1.
        """
        for name in self._parts:
            self.scale_rate(name, schedule_factor(self.schedule, progress))

    def scale_rate(self, part: str, factor: float) -> None:
        """Set the learning rate of one part, if it exists, to its initial rate times `factor`."""
        for group in self._parts[part].param_groups if part in self._parts else ():
            group["lr"] = factor * self.rates[part]

    def rate(self, part: str) -> float:
        """The current learning rate of a part."""
        return float(self._parts[part].param_groups[0]["lr"])

    def weights(self, parts: Sequence[str]) -> list[nn.Parameter]:
        """All parameters of the named parts, in a fixed order."""
        return [p for name in parts if name in self._parts for p in _parameters(self._parts[name])]

    def average(self, parts: Sequence[str], finished: int, planned: int) -> None:
        """Average some parts over the second half of a phase; its last step sets them to the mean.

        Args:
            parts: names; the same in every step of the phase.
            finished: steps of the phase, this one included.
            planned: steps of the whole phase.
        """
        weights = self.weights(parts)
        if 2 * finished > planned:
            self.mean.add(weights)
        if finished == planned:
            self.mean.move_into(weights)

    def state_dict(self) -> dict[str, Any]:
        """Moments and rates by part, for a checkpoint. The mean has its own `state_dict`."""
        return {name: optimizer.state_dict() for name, optimizer in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load `state_dict`, but keep the current learning rates."""
        for name, optimizer in self._parts.items():
            rates = [group["lr"] for group in optimizer.param_groups]
            # Checkpoints of older versions say that they were not fused.
            groups = [group | {"fused": True, "foreach": None} for group in state[name]["param_groups"]]
            optimizer.load_state_dict({**state[name], "param_groups": groups})
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    @torch.no_grad()
    def _unscale_and_clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` does, and return the norm before it; a scalar."""
        parameters = _parameters(optimizer)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), device=parameters[0].device)
        if self.loss_scale != 1.0:
            torch._foreach_div_(gradients, self.loss_scale)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if self.max_grad_norm:
            torch._foreach_mul_(gradients, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def schedule_factor(schedule: str, progress: float) -> float:
    """Return the factor on the learning rate at a progress of 0…1; "cosine" falls from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if schedule == "cosine" else 1.0


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@dataclass
class WeightMean:
    """A running mean of the same tensors at several steps.

    Args:
        count: how many steps have been added.
        means: float32, in the order of the tensors; empty before the first step.
    """

    count: int = 0
    means: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, weights: Sequence[Tensor]) -> None:
        """Add the current values of the weights to the mean."""
        values = [weight.detach().float() for weight in weights]
        self.count += 1
        self.means = self.means or [torch.zeros_like(value) for value in values]
        torch._foreach_add_(self.means, torch._foreach_sub(values, self.means), alpha=1 / self.count)

    @torch.no_grad()
    def move_into(self, weights: Sequence[Tensor]) -> None:
        """Write the mean into the weights and reset it; do nothing if it is empty."""
        if self.count:
            torch._foreach_copy_(list(weights), self.means)
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        self.count, self.means = 0, []

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Load `state_dict`, with its tensors on `device`."""
        self.count, self.means = state["count"], [mean.to(device) for mean in state["means"]]
