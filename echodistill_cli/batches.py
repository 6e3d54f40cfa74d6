"""What one step trains on: the teacher's samples, the student's pass, its targets, the reals, the echo's drawings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from echodistill_cli.adapters import without_lora
from echodistill_cli.conditioning import Conditioning
from echodistill_cli.dataset import prompt_for, scene_prompt
from echodistill_cli.diffusion import add_noise
from echodistill_cli.discriminators import Discriminator, ImageBackbone, Pictures, TeacherBackbone
from echodistill_cli.echo import EchoPool
from echodistill_cli.losses import identity_scores
from echodistill_cli.sampling import sample_latents, student_x0, teacher_x0
from echodistill_cli.state import TrainingState


class StudentPass:
    """One batch of one-step pictures with all that its losses look at; pictures are decoded once, when asked for.

    Args:
        pictures: the student's, with gradient. target: the teacher's x0 latents, without.
        signal: ᾱ_t [B] of the timestep that the teacher looked at them through; 1 for targets of several steps.
        photo_like: how many of them, the first, were asked for as the photos are; the others are in scenes.
    """

    def __init__(
        self, state: TrainingState, pictures: Pictures, target: Tensor, signal: Tensor, photo_like: int
    ) -> None:
        self.state, self.pictures, self.target, self.signal = state, pictures, target, signal
        self.photo_like = photo_like

    @cached_property
    def target_image(self) -> Tensor:
        """The teacher's x0 decoded, without gradient."""
        with torch.no_grad():
            return self.state.pair.codec.decode(self.target)

    @cached_property
    def features(self) -> dict[str, list[Tensor]]:
        """Every discriminator's features of the photo-like pictures: a scene that no photo shows is no fault."""
        seen = {critic.name: self._seen_by(critic.backbone) for critic in self.state.critics}
        return {name: [tap[: self.photo_like] for tap in taps] for name, taps in seen.items()}

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
            self._looks[backbone] = backbone.see(self.pictures if is_judge else self.pictures.first(self.photo_like))
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

    pictures: Pictures
    weights: Tensor
    cached: dict[str, list[Tensor]]

    def features(self, critic: Discriminator) -> list[Tensor]:
        """One discriminator's features, per tap [R, N, D]: remembered ones, or for a latent backbone those of now."""
        if critic.name in self.cached:
            return self.cached[critic.name]
        with torch.no_grad():
            return critic.backbone.see(self.pictures)


def draw_timesteps(state: TrainingState, count: int) -> Tensor:
    """Uniform timesteps [count] of the teacher's schedule, on the device."""
    return state.randint(len(state.pair.role("teacher").schedule.alphas_cumprod), count).to(state.pair.device)


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


def draw_teacher_batch(state: TrainingState) -> TeacherBatch:
    """Augmented photos, and echoed pictures if there are any."""
    batch, photos, subject = state.config.train.batch_size, state.photos, state.config.subject
    from_pool = torch.rand(batch, generator=state.generator) < state.config.echo.teacher_share
    timesteps = draw_timesteps(state, batch)
    latents, masks, prompts, crops = [], [], [], []
    for index, echoed in enumerate(from_pool.tolist()):
        if echoed and state.pool:
            steps = len(state.pair.role("teacher").schedule.alphas_cumprod)
            least = state.config.echo.teacher_noise
            timesteps[index] = int(least * steps + (1 - least) * int(timesteps[index]))
            row = int(state.randint(len(state.pool), 1))
            latents.append(state.pool.latents[row])
            masks.append(torch.ones_like(photos.masks[0]))
            prompts.append(state.pool.prompts[row])
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
    pair, teacher, settings = state.pair, state.pair.role("teacher"), state.config.train
    batch = settings.batch_size
    photo_like = math.ceil(batch * (1 - settings.scene_share)) or 1
    prompts = [_photo_prompt(state) for _ in range(photo_like)]
    prompts += [_scene_prompt(state) for _ in range(batch - photo_like)]
    wanted = encode_for_student(state, prompts)
    conditioning, null = wanted.detach(), pair.encoder.encode_null().detach()
    noise = state.randn_like(state.photos.latents[:1].expand(batch, -1, -1, -1))
    with torch.set_grad_enabled(not pair.alternating):
        x0 = student_x0(pair.student, noise, wanted)
    renoise, timesteps = state.randn_like(noise), draw_timesteps(state, batch)
    signal, scale = teacher.schedule.signal(timesteps), settings.guidance_scale
    if settings.target_steps > 1:
        # With the student's own noise the target is a function of it: an average of many would be soft.
        target = sample_latents(
            teacher,
            noise,
            conditioning,
            null,
            steps=settings.target_steps,
            guidance_scale=scale,
            picture=x0.detach(),
            strength=settings.target_strength,
        )
        signal = torch.ones_like(signal)
        if settings.replays:
            state.targets.add(noise, target, prompts, _as_class(state, noise, prompts))
    else:
        with torch.no_grad():
            noisy = add_noise(teacher.schedule, x0.detach(), renoise, timesteps)
            target = teacher_x0(teacher, noisy, timesteps, conditioning, null, scale)
    if pair.alternating:  # the graph is made only now, when the teacher is done
        x0 = student_x0(pair.student, noise, wanted)
    pictures = Pictures(x0, decoded_once(state, x0), renoise, timesteps, conditioning)
    return StudentPass(state, pictures, target, signal, photo_like)


