"""The echo phase's memory: which of the student's own pictures of the subject are good enough to train both models.

The released code of the paper has no such stage. The rules here are ours: a picture is kept if it is as much the
subject as the photos are of each other (up to a set share), is no copy of a photo, and is no copy of a better picture;
of those, the best stay. A judge's verdict is a cosine, so nothing here needs a model: features in, choices out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.config.schema import EchoConfig
from echodistill_cli.training.losses import identity_scores, photo_similarity


@dataclass
class EchoPool:
    """The kept pictures, best first.

    Args:
        latents: [N, C, h, w]. features: [N, D], the judge's. scores: [N], similarity to the photos. prompts: N texts.
        critics: per discriminator, per tap, features [N, T, D] for its real half.
    """

    latents: Tensor
    features: Tensor
    scores: Tensor
    prompts: list[str]
    critics: dict[str, list[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> EchoPool:
        """The same pictures on a device."""
        critics = {name: [tap.to(device) for tap in taps] for name, taps in self.critics.items()}
        return EchoPool(
            self.latents.to(device), self.features.to(device), self.scores.to(device), self.prompts, critics
        )

    def join(self, other: EchoPool) -> EchoPool:
        """Both pools' pictures, unfiltered."""
        critics = {
            name: [torch.cat(taps) for taps in zip(self.critics[name], other.critics[name], strict=True)]
            for name in self.critics
        }
        return EchoPool(
            torch.cat((self.latents, other.latents)),
            torch.cat((self.features, other.features)),
            torch.cat((self.scores, other.scores)),
            self.prompts + other.prompts,
            critics,
        )

    def take(self, rows: Sequence[int]) -> EchoPool:
        """The pictures at `rows`, in that order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.latents.device)
        critics = {name: [tap[index] for tap in taps] for name, taps in self.critics.items()}
        prompts = [self.prompts[row] for row in rows]
        return EchoPool(self.latents[index], self.features[index], self.scores[index], prompts, critics)


def least_score(photos: Tensor, settings: EchoConfig) -> float:
    """The score below which a picture shows too little of the subject; `photos` are the judge's features [P, D]."""
    return settings.min_identity * photo_similarity(photos)


Verdict = Literal["kept", "identity", "photo_copy", "duplicate", "crowded"]


def judge(features: Tensor, photos: Tensor, settings: EchoConfig) -> list[Verdict]:
    """A verdict per picture, from features [N, D] of the pictures and [P, D] of the photos.

    Returns:
        "kept", or why it fell: "identity" (too little of the subject), "photo_copy", "duplicate" of a better picture,
        or "crowded" (good, but the pool is full of better ones).
    """
    threshold = least_score(photos, settings)
    scores = identity_scores(features, photos)
    unit, unit_photos = F.normalize(features.float(), dim=-1), F.normalize(photos.float(), dim=-1)
    nearest_photo = (unit @ unit_photos.T).max(dim=1).values
    verdicts: list[Verdict] = ["crowded"] * len(features)
    kept: list[int] = []
    for row in torch.argsort(scores, descending=True, stable=True).tolist():
        if scores[row] < threshold:
            verdicts[row] = "identity"
        elif nearest_photo[row] > settings.max_similarity:
            verdicts[row] = "photo_copy"
        elif kept and (unit[kept] @ unit[row]).max() > settings.max_similarity:
            verdicts[row] = "duplicate"
        elif len(kept) < settings.pool_size:
            verdicts[row] = "kept"
            kept.append(row)
    return verdicts


def refresh(
    pool: EchoPool | None, drawn: EchoPool, photos: Tensor, settings: EchoConfig
) -> tuple[EchoPool, list[Verdict]]:
    """The pool after newly drawn pictures have stood beside its old ones.

    Args:
        photos: the judge's features of the photos [P, D].

    Returns:
        the new pool, best first and possibly empty, and the verdicts on the drawn pictures.
    """
    everything = drawn if pool is None else drawn.join(pool)
    verdicts = judge(everything.features, photos, settings)
    kept = [row for row, verdict in enumerate(verdicts) if verdict == "kept"]
    best_first = sorted(kept, key=lambda row: -float(everything.scores[row]))
    return everything.take(best_first), verdicts[: len(drawn)]


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
