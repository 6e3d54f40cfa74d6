"""Teacher and student in memory: a denoiser and a schedule each, shared text encoder and codec.

The text encoders and the VAE come from the student, because the trained LoRA is used with the student's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from echodistill_cli.diffusion.schedule import NoiseSchedule, pure_noise, send, trailing_timesteps
from echodistill_cli.diffusion.text import Conditioning, PromptEncoder
from echodistill_cli.errors import ConfigError, ModelError

Family = Literal["sd", "sdxl", "sana", "flux2"]
Role = Literal["student", "teacher"]
Sampler = Literal["euler", "ddim", "lcm"]
_LEVELS = {True: "block_out_channels", False: "encoder_block_out_channels"}


@dataclass
class Denoiser:
    """A UNet with the noise schedule it was trained on. Inputs and outputs are float32.

    The loader keeps the UNet's last layer in float32: a one-step model divides that layer's rounding error by
    √ᾱ_999 = 0.068.

    Attributes:
        unet: a UNet2DConditionModel, or a module with the same call. Subclasses call a transformer.
        schedule: its ᾱ_t and prediction type.
        time_ids: SDXL's (original height, width, crop top, left, target height, width) in pixels; None for SD.
        timesteps: at which a distilled model was trained, from the first to the last step; empty for the last timestep
            of the schedule alone.
        sampler: what happens between two steps, and the noise that the first one starts from. "euler" and "ddim" keep
            the noise that the model predicts, "lcm" draws new noise. "euler" starts at the noise level of the
            timestep, the others from unit noise, as their models were trained.

    Raises:
        ConfigError: the schedule has no such timestep.
    """

    unet: Any
    schedule: NoiseSchedule
    time_ids: tuple[int, ...] | None = None
    timesteps: tuple[int, ...] = ()
    sampler: Sampler = "euler"

    def __post_init__(self) -> None:
        if self.first_timestep > self.schedule.last_timestep:
            raise ConfigError(
                f"--student-timesteps {self.first_timestep} is after the last timestep, {self.schedule.last_timestep}.",
                "Use the timesteps that the model was distilled at, such as 399 or 999,749,499,249.",
            )

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output, ε or v.

        Args:
            noisy: [B, C, h, w], z_t.
            timesteps: [B], integers.
            conditioning: of B prompts.

        Returns:
            float32 [B, C, h, w].
        """
        output = self.unet(
            noisy.to(self.input_dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=conditioning.added(self.time_ids),
            return_dict=False,
        )[0]
        return torch.as_tensor(output).float()

    def at_crops(self, conditioning: Conditioning, crops: Sequence[tuple[int, int]]) -> Conditioning:
        """Condition SDXL on where each training image was cropped; SD's conditioning is returned unchanged.

        Without it the model learns to cut subjects off (Podell et al. 2023, arXiv 2307.01952, section 2.2).

        Args:
            conditioning: of B prompts.
            crops: B pairs (top, left) in pixels.
        """
        if self.time_ids is None:
            return conditioning
        rows = [(*self.time_ids[:2], *crop, *self.time_ids[4:]) for crop in crops]
        return replace(conditioning, time_ids=send(torch.tensor(rows), conditioning.hidden.device))

    def pure_noise(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the UNet's input at the first timestep, and that timestep repeated: [B, C, h, w] and [B].

        Args:
            noise: [B, C, h, w], standard normal.
        """
        timesteps = torch.full((len(noise),), self.first_timestep, device=noise.device)
        is_euler = self.sampler == "euler"
        noisy = pure_noise(self.schedule, noise, self.first_timestep) if is_euler else noise.float()
        return self.rounded(noisy), timesteps

    def start(self, latents: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the UNet's input and its timesteps for steps at any place: [B, C, h, w] and [B].

        Args:
            latents: [B, C, h, w], standard normal noise for a first step, z_t for a later one.
            places: of each row in `timesteps`; empty for first steps.
        """
        if not any(places):
            return self.pure_noise(latents)
        is_first = send(torch.tensor([place == 0 for place in places]), latents.device).view(-1, 1, 1, 1)
        timesteps = torch.tensor([self.timesteps[place] for place in places])
        noisy = torch.where(is_first, self.pure_noise(latents)[0], latents.float())
        return self.rounded(noisy), send(timesteps, latents.device)

    @property
    def input_dtype(self) -> torch.dtype:
        """The precision in which the UNet reads its input."""
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        return dtype

    @property
    def multiple(self) -> int:
        """Of what the latents' sides are a multiple: a UNet halves them between two levels."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    def set_tokens(self, count: int) -> None:
        """Adapt to images of so many latents; a schedule that does not depend on them stays as it is."""

    def rounded(self, noisy: Tensor) -> Tensor:
        """Return z_t as the UNet reads it, in float32.

        The formula for x0 has to use the same numbers. At t = 999 the output answers the noise of the input, and in
        bfloat16 the rounding error of that noise would be 0.024 of x0's spread.

        Args:
            noisy: [B, C, h, w], z_t.
        """
        return noisy.to(self.input_dtype).float()

    @property
    def first_timestep(self) -> int:
        """The timestep at which sampling starts."""
        return self.timesteps[0] if self.timesteps else self.schedule.last_timestep

    @property
    def steps(self) -> int:
        """How many steps a distilled model was trained for."""
        return max(1, len(self.timesteps))

    def spaced_timesteps(self, steps: int) -> list[int]:
        """Return the timesteps of so many steps: those of the model, or others in trailing spacing."""
        if steps == len(self.timesteps):
            return list(self.timesteps)
        return trailing_timesteps(self.schedule, steps, self.first_timestep)


@dataclass
class LatentCodec:
    """Images to scaled latents and back.

    Attributes:
        encoder: the VAE, or an AutoencoderDC.
        decoder: the same VAE, or an AutoencoderTiny for its latent space.
    """

    encoder: Any
    decoder: Any

    @property
    def factor(self) -> int:
        """Downsampling factor f of the VAE: pixels per latent along one side."""
        # All VAE classes halve the resolution between two levels.
        return int(2 ** (len(self.encoder.config[_LEVELS[_is_kl(self.encoder)]]) - 1))

    @property
    def channels(self) -> int:
        """Number of latent channels C."""
        return int(self.encoder.config.latent_channels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images deterministically: the mode of the VAE's posterior, scaled.

        Args:
            images: [B, 3, H, W] in [-1, 1].

        Returns:
            float32 [B, C, H/f, W/f].
        """
        encoded = self.encoder.encode(images.to(self.encoder.dtype))
        if _is_kl(self.encoder):
            latents = encoded.latent_dist.mode()
        else:  # without mean and spread: an AutoencoderTiny or an AutoencoderDC
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return torch.as_tensor(latents).float() * float(self.encoder.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents; differentiable and not clamped.

        Args:
            latents: [B, C, h, w], scaled.

        Returns:
            float32 [B, 3, f·h, f·w], about [-1, 1].
        """
        scaled = latents / float(self.decoder.config.scaling_factor)
        return torch.as_tensor(self.decoder.decode(scaled.to(self.decoder.dtype)).sample).float()


@dataclass
class ModelPair:
    """Student, teacher and what they share, on one device.

    Attributes:
        family: "sd", "sdxl", "sana" or "flux2".
        encoder: tokenizers and text encoders, the student's.
        codec: the VAE, the student's.
        student: the one-step model.
        loaded_teacher: the multi-step model; None if it was not loaded.
        device: where the models run.
        dtype: precision of the frozen weights.
        alternating: only one UNet is on the device at a time, so no autograd graph through one may be alive while
            the other runs.
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
            ModelError: the teacher was not loaded.
        """
        if self.loaded_teacher is None:
            raise ModelError("The teacher was not loaded.", "Set it with --teacher.")
        return self.loaded_teacher

    def teacher_timestep(self, place: int) -> int:
        """Return the teacher's timestep with as much noise as one of the student's steps starts from.

        Args:
            place: of the step among those of the student.
        """
        return self.teacher.schedule.timestep_like(self.student.schedule, self.student.timesteps[place])

    def role(self, role: Role) -> Denoiser:
        """Return the student or the teacher.

        Raises:
            ModelError: the teacher was not loaded.
        """
        return self.student if role == "student" else self.teacher

    def blame_weights(self) -> None:
        """Look for the cause of results that are not finite in the weights that were loaded.

        They are not looked through before, because some models have such weights where nothing reads them.

        Raises:
            ModelError: a weight of a model, LoRAs aside, is NaN or infinite.
        """
        modules = {"student": self.student.unet, "VAE": self.codec.encoder, "decoder": self.codec.decoder}
        modules |= {f"text encoder {index}": module for index, module in enumerate(self.encoder.encoders, start=1)}
        modules |= {"teacher": self.loaded_teacher.unet} if self.loaded_teacher else {}
        for name, module in modules.items():
            for key, weight in module.named_parameters():
                if "lora_" not in key and not bool(torch.isfinite(weight).all()):
                    raise ModelError(
                        f"The {name} is damaged: its weight {key} holds NaN or infinity in {self.dtype}.",
                        "Download the model again, or try --precision fp32.",
                    )


def _is_kl(vae: Any) -> bool:
    return bool(vae.config.get("_class_name", type(vae).__name__) == "AutoencoderKL")
