"""Stages `identity`, `backbone-clip` and `backbone-vit`: the small frozen networks that look at images.

All three learn from renders of every noun in the training vendors, so that they have to generalise to
drawings they never saw, the held-out vendor's above all. The identity encoder is contrastive among images: two
views of one drawing (same color, other place, size and turn) belong together. The CLIP is contrastive between
images and captions, as CLIP is. The ViT names vendor, place and color, and tells two views of a noun's drawings
from those of other nouns.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from examples.mini_world.augment import soften
from examples.mini_world.models import as_tensor, half_precision, text_config
from examples.mini_world.nouns import HELD_OUT_VENDOR, TRAIN_VENDORS
from examples.mini_world.places import PLACES
from examples.mini_world.world import COLORS, SIDE, Scene, World

WIDTH, DEPTH, PATCH = 128, 6, 8
TEMPERATURE = 0.1
VENDORS_PER_NOUN = 4


SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SHAPE, projection_dim=WIDTH, hidden_act="gelu")


def build_clip_vision() -> CLIPVisionModelWithProjection:
    """Images (batch, 3, 64, 64) in -1..1 to `image_embeds` (batch, 128); 1.2 M parameters."""
    return CLIPVisionModelWithProjection(_vision_config())


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Images (batch, 3, 64, 64) in -1..1 and token ids (batch, 24) to embeddings of one space (batch, 128)."""
    text = text_config(tokenizer, WIDTH, layers=2, hidden=2 * WIDTH).to_dict()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_vision_config().to_dict(), projection_dim=WIDTH))


def build_vit() -> ViTModel:
    """Images (batch, 3, 64, 64) in -1..1 to `last_hidden_state` (batch, 65, 128), class token first."""
    return ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False)


def paired_loss(first: Tensor, second: Tensor) -> Tensor:
    """Symmetric InfoNCE: row i of both (count, width) shows one drawing, all other rows show others."""
    first, second = functional.normalize(first, dim=-1), functional.normalize(second, dim=-1)
    logits = first @ second.T / TEMPERATURE
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def paired_scenes(rng: np.random.Generator, world: World, count: int) -> tuple[list[Scene], list[Scene]]:
    """`count` drawings seen twice; several vendors of each noun, since those are the hard negatives."""
    first: list[Scene] = []
    while len(first) < count:
        noun = str(rng.choice(world.nouns))
        for vendor in rng.permutation(world.vendors[noun])[:VENDORS_PER_NOUN]:
            first.append(replace(world.scene(rng), noun=noun, vendor=str(vendor)))
    first = first[:count]
    second = [replace(world.scene(rng), noun=scene.noun, vendor=scene.vendor, colour=scene.colour) for scene in first]
    return first, second


