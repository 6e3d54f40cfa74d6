"""Discriminators: heads on frozen backbones, a critic of latents, and the batches they run on.

A backbone turns a batch of images into features, one tensor [B, N, D] per tap (N tokens of width D). A discriminator
puts a small head on each tap. The identity loss and the echo compare the features of an image backbone directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli.diffusion.pair import Denoiser, LatentCodec
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.adapters import without_lora
from echodistill_cli.models.vision import ImageBackbone


@dataclass(frozen=True)
class ImageBatch:
    """B images as latents. They are decoded at most once, and each backbone runs on them at most once.

    Args:
        latents: [B, C, h, w], scaled.
        codec: decodes the latents.
        noise: [B, C, h, w], unit noise with which a latent backbone renoises the images.
        timesteps: [B], to which a latent backbone renoises them.
        conditioning: of the B prompts that a latent backbone is conditioned on.
        whole: the batch whose first rows these are; None if this is not a part of another batch.
        features: of the backbones that have run on this batch; see `features_of`.
    """

    latents: Tensor
    codec: LatentCodec
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    whole: ImageBatch | None = None
    features: dict[nn.Module, list[Tensor]] = field(init=False, default_factory=dict, repr=False, compare=False)

    @cached_property
    def image(self) -> Tensor:
        """The decoded images [B, 3, H, W], about [-1, 1]; gradients reach the latents."""
        if self.whole is not None:
            return self.whole.image[: len(self.latents)]
        return self.codec.decode(self.latents)

    @contextmanager
    def shown_as(self, image: Tensor) -> Iterator[None]:
        """Context in which another tensor with the same pixels stands for the decoded images."""
        kept = vars(self)  # by `cached_property`
        own, kept["image"] = kept.get("image"), image
        try:
            yield
        finally:
            kept["image"] = own
            if own is None:
                del kept["image"]

    def rows(self, count: int) -> ImageBatch:
        """Return the first `count` images. They are decoded together with the whole batch."""
        if count == len(self.latents):
            return self
        conditioning = self.conditioning.take(range(count))
        return ImageBatch(
            self.latents[:count], self.codec, self.noise[:count], self.timesteps[:count], conditioning, self
        )


_PAIRED_WIDTH = 64


class TeacherBackbone(nn.Module):
    """Features of renoised latents from the base teacher: its down blocks and its middle block.

    It needs no download and no decoder (Sauer et al. 2024, adversarial distillation in latent space). Detail shows in
    the first blocks and at low noise only, so every block is tapped, as in that paper.

    Args:
        teacher: the multi-step model; its LoRA is disabled while it serves as a backbone.
    """

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self._teacher = (teacher,)  # in a tuple, so that the UNet is not registered as a submodule of the critic

    @property
    def widths(self) -> list[int]:
        """Width of each tap's features."""
        channels = self._teacher[0].unet.config.block_out_channels
        return [*channels, channels[-1]]

    def features(self, images: ImageBatch) -> list[Tensor]:
        """Return a tap [B, h·w, D] per block, the tokens of its feature map."""
        teacher = self._teacher[0]
        taps: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taps.append(output[0] if isinstance(output, tuple) else output)

        def keep_and_stop(module: nn.Module, inputs: Any, output: Any) -> None:
            keep(module, inputs, output)
            raise _EarlyExitError

        unet = teacher.unet
        hooks = [block.register_forward_hook(keep) for block in unet.down_blocks]
        hooks.append(unet.mid_block.register_forward_hook(keep_and_stop))
        noisy = add_noise(teacher.schedule, images.latents, images.noise, images.timesteps)
        try:
            with _without_checkpointing(unet), without_lora(unet):
                teacher(noisy, images.timesteps, images.conditioning)
        except _EarlyExitError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [tap.float().flatten(2).transpose(1, 2) for tap in taps]


@contextmanager
def _without_checkpointing(unet: Any) -> Iterator[None]:
    """Context without gradient checkpointing, which would recompute activations with the LoRA enabled."""
    was_on = unet.is_gradient_checkpointing
    unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if was_on:
            unet.enable_gradient_checkpointing()


class _EarlyExitError(Exception):
    """Ends a UNet's forward pass after its middle block."""


