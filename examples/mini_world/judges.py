"""Stage `judge`: a convolutional classifier of noun, exact drawing, place and color, trained on renders.

It shares neither architecture nor seed with anything the pair is trained or personalized with, and it knows
the drawings of both held-out vendors, which nothing else does: it is the examiner, never a loss. `--judge-seed`
makes another one; two that agree are worth more than one that is sure.

It learns sharp renders, as they are and through the VAE, and that a blurred one shows nothing: its noun and its drawing
are "unclear". The first judge was trained to read softened renders too, and named drawings that were blurred to blobs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.mini_world.augment import gaussian_blur, jitter
from examples.mini_world.models import as_tensor, decode, encode, half_precision
from examples.mini_world.nouns import SECOND_VENDOR, SOURCES, chosen_nouns
from examples.mini_world.places import PLACES
from examples.mini_world.sprites import load_second, load_sprites
from examples.mini_world.world import COLORS, Scene, World

UNCLEAR = "unclear"
# Parts of a training batch: sharp renders, renders through the VAE, blurred images, images of blurred latents.
PARTS = (0.5, 0.2, 0.2, 0.1)
# Standard deviations of the blur. The weakest leaves 0.4 of the sharpness of a render through the VAE.
PIXEL_BLUR, LATENT_BLUR = (1.2, 4.0), (0.6, 1.5)


def judge_world(work: Path, nouns: int) -> World:
    """The world with the drawings of all vendors, the held-out ones included."""
    sprites = {**load_sprites(work), **load_second(work)}
    return World(sprites, chosen_nouns(nouns), [*(source.vendor for source in SOURCES), SECOND_VENDOR])


def judge_labels(world: World) -> dict[str, list[str]]:
    """The classes of each question, in order; "none" is a scene without color. Plain ground is white."""
    return {
        "noun": [*world.nouns, UNCLEAR],
        "sprite": [*(f"{noun}/{vendor}" for noun in world.nouns for vendor in world.vendors[noun]), UNCLEAR],
        "place": list(PLACES),
        "colour": ["none", *COLORS],
    }


def scene_answers(scene: Scene) -> dict[str, str]:
    """The right answers about a scene."""
    return {
        "noun": scene.noun,
        "sprite": f"{scene.noun}/{scene.vendor}",
        "place": scene.place or "white",
        "colour": scene.colour or "none",
    }


class Judge(nn.Module):
    """Images (batch, 3, 64, 64) in -1..1 to logits per question: four convolution levels, 1.2 M weights."""

    def __init__(self, labels: dict[str, list[str]], width: int = 32) -> None:
        super().__init__()
        self.labels = labels
        layers: list[nn.Module] = []
        channels = 3
        for level in range(4):
            wider = width * 2**level
            layers += [
                nn.Conv2d(channels, wider, 3, stride=1 if level == 0 else 2, padding=1),
                nn.GroupNorm(8, wider),
                nn.GELU(),
                nn.Conv2d(wider, wider, 3, stride=2 if level == 0 else 1, padding=1),
                nn.GroupNorm(8, wider),
                nn.GELU(),
            ]
            channels = wider
        self.body = nn.Sequential(*layers)
        # Mean for the place, maximum for what is only in one spot.
        self.heads = nn.ModuleDict({key: nn.Linear(2 * channels, len(names)) for key, names in labels.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """What the answers are read from: (batch, 512)."""
        seen = self.body(pictures)
        return torch.cat([seen.mean(dim=(2, 3)), seen.amax(dim=(2, 3))], dim=-1)

    def answers(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (batch, classes) per question."""
        return {key: head(features) for key, head in self.heads.items()}

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        return self.answers(self.features(pictures))


@dataclass(frozen=True)
class Reading:
    """What a judge sees in a batch of images: the answer to each question, and features (batch, 512), unit length."""

    answers: dict[str, list[str]]
    features: Tensor

    def right(self, question: str, wanted: Sequence[str]) -> float:
        """The share of images whose answer is the wanted one."""
        given = self.answers[question]
        return sum(one == other for one, other in zip(given, wanted, strict=True)) / len(given)


