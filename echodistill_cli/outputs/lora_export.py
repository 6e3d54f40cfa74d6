"""From a run's checkpoint to the files people use: the student's LoRA, the teacher's, a learned token.

No model is loaded: a checkpoint holds the adapters and says what they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echodistill_cli import __version__
from echodistill_cli.config.build import config_hash
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import make_folder
from echodistill_cli.lora.header import RESERVED_NAMES
from echodistill_cli.lora.read import (
    LoraCard,
    LoraWeights,
    adapter_metadata,
    diffusers_tensors,
    header,
    kohya_tensors,
    token_tensors,
    write_safetensors,
)
from echodistill_cli.lora.sidecars import write_sidecars
from echodistill_cli.models.load import Role

_NOT_IN_NAMES = {*'\\/:*?"<>|', *map(chr, range(32))}  # on any system

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ExportSettings:
    """How LoRA files are written.

    Args:
        layout: "kohya", which every tool reads, or "diffusers". dtype: fp16, bf16 or fp32.
        metadata: False writes only the keys without which other tools fail.
        started_at, finished_at: seconds since the epoch, for the header; None leaves them out.
        cover: a PNG for the header.
    """

    layout: str = "kohya"
    dtype: str = "fp16"
    metadata: bool = True
    started_at: float | None = None
    finished_at: float | None = None
    cover: bytes | None = None


def check_name(config: Config) -> None:
    """See that a run's files can have their names, before it is trained.

    Raises:
        ConfigError: the name, the token or the class name has a character that no file name may have, or is reserved.
    """
    given = {"--name": config.run.name, "--token": config.concept.token, "--class-name": config.concept.class_name}
    for flag, text in given.items():
        if text is not None and (not text.strip(" .") or set(text) & _NOT_IN_NAMES):
            raise ConfigError(
                f"{flag} {text!r} names files, and this is no name that a file may have.",
                "Use letters, digits, - and _.",
            )
    if config.name.lower() in RESERVED_NAMES:
        raise ConfigError(f"A1111 cannot load a LoRA named {config.name!r}.", "Choose another --name.")
    if config.text.form == "token" and config.name == config.concept.token:
        raise ConfigError(
            f"The LoRA and the learned word would both be {config.name}.safetensors.",
            "Choose another --name.",
        )


def export_lora(config: Config, state: Mapping[str, Any], role: Role, path: Path, settings: ExportSettings) -> Path:
    """Write one role's LoRA, with the text side's if that was trained, and its sidecars; returns `path`.

    Args:
        state: `TrainingState.state_dict()` of the run.

    Raises:
        EchoDistillError: a tensor is not finite, or the file cannot be written.
    """
    make_folder(path.parent)
    weights = lora_weights(config, state, role)
    dtype = DTYPES[settings.dtype]
    if settings.layout == "kohya":
        tensors, metadata = kohya_tensors(weights, state["family"], dtype), {}
    else:
        tensors, metadata = diffusers_tensors(weights, dtype), adapter_metadata(weights)
    metadata |= header(lora_card(config, state, role, path, settings), tensors, minimal=not settings.metadata)
    write_safetensors(path, tensors, metadata)
    if settings.layout == "kohya" and settings.metadata:
        write_sidecars(path, metadata)
    return path


def export_token(config: Config, state: Mapping[str, Any], folder: Path) -> Path | None:
    """Write the learned token's file, named after it as most tools want; None if no token was learned."""
    if state["token"] is None:
        return None
    vectors = token_vectors(state)
    path = make_folder(folder) / f"{config.concept.token}.safetensors"
    write_safetensors(path, token_tensors(config.concept.token, vectors, state["family"]), {"format": "pt"})
    return path


def token_vectors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The learned word's vectors [1, width] by text encoder; empty if none was learned."""
    vectors = () if state["token"] is None else state["token"].values()
    return {
        name: vector.unsqueeze(0) for name, vector in zip(("text_encoder", "text_encoder_2"), vectors, strict=False)
    }


def lora_weights(config: Config, state: Mapping[str, Any], role: Role) -> list[LoraWeights]:
    """The trained adapters of one role: its UNet's, and those of the shared text encoders."""
    weights = [LoraWeights("unet", state["lora"][role], config.adapter.rank, written_alpha(config, role))]
    for component in ("text_encoder", "text_encoder_2"):
        if component in state["lora"]:
            tensors = state["lora"][component]
            weights.append(LoraWeights(component, tensors, config.text.rank, float(config.text.rank)))
    return weights


def written_alpha(config: Config, role: Role) -> float:
    """LoRA alpha of one role's UNet as its file has it: the student's says how strongly it is to draw."""
    return config.lora_alpha * (config.adapter.strength if role == "student" else 1.0)


def lora_card(config: Config, state: Mapping[str, Any], role: Role, path: Path, settings: ExportSettings) -> LoraCard:
    """What the header of one role's LoRA file at `path` says."""
    side = config.model.resolution
    made_by = config.model.student_lora
    beside = f"together with {Path(made_by).name}, " if made_by else ""
    usage = {
        "student": f"{beside}1 step, guidance 0 (CFG 1), trailing timesteps, {side}x{side}",
        "teacher": f"25 steps, guidance {config.train.guidance_scale:g}, {side}x{side}",
    }
    return LoraCard(
        name=path.stem,
        family=state["family"],
        base_model=config.model.student if role == "student" else config.model.teacher,
        token=config.concept.token,
        class_name=config.concept.class_name,
        trigger=config.subject,
        rank=config.adapter.rank,
        alpha=written_alpha(config, role),
        resolution=side,
        steps=state["step"],
        seed=config.run.seed,
        photos=state["photo_count"],
        role=role,
        prediction_type=state["prediction_types"][role],
        usage=usage[role],
        config_sha256=config_hash(config),
        version=__version__,
        started_at=settings.started_at,
        finished_at=settings.finished_at,
        cover=settings.cover,
    )
