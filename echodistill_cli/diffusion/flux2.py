"""FLUX.2 klein (Black Forest Labs 2026): a transformer over patches, conditioned on Qwen 3.

A token is 16 x 16 pixels: the VAE halves images three times, and 2 x 2 latents are folded into the channels, which are
normalized with the statistics of a batch norm. That is done here, in the codec, so that training sees [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser, LatentCodec
from echodistill_cli.diffusion.schedule import NoiseSchedule, send
from echodistill_cli.diffusion.text import Conditioning, LanguagePrompts

# As the pipeline of diffusers has them: the hidden states of Qwen that are joined, and the tokens of a prompt.
HIDDEN_STATES = (9, 18, 27)
MOST_TOKENS = 512
_PATCH = 2
# Qwen's chat with one message, answered without thinking. Written out, so that no template of a model folder is run.
_BEFORE, _AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass
class Flux2Denoiser(Denoiser):
    """A Flux2Transformer2DModel without guidance embedding.

    Attributes:
        schedule_of: returns the schedule for images of so many tokens; None if it does not depend on them.
    """

    schedule_of: Callable[[int], NoiseSchedule] | None = None

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the velocity, float32 [B, C, h, w]; see `Denoiser`."""
        height, width = noisy.shape[2:]
        output = self.unet(
            noisy.to(self.input_dtype).flatten(2).transpose(1, 2),
            timestep=self.schedule.times(timesteps),
            guidance=None,
            encoder_hidden_states=conditioning.hidden.to(self.input_dtype),
            txt_ids=send(_positions(1, 1, conditioning.hidden.shape[1]), noisy.device),
            img_ids=send(_positions(height, width, 1), noisy.device),
            return_dict=False,
        )[0]
        return torch.as_tensor(output).float().transpose(1, 2).reshape(len(noisy), -1, height, width)

    def set_tokens(self, count: int) -> None:
        """Adapt the schedule to images of so many tokens: larger ones are sampled longer at high noise."""
        if self.schedule_of is not None:
            self.schedule = self.schedule_of(count)

    @property
    def input_dtype(self) -> torch.dtype:
        """The precision in which the transformer reads its input."""
        dtype: torch.dtype = self.unet.x_embedder.weight.dtype
        return dtype

    @property
    def multiple(self) -> int:
        """Of what the latents' sides are a multiple."""
        return 1


def _positions(height: int, width: int, words: int) -> Tensor:
    """Return the place of each token in (image, row, column, word), [height · width · words, 4]."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(words))


class Flux2Codec(LatentCodec):
    """An AutoencoderKLFlux2, whose latents are 2 x 2 patches with mean 0 and spread 1."""

    @property
    def factor(self) -> int:
        """Downsampling factor f: pixels per token along one side."""
        return int(_PATCH * 2 ** (len(self.encoder.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Number of channels C of a token."""
        return int(_PATCH**2 * self.encoder.config.latent_channels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] as float32 [B, C, H/f, W/f]; see `LatentCodec`."""
        latents = self.encoder.encode(images.to(self.encoder.dtype)).latent_dist.mode()
        mean, spread = self._statistics()
        return (F.pixel_unshuffle(torch.as_tensor(latents).float(), _PATCH) - mean) / spread

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to float32 [B, 3, f·h, f·w]; see `LatentCodec`."""
        mean, spread = self._statistics()
        unpacked = F.pixel_shuffle(latents * spread + mean, _PATCH)
        return torch.as_tensor(self.decoder.decode(unpacked.to(self.decoder.dtype)).sample).float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and spread of the channels, [1, C, 1, 1]."""
        norm = self.encoder.bn
        spread = (norm.running_var.float() + float(self.encoder.config.batch_norm_eps)).sqrt()
        return norm.running_mean.float().view(1, -1, 1, 1), spread.view(1, -1, 1, 1)


class Flux2Prompts(LanguagePrompts):
    """Qwen 3, of which three hidden states are joined; the layer that predicts words is not used."""

    @property
    def room(self) -> int:
        """Most tokens of a prompt that the model reads."""
        return MOST_TOKENS - len(self.tokenizers[0](_BEFORE + _AFTER, add_special_tokens=False).input_ids)

    def _encode_one(self, prompt: str) -> Conditioning:
        """Encode a prompt, [1, 512, 3 · width]."""
        ids, mask = self._tokens(_BEFORE + prompt + _AFTER, MOST_TOKENS)
        output = self.encoders[0].model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return Conditioning(torch.cat([output.hidden_states[index] for index in HIDDEN_STATES], dim=-1))
