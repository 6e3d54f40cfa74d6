"""Devices and precisions, how much memory a run needs, and which settings fit into a given amount.

An estimate is arithmetic. Weights are parameter counts times bytes. Activations are the GiB that autograd keeps for one
512-pixel sample in bf16, measured operation by operation on the published architectures without their weights. For the
sliced Wasserstein distance they include what these sums lacked compared with a GPU's peak (README).
"""

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
from echodistill_cli.config.family import VAE as VAE
from echodistill_cli.config.family import Family
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.config.warnings import parse_gib
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.errors import ConfigError, ModelError, counted
from echodistill_cli.files import expanded
from echodistill_cli.lora.transformer_keys import is_published
from echodistill_cli.models.downloads import backbones
from echodistill_cli.models.single_file import shipped_configuration
from echodistill_cli.models.sources import missing_parts, resolve

DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS: Mapping[torch.dtype, str] = {dtype: precision for precision, dtype in DTYPES.items()}
TINY_DECODER = 2_445_063  # parameters
BACKBONES: Mapping[str, int] = {"dino": 21_665_664, "dinov2": 304_368_640, "clip": 303_966_208}
# GiB per sample. The first two grow with the image; the backbones always see 224 pixels.
_TINY_ACTIVATIONS = 0.27
_SLICED_WASSERSTEIN = 0.29  # always in float32, and sorted together with indices of 8 bytes
# A UNet that runs the libraries' own code keeps more for the backward pass: with LoRA on all attentions, this much.
_PLAIN = 1.65
_BACKBONE_ACTIVATIONS = {"dino": 0.018, "dinov2": 0.119, "clip": 0.166}
_TEACHER_CRITIC = 0.5  # the half of the UNet that this critic runs
_BYTES_PER_TRAINED = 16  # weight, gradient and AdamW's two moments in float32
_USABLE = 0.95  # fraction of a device's memory; a desktop or another program has the rest
_BASE = 1.0  # the device's own libraries, and what allocators leave unused
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


@dataclass(frozen=True)
class Estimate:
    """Device memory in GiB, by purpose."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())


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


def estimate(config: Config, family: Family, *, half: bool) -> Estimate:
    """Estimate the device memory of a run.

    Args:
        config: the run's settings.
        family: family of its models, at the published size.
        half: whether the frozen weights are bf16 or fp16 instead of float32.
    """
    size, bytes_each = family.size, 2 if half else 4
    text_trained = size.text_adapter * config.text.rank if config.text.form == "lora" else 0
    trained = 2 * size.adapter[config.adapter.targets] * config.adapter.rank + text_trained
    # These VAEs overflow in fp16, so they stay in float32.
    vae = size.vae * (4 if config.model.precision == "fp16" else bytes_each)
    is_tiny = config.model.decoder == "tiny"  # then the VAE leaves the device once the photos are encoded
    critics = sum(BACKBONES.get(name, BACKBONES["clip"]) for name in backbones(config))
    weights = {
        "UNets": (1 if config.model.offload or config.model.student_lora else 2) * size.unet * bytes_each,
        "text encoders": size.text * bytes_each,
        "VAE": TINY_DECODER * bytes_each if is_tiny else vae,
        "critics": critics * bytes_each,
        "trained": trained * _BYTES_PER_TRAINED,
    }
    distillation = Path(config.model.student_lora) if config.model.student_lora else None
    if distillation and distillation.is_file():  # these files are in half precision, on disk and in memory
        weights["student LoRA"] = distillation.stat().st_size
    parts = {name: count / _GIB for name, count in weights.items()}
    return Estimate(parts | {"activations": _activations(config, family, bytes_each / 2), "libraries": _BASE})


def _activations(config: Config, family: Family, scale: float) -> float:
    """Return the peak in GiB. It is in the student's step: UNet, decoder and critics are in one graph."""
    size = family.size
    unet = size.checkpointed if config.train.gradient_checkpointing else size.activations[config.adapter.targets]
    plain = not family.is_flow and (config.model.offload or config.model.student_lora)
    if plain and not config.train.gradient_checkpointing:
        unet *= _PLAIN
    decoder = size.decoder if config.model.decoder == "full" else _TINY_ACTIVATIONS
    if not _trains_on_pixels(config):
        decoder = 0.0  # only images of the echo and previews are decoded, without gradient
    if config.model.decoder == "full" and config.model.precision == "fp16":
        decoder *= 2
    latent_critic = "teacher" in config.critic.discriminators and bool(config.loss.adversarial)
    critic = _TEACHER_CRITIC * size.activations["cross-kv"] if latent_critic else 0.0
    by_area = (unet + decoder + critic) * scale
    by_area += _SLICED_WASSERSTEIN if config.loss.sliced_wasserstein else 0
    fixed = sum(_BACKBONE_ACTIVATIONS.get(name, _BACKBONE_ACTIVATIONS["clip"]) for name in backbones(config)) * scale
    return config.train.batch_size * (by_area * (config.model.resolution / 512) ** 2 + fixed)


def _trains_on_pixels(config: Config) -> bool:
    """Return whether a loss of the student is computed on decoded images."""
    critics = set(config.critic.discriminators) - {"teacher"} if config.loss.adversarial else set()
    identity = config.loss.identity and config.critic.identity != "none"
    return bool(critics or identity or config.loss.sliced_wasserstein)


def plan_memory(
    build: Callable[[Mapping[str, Any]], Config], family: Family, budget: float, precision: str
) -> MemoryPlan:
    """Return the settings with the fewest savings that fit a budget.

    Args:
        build: makes a configuration from settings that nobody chose; what a person set stays.
        family: family of the models, at the published size.
        budget: GiB.
        precision: precision of the frozen weights if nobody chose one: bf16, fp16 or fp32.

    Raises:
        ConfigError: nothing fits.
    """
    settings: dict[str, Any] = {"model.precision": precision}
    for saving in (_BEFORE_SAVINGS, *(saving for _flag, saving in _savings(family))):
        settings |= saving
        config = build(settings)
        in_use = precision if config.model.precision == "auto" else config.model.precision
        expected = estimate(config, family, half=in_use != "fp32")
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
    in_fp32 = [("--precision bf16", {"model.precision": "bf16"})] if config.model.precision == "fp32" else []
    for flag, saving in (*in_fp32, *_savings(family_of(config.model))):
        try:
            smaller = _with_settings(config, saving)
        except ConfigError:  # it contradicts another setting
            continue
        if _relative_size(smaller) < _relative_size(config):
            return f"Try {flag}."
    return "Try a smaller --resolution, or a device with more memory."


def _with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def _relative_size(config: Config) -> float:
    """Return an estimate that compares settings; which family it is for does not matter."""
    return estimate(config, FAMILIES["sd"], half=config.model.precision != "fp32").total


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
    dtype = pick_dtype(config.model.precision, pick_device(config.model.device))
    return estimate(config, family, half=dtype.itemsize == 2)


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
    return plan_memory(build, family, memory_gib(device) if budget is None else budget, precision)


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
