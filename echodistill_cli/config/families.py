"""Model families (SD and SDXL) as data, and which family a model belongs to. No torch.

To add a family:

1. a record in `FAMILIES`;
2. a row in `ARCHITECTURES` of `lora/keys.py`, from which the module names in LoRA files follow;
3. a folder `models/configurations/NAME` with the JSON files of the published model.

Loading, training, sampling and memory plans then work. What other tools read is written per family: the kohya prefixes
in `lora/keys.py`, the header in `lora/header.py`, and the one-file layout in `models/single_file.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echodistill_cli.files import expanded

FamilyName = Literal["sd", "sdxl"]
_PIXELS_PER_LATENT = 8  # along one side, in every published model of both families
_BASE_RESOLUTIONS = {"stabilityai/stable-diffusion-xl-base-1.0": 1024}
# The safetensors format: an 8-byte length, then a JSON header of at most this size.
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000


@dataclass(frozen=True)
class Size:
    """Parameter counts and activations of a family's published models, for memory estimates.

    Args:
        unet: parameters of one UNet.
        text: parameters of all text encoders.
        adapter: LoRA parameters per rank of one UNet, by `adapter.targets`.
        text_adapter: LoRA parameters per rank of all text encoders.
        activations: GiB kept per sample for the UNet's backward pass, by `adapter.targets`.
        checkpointed: the same with gradient checkpointing.
    """

    unet: int
    text: int
    adapter: Mapping[str, int]
    text_adapter: int
    activations: Mapping[str, float]
    checkpointed: float


@dataclass(frozen=True)
class Family:
    """What the models of one family have in common.

    Args:
        name: short name, used in checkpoints and file headers.
        preset: preset whose teacher and sizes suit any student of the family.
        architectures: names in `lora.keys.ARCHITECTURES` whose LoRA files fit.
        configuration: folder in `models/configurations`.
        pipeline: diffusers' pipeline class.
        text_width: width of the text features that the cross-attention of the published models reads.
        size_conditioning: whether the UNet is conditioned on image sizes and a pooled text embedding.
        zero_null: whether the empty prompt is encoded as zeros, unless `model_index.json` says otherwise.
        padding: padding token by tokenizer. It matters: the text encoders attend to padding.
        tiny_decoder: hub id of the AutoencoderTiny for the same latents.
        checkpoint_prefix: prefix of tensor names that only one-file checkpoints of this family have.
        size: of the published models.
    """

    name: FamilyName
    preset: str
    architectures: tuple[str, ...]
    configuration: str
    pipeline: str
    text_width: int
    size_conditioning: bool
    zero_null: bool
    padding: Mapping[str, str]
    tiny_decoder: str
    checkpoint_prefix: str
    size: Size

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers."""
        return tuple(self.padding)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Subfolders of the text encoders, in the order of the tokenizers."""
        return tuple(name.replace("tokenizer", "text_encoder") for name in self.padding)

    @property
    def parts(self) -> tuple[str, ...]:
        """Subfolders that teacher and student share: VAE, text encoders, tokenizers."""
        return ("vae", *self.text_encoders, *self.tokenizers)


FAMILIES: Mapping[str, Family] = {
    "sd": Family(
        name="sd",
        preset="sd-turbo",
        architectures=("sd1", "sd2"),
        configuration="sd2",
        pipeline="StableDiffusionPipeline",
        text_width=1024,
        size_conditioning=False,
        zero_null=False,
        padding={"tokenizer": "!"},
        tiny_decoder="madebyollin/taesd",
        checkpoint_prefix="cond_stage_model.",
        size=Size(
            unet=865_910_724,
            text=340_387_840,
            adapter={"cross-kv": 57_728, "attention": 207_488, "attention-conv": 697_088},
            text_adapter=188_416,
            activations={"cross-kv": 0.66, "attention": 0.94, "attention-conv": 1.08},
            checkpointed=0.11,
        ),
    ),
    "sdxl": Family(
        name="sdxl",
        preset="sdxl-turbo",
        architectures=("sdxl",),
        configuration="sdxl",
        pipeline="StableDiffusionXLPipeline",
        text_width=2048,
        size_conditioning=True,
        zero_null=True,
        padding={"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        tiny_decoder="madebyollin/taesdxl",
        checkpoint_prefix="conditioner.embedders.1.",
        size=Size(
            unet=2_567_463_684,
            text=123_060_480 + 694_659_840,
            adapter={"cross-kv": 453_120, "attention": 1_451_520, "attention-conv": 1_778_560},
            text_adapter=73_728 + 327_680,
            activations={"cross-kv": 1.30, "attention": 1.90, "attention-conv": 2.06},
            checkpointed=0.12,
        ),
    ),
}


def family_of_width(text_width: int | None) -> Family | None:
    """Return the family whose published UNets read text features of this width, or None."""
    return next((family for family in FAMILIES.values() if family.text_width == text_width), None)


def family_of_unet(settings: Mapping[str, Any]) -> Family:
    """Return the family of a UNet of any size from its diffusers configuration."""
    size_conditioning = settings.get("addition_embed_type") == "text_time"
    alike = [family for family in FAMILIES.values() if family.size_conditioning == size_conditioning]
    by_width = family_of_width(settings.get("cross_attention_dim"))
    return by_width if by_width in alike else alike[0]


def _unet_settings(source: str | Path) -> dict[str, Any] | None:
    """Return the UNet's configuration of a model folder, or of a hub id whose configuration is in the cache."""
    try:
        path = expanded(source)
        folder = path if path.is_dir() else None if path.is_file() else _cached_folder(str(source))
        settings = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")) if folder else None
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _cached_folder(source: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(source.partition("@")[0], "unet/config.json")
    return Path(file).parent.parent if isinstance(file, str) else None


def native_resolution(source: str | Path) -> int | None:
    """Return the side of the images that a base model was made for, in pixels; None if it is not known here."""
    size = (_unet_settings(source) or {}).get("sample_size")
    if isinstance(size, int):
        return size * _PIXELS_PER_LATENT
    return _BASE_RESOLUTIONS.get(str(source))


def family_of_source(source: str | Path) -> Family | None:
    """Return the family of a model folder, cached hub id or one-file checkpoint; None if it is not known here."""
    if settings := _unet_settings(source):
        return family_of_unet(settings)
    try:
        with expanded(source).open("rb") as file:
            length = min(int.from_bytes(file.read(_LENGTH_BYTES), "little"), _MAX_HEADER_BYTES)
            names = list(json.loads(file.read(length)))
    except (OSError, ValueError):
        return None
    prefixes = {family.checkpoint_prefix: family for family in FAMILIES.values()}
    return next((prefixes[prefix] for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)
