"""A whole model's weights under the names that one-file checkpoints have: what ComfyUI and A1111 open as a model.

    part              SD2                                SDXL
    UNet              model.diffusion_model.*            the same
    VAE               first_stage_model.*                the same
    text encoder      cond_stage_model.model.*           conditioner.embedders.0.transformer.text_model.*
    second one                                           conditioner.embedders.1.model.*

Besides the names a few shapes differ: OpenCLIP keeps query, key and value in one matrix and its projection transposed,
and the VAE's attention is made of 1 x 1 convolutions.

Sources: CompVis/latent-diffusion `autoencoder.py`, mlfoundations/open_clip `transformer.py`, and the reading side in
diffusers 0.42.1 `loaders/single_file_utils.py`; the tests compare with a second mapping and with that reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from echodistill_cli.errors import ConfigError
from echodistill_cli.lora.keys import ARCHITECTURES, LAYERS_PER_BLOCK, to_sgm

State = Mapping[str, Tensor]

_VAE_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
        (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
        (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )
)
_VAE_UP = re.compile(r"\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)")
_VAE_ATTENTION = re.compile(r"\.attn_1\.(?:q|k|v|proj_out)\.weight$")
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training ends; no picture depends on it
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def sd_checkpoint(unet: State, vae: State, text_encoder: State) -> dict[str, Tensor]:
    """The tensors of an SD1 or SD2 checkpoint from the state dicts of diffusers' and transformers' models.

    Raises:
        ConfigError: the UNet or the VAE has no such layout (another number of layers, or a tiny VAE).
    """
    encoder = _flat(text_encoder)
    if encoder["final_layer_norm.weight"].numel() == ARCHITECTURES["sd1"].context:
        text = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder.items()}
    else:
        text = {f"cond_stage_model.model.{name}": value for name, value in _whole_open_clip(encoder).items()}
    return _unet(unet) | _vae(vae) | text


def sdxl_checkpoint(unet: State, vae: State, text_encoder: State, text_encoder_2: State) -> dict[str, Tensor]:
    """The tensors of an SDXL checkpoint from the state dicts of diffusers' and transformers' models.

    Raises:
        ConfigError: as `sd_checkpoint`.
    """
    first = _flat(text_encoder)
    places = len(first["embeddings.position_embedding.weight"])
    first["embeddings.position_ids"] = torch.arange(places)[None]
    second = _open_clip(_flat(text_encoder_2))
    second["logit_scale"] = torch.tensor(_LOGIT_SCALE).to(second["text_projection"])
    return (
        _unet(unet)
        | _vae(vae)
        | {f"conditioner.embedders.0.transformer.text_model.{name}": value for name, value in first.items()}
        | {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    )


def _unet(state: State) -> dict[str, Tensor]:
    layers = {int(match[1]) for name in state if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))}
    if len(layers) != LAYERS_PER_BLOCK:
        raise ConfigError(
            f"A UNet with {len(layers)} layers per block has no place in a one-file checkpoint.",
            "Use --format pipeline, which keeps any model.",
        )
    # An upsampler stands after its block's attention, if there is one.
    first_upsampler = 2 if any(name.startswith("up_blocks.0.attentions.") for name in state) else 1
    named = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        module = "out.0" if module == "conv_norm_out" else to_sgm(module, first_upsampler=first_upsampler)
        named[f"model.diffusion_model.{module}.{leaf}"] = value
    return named


def _vae(state: State) -> dict[str, Tensor]:
    if "quant_conv.weight" not in state:
        raise ConfigError("A tiny VAE has no place in a one-file checkpoint.", "Use --format pipeline.")
    levels = 1 + max(int(match[1]) for name in state if (match := _VAE_UP.search(name)))
    named = {}
    for name, value in state.items():
        path = f"first_stage_model.{name}"
        for pattern, replacement in _VAE_RULES:
            path = pattern.sub(replacement, path)
        # Counted from the picture there, from the latent here.
        path = _VAE_UP.sub(
            lambda found: f".up.{levels - 1 - int(found[1])}.{'block.' if 'res' in found[2] else 'upsample.'}", path
        )
        named[path] = value[..., None, None] if _VAE_ATTENTION.search(path) and value.ndim == 2 else value
    return named


def _flat(state: State) -> dict[str, Tensor]:
    # transformers 5.6 took the wrapper out of CLIPTextModel.
    return {name.removeprefix("text_model."): value for name, value in state.items() if "position_ids" not in name}


def _open_clip(state: State) -> dict[str, Tensor]:
    """OpenCLIP's names for a text encoder's weights."""
    named = {_OPEN_CLIP[name]: value for name, value in state.items() if name in _OPEN_CLIP}
    for layer in range(_layer_count(state)):
        named |= dict(_open_clip_layer(state, layer, layer))
    if "text_projection.weight" in state:  # x @ W.T here, x @ P there
        named["text_projection"] = state["text_projection.weight"].T
    return named


def _whole_open_clip(state: State) -> dict[str, Tensor]:
    """The same for SD2, of whose text encoder diffusers leaves the last layer and the head away, as nothing uses them.

    Readers that build the whole encoder miss them, so they are there: the last layer is a copy of the one before.
    """
    last, norm = _layer_count(state), state["final_layer_norm.weight"]
    head = {
        "text_projection": torch.eye(norm.numel()).to(norm),
        "logit_scale": torch.tensor(_LOGIT_SCALE).to(norm),
    }
    copy = {name: value.clone() for name, value in _open_clip_layer(state, last - 1, last)}
    return _open_clip(state) | copy | head


def _open_clip_layer(state: State, source: int, target: int) -> Iterator[tuple[str, Tensor]]:
    start = f"transformer.resblocks.{target}"
    for leaf in ("weight", "bias"):
        for ours, theirs in _OPEN_CLIP_LAYER.items():
            yield f"{start}.{theirs}.{leaf}", state[f"encoder.layers.{source}.{ours}.{leaf}"]
        parts = [state[f"encoder.layers.{source}.self_attn.{which}_proj.{leaf}"] for which in "qkv"]
        yield f"{start}.attn.in_proj_{leaf}", torch.cat(parts)


def _layer_count(state: State) -> int:
    return 1 + max(int(match[1]) for name in state if (match := _LAYER.match(name)))
