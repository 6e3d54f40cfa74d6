"""SANA and SANA-Sprint (Xie et al. 2025, arXiv 2501.18427; Chen et al. 2025, arXiv 2503.09641).

Both denoise along a rectified flow. SANA-Sprint was trained in TrigFlow, x_s = cos(s) z + sin(s) ε, but its transformer
is SANA's, and diffusers converts between them. With σ = sin s / (sin s + cos s), its input is z_t of the flow and its
x0 is z_t - σ v, as of any flow (the algebra is in the tests, against `SCMScheduler`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.diffusion.text import Conditioning, LanguagePrompts

# As the pipelines of diffusers have them: tokens of a prompt, and the scale that SANA-Sprint is told.
MOST_TOKENS = 300
SPRINT_GUIDANCE = 4.5
_SPECIAL_TOKENS = 2


@dataclass
class SanaDenoiser(Denoiser):
    """A SanaTransformer2DModel.

    Attributes:
        time_scale: factor on σ_t: SANA is told times up to 1000, SANA-Sprint up to 1.
        guidance: the guidance scale that a guidance-distilled model is told; None for SANA.
    """

    time_scale: float = 1000.0
    guidance: float | None = None

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity, float32 [B, C, h, w]; see `Denoiser`."""
        guidance = None
        if self.guidance is not None:
            scale = self.guidance * float(self.unet.config.guidance_embeds_scale)
            guidance = torch.full((len(noisy),), scale, device=noisy.device, dtype=self.input_dtype)
        output = self.unet(
            noisy.to(self.input_dtype),
            encoder_hidden_states=conditioning.hidden.to(self.input_dtype),
            encoder_attention_mask=conditioning.mask,
            timestep=self.time_scale * self.schedule.times(timesteps),
            guidance=guidance,
            return_dict=False,
        )[0]
        return torch.as_tensor(output).float()

    @property
    def input_dtype(self) -> torch.dtype:
        """The precision in which the transformer reads its input."""
        dtype: torch.dtype = self.unet.patch_embed.proj.weight.dtype
        return dtype

    @property
    def multiple(self) -> int:
        """Of what the latents' sides are a multiple."""
        return int(self.unet.config.patch_size)


class SanaPrompts(LanguagePrompts):
    """Gemma 2 with the instruction that SANA's pipelines put before each prompt.

    Args:
        tokenizer: Gemma's.
        encoder: a Gemma2Model.
        instruction: lines before a prompt; the empty prompt has none.
    """

    def __init__(self, tokenizer: Any, encoder: Any, instruction: Sequence[str]) -> None:
        super().__init__(tokenizer, encoder)
        self.instruction = "\n".join(instruction)
        tokenizer.padding_side = "right"

    @property
    def room(self) -> int:
        """Most tokens of a prompt that the model reads."""
        return MOST_TOKENS - _SPECIAL_TOKENS

    def _encode_empty(self) -> Conditioning:
        return self._encode("", MOST_TOKENS)

    def _encode_one(self, prompt: str) -> Conditioning:
        before = len(self.tokenizers[0].encode(self.instruction))
        return self._encode(self.instruction + prompt.lower().strip(), before + MOST_TOKENS - _SPECIAL_TOKENS)

    @torch.no_grad()
    def _encode(self, text: str, length: int) -> Conditioning:
        """Return the first state and the last 299, of instruction and prompt together."""
        ids, mask = self._tokens(text, length)
        hidden = self.encoders[0](ids, attention_mask=mask, use_cache=False).last_hidden_state
        places = [0, *range(length - MOST_TOKENS + 1, length)]
        return Conditioning(hidden[:, places], mask=mask[:, places])
