"""What a run holds of its two models: a UNet and a schedule for each role, the shared text side, the shared latents.

Teacher and student are two UNets over the same latents and the same text encoder(s); those come from the student, since
it is the student's files that the result is used with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from echodistill_cli.diffusion.schedule import NoiseSchedule, pure_noise
from echodistill_cli.diffusion.text import Conditioning, PromptEncoder
from echodistill_cli.errors import ModelError

Family = Literal["sd", "sdxl"]
Role = Literal["student", "teacher"]
_LEVELS = {True: "block_out_channels", False: "encoder_block_out_channels"}


@dataclass
class Denoiser:
    """A UNet with the schedule it was trained on; called with float32, it answers in float32.

    Its last layer runs in float32 whatever the precision of the rest: a one-step model divides that layer's rounding
    error by √ᾱ_999 = 0.068.

    Args:
        time_ids: SDXL's (original height, width, crop top, left, target height, width) in pixels; None for SD.
        prepare: called before each use, where the two roles cannot be at work at once.
    """

    unet: Any
    schedule: NoiseSchedule
    time_ids: tuple[int, ...] | None = None
    prepare: Callable[[], None] = lambda: None

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The output (ε or v), float32 [B, C, H, W], at z_t of shape [B, C, H, W] and integer timesteps [B]."""
        self.prepare()
        output = self.unet(
            noisy.to(self.unet.conv_in.weight.dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=conditioning.added(self.time_ids),
            return_dict=False,
        )[0]
        return torch.as_tensor(output).float()

    def at_crops(self, conditioning: Conditioning, crops: Sequence[tuple[int, int]]) -> Conditioning:
        """The conditioning of samples cut out of photos at (top, left) [B]; for SD, which does not ask, as it is.

        Podell et al. 2023 (arXiv 2307.01952), section 2.2: told where a picture was cropped, the model does not learn
        to cut subjects off.
        """
        if self.time_ids is None:
            return conditioning
        rows = [(*self.time_ids[:2], *crop, *self.time_ids[4:]) for crop in crops]
        return replace(conditioning, time_ids=torch.tensor(rows, device=conditioning.hidden.device))

    def pure_noise(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The most noisy input for unit noise [B, C, H, W], and its timesteps [B]."""
        timesteps = torch.full((len(noise),), self.schedule.last_timestep, device=noise.device)
        return pure_noise(self.schedule, noise), timesteps


@dataclass
class LatentCodec:
    """Pictures ↔ the latents that the UNets work on (the VAE's, scaled).

    Args:
        encoder: the VAE. decoder: the same, or an AutoencoderTiny for the same latent space.
    """

    encoder: Any
    decoder: Any

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        # Both VAE classes halve the picture between two levels.
        return int(2 ** (len(self.encoder.config[_LEVELS[_is_kl(self.encoder)]]) - 1))

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.encoder.config.latent_channels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents, float32 [B, C, H/f, W/f], of pictures [B, 3, H, W] in [-1, 1]; the mean of a VAE with a spread."""
        encoded = self.encoder.encode(images.to(self.encoder.dtype))
        latents = encoded.latent_dist.mode() if _is_kl(self.encoder) else encoded.latents
        return torch.as_tensor(latents).float() * float(self.encoder.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 [B, 3, H, W], about [-1, 1] (not clamped), with gradient."""
        scaled = latents / float(self.decoder.config.scaling_factor)
        return torch.as_tensor(self.decoder.decode(scaled.to(self.decoder.dtype)).sample).float()


@dataclass
class ModelPair:
    """Everything frozen that a run needs of its two models, on one device.

    `alternating` says that the two UNets cannot be at work at once: then no graph through one may be alive while the
    other is used.
    """

    family: Family
    encoder: PromptEncoder
    codec: LatentCodec
    student: Denoiser
    loaded_teacher: Denoiser | None
    device: torch.device
    dtype: torch.dtype
    alternating: bool = False

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher was loaded."""
        return self.loaded_teacher is not None

    @property
    def teacher(self) -> Denoiser:
        """The multi-step model.

        Raises:
            ModelError: it was not loaded.
        """
        if self.loaded_teacher is None:
            raise ModelError("The teacher was not loaded.", "Name it with --teacher.")
        return self.loaded_teacher

    def role(self, role: Role) -> Denoiser:
        """The student, or the teacher.

        Raises:
            ModelError: the teacher was not loaded.
        """
        return self.student if role == "student" else self.teacher


def _is_kl(vae: Any) -> bool:
    return bool(vae.config.get("_class_name", type(vae).__name__) == "AutoencoderKL")
