"""`python -m examples.mini_world.prediction_trial`: should the one-step student predict v, as its teacher, or ε?

SD-Turbo predicts ε. Both are trained alike here for a while, from the teacher's weights, by regression onto the pairs;
the error is that of the latents they mean, on pairs that neither saw.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.diffusion.sampling import student_x0
from examples.mini_world.models import build_unet
from examples.mini_world.sprites import default_work_directory
from examples.mini_world.student import FrozenTeacher, PairSet, open_pairs

HELD_OUT = 96


def regress(
    teacher: FrozenTeacher,
    pairs: PairSet,
    prediction: Literal["epsilon", "v_prediction"],
    rate: float,
    updates: int,
    batch_size: int = 24,
) -> dict[str, float]:
    """Mean squared error of held-out latents after a fifth of the updates, two fifths, and so on."""
    unet = build_unet()
    unet.load_state_dict(teacher.unet.state_dict())
    student = Denoiser(unet, replace(teacher.schedule, prediction_type=prediction))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate)
    generator, errors = torch.Generator().manual_seed(0), {}

    def error(rows: Tensor) -> Tensor:
        drawn = student_x0(student, pairs.noise[rows].float(), teacher.encode(pairs.token_ids[rows]))
        return (drawn - pairs.latents[rows].float()).square().mean()

    for update in range(updates):
        optimizer.zero_grad(set_to_none=True)
        error(torch.randint(HELD_OUT, len(pairs.noise), (batch_size,), generator=generator)).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        if (update + 1) % (updates // 5) == 0:
            with torch.no_grad():
                errors[str(update + 1)] = round(float(error(torch.arange(HELD_OUT))), 4)
    return errors


def main(arguments: list[str] | None = None) -> None:
    """Print both errors as JSON."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_world.prediction_trial", description=__doc__)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--nouns", type=int, default=12)
    options = parser.parse_args(arguments)
    work = default_work_directory()
    teacher, pairs = FrozenTeacher(work, "cpu"), open_pairs(work, options.nouns)
    for prediction in ("v_prediction", "epsilon"):
        for rate in (3e-4, 1e-4):
            found = regress(teacher, pairs, prediction, rate, options.updates)
            print(json.dumps({"prediction": prediction, "rate": rate, "error": found}), flush=True)


if __name__ == "__main__":
    main()
