"""Bidirectional concept distillation, step by step as in the paper (EchoDistill, arXiv 2510.20512).

One step of the joint phase: the teacher learns the concept from the photos; the student learns it from the teacher
(alignment) and from the photos (adversarial); the discriminators learn to tell. In the echo phase the student's own
best pictures join the photos for both; at its end the teacher may take the student's LoRA over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from echodistill_cli.data.prompts import scene_prompt
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.schedule import add_noise, prediction_target
from echodistill_cli.models.adapters import load_lora_tensors, lora_tensors, without_lora
from echodistill_cli.training import losses
from echodistill_cli.training.batches import (
    StudentPass,
    draw_echo,
    draw_first_targets,
    draw_reals,
    draw_student_pass,
    draw_teacher_batch,
    draw_timesteps,
    encode_for_student,
)
from echodistill_cli.training.critics import Discriminator
from echodistill_cli.training.dataset import Prior
from echodistill_cli.training.optimizers import Metrics, WeightMean
from echodistill_cli.training.pools import EchoPool, refresh
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.targets import draw_replay

# Of the teacher's own: what the student found, its LoRA carried back, is to be cleaned up, not learned over.
CARRY_BACK_RATE = 0.25


def training_step(state: TrainingState) -> Metrics:
    """One step of the joint phase, and of the echo phase once it has begun. Returns every loss by name.

    The first begins with what is left of the teacher's head start; the carry back comes after the last, by itself.
    """
    settings = state.config
    if state.step == 0:
        begin(state)
    state.set_rates()
    metrics: Metrics = {}
    if settings.loss.denoising:
        metrics |= teacher_step(state)
    student_pass, student_metrics = student_step(state)
    metrics |= student_metrics
    for _ in range(settings.replays):
        metrics |= replay_step(state)
    if state.critics:
        metrics |= discriminator_step(state, student_pass)
    state.count_skips(metrics)
    state.step += 1
    start, every = state.config.echo.start, state.config.echo.every
    if start is not None and state.step >= start and (state.step - start) % every == 0:
        metrics |= echo_step(state)
    state.carry_back_step = 0  # of a shorter run, if this one goes on from its end
    return metrics


def begin(state: TrainingState) -> None:
    """What is left of the teacher's head start; its LoRA is where the student begins, if that is asked for.

    Then the first targets: replays that begin with a few would fit those few.
    """
    while state.in_head_start:
        head_start_step(state)
    if state.config.train.carry_over:
        load_lora_tensors(state.pair.student.unet, lora_tensors(state.pair.teacher.unet))
    for _ in range(state.config.train.first_targets if state.config.replays else 0):
        draw_first_targets(state)


def head_start_step(state: TrainingState) -> Metrics:
    """One step of the teacher alone, before the first joint step. Returns its losses, and the step's own number.

    The last one leaves the mean of the weights over the second half of the head start.
    """
    metrics = teacher_step(state)
    state.count_skips(metrics)
    state.head_start_step += 1
    average(state, ["teacher", "text"], state.head_start_step, state.config.train.head_start)
    return {"head_start_step": float(state.head_start_step)} | metrics


def average(state: TrainingState, parts: Sequence[str], done: int, planned: int) -> None:
    """Gather the weights of some parts in the second half of the planned steps; the last leaves their mean."""
    weights = state.optimizers.weights(parts)
    if 2 * done > planned:
        state.teacher_mean.add(weights)
    if done == planned:
        state.teacher_mean.move_into(weights)


def carry_back_step(state: TrainingState) -> Metrics:
    """A step of the echo's end: the teacher begins anew with the student's LoRA, as the student began with its own.

    Then it looks at the photos alone, at a low rate, and ends at the mean of the second half of these steps. The text
    side rests, for the student is done. Returns the teacher's losses, and the step's own number.
    """
    if state.carry_back_step == 0:
        state.teacher_mean = WeightMean()  # one cut short by a longer run may have left its own
        load_lora_tensors(state.pair.teacher.unet, lora_tensors(state.pair.student.unet))
    state.optimizers.set_rates({"teacher": CARRY_BACK_RATE})
    metrics = teacher_step(state, parts=["teacher"], echoes=False)
    state.count_skips(metrics)
    state.carry_back_step += 1
    average(state, ["teacher"], state.carry_back_step, state.config.echo.carry_back)
    return {"carry_back_step": float(state.carry_back_step)} | metrics


def student_step(state: TrainingState) -> tuple[StudentPass, Metrics]:
    """Teacher → student: one-step pictures, pulled towards the teacher's guided x0 of them and towards the photos."""
    with frozen(state.critics):
        student_pass = draw_student_pass(state)
        total = torch.zeros((), device=state.pair.device)
        metrics: Metrics = {}
        for term in active_losses(state):
            values = term.function(student_pass)
            values = values * student_pass.alpha_bar if term.weighted_by_alpha_bar else values
            metrics[term.name] = float(values.detach().mean())
            total = total + getattr(state.config.loss, term.name) * values.mean()
        metrics |= state.optimizers.step(total, state.student_parts)
    return student_pass, metrics


