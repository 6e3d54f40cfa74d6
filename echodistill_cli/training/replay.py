"""The teacher's latest targets, remembered: a target of several steps is dear, and worth more than one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REMEMBERED = 256


@dataclass
class TargetMemory:
    """Up to 256 targets, the newest last.

    Args:
        noise, latents: [N, C, h, w], what the student began with and what the teacher made of it. prompts: N texts.
        untouched: [N, C, h, w], what the untouched student made of that noise and the class; None if nobody asks.
    """

    noise: Tensor | None = None
    latents: Tensor | None = None
    untouched: Tensor | None = None
    prompts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, noise: Tensor, latents: Tensor, prompts: Sequence[str], untouched: Tensor | None = None) -> None:
        """Remember a batch; the oldest are forgotten."""
        self.noise, self.latents = _newest(self.noise, noise), _newest(self.latents, latents)
        self.untouched = None if untouched is None else _newest(self.untouched, untouched)
        self.prompts = [*self.prompts, *prompts][-REMEMBERED:]

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Noise, targets and prompts of some rows."""
        assert self.noise is not None
        assert self.latents is not None
        return self.noise[list(rows)], self.latents[list(rows)], [self.prompts[row] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """What `state_dict` gave, on a device."""
        tensors = ("noise", "latents", "untouched")
        self.noise, self.latents, self.untouched = (
            None if state[key] is None else state[key].to(device) for key in tensors
        )
        self.prompts = list(state["prompts"])


def _newest(remembered: Tensor | None, more: Tensor) -> Tensor:
    joined = more if remembered is None else torch.cat((remembered, more))
    return joined[-REMEMBERED:].detach()
