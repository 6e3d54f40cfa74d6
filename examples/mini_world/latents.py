"""Stage `latents`: a cache of encoded images and captions, so that the teacher never waits for the VAE.

Shards are numbered and independent: running the stage again adds more. They are only valid for the VAE they
were made with, so that VAE must not change once they exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from examples.mini_world.models import as_tensor, build_vae, encode, half_precision
from examples.mini_world.runner import load_average
from examples.mini_world.world import World

SHARD_SIZE = 8192
_CHUNK = 64


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents (count, 4, 16, 16) float16, and their captions' token ids (count, 24)."""

    latents: Tensor
    token_ids: Tensor

    def __len__(self) -> int:
        return len(self.latents)


def load_vae(work: Path) -> AutoencoderTiny:
    """The trained VAE with averaged weights, frozen; its scaling factor makes latents unit variance."""
    path = work / "vae" / "checkpoint.pt"
    scale_path = work / "vae" / "scaling_factor.txt"
    vae = build_vae(float(scale_path.read_text()) if scale_path.exists() else 1.0)
    load_average(path, vae)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def measure_scaling_factor(work: Path, world: World, count: int = 2048) -> float:
    """One over the latents' root mean square over `count` images; kept beside the VAE's checkpoint."""
    path = work / "vae" / "scaling_factor.txt"
    if not path.exists():
        vae, rng = load_vae(work), np.random.default_rng(1)
        latents = torch.cat([encode(vae, as_tensor(world.batch(rng, _CHUNK))) for _ in range(count // _CHUNK)])
        path.write_text(f"{1 / latents.square().mean().sqrt().item():.4f}\n")
    return float(path.read_text())


@torch.no_grad()
def encode_shard(vae: AutoencoderTiny, world: World, seed: int, centred: bool) -> dict[str, NDArray[np.generic]]:
    """`SHARD_SIZE` random images as scaled latents, with captions."""
    rng = np.random.default_rng(seed)
    parts: list[NDArray[np.float16]] = []
    captions: list[str] = []
    for _ in range(SHARD_SIZE // _CHUNK):
        pictures = [world.draw(rng, centred=centred) for _ in range(_CHUNK)]
        with half_precision("cpu"):
            raw = encode(vae, as_tensor(np.stack([picture.image for picture in pictures])))
        parts.append((raw.float() * float(vae.config["scaling_factor"])).half().numpy())
        captions.extend(picture.scene.caption for picture in pictures)
    return {"latents": np.concatenate(parts), "captions": np.array(captions)}


def add_shards(work: Path, world: World, nouns: int, count: int, centred: bool) -> None:
    """Add `count` shards for the first `nouns` nouns; each has a seed of its own number."""
    directory = work / f"latents-{nouns}"
    directory.mkdir(parents=True, exist_ok=True)
    measure_scaling_factor(work, world)
    vae = load_vae(work)
    kind = "centred" if centred else "scenes"
    first = len(list(directory.glob(f"{kind}-*.npz")))
    for number in range(first, first + count):
        shard = encode_shard(vae, world, seed=100_000 * centred + 1000 + number, centred=centred)
        partial = directory / f"partial-{kind}.npz"
        np.savez(partial, **shard)  # type: ignore[arg-type]
        partial.rename(directory / f"{kind}-{number:03d}.npz")
        print(f"{kind} shard {number}: {SHARD_SIZE} pictures", flush=True)


def open_latents(work: Path, nouns: int, centred: bool, tokenizer: CLIPTokenizer) -> LatentSet:
    """All shards of one kind, with their captions tokenized."""
    paths = sorted((work / f"latents-{nouns}").glob(f"{'centred' if centred else 'scenes'}-*.npz"))
    if not paths:
        raise FileNotFoundError(f"no latents for {nouns} nouns in {work}: run the latents stage first")
    latents: list[Tensor] = []
    captions: list[str] = []
    for path in paths:
        with np.load(path) as shard:
            latents.append(torch.from_numpy(shard["latents"]))
            captions.extend(shard["captions"].tolist())
    known = {text: index for index, text in enumerate(dict.fromkeys(captions))}
    ids = tokenizer(list(known), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return LatentSet(torch.cat(latents), ids[torch.tensor([known[text] for text in captions])])
