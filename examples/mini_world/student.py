"""Stages `pairs` and `student`: the one-step student, distilled from the teacher as SD-Turbo was from SD 2.1.

First a regression onto (noise, guided multi-step sample) pairs, which keeps the teacher's diversity; then the tool's
own losses without a concept: alignment to the teacher's guided x0 of the renoised picture, weighted by ᾱ_t, and an
adversarial loss on the frozen teacher's features of it (Sauer et al. 2024), with real latents as reals.

The student predicts v, as its teacher does: at t = 999 that is the picture itself up to sign, while ε there would have
to repeat the input noise to one part in a hundred, which a network that ends in a group norm over 256 positions cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from echodistill_cli import losses
from echodistill_cli.conditioning import Conditioning
from echodistill_cli.diffusion import NoiseSchedule, add_noise
from echodistill_cli.discriminators import Discriminator, Pictures, TeacherBackbone
from echodistill_cli.pair import Denoiser
from echodistill_cli.sampling import sample_latents, student_x0, teacher_x0
from examples.mini_world.latents import load_vae, open_latents
from examples.mini_world.models import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    build_scheduler,
    build_text_encoder,
    build_unet,
    decode,
)
from examples.mini_world.nouns import chosen_nouns, noun_words
from examples.mini_world.runner import load_average
from examples.mini_world.teacher import REPORT_PLACES, quick_attention
from examples.mini_world.tokenizer import open_tokenizer
from examples.mini_world.world import contact_sheet

GUIDANCE = 3.5
PAIR_STEPS = 10
PAIR_SHARD = 2048
_CHUNK = 64
ALIGNMENT_WEIGHT, ADVERSARIAL_WEIGHT, PAIR_WEIGHT = 1.0, 0.1, 0.5


class FrozenTeacher:
    """The trained teacher with averaged weights: text in, latents out."""

    def __init__(self, work: Path, device: str) -> None:
        self.tokenizer, self.device = open_tokenizer(work), device
        self.text_encoder, self.unet = build_text_encoder(self.tokenizer), build_unet()
        network = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.samples = load_average(work / "teacher" / "checkpoint.pt", network)
        network.to(device).eval().requires_grad_(False)
        self.schedule = NoiseSchedule(build_scheduler().alphas_cumprod.float(), "v_prediction")
        self.denoiser = Denoiser(self.unet, self.schedule)
        self.null = self.encode(self.tokens([""]))

    def tokens(self, captions: list[str]) -> Tensor:
        """Token ids (batch, 24)."""
        ids: Tensor = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Conditioning:
        """What the UNets are conditioned on."""
        return Conditioning(self.text_encoder(input_ids=ids.to(self.device)).last_hidden_state.float())


@dataclass(frozen=True)
class PairSet:
    """Unit noise and the teacher's sample from it (count, 4, 16, 16) float16, with token ids (count, 24)."""

    noise: Tensor
    latents: Tensor
    token_ids: Tensor


def add_pairs(work: Path, nouns: int, device: str, shards: int) -> None:
    """Add shards of pairs for captions of the latent cache; each shard has a seed of its own number."""
    teacher = FrozenTeacher(work, device)
    captions = open_latents(work, nouns, False, teacher.tokenizer).token_ids
    directory = work / f"pairs-{nouns}"
    directory.mkdir(parents=True, exist_ok=True)
    first = len(list(directory.glob("pairs-*.npz")))
    for number in range(first, first + shards):
        generator = torch.Generator().manual_seed(7000 + number)
        ids = captions[torch.randint(len(captions), (PAIR_SHARD,), generator=generator)]
        noise = torch.randn(PAIR_SHARD, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=generator)
        drawn = [_draw(teacher, noise[i : i + _CHUNK], ids[i : i + _CHUNK]) for i in range(0, PAIR_SHARD, _CHUNK)]
        partial = directory / "partial.npz"
        np.savez(partial, noise=noise.half().numpy(), latents=torch.cat(drawn).half().numpy(), ids=ids.numpy())
        partial.rename(directory / f"pairs-{number:03d}.npz")
        print(f"pairs shard {number}: {PAIR_SHARD} samples", flush=True)


def _draw(teacher: FrozenTeacher, noise: Tensor, ids: Tensor) -> Tensor:
    with torch.autocast(teacher.device, torch.bfloat16):
        latents = sample_latents(
            teacher.denoiser,
            noise.to(teacher.device),
            teacher.encode(ids),
            teacher.null,
            steps=PAIR_STEPS,
            guidance_scale=GUIDANCE,
        )
    return latents.float().cpu()


def open_pairs(work: Path, nouns: int) -> PairSet:
    """All shards of pairs."""
    paths = sorted((work / f"pairs-{nouns}").glob("pairs-*.npz"))
    if not paths:
        raise FileNotFoundError(f"no pairs for {nouns} nouns in {work}: run the pairs stage first")
    parts: dict[str, list[Tensor]] = {"noise": [], "latents": [], "ids": []}
    for path in paths:
        with np.load(path) as shard:
            for name, part in parts.items():
                part.append(torch.from_numpy(shard[name]))
    return PairSet(torch.cat(parts["noise"]), torch.cat(parts["latents"]), torch.cat(parts["ids"]))


