"""Put LoRA and token files on a loaded pair through diffusers' own readers, and so prove what a file means.

What `sample` draws with is therefore what any diffusers user gets from the same file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.diffusion.text import LearnedToken
from echodistill_cli.errors import ConfigError, EchoDistillError, ModelError
from echodistill_cli.files import atomically, write_text
from echodistill_cli.lora.keys import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import read_tensors, write_checkpoint
from echodistill_cli.lora.tensors import LoraWeights, folded
from echodistill_cli.models.adapters import (
    ADAPTER,
    activate,
    at_strength,
    is_distilled,
    keep_on,
    lora_layers,
    trainable_parameters,
)
from echodistill_cli.models.single_file import sd_checkpoint, sdxl_checkpoint

# Rounding the adapters to half precision moves few pixels by more than a level; a lost module moves many.
_MEAN_LEVELS = 1.5


def plain_pipeline(pair: ModelPair, role: Role) -> Any:
    """A stock diffusers pipeline over the pair's own modules: no copy is made."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    denoiser = pair.role(role)
    scheduler = EulerDiscreteScheduler(
        trained_betas=_betas(denoiser.schedule.alphas_cumprod),
        prediction_type=denoiser.schedule.prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    shared = {"vae": pair.codec.encoder, "unet": denoiser.unet, "scheduler": scheduler}
    encoders, tokenizers = pair.encoder.encoders, pair.encoder.tokenizers
    if pair.family == "sd":
        return StableDiffusionPipeline(
            **shared,
            text_encoder=encoders[0],
            tokenizer=tokenizers[0],
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        **shared,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        force_zeros_for_empty_prompt=pair.encoder.zero_null,
    )


def attach_lora(pair: ModelPair, role: Role, file: Path, scale: float = 1.0) -> None:
    """Load a LoRA file of any common format into one role's UNet and the text encoders.

    Args:
        scale: strength; 1 is as trained.

    Raises:
        ModelError: the file is damaged, or made for other models; nothing of it is applied silently in part.
    """
    described = read_lora(file)
    if not described.modules or described.unmatched:
        odd = f" such as {described.unmatched[0]}" if described.unmatched else ""
        raise ModelError(f"{file} is not a plain LoRA: {len(described.unmatched)} of its keys are unknown{odd}.")
    pipeline = plain_pipeline(pair, role)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of a student made one-step
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{file} does not fit this model ({first_line}).", "Name the model it was made for."
        ) from error
    placed = sum(len(lora_layers(module)) for module in (pipeline.unet, *pair.encoder.encoders))
    if placed != len(described.modules):
        raise ModelError(
            f"{file} does not fit this model: only {placed} of its {len(described.modules)} modules match."
        )
    pipeline.set_adapters([ADAPTER], [scale])
    activate(pipeline.unet, scale)
    keep_on(pair.device, pipeline.unet)


def detach_lora(pair: ModelPair, role: Role) -> None:
    """Take every LoRA off one role's UNet and the text encoders; the modules are as they were loaded."""
    unet = pair.role(role).unet
    if is_distilled(unet):
        unet.delete_adapters(ADAPTER)
    elif lora_layers(unet):
        unet.unload_lora()
    for encoder in pair.encoder.encoders:
        if lora_layers(encoder):
            encoder.delete_adapter(ADAPTER)


def read_token_file(file: Path) -> list[Tensor]:
    """The vectors [n, width] of a token file, one per text encoder in the pipeline's order.

    Raises:
        ModelError: it is no token file.
    """
    described = read_lora(file)
    if described.format != "token":
        raise ModelError(f"{file} is not a token file (format: {described.format}).")
    tensors = dict(read_tensors(file, described.table))
    return [tensors["clip_l"], tensors["clip_g"]] if "clip_g" in tensors else list(tensors.values())


def check_same_images(
    pair: ModelPair, role: Role, file: Path, prompts: Sequence[str], settings: SamplingSettings, strength: float = 1.0
) -> None:
    """Take the trained adapters off, read `file` back in their place, and compare pictures; the file's stay on.

    The trained adapters are first rounded as a half-precision file and a reader of the base's precision round them, so
    that what remains to be seen is a module that was lost or scaled wrongly.

    Args:
        strength: that the file gives the UNet's LoRA, times as trained.

    Raises:
        EchoDistillError: the pictures differ by more than rounding.
        ModelError: diffusers does not take the file whole.
    """
    seeds = list(range(len(prompts)))
    for module in (pair.role(role).unet, *pair.encoder.encoders):
        for parameter in trainable_parameters(module):
            parameter.data = parameter.data.half().to(pair.dtype).float()
    with at_strength(pair.role(role).unet, strength):
        before = list(generate(pair, prompts, seeds, settings))
    detach_lora(pair, role)
    attach_lora(pair, role, file)
    after = list(generate(pair, prompts, seeds, settings))
    levels = max(float((a.float() - b.float()).abs().mean()) for a, b in zip(before, after, strict=True))
    if levels > _MEAN_LEVELS:
        raise EchoDistillError(f"{file} read back gives other pictures (by {levels:.1f} of 255 levels on average).")


def _betas(alphas_cumprod: Tensor) -> Any:
    previous = torch.cat((torch.ones(1), alphas_cumprod[:-1]))
    return (1 - alphas_cumprod / previous).numpy()


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
def insert_token(pair: ModelPair, token: str, vectors: Sequence[Tensor]) -> None:
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


def has_token(pair: ModelPair, token: str) -> bool:
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
