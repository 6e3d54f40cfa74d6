"""What one step trains on: the teacher's samples, the student's pass, its targets, the reals, the echo's drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from echodistill_cli.data.prompts import scene_prompt
from echodistill_cli.data.views import prompt_for
from echodistill_cli.diffusion.sampling import student_x0, teacher_x0
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training.critics import Discriminator, ImageBatch, TeacherBackbone, look
from echodistill_cli.training.losses import identity_scores
from echodistill_cli.training.pools import EchoPool, least_score
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.targets import drawn_target, in_asked_colours, in_own_colours


class StudentPass:
    """One batch of one-step pictures with all that its losses look at; pictures are decoded once, when asked for.

    Args:
        pictures: the student's, with gradient. target: the teacher's x0 latents, without.
        alpha_bar: ᾱ_t [B] of the timestep that the teacher looked at them through; 1 for targets of several steps.
        photo_like: how many of them, the first, were asked for as the photos are; the others are in scenes.
    """

    def __init__(
        self, state: TrainingState, pictures: ImageBatch, target: Tensor, alpha_bar: Tensor, photo_prompts: int
    ) -> None:
        self.state, self.pictures, self.target, self.alpha_bar = state, pictures, target, alpha_bar
        self.photo_prompts = photo_prompts

    @cached_property
    def target_image(self) -> Tensor:
        """The teacher's x0 decoded, without gradient."""
        with torch.no_grad():
            return self.state.pair.codec.decode(self.target)

    @cached_property
    def features(self) -> dict[str, list[Tensor]]:
        """Every discriminator's features of the photo-like pictures: a scene that no photo shows is no fault."""
        seen = {critic.name: self._seen_by(critic.backbone) for critic in self.state.critics}
        return {name: [tap[: self.photo_prompts] for tap in taps] for name, taps in seen.items()}

    def identity_features(self) -> tuple[Tensor, Tensor]:
        """The judge's features of the student's pictures and of the teacher's, [B, N, D] each."""
        assert self.state.judge is not None
        with torch.no_grad():
            target = self.state.judge.features(self.target_image)[0]
        return self._seen_by(self.state.judge)[0], target

    def judged(self) -> Tensor:
        """The judge's features of the student's pictures, one row each as it has them of the photos, [B, D]."""
        assert self.state.judge is not None
        return self._seen_by(self.state.judge)[0][:, 0]

    def _seen_by(self, backbone: ImageBackbone | TeacherBackbone) -> list[Tensor]:
        """Features from one backbone; one that serves as judge and as critic looks once, a mere critic at less."""
        if backbone not in self._looks:
            is_judge = backbone is self.state.judge
            self._looks[backbone] = look(
                backbone, self.pictures if is_judge else self.pictures.first(self.photo_prompts)
            )
        return self._looks[backbone]

    @cached_property
    def _looks(self) -> dict[nn.Module, list[Tensor]]:
        return {}


@dataclass(frozen=True)
class Reals:
    """What the discriminators are told is real: B photos, then as many echoed pictures once there are any.

    Args:
        pictures: all R of them, paired with the student's prompts and renoising. weights: [R].
        cached: per image discriminator and tap, features [R, N, D].
    """

    pictures: ImageBatch
    weights: Tensor
    cached: dict[str, list[Tensor]]

    def features(self, critic: Discriminator) -> list[Tensor]:
        """One discriminator's features, per tap [R, N, D]: remembered ones, or for a latent backbone those of now."""
        if critic.name in self.cached:
            return self.cached[critic.name]
        with torch.no_grad():
            return look(critic.backbone, self.pictures)


def draw_timesteps(state: TrainingState, count: int) -> Tensor:
    """Uniform timesteps [count] of the teacher's schedule, on the device."""
    return state.randint(len(state.pair.teacher.schedule.alphas_cumprod), count).to(state.pair.device)


@dataclass(frozen=True)
class TeacherBatch:
    """B samples for the teacher's denoising loss.

    Args:
        latents: [B, C, h, w]. masks: [B, 1, h, w]. prompts, crops: B texts and (top, left) corners.
        timesteps: [B], uniform; of echoed pictures only the noisier ones (`echo.teacher_noise`): they teach what is
            where, while detail comes from the photos.
    """

    latents: Tensor
    masks: Tensor
    prompts: list[str]
    crops: list[tuple[int, int]]
    timesteps: Tensor


def draw_teacher_batch(state: TrainingState, *, echoes: bool = True) -> TeacherBatch:
    """Augmented photos, and echoed pictures if there are any and they are wanted."""
    batch, photos, subject = state.config.train.batch_size, state.photos, state.config.subject
    from_pool = torch.rand(batch, generator=state.generator) < state.config.echo.teacher_share
    timesteps = draw_timesteps(state, batch)
    latents, masks, prompts, crops = [], [], [], []
    pool = state.pool if echoes else None
    for index, echoed in enumerate(from_pool.tolist()):
        if echoed and pool:
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
    return TeacherBatch(torch.stack(latents), torch.stack(masks), prompts, crops, timesteps)


