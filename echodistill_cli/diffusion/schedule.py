"""Noise schedule and parameterizations in closed form.

All functions are pure: noise and timesteps are arguments.

Notation: `z` is a clean latent, `x0` a prediction of it, `z_t` its noised version: `√ᾱ_t z + √(1-ᾱ_t) ε` for UNets
(variance preserving, as in DDPM), `(1-σ_t) z + σ_t ε` for flow-matching transformers (rectified flow, Liu et al. 2022,
arXiv 2209.03003). Everything is computed in float32: at t = 999 of Stable Diffusion's schedule an error in ε is
amplified 14.6 times in x0, too much for half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from echodistill_cli.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
FLOW_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """The discrete noise schedule of one model.

    Attributes:
        alphas_cumprod: float32 [T], ᾱ_t for t = 0 … T-1, decreasing from near 1 to near 0. In a flow it is the share
            of the signal in the variance of z_t, which weights losses as ᾱ_t does.
        prediction_type: the meaning of the model's output: ε, v = √ᾱ ε - √(1-ᾱ) z (Salimans & Ho 2022), z itself, or
            the velocity ε - z of a flow.
        sigmas: float32 [T], σ_t of a flow, increasing to near 1; None for the schedule of a UNet.
        tables: ᾱ and the factors on z and on ε, each [T], by the device on which they have been looked up.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType
    sigmas: Tensor | None = None
    tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    @property
    def last_timestep(self) -> int:
        """T - 1, the noisiest timestep. A one-step model starts there."""
        return len(self.alphas_cumprod) - 1

    def alpha_bar(self, timesteps: Tensor) -> Tensor:
        """Return ᾱ_t, float32 [B], on the device of the timesteps.

        Args:
            timesteps: [B], integers.
        """
        return self.on(timesteps.device)[0][timesteps]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables of a device, which are copied there once."""
        if device not in self.tables:
            alpha_bar, sigmas = self.alphas_cumprod, self.sigmas
            tables = (alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
            if sigmas is not None:
                tables = (alpha_bar, 1 - sigmas, sigmas)
            self.tables[device] = tuple(send(table, device) for table in tables)  # type: ignore[assignment]
        return self.tables[device]

    def times(self, timesteps: Tensor) -> Tensor:
        """Return what the model is told: the timesteps [B] themselves, or σ_t of a flow in float32 [B]."""
        return timesteps if self.sigmas is None else self.on(timesteps.device)[2][timesteps]

    def timestep_like(self, other: NoiseSchedule, timestep: int) -> int:
        """Return the timestep at which a latent is as noisy as at a timestep of another schedule.

        Args:
            other: the schedule of `timestep`; a UNet's has the same timesteps as this one.
            timestep: t in `other`.
        """
        if self.sigmas is None or other.sigmas is None:
            return timestep
        return int((self.sigmas - other.sigmas[timestep]).abs().argmin())


def flow_schedule(shift: float = 1.0) -> NoiseSchedule:
    """Return the schedule of a rectified flow with 1000 timesteps.

    Args:
        shift: s in σ = s u / (1 + (s - 1) u) for u = 0.001 … 1; above 1 for more timesteps at high noise, as large
            images need (Esser et al. 2024, arXiv 2403.03206, 5.3.2).
    """
    uniform = torch.arange(1, FLOW_TIMESTEPS + 1, dtype=torch.float64) / FLOW_TIMESTEPS
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    signal = (1 - sigmas) ** 2
    return NoiseSchedule((signal / (signal + sigmas**2)).float(), "flow", sigmas.float())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device without waiting for the work that is queued there.

    Args:
        tensor: on the CPU; not to be changed afterwards.
        device: where to.
    """
    if device.type == "cpu" or tensor.device == device:
        return tensor.to(device)
    # Only from pinned memory is a copy asynchronous.
    pinned = tensor.pin_memory() if torch.cuda.is_available() else tensor
    return pinned.to(device, non_blocking=device.type != "mps")


