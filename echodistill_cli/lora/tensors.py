"""Convert adapters and learned tokens to the tensors of LoRA and token files.

A LoRA adds B A α/r to a layer's weight: A ("down") is [r, in], B ("up") is [out, r]. Tools treat α differently, and
diffusers' own format drops it. All files therefore hold B α/r, and α = r where the format has a place for it.

Formats: kohya's, which all tools read, and diffusers' own. Sources: kohya-ss/sd-scripts `networks/lora.py`,
diffusers 0.42.1 `loaders/lora_conversion_utils.py` and `loaders/peft.py`, A1111 `extensions-builtin/Lora/networks.py`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from echodistill_cli.errors import ConfigError
from echodistill_cli.lora.keys import (
    ARCHITECTURES,
    KOHYA_PREFIXES,
    TEXT_ATTENTION,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    UNET,
    canonical,
    has_sgm_names,
    kohya_module,
    split_key,
)
from echodistill_cli.lora.transformer_keys import kohya_layer, layers_of_kohya

# The header key from which diffusers reads the adapters' configuration.
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
# A token names its file, so it must be a valid name on every system.
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
BUNDLE_PREFIX = "bundle_emb."
TOKEN_KEYS = {TEXT_ENCODER: "clip_l", TEXT_ENCODER_2: "clip_g"}
# The text encoder that web UIs build as OpenCLIP, with q, k and v in one weight.
_OPEN_CLIP = {"sd": TEXT_ENCODER, "sdxl": TEXT_ENCODER_2}


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA of one model component.

    Attributes:
        component: "unet", "transformer", "text_encoder" or "text_encoder_2".
        tensors: `<module path>.lora_A.weight` [r, in] and `<module path>.lora_B.weight` [out, r] (convolutions:
            [r, in, k, k] and [out, r, 1, 1]), as `peft.utils.get_peft_model_state_dict` returns them; text encoders
            with or without `text_model.`.
        rank: r, the same for all modules.
        alpha: α in B A α/r.
    """

    component: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float