def draw_student_pass(state: TrainingState) -> StudentPass:
    """B one-step pictures of the concept, and what the current teacher, guided, makes of them."""
    pair, teacher, settings = state.pair, state.pair.teacher, state.config.train
    batch = settings.batch_size
    prompts, photo_prompts = _student_prompts(state)
    wanted = encode_for_student(state, prompts)
    conditioning = wanted.detach()
    noise = state.randn_like(state.photos.latents[:1].expand(batch, -1, -1, -1))
    with torch.set_grad_enabled(not pair.alternating):
        x0 = student_x0(pair.student, noise, wanted)
    renoise, timesteps = state.randn_like(noise), draw_timesteps(state, batch)
    if settings.target_steps > 1:
        target = drawn_target(state, x0.detach(), noise, prompts, conditioning)
        alpha_bar = torch.ones(batch, device=target.device)
    else:
        null = pair.encoder.encode_null().detach()
        with torch.no_grad():
            # The student's own noise: with fresh noise one picture has many targets, and regression ends in their
            # blurred mean.
            noisy = add_noise(teacher.schedule, x0.detach(), noise, timesteps)
            target = teacher_x0(teacher, noisy, timesteps, conditioning, null, settings.guidance_scale)
        alpha_bar = teacher.schedule.alpha_bar(timesteps)
    if pair.alternating:  # the graph is made only now, when the teacher is done
        x0 = student_x0(pair.student, noise, wanted)
    pictures = ImageBatch(x0, decoded_once(state, x0), renoise, timesteps, conditioning)
    return StudentPass(state, pictures, target, alpha_bar, photo_prompts)


@torch.no_grad()
def draw_first_targets(state: TrainingState) -> None:
    """A batch of targets for the memory alone: what a student's pass would be pulled towards, without the pass."""
    prompts, _ = _student_prompts(state)
    conditioning = state.pair.encoder.encode(prompts)
    noise = state.randn_like(state.photos.latents[:1].expand(len(prompts), -1, -1, -1))
    drawn_target(state, student_x0(state.pair.student, noise, conditioning), noise, prompts, conditioning)


def _student_prompts(state: TrainingState) -> tuple[list[str], int]:
    """What a batch is asked for, and how many of it, the first, as the photos are; the others are scenes."""
    settings = state.config.train
    photo_prompts = settings.photo_prompts
    prompts = [_photo_prompt(state) for _ in range(photo_prompts)]
    return prompts + [_scene_prompt(state) for _ in range(settings.batch_size - photo_prompts)], photo_prompts


def encode_for_student(state: TrainingState, prompts: Sequence[str]) -> Conditioning:
    """Prompts encoded; with gradient where the student's losses train the text side too."""
    with torch.set_grad_enabled("text" in state.student_parts):
        return state.pair.encoder.encode(prompts)


def _photo_prompt(state: TrainingState) -> str:
    row = int(state.randint(len(state.photos.real_views), 1))
    return prompt_for(state.photos.real_views[row], state.config.subject, state.generator)


def _scene_prompt(state: TrainingState) -> str:
    return scene_prompt(state.config.subject, int(state.randint(2**31 - 1, 1)), state.config.concept.scenes)


def decoded_once(state: TrainingState, latents: Tensor) -> Callable[[], Tensor]:
    """Decodes latents at the first call and remembers the picture."""
    image: list[Tensor] = []

    def decode() -> Tensor:
        if not image:
            image.append(state.pair.codec.decode(latents))
        return image[0]

    return decode


def draw_reals(state: TrainingState, fakes: ImageBatch) -> Reals:
    """Photos, and echoed pictures at their lower weight, to stand against a batch of the student's."""
    batch = len(fakes.latents)
    rows = state.randint(len(state.photos.real_latents), batch).to(state.pair.device)
    latents = state.photos.real_latents[rows]
    cached = {name: [tap[rows] for tap in taps] for name, taps in state.photos.critics.items()}
    weights = torch.ones(batch, device=latents.device)
    pictures = replace(fakes, latents=latents, image=decoded_once(state, latents))
    if not state.pool or not state.config.echo.real_weight:
        return Reals(pictures, weights, cached)
    rows = state.randint(len(state.pool), batch).to(state.pair.device)
    latents = torch.cat((latents, state.pool.latents[rows]))
    cached = {
        name: [torch.cat((tap, more[rows])) for tap, more in zip(taps, state.pool.critics[name], strict=True)]
        for name, taps in cached.items()
    }
    pictures = ImageBatch(
        latents,
        decoded_once(state, latents),
        fakes.noise.repeat(2, 1, 1, 1),
        fakes.timesteps.repeat(2),
        fakes.conditioning.join(fakes.conditioning),
    )
    return Reals(pictures, torch.cat((weights, weights * state.config.echo.real_weight)), cached)


@torch.no_grad()
def draw_echo(state: TrainingState, prompts: Sequence[str]) -> EchoPool:
    """One-step pictures for some prompts, with the judge's and the discriminators' features of them; not yet judged.

    With `concept.tint_scenes` those in a colour are drawn and scored in the subject's own; the good ones are tinted.
    """
    judge, photos, settings = state.judge, state.photos.identity, state.config.echo
    assert judge is not None
    assert photos is not None
    asked, colours = in_own_colours(state, prompts)
    shape = state.photos.latents[:1].expand(len(prompts), -1, -1, -1)
    with state.at_export_scale():
        latents = student_x0(state.pair.student, state.randn_like(shape), state.pair.encoder.encode(asked))
    image = state.pair.codec.decode(latents)
    features = judge.features(image)[0][:, 0]
    scores = identity_scores(features, photos)
    good = (scores >= least_score(photos, settings)).tolist()
    tints = [name if ok else None for name, ok in zip(colours, good, strict=True)]
    if any(tints):
        latents = in_asked_colours(state, latents, tints)
        image = state.pair.codec.decode(latents)
    backbones = {c.name: c.backbone for c in state.critics if isinstance(c.backbone, ImageBackbone)}
    return EchoPool(
        latents=latents,
        features=features,
        scores=scores,
        prompts=list(prompts),
        critics={name: backbone.features(image) for name, backbone in backbones.items()},
    )
