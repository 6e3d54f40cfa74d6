"""Critics: frozen feature backbones, small trained heads, and one registry from name to builder.

A backbone turns a batch of pictures into features, one tensor [B, N, D] per tap (N tokens of width D). A discriminator
puts a small head on each tap; the identity loss and the echo's judge use the bare features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.adapters import without_lora
from echodistill_cli.models.vision import ImageBackbone


@dataclass(frozen=True)
class ImageBatch:
    """A batch of B pictures in each form a backbone may want.

    Args:
        latents: [B, C, h, w]. image: makes the decoded [B, 3, H, W] in [-1, 1] when it is asked for.
        noise, timesteps, conditioning: how and for which prompts a latent backbone renoises them.
    """

    latents: Tensor
    image: Callable[[], Tensor]
    noise: Tensor
    timesteps: Tensor
    conditioning: Conditioning

    def first(self, count: int) -> ImageBatch:
        """The first `count` of them."""
        if count == len(self.latents):
            return self
        return ImageBatch(
            self.latents[:count],
            lambda: self.image()[:count],
            self.noise[:count],
            self.timesteps[:count],
            self.conditioning.take(range(count)),
        )


class TeacherBackbone(nn.Module):
    """The frozen base teacher's own view of a renoised latent: its last down block and its middle block.

    It needs no download and no decode (Sauer et al. 2024, adversarial distillation in latent space).
    """

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self._teacher = (teacher,)  # in a tuple, so that the UNet is not registered as a part of the critic

    @property
    def widths(self) -> list[int]:
        """Width of each tap's features."""
        channels = self._teacher[0].unet.config.block_out_channels
        return [channels[-1], channels[-1]]

    def see(self, pictures: ImageBatch) -> list[Tensor]:
        """Two taps [B, h·w, D], the tokens of the two blocks' feature maps."""
        teacher = self._teacher[0]
        taps: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taps.append(output[0] if isinstance(output, tuple) else output)

        def keep_and_stop(module: nn.Module, inputs: Any, output: Any) -> None:
            keep(module, inputs, output)
            raise _EnoughSeenError

        unet = teacher.unet
        hooks = [
            unet.down_blocks[-1].register_forward_hook(keep),
            unet.mid_block.register_forward_hook(keep_and_stop),
        ]
        noisy = add_noise(teacher.schedule, pictures.latents, pictures.noise, pictures.timesteps)
        try:
            with _without_checkpointing(unet), without_lora(unet):
                teacher(noisy, pictures.timesteps, pictures.conditioning)
        except _EnoughSeenError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [tap.float().flatten(2).transpose(1, 2) for tap in taps]


@contextmanager
def _without_checkpointing(unet: Any) -> Iterator[None]:
    """Inside, activations are kept: recomputed in the backward pass, outside, they would be those with the adapter."""
    was_on = unet.is_gradient_checkpointing
    unet.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if was_on:
            unet.enable_gradient_checkpointing()


class _EnoughSeenError(Exception):
    """Ends a UNet's forward pass after its middle block."""


class Discriminator(nn.Module):
    """A frozen backbone with a trained head per tap: normalise, 2 layers, one logit per token.

    Args:
        name: its registry name, used in metrics. backbone: frozen. head_width: hidden width of each head.
    """

    def __init__(self, name: str, backbone: ImageBackbone | TeacherBackbone, head_width: int) -> None:
        super().__init__()
        self.name, self.backbone = name, backbone
        self.heads = nn.ModuleList(_head(width, head_width) for width in backbone.widths)

    def logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Per tap [B, N], above 0 for "a photo"; from the backbone's features."""
        return [head(tap).squeeze(-1) for head, tap in zip(self.heads, features, strict=True)]


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
    """A discriminator per name: "teacher" looks through the teacher, any other name through an image backbone.

    Args:
        image_backbone: loads a backbone, once per name, so that the identity loss may share one.
        seed: of the heads' initial weights.
    """
    # Loaded first: whether a backbone is loaded here or was before must not show in the heads' random weights.
    backbones = [TeacherBackbone(teacher) if name == "teacher" else image_backbone(name) for name in names]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [Discriminator(Path(name).name, seen, head_width) for name, seen in zip(names, backbones, strict=True)]


def look(backbone: ImageBackbone | TeacherBackbone, pictures: ImageBatch) -> list[Tensor]:
    """A backbone's features of a batch, one tensor [B, N, D] per tap; an image backbone decodes it first."""
    return backbone.features(pictures.image()) if isinstance(backbone, ImageBackbone) else backbone.see(pictures)
