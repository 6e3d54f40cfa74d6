"""Read LoRA and token files of any tool. `LoraFile.to_peft` returns a plain LoRA as peft adapters."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from echodistill_cli.errors import ModelError
from echodistill_cli.files import read_small
from echodistill_cli.lora.keys import (
    ARCHITECTURES,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    UNET,
    locate,
    split_key,
)
from echodistill_cli.lora.safetensors_io import Table, read_header, read_tensors
from echodistill_cli.lora.tensors import ADAPTER_METADATA_KEY, BUNDLE_PREFIX, TOKEN_KEYS, LoraWeights
from echodistill_cli.lora.transformer_keys import family_of_layers, layers_of_kohya

_FAMILY_BY_CONTEXT = {shape.context: family for family, shape in ARCHITECTURES.items()}
_CROSS_ATTENTION_INPUTS = ("attn2.to_k", "attn2.to_v")
# Fields of peft's configuration that add to the plain formula B A α/r, if they are set.
_NOT_PLAIN = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "arrow_config", "alora_invocation_tokens")
# A pattern from a foreign header must not take exponential time to match.
_COSTLY_PATTERN = re.compile(r"\)\s*[*+?{]|\\[1-9]|\(\?P=")
_MOST_REPEATS = 3
_PEFT_ALPHA = 8  # the α of a configuration that does not state it
_LONGEST_PATTERN = 300
PEFT_WEIGHTS = "adapter_model.safetensors"  # as peft calls the weights beside its configuration


@dataclass(frozen=True)
class LoraModule:
    """One adapted module of a LoRA file.

    Attributes:
        component: "unet", "transformer", "text_encoder" or "text_encoder_2".
        path: its name in diffusers or transformers; in text encoders with `text_model.`.
        down: key of A in the file.
        up: key of B in the file.
        rank: r.
        alpha: α; None if the file does not state it, which all readers take as r.
        scale: factor on B A at LoRA weight 1: α/r, or α/√r for rank-stabilized LoRA.
    """

    component: str
    path: str
    down: str
    up: str
    rank: int
    alpha: float | None
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """A checked LoRA or token file. Its tensors stay on the disk.

    Attributes:
        path: path of the file.
        metadata: the header's metadata.
        table: dtype ("F16") and shape of every tensor, by key.
        format: "kohya", "diffusers", "peft", "lycoris" (LoHa, LoKr, DoRA and others), "token" or "unknown".
        family: "sd1", "sd2", "sdxl", "sana", "flux2" or "unknown".
        modules: the modules with plain LoRA.
        unmatched: keys that belong to none of these modules.
        bundled: vectors of learned tokens that lie in the same file: key by token and text encoder.
        unclear: why the strength is left open; "" if it is not.
        strength_source: where a configuration of peft gives the strength; "" without one.
    """

    path: Path
    metadata: Mapping[str, str]
    table: Table
    format: str
    family: str
    modules: tuple[LoraModule, ...]
    unmatched: tuple[str, ...]
    bundled: Mapping[tuple[str, str], str]
    unclear: str
    strength_source: str = ""

    def to_peft(self, model_modules: Mapping[str, Collection[str]] | None = None) -> list[LoraWeights]:
        """Return the adapters with peft's keys, one entry per component, rank and scale.

        The alpha of an entry is its scale times its rank. Bundled tokens are not part of it.

        Args:
            model_modules: module names of the loaded models by component, from `named_modules`. If given, paths
                follow these names, and each must exist. If None, text encoders get `text_model.`.

        Raises:
            ModelError: the file is not a plain LoRA, or its header leaves the strength open.
            ModelError: a key matches no module of the models.
        """
        if self.unclear:
            raise ModelError(f"{self.path}: {self.unclear}.", "Convert it with the tool that wrote it.")
        if self.unmatched or not self.modules:
            count = len(self.unmatched)
            rest = f"; {count} of its keys are unknown, such as {self.unmatched[0]}" if count else ""
            raise ModelError(f"{self.path} is not a plain LoRA (format: {self.format}){rest}.")
        tensors = dict(read_tensors(self.path, [key for module in self.modules for key in (module.down, module.up)]))
        groups: dict[tuple[str, int, float], dict[str, Tensor]] = defaultdict(dict)
        for module in self.modules:
            group = groups[module.component, module.rank, module.scale * module.rank]
            # A layer may hold several of a model's, which share A.
            paths = layers_of_kohya(module.path) or (module.path,)
            for name, up in zip(paths, tensors[module.up].chunk(len(paths)), strict=True):
                path = name if model_modules is None else self._model_path(module, name, model_modules)
                group[f"{path}.lora_A.weight"] = tensors[module.down]
                group[f"{path}.lora_B.weight"] = up
        return [LoraWeights(component, group, rank, alpha) for (component, rank, alpha), group in groups.items()]

    def _model_path(self, module: LoraModule, name: str, model_modules: Mapping[str, Collection[str]]) -> str:
        names = model_modules.get(module.component, ())
        for path in (name, name.removeprefix("text_model.")):
            if path in names:
                return path
        raise ModelError(
            f"{self.path}: {module.down} matches no module of this model's {module.component}.",
            f"Use a model of the file's family ({self.family}).",
        )

    def token_vectors(self) -> tuple[str, dict[str, Tensor]] | None:
        """Return the token of a token file, or a bundled token, and its vectors [n, width] by text encoder.

        Returns:
            None if the file has no token. A token file's token is the stem of its name.

        Raises:
            ModelError: several tokens are bundled.
        """
        places = self.bundled
        if self.format == "token":
            encoders = {key: encoder for encoder, key in TOKEN_KEYS.items()} if len(self.table) > 1 else {}
            places = {(self.path.stem, encoders.get(key, TEXT_ENCODER)): key for key in self.table}
        tokens = {token for token, _ in places}
        if len(tokens) > 1:
            raise ModelError(f"{self.path} bundles {len(tokens)} tokens; only one is supported.")
        tensors = dict(read_tensors(self.path, places.values()))
        # Some tools write one vector with one dimension.
        vectors = {encoder: _rows(tensors[key]) for (_, encoder), key in sorted(places.items())}
        return (tokens.pop(), vectors) if tokens else None


def _rows(vector: Tensor) -> Tensor:
    return vector.reshape(-1, vector.shape[-1])


def read_token_file(path: Path) -> list[Tensor]:
    """Return the vectors of a token file, [n, width], one per text encoder in the order of the pipeline.

    Raises:
        ModelError: it is not a token file.
    """
    file = read_lora(path)
    if file.format != "token" or (token := file.token_vectors()) is None:
        raise ModelError(f"{path} is not a token file (format: {file.format}).")
    return list(token[1].values())


def read_lora(path: Path) -> LoraFile:
    """Read and check a LoRA or token file of any tool.

    Raises:
        ModelError: the file is missing, empty, truncated or not a safetensors file.
        ModelError: a module lacks A or B, or their ranks differ.
        ModelError: a tensor holds NaN or infinity.
    """
    metadata, table = read_header(path)
    if not table:
        raise ModelError(f"{path} holds no tensors.")
    alphas: dict[str, float] = {}
    for key, tensor in read_tensors(path, table):
        if split_key(key).part == "alpha" and tensor.numel() == 1:
            alphas[key] = float(tensor)
    keys_by_module: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for key in table:
        parsed = split_key(key)
        place = locate(parsed.module)
        if place and parsed.part:
            keys_by_module[place][parsed.part] = key
    plain = {place: keys for place, keys in keys_by_module.items() if keys.keys() <= {"down", "up", "alpha"}}
    strength = _WrittenStrength(path, metadata)
    modules = tuple(_module(path, table, place, keys, alphas, strength) for place, keys in plain.items())
    bundled = {place: key for key in table if (place := _bundled_place(key))}
    known = {key for keys in plain.values() for key in keys.values()} | set(bundled.values())
    return LoraFile(
        path=path,
        metadata=metadata,
        table=table,
        format=_format(table, modules),
        family=_family(metadata, table, modules, keys_by_module),
        modules=modules,
        unmatched=tuple(key for key in table if key not in known),
        bundled=bundled,
        unclear=strength.unclear,
        strength_source=strength.source,
    )


def _module(
    path: Path,
    table: Table,
    place: tuple[str, str],
    keys: Mapping[str, str],
    alphas: Mapping[str, float],
    strength: _WrittenStrength,
) -> LoraModule:
    component, name = place
    if "down" not in keys or "up" not in keys:
        missing = "down" if "up" in keys else "up"
        raise ModelError(f"{path}: {next(iter(keys.values()))} has no matching {missing} weight.")
    down, up = keys["down"], keys["up"]
    down_shape, up_shape = table[down][1], table[up][1]
    if len(down_shape) < 2 or len(up_shape) < 2 or down_shape[0] != up_shape[1] or down_shape[0] == 0:
        raise ModelError(f"{path}: {down} {list(down_shape)} and {up} {list(up_shape)} differ in rank.")
    for key in (down, up):
        if not table[key][0].startswith(("F", "BF")):
            raise ModelError(f"{path}: {key} has dtype {table[key][0]}.", "Only floating-point LoRAs are supported.")
    rank = down_shape[0]
    if "alpha" in keys:
        alpha = alphas.get(keys["alpha"])
        return LoraModule(component, name, down, up, rank, alpha, 1.0 if alpha is None else alpha / rank)
    alpha, scale = strength.of(component, name, rank)
    return LoraModule(component, name, down, up, rank, alpha, scale)


class _WrittenStrength:
    """The strength that a peft configuration gives to modules without their own α tensor.

    diffusers writes it into the header, and alone reads it there. Its fields are named `<component>.<field>`, or
    `<field>` in a file of one model. peft writes it into a file of its own, beside the weights.

    Args:
        path: of the LoRA file.
        metadata: of the file.

    Attributes:
        source: where the configuration stands; "" if there is none.
        unclear: why the strength cannot be told; "" if it can.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.source = self.unclear = ""
        self.fields: dict[str, Any] = {}
        beside = path.with_name("adapter_config.json")
        is_of_peft = path.name == PEFT_WEIGHTS and beside.is_file()
        if ADAPTER_METADATA_KEY not in metadata and not is_of_peft:
            return
        self.source = beside.name if is_of_peft else f"its header entry {ADAPTER_METADATA_KEY}"
        try:
            fields = json.loads(read_small(beside) if is_of_peft else metadata[ADAPTER_METADATA_KEY])
        except (OSError, ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            self.unclear = f"{self.source} cannot be read"
            return
        self.fields = fields
        extra = sorted(key for key, value in fields.items() if value and key.rpartition(".")[2] in _NOT_PLAIN)
        if extra:
            self.unclear = f"{self.source} sets {extra[0]}, which a plain LoRA does not have"

    def of(self, component: str, path: str, rank: int) -> tuple[float | None, float]:
        """Return α, None if the header does not state it, and the scale of one module."""
        try:
            alpha = self._field(component, "lora_alpha", _PEFT_ALPHA if self._describes(component) else None)
            for pattern, value in (self._field(component, "alpha_pattern", None) or {}).items():
                if _matches(pattern, path):
                    alpha = value
                    break
            if alpha is None:
                return None, 1.0
            alpha = float(alpha)
            scale = alpha / (math.sqrt(rank) if self._field(component, "use_rslora", False) else rank)
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error):
            scale = math.nan
        if math.isfinite(scale):
            return alpha, scale
        self.unclear = f"{self.source} does not give the strength of {component} {path}"
        return None, 1.0

    def _describes(self, component: str) -> bool:
        return any(key.startswith(f"{component}.") or "." not in key for key in self.fields)

    def _field(self, component: str, name: str, default: Any) -> Any:
        return self.fields.get(f"{component}.{name}", self.fields.get(name, default))


