"""The header of a LoRA file as other tools read it, and the preview and A1111 card beside the file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from echodistill_cli.errors import ConfigError
from echodistill_cli.files import last_part, write_bytes, write_text
from echodistill_cli.lora.safetensors_io import body_sha256

MODELSPEC_VERSION = "1.0.0"
# Readers stop at 8 MiB of header, and base64 adds a third to each of the two copies.
MAX_COVER_BYTES = 2**20
# A1111 gives `<lora:none:1>` a meaning of its own.
RESERVED_NAMES = ("none", "addams")


@dataclass(frozen=True)
class LoraHeader:
    """What the header of a LoRA file says.

    Attributes:
        name: the file's stem, the word in `<lora:name:1>`.
        family: "sd" (Stable Diffusion 2 and SD-Turbo) or "sdxl".
        base_model: hub id, folder or file of the model that the LoRA goes with; only its last part is written.
        token: the rare word.
        class_name: what the subject is, if that was said.
        trigger: the words that call the subject, such as "sks dog".
        rank: of the UNet's LoRA.
        alpha: as trained; the files hold it folded, so that their own alpha is the rank.
        resolution: side of the training pictures in pixels.
        steps: training steps done.
        seed: of the run.
        photos: how many were trained on.
        role: "student" (one step) or "teacher".
        prediction_type: "epsilon" or "v_prediction", of the base model.
        usage: one line on how to draw with it, such as "1 step, guidance 0, 512x512".
        config_sha256: of the settings that made it.
        version: of echodistill.
        started_at: seconds since the epoch; `None` leaves the date out.
        finished_at: the same.
        cover: a small PNG picture, at most 1 MiB; 256 x 256 is what viewers expect.
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


def header(card: LoraHeader, tensors: Mapping[str, Tensor], *, minimal: bool = False) -> dict[str, str]:
    """The metadata of a LoRA file.

    Args:
        card: what to say.
        tensors: the file's tensors, for their hash.
        minimal: only the six keys without which kohya's tools do not work, and A1111 hides the file.

    Raises:
        ConfigError: the family is unknown, the name is one that A1111 reserves, or the cover is too large.
    """
    if card.family not in ("sd", "sdxl"):
        raise ConfigError(f"There is no LoRA header for family {card.family!r}.", "Use sd or sdxl.")
    if card.name.lower() in RESERVED_NAMES:
        raise ConfigError(f"A1111 cannot load a LoRA named {card.name!r}.", "Choose another --name.")
    metadata = _minimum(card)
    if minimal:
        return metadata
    digest = body_sha256(tensors)
    metadata |= _kohya(card) | _modelspec(card, digest) | _cover(card.cover) | _own(card)
    return metadata | {"sshs_model_hash": digest}


def _minimum(card: LoraHeader) -> dict[str, str]:
    sd = "sd_v2_v" if card.prediction_type == "v_prediction" else "sd_v2"
    return {
        "ss_v2": str(card.family == "sd"),
        "ss_base_model_version": "sdxl_base_v1-0" if card.family == "sdxl" else sd,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(card.rank),
        "ss_network_alpha": str(float(card.rank)),
        "ss_network_args": "{}",
    }


def _kohya(card: LoraHeader) -> dict[str, str]:
    side, subject = card.resolution, card.class_name or card.token
    dates = {"ss_training_started_at": card.started_at, "ss_training_finished_at": card.finished_at}
    return {
        "ss_output_name": card.name,
        "ss_sd_model_name": last_part(card.base_model),
        "ss_clip_skip": "None",
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(card.photos),
        "ss_max_train_steps": str(card.steps),
        "ss_steps": str(card.steps),
        "ss_seed": str(card.seed),
        "ss_bucket_info": json.dumps({"buckets": {"0": {"resolution": [side, side], "count": card.photos}}}),
        "ss_dataset_dirs": json.dumps({subject: {"n_repeats": 1, "img_count": card.photos}}),
        "ss_tag_frequency": json.dumps({subject: {card.trigger: card.photos}}),
    } | {key: str(float(value)) for key, value in dates.items() if value is not None}


