"""Stage `teacher`: UNet and text encoder together, v-prediction with min-SNR weights, on cached latents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.diffusion.sampling import sample_latents
from echodistill_cli.diffusion.schedule import NoiseSchedule
from echodistill_cli.diffusion.text import Conditioning
from examples.mini_world.latents import load_vae, open_latents
from examples.mini_world.models import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    build_scheduler,
    build_text_encoder,
    build_unet,
    decode,
    half_precision,
)
from examples.mini_world.nouns import chosen_nouns, noun_words
from examples.mini_world.tokenizer import open_tokenizer
from examples.mini_world.world import contact_sheet

MIN_SNR_GAMMA = 5.0
EMPTY_CAPTION_SHARE = 0.1
CURRICULUM_SAMPLES = 120_000
REPORT_STEPS, REPORT_GUIDANCE = 15, 3.0
REPORT_PLACES = ("on a white background", "in the jungle", "on the beach", "on a wooden floor")


def velocity_weight(alpha_bar: Tensor) -> Tensor:
    """Min-SNR-gamma for v-prediction: min(SNR, gamma) / (SNR + 1) (Hang et al. 2023, section 3.4)."""
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)


def quick_attention(device: str) -> AbstractContextManager[None]:
    """On a CPU the fused attention's backward takes a third of a step at these sizes; plain products less."""
    return sdpa_kernel([SDPBackend.MATH]) if device == "cpu" else nullcontext()


def centred_share(samples: int) -> float:
    """The share of large centered subjects in a batch: 0.8 at first, falling to 0.1."""
    return max(0.1, 0.8 - 0.7 * samples / CURRICULUM_SAMPLES)


class TeacherStage:
    """Trains the pair (unet, text_encoder); images come from the latent cache in random order."""

    name = "teacher"
    ema_decay = 0.9995

    def __init__(self, work: Path, nouns: int, device: str, batch_size: int = 24, rate: float = 9e-4,
                 compiled: bool = False) -> None:  # fmt: skip
        self.work, self.nouns, self.device = work, nouns, device
        self.batch_size, self.learning_rate = batch_size, rate
        self.tokenizer, self.scheduler = open_tokenizer(work), build_scheduler()
        self.text_encoder, self.unet = build_text_encoder(self.tokenizer), build_unet()
        self.network: nn.Module = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder}).to(device)
        self.scenes = open_latents(work, nouns, False, self.tokenizer)
        self.centred = open_latents(work, nouns, True, self.tokenizer)
        self.empty_ids = self._tokens([""])[0]
        self.alphas = self.scheduler.alphas_cumprod.to(device)
        self._compute: Any = torch.compile(self._velocity_error) if compiled else self._velocity_error

    def _tokens(self, captions: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        ids: Tensor = encoded.input_ids
        return ids

    def _encode(self, ids: Tensor) -> Conditioning:
        return Conditioning(self.text_encoder(input_ids=ids.to(self.device)).last_hidden_state.float())

    def _batch(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, Tensor]:
        """Latents (batch, 4, 16, 16) float32 and token ids (batch, 24); some captions are emptied."""
        count = int(rng.binomial(self.batch_size, centred_share(samples)))
        picked = [(self.centred, count), (self.scenes, self.batch_size - count)]
        latents, ids = [], []
        for pool, amount in picked:
            index = torch.from_numpy(rng.integers(0, len(pool), amount))
            latents.append(pool.latents[index].float())
            ids.append(pool.token_ids[index])
        token_ids = torch.cat(ids)
        token_ids[torch.from_numpy(rng.random(self.batch_size) < EMPTY_CAPTION_SHARE)] = self.empty_ids
        return torch.cat(latents).to(self.device), token_ids.to(self.device)

    def _velocity_error(self, clean: Tensor, ids: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of the predicted velocity, per sample."""
        alpha_bar = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        with half_precision(self.device), quick_attention(self.device):
            states = self.text_encoder(input_ids=ids).last_hidden_state
            predicted = self.unet(noisy, timesteps, states).sample
        error: Tensor = (predicted.float() - velocity).square().mean(dim=(1, 2, 3))
        return error

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:
        clean, ids = self._batch(rng, samples)
        noise = torch.randn(clean.shape, device=self.device)
        # One timestep out of each of `batch` equal slices: the loss of a small batch is far less noisy.
        slices = (np.arange(self.batch_size) + rng.random(self.batch_size)) / self.batch_size
        timesteps = torch.from_numpy((rng.permutation(slices) * 1000).astype(np.int64)).to(self.device)
        errors = self._compute(clean, ids, noise, timesteps)
        return (velocity_weight(self.alphas[timesteps]) * errors).mean(), {"v_error": errors.mean().item()}

    def report(self, directory: Path, samples: int) -> dict[str, float]:
        """A sheet of guided samples with fixed noise: two nouns a row, the same places throughout."""
        nouns = chosen_nouns(self.nouns)[:12]
        captions = [f"a photo of a {noun_words(noun)} {place}" for noun in nouns for place in REPORT_PLACES]
        noise = torch.randn(
            len(captions),
            LATENT_CHANNELS,
            LATENT_SIDE,
            LATENT_SIDE,
            generator=torch.Generator().manual_seed(5),
        )
        denoiser = Denoiser(self.unet, NoiseSchedule(self.alphas.float(), "v_prediction"))
        with torch.no_grad(), half_precision(self.device):
            prompts, null = self._encode(self._tokens(captions)), self._encode(self.empty_ids[None])
            latents = sample_latents(
                denoiser, noise.to(self.device), prompts, null, steps=REPORT_STEPS, guidance_scale=REPORT_GUIDANCE
            )
        vae = load_vae(self.work)
        drawn = decode(vae, latents.cpu() / float(vae.config["scaling_factor"])).clamp(-1, 1)
        pictures = drawn.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        contact_sheet(list(pictures), 2 * len(REPORT_PLACES), zoom=2).save(directory / f"sheet-{samples:07d}.png")
        return {}
