"""What this machine has, and what it can train."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from echodistill_cli import __version__
from echodistill_cli.presets import PRESETS
from echodistill_cli.sources import is_cached

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface-hub", "safetensors", "pillow")

# GiB of device memory that a preset's defaults want: sums of weights and activations, not yet measured on a GPU.
_NEEDED_GIB = {"sd-turbo": 8.8}


@dataclass(frozen=True)
class Diagnosis:
    """Versions, devices, room and advice; `to_dict` gives plain values for JSON."""

    versions: dict[str, str]
    devices: dict[str, str]
    memory_gib: float
    disk_free_gib: float
    cache: str
    cached_models: dict[str, bool]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine; opens no socket."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    sources = {str(preset.settings["model"][role]) for preset in PRESETS.values() for role in ("student", "teacher")}
    return Diagnosis(
        versions=_versions(),
        devices=_devices(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        disk_free_gib=round(shutil.disk_usage(existing).free / 2**30, 1),
        cache=str(cache),
        cached_models={source: is_cached(source) for source in sorted(sources)},
        advice=tuple(_advice(name) for name in PRESETS),
    )


def _versions() -> dict[str, str]:
    versions = {"echodistill": __version__, "python": platform.python_version(), "system": platform.platform()}
    return versions | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _devices() -> dict[str, str]:
    devices = {
        "cpu": f"{psutil.cpu_count(logical=False) or psutil.cpu_count()} cores, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU, memory shared with the CPU"
    return devices


def _advice(preset: str) -> str:
    needed = _NEEDED_GIB.get(preset)
    if needed is None:
        return f"{preset}: no estimate"
    if torch.cuda.is_available():
        largest = (
            max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
        )
        if largest >= needed + 1:
            return f"{preset}: fits on this GPU (about {needed:g} GiB)"
        return f"{preset}: tight on this GPU (wants about {needed:g} GiB): --batch-size 1 --decoder tiny"
    total = psutil.virtual_memory().total / 2**30
    # The same weights in float32 take twice the room.
    if total >= 2 * needed:
        return f"{preset}: runs on this CPU, slowly (minutes per step): --discriminators teacher --decoder tiny"
    return f"{preset}: needs a GPU with about {needed:g} GiB; this machine has none"
