"""What a run would load, fetch and need, before anything of it is done."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from echodistill_cli import __version__
from echodistill_cli.config.build import build_config
from echodistill_cli.config.catalogue import PRESETS
from echodistill_cli.config.families import FAMILIES, Family, family_of_width
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.files import expanded
from echodistill_cli.models.device import (
    PRECISIONS,
    Estimate,
    MemoryPlan,
    backbones,
    estimate,
    memory_gib,
    pick_device,
    pick_dtype,
    plan_memory,
)
from echodistill_cli.models.single_file import prediction_in, shipped_configuration
from echodistill_cli.models.sources import Download, downloads, is_cached, is_embedded, resolve
from echodistill_cli.models.vision import IMAGE_BACKBONES

_UNET_PARTS = ("unet", "scheduler")


def family_of(model: ModelConfig) -> Family | None:
    """Return the family of a published-size student; None for toy models and for weights that are not here yet."""
    known = {
        str(preset.settings["model"][role]): FAMILIES[preset.family]
        for preset in PRESETS.values()
        for role in ("student", "teacher")
        if preset.family
    }
    if model.student in known:
        return known[model.student]
    try:
        folder = resolve(model.student, ("unet",), revision=model.student_revision, offline=True)
        if folder.is_file():
            folder = Path(model.single_file_config or shipped_configuration(folder))
        settings = json.loads((folder / "unet" / "config.json").read_text())
    except (ModelError, OSError):
        return None
    return family_of_width(settings.get("cross_attention_dim"))


def sources_of(config: Config) -> Iterator[tuple[str, tuple[str, ...], str | None]]:
    """Every model that a run loads: source, parts, revision."""
    model, family = config.model, family_of(config.model) or FAMILIES["sd"]
    yield model.student, (*_UNET_PARTS, *family.parts), model.student_revision
    yield model.teacher, _UNET_PARTS, model.teacher_revision
    if model.vae:
        yield model.vae, ("",), None
    if model.decoder == "tiny":
        yield model.tiny_decoder or family.tiny_decoder, ("",), None
    for name in sorted(backbones(config)):
        yield IMAGE_BACKBONES.get(name, name), ("",), None


def planned_downloads(config: Config) -> list[Download]:
    """Every file that a run would fetch first; the hub is asked for sizes unless this is offline."""
    model = config.model
    return [
        download
        for source, parts, revision in sources_of(config)
        for download in downloads(source, parts, variant=model.variant, revision=revision, offline=model.offline)
    ]


def expected_memory(config: Config) -> Estimate | None:
    """What a run needs on its device; None for models of no known size."""
    family = family_of(config.model)
    if family is None:
        return None
    dtype = pick_dtype(config.model.precision, pick_device(config.model.device))
    return estimate(config, family, half=dtype.itemsize == 2)


def suit_device(build: Callable[[Mapping[str, Any]], Config], vram: str) -> MemoryPlan:
    """The settings that fit a device of `vram` GiB; "auto" for the device that the run is for.

    Args:
        build: the configuration, with some settings as defaults under whatever a person set.

    Raises:
        ConfigError: nothing fits. ModelError: the model's size is not known.
    """
    config = build({})
    family = family_of(config.model)
    if family is None:
        raise ModelError(
            f"{config.model.student}: how much memory it needs is not known.",
            "Do without --vram: it knows models of the size of SD-Turbo and SDXL-Turbo.",
        )
    budget = None if vram == "auto" else _gib(vram)
    device = pick_device(config.model.device)
    precision = PRECISIONS[pick_dtype("auto", device)]
    # A CPU computes in bf16 slowly, but may have no room for float32; a number may be meant for another machine.
    if device.type == "cpu" or (budget is not None and precision == "fp32"):
        precision = "bf16"
    return plan_memory(build, family, memory_gib(device) if budget is None else budget, precision)


def _gib(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    raise ConfigError(f"--vram {text}: it takes a number of GiB, such as 8, 12, 16 or 24, or auto.")


def memory_lines(plan: MemoryPlan) -> Iterator[str]:
    """What a plan chose and expects, for people."""
    chosen = ", ".join(f"{key} = {shown(value)}" for key, value in plan.settings.items())
    yield f"Plan for {plan.budget:.1f} GiB: {chosen}"
    yield estimate_line(plan.estimate)


def estimate_line(expected: Estimate) -> str:
    """An estimate for people, such as "About 7.2 GiB: UNets 3.2, …"."""
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in expected.parts.items())
    return f"About {expected.total:.1f} GiB of device memory: {parts}"


def assumptions(model: ModelConfig) -> Iterator[str]:
    """What people should know of the models before anything starts: what is a toy, what single files do not say."""
    for preset in PRESETS.values():
        if is_embedded(model.student) and preset.settings["model"]["student"] == model.student:
            yield f"{model.student}: {preset.about}"
    for role in ("student", "teacher"):
        path = expanded(getattr(model, role))
        named = getattr(model, "single_file_config" if role == "student" else "teacher_single_file_config")
        if not path.is_file() or path.suffix != ".safetensors" or named:
            continue
        if getattr(model, f"{role}_prediction") == "auto" and prediction_in(path) is None:
            yield (
                f"{path.name} does not say what it predicts; taken as noise (epsilon). "
                f"For a 768-pixel SD 2 model: --{role}-prediction v_prediction"
            )


def shown(value: object) -> str:
    """A setting's value for people."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


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
