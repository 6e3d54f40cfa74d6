"""Module names in models and in LoRA files. Pure strings; no torch.

A *path* is a module's dotted name in diffusers and transformers, for text encoders always with `text_model.`:
`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`. Files use other names for the same module:

    kohya, SD        lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
    kohya, SDXL      lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q    (Stability's own "SGM" block names)
    diffusers        unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q
    diffusers, old   unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q
    transformers     transformer.transformer_blocks.0.attn1.to_q    (see `lora.transformer_keys`)
    peft             base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q

Sources: kohya-ss/sd-scripts `networks/lora.py`, diffusers 0.42.1 `loaders/lora_conversion_utils.py`, ComfyUI
`comfy/lora.py`. The tests check the module lists against diffusers' own classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from echodistill_cli.lora.transformer_keys import layers_of_kohya

UNET, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "text_encoder", "text_encoder_2"
TRANSFORMER = "transformer"
KOHYA_PREFIXES = {
    "sd": {UNET: "lora_unet_", TEXT_ENCODER: "lora_te_"},
    "sdxl": {UNET: "lora_unet_", TEXT_ENCODER: "lora_te1_", TEXT_ENCODER_2: "lora_te2_"},
}
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYERS_PER_BLOCK = 2
# A1111 gives `<lora:none:1>` and `<lora:addams:1>` a meaning of its own, so a LoRA cannot have these names.
RESERVED_NAMES = ("none", "addams")


@dataclass(frozen=True)
class Architecture:
    """The numbers that determine the module names of one model family.

    Attributes:
        channels: width of each down block of the UNet.
        depths: transformer blocks per attention of each down block; 0 for a block without attention.
        text_layers: number of layers of each text encoder, by component.
        context: width of the text features that cross-attention reads.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    text_layers: Mapping[str, int]
    context: int


ARCHITECTURES: Mapping[str, Architecture] = {
    "sd1": Architecture((320, 640, 1280, 1280), (1, 1, 1, 0), {TEXT_ENCODER: 12}, 768),
    "sd2": Architecture((320, 640, 1280, 1280), (1, 1, 1, 0), {TEXT_ENCODER: 23}, 1024),
    "sdxl": Architecture((320, 640, 1280), (0, 2, 10), {TEXT_ENCODER: 12, TEXT_ENCODER_2: 32}, 2048),
}


@dataclass(frozen=True)
class ParsedKey:
    """A tensor's key, split into module and part.

    Attributes:
        module: the key up to `part`, in the file's own naming.
        part: "down", "up", "alpha", one of `OTHER_PARTS`, or "" if it is none of these.
    """

    module: str
    part: str


