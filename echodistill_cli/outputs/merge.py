"""A model with what was learned folded into its weights: a whole diffusers folder, or a one-file checkpoint.

Nothing has to be attached to such a model: W becomes W + B A α/r, and a learned word takes its row of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echodistill_cli.diffusion.text import LearnedToken
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.files import atomically, write_text
from echodistill_cli.lora.keys import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from echodistill_cli.lora.read import LoraWeights
from echodistill_cli.lora.safetensors_io import write_checkpoint
from echodistill_cli.lora.tensors import folded
from echodistill_cli.models.load import ModelPair, Role
from echodistill_cli.models.original_layout import sd_checkpoint, sdxl_checkpoint
from echodistill_cli.outputs.attach import plain_pipeline

# The schedule of Stable Diffusion 1, 2 and XL, in the words of diffusers' schedulers.
_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_HASHES = ("modelspec.hash_sha256", "modelspec.implementation")


@torch.no_grad()
def fold_lora(pair: ModelPair, role: Role, weights: Sequence[LoraWeights]) -> None:
    """Add LoRA to the weights of one role's UNet and of the text encoders, in float32.

    Raises:
        ModelError: a module of the LoRA is not there, or has another shape; ConfigError: as `lora_formats.folded`.
    """
    components = components_of(pair, role)
    for part in weights:
        if part.component not in components:
            raise ModelError(f"This model has no {part.component}.", "Name the model that the LoRA was made for.")
        layers = dict(components[part.component].named_modules())
        for path, down, up in folded(part, torch.float32):
            layer = layers.get(path) or layers.get(path.removeprefix("text_model."))
            weight = getattr(layer, "weight", None)
            change = up.flatten(1) @ down.flatten(1)
            if weight is None or weight.numel() != change.numel() or len(weight) != len(change):
                raise ModelError(
                    f"The LoRA does not fit this model: {part.component} {path} is missing or has another shape.",
                    "Name the model that the LoRA was made for.",
                )
            weight.copy_(weight.float() + change.reshape(weight.shape).to(weight.device))


@torch.no_grad()
def place_token(pair: ModelPair, token: str, vectors: Sequence[Tensor]) -> None:
    """Write a learned word into the vocabularies: over its own row, or into a new one for a new word.

    Args:
        vectors: [1, width], one per text encoder.

    Raises:
        ModelError: as `LearnedToken.set_vectors`.
    """
    # Makes room for a new word, and puts its vector in its place.
    LearnedToken(pair.encoder, token, "a").set_vectors(vectors)
    for tokenizer, encoder, vector in zip(pair.encoder.tokenizers, pair.encoder.encoders, vectors, strict=True):
        (row,) = tokenizer(token, add_special_tokens=False).input_ids
        embedding = encoder.get_input_embeddings()
        embedding.weight[row] = vector[0].to(embedding.weight)


def knows_word(pair: ModelPair, token: str) -> bool:
    """Whether every tokenizer has the word as one token already."""
    return all(len(tokenizer(token, add_special_tokens=False).input_ids) == 1 for tokenizer in pair.encoder.tokenizers)


def save_pipeline(pair: ModelPair, role: Role, folder: Path, dtype: torch.dtype, card: str | None) -> None:
    """Write one role as a whole diffusers folder whose scheduler is set as our own sampler draws: Euler, trailing.

    Args:
        card: text of its README.md; None writes none.

    Raises:
        EchoDistillError: it cannot be written; an existing folder is replaced only when all is written.
    """
    pipeline = plain_pipeline(pair, role)
    pipeline.register_modules(scheduler=trailing_scheduler(pair, role))
    for module in (*components_of(pair, role).values(), pair.codec.encoder):
        nn.Module.to(module, dtype)  # diffusers' own .to warns of layers that none of these models has
    with atomically(folder) as temporary:
        pipeline.save_pretrained(temporary)
        _restore_wrapper(temporary / TEXT_ENCODER / "model.safetensors")
        if card is not None:
            write_text(temporary / "README.md", card)


def save_checkpoint(
    pair: ModelPair, role: Role, path: Path, dtype: torch.dtype, lora_metadata: Mapping[str, str]
) -> None:
    """Write one role as a checkpoint in the original layout, which ComfyUI and A1111 open as a model.

    Args:
        lora_metadata: header of the LoRA that was folded in; what holds for the model too is kept.

    Raises:
        ConfigError: the model has no place in that layout. EchoDistillError: it cannot be written.
    """
    parts = [*components_of(pair, role).values()]
    states = [{name: _cast(value, dtype) for name, value in part.state_dict().items()} for part in parts]
    vae = {name: _cast(value, dtype) for name, value in pair.codec.encoder.state_dict().items()}
    layout = sd_checkpoint if pair.family == "sd" else sdxl_checkpoint
    tensors = layout(states[0], vae, *states[1:])
    longest = pair.encoder.tokenizers[0].vocab_size
    for name, value in tensors.items():
        if name.endswith("token_embedding.weight") and len(value) != longest:
            raise ConfigError("A one-file checkpoint has no room for a new word.", "Use --format pipeline.")
    write_checkpoint(path, tensors, _model_metadata(lora_metadata))


def components_of(pair: ModelPair, role: Role) -> dict[str, Any]:
    """The modules that LoRA may change, by the component's name in LoRA files."""
    names = (TEXT_ENCODER, TEXT_ENCODER_2)
    return {UNET: pair.role(role).unet} | dict(zip(names, pair.encoder.encoders, strict=False))


def _model_metadata(lora_metadata: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in lora_metadata.items() if key.startswith(("modelspec.", "echodistill."))}
    if "modelspec.architecture" in kept:
        kept["modelspec.architecture"] = kept["modelspec.architecture"].removesuffix("/lora")
    return {key: value for key, value in kept.items() if key not in _HASHES} | {"format": "pt"}


def trailing_scheduler(pair: ModelPair, role: Role) -> Any:
    """diffusers' scheduler that draws one role's pictures as our own sampler does."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    schedule = pair.role(role).schedule
    settings = {"prediction_type": schedule.prediction_type, "timestep_spacing": "trailing", "steps_offset": 1}
    usual = EulerDiscreteScheduler(**_SCHEDULE, **settings)
    if torch.allclose(usual.alphas_cumprod, schedule.alphas_cumprod.cpu(), rtol=1e-4):
        return usual
    return plain_pipeline(pair, role).scheduler


def _restore_wrapper(file: Path) -> None:
    """Give a text encoder's file the names that every release of transformers reads; 5.6 and later drop a part."""
    state = load_file(file)
    if not any(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": value for name, value in state.items()}, file, {"format": "pt"})


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
