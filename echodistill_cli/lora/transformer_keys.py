"""Layers of flow-matching transformers and their names in LoRA files. Pure strings; no torch.

Names of diffusers, as `save_lora_weights` of the family's pipeline writes them:

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight                   SANA
    transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight  FLUX.2

kohya's names of FLUX.2 are those of Black Forest Labs' own code, in which query, key and value are one layer:

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight
    lora_unet_single_blocks_0_linear1.lora_down.weight

Sources: diffusers 0.42.1 `loaders/lora_conversion_utils.py`, ComfyUI `comfy/lora.py`. kohya's tools have no names for
SANA. The tests check the lists against diffusers' own classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_SINGLE = ("to_qkv_mlp_proj", "to_out")
# FLUX.2's layers of diffusers, by those of Black Forest Labs' code that hold them, and the two names of its blocks.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_KOHYA = re.compile(rf"lora_unet_({'|'.join(_BLOCKS)})_(\d+)_({'|'.join(_FUSED).replace('.', '_')})")


@dataclass(frozen=True)
class Blocks:
    """The numbers that determine the layer names of one family.

    Attributes:
        attentions: names of the attentions in a block.
        layers: names of the layers of such an attention.
        blocks: how many blocks the published models have, smallest first.
        single: how many of FLUX.2's single blocks they have, in the same order.
        widths: of the attentions' input, in the same order.
        sign: a layer that tells the family, together with the width of its input.
        claims: what headers call the family.
        pipeline: diffusers' pipeline that loads its files.
    """

    attentions: tuple[str, ...]
    layers: tuple[str, ...]
    blocks: tuple[int, ...]
    single: tuple[int, ...]
    widths: tuple[int, ...]
    sign: str
    claims: tuple[str, ...]
    pipeline: str


ARCHITECTURES: Mapping[str, Blocks] = {
    "sana": Blocks(
        attentions=("attn1", "attn2"),
        layers=_ATTENTION,
        blocks=(28, 20),
        single=(0, 0),
        widths=(1152, 2240),
        sign="attn2.to_q",
        claims=("sana",),
        pipeline="SanaSprintPipeline",
    ),
    "flux2": Blocks(
        attentions=("attn",),
        layers=_ATTENTION + _TEXT_ATTENTION,
        blocks=(5,),
        single=(20,),
        widths=(3072,),
        sign="attn.to_qkv_mlp_proj",
        claims=("flux2", "flux-2"),
        pipeline="Flux2KleinPipeline",
    ),
}


def attention_paths(family: str, size: int = -1) -> tuple[str, ...]:
    """Return the paths of all attention layers of a published transformer.

    Args:
        family: "sana" or "flux2".
        size: which of its published sizes, smallest first.
    """
    shape = ARCHITECTURES[family]
    names = [f"{attention}.{layer}" for attention in shape.attentions for layer in shape.layers]
    paths = [f"transformer_blocks.{block}.{name}" for block in range(shape.blocks[size]) for name in names]
    singles = range(shape.single[size])
    return tuple(paths + [f"single_transformer_blocks.{block}.attn.{name}" for block in singles for name in _SINGLE])


def kohya_layer(path: str) -> str:
    """Return kohya's name of the layer of FLUX.2 that holds a layer of diffusers.

    Args:
        path: of an attention layer, such as "transformer_blocks.0.attn.to_q".

    Examples:
        "transformer_blocks.0.attn.to_q" -> "lora_unet_double_blocks_0_img_attn_qkv"
    """
    block, number, layer = path.split(".", 2)
    blocks = {theirs: ours for ours, theirs in _BLOCKS.items()}
    (name,) = (name for name, layers in _FUSED.items() if layer in layers)
    return f"lora_unet_{blocks[block]}_{number}_{name.replace('.', '_')}"


def layers_of_kohya(name: str) -> tuple[str, ...]:
    """Return the paths of the layers that a layer in kohya's names holds; none for other names."""
    match = _KOHYA.fullmatch(name)
    if match is None:
        return ()
    layers = next(layers for fused, layers in _FUSED.items() if fused.replace(".", "_") == match[3])
    return tuple(f"{_BLOCKS[match[1]]}.{match[2]}.{layer}" for layer in layers)


def is_published(family: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a transformer has the size of the largest published model of its family.

    Args:
        family: "sana" or "flux2".
        settings: its diffusers configuration.
    """
    shape = ARCHITECTURES[family]
    width = settings.get("num_attention_heads", 0) * settings.get("attention_head_dim", 0)
    blocks = settings.get("num_layers"), settings.get("num_single_layers", 0)
    return (width, blocks) == (shape.widths[-1], (shape.blocks[-1], shape.single[-1]))


def knows(family: str, path: str) -> bool:
    """Return whether a layer of this name is an attention layer of a family, of any number of blocks."""
    if layers_of_kohya(path):
        return family == "flux2"
    blocks, _, rest = path.partition(".")
    number, _, name = rest.partition(".")
    shape = ARCHITECTURES[family]
    if not number.isdecimal():
        return False
    if blocks == "single_transformer_blocks":
        return any(shape.single) and name in {f"attn.{layer}" for layer in _SINGLE}
    attention, _, layer = name.partition(".")
    return blocks == "transformer_blocks" and attention in shape.attentions and layer in shape.layers


def family_of_layers(layers: Mapping[str, int], metadata: Mapping[str, str]) -> str:
    """Infer the family of a transformer's LoRA: "sana", "flux2" or "unknown".

    Other families have layers of the same names, but of other widths. Small models are told by their header.

    Args:
        layers: width of the input of each layer, by path.
        metadata: of the file.
    """
    claim = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    for family, shape in ARCHITECTURES.items():
        is_claimed = any(word in claim for word in shape.claims)
        if is_claimed and any(layers_of_kohya(path) for path in layers):  # FLUX.1 has the same names
            return family
        inputs = {width for path, width in layers.items() if path.endswith(f".{shape.sign}")}
        if inputs and (is_claimed or inputs & set(shape.widths)):
            return family
    return "unknown"