def replay_step(state: TrainingState) -> Metrics:
    """One more update of the student, towards targets that the teacher drew in earlier steps, and the class as it was.

    A few pictures of the class, in other colours say, keep such words alive that no photo of the subject obeys.
    """
    noise, target, prompts = draw_replay(state)
    drawn = student_x0(state.pair.student, noise, encode_for_student(state, prompts))
    loss = losses.latent_alignment(drawn, target).mean()
    moved = state.optimizers.step(state.config.loss.latent * loss, state.student_parts)
    return {"replay": float(loss.detach())} | {key: value for key, value in moved.items() if key.startswith("skipped")}


def discriminator_step(state: TrainingState, student_pass: StudentPass) -> Metrics:
    """Each discriminator learns to tell photos (and, at a lower weight, echoed pictures) from the student's pass."""
    reals = draw_reals(state, student_pass.pictures.first(student_pass.photo_prompts))
    total = torch.zeros((), device=state.pair.device)
    metrics: Metrics = {}
    for critic in state.critics:
        real_logits = critic.logits(reals.features(critic))
        fake_logits = critic.logits([tap.detach() for tap in student_pass.features[critic.name]])
        loss = losses.adversarial_discriminator(real_logits, fake_logits, reals.weights)
        metrics[f"discriminator_{critic.name}"] = float(loss.detach())
        total = total + loss
    return metrics | state.optimizers.step(total, ["discriminators"])


@torch.no_grad()
def echo_step(state: TrainingState) -> Metrics:
    """Student → teacher: draw the concept in many scenes, keep what the judge finds to be the subject."""
    config, settings, batch = state.config, state.config.echo, state.config.train.batch_size
    first = int(state.randint(2**31 - 1, 1))
    numbers = range(first, first + settings.candidates)
    prompts = [scene_prompt(config.subject, number, config.concept.scenes) for number in numbers]
    batches = [draw_echo(state, prompts[start : start + batch]) for start in range(0, len(prompts), batch)]
    drawn = functools.reduce(EchoPool.join, batches)
    assert state.photos.identity is not None
    state.pool, verdicts = refresh(state.pool, drawn, state.photos.identity, settings)
    fallen = {f"echo_{why}": float(verdicts.count(why)) for why in ("identity", "photo_copy", "duplicate", "crowded")}
    return (
        {"echo_made": float(len(drawn)), "echo_kept": float(verdicts.count("kept"))}
        | fallen
        | {
            "echo_pool": float(len(state.pool)),
            "echo_identity_mean": float(drawn.scores.mean()),
        }
    )


# --- the losses of the student, as data -------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentLoss:
    """A row of the table below: the name is its key in `[loss]` and in the metrics.

    Args:
        function: values [B] of a pass. weighted_by_alpha_bar: weighted per sample by ᾱ_t, as every alignment loss is.
        available: whether the run has what it needs.
    """

    name: str
    function: Callable[[StudentPass], Tensor]
    weighted_by_alpha_bar: bool
    available: Callable[[TrainingState], bool] = lambda _state: True