_PAIRS = (".lora_{0}.weight", ".lora.{0}.weight", "_lora.{0}.weight", ".lora_linear_layer.{0}.weight")
_SUFFIXES = {pair.format(part): part for pair in _PAIRS for part in ("down", "up")} | {
    f".lora_{letter}{adapter}.weight": part
    for letter, part in (("A", "down"), ("B", "up"))
    for adapter in ("", ".default")
}
_SUFFIXES[".alpha"] = "alpha"
# LoHa, LoKr, OFT, GLoRA, IA3, full differences, Tucker convolutions and DoRA.
_OTHER = (
    "hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|hada_t1|hada_t2|lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b"
    "|lokr_t2|oft_blocks|oft_diag|a1|a2|b1|b2|on_input|diff|diff_b|w_norm|b_norm|lora_mid|dora_scale"
    "|lora_magnitude_vector"
)
OTHER_PARTS = frozenset(_OTHER.split("|"))
_OTHER_SUFFIX = re.compile(rf"\.({_OTHER})(?:\.weight|\.default)*$")
# Parts of a path that contain an underscore. Any other underscore in a kohya name stands for a dot.
_WORDS = re.compile(
    r"(?:down_blocks|up_blocks|mid_block|transformer_blocks|to_[qkv]|to_out|proj_in|proj_out|time_emb_proj"
    r"|conv_shortcut|conv_in|conv_out|time_embedding|add_embedding|linear_[12]|text_model|text_projection|self_attn"
    r"|[qkv]_proj|out_proj|input_blocks|middle_block|output_blocks|in_layers|out_layers|emb_layers|skip_connection"
    r"|time_embed|label_emb)(?=_|$)|[^_]+"
)
_SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_FROM_SGM_RESNET = {new: old for old, new in _SGM_RESNET.items()}
_FROM_SGM_OUTER = {new: old for old, new in _SGM_OUTER.items()}
_DIFFUSERS_BLOCK = re.compile(
    r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_SGM_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.(?:(\d+)\.)?(.+)")


# ComfyUI's own names of text encoders, which OneTrainer writes.
_COMFY_TEXT = re.compile(r"^text_encoders\.(clip_[lgh])\.transformer\.")
_COMFY_TEXT_ENCODERS = {"clip_l": TEXT_ENCODER, "clip_h": TEXT_ENCODER, "clip_g": TEXT_ENCODER_2}


def split_key(key: str) -> ParsedKey:
    """Split a tensor's key into module and part."""
    for suffix, part in _SUFFIXES.items():
        if key.endswith(suffix):
            return ParsedKey(key[: -len(suffix)], part)
    other = _OTHER_SUFFIX.search(key)
    return ParsedKey(key[: other.start()], other.group(1)) if other else ParsedKey(key, "")


def locate(module: str) -> tuple[str, str] | None:
    """Return component and path of a module in a file's own naming; None if the naming is unknown.

    Examples:
        "lora_te_text_model_encoder_layers_0_mlp_fc1" -> ("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
    """
    if layers_of_kohya(module):
        return TRANSFORMER, module
    if module.startswith(("lora_", "lycoris_", "oft_unet_")):
        return _locate_kohya(module)
    module = _COMFY_TEXT.sub(
        lambda match: f"{_COMFY_TEXT_ENCODERS[match[1]]}.", module.removeprefix("base_model.model.")
    )
    for component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER):
        if module.startswith(f"{component}."):
            return component, canonical(component, module.removeprefix(f"{component}."))
    if module.startswith("diffusion_model."):
        return UNET, from_sgm(module.removeprefix("diffusion_model."))
    if module.startswith(("down_blocks.", "mid_block.", "up_blocks.", "time_embedding.", "conv_in", "conv_out")):
        return UNET, canonical(UNET, module)
    if module.startswith(("text_model.", "encoder.layers.")):
        return TEXT_ENCODER, canonical(TEXT_ENCODER, module)
    return None


def canonical(component: str, path: str) -> str:
    """Normalize a path: without `.processor`, and for text encoders with `text_model.`."""
    if component == UNET:
        path = path.replace(".processor.", ".")
        return f"{path}.0" if path.endswith(".to_out") else path
    # transformers 5.6 removed this wrapper from CLIPTextModel; files keep it.
    return f"text_model.{path}" if path.startswith("encoder.") else path


def kohya_module(family: str, component: str, path: str, *, sgm: bool = True) -> str:
    """Return a module's canonical name in kohya's format.

    Args:
        family: "sd" or "sdxl"; SDXL's UNet gets SGM block names, as in kohya's own files.
        component: "unet", "text_encoder" or, for SDXL, "text_encoder_2".
        path: with or without `text_model.`.
        sgm: whether SDXL's UNet gets SGM block names; see `has_sgm_names`.
    """
    path = canonical(component, path)
    if family == "sdxl" and component == UNET and sgm:
        path = to_sgm(path)
    return KOHYA_PREFIXES[family][component] + path.replace(".", "_")


def has_sgm_names(paths: Iterable[str]) -> bool:
    """Return whether a UNet's layers have SGM names: two layers per block, as far as the paths show.

    An output block has one layer more than an input block. Readers count the layers of SDXL, so a smaller UNet, such as
    one with one layer per block, keeps diffusers' names, which all of them read, too.
    """
    layers = [
        int(match[4])
        for path in paths
        if (match := _DIFFUSERS_BLOCK.fullmatch(path))
        and match[1] == "up_blocks"
        and match[3] in ("attentions", "resnets")
    ]
    return not layers or max(layers) == LAYERS_PER_BLOCK