class Examiner:
    """A judge's exported folder, ready to read images."""

    def __init__(self, folder: Path) -> None:
        self.labels: dict[str, list[str]] = json.loads((folder / "card.json").read_text())["labels"]
        self.judge = Judge(self.labels)
        self.judge.load_state_dict(load_file(folder / "model.safetensors"))
        self.judge.float().eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, pictures: NDArray[np.uint8]) -> Reading:
        """Look at images (batch, 64, 64, 3)."""
        features = torch.cat(
            [self.judge.features(as_tensor(part)) for part in np.array_split(pictures, -(-len(pictures) // 64))]
        )
        answers = {
            question: [self.labels[question][index] for index in logits.argmax(dim=-1).tolist()]
            for question, logits in self.judge.answers(features).items()
        }
        return Reading(answers, functional.normalize(features, dim=-1))


class JudgeStage:
    """Trains one judge; `world` should hold all vendors, the held-out ones included."""

    ema_decay = 0.999

    def __init__(
        self,
        world: World,
        vae: AutoencoderTiny,
        device: str,
        number: int = 1,
        batch_size: int = 48,
        rate: float = 1e-3,
        start: Path | None = None,
    ) -> None:
        self.name, self.world, self.vae, self.device = f"judge-{number}", world, vae.to(device), device
        self.batch_size, self.learning_rate = batch_size, rate
        self.labels = judge_labels(world)
        torch.manual_seed(9000 + number)
        judge = Judge(self.labels)
        if start:
            take_over(judge, Examiner(start))
        self.network: nn.Module = judge.to(device)

    def _batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = [self.world.draw(rng) for _ in range(count)]
        answers = [scene_answers(picture.scene) for picture in drawn]
        targets = {
            key: torch.tensor([names.index(answer[key]) for answer in answers], device=self.device)
            for key, names in self.labels.items()
        }
        return as_tensor(np.stack([picture.image for picture in drawn]), self.device), targets

    @torch.no_grad()
    def _views(self, rng: np.random.Generator, pictures: Tensor) -> tuple[Tensor, int]:
        """Images in the order of `PARTS`, and how many of them, from the first, are clear."""
        ends = [round(len(pictures) * sum(PARTS[: index + 1])) for index in range(len(PARTS))]
        sharp, coded, blurred = (pictures[first:last] for first, last in zip((0, *ends), ends[:3], strict=False))
        in_latents = pictures[ends[2] :]
        with half_precision(self.device):
            latents = encode(self.vae, torch.cat([coded, in_latents])).float()
            soft = _blurred(rng, latents[len(coded) :], LATENT_BLUR)
            again = decode(self.vae, torch.cat([latents[: len(coded)], soft])).float().clamp(-1, 1)
        parts = [sharp, again[: len(coded)], _blurred(rng, blurred, PIXEL_BLUR), again[len(coded) :]]
        return torch.cat(parts), ends[1]

    def _logits(self, pictures: Tensor) -> dict[str, Tensor]:
        with half_precision(self.device):
            return {key: value.float() for key, value in self.network(pictures).items()}

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        pictures, targets = self._batch(rng, self.batch_size)
        views, clear = self._views(rng, pictures)
        for question in ("noun", "sprite"):
            targets[question][clear:] = self.labels[question].index(UNCLEAR)
        logits = self._logits(jitter(rng, views))
        return torch.stack([functional.cross_entropy(logits[key], targets[key]) for key in self.labels]).sum(), {}

    def report(self, directory: Path, samples: int) -> dict[str, float]:  # noqa: ARG002
        """The share of right answers on 256 fixed renders: the ceiling for generated images."""
        pictures, targets = self._batch(np.random.default_rng(11), 256)
        logits = self._logits(pictures)
        return {f"right_{key}": (logits[key].argmax(-1) == targets[key]).float().mean().item() for key in self.labels}


@torch.no_grad()
def take_over(judge: Judge, earlier: Examiner) -> None:
    """Give a judge the weights of an earlier one, and its knowledge of every answer that both have."""
    judge.body.load_state_dict(earlier.judge.body.state_dict())
    for question, head in judge.heads.items():
        known = {answer: row for row, answer in enumerate(earlier.labels[question])}
        for row, answer in enumerate(judge.labels[question]):
            if answer in known:
                for mine, its in zip(head.parameters(), earlier.judge.heads[question].parameters(), strict=True):
                    mine[row] = its[known[answer]]


def _blurred(rng: np.random.Generator, maps: Tensor, sigmas: tuple[float, float]) -> Tensor:
    """Maps (batch, channels, height, width), each with a blur of its own strength."""
    return torch.cat([gaussian_blur(one[None], float(rng.uniform(*sigmas))) for one in maps])
