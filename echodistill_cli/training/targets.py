"""Extension: targets of several teacher steps, and replays of them in later steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from echodistill_cli.data.prompts import with_class
from echodistill_cli.diffusion.sampling import StudentStart, sample_latents, student_start, student_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.adapters import folded, without_lora
from echodistill_cli.training.state import TrainingState


def draw_start(state: TrainingState, noise: Tensor, conditioning: Conditioning) -> StudentStart:
    """Draw one of the student's steps, and sample with the student down to it.

    Args:
        state: of the run.
        noise: [B, C, h, w], standard normal.
        conditioning: of B prompts.
    """
    student = state.pair.student
    place = int(state.randint(student.steps, 1)) if student.steps > 1 else 0
    return student_start(student, noise, conditioning, place, lambda: state.randn_like(noise))


@torch.no_grad()
def multi_step_target(
    state: TrainingState,
    x0: Tensor,
    start: StudentStart,
    prompts: Sequence[str],
    conditioning: Conditioning,
    null: Conditioning,
) -> Tensor:
    """Generate targets [B, C, h, w] with the guided teacher in `train.target_steps` steps.

    They start from the student's own noise, so that each target is a function of it. With fresh noise the student would
    learn a blurred mean. The target of a later step starts at its timestep: more noise would hide what the student's
    input already shows. With replays the targets are added to the replay buffer.

    Args:
        state: of the run.
        x0: [B, C, h, w], the student's images.
        start: what the student started from.
        prompts: B texts.
        conditioning: of the prompts.
        null: of the empty prompt.
    """
    settings = state.config.train
    with folded(state.pair.teacher.unet):
        target = sample_latents(
            state.pair.teacher,
            start.noise,
            conditioning,
            null,
            steps=settings.target_steps,
            guidance_scale=settings.guidance_scale,
            init_latents=x0,
            strength=settings.target_strength,
            first=state.pair.teacher_timestep(start.place) if start.place else None,
        )
    if state.config.replays:
        base = _base_class_images(state, start, prompts)
        state.replay_buffer.add(start.latents, target, prompts, base, start.place)
    return target


@dataclass(frozen=True)
class ReplayBatch:
    """B samples that the student is trained on once more.

    Args:
        noise: [B, C, h, w], what the student starts from: noise, or z_t for a later step.
        target: [B, C, h, w], what it should generate.
        prompts: B texts.
        subject_rows: the samples that show the subject; the others show its class.
        places: of each sample's step among those of the student.
    """

    noise: Tensor
    target: Tensor
    prompts: list[str]
    subject_rows: list[int]
    places: list[int]


def replay_batch(state: TrainingState) -> ReplayBatch:
    """Draw from the replay buffer, mixed with class images.

    Images of the class keep the student's knowledge of it. They come from the prior (`train.class_share`), or from the
    noise and the prompt of a replayed target, with the class in place of the subject (`train.pair_share`). In such a
    pair only the token distinguishes subject and class.
    """
    settings, class_name = state.config.train, state.config.concept.class_name
    replayed = state.randint(len(state.replay_buffer), settings.batch_size).tolist()
    noise, target, prompts = state.replay_buffer.take(replayed)
    places = [state.replay_buffer.places[row] for row in replayed]
    of_the_class: set[int] = set()
    if state.prior is not None and settings.class_share:
        indices = state.random_rows(settings.class_share)
        rows = state.randint(len(state.prior.prompts), len(indices)).tolist()
        noise[indices], target[indices] = state.prior.noise[rows], state.prior.latents[rows]
        for index, row in zip(indices, rows, strict=True):
            prompts[index], places[index] = state.prior.prompts[row], state.prior.places[row]
        of_the_class.update(indices)
    if class_name is not None and state.replay_buffer.base is not None:
        for index in state.random_rows(settings.pair_share):
            if state.config.subject in prompts[index]:
                prompts[index] = with_class(prompts[index], state.config.subject, class_name)
                target[index] = state.replay_buffer.base[replayed[index]]
                of_the_class.add(index)
    subject_rows = [row for row in range(len(prompts)) if row not in of_the_class]
    return ReplayBatch(noise, target, prompts, subject_rows, places)


def _base_class_images(state: TrainingState, start: StudentStart, prompts: Sequence[str]) -> Tensor | None:
    """Generate the class instead of the subject with the base student; None without `train.pair_share`."""
    class_name = state.config.concept.class_name
    if class_name is None or not state.config.train.pair_share:
        return None
    texts = [with_class(prompt, state.config.subject, class_name) for prompt in prompts]
    return base_x0(state, start.latents, texts, start.places)


@torch.no_grad()
def base_x0(state: TrainingState, noise: Tensor, prompts: Sequence[str], places: Sequence[int] = ()) -> Tensor:
    """Return the x0 [B, C, h, w] of the base student and the base text encoder; see `student_x0`."""
    with base_models(state):
        return student_x0(state.pair.student, noise, state.pair.encoder.encode(prompts), places)


@contextmanager
def base_models(state: TrainingState) -> Iterator[None]:
    """Context in which the LoRA of student, teacher and text encoders is disabled; a learned token stays."""
    with ExitStack() as stack:
        for module in state.trained_modules().values():
            stack.enter_context(without_lora(module))
        yield
