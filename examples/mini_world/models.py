"""Builders of the mini world's networks: stock diffusers and transformers classes, small."""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 4
LATENT_SIDE = 16
TEXT_WIDTH = 192


def build_vae(scaling_factor: float = 1.0) -> AutoencoderTiny:
    """64 px images in -1..1 to latents (4, 16, 16) and back; 0.8 M parameters.

    Both ends keep their few full-resolution convolutions, where nearly all of the time goes. `scaling_factor`
    multiplies latents on their way to the UNet, as diffusers' pipelines undo it before they decode.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 2, 4),
        num_decoder_blocks=(5, 3, 1),
        latent_channels=LATENT_CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=scaling_factor,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, *, layers: int, hidden: int) -> CLIPTextConfig:
    """Return the configuration of a CLIP text encoder for this tokenizer's vocabulary, length and special tokens.

    Args:
        tokenizer: the mini world's.
        width: of the states and of the projection.
        layers: number of transformer layers, of four heads each.
        hidden: width of the feed-forward layers.
    """
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=hidden,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Token ids (batch, 24) to states (batch, 24, 192)."""
    return CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, layers=4, hidden=512))


def build_unet() -> UNet2DConditionModel:
    """The denoiser of latents (4, 16, 16): three levels, attention on text at 8x8 and 4x4 only."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 6),
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction, as SD 2.1 has it, and trailing steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def encode(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Images (batch, 3, 64, 64) in -1..1 to raw latents, before the scaling factor."""
    return cast(Tensor, vae.encode(pictures).latents)


def decode(vae: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Raw latents to images in -1..1; `vae.forward` would round latents to bytes and kill gradients."""
    return cast(Tensor, vae.decode(latents).sample)


def as_tensor(pictures: object, device: torch.device | str = "cpu") -> Tensor:
    """uint8 images (batch, side, side, 3) to float (batch, 3, side, side) in -1..1."""
    tensor = torch.as_tensor(pictures).to(device)
    return tensor.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def half_precision(device: str) -> torch.autocast:
    """Context of bfloat16 where `device` computes in it; on a CPU without AVX-512 that would be eight times slower."""
    able = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=able)
