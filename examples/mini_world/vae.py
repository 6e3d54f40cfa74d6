"""Stage `vae`: the autoencoder, trained on every noun of the training vendors so that it is general."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.mini_world.models import as_tensor, build_vae, decode, encode, half_precision
from examples.mini_world.nouns import HELD_OUT_VENDOR
from examples.mini_world.world import World, contact_sheet


def reconstruction_loss(drawn: Tensor, target: Tensor) -> Tensor:
    """L1 of the values plus L1 of their differences along both axes, which is what keeps outlines crisp."""
    across = (drawn.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    down = (drawn.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    return (drawn - target).abs().mean() + across + down


def psnr(drawn: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1, over the whole batch."""
    error = (drawn.clamp(-1, 1) - target).square().mean().item()
    return 10 * math.log10(4 / error)


class VaeStage:
    """L1 + gradient L1, a light pull of the latents to zero mean and unit variance, a little latent noise."""

    name = "vae"
    ema_decay = 0.999
    latent_noise = 0.05

    def __init__(self, world: World, device: str, batch_size: int = 16, rate: float = 1.5e-3, compiled: bool = False):
        self.world, self.device, self.batch_size, self.learning_rate = world, device, batch_size, rate
        self.network = build_vae().to(device)
        self._step: Any = torch.compile(self._compute) if compiled else self._compute
        rng = np.random.default_rng(7)
        unseen = World(world.sprites, world.nouns, [HELD_OUT_VENDOR])
        self.pictures = np.concatenate([world.batch(rng, 64), unseen.batch(rng, 32)])

    def _compute(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        with half_precision(self.device):
            latents = encode(self.network, pictures)
            drawn = decode(self.network, latents + self.latent_noise * torch.randn_like(latents))
        return drawn.float(), latents.float()

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:  # noqa: ARG002
        pictures = as_tensor(self.world.batch(rng, self.batch_size), self.device)
        drawn, latents = self._step(pictures)
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        pull = mean.square().mean() + (deviation - 1).square().mean()
        return reconstruction_loss(drawn, pictures) + 0.05 * pull, {"psnr": psnr(drawn.detach(), pictures)}

    def report(self, directory: Path, samples: int) -> dict[str, float]:
        """PSNR on fixed images of trained and of held-out drawings, the latents' spread, and a sheet."""
        pictures = as_tensor(self.pictures, self.device)
        latents = encode(self.network, pictures)
        drawn = decode(self.network, latents).clamp(-1, 1)
        rows = torch.cat([pictures[:12], drawn[:12], pictures[-12:], drawn[-12:]]).add(1).mul(127.5).round()
        sheet = contact_sheet(list(rows.byte().permute(0, 2, 3, 1).cpu().numpy()), 12, zoom=2)
        sheet.save(directory / f"sheet-{samples:07d}.png")
        return {
            "psnr_trained": psnr(drawn[:64], pictures[:64]),
            "psnr_held_out": psnr(drawn[64:], pictures[64:]),
            "latent_mean": latents.mean().item(),
            "latent_std": latents.std().item(),
        }
