"""The header of a LoRA file as other tools read it, and the preview and A1111 card next to the file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from echodistill_cli.errors import ConfigError, counted
from echodistill_cli.files import last_part, write_bytes, write_text
from echodistill_cli.lora.keys import RESERVED_NAMES
from echodistill_cli.lora.safetensors_io import body_sha256

MODELSPEC_VERSION = "1.0.0"
_TRUE_OF_THE_LORA = ("modelspec.hash_sha256", "modelspec.implementation")
# Architectures of transformers. kohya's tools and A1111 do not have them, so headers lack the keys for these two.
_TRANSFORMERS: Mapping[str, str] = {"sana": "sana", "flux2": "flux-2-klein"}
# The architecture of the embedded pair, which no other tool has.
TOY = "echodistill-mini"
# Readers accept 8 MiB of header. The cover is stored twice, and base64 adds a third to each copy.
MAX_COVER_BYTES = 2**20


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file says about the LoRA.

    Attributes:
        name: the file's stem, used as `<lora:name:1>`.
        family: "sd" (Stable Diffusion 2 and SD-Turbo), "sdxl", "sana" or "flux2".
        base_model: hub id, folder or file of the base model; only its last part is written.
        token: the word that stands for the subject.
        class_name: the subject's class; None if unknown.
        trigger: the subject's words in a prompt, such as "sks dog".
        rank: rank of the UNet's LoRA.
        alpha: as trained; the files fold it into the weights and state alpha = rank.
        resolution: side of the training images in pixels.
        steps: training steps done.
        seed: seed of the run.
        photos: number of photos trained on.
        role: "student" (few steps) or "teacher".
        prediction_type: "epsilon", "v_prediction", "sample" or "flow", of the base model.
        usage: one line on how to generate with it, such as "1 step, guidance 0, 512x512".
        config_sha256: hash of the run's settings.
        version: version of echodistill.
        started_at: start of training in seconds since the epoch; None omits it.
        finished_at: end of training in seconds since the epoch; None omits it.
        cover: a PNG of at most 1 MiB; viewers expect 256 x 256 pixels.
        toy: whether the base model is the embedded toy pair, which no other tool has.
        timesteps: of the student's steps; empty for the last timestep.
        sampler: of the student: "euler", "ddim" or "lcm".
        learned: whether the token has a learned vector, which stands in a file of its own.
    """

    name: str
    family: str
    base_model: str
    token: str
    class_name: str | None
    trigger: str
    rank: int
    alpha: float
    resolution: int
    steps: int
    seed: int
    photos: int
    role: str
    prediction_type: str
    usage: str
    config_sha256: str
    version: str
    started_at: float | None = None
    finished_at: float | None = None
    cover: bytes | None = None
    toy: bool = False
    timesteps: tuple[int, ...] = ()
    sampler: str = "euler"
    learned: bool = False


def header(lora: LoraHeader, tensors: Mapping[str, Tensor], *, minimal: bool = False) -> dict[str, str]:
    """Return the metadata to write into a LoRA file.

    Args:
        lora: what the header says.
        tensors: the file's tensors, for their hash.
        minimal: return only the six keys without which kohya's tools fail and A1111 hides the file.

    Raises:
        ConfigError: the family is unknown.
        ConfigError: A1111 reserves the name.
        ConfigError: the cover is too large.
    """
    if lora.family not in ("sd", "sdxl", *_TRANSFORMERS):
        raise ConfigError(f"A LoRA header cannot describe family {lora.family!r}.", "Use sd, sdxl, sana or flux2.")
    if lora.name.lower() in RESERVED_NAMES:
        raise ConfigError(f"A1111 cannot load a LoRA named {lora.name!r}.", "Choose another --name.")
    metadata = _minimum(lora)
    if minimal:
        return metadata
    digest = body_sha256(tensors)
    metadata |= _kohya(lora) | _modelspec(lora, digest) | _cover(lora.cover) | _echodistill(lora)
    return metadata | {"sshs_model_hash": digest}


def _minimum(lora: LoraHeader) -> dict[str, str]:
    if lora.family in _TRANSFORMERS:
        return {"ss_base_model_version": _TRANSFORMERS[lora.family], "ss_network_dim": str(lora.rank)}
    sd = "sd_v2_v" if lora.prediction_type == "v_prediction" else "sd_v2"
    return {
        "ss_v2": str(lora.family == "sd"),
        "ss_base_model_version": "sdxl_base_v1-0" if lora.family == "sdxl" else sd,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(float(lora.rank)),
        "ss_network_args": "{}",
    }


def _kohya(lora: LoraHeader) -> dict[str, str]:
    side, subject = lora.resolution, lora.class_name or lora.token
    dates = {"ss_training_started_at": lora.started_at, "ss_training_finished_at": lora.finished_at}
    return {
        "ss_output_name": lora.name,
        # The whole path of a folder would reveal where it was trained.
        "ss_sd_model_name": last_part(lora.base_model),
        "ss_clip_skip": "None",
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(lora.photos),
        "ss_max_train_steps": str(lora.steps),
        "ss_steps": str(lora.steps),
        "ss_seed": str(lora.seed),
        "ss_bucket_info": json.dumps({"buckets": {"0": {"resolution": [side, side], "count": lora.photos}}}),
        "ss_dataset_dirs": json.dumps({subject: {"n_repeats": 1, "img_count": lora.photos}}),
        "ss_tag_frequency": json.dumps({subject: {lora.trigger: lora.photos}}),
    } | {key: str(float(value)) for key, value in dates.items() if value is not None}


