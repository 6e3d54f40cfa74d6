"""The embedded pair as rectified flows, which its two UNets are after a change of coordinates.

A flow's z_t = (1 - σ) z + σ ε is, up to a factor, a latent of the UNet's own schedule with the same ratio of signal to
noise. From the v that the UNet predicts there follow x0 and the velocity, (z_t - x0) / σ. So the method runs on a
flow, its noising, timesteps, targets and sampling, without another model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser, ModelPair
from echodistill_cli.diffusion.schedule import NoiseSchedule, flow_schedule, predict_x0, scales
from echodistill_cli.diffusion.text import Conditioning


@dataclass
class FlowDenoiser(Denoiser):
    """A UNet that predicts v, called with a flow's latents.

    Attributes:
        own: the schedule that the UNet was trained with; `schedule` is the flow's.
    """

    own: NoiseSchedule = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        # The timestep of the UNet's own schedule with a flow's ratio of signal to noise, nearest in its logarithm.
        logits = torch.logit(self.own.alphas_cumprod.double(), eps=1e-6)
        wanted = torch.logit(self.schedule.alphas_cumprod.double(), eps=1e-6)
        self.own_timesteps = (wanted[:, None] - logits[None]).abs().argmin(dim=1)

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity ε - z; see `Denoiser`."""
        own = self.own_timesteps[timesteps]
        _, own_sigma = scales(self.own, own)
        _, sigma = scales(self.schedule, timesteps)
        # The noise is scaled to that of the timestep exactly; at the last one there is nothing else.
        scaled = noisy.float() * (own_sigma / sigma)
        x0 = predict_x0(self.own, super().__call__(scaled, own, conditioning), scaled, own)
        return (noisy.float() - x0) / sigma


def as_flow(pair: ModelPair) -> ModelPair:
    """Return the pair with both models as flows; their UNets are shared with `pair`, not copied."""
    return replace(pair, student=_flow(pair.student), loaded_teacher=_flow(pair.teacher))


def _flow(denoiser: Denoiser) -> FlowDenoiser:
    assert denoiser.schedule.prediction_type == "v_prediction"
    return FlowDenoiser(denoiser.unet, flow_schedule(), timesteps=denoiser.timesteps, own=denoiser.schedule)