def to_sgm(path: str, *, first_upsampler: int = 2) -> str:
    """Convert a UNet path to SGM block names; a path in no known block is returned unchanged.

    Args:
        path: in diffusers block names, of a UNet with two layers per block.
        first_upsampler: index of the first upsampler in its output block: 2 after an attention (SDXL), else 1 (SD).
    """
    match = _DIFFUSERS_BLOCK.fullmatch(path)
    if match is None:
        return _SGM_OUTER.get(path, path)
    side, number, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = _SGM_RESNET.get(rest, rest)
    place = 1 if kind == "attentions" else 0
    row = (LAYERS_PER_BLOCK + 1) * number
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * layer}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{row + LAYERS_PER_BLOCK + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{row + LAYERS_PER_BLOCK}.{first_upsampler if number == 0 else 2}.conv"
    if side == "down_blocks":
        return f"input_blocks.{row + 1 + layer}.{place}.{rest}"
    return f"output_blocks.{row + layer}.{place}.{rest}"


def from_sgm(path: str) -> str:
    """Convert a UNet path from SGM block names; a path in diffusers block names is returned unchanged."""
    match = _SGM_BLOCK.fullmatch(path)
    if path in _FROM_SGM_OUTER or match is None:
        return _FROM_SGM_OUTER.get(path, path)
    side, row, place, rest = match[1], int(match[2]), int(match[3] or 0), match[4]
    kind = "attentions" if place == 1 else "resnets"
    rest = _FROM_SGM_RESNET.get(rest, rest)
    if side == "middle_block":
        return f"mid_block.attentions.0.{rest}" if row == 1 else f"mid_block.resnets.{row // 2}.{rest}"
    if side == "input_blocks":
        block, layer = divmod(row - 1, LAYERS_PER_BLOCK + 1)
        where = f"down_blocks.{block}"
        return f"{where}.downsamplers.0.conv" if rest == "op" else f"{where}.{kind}.{layer}.{rest}"
    block, layer = divmod(row, LAYERS_PER_BLOCK + 1)
    where = f"up_blocks.{block}"
    return f"{where}.upsamplers.0.conv" if rest == "conv" else f"{where}.{kind}.{layer}.{rest}"


def unet_paths(family: str) -> tuple[str, ...]:
    """Return the paths of all linear and convolution layers of a UNet; family is "sd1", "sd2" or "sdxl"."""
    shape = ARCHITECTURES[family]
    last = len(shape.channels) - 1
    paths = [path for path in _SGM_OUTER if family == "sdxl" or not path.startswith("add_embedding")]
    for block, depth in enumerate(shape.depths):
        widens = shape.channels[block] != shape.channels[max(block - 1, 0)]
        for layer in range(LAYERS_PER_BLOCK):
            paths += _layer(f"down_blocks.{block}", layer, depth, shortcut=widens and layer == 0)
        paths += [f"down_blocks.{block}.downsamplers.0.conv"] * (block < last)
    for layer in range(2):
        paths += _layer("mid_block", layer, max(shape.depths) * (layer == 0), shortcut=False)
    for block, depth in enumerate(reversed(shape.depths)):
        for layer in range(LAYERS_PER_BLOCK + 1):
            # The input is concatenated with a skip connection, so every resnet changes the width.
            paths += _layer(f"up_blocks.{block}", layer, depth, shortcut=True)
        paths += [f"up_blocks.{block}.upsamplers.0.conv"] * (block < last)
    return tuple(paths)


def text_paths(layers: int) -> tuple[str, ...]:
    """Return the paths of all linear layers of a CLIP text encoder with this many layers."""
    names = [f"self_attn.{name}" for name in TEXT_ATTENTION] + ["mlp.fc1", "mlp.fc2"]
    return tuple(f"text_model.encoder.layers.{layer}.{name}" for layer in range(layers) for name in names)


def _locate_kohya(module: str) -> tuple[str, str] | None:
    prefixes = {
        "lora_unet_": UNET,
        "lycoris_": UNET,
        "oft_unet_": UNET,
        "lora_te_": TEXT_ENCODER,
        "lora_te1_": TEXT_ENCODER,
    }
    prefixes["lora_te2_"] = TEXT_ENCODER_2
    for prefix, component in prefixes.items():
        if module.startswith(prefix):
            path = ".".join(_WORDS.findall(module.removeprefix(prefix)))
            return component, from_sgm(path) if component == UNET else canonical(component, path)
    return None


def _layer(block: str, layer: int, depth: int, *, shortcut: bool) -> Iterator[str]:
    names = ("conv1", "time_emb_proj", "conv2") + ("conv_shortcut",) * shortcut
    yield from (f"{block}.resnets.{layer}.{name}" for name in names)
    if depth == 0:
        return
    attention = f"{block}.attentions.{layer}"
    yield from (f"{attention}.proj_in", f"{attention}.proj_out")
    heads = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    for depth_index in range(depth):
        for name in [*heads, "ff.net.0.proj", "ff.net.2"]:
            yield f"{attention}.transformer_blocks.{depth_index}.{name}"
