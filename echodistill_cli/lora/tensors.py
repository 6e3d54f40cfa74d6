"""Adapters and learned tokens as the tensors of the files that other tools read.

A LoRA changes a layer's weight by B A α/r: A ("down") is [r, in], B ("up") [out, r]. Readers disagree on α, and
diffusers' own format drops it, so every file here holds B α/r, and says α = r where its format has a place for α.

Formats: kohya's, which every reader knows, and diffusers' own. Sources: kohya-ss/sd-scripts `networks/lora.py`,
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
    UNET,
    canonical,
    kohya_module,
    split_key,
)

# The key in the header under which diffusers looks for the adapters' configuration.
ADAPTER_METADATA_KEY = "lora_adapter_metadata"
# A token's file is named after it, on every system.
_TOKEN = re.compile(r"[A-Za-z0-9_-]+")
TOKEN_KEYS = {TEXT_ENCODER: "clip_l", TEXT_ENCODER_2: "clip_g"}
# The text encoder that web UIs build as OpenCLIP's, which has q, k and v in one weight.
_OPEN_CLIP = {"sd": TEXT_ENCODER, "sdxl": TEXT_ENCODER_2}


@dataclass(frozen=True)
class LoraWeights:
    """The LoRA of one model component.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        tensors: `<module path>.lora_A.weight` [r, in] and `<module path>.lora_B.weight` [out, r] (convolutions:
            [r, in, k, k] and [out, r, 1, 1]), as `peft.utils.get_peft_model_state_dict` gives them; text encoders
            with or without `text_model.`.
        rank: r of all of them.
        alpha: the change of a weight is B A α/r.
    """

    component: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float


def kohya_tensors(weights: Sequence[LoraWeights], family: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A LoRA file's tensors under kohya's keys, the format that every reader knows.

    Args:
        weights: at least one.
        family: "sd" or "sdxl".
        dtype: of A and B in the file; `.alpha` is always a float32 scalar.

    Raises:
        ConfigError: an incomplete pair, a shape that contradicts the rank, a component that the family lacks, or an
            OpenCLIP text encoder's attention of which not all four projections are there, whatever their ranks (A1111
            ignores such a layer).
    """
    if family not in KOHYA_PREFIXES:
        raise ConfigError(f"There are no kohya keys for family {family!r}.", "Use sd or sdxl.")
    tensors: dict[str, Tensor] = {}
    joined: set[str] = set()
    for part in weights:
        if part.component not in KOHYA_PREFIXES[family]:
            raise ConfigError(f"Family {family!r} has no {part.component}.")
        for path, down, up in folded(part, dtype):
            name = kohya_module(family, part.component, path)
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(float(part.rank))
            # SD 1's encoder goes by the same name as SD 2's, and is narrower; nothing is joined there.
            if part.component == _OPEN_CLIP[family] and down.shape[1] != ARCHITECTURES["sd1"].context:
                joined.add(path)
    _check_attention(_OPEN_CLIP[family], joined)
    return tensors


def diffusers_tensors(weights: Sequence[LoraWeights], dtype: torch.dtype) -> dict[str, Tensor]:
    """A LoRA file's tensors under diffusers' own keys, as `save_lora_weights` writes a UNet's attention.

    diffusers itself mixes two spellings in one file and then decides by the first key how to read all of them; here
    each component has one spelling.

    Raises:
        ConfigError: as `folded`.
    """
    tensors: dict[str, Tensor] = {}
    for part in weights:
        infix = "lora" if part.component == UNET else "lora_linear_layer"
        for path, down, up in folded(part, dtype):
            tensors[f"{part.component}.{path}.{infix}.down.weight"] = down
            tensors[f"{part.component}.{path}.{infix}.up.weight"] = up
    return tensors


def adapter_metadata(weights: Sequence[LoraWeights]) -> dict[str, str]:
    """The header entry from which diffusers rebuilds peft's configuration; it goes with `diffusers_tensors` only.

    Raises:
        ConfigError: two entries for one component; as `folded`.
    """
    fields: dict[str, object] = {}
    for part in weights:
        if f"{part.component}.r" in fields:
            raise ConfigError(f"{part.component} comes twice; diffusers' format has one rank per component.")
        # peft compares the ends of names, so these fit CLIPTextModel with and without its wrapper.
        paths = [path.removeprefix("text_model.") for path, _, _ in folded(part, torch.float32)]
        fields |= {
            f"{part.component}.r": part.rank,
            f"{part.component}.lora_alpha": part.rank,
            f"{part.component}.target_modules": sorted(paths),
        }
    return {ADAPTER_METADATA_KEY: json.dumps(fields, sort_keys=True)}


def token_tensors(token: str, vectors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The tensors of a learned token's file.

    Args:
        token: the word; the file must be named after it, since most readers go by the file's name.
        vectors: [n, width] by component: "text_encoder" and, for SDXL, "text_encoder_2".
        family: "sd" (one tensor under the token's name) or "sdxl" ("clip_l" and "clip_g").

    Raises:
        ConfigError: a token that cannot be a file's name, missing or superfluous vectors, or a wrong shape.
    """
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"The token {token!r} cannot name a file everywhere.", "Use letters, digits, - and _ only.")
    names = TOKEN_KEYS if family == "sdxl" else {TEXT_ENCODER: token}
    if vectors.keys() != names.keys():
        raise ConfigError(f"A token of family {family!r} needs vectors for {', '.join(names)}.")
    for component, vector in vectors.items():
        if vector.ndim != 2:
            raise ConfigError(f"The token's vectors for {component} have shape {list(vector.shape)}, not [n, width].")
    return {names[component]: vector.detach().float().contiguous() for component, vector in vectors.items()}


def bundled_tensors(token: str, vectors: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """A learned token under the keys with which A1111 and SD.Next read it out of a LoRA file; no other tool does.

    Source: A1111 `extensions-builtin/Lora/networks.py::load_network`. Arguments and errors as for `token_tensors`.
    """
    tensors = token_tensors(token, vectors, family)
    if family != "sdxl":
        return {f"bundle_emb.{token}.string_to_param.*": tensors[token]}
    return {f"bundle_emb.{token}.{key}": value for key, value in tensors.items()}


def folded(weights: LoraWeights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, A and B α/r of every module, checked; text encoders with `text_model.`.

    Raises:
        ConfigError: an incomplete pair, or a shape that contradicts the rank.
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
            raise ConfigError(f"{weights.component}: {path} is not of rank {weights.rank}.")
        yield path, down.to(dtype).contiguous(), (up.float() * (weights.alpha / weights.rank)).to(dtype).contiguous()


def _check_attention(component: str, paths: Collection[str]) -> None:
    for path in sorted(paths):
        block, _, name = path.rpartition(".")
        missing = [other for other in TEXT_ATTENTION if f"{block}.{other}" not in paths]
        if name in TEXT_ATTENTION and missing:
            raise ConfigError(
                f"{component}: {block} has no {', '.join(missing)}; A1111 would leave the whole layer out.",
                "Train all four projections, or use --format diffusers, which A1111 does not read.",
            )
