"""Stages `pairs` and `student`: the one-step student, distilled from the teacher as SD-Turbo was from SD 2.1.

First a regression onto (noise, guided multi-step sample) pairs, which keeps the teacher's diversity. Regression alone
ends soft, since detail has little power. Then also alignment to the teacher's guided x0 of the image, renoised with the
noise it was drawn from and weighted by ᾱ_t, and a critic on latents. The critic learns from pairs (a relativistic
loss): for one noise and caption the teacher's sample should look more real than the student's, patch by patch.

The student predicts v, as its teacher does: at t = 999 that is the image itself up to sign, while ε there would have
to repeat the input noise to one part in a hundred, which a network that ends in a group norm over 256 positions cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.diffusion.sampling import sample_latents, student_x0, teacher_x0
from echodistill_cli.diffusion.schedule import NoiseSchedule, add_noise
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.training import losses
from echodistill_cli.training.critics import PairedCritic
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
from examples.mini_world.runner import load_average
from examples.mini_world.teacher import REPORT_PLACES, quick_attention
from examples.mini_world.tokenizer import open_tokenizer
from examples.mini_world.world import contact_sheet

GUIDANCE = 3.5
PAIR_STEPS = 10
PAIR_SHARD = 2048
_CHUNK = 64
ALIGNMENT_WEIGHT, PAIR_WEIGHT = 1.0, 1.0
# The adversarial gradient on the image, as a share of the regression's; a critic that knows nothing yet has small
# gradients, and must not be amplified for it.
ADVERSARIAL_SHARE, LARGEST_WEIGHT = 0.5, 1.0
ALIGNED_PART = 4
INSTANCE_NOISE = 0.1
# The critic learns by itself first, and faster than the student: otherwise it never gets ahead.
CRITIC_RATE, CRITIC_HEAD_START, CRITIC_SEED = 1e-3, 150, 0


def relativistic(better: Tensor, worse: Tensor) -> Tensor:
    """Mean softplus of how far `better` lies below `worse`, patch by patch (Jolicoeur-Martineau 2018)."""
    return functional.softplus(worse - better).mean()


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
    with half_precision(teacher.device):
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
    """Trains the student UNet and its critic; starts from the teacher's weights, or from an earlier student's."""

    name = "student"
    ema_decay = 0.999

    def __init__(
        self,
        work: Path,
        nouns: int,
        device: str,
        batch_size: int = 24,
        rate: float = 3e-4,
        regression_samples: int = 93_000,
        start: Path | None = None,
    ) -> None:
        self.work, self.nouns, self.device = work, nouns, device
        self.batch_size, self.learning_rate = batch_size, rate
        self.regression_samples = regression_samples
        self.teacher = FrozenTeacher(work, device)
        self.student = build_unet()
        unet = UNet2DConditionModel.from_pretrained(start / "unet").float() if start else self.teacher.unet
        self.student.load_state_dict(unet.state_dict())
        self.denoiser = Denoiser(self.student, self.teacher.schedule)
        self.critic = PairedCritic(LATENT_CHANNELS, CRITIC_SEED)
        self.network: nn.Module = nn.ModuleDict({"unet": self.student, "critic": self.critic}).to(device)
        # A buffer, so that the head start goes on where a stopped run left it.
        self.critic_updates = torch.zeros((), dtype=torch.long, device=device)
        self.network.register_buffer("critic_updates", self.critic_updates)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=CRITIC_RATE, betas=(0.5, 0.99))
        self.more_optimizers = {"critic": self.critic_optimizer}
        self.pairs = open_pairs(work, nouns)

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:
        rows = torch.from_numpy(rng.integers(0, len(self.pairs.noise), self.batch_size))
        noise, target = (part[rows].float().to(self.device) for part in (self.pairs.noise, self.pairs.latents))
        with half_precision(self.device), quick_attention(self.device):
            conditioning = self.teacher.encode(self.pairs.token_ids[rows])
            drawn = student_x0(self.denoiser, noise, conditioning)
            regression = (drawn.float() - target).square().mean()
        figures = {"pairs": float(regression.detach())}
        if samples < self.regression_samples:
            return regression, figures
        timesteps = torch.from_numpy(rng.integers(0, 1000, self.batch_size)).to(self.device)
        alignment = self._alignment(drawn, noise, timesteps, conditioning)
        adversarial, judged = self._adversarial(target, drawn.float(), regression)
        figures |= {"alignment": float(alignment.detach()), **judged}
        return PAIR_WEIGHT * regression + ALIGNMENT_WEIGHT * alignment + adversarial, figures

    def _adversarial(self, target: Tensor, drawn: Tensor, regression: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The student's weighted adversarial loss, after an update of the critic; each one's gradient stops there."""
        noise = INSTANCE_NOISE * torch.randn_like(target)
        real, fake = target + noise, drawn + noise
        figures = {"critic": self._teach_critic(real, fake.detach())}
        if int(self.critic_updates) <= CRITIC_HEAD_START:
            return torch.zeros((), device=drawn.device), figures
        self.critic.requires_grad_(False)
        loss = relativistic(self.critic(fake), self.critic(real))
        self.critic.requires_grad_(True)
        pulls = [torch.autograd.grad(one, drawn, retain_graph=True)[0].norm() for one in (regression, loss)]
        weight = min(LARGEST_WEIGHT, ADVERSARIAL_SHARE * float(pulls[0] / pulls[1].clamp(min=1e-8)))
        return weight * loss, figures | {"adversarial": float(loss.detach()), "weight": weight}

    def _teach_critic(self, real: Tensor, fake: Tensor) -> float:
        """One update of the critic, which has an optimizer of its own; returns its loss."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss = relativistic(self.critic(real), self.critic(fake))
        loss.backward()
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        self.critic_updates += 1
        return float(loss.detach())

    def _alignment(self, drawn: Tensor, noise: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Distance to the teacher's guided x0 of the image, renoised with its own noise; for a part of the batch."""
        few = slice(0, max(1, self.batch_size // ALIGNED_PART))
        asked = Conditioning(conditioning.hidden[few])
        with torch.no_grad(), half_precision(self.device):
            noisy = add_noise(self.teacher.schedule, drawn[few].float(), noise[few], timesteps[few])
            target = teacher_x0(self.teacher.denoiser, noisy, timesteps[few], asked, self.teacher.null, GUIDANCE)
        return (losses.latent_alignment(drawn[few], target) * self.teacher.schedule.alpha_bar(timesteps[few])).mean()

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
