"""The reference design: a training step as the method's released research script computes it.

It uses float32, the full VAE's decoder, DINOv2 at 518 pixels and CLIP ViT-H. It encodes the photos again in every step,
and every loss computes its critic's features again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training import batches, losses
from echodistill_cli.training.critics import frozen
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import teacher_step
from echodistill_cli.training.terms import active_losses

DINOV2_SIDE = 518


def reference_step(state: TrainingState, photos: Tensor) -> None:
    """Take one step of the released script, without caches and without shared features.

    It is faster than the script in one respect: the identity encoder is frozen here and its target is detached.

    Args:
        state: a run whose critics are image backbones.
        photos: [B, 3, H, W] in [-1, 1].
    """
    state.pair.codec.encode(photos)
    teacher_step(state)
    with frozen(state.critics):
        generated = batches.student_pass(state)
        total = torch.zeros((), device=state.pair.device)
        for term in active_losses(state, generated):
            values = term.function(state, generated)
            total = total + getattr(state.config.loss, term.name) * values.mean()
            generated.images.features.clear()  # the next loss runs its encoder again
        state.optimizers.step(total, ["student"])
    fakes = generated.images.image.detach()
    verdicts = []
    for critic in state.critics:
        assert isinstance(critic.backbone, ImageBackbone)
        with torch.no_grad():
            real, fake = critic.backbone.features(photos), critic.backbone.features(fakes)
        ones = torch.ones(len(photos), device=photos.device)
        verdicts.append(losses.adversarial_discriminator(critic.logits(real), critic.logits(fake), ones))
    state.optimizers.step(torch.stack(verdicts).sum(), ["discriminators"])
    state.step += 1


def prepare_reference(state: TrainingState) -> None:
    """Set the resolution of DINOv2 to the released script's."""
    for critic in state.critics:
        if critic.name == "dinov2":
            assert isinstance(critic.backbone, ImageBackbone)
            critic.backbone.side = DINOV2_SIDE
