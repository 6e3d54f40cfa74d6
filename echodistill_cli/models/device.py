"""Devices and precisions, and which settings fit into a given amount of memory."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from echodistill_cli.config.build import PRESETS
from echodistill_cli.config.families import FAMILIES, family_of_source, family_of_width, read_json, settings_of
from echodistill_cli.config.family import Family
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.config.warnings import parse_gib
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.errors import ConfigError, ModelError, counted
from echodistill_cli.files import expanded
from echodistill_cli.lora.transformer_keys import is_published
from echodistill_cli.models.memory import Estimate, estimate
from echodistill_cli.models.single_file import shipped_configuration
from echodistill_cli.models.sources import missing_parts, resolve

DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS: Mapping[torch.dtype, str] = {dtype: precision for precision, dtype in DTYPES.items()}
_WORTH_A_SETTING = 0.05  # GiB
_USABLE = 0.95  # fraction of a device's memory; a desktop or another program has the rest
_GIB = 2**30
# What saves memory, from the most faithful to the method down: the flag to type, and the settings by dotted key.
_SAVINGS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("--decoder tiny", {"model.decoder": "tiny"}),
    ("--batch-size 1", {"train.batch_size": 1}),
    ("--discriminators dino,clip", {"critic.discriminators": ("dino", "clip")}),
    ("--gradient-checkpointing", {"train.gradient_checkpointing": True}),
    ("--set model.offload=true", {"model.offload": True}),
)
_BEFORE_SAVINGS: Mapping[str, Any] = {"model.decoder": "full", "train.batch_size": 2}


def pick_device(name: str) -> torch.device:
    """Return the device with a configured name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} does not exist on this machine.", "Try --device auto.") from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen weights.

    On CUDA, "auto" is bf16 if the GPU supports it natively, else fp16. On other devices it is fp32.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        # Older cards accept bf16 too, but emulate it, many times slower than their native fp16.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def memory_gib(device: torch.device) -> float:
    """Return the memory of a device in GiB: all of it, or what is available on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / _GIB
    return float(psutil.virtual_memory().available) / _GIB


def devices() -> dict[str, str]:
    """Return what each device of this machine is, by its name."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    names = {"cpu": f"{counted(cores, 'core')}, {counted(torch.get_num_threads(), 'thread')}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        names["mps"] = "Apple GPU, memory shared with the CPU"
    return names


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far in MiB: of tensors on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def free_gib(device: torch.device) -> float | None:
    """Return the free memory of a GPU in GiB; None for a device that shares the system's memory."""
    return torch.cuda.mem_get_info(device)[0] / _GIB if device.type == "cuda" else None


def has_own_memory(device: torch.device) -> bool:
    """Return whether a device's memory is not the machine's. The meta device stands for a GPU."""
    return device.type in ("cuda", "meta")


@dataclass(frozen=True)
class MemoryPlan:
    """Settings that fit a memory budget.

    Args:
        settings: by dotted key.
        estimate: memory that a run with these settings needs.
        budget: GiB.
    """

    settings: Mapping[str, Any]
    estimate: Estimate
    budget: float


def plan_memory(
    build: Callable[[Mapping[str, Any]], Config], family: Family, budget: float, precision: str, *, on_gpu: bool = True
) -> MemoryPlan:
    """Return the settings with the fewest savings that fit a budget; what saves nothing is left out.

    Args:
        build: makes a configuration from settings that nobody chose; what a person set stays.
        family: family of the models, at the published size.
        budget: GiB.
        precision: precision of the frozen weights if nobody chose one: bf16, fp16 or fp32.
        on_gpu: as in `estimate`.

    Raises:
        ConfigError: nothing fits.
    """

    def needed(settings: Mapping[str, Any]) -> Estimate:
        config = build(settings)
        in_use = precision if config.model.precision == "auto" else config.model.precision
        return estimate(config, family, half=in_use != "fp32", on_gpu=on_gpu)

    settings: dict[str, Any] = {"model.precision": precision, **_BEFORE_SAVINGS}
    expected = needed(settings)
    for saving in ({}, *(saving for _flag, saving in _savings(family))):
        saved = needed({**settings, **saving})
        if expected.total - saved.total >= _WORTH_A_SETTING:
            settings, expected = {**settings, **saving}, saved
        if expected.total <= budget * _USABLE:
            return MemoryPlan(settings, expected, budget)
    smallest = min(FAMILIES.values(), key=lambda other: other.size.unet)
    smaller = "" if family is smallest else f", or --model {smallest.preset}"
    raise ConfigError(
        f"This model does not fit into {budget:.1f} GiB: the smallest plan needs about {expected.total:.1f} GiB.",
        f"Try a smaller --resolution{smaller}.",
    )