class IdentityStage:
    """Trains a CLIP-like vision network on pairs of views."""

    name = "identity"
    ema_decay = 0.999

    def __init__(self, world: World, device: str, batch_size: int = 64, rate: float = 5e-4) -> None:
        self.world, self.device = world, device
        self.batch_size, self.learning_rate = batch_size, rate
        self.network: nn.Module = build_clip_vision().to(device)
        self.unseen = World(world.sprites, world.nouns, [HELD_OUT_VENDOR])

    def _views(self, scenes: list[Scene], world: World) -> Tensor:
        return as_tensor(np.stack([world.render(scene).image for scene in scenes]), self.device)

    def _embed(self, pictures: Tensor) -> Tensor:
        with half_precision(self.device):
            embedded: Tensor = self.network(pixel_values=pictures).image_embeds
        return embedded.float()

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        first, second = paired_scenes(rng, self.world, self.batch_size // 2)
        pictures = soften(rng, self._views(first + second, self.world))
        one, other = self._embed(pictures).chunk(2)
        return paired_loss(one, other), {}

    def report(self, directory: Path, samples: int) -> dict[str, float]:  # noqa: ARG002
        """How often a view finds its partner among 128: trained vendors, and one unseen drawing per noun."""
        figures = {}
        for key, world in (("trained", self.world), ("held_out", self.unseen)):
            first, second = paired_scenes(np.random.default_rng(3), world, 128)
            one = functional.normalize(self._embed(self._views(first, world)), dim=-1)
            other = functional.normalize(self._embed(self._views(second, world)), dim=-1)
            found = (one @ other.T).argmax(dim=-1).cpu().tolist()
            # The same drawing can come up twice; meeting its twin is no mistake.
            drawings = [(scene.noun, scene.vendor, scene.colour) for scene in first]
            hits = [drawings[at] == drawings[to] for at, to in enumerate(found)]
            figures[f"retrieval_{key}"] = float(np.mean(hits))
        return figures


class ClipStage:
    """Trains a CLIP on images and their captions."""

    name = "backbone-clip"
    ema_decay = 0.999

    def __init__(
        self, world: World, tokenizer: CLIPTokenizer, device: str, batch_size: int = 64, rate: float = 5e-4
    ) -> None:
        self.world, self.tokenizer, self.device = world, tokenizer, device
        self.batch_size, self.learning_rate = batch_size, rate
        self.network: nn.Module = build_clip(tokenizer).to(device)

    def _embed(self, pictures: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with half_precision(self.device):
            embedded = self.network(pixel_values=pictures, input_ids=tokens.to(self.device))
        return embedded.image_embeds.float(), embedded.text_embeds.float()

    def _batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        drawn = [self.world.draw(rng) for _ in range(count)]
        pictures = as_tensor(np.stack([picture.image for picture in drawn]), self.device)
        return pictures, [picture.scene.caption for picture in drawn]

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        pictures, captions = self._batch(rng, self.batch_size)
        return paired_loss(*self._embed(soften(rng, pictures), captions)), {}

    def report(self, directory: Path, samples: int) -> dict[str, float]:  # noqa: ARG002
        """How often an image finds its caption among 128."""
        pictures, captions = self._batch(np.random.default_rng(3), 128)
        images, texts = self._embed(pictures, captions)
        found = (images @ texts.T).argmax(dim=-1).cpu().tolist()
        return {"retrieval": float(np.mean([captions[at] == captions[to] for at, to in enumerate(found)]))}


class ViTStage:
    """Trains a ViT through linear heads that are thrown away: vendor, place and color by name, nouns by contrast."""

    name = "backbone-vit"
    ema_decay = 0.999

    def __init__(self, world: World, device: str, batch_size: int = 64, rate: float = 5e-4) -> None:
        self.world, self.device, self.batch_size, self.learning_rate = world, device, batch_size, rate
        self.labels: dict[str, list[str | None]] = {
            "vendor": list(TRAIN_VENDORS),
            "place": [None, *PLACES],
            "colour": [None, *COLORS],
        }
        widths = {key: len(names) for key, names in self.labels.items()} | {"noun": WIDTH}
        heads = nn.ModuleDict({key: nn.Linear(WIDTH, width) for key, width in widths.items()})
        self.network: nn.Module = nn.ModuleDict({"body": build_vit(), "heads": heads}).to(device)

    def _answers(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits per label, and under "noun" an embedding."""
        modules = dict(self.network.named_children())
        with half_precision(self.device):
            token = modules["body"](pixel_values=pictures).last_hidden_state[:, 0]
            return {key: head(token).float() for key, head in modules["heads"].named_children()}

    def _batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        first = [self.world.scene(rng) for _ in range(count // 2)]
        # The same noun by any vendor: what a class is, where the identity encoder learns what an instance is.
        scenes = first + [
            replace(self.world.scene(rng), noun=one.noun, vendor=str(rng.choice(self.world.vendors[one.noun])))
            for one in first
        ]
        pictures = as_tensor(np.stack([self.world.render(scene).image for scene in scenes]), self.device)
        targets = {
            key: torch.tensor([names.index(getattr(scene, key)) for scene in scenes], device=self.device)
            for key, names in self.labels.items()
        }
        return pictures, targets

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        pictures, targets = self._batch(rng, self.batch_size)
        answers = self._answers(soften(rng, pictures))
        named = [functional.cross_entropy(answers[key], targets[key]) for key in self.labels]
        return torch.stack(named).sum() + paired_loss(*answers["noun"].chunk(2)), {}

    def report(self, directory: Path, samples: int) -> dict[str, float]:  # noqa: ARG002
        """The share of right answers on 256 fixed images; of nouns, how often a view finds one of its noun's."""
        pictures, targets = self._batch(np.random.default_rng(3), 256)
        answers = self._answers(pictures)
        right = {key: (answers[key].argmax(-1) == targets[key]).float().mean().item() for key in self.labels}
        one, other = (functional.normalize(part, dim=-1) for part in answers["noun"].chunk(2))
        found = (one @ other.T).argmax(dim=-1) == torch.arange(len(one), device=one.device)
        return {f"right_{key}": value for key, value in right.items()} | {"retrieval_noun": found.float().mean().item()}
