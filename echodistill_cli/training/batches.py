"""What a step is computed on: teacher batch, student images and targets, reals, echo candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from echodistill_cli.data.prompts import scene_prompt
from echodistill_cli.data.views import prompt_for
from echodistill_cli.diffusion.sampling import StudentStart, student_sample, student_x0, teacher_x0
from echodistill_cli.diffusion.schedule import add_noise, send
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.memory import builds_graph_last
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.models.waiting import present
from echodistill_cli.training.critics import Discriminator, ImageBatch, features_of
from echodistill_cli.training.dataset import Prior
from echodistill_cli.training.losses import identity_scores
from echodistill_cli.training.pools import EchoPool
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.targets import draw_start, multi_step_target


@dataclass(frozen=True)
class TeacherBatch:
    """B samples for the teacher's denoising loss.

    Args:
        latents: [B, C, h, w].
        masks: [B, 1, h, w].
        prompts: B texts.
        crops: (top, left) corner of each sample in its photo.
        timesteps: [B], uniform; for echo images only the noisier ones (`echo.teacher_noise`), because they should
            teach composition while detail comes from the photos.
    """

    latents: Tensor
    masks: Tensor
    prompts: list[str]
    crops: list[tuple[int, int]]
    timesteps: Tensor


@dataclass(frozen=True)
class StudentPass:
    """B images of one of the student's steps, and what its losses compare them with.

    Args:
        images: the student's, with gradient.
        target: the teacher's x0 of the same images, without gradient.
        alpha_bar: [B], ᾱ_t of the timestep of the target; 1 for targets of several steps.
        photo_prompts: how many prompts, the first ones, are like the photos'; the others are scenes.
        again: returns the latents of `images` once more, with the student's graph; None if they have it.
    """

    images: ImageBatch
    target: ImageBatch
    alpha_bar: Tensor
    photo_prompts: int
    again: Callable[[], Tensor] | None = None

    @cached_property
    def photo_images(self) -> ImageBatch:
        """The images with photo prompts. Discriminators see no others, because no photo shows the scenes."""
        return self.images.rows(self.photo_prompts)


@dataclass(frozen=True)
class RealBatch:
    """Real samples of the discriminators: B photos, then B echo images if there are any.

    Args:
        images: all R of them, with the prompts and the renoising of the student's images.
        weights: [R].
        cached: features [R, N, D] per image discriminator and tap.
    """

    images: ImageBatch
    weights: Tensor
    cached: dict[str, list[Tensor]]

    def features(self, critic: Discriminator) -> list[Tensor]:
        """Return one discriminator's features, [R, N, D] per tap; cached unless they depend on noise."""
        if critic.name in self.cached:
            return self.cached[critic.name]
        with torch.no_grad():
            return features_of(self.images, critic.backbone)