def _matches(pattern: str, path: str) -> bool:
    """Return whether peft applies an entry of `alpha_pattern` to a module.

    Raises:
        ValueError: the pattern could take too long to match.
    """
    repeats = sum(pattern.count(sign) for sign in "*+?{")
    if repeats > _MOST_REPEATS or len(pattern) > _LONGEST_PATTERN or _COSTLY_PATTERN.search(pattern):
        raise ValueError(f"a pattern of {len(pattern)} characters is not supported")
    # As in peft's get_pattern_key. Text encoders have lost the wrapper `text_model` in transformers 5.6.
    names = {path, path.removeprefix("text_model.")}
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def _bundled_place(key: str) -> tuple[str, str] | None:
    """Return token and text encoder of a bundled token's key; None for any other key.

    A1111's form is `bundle_emb.<token>.<part>`, with `string_to_param.*` for SD and `clip_l` and `clip_g` for SDXL.
    """
    if not key.startswith(BUNDLE_PREFIX):
        return None
    token, dot, part = key.removeprefix(BUNDLE_PREFIX).partition(".")
    encoders = {"string_to_param.*": TEXT_ENCODER} | {name: encoder for encoder, name in TOKEN_KEYS.items()}
    return (token, encoders[part]) if dot and token and part in encoders else None


