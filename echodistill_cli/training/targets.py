"""Targets of several of the teacher's steps: drawn, tinted as asked, remembered, and drawn from memory again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from echodistill_cli.data.recolour import tinted_latents, without_colour
from echodistill_cli.diffusion.sampling import sample_latents, student_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.adapters import without_lora
from echodistill_cli.training.state import TrainingState


@torch.no_grad()
def drawn_target(
    state: TrainingState, x0: Tensor, noise: Tensor, prompts: Sequence[str], conditioning: Conditioning
) -> Tensor:
    """What the teacher, guided, draws in several steps, [B, C, h, w]; with replays it is remembered.

    With the student's own noise the target is a function of it: an average of many would be soft.

    Args:
        x0: [B, C, h, w], the student's pictures. noise: what they were drawn from.
        prompts: B texts. conditioning: what the encoder makes of them.
    """
    settings, encoder = state.config.train, state.pair.encoder
    asked, colours = in_own_colours(state, prompts)
    if any(colours):
        conditioning = encoder.encode(asked)
    target = sample_latents(
        state.pair.teacher,
        noise,
        conditioning,
        encoder.encode_null(),
        steps=settings.target_steps,
        guidance_scale=settings.guidance_scale,
        init_latents=x0,
        strength=settings.target_strength,
    )
    target = in_asked_colours(state, target, colours)
    if state.config.replays:
        state.targets.add(noise, target, prompts, _as_class(state, noise, prompts))
    return target


def in_own_colours(state: TrainingState, prompts: Sequence[str]) -> tuple[list[str], list[str | None]]:
    """Prompts that give the subject no colour, and the colours they gave it; as they are unless scenes are tinted."""
    if not state.config.concept.tint_scenes or state.config.concept.class_name is None:
        return list(prompts), [None] * len(prompts)
    split = [without_colour(prompt, state.config.subject) for prompt in prompts]
    return [prompt for prompt, _ in split], [colour for _, colour in split]


def in_asked_colours(state: TrainingState, latents: Tensor, colours: Sequence[str | None]) -> Tensor:
    """Pictures of the subject [B, C, h, w], tinted where a colour is asked for."""
    class_name = state.config.concept.class_name
    if class_name is None or not any(colours):
        return latents
    with base_models(state):
        return tinted_latents(latents, colours, class_name, state.pair, state.generator)


def draw_replay(state: TrainingState) -> tuple[Tensor, Tensor, list[str]]:
    """Noise and targets [B, C, h, w] and B prompts: remembered targets, and the class as the untouched student has it.

    The class is shown in pictures of its own (`train.class_share`), and from a target's very noise, asked for in the
    same words but for the subject's (`train.pair_share`): then nothing but that word can tell the two apart.
    """
    settings, class_name = state.config.train, state.config.concept.class_name
    remembered = state.randint(len(state.targets), settings.batch_size).tolist()
    noise, target, prompts = state.targets.take(remembered)
    if state.prior is not None and settings.class_share:
        chosen = state.chosen(settings.class_share)
        rows = state.randint(len(state.prior.prompts), len(chosen)).tolist()
        noise[chosen], target[chosen] = state.prior.noise[rows], state.prior.latents[rows]
        for index, row in zip(chosen, rows, strict=True):
            prompts[index] = state.prior.prompts[row]
    if class_name is not None and state.targets.untouched is not None:
        for index in state.chosen(settings.pair_share):
            if state.config.subject in prompts[index]:
                prompts[index] = prompts[index].replace(state.config.subject, class_name)
                target[index] = state.targets.untouched[remembered[index]]
    return noise, target, prompts


def _as_class(state: TrainingState, noise: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """What the untouched student makes of a batch's noise with the class in the subject's place, if pairs are shown."""
    class_name = state.config.concept.class_name
    if class_name is None or not state.config.train.pair_share:
        return None
    return base_x0(state, noise, [prompt.replace(state.config.subject, class_name) for prompt in prompts])


@torch.no_grad()
def base_x0(state: TrainingState, noise: Tensor, prompts: Sequence[str]) -> Tensor:
    """What student and text encoder made of some noise and prompts before they were trained, [B, C, h, w]."""
    with base_models(state):
        return student_x0(state.pair.student, noise, state.pair.encoder.encode(prompts))


@contextmanager
def base_models(state: TrainingState) -> Iterator[None]:
    """Inside, student, teacher and text encoders are as they were before training; a learned word stays."""
    with ExitStack() as stack:
        for module in state.trained_modules().values():
            stack.enter_context(without_lora(module))
        yield
