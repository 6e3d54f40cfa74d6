"""Read LoRA and token files of any tool. `LoraFile.to_peft` returns a plain LoRA as peft adapters."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from echodistill_cli.errors import ModelError
from echodistill_cli.lora.keys import ARCHITECTURES, TEXT_ENCODER, TEXT_ENCODER_2, UNET, locate, split_key
from echodistill_cli.lora.safetensors_io import Table, read_header, read_tensors
from echodistill_cli.lora.tensors import ADAPTER_METADATA_KEY, TOKEN_KEYS, LoraWeights

_FAMILY_BY_CONTEXT = {shape.context: family for family, shape in ARCHITECTURES.items()}
_CROSS_ATTENTION_INPUTS = ("attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class LoraModule:
    """One adapted module of a LoRA file.

    Attributes:
        component: "unet", "text_encoder" or "text_encoder_2".
        path: its name in diffusers or transformers; in text encoders with `text_model.`.
        down: key of A in the file.
        up: key of B in the file.
        rank: r.
        alpha: α; None if the file does not state it, which all readers take as r.
    """

    component: str
    path: str
    down: str
    up: str
    rank: int
    alpha: float | None


@dataclass(frozen=True)
class LoraFile:
    """A checked LoRA or token file. Its tensors stay on the disk.

    Attributes:
        path: path of the file.
        metadata: the header's metadata.
        table: dtype ("F16") and shape of every tensor, by key.
        format: "kohya", "diffusers", "peft", "lycoris" (LoHa, LoKr, DoRA and others), "token" or "unknown".
        family: "sd1", "sd2", "sdxl" or "unknown".
        modules: the modules with plain LoRA.
        unmatched: keys that belong to none of these modules.
    """

    path: Path
    metadata: Mapping[str, str]
    table: Table
    format: str
    family: str
    modules: tuple[LoraModule, ...]
    unmatched: tuple[str, ...]

    def to_peft(self, model_modules: Mapping[str, Collection[str]] | None = None) -> list[LoraWeights]:
        """Return the adapters with peft's keys, one entry per component, rank and alpha.

        Args:
            model_modules: module names of the loaded models by component, from `named_modules`. If given, paths
                follow these names, and each must exist. If None, text encoders get `text_model.`.

        Raises:
            ModelError: the file is not a plain LoRA.
            ModelError: a key matches no module of the models.
        """
        if self.unmatched or not self.modules:
            count = len(self.unmatched)
            rest = f"; {count} of its keys are unknown, such as {self.unmatched[0]}" if count else ""
            raise ModelError(f"{self.path} is not a plain LoRA (format: {self.format}){rest}.")
        tensors = dict(read_tensors(self.path, [key for module in self.modules for key in (module.down, module.up)]))
        groups: dict[tuple[str, int, float], dict[str, Tensor]] = defaultdict(dict)
        for module in self.modules:
            path = module.path if model_modules is None else self._model_path(module, model_modules)
            alpha = float(module.rank) if module.alpha is None else module.alpha
            group = groups[module.component, module.rank, alpha]
            group[f"{path}.lora_A.weight"] = tensors[module.down]
            group[f"{path}.lora_B.weight"] = tensors[module.up]
        return [LoraWeights(component, group, rank, alpha) for (component, rank, alpha), group in groups.items()]

    def _model_path(self, module: LoraModule, model_modules: Mapping[str, Collection[str]]) -> str:
        names = model_modules.get(module.component, ())
        for path in (module.path, module.path.removeprefix("text_model.")):
            if path in names:
                return path
        raise ModelError(
            f"{self.path}: {module.down} matches no module of this model's {module.component}.",
            f"Use a model of the file's family ({self.family}).",
        )


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
    header_alphas = _header_alphas(metadata)
    modules = tuple(_module(path, table, place, keys, alphas, header_alphas) for place, keys in plain.items())
    known = {key for keys in plain.values() for key in keys.values()}
    return LoraFile(
        path=path,
        metadata=metadata,
        table=table,
        format=_format(table, modules),
        family=_family(metadata, table, modules, keys_by_module),
        modules=modules,
        unmatched=tuple(key for key in table if key not in known),
    )


def _module(
    path: Path,
    table: Table,
    place: tuple[str, str],
    keys: Mapping[str, str],
    alphas: Mapping[str, float],
    header_alphas: Mapping[str, float],
) -> LoraModule:
    component, name = place
    if "down" not in keys or "up" not in keys:
        missing = "down" if "up" in keys else "up"
        raise ModelError(f"{path}: {next(iter(keys.values()))} has no matching {missing} weight.")
    down, up = keys["down"], keys["up"]
    down_shape, up_shape = table[down][1], table[up][1]
    if len(down_shape) < 2 or len(up_shape) < 2 or down_shape[0] != up_shape[1] or down_shape[0] == 0:
        raise ModelError(f"{path}: {down} {list(down_shape)} and {up} {list(up_shape)} differ in rank.")
    alpha = alphas.get(keys["alpha"]) if "alpha" in keys else header_alphas.get(component)
    return LoraModule(component, name, down, up, down_shape[0], alpha)


def _header_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return α by component from diffusers' header entry, which no other tool reads."""
    try:
        fields = json.loads(metadata.get(ADAPTER_METADATA_KEY, "{}"))
        return {key.removesuffix(".lora_alpha"): float(fields[key]) for key in fields if key.endswith(".lora_alpha")}
    except (ValueError, TypeError, AttributeError):
        return {}


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
    return "diffusers" if first.startswith(("unet.", "text_encoder")) else "peft"


def _is_token(table: Table) -> bool:
    if table.keys() == set(TOKEN_KEYS.values()):
        return True
    key, (_, shape) = next(iter(table.items()))
    return len(table) == 1 and len(shape) in (1, 2) and not split_key(key).part and "." not in key


def _family(
    metadata: Mapping[str, str], table: Table, modules: Sequence[LoraModule], places: Collection[tuple[str, str]]
) -> str:
    """Determine the family from the width of the text features, then from module names, then from the header."""
    if _is_token(table):
        width = next(iter(table.values()))[1][-1]
        return "sdxl" if len(table) > 1 else _FAMILY_BY_CONTEXT.get(width, "unknown")
    for module in modules:
        if module.component == UNET and module.path.endswith(_CROSS_ATTENTION_INPUTS):
            return _FAMILY_BY_CONTEXT.get(table[module.down][1][1], "unknown")
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
