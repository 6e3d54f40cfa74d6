"""What a model family is. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FamilyName = Literal["sd", "sdxl", "sana", "flux2"]
# Keys of a UNet's configuration in which teacher and student are the same.
_SHARED = ("cross_attention_dim", "in_channels", "addition_embed_type")
VAE = 83_653_863  # parameters of AutoencoderKL, the same in SD and SDXL


@dataclass(frozen=True)
class Size:
    """Parameter counts and activations of a family's published models, for memory estimates.

    Args:
        unet: parameters of one UNet.
        text: parameters of all text encoders.
        adapter: LoRA parameters per rank of one UNet, by `adapter.targets`.
        text_adapter: LoRA parameters per rank of all text encoders.
        activations: GiB kept per sample for the UNet's backward pass, by `adapter.targets`.
        checkpointed: the same with gradient checkpointing.
        vae: parameters of the VAE.
        decoder: GiB kept per sample for the way back through the VAE's decoder.
        text_activations: GiB kept per prompt for the way back through the text encoders; 0 if nothing trains there.
    """

    unet: int
    text: int
    adapter: Mapping[str, int]
    text_adapter: int
    activations: Mapping[str, float]
    checkpointed: float
    vae: int = VAE
    decoder: float = 2.81
    text_activations: float = 0.0


@dataclass(frozen=True)
class Family:
    """What the models of one family have in common.

    Args:
        name: short name, used in checkpoints and file headers.
        preset: preset whose teacher and sizes suit any student of the family.
        architectures: names in `lora.keys.ARCHITECTURES` whose LoRA files fit.
        configuration: folder in `models/configurations`.
        pipeline: diffusers' pipeline class of students.
        text_width: width of the text features that the cross-attention of the published models reads.
        size_conditioning: whether the UNet is conditioned on image sizes and a pooled text embedding.
        zero_null: whether the empty prompt is encoded as zeros, unless `model_index.json` says otherwise.
        padding: padding token by tokenizer. It matters: the text encoders attend to padding.
        tiny_decoder: hub id of the AutoencoderTiny for the same latents; empty if there is none.
        checkpoint_prefix: prefix of tensor names that only one-file checkpoints of this family have; empty for none.
        size: of the published models.
        transformer: diffusers' class of the denoiser; empty for a UNet.
        teacher_pipeline: diffusers' pipeline class of teachers; empty for the class of students.
        shared: keys of the denoiser's configuration in which teacher and student are the same.
        layers: pattern of the layers that get a LoRA, by `adapter.targets`; empty for UNets, whose layers are known.
        names: pattern of hub ids of the family, which is asked when the model is not on this machine.
        sampling: how other tools sample the students, in words; empty for UNets.
        resolution: native image size in pixels; 0 if the configuration says it.
        fp16: whether its models run in fp16 without overflow.
    """

    name: FamilyName
    preset: str
    architectures: tuple[str, ...]
    configuration: str
    pipeline: str
    text_width: int
    size_conditioning: bool
    zero_null: bool
    padding: Mapping[str, str]
    tiny_decoder: str
    checkpoint_prefix: str
    size: Size
    transformer: str = ""
    teacher_pipeline: str = ""
    shared: tuple[str, ...] = _SHARED
    layers: Mapping[str, str] = field(default_factory=dict)
    names: str = ""
    sampling: str = ""
    resolution: int = 0
    fp16: bool = True

    @property
    def is_flow(self) -> bool:
        """Whether its models are transformers that predict the velocity of a rectified flow."""
        return bool(self.transformer)

    @property
    def layout(self) -> str:
        """Layout of a run's own LoRA files: kohya's, or diffusers' for a transformer."""
        return "diffusers" if self.is_flow else "kohya"

    @property
    def denoiser(self) -> str:
        """Subfolder of the model that denoises; also its name in LoRA files."""
        return "transformer" if self.is_flow else "unet"

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Subfolders of the tokenizers."""
        return tuple(self.padding)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Subfolders of the text encoders, in the order of the tokenizers."""
        return tuple(name.replace("tokenizer", "text_encoder") for name in self.padding)

    @property
    def parts(self) -> tuple[str, ...]:
        """Subfolders that teacher and student share: VAE, text encoders, tokenizers."""
        return ("vae", *self.text_encoders, *self.tokenizers)