def scales(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors on z and on ε at timesteps [B], each of shape [B, 1, 1, 1]."""
    _, alpha, sigma = schedule.on(timesteps.device)
    return alpha[timesteps].view(-1, 1, 1, 1), sigma[timesteps].view(-1, 1, 1, 1)


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return z_t, the forward process; equals `add_noise` or `scale_noise` of diffusers' schedulers.

    Args:
        schedule: of the model that will denoise.
        latents: [B, C, h, w], z.
        noise: [B, C, h, w], ε.
        timesteps: [B].
    """
    alpha, sigma = scales(schedule, timesteps)
    return alpha * latents.float() + sigma * noise.float()


def prediction_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the model is trained to output at z_t; arguments are those of `add_noise`."""
    if schedule.prediction_type == "epsilon":
        return noise.float()
    if schedule.prediction_type == "sample":
        return latents.float()
    if schedule.prediction_type == "flow":
        return noise.float() - latents.float()
    alpha, sigma = scales(schedule, timesteps)
    return alpha * noise.float() - sigma * latents.float()


def predict_x0(schedule: NoiseSchedule, output: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Convert the model's output at z_t into a prediction of the clean latent.

    Args:
        schedule: of the model.
        output: [B, C, h, w], ε, v, z or ε - z.
        noisy: [B, C, h, w], z_t.
        timesteps: [B].
    """
    if schedule.prediction_type == "sample":
        return output.float()
    alpha, sigma = scales(schedule, timesteps)
    if schedule.prediction_type == "epsilon":
        return (noisy.float() - sigma * output.float()) / alpha
    if schedule.prediction_type == "flow":
        return noisy.float() - sigma * output.float()
    return alpha * noisy.float() - sigma * output.float()


def noise_from_x0(schedule: NoiseSchedule, x0: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Return the ε that takes x0 to z_t: (z_t - √ᾱ_t x0) / √(1-ᾱ_t), in a flow with its factors."""
    alpha, sigma = scales(schedule, timesteps)
    return (noisy.float() - alpha * x0.float()) / sigma


def pure_noise(schedule: NoiseSchedule, noise: Tensor, timestep: int = -1) -> Tensor:
    """Return the input of a model that starts at a timestep: √(1-ᾱ_t) ε, or σ_t ε in a flow.

    diffusers' Euler scheduler passes the same tensor to the UNet after `scale_model_input`, with trailing spacing.

    Args:
        schedule: of the model.
        noise: [B, C, h, w], standard normal.
        timestep: t; by default the last one.
    """
    # The tables are on the CPU, so that reading a number from them does not wait for a device.
    if schedule.sigmas is not None:
        return float(schedule.sigmas[timestep]) * noise.float()
    return float((1 - schedule.alphas_cumprod[timestep]).sqrt()) * noise.float()


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + scale (c - u) on any prediction or x0 (Ho & Salimans 2022)."""
    return unconditional.float() + scale * (conditional.float() - unconditional.float())


def trailing_timesteps(schedule: NoiseSchedule, steps: int, first: int | None = None) -> list[int]:
    """Return `steps` timesteps in "trailing" spacing: 1 gives [999], 4 give [999, 749, 499, 249].

    This is the spacing that starts at the last timestep, as one-step models do (Lin et al. 2023, arXiv 2305.08891,
    table 2).

    Args:
        schedule: of the model.
        steps: number of timesteps.
        first: timestep to start at; None for the last one of the schedule.

    Raises:
        ConfigError: there are fewer timesteps.
    """
    total = len(schedule.alphas_cumprod) if first is None else first + 1
    if steps > total:
        raise ConfigError(f"--steps {steps} is more than the model has timesteps: {total}.", "Use fewer --steps.")
    return [round(total - index * total / steps) - 1 for index in range(steps)]


def ddim_step(schedule: NoiseSchedule, x0: Tensor, noisy: Tensor, t: int, t_next: int) -> Tensor:
    """Take one deterministic DDIM step (η = 0) from z_t; it equals an Euler step on the σ scale.

    Args:
        schedule: of the model.
        x0: [B, C, h, w], the model's prediction at z_t.
        noisy: [B, C, h, w], z_t.
        t: the timestep of `noisy`.
        t_next: the timestep to step to.
    """
    timesteps = torch.full((len(noisy),), t, device=noisy.device)
    noise = noise_from_x0(schedule, x0, noisy, timesteps)
    return add_noise(schedule, x0, noise, torch.full_like(timesteps, t_next))
