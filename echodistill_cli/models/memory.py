"""How much device memory a run needs, and what it does to need less.

An estimate is arithmetic. Weights are parameter counts times bytes. Activations are the GiB that autograd keeps for one
512-pixel sample in bf16, measured operation by operation on the published architectures without their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echodistill_cli.config.family import Family
from echodistill_cli.config.schema import Config
from echodistill_cli.models.downloads import backbones

TINY_DECODER = 2_445_063  # parameters
BACKBONES: Mapping[str, int] = {"dino": 21_665_664, "dinov2": 304_368_640, "clip": 303_966_208}
# GiB per sample. The first two grow with the image; the backbones always see 224 pixels.
_TINY_ACTIVATIONS = 0.27
_SLICED_WASSERSTEIN = 0.29  # always in float32, and sorted together with indices of 8 bytes
# A UNet that runs the libraries' own code keeps more for the backward pass: with LoRA on all attentions, this much.
_PLAIN = 1.65
_BACKBONE_ACTIVATIONS = {"dino": 0.018, "dinov2": 0.119, "clip": 0.166}
_TEACHER_CRITIC = 0.5  # the half of the UNet that this critic runs
_BYTES_PER_TRAINED = 12  # weight and AdamW's two moments in float32; gradients are freed before the next graph
_BYTES_PER_LORA = 3  # copies in half precision that a pass computes with; activations include those of rank 16
_BASE = 1.0  # the device's own libraries, and what allocators leave unused
_GIB = 2**30


def lets_encoders_wait(config: Config) -> bool:
    """Return whether image encoders wait in the machine's memory between their uses by a GPU.

    A full decoder shows that memory is not scarce. Compiled models may keep the addresses of their weights.
    """
    return config.model.decoder == "tiny" and config.train.compile == "off"


def builds_graph_last(config: Config) -> bool:
    """Return whether the student's graph is built when the losses' gradient is known, by a second pass.

    With one UNet at a time on the device it has to be. With replays the second pass is a fortieth of a step.
    """
    return config.model.offload or (config.model.decoder == "tiny" and bool(config.replays))


@dataclass(frozen=True)
class Estimate:
    """Device memory in GiB, by purpose."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self.parts.values())


def estimate(config: Config, family: Family, *, half: bool, on_gpu: bool = True) -> Estimate:
    """Estimate the device memory of a run.

    Args:
        config: the run's settings.
        family: family of its models, at the published size.
        half: whether the frozen weights are bf16 or fp16 instead of float32.
        on_gpu: whether what is not needed can wait in the machine's memory.
    """
    size, bytes_each = family.size, 2 if half else 4
    text_trained = size.text_adapter * config.text.rank if config.text.form == "lora" else 0
    trained = 2 * size.adapter[config.adapter.targets] * config.adapter.rank + text_trained
    # These VAEs overflow in fp16, so they stay in float32.
    vae = size.vae * (4 if config.model.precision == "fp16" else bytes_each)
    decoder = TINY_DECODER * bytes_each if config.model.decoder == "tiny" else 0
    waits = on_gpu and lets_encoders_wait(config)
    encoders = {name: BACKBONES.get(name, BACKBONES["clip"]) * bytes_each / _GIB for name in backbones(config)}
    at_the_peak, activations = _peak(config, family, bytes_each / 2, encoders if waits else {})
    weights = {
        "UNets": (1 if config.model.offload or config.model.student_lora else 2) * size.unet * bytes_each,
        "text encoders": size.text * bytes_each,
        # A VAE beside a tiny decoder leaves a GPU once the photos are encoded.
        "VAE": decoder if decoder and on_gpu else decoder + vae,
        "critics": 0,
        "trained": trained * _BYTES_PER_TRAINED,
    }
    distillation = Path(config.model.student_lora) if config.model.student_lora else None
    if distillation and distillation.is_file():  # these files are in half precision, on disk and in memory
        weights["student LoRA"] = distillation.stat().st_size
    parts = {name: count / _GIB for name, count in weights.items()}
    parts["critics"] = at_the_peak if waits else sum(encoders.values())
    return Estimate(parts | {"activations": activations, "libraries": _BASE})


def _peak(config: Config, family: Family, scale: float, waiting: Mapping[str, float]) -> tuple[float, float]:
    """Return the GiB of waiting image encoders and of what autograd keeps, at a step's peak.

    The peak is where the losses of images are computed, or where a UNet's graph is whole. Both come together unless the
    student's graph is built last.

    Args:
        config: the run's settings.
        family: of its models.
        scale: size of the frozen weights' numbers, relative to half precision.
        waiting: GiB of the weights of each image encoder that waits.
    """
    size, batch, area = family.size, config.train.batch_size, (config.model.resolution / 512) ** 2
    largest = _BACKBONE_ACTIVATIONS["clip"]
    kept = {name: batch * scale * _BACKBONE_ACTIVATIONS.get(name, largest) for name in backbones(config)}
    # One encoder at a time, and none beside the sliced Wasserstein distance.
    encoder = max(((waiting.get(name, 0.0), gib) for name, gib in kept.items()), key=sum, default=(0.0, 0.0))
    distance = (0.0, batch * area * _SLICED_WASSERSTEIN if config.loss.sliced_wasserstein else 0.0)
    weights, of_images = max(encoder, distance, key=sum)
    latent_critic = "teacher" in config.critic.discriminators and bool(config.loss.adversarial)
    critic = _TEACHER_CRITIC * size.activations["cross-kv"] if latent_critic else 0.0
    of_images += batch * area * scale * (_decoder(config, family) + critic)
    unet = batch * area * scale * _unet(config, family)
    lora = size.adapter[config.adapter.targets] * config.adapter.rank
    unet += _BYTES_PER_LORA * (lora - 16 * size.adapter[config.adapter.targets]) / _GIB
    if config.train.gradient_checkpointing:  # otherwise gradients take the place of what is not needed any more
        unet += 4 * lora / _GIB
    text = batch * scale * size.text_activations if config.text.form != "frozen" else 0.0
    if not builds_graph_last(config):
        return weights, of_images + unet + text
    return (weights, of_images + text) if weights + of_images > unet else (0.0, unet + text)


def _unet(config: Config, family: Family) -> float:
    """Return the GiB that a UNet keeps for one 512-pixel sample in half precision."""
    if config.train.gradient_checkpointing:
        return family.size.checkpointed
    plain = not family.is_flow and (config.model.offload or config.model.student_lora)
    return family.size.activations[config.adapter.targets] * (_PLAIN if plain else 1.0)


def _decoder(config: Config, family: Family) -> float:
    """Return the GiB that the decoder keeps for one 512-pixel sample in half precision."""
    if not _trains_on_pixels(config):
        return 0.0  # only images of the echo and previews are decoded, without gradient
    if config.model.decoder == "tiny":
        return _TINY_ACTIVATIONS
    return family.size.decoder * (2 if config.model.precision == "fp16" else 1)


def _trains_on_pixels(config: Config) -> bool:
    """Return whether a loss of the student is computed on decoded images."""
    critics = set(config.critic.discriminators) - {"teacher"} if config.loss.adversarial else set()
    identity = config.loss.identity and config.critic.identity != "none"
    return bool(critics or identity or config.loss.sliced_wasserstein)