class StudentStage:
    """Trains the student UNet and the discriminator's heads; starts from the teacher's weights."""

    name = "student"
    ema_decay = 0.999

    def __init__(
        self,
        work: Path,
        nouns: int,
        device: str,
        batch_size: int = 24,
        rate: float = 3e-4,
        regression_samples: int = 70_000,
    ) -> None:
        self.work, self.nouns, self.device = work, nouns, device
        self.batch_size, self.learning_rate = batch_size, rate
        self.regression_samples = regression_samples
        self.teacher = FrozenTeacher(work, device)
        self.student = build_unet()
        self.student.load_state_dict(self.teacher.unet.state_dict())
        self.denoiser = Denoiser(self.student, self.teacher.schedule)
        self.critic = Discriminator("teacher", TeacherBackbone(self.teacher.denoiser), 256)
        self.network: nn.Module = nn.ModuleDict({"unet": self.student, "heads": self.critic.heads}).to(device)
        self.scenes = open_latents(work, nouns, False, self.teacher.tokenizer)
        self.pairs = open_pairs(work, nouns)

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(self.device, torch.bfloat16), quick_attention(self.device):
            pairs = self._pair_loss(rng)
            if samples < self.regression_samples:
                return pairs, {"pairs": float(pairs.detach())}
            total, figures = self._distillation_loss(rng)
        return total + PAIR_WEIGHT * pairs, {**figures, "pairs": float(pairs.detach())}

    def _pair_loss(self, rng: np.random.Generator) -> Tensor:
        """Distance of one step from a pair's noise to the teacher's many steps from it."""
        rows = torch.from_numpy(rng.integers(0, len(self.pairs.noise), self.batch_size))
        noise, target = (part[rows].float().to(self.device) for part in (self.pairs.noise, self.pairs.latents))
        drawn = student_x0(self.denoiser, noise, self.teacher.encode(self.pairs.token_ids[rows]))
        return (drawn - target).square().mean()

    def _distillation_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """The generator's and the discriminator's losses; each one's gradient stops at the other's weights."""
        rows = torch.from_numpy(rng.integers(0, len(self.scenes), self.batch_size))
        reals = self.scenes.latents[rows].float().to(self.device)
        conditioning = self.teacher.encode(self.scenes.token_ids[rows])
        drawn = student_x0(self.denoiser, torch.randn_like(reals), conditioning)
        noise = torch.randn_like(reals)
        timesteps = torch.from_numpy(rng.integers(0, 1000, self.batch_size)).to(self.device)
        with torch.no_grad():
            noisy = add_noise(self.teacher.schedule, drawn, noise, timesteps)
            target = teacher_x0(self.teacher.denoiser, noisy, timesteps, conditioning, self.teacher.null, GUIDANCE)
        signal = self.teacher.schedule.signal(timesteps)
        alignment = (losses.latent_alignment(drawn, target) * signal).mean()
        fake, real = (_pictures(x, noise, timesteps, conditioning) for x in (drawn, reals))
        fake_features = self.critic.backbone.see(fake)
        self.critic.heads.requires_grad_(False)
        adversarial = losses.adversarial_generator(self.critic.logits(fake_features)).mean()
        self.critic.heads.requires_grad_(True)
        judged = losses.adversarial_discriminator(
            self.critic.logits([tap.detach() for tap in self.critic.backbone.see(real)]),
            self.critic.logits([tap.detach() for tap in fake_features]),
            torch.ones(self.batch_size, device=self.device),
        )
        figures = {"alignment": alignment, "adversarial": adversarial, "discriminator": judged}
        total = ALIGNMENT_WEIGHT * alignment + ADVERSARIAL_WEIGHT * adversarial + judged
        return total, {name: float(value.detach()) for name, value in figures.items()}

    def report(self, directory: Path, samples: int) -> dict[str, float]:
        """The teacher's sheet drawn in one step; and how far apart four seeds of a prompt are, in latents."""
        nouns = chosen_nouns(self.nouns)[:12]
        captions = [f"a photo of a {noun_words(noun)} {place}" for noun in nouns for place in REPORT_PLACES]
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(len(captions), LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=generator)
        conditioning = self.teacher.encode(self.teacher.tokens(captions))
        drawn = student_x0(self.denoiser, noise.to(self.device), conditioning)
        vae = load_vae(self.work)
        images = decode(vae, drawn.float().cpu() / float(vae.config["scaling_factor"])).clamp(-1, 1)
        pictures = images.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        sheet = contact_sheet(list(pictures), 2 * len(REPORT_PLACES), zoom=2)
        sheet.save(directory / f"sheet-{samples:07d}.png")
        return {"seed_distance": self._seed_distance(captions[2])}

    def _seed_distance(self, caption: str) -> float:
        noise = torch.randn(4, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(6))
        conditioning = self.teacher.encode(self.teacher.tokens([caption])).expand(4)
        drawn = student_x0(self.denoiser, noise.to(self.device), conditioning).flatten(1).float()
        return float(torch.pdist(drawn).mean())


def _pictures(latents: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Pictures:
    return Pictures(latents, _no_image, noise, timesteps, conditioning)


def _no_image() -> Tensor:
    raise AssertionError("the latent discriminator asks for no picture")
