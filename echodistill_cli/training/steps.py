"""Bidirectional concept distillation, step by step as in the paper (EchoDistill, arXiv 2510.20512).

One step of the joint phase: the teacher learns the concept from the photos. The student learns it from the teacher
(alignment) and from the photos (adversarial). The discriminators learn to tell photos from the student's images. In the
echo phase the student's own best images join the photos for both models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from echodistill_cli.data.prompts import scene_prompt
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.schedule import add_noise, prediction_target
from echodistill_cli.models.adapters import load_lora_tensors, lora_tensors, without_lora
from echodistill_cli.training import batches, losses
from echodistill_cli.training.batches import StudentPass, critic_features, encode_for_student, prior_rows
from echodistill_cli.training.critics import PairedCritic, frozen
from echodistill_cli.training.dataset import Prior
from echodistill_cli.training.optimizers import Metrics
from echodistill_cli.training.pools import EchoPool, refresh
from echodistill_cli.training.state import CARRY_BACK, HEAD_START, JOINT, Phase, TrainingState
from echodistill_cli.training.targets import replay_batch
from echodistill_cli.training.terms import weighted_losses

Step = Callable[[TrainingState], Metrics]
# Factor on the teacher's rate in the carry back: it should clean up the student's LoRA, not train over it.
CARRY_BACK_RATE = 0.25
# The paired critic: updates and batch size before the first replay, and the noise on what it sees.
PAIRED_HEAD_START, PAIRED_BATCH, INSTANCE_NOISE = 150, 16, 0.1


def training_step(state: TrainingState) -> Metrics:
    """Take one step of the joint phase, with an echo refresh when it is due. Return losses by name."""
    if state.step == 0:
        begin(state)
    state.optimizers.set_rates(state.progress)
    metrics = teacher_step(state) if state.config.loss.denoising else {}  # concept in
    generated, student_metrics = student_step(state)  # teacher → student
    metrics |= student_metrics
    for _ in range(state.config.replays):  # extension: train.replays
        metrics |= replay_step(state)
    if state.critics:
        metrics |= discriminator_step(state, generated)
    state.finish_step()
    if state.echo_is_due:
        metrics |= echo_step(state)  # student → teacher
    return metrics


# --- the teacher ------------------------------------------------------------------------------------------------------


def teacher_step(state: TrainingState, parts: Sequence[str] = ("teacher", "text"), *, echo: bool = True) -> Metrics:
    """Train the teacher and the shared text side with the denoising loss.

    Args:
        state: of the run.
        parts: what the loss trains.
        echo: whether images of the echo pool join the photos.
    """
    state.optimizers.forget_gradients()
    teacher = state.pair.teacher
    batch = batches.teacher_batch(state, echo=echo)
    conditioning = teacher.at_crops(state.pair.encoder.encode(batch.prompts), batch.crops)
    noise = state.randn_like(batch.latents)
    noisy = add_noise(teacher.schedule, batch.latents, noise, batch.timesteps)
    target = prediction_target(teacher.schedule, batch.latents, noise, batch.timesteps)
    loss = losses.denoising(teacher(noisy, batch.timesteps, conditioning), target, batch.masks).mean()
    metrics: Metrics = {"denoising": loss.detach()}
    loss = state.config.loss.denoising * loss
    if state.prior is not None and state.config.loss.prior:
        preservation = teacher_prior(state, state.prior)
        metrics["teacher_prior"] = preservation.detach()
        loss = loss + state.config.loss.prior * preservation
    return metrics | state.optimizers.step(loss, parts)


def teacher_prior(state: TrainingState, prior: Prior) -> Tensor:
    """Return the distance between trained and base teacher on renoised class images; a scalar."""
    teacher = state.pair.teacher
    rows = prior_rows(state, prior)
    latents = prior.latents[rows]
    timesteps = batches.random_timesteps(state, len(rows))
    noisy = add_noise(teacher.schedule, latents, state.randn_like(latents), timesteps)
    with torch.no_grad(), without_lora(teacher.unet):
        target = teacher(noisy, timesteps, prior.conditioning.take(rows))
    conditioning = state.pair.encoder.encode([prior.prompts[row] for row in rows])
    return losses.latent_alignment(teacher(noisy, timesteps, conditioning), target).mean()


# --- the student ------------------------------------------------------------------------------------------------------


def student_step(state: TrainingState) -> tuple[StudentPass, Metrics]:
    """Train the student on one-step images, towards the teacher's guided x0 and the photos."""
    state.optimizers.forget_gradients()
    with frozen(state.critics):
        generated = batches.student_pass(state)
        of_images, others, metrics = weighted_losses(state, generated)
        if generated.again is not None and of_images.requires_grad:
            of_images = _through_the_student(state, generated.images.latents, of_images, generated.again)
        metrics |= state.optimizers.step(of_images + others, state.student_parts)
    return generated, metrics


