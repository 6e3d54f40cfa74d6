"""Frozen image encoders (DINO, DINOv2, CLIP) in two forms: for losses and for scores.

`ImageBackbone` takes tensors and is differentiable, so discriminators and the identity loss can use it. `DinoScorer`
and `ClipScorer` take PIL images and use the encoder's own preprocessing exactly, so their scores compare with
published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from echodistill_cli.config.families import read_json, read_model_config, reading
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.errors import ModelError
from echodistill_cli.files import public_name
from echodistill_cli.models.downloads import IMAGE_BACKBONES
from echodistill_cli.models.parts import load_module, load_tokenizer, quiet_libraries
from echodistill_cli.models.sources import resolve
from echodistill_cli.models.waiting import Waiting

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# DINOv2 was trained at up to 518 pixels. At 224 it costs a sixth and still tells subjects apart.
_LARGEST_SIDE = 224
_PROCESSORS = ("CLIP", "ViT", "Bit")  # classes of preprocessing, without their endings


# --- for losses -------------------------------------------------------------------------------------------------------


class ImageBackbone(nn.Module):
    """A frozen ViT (DINO, DINOv2 or a CLIP vision tower) that passes gradients to its images.

    Args:
        model: the transformers model.
        mean: of its normalization, for images in [0, 1].
        std: of its normalization.
        side: its input size in pixels.

    Attributes:
        waiting: where its weights are while nothing computes with them; None if they never leave the device.
    """

    factor: Tensor
    offset: Tensor
    waiting: Waiting | None = None

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float], side: int) -> None:
        super().__init__()
        self.model, self.side = model, side
        # ((x + 1) / 2 - mean) / std, for images x in [-1, 1].
        means, stds = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("factor", 0.5 / stds)
        self.register_buffer("offset", (0.5 - means) / stds)

    def let_wait(self) -> None:
        """Let the weights wait in the machine's memory from now on; see `waiting.present`."""
        self.waiting = self.waiting or Waiting(self)

    @property
    def widths(self) -> list[int]:
        """Width of each feature map that `features` returns."""
        return [self.model.config.projection_dim if self._is_clip else self.model.config.hidden_size]

    def features(self, images: Tensor) -> list[Tensor]:
        """Return one feature map: the class token, or CLIP's image embedding.

        Args:
            images: [B, 3, H, W] in [-1, 1].

        Returns:
            A list with one float32 tensor [B, 1, D].
        """
        if self.waiting:
            self.waiting.come()
        # Antialiasing matters only for shrinking, and its backward pass is slow on the CPU.
        shrinks = images.shape[-1] > self.side
        size = (self.side, self.side)
        resized = F.interpolate(images.float(), size, mode="bicubic", antialias=shrinks, align_corners=False)
        # Not clamped: the gradient has to reach pixels beyond the range and pull them back into it.
        pixels = torch.addcmul(self.offset, resized, self.factor)
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if self._is_clip:
            return [self.model(pixel_values=pixels).image_embeds.float().unsqueeze(1)]
        # Dinov2Model interpolates its position embeddings by itself.
        extra = {"interpolate_pos_encoding": True} if self.model.config.model_type == "vit" else {}
        return [self.model(pixel_values=pixels, **extra).last_hidden_state[:, :1].float()]

    @property
    def _is_clip(self) -> bool:
        return str(self.model.config.model_type).startswith("clip")