def prior_rows(state: TrainingState, prior: Prior) -> list[int]:
    """Draw half a batch of the prior, as row numbers."""
    return state.randint(len(prior.prompts), max(1, state.config.train.batch_size // 2)).tolist()


def random_timesteps(state: TrainingState, count: int) -> Tensor:
    """Draw uniform timesteps [count] of the teacher's schedule, on the device."""
    return send(_timesteps(state, count), state.pair.device)


def _timesteps(state: TrainingState, count: int) -> Tensor:
    return state.randint(len(state.pair.teacher.schedule.alphas_cumprod), count)


def teacher_batch(state: TrainingState, *, echo: bool = True) -> TeacherBatch:
    """Draw augmented photos and, if `echo` is true and the pool holds any, echo images."""
    size, photos, subject = state.config.train.batch_size, state.photos, state.config.subject
    from_pool = torch.rand(size, generator=state.generator) < state.config.echo.teacher_share
    timesteps = _timesteps(state, size)
    latents, masks, prompts, crops = [], [], [], []
    pool = state.pool if echo else None
    for index, is_echo in enumerate(from_pool.tolist()):
        if is_echo and pool:
            steps = len(state.pair.teacher.schedule.alphas_cumprod)
            least = state.config.echo.teacher_noise
            timesteps[index] = int(least * steps + (1 - least) * int(timesteps[index]))
            row = int(state.randint(len(pool), 1))
            latents.append(pool.latents[row])
            masks.append(torch.ones_like(photos.masks[0]))
            prompts.append(pool.prompts[row])
            crops.append((0, 0))
        else:
            row = int(state.randint(len(photos.latents), 1))
            latents.append(photos.latents[row])
            masks.append(photos.masks[row])
            prompts.append(prompt_for(photos.views[row], subject, state.generator))
            crops.append(photos.views[row].crop)
    on_device = send(timesteps, state.pair.device)
    return TeacherBatch(torch.stack(latents), torch.stack(masks), prompts, crops, on_device)


def student_pass(state: TrainingState) -> StudentPass:
    """Generate B images of the subject in one of the student's steps, and the teacher's guided x0 of each.

    Where memory is scarce the graph through the student is built last (`StudentPass.again`). Neither the teacher nor
    the decoder and the image encoders run beside it then.
    """
    pair, settings = state.pair, state.config.train
    prompts = _student_prompts(state, state.step)
    trainable, null = _encode_for_pass(state, prompts)
    conditioning = trainable.detach()
    start = draw_start(state, _unit_noise(state, len(prompts)), conditioning)
    is_last = pair.alternating or builds_graph_last(state.config)
    with torch.set_grad_enabled(not is_last):
        x0 = student_x0(pair.student, start.latents, trainable, start.places)
    renoise, timesteps = state.randn_like(start.noise), random_timesteps(state, len(prompts))
    if settings.target_steps > 1:
        target = multi_step_target(state, x0.detach(), start, prompts, conditioning, null)
        alpha_bar = torch.ones(len(prompts), device=target.device)
    else:
        at = _up_to(state, start, timesteps)
        target = _one_step_target(state, x0.detach(), start, at, conditioning, null)
        alpha_bar = pair.teacher.schedule.alpha_bar(at)
    again = None
    if is_last:
        x0.requires_grad_()
        again = partial(student_x0, pair.student, start.latents, trainable, start.places)
    images = ImageBatch(x0, pair.codec, renoise, timesteps, conditioning)
    return StudentPass(images, replace(images, latents=target), alpha_bar, settings.photo_prompts(state.step), again)


def _up_to(state: TrainingState, start: StudentStart, timesteps: Tensor) -> Tensor:
    """Scale random timesteps down to a later step: more noise would hide what its input shows."""
    if not start.place:
        return timesteps
    schedule = state.pair.teacher.schedule
    return timesteps * (state.pair.teacher_timestep(start.place) + 1) // (schedule.last_timestep + 1)


@torch.no_grad()
def _one_step_target(
    state: TrainingState,
    x0: Tensor,
    start: StudentStart,
    timesteps: Tensor,
    conditioning: Conditioning,
    null: Conditioning,
) -> Tensor:
    """Return the teacher's guided x0 of the renoised student images, [B, C, h, w].

    The noise is the student's own. With fresh noise one image has many targets, and regression ends in their blurred
    mean.
    """
    teacher = state.pair.teacher
    noisy = add_noise(teacher.schedule, x0, start.noise, timesteps)
    return teacher_x0(teacher, noisy, timesteps, conditioning, null, state.config.train.guidance_scale)


@torch.no_grad()
def add_first_targets(state: TrainingState, number: int) -> None:
    """Add batch `number` of targets to the replay buffer, as a student pass would, and train nothing."""
    prompts = _student_prompts(state, number)
    conditioning, null = state.pair.encoder.encode_with_null(prompts)
    start = draw_start(state, _unit_noise(state, len(prompts)), conditioning)
    x0 = student_x0(state.pair.student, start.latents, conditioning, start.places)
    multi_step_target(state, x0, start, prompts, conditioning, null)


def critic_features(state: TrainingState, generated: StudentPass, critic: Discriminator) -> list[Tensor]:
    """Return a discriminator's features of the images with photo prompts, per tap.

    A backbone that is also the identity encoder runs once, on all images.
    """
    if critic.backbone is state.identity_encoder:
        return [tap[: generated.photo_prompts] for tap in features_of(generated.images, critic.backbone)]
    return features_of(generated.photo_images, critic.backbone)


def _unit_noise(state: TrainingState, count: int) -> Tensor:
    return state.randn_like(state.photos.latents[:1].expand(count, -1, -1, -1))


def _student_prompts(state: TrainingState, number: int) -> list[str]:
    """Draw batch `number` of prompts: first `train.photo_prompts` like those of the photos, then scenes."""
    count = state.config.train.photo_prompts(number)
    prompts = [_photo_prompt(state) for _ in range(count)]
    return prompts + [_scene_prompt(state) for _ in range(state.config.train.batch_size - count)]


def _photo_prompt(state: TrainingState) -> str:
    row = int(state.randint(len(state.photos.real_views), 1))
    return prompt_for(state.photos.real_views[row], state.config.subject, state.generator)


def _scene_prompt(state: TrainingState) -> str:
    return scene_prompt(state.config.subject, int(state.randint(2**31 - 1, 1)), state.config.concept.scenes)


def encode_for_student(state: TrainingState, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts, with gradient if the student's losses train the text side too."""
    with torch.set_grad_enabled("text" in state.student_parts):
        return state.pair.encoder.encode(prompts)


def _encode_for_pass(state: TrainingState, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
    """Encode prompts as `encode_for_student` does, and the empty prompt; in one pass without gradient."""
    if "text" not in state.student_parts:
        return state.pair.encoder.encode_with_null(prompts)
    with torch.no_grad():
        null = state.pair.encoder.encode_null()
    return encode_for_student(state, prompts), null


def real_batch(state: TrainingState, fakes: ImageBatch) -> RealBatch:
    """Draw as many photos as there are fakes, and as many echo images at their lower weight."""
    size = len(fakes.latents)
    rows = send(state.randint(len(state.photos.real_latents), size), state.pair.device)
    latents = state.photos.real_latents[rows]
    cached = {name: [tap[rows] for tap in taps] for name, taps in state.photos.critics.items()}
    weights = torch.ones(size, device=latents.device)
    if not state.pool or not state.config.echo.real_weight:
        return RealBatch(replace(fakes, latents=latents, whole=None), weights, cached)
    rows = send(state.randint(len(state.pool), size), state.pair.device)
    cached = {
        name: [torch.cat((tap, more[rows])) for tap, more in zip(taps, state.pool.critics[name], strict=True)]
        for name, taps in cached.items()
    }
    images = ImageBatch(
        torch.cat((latents, state.pool.latents[rows])),
        fakes.codec,
        fakes.noise.repeat(2, 1, 1, 1),
        fakes.timesteps.repeat(2),
        fakes.conditioning.join(fakes.conditioning),
    )
    return RealBatch(images, torch.cat((weights, weights * state.config.echo.real_weight)), cached)


@torch.no_grad()
def echo_candidates(state: TrainingState, prompts: Sequence[str]) -> EchoPool:
    """Generate images in all steps, with the features that selection and discriminators need."""
    encoder, photos = state.identity_encoder, state.photos.identity
    assert encoder is not None
    assert photos is not None
    noise = _unit_noise(state, len(prompts))
    with state.at_export_scale():
        conditioning = state.pair.encoder.encode(prompts)
        latents = student_sample(state.pair.student, noise, conditioning, lambda: state.randn_like(noise))
    image = state.pair.codec.decode(latents)
    backbones = {c.name: c.backbone for c in state.critics if isinstance(c.backbone, ImageBackbone)}
    taps = dict[ImageBackbone, list[Tensor]]()
    for backbone in (encoder, *backbones.values()):
        if backbone not in taps:
            with present(backbone):
                taps[backbone] = backbone.features(image)
    features = taps[encoder][0][:, 0]
    return EchoPool(
        latents=latents,
        features=features,
        scores=identity_scores(features, photos),
        prompts=list(prompts),
        critics={name: taps[backbone] for name, backbone in backbones.items()},
    )