def _modelspec(card: LoraHeader, digest: str) -> dict[str, str]:
    velocity = card.prediction_type == "v_prediction"
    if card.family == "sdxl":
        architecture = "stable-diffusion-xl-v1-base"
        implementation = "https://github.com/Stability-AI/generative-models"
    else:
        architecture = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        implementation = "diffusers"
    fields = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": card.name,
        "description": f"{card.trigger}, learned from {card.photos} photos for {last_part(card.base_model)}. "
        f"{card.usage}",
        "resolution": f"{card.resolution}x{card.resolution}",
        "usage_hint": card.usage,
        "trigger_phrase": card.trigger,
        "prediction_type": "v" if velocity else "epsilon",
        "hash_sha256": f"0x{digest}",
    }
    if card.class_name:
        fields["tags"] = card.class_name
    if card.finished_at is not None:
        fields["date"] = datetime.fromtimestamp(card.finished_at, UTC).isoformat(timespec="seconds")
    return {f"modelspec.{key}": value for key, value in fields.items()}


def _own(card: LoraHeader) -> dict[str, str]:
    fields = {
        "version": card.version,
        "role": card.role,
        "token": card.token,
        "alpha": f"{card.alpha:g}",
        "steps": str(card.steps),
        "seed": str(card.seed),
        "config_sha256": card.config_sha256,
    }
    return {f"echodistill.{key}": value for key, value in fields.items()}


def _cover(cover: bytes | None) -> dict[str, str]:
    if cover is None:
        return {}
    if len(cover) > MAX_COVER_BYTES:
        raise ConfigError(f"The cover picture has {len(cover)} bytes; a header takes {MAX_COVER_BYTES}.", "Shrink it.")
    text = base64.b64encode(cover).decode("ascii")
    return {"ssmd_cover_images": json.dumps([text]), "modelspec.thumbnail": f"data:image/png;base64,{text}"}


def sidecar_paths(lora: Path) -> tuple[Path, Path]:
    """The preview and the card that belong to a LoRA file."""
    return lora.with_suffix(".png"), lora.with_suffix(".json")


def write_sidecars(lora: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Write the card, and the preview if the header has a cover picture; returns what was written.

    Args:
        metadata: the LoRA file's header.

    Raises:
        EchoDistillError: a file cannot be written.
    """
    preview, card = sidecar_paths(lora)
    write_text(card, json.dumps(a1111_card(metadata), indent=2) + "\n")
    cover = cover_of(metadata)
    if cover is None:
        return [card]
    write_bytes(preview, cover)
    return [card, preview]


def a1111_card(metadata: Mapping[str, str]) -> dict[str, str | float]:
    """A1111's user metadata of a LoRA with that header."""
    sdxl = metadata.get("ss_base_model_version", "").startswith("sdxl")
    base_model = metadata.get("ss_sd_model_name", "")
    return {
        "description": metadata.get("modelspec.description", ""),
        "sd version": "SDXL" if sdxl else "SD2" if metadata.get("ss_v2") == "True" else "SD1",
        "activation text": metadata.get("modelspec.trigger_phrase", ""),
        "preferred weight": 1.0,
        "negative text": "",
        "notes": f"{metadata.get('modelspec.usage_hint', '')}; made for {base_model}".strip("; "),
    }


def cover_of(metadata: Mapping[str, str]) -> bytes | None:
    """The cover picture in a LoRA file's header, if there is one that can be read."""
    try:
        covers = json.loads(metadata.get("ssmd_cover_images", "[]"))
        content = base64.b64decode(covers[0], validate=True)
    except (ValueError, TypeError, IndexError, KeyError):
        return None
    return content if content.startswith(b"\x89PNG") else None
