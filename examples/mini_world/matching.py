"""Stage `matched`: the student's distribution matched to the guided teacher's (DMD2, Yin et al. 2024).

Regression onto one sample per noise, as `student` trains, ends where samples of neighboring noises mix: two poses in
one image, a head between two heads. Here a second score network, `fake`, learns the student's own images, and the
student moves where the guided teacher finds its image likelier than `fake` does. That gradient points to the nearest
image of the teacher, not to the mean of several. The regression stays with a small weight, so that no seed collapses
into another. The critic compares the student's image with a render of the world of the same caption: the teacher's own
samples are softer than its photos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.diffusion.sampling import student_x0, teacher_x0
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.diffusion.text import Conditioning
from examples.mini_world.latents import open_latents
from examples.mini_world.models import build_unet, half_precision
from examples.mini_world.student import GUIDANCE, StudentStage
from examples.mini_world.teacher import quick_attention

# The share of the schedule in which scores are compared: its ends are all noise or none.
FIRST_TIMESTEP, LAST_TIMESTEP = 20, 980
# Updates of the fake score for one of the student, its learning rate and its head start.
FAKE_UPDATES, FAKE_RATE, FAKE_HEAD_START = 2, 3e-4, 200
PAIR_WEIGHT = 0.25


class MatchedStage(StudentStage):
    """Trains a student further, against the score of its own images; starts from an exported student."""

    name = "matched"

    def __init__(
        self,
        work: Path,
        nouns: int,
        device: str,
        batch_size: int = 16,
        rate: float = 1e-4,
        start: Path | None = None,
        guidance: float = GUIDANCE,
    ) -> None:
        super().__init__(work, nouns, device, batch_size, rate, regression_samples=0, start=start)
        self.guidance = guidance
        self.renders, self.rows_of_pair = self._renders()
        self.fake = build_unet()
        self.fake.load_state_dict(self.teacher.unet.state_dict())
        self.fake_denoiser = Denoiser(self.fake, self.teacher.schedule)
        self.network = nn.ModuleDict({"unet": self.student, "critic": self.critic, "fake": self.fake}).to(device)
        self.network.register_buffer("critic_updates", self.critic_updates)
        self.fake_optimizer = torch.optim.AdamW(self.fake.parameters(), lr=FAKE_RATE, betas=(0.5, 0.99), fused=True)
        self.more_optimizers = {"critic": self.critic_optimizer, "fake": self.fake_optimizer}
        self.fake_updates = torch.zeros((), dtype=torch.long, device=device)
        self.network.register_buffer("fake_updates", self.fake_updates)

    def loss(self, rng: np.random.Generator, samples: int) -> tuple[Tensor, dict[str, float]]:
        del samples  # nothing changes with them
        head_start = FAKE_HEAD_START if int(self.fake_updates) == 0 else 0
        for _ in range(head_start):
            self._teach_fake(*self._fresh(rng))
        fakes = [self._teach_fake(*self._fresh(rng)) for _ in range(FAKE_UPDATES - 1)]
        noise, target, conditioning, real = self._rows(rng)
        with half_precision(self.device), quick_attention(self.device):
            drawn = student_x0(self.denoiser, noise, conditioning)
        drawn = drawn.float()
        fakes.append(self._teach_fake(drawn.detach(), conditioning))
        regression = (drawn - target).square().mean()
        matching, distance = self._matching(rng, drawn, conditioning)
        adversarial, judged = self._adversarial(real, drawn, matching)
        figures = {"pairs": float(regression.detach()), "matching": distance, "fake": float(np.mean(fakes)), **judged}
        return matching + PAIR_WEIGHT * regression + adversarial, figures

    def _renders(self) -> tuple[Tensor, list[NDArray[np.int64]]]:
        """Latents of the world's renders, and for each pair which of them have its caption."""
        scenes = open_latents(self.work, self.nouns, False, self.teacher.tokenizer)
        both = torch.cat([scenes.token_ids, self.pairs.token_ids])
        _, numbers = torch.unique(both, dim=0, return_inverse=True)
        order = numbers[: len(scenes)].argsort(stable=True)
        counts = torch.bincount(numbers[: len(scenes)], minlength=int(numbers.max()) + 1)
        groups = np.split(order.numpy(), counts.cumsum(0).numpy()[:-1])
        return scenes.latents, [groups[number] for number in numbers[len(scenes) :].tolist()]

    def _rows(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
        """A batch of noise, the teacher's samples from it, what they show, and renders of the same."""
        rows = rng.integers(0, len(self.pairs.noise), self.batch_size)
        noise, target = (part[rows].float().to(self.device) for part in (self.pairs.noise, self.pairs.latents))
        renders = self.renders[[rng.choice(self.rows_of_pair[row]) for row in rows]].float().to(self.device)
        return noise, target, self.teacher.encode(self.pairs.token_ids[rows]), renders

    @torch.no_grad()
    def _fresh(self, rng: np.random.Generator) -> tuple[Tensor, Conditioning]:
        """The student's images of a batch, without a gradient."""
        noise, _, conditioning, _ = self._rows(rng)
        with half_precision(self.device):
            return student_x0(self.denoiser, noise, conditioning).float(), conditioning

    def _timesteps(self, rng: np.random.Generator) -> Tensor:
        """One timestep out of each of `batch` equal slices, shuffled."""
        slices = (np.arange(self.batch_size) + rng.random(self.batch_size)) / self.batch_size
        drawn = FIRST_TIMESTEP + rng.permutation(slices) * (LAST_TIMESTEP - FIRST_TIMESTEP)
        return torch.from_numpy(drawn.astype(np.int64)).to(self.device)

    def _teach_fake(self, images: Tensor, conditioning: Conditioning) -> float:
        """One update of the fake score on images of the student; returns its mean squared error of v."""
        timesteps = torch.randint(0, 1000, (len(images),), device=self.device)
        noise = torch.randn_like(images)
        noisy = add_noise(self.teacher.schedule, images, noise, timesteps)
        alpha_bar = self.teacher.schedule.alpha_bar(timesteps).view(-1, 1, 1, 1)
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images
        with half_precision(self.device), quick_attention(self.device):
            predicted = self.fake_denoiser(noisy, timesteps, conditioning)
        loss = (predicted.float() - velocity).square().mean()
        self.fake_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.fake_optimizer.step()
        self.fake_optimizer.zero_grad(set_to_none=True)
        self.fake_updates += 1
        return float(loss.detach())

    def _matching(self, rng: np.random.Generator, drawn: Tensor, conditioning: Conditioning) -> tuple[Tensor, float]:
        """A loss whose gradient on the images is the fake score less the guided teacher's (DMD2, equation 2)."""
        timesteps = self._timesteps(rng)
        with torch.no_grad(), half_precision(self.device):
            noisy = add_noise(self.teacher.schedule, drawn, torch.randn_like(drawn), timesteps)
            real = teacher_x0(
                self.teacher.denoiser, noisy, timesteps, conditioning, self.teacher.null, self.guidance
            ).float()
            fake = teacher_x0(self.fake_denoiser, noisy, timesteps, conditioning, self.teacher.null, 1.0).float()
        away = (drawn.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
        gradient = (fake - real) / away
        # The gradient of this product on `drawn` is `gradient` over the number of values.
        return (drawn * gradient).mean(), float(gradient.abs().mean())
