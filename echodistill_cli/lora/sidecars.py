"""What lies beside a LoRA file for the people who choose among many: a preview picture and A1111's card.

A1111, Forge and ComfyUI show `<name>.png`; A1111 and Forge read `<name>.json` and put its activation text into the
prompt. Source: A1111 `extensions-builtin/Lora/ui_edit_user_metadata.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path

from echodistill_cli.files import write_bytes, write_text


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
