"""Extension: targets of several teacher steps, optionally tinted, and replays of them in later steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from echodistill_cli.config.schema import Config
from echodistill_cli.data.recolour import tinted_latents, without_colour
from echodistill_cli.diffusion.sampling import sample_latents, student_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.adapters import folded, without_lora
from echodistill_cli.training.state import TrainingState


@torch.no_grad()
def multi_step_target(
    state: TrainingState,
    x0: Tensor,
    noise: Tensor,
    prompts: Sequence[str],
    conditioning: Conditioning,
    null: Conditioning,
) -> Tensor:
    """Generate targets [B, C, h, w] with the guided teacher in `train.target_steps` steps.

    They start from the student's own noise, so that each target is a function of it. With fresh noise the student would
    learn a blurred mean. With replays the targets are added to the replay buffer.

    Args:
        state: of the run.
        x0: [B, C, h, w], the student's images.
        noise: [B, C, h, w], what the student started from.
        prompts: B texts.
        conditioning: of the prompts.
        null: of the empty prompt.
    """
    settings, encoder = state.config.train, state.pair.encoder
    plain_prompts, colours = without_colours(state.config, prompts)
    if any(colours):
        conditioning = encoder.encode(plain_prompts)
    with folded(state.pair.teacher.unet):
        target = sample_latents(
            state.pair.teacher,
            noise,
            conditioning,
            null,
            steps=settings.target_steps,
            guidance_scale=settings.guidance_scale,
            init_latents=x0,
            strength=settings.target_strength,
        )
    target = tint(state, target, colours)
    if state.config.replays:
        state.replay_buffer.add(noise, target, prompts, _base_class_images(state, noise, prompts))
    return target


def without_colours(config: Config, prompts: Sequence[str]) -> tuple[list[str], list[str | None]]:
    """Remove the colors that prompts give the subject; return the prompts and these colors.

    Without `concept.tint_scenes` or a class name the prompts stay as they are, and no color is returned.
    """
    if not config.concept.tint_scenes or config.concept.class_name is None:
        return list(prompts), [None] * len(prompts)
    pairs = [without_colour(prompt, config.subject) for prompt in prompts]
    return [prompt for prompt, _ in pairs], [colour for _, colour in pairs]


def tint(state: TrainingState, latents: Tensor, colours: Sequence[str | None]) -> Tensor:
    """Tint the subject of images [B, C, h, w] in its color; None leaves an image as it is."""
    class_name = state.config.concept.class_name
    if class_name is None or not any(colours):
        return latents
    with base_models(state):
        return tinted_latents(latents, colours, class_name, state.pair, state.generator)


def replay_batch(state: TrainingState) -> tuple[Tensor, Tensor, list[str]]:
    """Draw noise, targets [B, C, h, w] and B prompts from the replay buffer, mixed with class images.

    Images of the class keep the student's knowledge of it. They come from the prior (`train.class_share`), or from the
    noise and the prompt of a replayed target, with the class in place of the subject (`train.pair_share`). In such a
    pair only the token distinguishes subject and class.
    """
    settings, class_name = state.config.train, state.config.concept.class_name
    replayed = state.randint(len(state.replay_buffer), settings.batch_size).tolist()
    noise, target, prompts = state.replay_buffer.take(replayed)
    if state.prior is not None and settings.class_share:
        indices = state.random_rows(settings.class_share)
        rows = state.randint(len(state.prior.prompts), len(indices)).tolist()
        noise[indices], target[indices] = state.prior.noise[rows], state.prior.latents[rows]
        for index, row in zip(indices, rows, strict=True):
            prompts[index] = state.prior.prompts[row]
    if class_name is not None and state.replay_buffer.base is not None:
        for index in state.random_rows(settings.pair_share):
            if state.config.subject in prompts[index]:
                prompts[index] = prompts[index].replace(state.config.subject, class_name)
                target[index] = state.replay_buffer.base[replayed[index]]
    return noise, target, prompts


def _base_class_images(state: TrainingState, noise: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """Generate the class instead of the subject with the base student; None without `train.pair_share`."""
    class_name = state.config.concept.class_name
    if class_name is None or not state.config.train.pair_share:
        return None
    return base_x0(state, noise, [prompt.replace(state.config.subject, class_name) for prompt in prompts])


@torch.no_grad()
def base_x0(state: TrainingState, noise: Tensor, prompts: Sequence[str]) -> Tensor:
    """Generate latents [B, C, h, w] with the base student and the base text encoder."""
    with base_models(state):
        return student_x0(state.pair.student, noise, state.pair.encoder.encode(prompts))


@contextmanager
def base_models(state: TrainingState) -> Iterator[None]:
    """Context in which the LoRA of student, teacher and text encoders is disabled; a learned token stays."""
    with ExitStack() as stack:
        for module in state.trained_modules().values():
            stack.enter_context(without_lora(module))
        yield
