"""Write a diffusers folder as one file in the original Stable Diffusion layout, such as sd_turbo.safetensors.

Only names and three shapes differ: OpenCLIP has query, key and value in one matrix and its projection transposed, and
the VAE's attention consists of 1 x 1 convolutions. The package writes this layout too; this second mapping is
independent of it. OpenCLIP's names are taken from diffusers.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.random_models import build_small_pair

State = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    r"\.mid_block\.resnets\.0": ".mid.block_1",
    r"\.mid_block\.resnets\.1": ".mid.block_2",
    r"\.mid_block\.attentions\.0": ".mid.attn_1",
    r"\.down_blocks\.(\d)\.resnets": r".down.\1.block",
    r"\.down_blocks\.(\d)\.downsamplers\.0": r".down.\1.downsample",
    r"conv_norm_out": "norm_out",
    r"group_norm": "norm",
    r"conv_shortcut": "nin_shortcut",
    r"\.to_out\.0\.": ".proj_out.",
    r"\.to_([qkv])\.": r".\1.",
}


def build_sd2_pair(folder: Path) -> tuple[Path, Path]:
    """The small pair with UNets and VAE of SD2's true structure: four levels of two layers, only thinner."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    student, teacher = build_small_pair(folder)
    vae = _small_vae()
    for model in (student, teacher):
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 24, 24),
            attention_head_dim=(1, 2, 3, 3),
            cross_attention_dim=32,
            norm_num_groups=8,
            use_linear_projection=True,
        )
        unet.save_pretrained(model / "unet")
        vae.save_pretrained(model / "vae")
        _tell_apart(model)
    return student, teacher


def build_sdxl(folder: Path) -> Path:
    """A student of SDXL's structure: three levels, two text encoders, size embeddings."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    student = build_small_pair(folder)[0]
    settings: dict[str, Any] = CLIPTextConfig.from_pretrained(student / "text_encoder").to_dict()
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**settings, "hidden_size": 48, "projection_dim": 40}))
    second.save_pretrained(student / "text_encoder_2")
    shutil.copytree(student / "tokenizer", student / "tokenizer_2")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 3),
        cross_attention_dim=32 + 48,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )
    unet.save_pretrained(student / "unet")
    _small_vae().save_pretrained(student / "vae")
    _tell_apart(student)
    return student


def _small_vae() -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
    )


def _tell_apart(folder: Path) -> None:
    """Add noise to every weight: fresh norms are all ones and fresh biases all zeros, so that one could be another."""
    for file in folder.glob("*/*.safetensors"):
        state = {name: value + 0.01 * torch.randn_like(value) for name, value in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})


def sd2_state(folder: Path, *, text_prefix: str = "cond_stage_model.model.") -> State:
    """The weights of a diffusers folder under the names that SD2's files have."""
    return {
        **_unet(_state(folder / "unet")),
        **_vae(_state(folder / "vae")),
        **{text_prefix + name: value for name, value in _open_clip(_state(folder / "text_encoder")).items()},
    }


def sdxl_state(folder: Path) -> State:
    """The weights of a diffusers folder under the names that SDXL's files have."""
    first = {f"text_model.{name}": value for name, value in _flat_text(_state(folder / "text_encoder")).items()}
    first["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    second = _open_clip(_state(folder / "text_encoder_2"))
    return {
        **_unet(_state(folder / "unet")),
        **_vae(_state(folder / "vae")),
        **{f"conditioner.embedders.0.transformer.{name}": value for name, value in first.items()},
        **{f"conditioner.embedders.1.model.{name}": value for name, value in second.items()},
    }


def write(path: Path, state: State, dtype: torch.dtype = torch.float32) -> Path:
    """Save a state as one file in one precision."""
    save_file({name: _cast(value, dtype).contiguous().clone() for name, value in state.items()}, path)
    return path


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _state(folder: Path) -> State:
    (file,) = folder.glob("*.safetensors")
    state: State = load_file(file)
    return state


def _unet(state: State) -> State:
    with_attention = {name.split(".")[1] for name in state if re.match(r"up_blocks\.\d\.attentions", name)}
    return {f"model.diffusion_model.{_unet_name(name, with_attention)}": value for name, value in state.items()}


def _unet_name(name: str, with_attention: set[str]) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    place = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(.+)", name)
    assert place is not None
    side, level, kind, index, rest = place.groups()
    if kind == "resnets":
        module, _, leaf = rest.rpartition(".")
        rest = f"{_RESNET[module]}.{leaf}"
    slot = 1 if kind == "attentions" else 0
    if side == "mid":
        return f"middle_block.{slot or 2 * int(index)}.{rest}"
    # Every level has three entries: two layers and the way down, or three layers, the last one with the way up.
    entry = 3 * int(level) + int(index)
    if kind == "downsamplers":
        return f"input_blocks.{entry + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{entry + 2}.{1 + (level in with_attention)}.{rest}"
    return f"input_blocks.{entry + 1}.{slot}.{rest}" if side == "down" else f"output_blocks.{entry}.{slot}.{rest}"


def _vae(state: State) -> State:
    attention = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")
    named = {f"first_stage_model.{_vae_name(name)}": value for name, value in state.items()}
    return {name: value[..., None, None] if attention.search(name) else value for name, value in named.items()}


def _vae_name(name: str) -> str:
    for pattern, theirs in _VAE.items():
        name = re.sub(pattern, theirs, name)
    name = re.sub(r"\.up_blocks\.(\d)\.resnets", lambda level: f".up.{3 - int(level[1])}.block", name)
    return re.sub(r"\.up_blocks\.(\d)\.upsamplers\.0", lambda level: f".up.{3 - int(level[1])}.upsample", name)


def _flat_text(state: State) -> State:
    return {name.removeprefix("text_model."): value for name, value in state.items()}


def _open_clip(state: State) -> State:
    """OpenCLIP's text encoder, with the last layer that SD 2 does not use and what CLIPTextModel lacks.

    The names are diffusers' own table, and its conversion in the other direction must give the weights back.
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_open_clip_checkpoint

    flat = {name: value for name, value in _flat_text(state).items() if name != "text_projection.weight"}
    names = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    projection = state.get("text_projection.weight", torch.eye(len(flat["final_layer_norm.weight"])))
    named: State = {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}
    for name, value in flat.items():
        path = f"text_model.{name}"
        if path in names["layers"]:
            named[names["layers"][path]] = value
            continue
        for ours, theirs in names["transformer"].items():
            path = path.replace(ours, theirs)
        named[f"transformer.{path}"] = value
    named = _joined_attention(named)
    back = convert_open_clip_checkpoint(None, named, prefix="")
    assert all(torch.equal(back[f"text_model.{name}"], value) for name, value in flat.items())
    last = max(int(name.split(".")[2]) for name in named if name.startswith("transformer."))
    layer = f"transformer.resblocks.{last}."
    extra = {name.replace(layer, f"transformer.resblocks.{last + 1}."): name for name in named if layer in name}
    return named | {name: named[source] for name, source in extra.items()}


def _joined_attention(named: State) -> State:
    """Query, key and value in one matrix."""
    joined = {name: value for name, value in named.items() if not re.search(r"[qkv]_proj", name)}
    for name in named:
        if "q_proj" in name:
            parts = [named[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            joined[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return joined
