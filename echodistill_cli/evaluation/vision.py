"""The encoders that judge pictures: a whole CLIP and a ViT, each seeing pictures exactly as its own files say.

Resizing, cropping and normalising follow the folder's `preprocessor_config.json`, done by transformers with Pillow: the
same numbers with and without torchvision. Weights and sums are float32.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from echodistill_cli.errors import ModelError
from echodistill_cli.models.sources import resolve
from echodistill_cli.paths import expanded

# The paper's: ViT-B/32 and ViT-S/16. The main branches of both repositories have only pickled weights, which are never
# loaded; these branches are the hub's own conversions of them.
CLIP = "openai/clip-vit-base-patch32@refs/pr/15"
DINO = "facebook/dino-vits16@refs/pr/1"


@dataclass(frozen=True)
class Judges:
    """Where the two encoders are, and what they were called (of a folder only its last part)."""

    clip: Path
    dino: Path
    clip_name: str
    dino_name: str


def find_judges(clip: str, dino: str, *, offline: bool) -> Judges:
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
    return Judges(clip_folder, dino_folder, _shown(clip), _shown(dino))


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


def _shown(source: str) -> str:
    path = expanded(source)
    return path.resolve().name if path.is_dir() else source


class ImageJudge:
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


class DinoJudge(ImageJudge):
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


class ClipJudge(ImageJudge):
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
