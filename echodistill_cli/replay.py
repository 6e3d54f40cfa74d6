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
    """

    noise: Tensor | None = None
    latents: Tensor | None = None
    prompts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(self, noise: Tensor, latents: Tensor, prompts: Sequence[str]) -> None:
        """Remember a batch; the oldest are forgotten."""
        noises = noise if self.noise is None else torch.cat((self.noise, noise))
        targets = latents if self.latents is None else torch.cat((self.latents, latents))
        self.noise, self.latents = noises[-REMEMBERED:].detach(), targets[-REMEMBERED:].detach()
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
        tensors = {key: None if state[key] is None else state[key].to(device) for key in ("noise", "latents")}
        self.noise, self.latents = tensors["noise"], tensors["latents"]
        self.prompts = list(state["prompts"])
