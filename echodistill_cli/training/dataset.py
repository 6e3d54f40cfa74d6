"""Photos and images of the class as latents and features, computed once before the first step."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from echodistill_cli.config.schema import Config
from echodistill_cli.data.masks import with_masks
from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import class_prompts, with_subject
from echodistill_cli.data.views import View, latent_masks, prompt_for, real_views, teacher_views
from echodistill_cli.diffusion.pair import LatentCodec, ModelPair
from echodistill_cli.diffusion.sampling import student_start, student_x0
from echodistill_cli.diffusion.text import Conditioning, PromptEncoder
from echodistill_cli.models.device import free_gib, has_own_memory
from echodistill_cli.models.memory import lets_encoders_wait
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training.critics import Discriminator

_MOST_SHOWN = 80  # characters of an unread text in a message


@dataclass(frozen=True)
class TrainingSet:
    """The encoded photos: K augmented views for the teacher, R unmodified ones as reals.

    Args:
        views: K augmented views without pixels, for their prompts and crops.
        real_views: R unmodified views without pixels, for their prompts.
        latents: [K, C, h, w], of `views`.
        masks: [K, 1, h, w] in 0…1, of `views`.
        real_latents: [R, C, h, w], of `real_views`.
        critics: features [R, N, D] of `real_views` per discriminator and tap.
        identity: [P, D], features of the P photos; None without an identity encoder.
    """

    views: Sequence[View]
    real_views: Sequence[View]
    latents: Tensor
    masks: Tensor
    real_latents: Tensor
    critics: dict[str, list[Tensor]]
    identity: Tensor | None


def unread_texts(config: Config, photos: Sequence[Photo], encoder: PromptEncoder) -> Iterator[str]:
    """Yield a line for each text of a run whose end the text encoder does not read.

    Args:
        config: of the run.
        photos: the usable photos, with their captions.
        encoder: after the token was added.
    """
    concept, subject, generator = config.concept, config.subject, torch.Generator()
    empty = View(torch.empty(0), torch.empty(0), "", None, 0)
    prompts = [(f"The subject {subject!r}", with_subject("a photo of a {}", subject))]
    prompts += [
        (f"The caption of {photo.path.name}", prompt_for(replace(empty, caption=photo.caption), subject, generator))
        for photo in photos
        if photo.caption is not None
    ]
    prompts += [("A prompt of concept.scenes", with_subject(text, subject)) for text in concept.scenes]
    prompts += [("A prompt of concept.class_prompts", text) for text in concept.class_prompts]
    prompts += [("A prompt of --sample-prompt", text) for text in config.run.sample_prompts]
    for source, prompt in prompts:
        if unread := encoder.cut_off(prompt):
            shown = unread if len(unread) <= _MOST_SHOWN else f"{unread[:_MOST_SHOWN]}..."
            yield f"{source} is too long for the text encoder, which does not read {shown!r}."


def doubts(config: Config, pair: ModelPair) -> Iterator[str]:
    """Yield a sentence for each setting that does not suit the loaded models."""
    kinds = {role: pair.role(role).schedule.prediction_type for role in ("student", "teacher")}
    if config.train.carry_over and kinds["student"] != kinds["teacher"]:
        yield (
            f"train.carry_over copies the LoRA of a teacher that predicts {kinds['teacher']} to a student that "
            f"predicts {kinds['student']}. Layers near the output differ in meaning. Consider train.carry_over=false."
        )


@dataclass(frozen=True)
class ViewGenerators:
    """Separate random streams of views and masks, so that changing one does not shift another."""

    views: torch.Generator
    masks: torch.Generator


def encode_photos(
    config: Config,
    photos: Sequence[Photo],
    pair: ModelPair,
    critics: Sequence[Discriminator],
    identity_encoder: ImageBackbone | None,
    generators: ViewGenerators,
) -> TrainingSet:
    """Find masks, augment and encode the photos as the configuration says.

    Args:
        config: of the run.
        photos: the usable photos, in order.
        pair: not yet trained.
        critics: whose features of the photos are cached.
        identity_encoder: whose features of the photos are cached; None without one.
        generators: the random streams.
    """
    codec, device = pair.codec, pair.device
    codec.encoder.to(device)
    generator = generators.views
    resolution, count = config.model.resolution, config.concept.views
    class_name = config.concept.class_name
    if config.concept.masks == "teacher" and class_name is not None:
        photos = with_masks(photos, class_name, pair, resolution, generators.masks)
    augmented = teacher_views if config.concept.augmentation == "custom-diffusion" else real_views
    views = augmented(photos, resolution=resolution, count=count, generator=generator)
    reals = real_views(photos, resolution=resolution, count=max(count, len(photos)), generator=generator)
    latents = _encode(codec, views, device)
    real_latents = _encode(codec, reals, device)
    if free_gib(device) is not None and codec.decoder is not codec.encoder:
        codec.encoder.to("cpu")  # nothing else is encoded, and the memory of a GPU is scarce
    masks = torch.stack([view.mask for view in views]).to(device)
    backbones = {c.name: c.backbone for c in critics if isinstance(c.backbone, ImageBackbone)}
    features = {name: _image_features(codec, real_latents, backbone) for name, backbone in backbones.items()}
    # `real_views` begins with every photo as it is.
    photo_latents = real_latents[: len(photos)]
    encoded = TrainingSet(
        views=[_without_pixels(view) for view in views],
        real_views=[_without_pixels(view) for view in reals],
        latents=latents,
        masks=latent_masks(masks, latents.shape[-1]),
        real_latents=real_latents,
        critics=features,
        identity=_image_features(codec, photo_latents, identity_encoder)[0][:, 0] if identity_encoder else None,
    )
    let_encoders_wait(config, critics, identity_encoder)
    return encoded


def let_encoders_wait(config: Config, critics: Sequence[Discriminator], identity_encoder: ImageBackbone | None) -> None:
    """Let image encoders leave a GPU between their uses, if the configuration says so."""
    backbones = {critic.backbone for critic in critics} | {identity_encoder}
    for backbone in backbones if lets_encoders_wait(config) else ():
        if isinstance(backbone, ImageBackbone) and has_own_memory(backbone.factor.device):
            backbone.let_wait()


def _without_pixels(view: View) -> View:
    return replace(view, image=torch.empty(0), mask=torch.empty(0))


def _encode(codec: LatentCodec, views: Sequence[View], device: torch.device) -> Tensor:
    return torch.cat([codec.encode(view.image.unsqueeze(0).to(device)) for view in views])


@torch.no_grad()
def _image_features(codec: LatentCodec, latents: Tensor, backbone: ImageBackbone) -> list[Tensor]:
    """Return features of decoded latents, so that decoder artifacts do not reveal which are real."""
    taps = [backbone.features(codec.decode(latent.unsqueeze(0))) for latent in latents]
    return [torch.cat(tap) for tap in zip(*taps, strict=True)]


PRIOR_IMAGES = 64


@dataclass(frozen=True)
class Prior:
    """K images of the class by the base student, for prior preservation.

    Args:
        prompts: K texts.
        noise: [K, C, h, w], what the student started from: noise, or z_t for a later step.
        latents: [K, C, h, w].
        conditioning: of the prompts, by the base text encoder.
        places: of each image's step among those of the student.
    """

    prompts: Sequence[str]
    noise: Tensor
    latents: Tensor
    conditioning: Conditioning
    places: Sequence[int]


@torch.no_grad()
def build_prior(config: Config, pair: ModelPair, generator: torch.Generator) -> Prior | None:
    """Generate the class with the base student; None without a class name or a use for the images."""
    is_replayed = config.train.class_share and config.replays
    if not (config.loss.prior or is_replayed) or config.concept.class_name is None:
        return None
    prompts = class_prompts(
        config.concept.class_name, PRIOR_IMAGES, templates=config.concept.class_prompts, scenes=config.concept.scenes
    )
    side = config.model.resolution // pair.codec.factor
    noise = torch.randn(len(prompts), pair.codec.channels, side, side, generator=generator).to(pair.device)
    conditioning = pair.encoder.encode(prompts)
    batch = config.train.batch_size
    parts = [list(range(start, min(start + batch, len(prompts)))) for start in range(0, len(prompts), batch)]
    latents, places = list[Tensor](), list[int]()
    for number, rows in enumerate(parts):
        fresh = functools.partial(_noise_like, noise[rows], generator)
        start = student_start(pair.student, noise[rows], conditioning.take(rows), number % pair.student.steps, fresh)
        noise[rows] = start.latents
        places += start.places
        latents.append(student_x0(pair.student, start.latents, conditioning.take(rows), start.places))
    return Prior(prompts, noise, torch.cat(latents), conditioning, places)


def _noise_like(other: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(other.shape, generator=generator).to(other.device)
