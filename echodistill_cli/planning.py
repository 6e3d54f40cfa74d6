"""Before a run: what it loads, downloads and needs, what fits a device, what this machine has."""

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
from echodistill_cli.config.build import PRESETS, build_config, config_to_dict
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
from echodistill_cli.models.sources import Download, downloads, is_cached, is_embedded, resolve, where
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


@dataclass(frozen=True)
class Plan:
    """What `train` would do with a configuration.

    Args:
        config: all settings of the run.
        photos: number of usable photos.
        warnings: about photos, and about settings without effect.
        models: where each model is, by its source.
        assumptions: what the run assumes about the models.
        downloads: bytes of each file that would be downloaded first; None if the size is not known.
        memory: on the device; None for models of unknown size.
        output_exists: the run folder exists already.
    """

    config: Config
    photos: int
    warnings: tuple[str, ...]
    models: Mapping[str, str]
    assumptions: tuple[str, ...]
    downloads: Mapping[str, int | None]
    memory: Estimate | None
    output_exists: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        memory = self.memory and {"gib": self.memory.total, "parts": dict(self.memory.parts)}
        return {
            "subject": self.config.subject,
            "photos": self.photos,
            "warnings": list(self.warnings),
            "models": dict(self.models),
            "assumptions": list(self.assumptions),
            "downloads": dict(self.downloads),
            "memory": memory,
            "steps": self.config.train.steps,
            "echo_from_step": self.config.echo.start,
            "output": str(self.config.output),
            "output_exists": self.output_exists,
            "config": config_to_dict(self.config),
        }


def plan_run(config: Config, photos: int, warnings: tuple[str, ...]) -> Plan:
    """Return what a run would do. Loads no model.

    Args:
        config: of the run.
        photos: number of usable photos.
        warnings: about photos and settings.
    """
    return Plan(
        config=config,
        photos=photos,
        warnings=warnings,
        models={source: where(source) for source, _, _ in sources_of(config)},
        assumptions=tuple(assumptions(config.model)),
        downloads={download.file: download.size for download in planned_downloads(config)},
        memory=expected_memory(config),
        output_exists=config.output.exists(),
    )


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
    """Return every file that a run would download first. Asks the hub for sizes unless offline."""
    model = config.model
    return [
        download
        for source, parts, revision in sources_of(config)
        for download in downloads(source, parts, variant=model.variant, revision=revision, offline=model.offline)
    ]


def expected_memory(config: Config) -> Estimate | None:
    """Return the device memory that a run needs; None for models of unknown size."""
    family = family_of(config.model)
    if family is None:
        return None
    dtype = pick_dtype(config.model.precision, pick_device(config.model.device))
    return estimate(config, family, half=dtype.itemsize == 2)


def fit_to_memory(build: Callable[[Mapping[str, Any]], Config], vram: str) -> MemoryPlan:
    """Return the settings that fit a device.

    Args:
        build: makes the configuration; takes the chosen settings as defaults below what a person set.
        vram: memory of the device in GiB, or "auto" for the device of the run.

    Raises:
        ConfigError: nothing fits, or `vram` is not a number.
        ModelError: the size of the model is not known.
    """
    config = build({})
    family = family_of(config.model)
    if family is None:
        raise ModelError(
            f"The memory that {config.model.student} needs is not known.",
            "Omit --vram, which supports models of the size of SD-Turbo and SDXL-Turbo.",
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
    raise ConfigError(f"--vram {text} is not a number.", "Use GiB, such as 8, 12, 16 or 24, or auto.")


def memory_lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield the chosen settings and the expected memory of a memory plan, a line each."""
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in plan.estimate.parts.items())
    yield f"Plan for {plan.budget:.1f} GiB: {_settings_line(plan)}"
    yield f"About {plan.estimate.total:.1f} GiB of device memory: {parts}"


def _settings_line(plan: MemoryPlan) -> str:
    texts = {key: ",".join(value) if isinstance(value, tuple) else str(value) for key, value in plan.settings.items()}
    return ", ".join(f"{key} = {text}" for key, text in texts.items())


def assumptions(model: ModelConfig) -> Iterator[str]:
    """Yield what a run assumes about its models: which are toys, and what single files do not say."""
    for preset in PRESETS.values():
        if is_embedded(model.student) and preset.settings["model"]["student"] == model.student:
            yield f"{model.student}: {preset.about}"
    for role in ("student", "teacher"):
        path = expanded(getattr(model, role))
        folder = getattr(model, "single_file_config" if role == "student" else "teacher_single_file_config")
        if not path.is_file() or path.suffix != ".safetensors" or folder:
            continue
        if getattr(model, f"{role}_prediction") == "auto" and prediction_in(path) is None:
            yield (
                f"{path.name} does not say what it predicts; noise (epsilon) is assumed. "
                f"For a 768-pixel SD 2 model: --set model.{role}_prediction=v_prediction"
            )


_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "huggingface-hub", "safetensors", "pillow")


@dataclass(frozen=True)
class Diagnosis:
    """What this machine has and can train.

    Args:
        versions: of this package, Python, the system and the libraries.
        devices: what each device is, by its name.
        memory_gib: of the machine.
        disk_free_gib: where models are cached.
        cache: the folder of cached models.
        cached_models: whether the models of each preset are in the cache.
        advice: a line per preset.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    memory_gib: float
    disk_free_gib: float
    cache: str
    cached_models: dict[str, bool]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Return versions, devices and memory of this machine, and which presets fit. Opens no socket."""
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
    """Return whether a preset fits this machine, and with which settings."""
    if PRESETS[preset].family is None:
        return (
            f"{preset}: runs on any machine in minutes, {PRESETS[preset].about}. "
            f"Try it: echodistill train PHOTOS --class-name dog --model {preset}"
        )
    build = functools.partial(build_config, preset, None, {"model.offline": True})
    device = pick_device("auto")
    machine = f"this machine's {device.type.upper()}"
    try:
        plan = fit_to_memory(build, "auto")
    except ConfigError as error:
        return f"{preset}: does not fit on {machine}. {error.message}"
    slow = ", slowly (minutes per step)" if device.type == "cpu" else ""
    needs = f"about {plan.estimate.total:.1f} GiB"
    return f"{preset} --vram auto: runs on {machine}{slow}, in {needs}: {_settings_line(plan)}"