def _through_the_student(state: TrainingState, seen: Tensor, loss: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """Return a loss of images with its gradient, which is computed first, at the same images with a graph.

    Args:
        state: of the run.
        seen: [B, C, h, w], the images that the loss was computed on, a leaf.
        loss: a scalar.
        again: returns the same images with the student's graph.
    """
    scale = state.optimizers.loss_scale
    (pull,) = torch.autograd.grad(loss * scale, seen)
    x0 = again()
    return loss.detach() + (pull / scale * (x0 - x0.detach())).sum()


# --- the discriminators -----------------------------------------------------------------------------------------------


def discriminator_step(state: TrainingState, generated: StudentPass) -> Metrics:
    """Train each discriminator to tell photos, and weighted echo images, from the student's images.

    It rests in a batch of scenes, which no photo shows.
    """
    if not generated.photo_prompts:
        return {}
    reals = batches.real_batch(state, generated.photo_images)
    total = torch.zeros((), device=state.pair.device)
    metrics: Metrics = {}
    for critic in state.critics:
        fakes = [tap.detach() for tap in critic_features(state, generated, critic)]
        real_logits, fake_logits = critic.judge(reals.features(critic), fakes)
        loss = losses.adversarial_discriminator(real_logits, fake_logits, reals.weights)
        metrics[f"discriminator_{critic.name}"] = loss.detach()
        total = total + loss
    return metrics | state.optimizers.step(total, ["discriminators"])


# --- the echo ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def echo_step(state: TrainingState) -> Metrics:
    """Generate the subject in many scenes with the student, and keep the images that show it well enough."""
    config, settings, size = state.config, state.config.echo, state.config.train.batch_size
    first = int(state.randint(2**31 - 1, 1))
    numbers = range(first, first + settings.candidates)
    prompts = [scene_prompt(config.subject, number, config.concept.scenes) for number in numbers]
    parts = [batches.echo_candidates(state, prompts[start : start + size]) for start in range(0, len(prompts), size)]
    candidates = functools.reduce(EchoPool.join, parts)
    assert state.photos.identity is not None
    state.pool, verdicts = refresh(state.pool, candidates, state.photos.identity, settings)
    made: Metrics = {"echo_made": float(len(candidates)), "echo_kept": float(verdicts.count("kept"))}
    rejected = {f"echo_{why}": float(verdicts.count(why)) for why in ("identity", "photo_copy", "duplicate", "crowded")}
    pool = {"echo_pool": float(len(state.pool)), "echo_identity_mean": float(candidates.scores.mean())}
    return made | rejected | pool


# --- extensions: the teacher's head start, replays, the carry back ----------------------------------------------------


def begin(state: TrainingState) -> None:
    """Prepare the first joint step: finish the head start, carry over its LoRA, fill the replay buffer.

    `train.first_targets` fills the buffer first: replays would overfit a few targets.
    """
    while state.phase is HEAD_START:
        head_start_step(state)
    if state.config.train.carry_over:
        load_lora_tensors(state.pair.student.unet, lora_tensors(state.pair.teacher.unet))
    for number in range(state.config.train.first_targets if state.config.replays else 0):
        batches.add_first_targets(state, number)
    if state.paired_critic is not None and len(state.replay_buffer):
        _teach_paired_critic(state, state.paired_critic)


def head_start_step(state: TrainingState) -> Metrics:
    """Take one step of the teacher alone, before the first joint step; the last one averages its weights.

    Returns:
        its losses, and its number as "head_start_step".
    """
    metrics = teacher_step(state)
    state.finish_step(HEAD_START)
    state.optimizers.average(["teacher", "text"], state.head_start_step, state.config.train.head_start)
    return {"head_start_step": float(state.head_start_step)} | metrics


def replay_step(state: TrainingState) -> Metrics:
    """Train the student once more, on stored targets and on class images by the base student.

    Class images, for example in other colors, keep the meaning of words that the photos contradict.
    """
    state.optimizers.forget_gradients()
    batch = replay_batch(state)
    x0 = student_x0(state.pair.student, batch.noise, encode_for_student(state, batch.prompts), batch.places)
    loss = losses.latent_alignment(x0, batch.target).mean()
    metrics: Metrics = {"replay": loss.detach()}
    total = state.config.loss.latent * loss
    rows = batch.subject_rows
    if state.paired_critic is not None and rows:
        pull = paired_pull(state, state.paired_critic, x0, x0[rows], batch.target[rows])
        metrics["paired"] = pull.detach()
        total = total + state.config.loss.paired * pull
    state.optimizers.step(total, state.student_parts)
    if state.paired_critic is not None and rows:
        metrics |= paired_critic_step(state, state.paired_critic, x0[rows].detach(), batch.target[rows])
    return metrics


def paired_pull(state: TrainingState, critic: PairedCritic, x0: Tensor, images: Tensor, targets: Tensor) -> Tensor:
    """Return the paired adversarial loss, scaled so that it pulls at x0 as the latent loss does.

    Both gradients are compared as in VQGAN (Esser et al. 2021, arXiv 2012.09841), so one weight suits every model.

    Args:
        state: of the run.
        critic: not trained here.
        x0: [B, C, h, w], all images of the batch.
        images: [K, C, h, w], those of the subject, by rows of `x0`.
        targets: [K, C, h, w], the targets of the same noise.
    """
    with frozen([critic]):
        values = losses.paired_adversarial(critic(_blurred(state, images)), critic(_blurred(state, targets)))
        loss = values.sum() / len(x0)
        (pull,) = torch.autograd.grad(loss, x0)
    regression = (images - targets).detach().norm() / x0.numel()  # the gradient of `losses.latent_alignment`
    scale: Tensor = state.config.loss.latent * regression / pull.norm().clamp(min=1e-12)
    # The loss with its gradient, which is known now: the backward pass need not go through the critic again.
    return scale * (loss.detach() + (pull * (x0 - x0.detach())).sum())


def paired_critic_step(state: TrainingState, critic: PairedCritic, images: Tensor, targets: Tensor) -> Metrics:
    """Train the paired critic to tell targets from the student's images of the same noise.

    Args:
        state: of the run.
        critic: to train.
        images: [K, C, h, w], the student's, without gradient.
        targets: [K, C, h, w].
    """
    both = torch.cat((_blurred(state, targets), _blurred(state, images)))
    loss = losses.paired_adversarial(*critic(both).chunk(2)).mean()
    state.optimizers.step(loss, ["paired"])
    return {"discriminator_paired": loss.detach()}


def _blurred(state: TrainingState, latents: Tensor) -> Tensor:
    """Instance noise, which keeps a critic from winning by traces that no eye sees (Sønderby et al. 2017)."""
    return latents + INSTANCE_NOISE * state.randn_like(latents)


@torch.no_grad()
def _replayed_images(state: TrainingState) -> Tensor:
    """Return the student's images of everything that it started from in the buffer, [N, C, h, w]."""
    buffer, size = state.replay_buffer, state.config.train.batch_size
    images = []
    for rows in (range(start, min(start + size, len(buffer))) for start in range(0, len(buffer), size)):
        noise, _, prompts = buffer.take(rows)
        places = [buffer.places[row] for row in rows]
        images.append(student_x0(state.pair.student, noise, state.pair.encoder.encode(prompts), places))
    return torch.cat(images)


def _teach_paired_critic(state: TrainingState, critic: PairedCritic) -> None:
    """Train the critic on the first targets: at the start it knows nothing, and its pull would be noise."""
    images, targets = _replayed_images(state), state.replay_buffer.latents
    assert targets is not None
    for _ in range(PAIRED_HEAD_START):
        rows = state.randint(len(images), PAIRED_BATCH)
        paired_critic_step(state, critic, images[rows], targets[rows])


def carry_back_step(state: TrainingState) -> Metrics:
    """Take one teacher step after the last joint step; the first starts from the student's LoRA.

    The teacher trains on the photos alone, at a low rate, and ends at the average of the second half of these steps.
    The text side is frozen, because the student is finished.

    Returns:
        its losses, and its number as "carry_back_step".
    """
    if state.carry_back_step == 0:
        state.optimizers.mean.reset()  # a carry back that was interrupted and then abandoned may have left one
        load_lora_tensors(state.pair.teacher.unet, lora_tensors(state.pair.student.unet))
    state.optimizers.scale_rate("teacher", CARRY_BACK_RATE)
    metrics = teacher_step(state, parts=["teacher"], echo=False)
    state.finish_step(CARRY_BACK)
    state.optimizers.average(["teacher"], state.carry_back_step, state.config.echo.carry_back)
    return {"carry_back_step": float(state.carry_back_step)} | metrics


PHASE_STEPS: dict[Phase, Step] = {HEAD_START: head_start_step, JOINT: training_step, CARRY_BACK: carry_back_step}