class Discriminator(nn.Module):
    """A frozen backbone with a trained head per tap: layer norm, two layers, one logit per token.

    Args:
        name: used in metrics and checkpoints.
        backbone: frozen.
        head_width: hidden width of each head.
    """

    def __init__(self, name: str, backbone: ImageBackbone | TeacherBackbone, head_width: int) -> None:
        super().__init__()
        self.name, self.backbone = name, backbone
        self.heads = nn.ModuleList(_head(width, head_width) for width in backbone.widths)

    def logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits [B, N] of each tap from the backbone's features; above 0 means "a photo"."""
        return [head(tap).squeeze(-1) for head, tap in zip(self.heads, features, strict=True)]

    def judge(self, reals: Sequence[Tensor], fakes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the logits of R real and B fake images, [R, N] and [B, N] per tap, from one pass.

        Args:
            reals: [R, N, D] per tap.
            fakes: [B, N, D] per tap.
        """
        logits = self.logits([torch.cat(taps) for taps in zip(reals, fakes, strict=True)])
        halves = [scores.split([len(reals[0]), len(fakes[0])]) for scores in logits]  # type: ignore[no-untyped-call]
        return [real for real, _ in halves], [fake for _, fake in halves]


class PairedCritic(nn.Module):
    """Five convolutions on latents. It compares the student's image with the target of the same noise.

    Small and trained whole: heads on the frozen teacher's features did not learn to tell blurred from sharp images
    within a thousand updates.

    Args:
        channels: C of the latents.
        seed: of the initial weights.
    """

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Conv2d(channels, _PAIRED_WIDTH, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(_PAIRED_WIDTH, 2 * _PAIRED_WIDTH, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * _PAIRED_WIDTH, 2 * _PAIRED_WIDTH, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * _PAIRED_WIDTH, 2 * _PAIRED_WIDTH, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * _PAIRED_WIDTH, 1, 3, padding=1),
            )

    def forward(self, latents: Tensor) -> Tensor:
        """Return the logits [B, N] of latents [B, C, h, w], one per patch; above 0 means "a target"."""
        logits: Tensor = self.layers(latents.float())
        return logits.flatten(1)


def _head(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width, elementwise_affine=False),
        nn.Linear(width, hidden),
        nn.LeakyReLU(0.2),
        nn.Linear(hidden, 1),
    )


def build_discriminators(
    names: Sequence[str],
    image_backbone: Callable[[str], ImageBackbone],
    teacher: Denoiser,
    head_width: int,
    seed: int,
) -> list[Discriminator]:
    """Build a discriminator per name: "teacher" uses the base teacher, any other name an image backbone.

    Args:
        names: of backbones, as in `critic.discriminators`.
        image_backbone: loads a backbone, once per name, so that the identity loss can share one.
        teacher: the multi-step model.
        head_width: hidden width of each head.
        seed: of the initial weights of the heads.
    """
    # The backbones are loaded first, so that loading one does not change the random weights of the heads.
    backbones = [TeacherBackbone(teacher) if name == "teacher" else image_backbone(name) for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [
            Discriminator(Path(name).name, backbone, head_width)
            for name, backbone in zip(names, backbones, strict=True)
        ]


def features_of(images: ImageBatch, backbone: ImageBackbone | TeacherBackbone) -> list[Tensor]:
    """Return a backbone's features of a batch, [B, N, D] per tap; it runs once per batch."""
    if backbone not in images.features:
        images.features[backbone] = (
            backbone.features(images.image) if isinstance(backbone, ImageBackbone) else backbone.features(images)
        )
    return images.features[backbone]


def run_together(first: ImageBatch, second: ImageBatch, backbone: ImageBackbone) -> None:
    """Run a backbone on two batches in one pass; `features_of` finds the features.

    Args:
        first: of images.
        second: of images that get no gradient.
        backbone: takes decoded images.
    """
    taps = backbone.features(torch.cat((first.image, second.image)))
    count = len(first.latents)
    first.features[backbone] = [tap[:count] for tap in taps]
    second.features[backbone] = [tap[count:].detach() for tap in taps]


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which trained modules get no gradient of their own, but pass gradients on."""
    for module in modules:
        module.requires_grad_(False)
    try:
        yield
    finally:
        for module in modules:
            module.requires_grad_(True)
