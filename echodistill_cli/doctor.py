"""What this machine has, and what it can train."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from echodistill_cli import __version__
from echodistill_cli.config.build import build_config
from echodistill_cli.config.catalogue import PRESETS
from echodistill_cli.errors import ConfigError
from echodistill_cli.models.load import pick_device
from echodistill_cli.models.sources import is_cached
from echodistill_cli.planning import shown, suit_device

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface-hub", "safetensors", "pillow")


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
    published = [preset.settings["model"] for preset in PRESETS.values() if preset.family]
    sources = {str(model[role]) for model in published for role in ("student", "teacher")}
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
    """Whether a preset fits here, and the settings with which it does."""
    if PRESETS[preset].family is None:
        return (
            f"{preset}: runs on any machine in minutes, {PRESETS[preset].about}. "
            f"Try it: echodistill train PHOTOS --class-name dog --model {preset}"
        )
    build = functools.partial(build_config, preset, None, {"model.offline": True})
    device = pick_device("auto")
    where = f"this machine's {device.type.upper()}"
    try:
        plan = suit_device(build, "auto")
    except ConfigError as error:
        return f"{preset}: does not fit on {where}. {error.message}"
    chosen = ", ".join(f"{key} = {shown(value)}" for key, value in plan.settings.items())
    slow = ", slowly (minutes per step)" if device.type == "cpu" else ""
    return f"{preset} --vram auto: runs on {where}{slow}, in about {plan.estimate.total:.1f} GiB: {chosen}"