def encode_for_student(state: TrainingState, prompts: Sequence[str]) -> Conditioning:
    """Prompts encoded; with gradient where the student's losses train the text side too."""
    with torch.set_grad_enabled("text" in state.student_parts):
        return state.pair.encoder.encode(prompts)


def draw_replay(state: TrainingState) -> tuple[Tensor, Tensor, list[str]]:
    """Noise and targets [B, C, h, w] and B prompts: remembered targets, and the class as the untouched student has it.

    The class is shown in pictures of its own (`train.class_share`), and from a target's very noise, asked for in the
    same words but for the subject's (`train.pair_share`): then nothing but that word can tell the two apart.
    """
    settings, class_name = state.config.train, state.config.concept.class_name
    remembered = state.randint(len(state.targets), settings.batch_size).tolist()
    noise, target, prompts = state.targets.take(remembered)
    if state.prior is not None and settings.class_share:
        chosen = _chosen(state, settings.class_share)
        rows = state.randint(len(state.prior.prompts), len(chosen)).tolist()
        noise[chosen], target[chosen] = state.prior.noise[rows], state.prior.latents[rows]
        for index, row in zip(chosen, rows, strict=True):
            prompts[index] = state.prior.prompts[row]
    if class_name is not None and state.targets.untouched is not None:
        for index in _chosen(state, settings.pair_share):
            if state.config.subject in prompts[index]:
                prompts[index] = prompts[index].replace(state.config.subject, class_name)
                target[index] = state.targets.untouched[remembered[index]]
    return noise, target, prompts


def _as_class(state: TrainingState, noise: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """What the untouched student makes of a batch's noise with the class in the subject's place, if pairs are shown."""
    class_name = state.config.concept.class_name
    if class_name is None or not state.config.train.pair_share:
        return None
    return untouched_x0(state, noise, [prompt.replace(state.config.subject, class_name) for prompt in prompts])


def _chosen(state: TrainingState, share: float) -> list[int]:
    """A share of a batch's rows, each drawn by itself."""
    drawn = torch.rand(state.config.train.batch_size, generator=state.generator)
    return [int(row) for row in (drawn < share).nonzero().flatten()]


@torch.no_grad()
def untouched_x0(state: TrainingState, noise: Tensor, prompts: Sequence[str]) -> Tensor:
    """What student and text encoder made of some noise and prompts before they were trained, [B, C, h, w]."""
    with ExitStack() as untrained:
        for name, module in state.trained_modules().items():
            if name != "teacher":
                untrained.enter_context(without_lora(module))
        return student_x0(state.pair.student, noise, state.pair.encoder.encode(prompts))


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


def draw_reals(state: TrainingState, fakes: Pictures) -> Reals:
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
    pictures = Pictures(
        latents,
        decoded_once(state, latents),
        fakes.noise.repeat(2, 1, 1, 1),
        fakes.timesteps.repeat(2),
        fakes.conditioning.join(fakes.conditioning),
    )
    return Reals(pictures, torch.cat((weights, weights * state.config.echo.real_weight)), cached)


@torch.no_grad()
def draw_echo(state: TrainingState, prompts: Sequence[str]) -> EchoPool:
    """One-step pictures for some prompts, with the judge's and the discriminators' features of them; not yet judged."""
    assert state.judge is not None
    assert state.photos.identity is not None
    conditioning = state.pair.encoder.encode(prompts)
    shape = state.photos.latents[:1].expand(len(prompts), -1, -1, -1)
    latents = student_x0(state.pair.student, state.randn_like(shape), conditioning)
    image = state.pair.codec.decode(latents)
    features = state.judge.features(image)[0][:, 0]
    backbones = {c.name: c.backbone for c in state.critics if isinstance(c.backbone, ImageBackbone)}
    return EchoPool(
        latents=latents,
        features=features,
        scores=identity_scores(features, state.photos.identity),
        prompts=list(prompts),
        critics={name: backbone.features(image) for name, backbone in backbones.items()},
    )
