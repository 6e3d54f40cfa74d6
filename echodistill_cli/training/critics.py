"""Critics: frozen feature backbones, small trained heads, and one registry from name to builder.

A backbone turns a batch of pictures into features, one tensor [B, N, D] per tap (N tokens of width D). A discriminator
puts a small head on each tap; the identity loss and the echo's judge use the bare features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ModelError
from echodistill_cli.models.adapters import without_lora
from echodistill_cli.models.load import Denoiser
from echodistill_cli.models.sources import resolve

# The names a person may use for the paper's backbones. The paper's CLIP is ViT-H behind IP-Adapter's projection; ViT-L
# has a fourth of its weights and most of its sense of identity, and a folder with ViT-H may be named instead. DINO's
# main branch has only pickled weights, which are never loaded; the branch named here is the hub's conversion of them.
IMAGE_BACKBONES: Mapping[str, str] = {
    "dino": "facebook/dino-vits16@refs/pr/1",
    "dinov2": "facebook/dinov2-large",
    "clip": "openai/clip-vit-large-patch14",
}

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# DINOv2 was trained up to 518 pixels; at 224 it costs a sixth and still tells subjects apart.
_LARGEST_SIDE = 224


@dataclass(frozen=True)
class Pictures:
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

    def first(self, count: int) -> Pictures:
        """The first `count` of them."""
        if count == len(self.latents):
            return self
        return Pictures(
            self.latents[:count],
            lambda: self.image()[:count],
            self.noise[:count],
            self.timesteps[:count],
            self.conditioning.take(range(count)),
        )


class ImageBackbone(nn.Module):
    """A frozen ViT (DINO, DINOv2 or a CLIP vision tower) that sees pictures as it was trained to.

    Args:
        model: the transformers model. mean, std: its normalisation of pictures in 0…1. side: its input in pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float], side: int) -> None:
        super().__init__()
        self.model, self.side = model, side
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    @property
    def widths(self) -> list[int]:
        """Width of each tap's features."""
        is_clip = self.model.config.model_type.startswith("clip")
        return [self.model.config.projection_dim if is_clip else self.model.config.hidden_size]

    def features(self, images: Tensor) -> list[Tensor]:
        """One tap [B, 1, D]: the class token, or CLIP's image embedding, of pictures [B, 3, H, W] in [-1, 1]."""
        size = (self.side, self.side)
        # antialias only matters when shrinking, and its backward is slow on the CPU when it is not needed
        shrinks = images.shape[-1] > self.side
        resized = F.interpolate(images.float(), size, mode="bicubic", antialias=shrinks, align_corners=False)
        pixels = ((resized.clamp(-1, 1) + 1) / 2 - self.mean) / self.std
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if self.model.config.model_type.startswith("clip"):
            return [self.model(pixel_values=pixels).image_embeds.float().unsqueeze(1)]
        extra = {"interpolate_pos_encoding": True} if self.model.config.model_type == "vit" else {}
        return [self.model(pixel_values=pixels, **extra).last_hidden_state[:, :1].float()]

    def see(self, pictures: Pictures) -> list[Tensor]:
        """`features` of a batch's decoded pictures."""
        return self.features(pictures.image())


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

    def see(self, pictures: Pictures) -> list[Tensor]:
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


def load_image_backbone(name: str, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> ImageBackbone:
    """A frozen image encoder by registry name, hub id or local folder; the kind is read from its configuration.

    Raises:
        ModelError: it is missing, or not a ViT, DINOv2 or CLIP vision model.
    """
    from transformers import CLIPVisionModelWithProjection, Dinov2Model, ViTModel

    source = IMAGE_BACKBONES.get(name, name)
    try:
        folder = resolve(source, ("",), offline=model.offline)
    except ModelError as error:
        without = "Or do without it: --discriminators teacher --identity none --no-echo"
        raise ModelError(error.message, f"{error.hint or ''} {without}".strip()) from error
    settings = json.loads((folder / "config.json").read_text())
    kinds = {"vit": ViTModel, "dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}
    kind = kinds.get(str(settings.get("model_type")).removesuffix("_vision_model"))
    if kind is None:
        raise ModelError(f"{source}: {settings.get('model_type')!r} is not a ViT, DINOv2 or CLIP vision model.")
    extra = {"add_pooling_layer": False} if kind is ViTModel else {}
    module = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **extra)
    mean, std = _normalisation(folder, is_clip=kind is CLIPVisionModelWithProjection)
    side = min(_LARGEST_SIDE, int(module.config.image_size))
    return ImageBackbone(module, mean, std, side).to(device).eval().requires_grad_(False)


def _normalisation(folder: Path, *, is_clip: bool) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and spread in the model's own preprocessor file; else those of its kind."""
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    mean, std = _CLIP if is_clip else _IMAGENET
    return settings.get("image_mean", mean), settings.get("image_std", std)


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
