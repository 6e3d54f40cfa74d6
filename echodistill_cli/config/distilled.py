"""Distilled students: their steps and samplers, and what published files need. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any, Literal

from echodistill_cli.config.families import family_of_source
from echodistill_cli.config.schema import ModelConfig

_TIMESTEPS = 1000
# Published files by name, with the settings that their model cards ask for (2026-11): tianweiy/DMD2,
# ByteDance/SDXL-Lightning and ByteDance/Hyper-SD. Hyper-SD's "CFG" files need guidance, so they are no students.
_FILES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (r"dmd2_sdxl_(?P<steps>4)step", {"student_sampler": "lcm"}),
    (r"dmd2_sdxl_1step", {"student_timesteps": (399,)}),
    (r"sdxl_lightning_1step(_unet)?_x0", {"student_prediction": "sample"}),
    (r"sdxl_lightning_(?P<steps>[248])step", {"student_sampler": "euler"}),
    (r"hyper-sdxl-1step-unet", {"student_timesteps": (800,)}),
    (r"hyper-sdxl-(?P<steps>\d+)steps?-lora", {"student_sampler": "ddim"}),
)
_NAMES = {"euler": "Euler", "ddim": "DDIM", "lcm": "LCM"}


def trailing(steps: int) -> tuple[int, ...]:
    """Return the timesteps of so many steps in trailing spacing: 4 give 999, 749, 499 and 249."""
    return tuple(round(_TIMESTEPS - index * _TIMESTEPS / steps) - 1 for index in range(steps))


def known_settings(name: str) -> dict[str, Any]:
    """Return the keys of `[model]` that a published file needs as a student; empty for an unknown name.

    Args:
        name: path of a distillation LoRA, or path or hub id of a student.
    """
    stem = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    for pattern, settings in _FILES:
        if match := re.match(pattern, stem):
            steps = match.groupdict().get("steps")
            # All of them were distilled from SDXL base at its own resolution.
            return (
                {"resolution": 1024} | ({"student_timesteps": trailing(int(steps))} if steps else {}) | dict(settings)
            )
    return {}


def student_steps(model: ModelConfig) -> int:
    """Return how many steps the student generates in."""
    return max(1, len(model.student_timesteps))


def is_trailing(model: ModelConfig) -> bool:
    """Return whether the number of the student's steps tells other tools their timesteps."""
    return model.student_timesteps in ((), trailing(student_steps(model)))


def student_sampler(model: ModelConfig) -> Literal["euler", "ddim", "lcm"]:
    """Return the student's sampler, with "auto" decided."""
    by_steps: tuple[Literal["euler", "ddim", "lcm"], ...] = ("euler", "ddim", "lcm")
    automatic = by_steps[min(len(model.student_timesteps), 2)]
    return next((name for name in by_steps if name == model.student_sampler), automatic)


def steps_in_words(model: ModelConfig) -> str:
    """Return the student's number of steps: "1 step" or "4 steps"."""
    steps = student_steps(model)
    return f"{steps} step{'s' * (steps > 1)}"


def sampling_in_words(model: ModelConfig) -> str:
    """Return how to sample the student: steps, guidance and timesteps."""
    family = family_of_source(model.student)
    if family and family.is_flow:
        at = "" if is_trailing(model) else f", timesteps {', '.join(map(str, model.student_timesteps))}"
        return f"{steps_in_words(model)}, {family.sampling}{at}"
    times, name = ", ".join(map(str, model.student_timesteps)), _NAMES[student_sampler(model)]
    if len(model.student_timesteps) == 1:
        times = f"timestep {times} with unit noise (LCM sampler)"  # at one step, DDIM and LCM are the same
    elif times:
        times = f"timesteps {times} ({name} sampler)"
    return f"{steps_in_words(model)}, guidance 0 (CFG 1), {times or 'trailing timesteps'}"


def settings_in_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of `[model]` on the student's steps that a LoRA file's header states.

    Args:
        metadata: of the file; older ones state one timestep.
    """
    text = metadata.get("echodistill.student_timesteps") or metadata.get("echodistill.student_timestep", "")
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5}){0,99}", text):
        return {}
    timesteps = tuple(map(int, text.split(",")))
    if any(first <= second for first, second in itertools.pairwise(timesteps)):
        return {}
    sampler = metadata.get("echodistill.student_sampler")
    return {"student_timesteps": timesteps} | ({"student_sampler": sampler} if sampler in _NAMES else {})
