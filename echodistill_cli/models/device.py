"""How much device memory a run needs, and which settings fit into a given amount. Arithmetic only; no torch here.

Weights are parameter counts times bytes. Activations are those that autograd keeps for one 512-pixel sample in bf16,
measured operation by operation on the true architectures without their weights; of the sliced Wasserstein distance what
the sums then lacked of a GPU's peak (README).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from echodistill_cli.config.families import FAMILIES, Family, Size
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device of a configured name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: there is no such device here.", "Try --device auto.") from error
    return device


def memory_gib(device: torch.device) -> float:
    """All memory of a device in GiB; of the CPU, what is free of it."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / _GIB
    return float(psutil.virtual_memory().available) / _GIB


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen weights; "auto" is bf16 where this CUDA device has it, fp16 on older ones, else fp32."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        # Older cards take bf16 too, but emulate it, many times slower than the fp16 that they have.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


_GIB = 2**30


VAE, TINY_DECODER = 83_653_863, 2_445_063
BACKBONES: Mapping[str, int] = {"dino": 21_665_664, "dinov2": 304_368_640, "clip": 303_966_208}
# GiB per sample; the first two grow with the picture, the backbones see 224 pixels whatever it is.
_DECODER_ACTIVATIONS = {"full": 2.81, "tiny": 0.27}
_SLICED_WASSERSTEIN = 1.45  # always in float32, and sorted beside indices of 8 bytes
_BACKBONE_ACTIVATIONS = {"dino": 0.018, "dinov2": 0.119, "clip": 0.166}
_TEACHER_CRITIC = 0.5  # the half of the UNet that it runs
_BYTES_PER_TRAINED = 16  # weight, gradient and AdamW's two moments in float32
_USABLE = 0.95  # of a device's memory: a desktop, or another program, has the rest
_BASE = 1.0  # the device's own libraries, and what allocators leave unused


@dataclass(frozen=True)
class Estimate:
    """GiB of device memory by what it is for."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The settings chosen for a budget, by dotted key, and what a run with them is expected to need."""

    settings: Mapping[str, Any]
    estimate: Estimate
    budget: float


# From the most faithful to the method down; each is tried with what a person set held fixed.
_LADDER: tuple[Mapping[str, Any], ...] = (
    {"model.decoder": "full", "train.batch_size": 2},
    {"model.decoder": "tiny"},
    {"train.batch_size": 1},
    {"critic.discriminators": ("dino", "clip")},
    {"train.gradient_checkpointing": True},
    {"model.offload": True},
)


def estimate(config: Config, family: Family, *, half: bool) -> Estimate:
    """What a run with this configuration needs.

    Args:
        half: the frozen weights are bf16 or fp16, and not float32.
    """
    size, bytes_each = family.size, 2 if half else 4
    text_trained = size.text_adapter * config.text.rank if config.text.form == "lora" else 0
    trained = 2 * size.adapter[config.adapter.targets] * config.adapter.rank + text_trained
    # These VAEs overflow in fp16 and are then kept in float32.
    vae = VAE * (4 if config.model.precision == "fp16" else bytes_each)
    critics = sum(BACKBONES.get(name, BACKBONES["clip"]) for name in backbones(config))
    weights = {
        "UNets": (1 if config.model.offload or config.model.student_lora else 2) * size.unet * bytes_each,
        "text encoders": size.text * bytes_each,
        "VAE": vae + (TINY_DECODER * bytes_each if config.model.decoder == "tiny" else 0),
        "critics": critics * bytes_each,
        "trained": trained * _BYTES_PER_TRAINED,
    }
    distilled = Path(config.model.student_lora) if config.model.student_lora else None
    if distilled and distilled.is_file():  # as large as it is on the disk, where these files are in half precision
        weights["student LoRA"] = distilled.stat().st_size
    parts = {name: count / _GIB for name, count in weights.items()}
    return Estimate(parts | {"activations": _activations(config, size, bytes_each / 2), "libraries": _BASE})


def _activations(config: Config, size: Size, scale: float) -> float:
    """GiB at the peak, which is in the student's step: its UNet, the decoder and the critics in one graph."""
    unet = size.checkpointed if config.train.gradient_checkpointing else size.activations[config.adapter.targets]
    decoder = _DECODER_ACTIVATIONS[config.model.decoder]
    if config.model.decoder == "full" and config.model.precision == "fp16":
        decoder *= 2
    latent_critic = "teacher" in config.critic.discriminators and bool(config.loss.adversarial)
    by_area = (unet + decoder + latent_critic * _TEACHER_CRITIC * size.activations["cross-kv"]) * scale
    by_area += _SLICED_WASSERSTEIN if config.loss.sliced_wasserstein else 0
    fixed = sum(_BACKBONE_ACTIVATIONS.get(name, _BACKBONE_ACTIVATIONS["clip"]) for name in backbones(config)) * scale
    return config.train.batch_size * (by_area * (config.model.resolution / 512) ** 2 + fixed)


def backbones(config: Config) -> set[str]:
    """The image encoders that are loaded, each once."""
    names = set(config.critic.discriminators) if config.loss.adversarial else set()
    if config.loss.identity or config.echo.start is not None:
        names.add(config.critic.identity)
    return names - {"teacher", "none"}


def plan_memory(
    build: Callable[[Mapping[str, Any]], Config], family: Family, budget: float, precision: str
) -> MemoryPlan:
    """The first settings on the way down that fit.

    Args:
        build: the configuration with some settings as defaults, under whatever a person set.
        budget: GiB. precision: of the frozen weights where a person named none: bf16, fp16 or fp32.

    Raises:
        ConfigError: none fits.
    """
    settings: dict[str, Any] = {"model.precision": precision}
    for rung in _LADDER:
        settings |= rung
        config = build(settings)
        chosen = precision if config.model.precision == "auto" else config.model.precision
        expected = estimate(config, family, half=chosen != "fp32")
        if expected.total <= budget * _USABLE:
            return MemoryPlan(settings, expected, budget)
    smallest = min(FAMILIES.values(), key=lambda other: other.size.unet)
    smaller = "" if family is smallest else f", or --model {smallest.preset}"
    raise ConfigError(
        f"No plan for this model fits into {budget:.1f} GiB: the smallest needs about {expected.total:.1f}.",
        f"Try a smaller --resolution{smaller}.",
    )


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: on CUDA by tensors, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
