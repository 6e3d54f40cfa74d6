"""Before a run: what it loads, downloads and needs, what fits a device, what this machine has."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from echodistill_cli import __version__
from echodistill_cli.config.build import PRESETS, build_config, config_to_dict
from echodistill_cli.config.distilled import sampling_in_words
from echodistill_cli.config.families import check_index, check_same_kind
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.config.transformers import check_supported
from echodistill_cli.diffusion.text import check_token
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import check_folder, expanded, last_part
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.device import (
    PRECISIONS,
    devices,
    expected_memory,
    fit_to_memory,
    pick_device,
    pick_dtype,
    settings_line,
)
from echodistill_cli.models.downloads import family_of, planned_downloads, sources_of
from echodistill_cli.models.load import check_pair
from echodistill_cli.models.memory import Estimate
from echodistill_cli.models.single_file import prediction_in
from echodistill_cli.models.sources import UnreachableError, is_cached, is_embedded, missing_parts, where


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
        device: of the run, such as "cpu" where the setting is "auto".
        precision: of the frozen weights, such as "fp32" where the setting is "auto".
        output_exists: the run folder exists already.
    """

    config: Config
    photos: int
    warnings: tuple[str, ...]
    models: Mapping[str, str]
    assumptions: tuple[str, ...]
    downloads: Mapping[str, int | None]
    memory: Estimate | None
    device: str
    precision: str
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
            "device": self.device,
            "precision": self.precision,
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
    device = pick_device(config.model.device)
    return Plan(
        config=config,
        photos=photos,
        warnings=warnings,
        models={source.name: where(source.name) for source in sources_of(config)},
        assumptions=tuple(assumptions(config.model)),
        downloads=dict(planned_downloads(config.model, sources_of(config))),
        memory=expected_memory(config),
        device=str(device),
        precision=PRECISIONS[pick_dtype(config.model.precision, device)],
        output_exists=config.output.exists(),
    )


def check_settings(config: Config) -> None:
    """Check all that can be wrong with a run before its models are loaded; opens no connection.

    Raises:
        ConfigError: the token, device, resolution or output folder cannot be used.
        ModelError: the distillation LoRA or a model on this machine is damaged or not supported.
    """
    concept, is_learned = config.concept, config.text.form == "token"
    pick_device(config.model.device)
    check_folder(config.output)
    for source in (config.model.student, config.model.teacher):
        check_index(source)
    check_same_kind(config.model.student, config.model.teacher)
    family = family_of(config.model)
    check_supported(config, family)
    if config.model.student_lora:
        read_header(Path(config.model.student_lora))
    local = replace(config.model, offline=True)
    if any(missing_parts(*source) for source in sources_of(config)):
        check_token(None, concept.token, concept.class_name, learned=True)
        return
    try:
        tokenizers = check_pair(local)
    except UnreachableError:  # the vocabulary or configuration of a single file is not here yet
        return
    check_token(None if family.is_flow else tokenizers[0], concept.token, concept.class_name, learned=is_learned)


def assumptions(model: ModelConfig) -> Iterator[str]:
    """Yield what a run assumes about its models: toys, the student's steps, what single files do not say."""
    if model.student_timesteps:
        yield f"{last_part(model.student_lora or model.student)}: {sampling_in_words(model)}"
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
        devices=devices(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        disk_free_gib=round(shutil.disk_usage(existing).free / 2**30, 1),
        cache=str(cache),
        cached_models={source: is_cached(source) for source in sorted(sources)},
        advice=tuple(_advice(name) for name in PRESETS),
    )


def _versions() -> dict[str, str]:
    versions = {"echodistill": __version__, "python": platform.python_version(), "system": platform.platform()}
    return versions | {name: importlib.metadata.version(name) for name in _PACKAGES}


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
    side, needs = build({}).model.resolution, f"about {plan.estimate.total:.1f} GiB"
    return f"{preset} --vram auto: runs on {machine} at {side} pixels{slow}, in {needs}: {settings_line(plan)}"
