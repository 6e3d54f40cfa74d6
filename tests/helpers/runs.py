"""Runs of the small random pair: their settings and photos, and what tests read from a state."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from echodistill_cli.config.build import config_from_dict
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import Photo
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.files import make_folder
from echodistill_cli.models.adapters import lora_tensors
from echodistill_cli.outputs.artifact import TrainingRecord, from_run
from echodistill_cli.outputs.export import ExportItem, export, write_lora, write_token
from echodistill_cli.outputs.requests import ExportRequest
from echodistill_cli.runs import OnMessage, Run
from echodistill_cli.training.batches import StudentPass, student_pass
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import training_step

NewState = Callable[..., TrainingState]
Tensors = dict[str, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator at its beginning."""
    return torch.Generator().manual_seed(seed)


def small_tables(pair: tuple[Path, Path], backbones: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The paper's own method on the small pair: one-step targets and no extension, a tenth of a second per step."""
    student, teacher = map(str, pair)
    return {
        "concept": {"token": "sks", "class_name": "dog", "views": 8, "augmentation": "custom-diffusion"},
        "model": {"student": student, "teacher": teacher, "resolution": 64, "device": "cpu", "offline": True},
        "adapter": {"rank": 2, "targets": "cross-kv"},
        "text": {"form": "lora", "trained_by": "teacher", "rank": 2},
        "train": {
            "steps": 1000,
            "lr": 1e-3,
            "teacher_lr": 1e-3,
            "text_lr": 1e-3,
            "discriminator_lr": 1e-3,
            "lr_schedule": "constant",
            "target_steps": 1,
            "target_strength": 1.0,
            "replays": 0,
            "first_targets": 0,
            "class_share": 0.0,
            "pair_share": 0.0,
            "head_start": 0,
            "carry_over": False,
            "scene_share": 0.0,
            "guidance_scale": 7.5,
        },
        "loss": {"identity": 1.0, "sliced_wasserstein": 0.1, "adversarial": 1.0, "paired": 0.0},
        "critic": {
            "discriminators": (str(backbones["dino"]), "teacher"),
            "identity": str(backbones["clip"]),
            "identity_target": "teacher",
            "head_width": 16,
            "swd_scales": 2,
            "swd_projections": 8,
            "swd_patch": 5,
        },
        "echo": {
            "start": "off",
            "every": 2,
            "candidates": 4,
            "min_identity": 0.0,
            "max_similarity": 1.0,
            "teacher_share": 0.25,
            "real_weight": 0.25,
            "carry_back": 0,
        },
    }


def small_config(pair: tuple[Path, Path], backbones: dict[str, Path], **changes: Any) -> Config:
    """`small_tables` with changes by key, such as text__form="token"."""
    tables = small_tables(pair, backbones)
    for key, value in changes.items():
        section, name = key.split("__")
        tables.setdefault(section, {})[name] = value
    return config_from_dict(tables)


def small_photos(count: int = 4) -> list[Photo]:
    """64-pixel images of coarse colored noise; the second has a caption, the third a mask of its left half."""
    photos = []
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((64, 64), Image.Resampling.NEAREST)
        mask = Image.new("L", (64, 64)) if index == 2 else None
        if mask:
            mask.paste(255, (0, 0, 32, 64))
        caption = "a sks dog on the beach" if index == 1 else None
        photos.append(Photo(Path(f"{index}.png"), image, mask, caption, (0, 0, 64, 64)))
    return photos


def export_files(source: Path | None = None, on_message: OnMessage = lambda _line: None, **fields: Any) -> list[Path]:
    """Export a run or LoRA file; the other arguments are fields of `ExportRequest`. Returns the files."""
    return list(export(ExportRequest(source, **fields), on_message).files)


def write_loras(
    run: Run, state: Mapping[str, Any], record: TrainingRecord | None = None, *, dtype: str = "fp16"
) -> Path:
    """Write the LoRA files of both roles, and that of the learned token, to a run folder; return the student's."""
    artifact = from_run(run, state=state, record=record)
    roles: tuple[Role, ...] = ("student", "teacher")
    for role in roles:
        path = artifact.lora_path(role)
        make_folder(path.parent)
        write_lora(artifact, ExportItem(role, "kohya", path), ExportRequest(dtype=dtype))
    if artifact.token_file:
        write_token(artifact, artifact.token_file)
    return artifact.lora("student")


def trained(state: TrainingState) -> dict[str, Tensors]:
    """Copies of everything that training can move, by optimizer."""
    if state.token:
        text = {name: value.detach().clone() for name, value in state.token.state_dict().items()}
    else:
        text = lora_tensors(state.pair.encoder.encoders[0]) if state.config.text.form == "lora" else {}
    heads = {
        f"{critic.name}.{name}": value.detach().clone()
        for critic in state.critics
        for name, value in critic.heads.state_dict().items()
    }
    paired = state.paired_critic.state_dict() if state.paired_critic else {}
    return {
        "paired": {name: value.detach().clone() for name, value in paired.items()},
        "teacher": lora_tensors(state.pair.teacher.unet),
        "text": text,
        "student": lora_tensors(state.pair.student.unet),
        "discriminators": heads,
    }


def moved(before: dict[str, Tensors], state: TrainingState) -> set[str]:
    """Names of the parts in which any tensor differs from `before`."""
    now = trained(state)
    return {
        part for part in now if any(not torch.equal(value, before[part][name]) for name, value in now[part].items())
    }


def same(first: dict[str, Tensors], second: dict[str, Tensors]) -> bool:
    """Whether two results of `trained` are equal to the bit."""
    return all(torch.equal(value, second[part][name]) for part in first for name, value in first[part].items())


def take_steps(state: TrainingState, count: int) -> list[dict[str, float]]:
    """The metrics of some joint steps."""
    return [state.settle(training_step(state)) for _ in range(count)]


def gradients(state: TrainingState, part: str) -> list[Tensor]:
    """The gradients that a part has at the moment."""
    return [p.grad for p in state.optimizers.weights([part]) if p.grad is not None]


def checkpoint_of(state: TrainingState) -> dict[str, Any]:
    """The state as a checkpoint has it, through the bytes of a file."""
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


def student_pass_at(state: TrainingState, seed: int) -> StudentPass:
    """A student pass with the run's generator at a seed."""
    state.generator.manual_seed(seed)
    return student_pass(state)