def _format(table: Table, modules: Sequence[LoraModule]) -> str:
    if _is_token(table):
        return "token"
    parts = {split_key(key).part for key in table if locate(split_key(key).module)}
    first = modules[0].down if modules else ""
    if parts - {"", "down", "up", "alpha"} or first.startswith("lycoris_"):
        return "lycoris"
    if not modules:
        return "unknown"
    if first.startswith("lora_"):
        return "kohya"
    return "diffusers" if first.startswith(("unet.", "text_encoder", "transformer.")) else "peft"


def _is_token(table: Table) -> bool:
    if table.keys() == set(TOKEN_KEYS.values()):
        return True
    key, (_, shape) = next(iter(table.items()))
    return len(table) == 1 and len(shape) in (1, 2) and not split_key(key).part and "." not in key


def _family(
    metadata: Mapping[str, str],
    table: Table,
    modules: Sequence[LoraModule],
    places: Mapping[tuple[str, str], Mapping[str, str]],
) -> str:
    """Infer the family from the width of the text features, then module names, then the header."""
    if _is_token(table):
        width = next(iter(table.values()))[1][-1]
        return "sdxl" if len(table) > 1 else _FAMILY_BY_CONTEXT.get(width, "unknown")
    layers = {
        path: table[keys["down"]][1][-1]
        for (part, path), keys in places.items()
        if part == TRANSFORMER and "down" in keys
    }
    if layers:
        return family_of_layers(layers, metadata)
    for (component, name), keys in places.items():
        if (
            component == UNET
            and name.endswith(_CROSS_ATTENTION_INPUTS)
            and len(table.get(keys.get("down", ""), ("", ()))[1]) > 1
        ):
            return _FAMILY_BY_CONTEXT.get(table[keys["down"]][1][1], "unknown")
    if any(component == TEXT_ENCODER_2 or "transformer_blocks.1." in path for component, path in places):
        return "sdxl"
    text_inputs = {table[module.down][1][1] for module in modules if module.component == TEXT_ENCODER}
    if ARCHITECTURES["sd2"].context in text_inputs:
        return "sd2"
    claim = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}"
    for family, words in (("sdxl", ("sdxl", "-xl-")), ("sd2", ("sd_v2", "-v2-")), ("sd1", ("sd_v1", "-v1/"))):
        if any(word in claim for word in words):
            return family
    return "unknown"
