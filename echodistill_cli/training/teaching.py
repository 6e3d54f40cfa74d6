"""The teacher's own step: the denoising loss on photos and echoed pictures, and what it is to keep of what it knew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echodistill_cli.diffusion.schedule import add_noise, prediction_target
from echodistill_cli.models.adapters import without_lora
from echodistill_cli.training import losses
from echodistill_cli.training.batches import TeacherBatch, draw_teacher_batch, draw_timesteps
from echodistill_cli.training.optimizing import Metrics, optimize
from echodistill_cli.training.prior import Prior
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.targets import untrained


def teacher_step(state: TrainingState, parts: Sequence[str] = ("teacher", "text"), *, echoes: bool = True) -> Metrics:
    """Concept in: the teacher's denoising loss on photos and `echoes`, which also trains the shared text side."""
    teacher = state.pair.role("teacher")
    batch = draw_teacher_batch(state, echoes=echoes)
    conditioning = teacher.at_crops(state.pair.encoder.encode(batch.prompts), batch.crops)
    noise = state.randn_like(batch.latents)
    noisy = add_noise(teacher.schedule, batch.latents, noise, batch.timesteps)
    target = prediction_target(teacher.schedule, batch.latents, noise, batch.timesteps)
    if batch.nulls:
        target[batch.nulls] = untouched_null(state, noisy, batch)
    loss = losses.denoising(teacher(noisy, batch.timesteps, conditioning), target, batch.masks).mean()
    metrics = {"denoising": float(loss.detach())}
    loss = state.config.loss.denoising * loss
    if state.prior is not None and state.config.loss.prior:
        kept = teacher_prior(state, state.prior)
        metrics["teacher_prior"] = float(kept.detach())
        loss = loss + state.config.loss.prior * kept
    return metrics | optimize(state, loss, parts)


@torch.no_grad()
def untouched_null(state: TrainingState, noisy: Tensor, batch: TeacherBatch) -> Tensor:
    """What the teacher predicted for the empty prompt before training, of the rows `batch.nulls`, [N, C, h, w].

    Guidance leads away from the empty prompt. Left to itself that learns the photos' colours too, and away from them
    "a red sks dog" is redder than any.
    """
    teacher, rows = state.pair.role("teacher"), batch.nulls
    with untrained(state):
        crops = [batch.crops[row] for row in rows]
        nothing = teacher.at_crops(state.pair.encoder.encode([""] * len(rows)), crops)
        return teacher(noisy[rows], batch.timesteps[rows], nothing)


def teacher_prior(state: TrainingState, prior: Prior) -> Tensor:
    """Distance of the teacher's output for the class, renoised, from what it was before training; a scalar."""
    teacher = state.pair.role("teacher")
    rows = prior_rows(state, prior)
    latents = prior.latents[rows]
    timesteps = draw_timesteps(state, len(rows))
    noisy = add_noise(teacher.schedule, latents, state.randn_like(latents), timesteps)
    with torch.no_grad(), without_lora(teacher.unet):
        before = teacher(noisy, timesteps, prior.conditioning.take(rows))
    conditioning = state.pair.encoder.encode([prior.prompts[row] for row in rows])
    return losses.latent_alignment(teacher(noisy, timesteps, conditioning), before).mean()


def prior_rows(state: TrainingState, prior: Prior) -> list[int]:
    """Half a batch of the class's pictures, as row numbers."""
    return state.randint(len(prior.prompts), max(1, state.config.train.batch_size // 2)).tolist()
