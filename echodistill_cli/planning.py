"""What a run would load, fetch and need, before anything of it is done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from echodistill_cli.config.catalogue import PRESETS
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.diffusion.pair import Family
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models.device import Estimate, MemoryPlan, backbones, estimate, plan_memory
from echodistill_cli.models.embedded import is_embedded
from echodistill_cli.models.load import TINY_DECODERS, memory_gib, pick_device, pick_dtype
from echodistill_cli.models.single_file import prediction_in, shipped_configuration
from echodistill_cli.models.sources import Download, downloads, resolve
from echodistill_cli.paths import expanded
from echodistill_cli.training.critics import IMAGE_BACKBONES

_UNET_PARTS = ("unet", "scheduler")
_SHARED_PARTS = {
    "sd": ("vae", "text_encoder", "tokenizer"),
    "sdxl": ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
_KNOWN_WIDTHS: Mapping[int, Family] = {1024: "sd", 2048: "sdxl"}
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def family_of(model: ModelConfig) -> Family | None:
    """The true-size family of the configured student; None if it is smaller than life, or cannot be known unloaded."""
    known: dict[str, Family] = {
        str(preset.settings["model"][role]): preset.family
        for preset in PRESETS.values()
        for role in ("student", "teacher")
        if preset.family
    }
    if model.student in known:
        return known[model.student]
    try:
        folder = resolve(model.student, ("unet",), revision=model.student_revision, offline=True)
        if folder.is_file():
            folder = Path(model.single_file_config or shipped_configuration(folder, ""))
        settings = json.loads((folder / "unet" / "config.json").read_text())
    except (ModelError, OSError):
        return None
    return _KNOWN_WIDTHS.get(settings.get("cross_attention_dim"))


def sources_of(config: Config) -> Iterator[tuple[str, tuple[str, ...], str | None]]:
    """Every model that a run loads: source, parts, revision."""
    model, family = config.model, family_of(config.model) or "sd"
    yield model.student, (*_UNET_PARTS, *_SHARED_PARTS[family]), model.student_revision
    yield model.teacher, _UNET_PARTS, model.teacher_revision
    if model.vae:
        yield model.vae, ("",), None
    if model.decoder == "tiny":
        yield model.tiny_decoder or TINY_DECODERS[family], ("",), None
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
    precision = _PRECISIONS[str(pick_dtype("auto", device)).removeprefix("torch.")]
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
