"""The student's losses as a table, and their sum with little of it in memory at once.

Each image encoder keeps much for its gradient, and a GPU may hold its weights for a moment only. So the gradient of all
losses that read one encoder is computed at once, with their values, and the encoder is done with before the next runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.schedule import send
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.models.waiting import present
from echodistill_cli.training import losses
from echodistill_cli.training.batches import StudentPass, critic_features, encode_for_student, prior_rows
from echodistill_cli.training.critics import Discriminator, features_of, run_together
from echodistill_cli.training.optimizers import Metrics
from echodistill_cli.training.state import TrainingState


@dataclass(frozen=True)
class Part:
    """A summand of a loss.

    Args:
        values: returns it, [B].
        encoder: the image encoder whose features it reads; None if it reads no features.
    """

    values: Callable[[], Tensor]
    encoder: ImageBackbone | None = None


@dataclass(frozen=True)
class StudentLoss:
    """A row of the table below.

    Args:
        name: its key in `[loss]` and in the metrics.
        parts: returns its summands; what compares with the target weights them by ᾱ_t, as the paper does.
        available: whether the run, and this batch of it, has what the loss needs.
        of_images: whether it is a loss of the batch's images, not of others.
    """

    name: str
    parts: Callable[[TrainingState, StudentPass], list[Part]]
    available: Callable[[TrainingState, StudentPass], bool] = lambda _state, _generated: True
    of_images: bool = True

    def function(self, state: TrainingState, generated: StudentPass) -> Tensor:
        """Return the values of a batch, [B]."""
        return _sum([part.values() for part in self.parts(state, generated)])


def _sum(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum(dim=0)


# --- the table --------------------------------------------------------------------------------------------------------


def _latent(_state: TrainingState, generated: StudentPass) -> list[Part]:
    def values() -> Tensor:
        return generated.alpha_bar * losses.latent_alignment(generated.images.latents, generated.target.latents)

    return [Part(values)]


def _identity(state: TrainingState, generated: StudentPass) -> list[Part]:
    encoder, photos = state.identity_encoder, state.photos.identity
    assert encoder is not None
    assert photos is not None

    def values() -> Tensor:
        to_teacher = state.config.critic.identity_target == "teacher"
        if to_teacher:
            run_together(generated.images, generated.target, encoder)
        features = features_of(generated.images, encoder)[0]
        if to_teacher:
            return generated.alpha_bar * losses.feature_distance(features, features_of(generated.target, encoder)[0])
        return losses.photo_distance(features[:, 0], photos)

    return [Part(values, encoder)]


def _sliced_wasserstein(state: TrainingState, generated: StudentPass) -> list[Part]:
    settings = state.config.critic

    def values() -> Tensor:
        directions = losses.patch_directions(
            settings.swd_scales, settings.swd_projections, settings.swd_patch, state.generator
        )
        on_device = [send(kernels, state.pair.device) for kernels in directions]
        distances = losses.sliced_wasserstein(generated.images.image, generated.target.image, on_device)
        return generated.alpha_bar * distances

    return [Part(values)]


def _student_prior(state: TrainingState, _generated: StudentPass) -> list[Part]:
    prior = state.prior
    assert prior is not None

    def values() -> Tensor:
        rows = prior_rows(state, prior)
        conditioning = encode_for_student(state, [prior.prompts[row] for row in rows])
        places = [prior.places[row] for row in rows]
        x0 = student_x0(state.pair.student, prior.noise[rows], conditioning, places)
        return losses.latent_alignment(x0, prior.latents[rows])

    return [Part(values)]


def _adversarial(state: TrainingState, generated: StudentPass) -> list[Part]:
    def part(critic: Discriminator) -> Part:
        def values() -> Tensor:
            return losses.adversarial_generator(critic.logits(critic_features(state, generated, critic)))

        return Part(values, critic.backbone if isinstance(critic.backbone, ImageBackbone) else None)

    return [part(critic) for critic in state.critics]


STUDENT_LOSSES: tuple[StudentLoss, ...] = (
    StudentLoss("latent", _latent),
    StudentLoss("identity", _identity, available=lambda state, _: state.identity_encoder is not None),
    StudentLoss("sliced_wasserstein", _sliced_wasserstein),
    StudentLoss("prior", _student_prior, available=lambda state, _: state.prior is not None, of_images=False),
    StudentLoss(
        "adversarial", _adversarial, available=lambda state, batch: bool(state.critics and batch.photo_prompts)
    ),
)


def active_losses(state: TrainingState, generated: StudentPass) -> list[StudentLoss]:
    """Return the rows with a weight above 0 whose needs are met."""
    weights = state.config.loss
    return [term for term in STUDENT_LOSSES if getattr(weights, term.name) and term.available(state, generated)]


# --- their sum --------------------------------------------------------------------------------------------------------


def weighted_losses(state: TrainingState, generated: StudentPass) -> tuple[Tensor, Tensor, Metrics]:
    """Return the weighted sums of the losses of the batch's images and of others, and each loss.

    The sums' gradients are those of the losses to the bit: the engine adds them in the same order.
    """
    terms = active_losses(state, generated)
    parts = [(term, part) for term in terms for part in term.parts(state, generated)]
    found: dict[int, Tensor] = {}

    def weighted(index: int) -> Tensor:
        term, part = parts[index]
        values = part.values()
        found[index] = values.detach()
        weight: float = getattr(state.config.loss, term.name)
        return weight * values.mean()

    totals = [torch.zeros((), device=state.pair.device) for _ in range(2)]
    for index, (term, part) in enumerate(parts):
        if index in found:
            continue
        if part.encoder is None:
            loss = weighted(index)
        else:
            alike = [other for other, (_, one) in enumerate(parts) if one.encoder is part.encoder]
            loss = _known(state, generated, part.encoder, weighted, alike)
        totals[not term.of_images] = totals[not term.of_images] + loss
    metrics: Metrics = {
        term.name: _sum([found[index] for index, (other, _) in enumerate(parts) if other is term]).mean()
        for term in terms
    }
    return totals[0], totals[1], metrics


def _known(
    state: TrainingState,
    generated: StudentPass,
    encoder: ImageBackbone,
    weighted: Callable[[int], Tensor],
    alike: Sequence[int],
) -> Tensor:
    """Return the sum of all parts that read one encoder, with its gradient; the encoder is done with."""

    def loss_of(image: Tensor) -> Tensor:
        with _shown_as(generated, image):
            first, *others = map(weighted, alike)
            return sum(others, first)

    with present(encoder):
        loss: Tensor = _Known.apply(  # type: ignore[no-untyped-call]
            generated.images.image, state.optimizers.loss_scale, loss_of
        )
    batches = [generated.images, *([generated.photo_images] if generated.photo_prompts else [])]
    for features in (batch.features for batch in batches if encoder in batch.features):
        features[encoder] = [tap.detach() for tap in features[encoder]]
    return loss


@contextmanager
def _shown_as(generated: StudentPass, image: Tensor) -> Iterator[None]:
    """Context in which another tensor stands for the decoded images, and for those with photo prompts."""
    rows = generated.photo_images if generated.photo_prompts else generated.images
    with (
        generated.images.shown_as(image),
        rows.shown_as(image if rows is generated.images else image[: len(rows.latents)]),
    ):
        yield


class _Known(torch.autograd.Function):
    """A loss of images whose gradient is computed with its value, so that no graph of it stays."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, scale: float, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Arguments are images [B, 3, H, W], the factor on losses while gradients are computed, and the loss."""
        with torch.enable_grad():
            leaf = image.detach().requires_grad_()
            loss = loss_of(leaf)
            (gradient,) = torch.autograd.grad(loss * scale, leaf)
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None, None]:
        """Scale the stored gradient."""
        (gradient,) = ctx.saved_tensors
        return gradient * (of_loss / ctx.scale), None, None