@quiet_libraries()
def load_image_backbone(name: str, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> ImageBackbone:
    """Load a frozen backbone; its architecture is read from its configuration.

    Args:
        name: key of `IMAGE_BACKBONES`, hub id, local folder or embedded model.
        model: settings that say whether to stay offline.
        device: where to put it.
        dtype: of its weights.

    Raises:
        ModelError: the backbone is missing or incomplete, or is not a ViT, DINOv2 or CLIP vision model.
    """
    from transformers import CLIPVisionModelWithProjection, Dinov2Model, ViTModel

    source = IMAGE_BACKBONES.get(name, name)
    try:
        folder = resolve(source, ("",), offline=model.offline)
    except ModelError as error:
        without = "Or train without it: --discriminators teacher --identity none --no-echo"
        raise ModelError(error.message, f"{error.hint or ''} {without}".strip()) from error
    kinds = {"vit": ViTModel, "dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}
    kind = kinds.get(_model_type(folder).removesuffix("_vision_model"))
    if kind is None:
        raise ModelError(f"{source}: {_model_type(folder)!r} is not a ViT, DINOv2 or CLIP vision model.")
    module = _load_encoder(folder, kind, dtype)
    mean, std = _normalization(folder, is_clip=kind is CLIPVisionModelWithProjection)
    side = min(_LARGEST_SIDE, int(module.config.image_size))
    return ImageBackbone(module, mean, std, side).to(device).eval().requires_grad_(False)


def _normalization(folder: Path, *, is_clip: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation from the preprocessor file, or the architecture's defaults."""
    file = folder / "preprocessor_config.json"
    settings = read_json(file) if file.is_file() else {}
    mean, std = _CLIP if is_clip else _IMAGENET
    mean, std = settings.get("image_mean", mean), settings.get("image_std", std)
    with reading(file):
        if not all(len(values) == 3 and all(float(value) == value for value in values) for values in (mean, std)):
            raise ValueError("image_mean and image_std need three numbers each")
    return mean, std


# --- for scores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreEncoders:
    """The two encoders that scores are computed with.

    Args:
        clip: folder of CLIP.
        dino: folder of DINO.
        clip_name: CLIP's name for reports, without a private path.
        dino_name: DINO's name for reports, without a private path.
    """

    clip: Path
    dino: Path
    clip_name: str
    dino_name: str


def find_score_encoders(clip: str, dino: str, *, offline: bool) -> ScoreEncoders:
    """Find both encoders' folders without loading them, to report what is missing before generation.

    Args:
        clip: hub id (`@revision` is optional), folder or embedded model such as "mini:clip".
        dino: the same for DINO.
        offline: whether to look in the cache only.

    Raises:
        ModelError: an encoder is missing, incomplete or of another architecture.
    """
    clip_folder = _find(clip, ("clip",), "--clip takes a complete CLIPModel, including its text encoder", offline)
    if not any((clip_folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ModelError(f"{clip}: it has no tokenizer.", "Name a complete folder: --clip DIR")
    dino_folder = _find(dino, ("vit", "dinov2"), "--dino takes a ViTModel or Dinov2Model", offline)
    return ScoreEncoders(clip_folder, dino_folder, public_name(clip), public_name(dino))


def _find(source: str, model_types: Sequence[str], requirement: str, offline: bool) -> Path:
    folder = resolve(source, ("",), offline=offline)
    if not folder.is_dir():
        raise ModelError(f"{source} is a single file.", f"{requirement}, as a folder or hub id.")
    if _model_type(folder) not in model_types:
        raise ModelError(f"{source}: its model type is {_model_type(folder)!r}.", f"{requirement}.")
    if not (folder / "preprocessor_config.json").is_file():
        raise ModelError(
            f"{source}: it has no preprocessor_config.json.",
            "Add the file: scores need its preprocessing.",
        )
    return folder


class ImageScorer:
    """A frozen image encoder with its own preprocessing.

    Args:
        folder: with the model and preprocessor_config.json.
        kind: the model's class in transformers.
        device: where to put it.
    """

    @quiet_libraries()
    def __init__(self, folder: Path, kind: Any, device: torch.device) -> None:
        self.processor = _load_processor(folder)
        self.model = _load_encoder(folder, kind, torch.float32).to(device)
        self.device = device

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Return preprocessed images [B, 3, H, W] from RGB images of any size."""
        inputs = self.processor(images=list(images), return_tensors="pt")
        return torch.as_tensor(inputs["pixel_values"], device=self.device)


class DinoScorer(ImageScorer):
    """DINO (a ViT) or DINOv2, whichever the folder holds.

    Args:
        folder: with the model and preprocessor_config.json.
        device: where to put it.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import Dinov2Model, ViTModel

        super().__init__(folder, ViTModel if _model_type(folder) == "vit" else Dinov2Model, device)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the class tokens after the last layer norm, [B, D] on the CPU, of RGB images."""
        return torch.as_tensor(self.model(pixel_values=self.pixels(images)).last_hidden_state[:, 0].cpu())


class ClipScorer(ImageScorer):
    """A complete CLIP: images and texts in one embedding space.

    Args:
        folder: with the model, its tokenizer and preprocessor_config.json.
        device: where to put it.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPModel

        super().__init__(folder, CLIPModel, device)
        self.tokenizer = load_tokenizer(folder)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the projected embeddings, [B, D] on the CPU, of RGB images."""
        pooled = self.model.vision_model(pixel_values=self.pixels(images)).pooler_output
        return torch.as_tensor(self.model.visual_projection(pooled).cpu())

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the projected embeddings, [B, D] on the CPU, of texts truncated to CLIP's context length."""
        longest = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=inputs["input_ids"].to(self.device), attention_mask=inputs["attention_mask"].to(self.device)
        ).pooler_output
        return torch.as_tensor(self.model.text_projection(pooled).cpu())


# --- for both ---------------------------------------------------------------------------------------------------------


def _model_type(folder: Path) -> str:
    return str(read_model_config(folder).get("model_type"))


def _load_processor(folder: Path) -> Any:
    """Load the preprocessing of an encoder with transformers' own classes; runs no code of the folder.

    Raises:
        ModelError: the file is damaged, or names another class.
    """
    from transformers import AutoImageProcessor

    file = folder / "preprocessor_config.json"
    settings = read_json(file)
    name = str(settings.get("image_processor_type", settings.get("feature_extractor_type")))
    kind = name.removesuffix("Fast").removesuffix("FeatureExtractor").removesuffix("ImageProcessor")
    if kind not in _PROCESSORS:
        raise ModelError(
            f"{file}: its image_processor_type is {name!r}, not one of {', '.join(_PROCESSORS)}.",
            "Name a model with the preprocessing of CLIP, ViT or DINOv2; code in a model's folder is never run.",
        )
    with reading(file):
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False, local_files_only=True)


def _load_encoder(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    """Load a frozen encoder in evaluation mode, on the CPU.

    Raises:
        ModelError: files are damaged, or weights are missing, which transformers would replace by random ones.
    """
    # Only ViTModel has a pooling layer that its published weights lack.
    extra: dict[str, Any] = {"add_pooling_layer": False} if kind.__name__ == "ViTModel" else {}
    return load_module(kind, folder, dtype, **extra).eval().requires_grad_(False)