def _modelspec(lora: LoraHeader, digest: str) -> dict[str, str]:
    velocity = lora.prediction_type == "v_prediction"
    if lora.toy:
        architecture, implementation = TOY, "echodistill"
    elif lora.family in _TRANSFORMERS:
        architecture, implementation = _TRANSFORMERS[lora.family], "diffusers"
    elif lora.family == "sdxl":
        architecture = "stable-diffusion-xl-v1-base"
        implementation = "https://github.com/Stability-AI/generative-models"
    else:
        architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        implementation = "diffusers"
    fields = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": lora.name,
        "description": f"{lora.trigger}, learned from {counted(lora.photos, 'photo')} "
        f"for {last_part(lora.base_model)}. {lora.usage}",
        "resolution": f"{lora.resolution}x{lora.resolution}",
        "usage_hint": lora.usage,
        "trigger_phrase": lora.trigger,
        "prediction_type": "v" if velocity else lora.prediction_type,
        "hash_sha256": f"0x{digest}",
    }
    if lora.class_name:
        fields["tags"] = lora.class_name
    if lora.finished_at is not None:
        fields["date"] = datetime.fromtimestamp(lora.finished_at, UTC).isoformat(timespec="seconds")
    return {f"modelspec.{key}": value for key, value in fields.items()}


def _echodistill(lora: LoraHeader) -> dict[str, str]:
    fields = {
        "version": lora.version,
        "role": lora.role,
        "token": lora.token,
        "alpha": f"{lora.alpha:g}",
        "steps": str(lora.steps),
        "seed": str(lora.seed),
        "config_sha256": lora.config_sha256,
    }
    if lora.timesteps:
        fields |= {"student_timesteps": ",".join(map(str, lora.timesteps)), "student_sampler": lora.sampler}
    if lora.learned:
        fields["token_file"] = f"{lora.token}.safetensors"
    return {f"echodistill.{key}": value for key, value in fields.items()}


def notes_on_use(metadata: Mapping[str, str], name: str, role: str, token: str | None) -> Iterator[str]:
    """Yield a line for each reason why a LoRA file will not do what was trained.

    Args:
        metadata: the file's header.
        name: of the file.
        role: that it is used for.
        token: that has a learned vector at hand; None if there is none.
    """
    if (trained := metadata.get("echodistill.role", role)) != role:
        yield f"{name} was trained for the {trained}. Use it with --role {trained}."
    if "echodistill.token_file" in metadata and token is None:
        yield f"{name} was trained with a learned token, which stands in another file. Use --lora with the run folder."


def _cover(cover: bytes | None) -> dict[str, str]:
    if cover is None:
        return {}
    if len(cover) > MAX_COVER_BYTES:
        raise ConfigError(
            f"The cover image has {len(cover)} bytes, more than the {MAX_COVER_BYTES} allowed.", "Use a smaller image."
        )
    text = base64.b64encode(cover).decode("ascii")
    return {"ssmd_cover_images": json.dumps([text]), "modelspec.thumbnail": f"data:image/png;base64,{text}"}


def model_metadata(lora_metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the fields of a LoRA's header that hold for the model, too."""
    metadata = {key: value for key, value in lora_metadata.items() if key.startswith(("modelspec.", "echodistill."))}
    if "modelspec.architecture" in metadata:
        metadata["modelspec.architecture"] = metadata["modelspec.architecture"].removesuffix("/lora")
    return {key: value for key, value in metadata.items() if key not in _TRUE_OF_THE_LORA} | {"format": "pt"}


def sidecar_paths(lora: Path) -> tuple[Path, Path, Path]:
    """Return the paths of a LoRA file's preview image, A1111 card and ComfyUI workflow."""
    return lora.with_suffix(".png"), lora.with_suffix(".json"), lora.with_name(f"{lora.stem}-comfyui.json")


def write_sidecars(lora: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Write the A1111 card, and the preview if the header has a cover; return the paths written.

    Args:
        lora: path of the LoRA file.
        metadata: the LoRA file's header.

    Raises:
        EchoDistillError: a file cannot be written.
    """
    preview, card, _ = sidecar_paths(lora)
    write_text(card, json.dumps(a1111_card(metadata), indent=2) + "\n")
    cover = cover_of(metadata)
    if cover is None:
        return [card]
    write_bytes(preview, cover)
    return [card, preview]


def a1111_card(metadata: Mapping[str, str]) -> dict[str, str | float]:
    """Return A1111's user metadata for a LoRA with this header."""
    base_model = metadata.get("ss_sd_model_name", "")
    if metadata.get("modelspec.architecture", "").startswith((TOY, *_TRANSFORMERS.values())):
        version = "Unknown"
    elif metadata.get("ss_base_model_version", "").startswith("sdxl"):
        version = "SDXL"
    else:
        version = "SD2" if metadata.get("ss_v2") == "True" else "SD1"
    return {
        "description": metadata.get("modelspec.description", ""),
        "sd version": version,
        "activation text": metadata.get("modelspec.trigger_phrase", ""),
        "preferred weight": 1.0,
        "negative text": "",
        "notes": f"{metadata.get('modelspec.usage_hint', '')}; made for {base_model}".strip("; "),
    }


def cover_of(metadata: Mapping[str, str]) -> bytes | None:
    """Return the cover of a LoRA file's header as PNG bytes; None if there is none or it is damaged."""
    try:
        covers = json.loads(metadata.get("ssmd_cover_images", "[]"))
        content = base64.b64decode(covers[0], validate=True)
    except (ValueError, TypeError, IndexError, KeyError, RecursionError):
        return None
    return content if content.startswith(b"\x89PNG") else None