def _savings(family: Family | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the savings that a family has; None for a toy, which is of SD's family."""
    for flag, saving in _SAVINGS:
        if family is None or family.tiny_decoder or "model.decoder" not in saving:
            yield flag, saving


def next_saving(config: Config) -> str:
    """Return the next setting to try after a run was out of memory, as an instruction.

    A saving counts only if it makes this run smaller: offloading, for example, does nothing with one shared base model.
    """
    family = family_of(config.model)

    def size(config: Config) -> float:
        known = family or FAMILIES["sd"]  # a toy's plan compares settings as well
        return estimate(config, known, half=config.model.precision != "fp32").total

    in_fp32 = [("--precision bf16", {"model.precision": "bf16"})] if config.model.precision == "fp32" else []
    for flag, saving in (*in_fp32, *_savings(family)):
        try:
            smaller = _with_settings(config, saving)
        except ConfigError:  # it contradicts another setting
            continue
        if size(config) - size(smaller) >= _WORTH_A_SETTING:
            return f"Try {flag}."
    return "Try a smaller --resolution, or a device with more memory."


def _with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def family_of(model: ModelConfig) -> Family | None:
    """Return the family of a published-size student; None for toy models and weights not yet downloaded."""
    known = {
        str(preset.settings["model"][role]): FAMILIES[preset.family]
        for preset in PRESETS.values()
        for role in ("student", "teacher")
        if preset.family
    }
    if model.student in known:
        return known[model.student]
    family = family_of_source(model.student)
    if family and family.is_flow:
        return family if is_published(family.name, settings_of(model.student, family.denoiser) or {}) else None
    try:
        folder = resolve(model.student, ("unet",), revision=model.student_revision, offline=True)
        if folder.is_file():
            folder = Path(model.single_file_config or shipped_configuration(folder))
        settings = read_json(folder / "unet" / "config.json")
    except ModelError:
        return None
    return family_of_width(settings.get("cross_attention_dim"))


def expected_memory(config: Config) -> Estimate | None:
    """Return the device memory that a run needs; None for models of unknown size."""
    family = family_of(config.model)
    if family is None:
        return None
    device = pick_device(config.model.device)
    half = pick_dtype(config.model.precision, device).itemsize == 2
    # Half precision that no CPU was named for is meant for a GPU elsewhere, as `fit_to_memory` plans it.
    return estimate(
        config, family, half=half, on_gpu=has_own_memory(device) or (half and config.model.device == "auto")
    )


def fit_to_memory(build: Callable[[Mapping[str, Any]], Config], vram: str) -> MemoryPlan:
    """Return the settings that fit a device.

    Args:
        build: makes the configuration; takes the chosen settings as defaults below what a person set.
        vram: memory of the device in GiB, or "auto" for the device of the run.

    Raises:
        ConfigError: nothing fits, or `vram` is not a number.
        ModelError: there is no such model, or its size is not known.
    """
    config = build({})
    family = family_of(config.model)
    if family is None:
        missing_parts(config.model.student, ())  # a misspelled path is the fault, not the size
        if expanded(config.model.student).is_file() and not config.model.single_file_config:
            shipped_configuration(expanded(config.model.student))  # says what is wrong with the file
        raise ModelError(
            f"The memory that {config.model.student} needs is not known.",
            "Omit --vram, which supports models of the size of SD-Turbo and SDXL-Turbo.",
        )
    budget = parse_gib(vram)
    device = pick_device(config.model.device)
    precision = PRECISIONS[pick_dtype("auto", device)]
    # A CPU computes in bf16 slowly, but may have no room for float32; a number may be meant for another machine.
    if device.type == "cpu" or (budget is not None and precision == "fp32"):
        precision = "bf16"
    on_gpu = has_own_memory(device) or (budget is not None and config.model.device == "auto")
    return plan_memory(build, family, memory_gib(device) if budget is None else budget, precision, on_gpu=on_gpu)


def memory_lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield the chosen settings and the expected memory of a memory plan, a line each."""
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in plan.estimate.parts.items())
    yield f"Plan for {plan.budget:.1f} GiB: {settings_line(plan)}"
    yield f"About {plan.estimate.total:.1f} GiB of device memory: {parts}"


def settings_line(plan: MemoryPlan) -> str:
    """Return the chosen settings of a memory plan in one line."""
    texts = {key: ",".join(value) if isinstance(value, tuple) else str(value) for key, value in plan.settings.items()}
    return ", ".join(f"{key} = {text}" for key, text in texts.items())


def alternate_on_device(pair: ModelPair) -> None:
    """Keep only the active UNet's frozen weights on the device; the other UNet's wait on the CPU."""
    pair.alternating = True
    roles = (pair.student, pair.teacher)
    for role, other in (roles, roles[::-1]):
        exchange = functools.partial(_exchange, role.unet, other.unet, pair.device)
        role.unet.register_forward_pre_hook(lambda _unet, _inputs, exchange=exchange: exchange())
    _exchange(pair.student.unet, pair.teacher.unet, pair.device)


def _exchange(active: Any, idle: Any, device: torch.device) -> None:
    """Move frozen weights; adapters stay on the device, because the optimizer holds them."""
    for unet, place in ((idle, torch.device("cpu")), (active, device)):
        for tensor in (*unet.parameters(), *unet.buffers()):
            if not tensor.requires_grad and tensor.device.type != place.type:
                tensor.data = tensor.data.to(place)