def _identity(student_pass: StudentPass) -> Tensor:
    state = student_pass.state
    if state.config.critic.identity_target == "teacher":
        return losses.feature_distance(*student_pass.identity_features())
    assert state.photos.identity is not None
    return losses.photo_distance(student_pass.judged(), state.photos.identity)


def _sliced_wasserstein(student_pass: StudentPass) -> Tensor:
    state, settings = student_pass.state, student_pass.state.config.critic
    directions = losses.patch_directions(
        settings.swd_scales, settings.swd_projections, settings.swd_patch, state.generator
    )
    on_device = [kernels.to(state.pair.device) for kernels in directions]
    return losses.sliced_wasserstein(student_pass.pictures.image(), student_pass.target_image, on_device)


def _student_prior(student_pass: StudentPass) -> Tensor:
    state = student_pass.state
    assert state.prior is not None
    rows = prior_rows(state, state.prior)
    conditioning = encode_for_student(state, [state.prior.prompts[row] for row in rows])
    drawn = student_x0(state.pair.student, state.prior.noise[rows], conditioning)
    return losses.latent_alignment(drawn, state.prior.latents[rows])


def _adversarial(student_pass: StudentPass) -> Tensor:
    verdicts = [
        losses.adversarial_generator(critic.logits(student_pass.features[critic.name]))
        for critic in student_pass.state.critics
    ]
    return torch.stack(verdicts).sum(dim=0)


STUDENT_LOSSES: tuple[StudentLoss, ...] = (
    StudentLoss("latent", lambda p: losses.latent_alignment(p.pictures.latents, p.target), weighted_by_alpha_bar=True),
    StudentLoss(
        "identity",
        _identity,
        weighted_by_alpha_bar=True,
        available=lambda state: state.judge is not None,
    ),
    StudentLoss("sliced_wasserstein", _sliced_wasserstein, weighted_by_alpha_bar=True),
    StudentLoss("prior", _student_prior, weighted_by_alpha_bar=False, available=lambda state: state.prior is not None),
    StudentLoss("adversarial", _adversarial, weighted_by_alpha_bar=False, available=lambda state: bool(state.critics)),
)


def active_losses(state: TrainingState) -> list[StudentLoss]:
    """The rows with a weight above 0 whose needs are met."""
    return [term for term in STUDENT_LOSSES if getattr(state.config.loss, term.name) and term.available(state)]


@contextmanager
def frozen(critics: Sequence[Discriminator]) -> Iterator[None]:
    """Inside, no gradient is kept for the discriminators' heads, while it still flows through them."""
    for critic in critics:
        critic.heads.requires_grad_(False)
    try:
        yield
    finally:
        for critic in critics:
            critic.heads.requires_grad_(True)


def teacher_step(state: TrainingState, parts: Sequence[str] = ("teacher", "text"), *, echoes: bool = True) -> Metrics:
    """Concept in: the teacher's denoising loss on photos and `echoes`, which also trains the shared text side."""
    teacher = state.pair.teacher
    batch = draw_teacher_batch(state, echoes=echoes)
    conditioning = teacher.at_crops(state.pair.encoder.encode(batch.prompts), batch.crops)
    noise = state.randn_like(batch.latents)
    noisy = add_noise(teacher.schedule, batch.latents, noise, batch.timesteps)
    target = prediction_target(teacher.schedule, batch.latents, noise, batch.timesteps)
    loss = losses.denoising(teacher(noisy, batch.timesteps, conditioning), target, batch.masks).mean()
    metrics = {"denoising": float(loss.detach())}
    loss = state.config.loss.denoising * loss
    if state.prior is not None and state.config.loss.prior:
        kept = teacher_prior(state, state.prior)
        metrics["teacher_prior"] = float(kept.detach())
        loss = loss + state.config.loss.prior * kept
    return metrics | state.optimizers.step(loss, parts)


def teacher_prior(state: TrainingState, prior: Prior) -> Tensor:
    """Distance of the teacher's output for the class, renoised, from what it was before training; a scalar."""
    teacher = state.pair.teacher
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
