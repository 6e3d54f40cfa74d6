"""Models as files, and their weights in memory, for the tests of loading and of what is written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.pair import ModelPair

State = dict[str, Tensor]


def model_config(student: Path, teacher: Path, configuration: str | Path | None = None, **changes: Any) -> ModelConfig:
    """Settings that load a small pair; `configuration` is that of a student in a single file."""
    plain = ModelConfig(
        student=str(student),
        teacher=str(teacher),
        resolution=64,
        device="cpu",
        precision="fp32",
        offline=True,
        single_file_config=None if configuration is None else str(configuration),
    )
    return replace(plain, **changes)


def without_weights(folder: Path, copy: Path) -> Path:
    """Copy a model's folder except for its weights."""
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors")))


def weights(pair: ModelPair) -> State:
    """Return every weight of a pair by role and name."""
    roles = {"student": pair.student.unet, "vae": pair.codec.encoder}
    roles |= {f"text {index}": encoder for index, encoder in enumerate(pair.encoder.encoders)}
    if pair.has_teacher:
        roles["teacher"] = pair.teacher.unet
    return {f"{role} {name}": value for role, module in roles.items() for name, value in module.state_dict().items()}


def assert_equal(actual: State, expected: State) -> None:
    """Check that two sets of weights have the same names and bits."""
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