def kohya_tensors(weights: Sequence[LoraWeights], family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a LoRA file's tensors under kohya's keys, the format that all tools read.

    Args:
        weights: at least one.
        family: "sd", "sdxl" or "flux2".
        dtype: dtype of A and B; `.alpha` is always a float32 scalar.

    Raises:
        ConfigError: a module lacks A or B, or a shape contradicts the rank.
        ConfigError: the family is unknown or lacks a component.
        ConfigError: an attention layer of an OpenCLIP text encoder lacks one of its four projections, which makes
            A1111 ignore the layer.
    """
    if family == "flux2":
        return _fused_tensors(weights, dtype)
    if family not in KOHYA_PREFIXES:
        raise ConfigError(f"kohya's format has no keys for family {family!r}.", "Use --format diffusers.")
    unet_paths = [split_key(key).module for part in weights if part.component == UNET for key in part.tensors]
    sgm = has_sgm_names(unet_paths)
    tensors: dict[str, Tensor] = {}
    open_clip_paths: set[str] = set()
    for part in weights:
        if part.component not in KOHYA_PREFIXES[family]:
            raise ConfigError(f"Family {family!r} has no {part.component}.")
        for path, down, up in folded(part, dtype):
            name = kohya_module(family, part.component, path, sgm=sgm)
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(float(part.rank))
            # SD 1's text encoder has the same name as SD 2's, but it is narrower and not an OpenCLIP.
            if part.component == _OPEN_CLIP[family] and down.shape[1] != ARCHITECTURES["sd1"].context:
                open_clip_paths.add(path)
    _check_attention(_OPEN_CLIP[family], open_clip_paths)
    return tensors


def _fused_tensors(weights: Sequence[LoraWeights], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return FLUX.2's tensors under kohya's keys: query, key and value are one layer of rank 3 r."""
    groups: dict[str, dict[str, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for part in weights:
        for path, down, up in folded(part, dtype):
            groups[kohya_layer(path)][path] = (down, up)
    tensors: dict[str, Tensor] = {}
    for name, layers in groups.items():
        paths = layers_of_kohya(name)
        if layers.keys() != set(paths):
            raise ConfigError(f"kohya's {name} needs a LoRA on all of {', '.join(paths)}.", "Use --format diffusers.")
        down = torch.cat([layers[path][0] for path in paths])
        tensors[f"{name}.lora_down.weight"] = down
        ups = [layers[path][1] for path in paths]
        tensors[f"{name}.lora_up.weight"] = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def diffusers_tensors(weights: Sequence[LoraWeights], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a LoRA file's tensors under diffusers' keys, as `save_lora_weights` names a UNet's attention.

    diffusers itself mixes two naming schemes in one file and then reads all keys by the scheme of the first. Here each
    component has one scheme.

    Args:
        weights: at most one per component.
        dtype: dtype of A and B.

    Raises:
        ConfigError: a module lacks A or B, or a shape contradicts the rank.
    """
    tensors: dict[str, Tensor] = {}
    for part in weights:
        infix = "lora" if part.component == UNET else "lora_linear_layer"
        ends = ("lora_A", "lora_B") if part.component == TRANSFORMER else (f"{infix}.down", f"{infix}.up")
        for path, down, up in folded(part, dtype):
            tensors[f"{part.component}.{path}.{ends[0]}.weight"] = down
            tensors[f"{part.component}.{path}.{ends[1]}.weight"] = up
    return tensors


def adapter_metadata(weights: Sequence[LoraWeights]) -> dict[str, str]:
    """Return the header entry with peft's configuration that belongs to `diffusers_tensors`.

    Raises:
        ConfigError: a component occurs twice.
        ConfigError: a module lacks A or B, or a shape contradicts the rank.
    """
    fields: dict[str, object] = {}
    for part in weights:
        if f"{part.component}.r" in fields:
            raise ConfigError(f"{part.component} occurs twice; diffusers' format has one rank per component.")
        # peft matches the ends of names, so these match CLIPTextModel with and without its wrapper.
        paths = [path.removeprefix("text_model.") for path, _, _ in folded(part, torch.float32)]
        fields |= {
            f"{part.component}.r": part.rank,
            f"{part.component}.lora_alpha": part.rank,
            f"{part.component}.target_modules": sorted(paths),
        }
    return {ADAPTER_METADATA_KEY: json.dumps(fields, sort_keys=True)}


def token_tensors(token: str, vectors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return the tensors of a learned token's file.

    Args:
        token: the word; the file must have the same name, because most tools take the token from the file name.
        vectors: [n, width] by component: "text_encoder" and, for SDXL, "text_encoder_2".
        family: "sd" (one tensor under the token's name, [width] for one vector) or "sdxl" ("clip_l" and "clip_g").

    Raises:
        ConfigError: the token cannot be a file name.
        ConfigError: the components are not those of the family.
        ConfigError: a vector's shape is not [n, width].
    """
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"The token {token!r} cannot be used as a file name.", "Use letters, digits, - and _.")
    names = TOKEN_KEYS if family == "sdxl" else {TEXT_ENCODER: token}
    if vectors.keys() != names.keys():
        raise ConfigError(f"A token of family {family!r} needs vectors for {', '.join(names)}.")
    for component, vector in vectors.items():
        if vector.ndim != 2:
            raise ConfigError(f"The token's vectors for {component} have shape {list(vector.shape)}, not [n, width].")
    vectors = {component: vector.detach().float().contiguous() for component, vector in vectors.items()}
    if family == "sd" and len(vectors[TEXT_ENCODER]) == 1:
        # InvokeAI does not identify [1, width]; every tool reads [width].
        vectors[TEXT_ENCODER] = vectors[TEXT_ENCODER][0]
    return {names[component]: vector for component, vector in vectors.items()}


def bundled_tensors(token: str, vectors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Return a learned token's tensors for bundling into a LoRA file, which only A1111 and SD.Next read.

    Source: A1111 `extensions-builtin/Lora/networks.py::load_network`. Arguments and errors are those of
    `token_tensors`.
    """
    tensors = token_tensors(token, vectors, family)
    if family != "sdxl":
        return {f"{BUNDLE_PREFIX}{token}.string_to_param.*": tensors[token].reshape(-1, tensors[token].shape[-1])}
    return {f"{BUNDLE_PREFIX}{token}.{key}": value for key, value in tensors.items()}


def folded(weights: LoraWeights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield path, A and B α/r of every module; paths of text encoders have `text_model.`.

    Args:
        weights: the LoRA of one component.
        dtype: dtype of the tensors.

    Raises:
        ConfigError: a module lacks A or B, or a shape contradicts the rank.
    """
    halves: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in weights.tensors.items():
        parsed = split_key(key)
        halves[canonical(weights.component, parsed.module)][parsed.part] = tensor
    for path, pair in sorted(halves.items()):
        if pair.keys() != {"down", "up"}:
            raise ConfigError(f"{weights.component}: {path} needs lora_A.weight and lora_B.weight.")
        down, up = pair["down"].detach(), pair["up"].detach()
        if down.shape[0] != weights.rank or up.shape[1] != weights.rank:
            raise ConfigError(f"{weights.component}: {path} does not have rank {weights.rank}.")
        yield path, down.to(dtype).contiguous(), (up.float() * (weights.alpha / weights.rank)).to(dtype).contiguous()


def _check_attention(component: str, paths: Collection[str]) -> None:
    for path in sorted(paths):
        block, _, name = path.rpartition(".")
        missing = [other for other in TEXT_ATTENTION if f"{block}.{other}" not in paths]
        if name in TEXT_ATTENTION and missing:
            raise ConfigError(
                f"{component}: {block} has no {', '.join(missing)}; A1111 would ignore the whole layer.",
                "Train all four projections, or use --format diffusers, which A1111 does not read.",
            )
