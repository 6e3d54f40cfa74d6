"""The photos as training sees them: views, masks and features, made once before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from echodistill_cli.config.schema import Config
from echodistill_cli.data.masks import with_masks
from echodistill_cli.data.photos import Photo
from echodistill_cli.data.prompts import class_prompts
from echodistill_cli.data.recolour import recoloured
from echodistill_cli.data.views import View, real_views, teacher_views
from echodistill_cli.diffusion.pair import LatentCodec, ModelPair
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training.critics import Discriminator


@dataclass(frozen=True)
class TrainingSet:
    """The photos as training sees them, encoded once: K augmented views for the teacher, R whole ones as reals.

    Args:
        views, real_views: what each view's prompt should say; their pictures are dropped.
        latents: [K, C, h, w]. masks: [K, 1, h, w] in 0…1. real_latents: [R, C, h, w].
        critics: per discriminator name and tap, features [R, N, D] of the reals.
        identity: [P, D], the judge's features of the P photos as they are; None without a judge.
    """

    views: Sequence[View]
    real_views: Sequence[View]
    latents: Tensor
    masks: Tensor
    real_latents: Tensor
    critics: dict[str, list[Tensor]]
    identity: Tensor | None


@dataclass(frozen=True)
class ViewGenerators:
    """Where the randomness of the views, of the masks and of the tints comes from."""

    views: torch.Generator
    masks: torch.Generator
    tints: torch.Generator


def encode_photos(
    config: Config,
    photos: Sequence[Photo],
    pair: ModelPair,
    critics: Sequence[Discriminator],
    judge: ImageBackbone | None,
    generators: ViewGenerators,
) -> TrainingSet:
    """Find masks, cut views, tint some, and encode all of it, as the configuration asks.

    Args:
        pair: not yet trained. critics, judge: whose features of the photos are remembered.
    """
    codec, device = pair.codec, pair.device
    generator = generators.views
    resolution, count = config.model.resolution, config.concept.views
    class_name = config.concept.class_name
    if config.concept.masks == "teacher" and class_name is not None:
        photos = with_masks(photos, class_name, pair, resolution, generators.masks)
    augmented = teacher_views if config.concept.augmentation == "custom-diffusion" else real_views
    views = augmented(photos, resolution=resolution, count=count, generator=generator)
    reals = real_views(photos, resolution=resolution, count=max(count, len(photos)), generator=generator)
    if config.concept.recolour and class_name is not None:
        views = recoloured(views, photos, config.concept.recolour, class_name, pair, generators.tints)
    latents = _encode(codec, views, device)
    real_latents = _encode(codec, reals, device)
    masks = torch.stack([view.mask for view in views]).to(device)
    seen: dict[str, ImageBackbone] = {c.name: c.backbone for c in critics if isinstance(c.backbone, ImageBackbone)}
    features = {name: _image_features(codec, real_latents, backbone) for name, backbone in seen.items()}
    return TrainingSet(
        views=[_without_picture(view) for view in views],
        real_views=[_without_picture(view) for view in reals],
        latents=latents,
        masks=F.interpolate(masks, latents.shape[-2:], mode="area"),
        real_latents=real_latents,
        critics=features,
        # `real_views` begins with every photo as it is.
        identity=_image_features(codec, real_latents[: len(photos)], judge)[0][:, 0] if judge else None,
    )


def _without_picture(view: View) -> View:
    return replace(view, image=torch.empty(0), mask=torch.empty(0))


def _encode(codec: LatentCodec, views: Sequence[View], device: torch.device) -> Tensor:
    return torch.cat([codec.encode(view.image.unsqueeze(0).to(device)) for view in views])


@torch.no_grad()
def _image_features(codec: LatentCodec, latents: Tensor, backbone: ImageBackbone) -> list[Tensor]:
    """Features of pictures that went through the decoder, as the student's do: no critic can tell by its traces."""
    taps = [backbone.features(codec.decode(latent.unsqueeze(0))) for latent in latents]
    return [torch.cat(tap) for tap in zip(*taps, strict=True)]


PRIOR_PICTURES = 64


@dataclass(frozen=True)
class Prior:
    """K pictures of the class by the untouched student.

    Args:
        prompts: K texts. noise: [K, C, h, w], what each was drawn from. latents: [K, C, h, w].
        conditioning: of the prompts, as the untouched text side had them.
    """

    prompts: Sequence[str]
    noise: Tensor
    latents: Tensor
    conditioning: Conditioning


@torch.no_grad()
def build_prior(config: Config, pair: ModelPair, generator: torch.Generator) -> Prior | None:
    """The class as the models have it before anything is trained; None without a class name or a use for it."""
    replayed = config.train.class_share and config.replays
    if not (config.loss.prior or replayed) or config.concept.class_name is None:
        return None
    prompts = class_prompts(
        config.concept.class_name, PRIOR_PICTURES, templates=config.concept.class_prompts, scenes=config.concept.scenes
    )
    side = config.model.resolution // pair.codec.factor
    noise = torch.randn(len(prompts), pair.codec.channels, side, side, generator=generator).to(pair.device)
    conditioning = pair.encoder.encode(prompts)
    batch = config.train.batch_size
    rows = [list(range(start, min(start + batch, len(prompts)))) for start in range(0, len(prompts), batch)]
    drawn = [student_x0(pair.student, noise[part], conditioning.take(part)) for part in rows]
    return Prior(prompts, noise, torch.cat(drawn), conditioning)
