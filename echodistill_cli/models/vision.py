"""Frozen image encoders (DINO, DINOv2, CLIP): differentiable for losses, PIL-exact for scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.errors import ModelError
from echodistill_cli.files import public_name
from echodistill_cli.models.sources import resolve

# The paper's: ViT-B/32 and ViT-S/16. The main branches of both repositories have only pickled weights, which are never
# loaded; these branches are the hub's own conversions of them.
CLIP = "openai/clip-vit-base-patch32@refs/pr/15"
DINO = "facebook/dino-vits16@refs/pr/1"


@dataclass(frozen=True)
class ScoreEncoders:
    """Where the two encoders are, and what they were called (of a folder only its last part)."""

    clip: Path
    dino: Path
    clip_name: str
    dino_name: str


def find_score_encoders(clip: str, dino: str, *, offline: bool) -> ScoreEncoders:
    """The folders of a CLIP and of a ViT; loads nothing, so that what is missing is said before anything is drawn.

    Args:
        clip, dino: hub id (with `@revision`, if wanted), folder, or one of the package's own such as "mini:clip".

    Raises:
        ModelError: one is missing, incomplete or of another kind.
    """
    clip_folder = _find(clip, ("clip",), "--clip takes a whole CLIPModel, its text side too", offline)
    if not any((clip_folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{clip}: it has no tokenizer.", "--clip takes a folder with tokenizer.json beside the model.")
    dino_folder = _find(dino, ("vit", "dinov2"), "--dino takes a ViTModel or Dinov2Model", offline)
    return ScoreEncoders(clip_folder, dino_folder, public_name(clip), public_name(dino))


def _find(source: str, kinds: Sequence[str], wanted: str, offline: bool) -> Path:
    folder = resolve(source, ("",), offline=offline)
    if not folder.is_dir():
        raise ModelError(f"{source} is a single file.", f"{wanted}, as a folder or hub id.")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in kinds:
        raise ModelError(f"{source}: its kind is {kind!r}.", f"{wanted}.")
    if not (folder / "preprocessor_config.json").is_file():
        raise ModelError(f"{source}: it has no preprocessor_config.json, which says how it sees pictures.")
    return folder


class ImageScorer:
    """A frozen image encoder with its own preprocessing."""

    def __init__(self, folder: Path, kind: Any, device: torch.device, **extra: Any) -> None:
        from transformers import AutoImageProcessor

        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **extra
        )
        if report["missing_keys"]:
            lost = sorted(report["missing_keys"])
            raise ModelError(f"{folder}: its weights lack {lost[0]} and {len(lost) - 1} more.", "Fetch it again.")
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.device = device

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any sizes as the encoder wants them: [B, 3, H, W]."""
        inputs = self.processor(images=list(images), return_tensors="pt")
        return torch.as_tensor(inputs["pixel_values"], device=self.device)


class DinoScorer(ImageScorer):
    """DINO (a ViT), or a DINOv2 if that is what the folder holds."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import Dinov2Model, ViTModel

        is_vit = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "vit"
        extra = {"add_pooling_layer": False} if is_vit else {}
        super().__init__(folder, ViTModel if is_vit else Dinov2Model, device, **extra)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """The class token after the last layer norm of RGB pictures: [B, D] on the CPU."""
        return torch.as_tensor(self.model(pixel_values=self.pixels(images)).last_hidden_state[:, 0].cpu())


class ClipScorer(ImageScorer):
    """A whole CLIP: pictures and texts in one space."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        super().__init__(folder, CLIPModel, device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Projected embeddings of RGB pictures: [B, D] on the CPU."""
        pooled = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return torch.as_tensor(self.model.visual_projection(pooled).cpu())

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Projected embeddings of texts, cut off at the longest that CLIP reads: [B, D] on the CPU."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=inputs["input_ids"].to(self.device), attention_mask=inputs["attention_mask"].to(self.device)
        ).pooler_output
        return torch.as_tensor(self.model.text_projection(pooled).cpu())


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
