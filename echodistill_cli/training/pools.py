"""What is kept between steps: the echo's pool of generated images, and the buffer of replayed targets.

The released code of the paper has no echo stage, so the selection rules are ours. An image enters the pool if it shows
the subject about as well as the photos resemble each other, and copies neither a photo nor a better image. Only the
best stay. All rules compare cosine similarities, so no model is needed here: features in, choices out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.config.schema import EchoConfig
from echodistill_cli.training.losses import identity_scores, photo_similarity


@dataclass
class EchoPool:
    """N generated images of the subject, best first.

    Args:
        latents: [N, C, h, w].
        features: [N, D], of the identity encoder.
        scores: [N], mean similarity to the photos.
        prompts: N texts.
        critics: features [N, T, D] per discriminator and tap, for its real half.
    """

    latents: Tensor
    features: Tensor
    scores: Tensor
    prompts: list[str]
    critics: dict[str, list[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> EchoPool:
        """Return the same images on a device."""
        critics = {name: [tap.to(device) for tap in taps] for name, taps in self.critics.items()}
        return EchoPool(
            self.latents.to(device), self.features.to(device), self.scores.to(device), self.prompts, critics
        )

    def join(self, other: EchoPool) -> EchoPool:
        """Return the images of both pools, unfiltered and in this order."""
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
        """Return the images at `rows`, in that order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.latents.device)
        critics = {name: [tap[index] for tap in taps] for name, taps in self.critics.items()}
        prompts = [self.prompts[row] for row in rows]
        return EchoPool(self.latents[index], self.features[index], self.scores[index], prompts, critics)


def minimum_score(photos: Tensor, settings: EchoConfig) -> float:
    """Return the score below which an image shows too little of the subject.

    Args:
        photos: [P, D], the identity encoder's features of the photos.
        settings: `min_identity` is the fraction of the photos' own similarity that an image needs.
    """
    return settings.min_identity * photo_similarity(photos)


Verdict = Literal["kept", "identity", "photo_copy", "duplicate", "crowded"]


def select(features: Tensor, photos: Tensor, settings: EchoConfig) -> list[Verdict]:
    """Decide which images are good enough to train on, with the reason for each one that is not.

    Args:
        features: [N, D], the identity encoder's features of the images.
        photos: [P, D], its features of the photos.
        settings: the thresholds.

    Returns:
        N verdicts: "kept", "identity" (too little of the subject), "photo_copy", "duplicate" (of a better image), or
        "crowded" (good enough, but the pool is full of better ones).
    """
    threshold = minimum_score(photos, settings)
    scores = identity_scores(features, photos)
    unit, unit_photos = F.normalize(features.float(), dim=-1), F.normalize(photos.float(), dim=-1)
    nearest_photo = (unit @ unit_photos.T).max(dim=1).values
    verdicts: list[Verdict] = ["crowded"] * len(features)
    selection: list[int] = []
    for row in torch.argsort(scores, descending=True, stable=True).tolist():
        if scores[row] < threshold:
            verdicts[row] = "identity"
        elif nearest_photo[row] > settings.max_similarity:
            verdicts[row] = "photo_copy"
        elif selection and (unit[selection] @ unit[row]).max() > settings.max_similarity:
            verdicts[row] = "duplicate"
        elif len(selection) < settings.pool_size:
            verdicts[row] = "kept"
            selection.append(row)
    return verdicts


def refresh(
    pool: EchoPool | None, candidates: EchoPool, photos: Tensor, settings: EchoConfig
) -> tuple[EchoPool, list[Verdict]]:
    """Select a new pool from new candidates and the images of the old pool.

    Args:
        pool: the old one; None before the first refresh.
        candidates: newly generated images.
        photos: [P, D], the identity encoder's features of the photos.
        settings: the thresholds.

    Returns:
        the new pool, best first and possibly empty, and the verdicts on the candidates.
    """
    union = candidates if pool is None else candidates.join(pool)
    verdicts = select(union.features, photos, settings)
    rows = [row for row, verdict in enumerate(verdicts) if verdict == "kept"]
    best_first = sorted(rows, key=lambda row: -float(union.scores[row]))
    return union.take(best_first), verdicts[: len(candidates)]


REPLAY_CAPACITY = 256


@dataclass
class ReplayBuffer:
    """Targets of earlier steps, up to `REPLAY_CAPACITY`, the newest last.

    Args:
        noise: [N, C, h, w], what the student started from: noise, or z_t for a later step.
        latents: [N, C, h, w], what the teacher made of it.
        base: [N, C, h, w], what the base student made of the same noise and the class; None without `pair_share`.
        prompts: N texts.
        places: of the N steps among those of the student.
    """

    noise: Tensor | None = None
    latents: Tensor | None = None
    base: Tensor | None = None
    prompts: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def add(
        self, noise: Tensor, latents: Tensor, prompts: Sequence[str], base: Tensor | None = None, place: int = 0
    ) -> None:
        """Add a batch of one step of the student; the oldest targets are dropped."""
        self.noise, self.latents = _newest(self.noise, noise), _newest(self.latents, latents)
        self.base = None if base is None else _newest(self.base, base)
        self.prompts = [*self.prompts, *prompts][-REPLAY_CAPACITY:]
        self.places = [*self.places, *[place] * len(prompts)][-REPLAY_CAPACITY:]

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        """Return noise, targets and prompts of some rows."""
        assert self.noise is not None
        assert self.latents is not None
        return self.noise[list(rows)], self.latents[list(rows)], [self.prompts[row] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint, by the keys of its format."""
        tensors = {"noise": self.noise, "latents": self.latents, "untouched": self.base}
        return tensors | {"prompts": self.prompts, "places": self.places}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Load `state_dict`, with its tensors on `device`."""
        self.noise, self.latents, self.base = (
            None if state[key] is None else state[key].to(device) for key in ("noise", "latents", "untouched")
        )
        self.prompts = list(state["prompts"])
        self.places = list(state.get("places", [0] * len(self.prompts)))  # older checkpoints have none


def _newest(stored: Tensor | None, batch: Tensor) -> Tensor:
    joined = batch if stored is None else torch.cat((stored, batch))
    return joined[-REPLAY_CAPACITY:].detach()
