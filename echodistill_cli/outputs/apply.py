"""Apply a LoRA to loaded models: attach a file's adapters, or fold them into the weights.

`lora.read` alone says how strong each layer's LoRA is. `check_same_images` attaches through diffusers instead, to test
that its users get the same images from a file of ours.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from echodistill_cli.config.families import FAMILIES
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import SamplingSettings, generate, sample_latents, seeded_noise
from echodistill_cli.errors import ConfigError, EchoDistillError, ModelError
from echodistill_cli.files import atomically, write_text
from echodistill_cli.lora.header import model_metadata
from echodistill_cli.lora.keys import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import write_checkpoint
from echodistill_cli.lora.tensors import LoraWeights, folded
from echodistill_cli.models.adapters import (
    ADAPTER,
    activate,
    add_trained_lora,
    at_strength,
    is_distilled,
    keep_on,
    lora_layers,
    trainable_parameters,
)
from echodistill_cli.models.flow_pipeline import check_flow_images, flow_pipeline
from echodistill_cli.models.lean import run_plain
from echodistill_cli.models.parts import quiet_libraries
from echodistill_cli.models.single_file import sd_checkpoint, sdxl_checkpoint
from echodistill_cli.outputs.hub import make_portable

# Rounding the adapters to half precision changes few pixels by more than one level; a lost module changes many.
_MEAN_LEVELS = 1.5
# The noise schedule of Stable Diffusion 1, 2 and XL, as settings of diffusers' schedulers.
_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
# Below every ᾱ_T of a schedule that is not rescaled (Stable Diffusion: 0.0047), above what rounding leaves of 0.
_NO_SIGNAL = 1e-6
# Latents per side of the images that test a written folder, and their relative difference. Half precision gives
# some percent, because one step multiplies rounding errors by up to 15; a wrong scheduler gives 100 percent or more.
_TEST_SIDE = 8
_MOST_DIFFERENCE = 0.5


def plain_pipeline(pair: ModelPair, role: Role) -> Any:
    """Return a stock diffusers pipeline that shares the modules of the pair."""
    if FAMILIES[pair.family].is_flow:
        return flow_pipeline(pair, role)
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    shared = {
        "vae": pair.codec.encoder,
        "unet": pair.role(role).unet,
        "scheduler": trailing_scheduler(pair, role),
    }
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


def trailing_scheduler(pair: ModelPair, role: Role) -> Any:
    """Return the diffusers scheduler that matches our sampler: Euler, DDIM or LCM with trailing timesteps.

    For a student that starts before the last timestep, the schedule of DDIM or LCM ends there: diffusers then starts at
    that timestep, from unit noise.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from diffusers.schedulers.scheduling_lcm import LCMScheduler

    denoiser, schedule = pair.role(role), pair.role(role).schedule
    alphas = schedule.alphas_cumprod.cpu()
    settings: dict[str, Any] = {"prediction_type": schedule.prediction_type, "timestep_spacing": "trailing"}
    settings["steps_offset"] = 1
    if denoiser.sampler != "euler":
        count = denoiser.first_timestep + 1
        settings |= {"trained_betas": _betas(alphas[:count]), "clip_sample": False, "set_alpha_to_one": True}
        if denoiser.sampler == "lcm":
            return LCMScheduler(count, original_inference_steps=denoiser.steps, **settings)
        return DDIMScheduler(count, **settings)
    zero_snr = {"rescale_betas_zero_snr": True} if has_zero_snr(pair, role) else {}
    scheduler = EulerDiscreteScheduler(**_SCHEDULE, **settings, **zero_snr)
    # Where ᾱ is 0, diffusers has a tiny number instead, because its σ would be infinite.
    same_length = len(alphas) == len(scheduler.alphas_cumprod)
    if same_length and torch.allclose(scheduler.alphas_cumprod, alphas, rtol=1e-4, atol=1e-7 if zero_snr else 1e-8):
        return scheduler
    if zero_snr:
        # Rescaling to zero SNR changes nothing in a schedule that has it, and makes diffusers keep σ finite.
        alphas = torch.cat((alphas[:-1], alphas[-1:].clamp(max=0)))
    return EulerDiscreteScheduler(len(alphas), trained_betas=_betas(alphas), **settings, **zero_snr)


def has_zero_snr(pair: ModelPair, role: Role) -> bool:
    """Return whether the last timestep of a role's schedule holds no signal."""
    return float(pair.role(role).schedule.alphas_cumprod[-1]) < _NO_SIGNAL


def _betas(alphas_cumprod: Tensor) -> Any:
    """Return the betas of a noise schedule as a NumPy array."""
    previous = torch.cat((torch.ones(1), alphas_cumprod[:-1]))
    return (1 - alphas_cumprod / previous).numpy()


def components_of(pair: ModelPair, role: Role) -> dict[str, Any]:
    """Return the modules that a LoRA may change, by the name that LoRA files give them."""
    names = (TEXT_ENCODER, TEXT_ENCODER_2)
    return {FAMILIES[pair.family].denoiser: pair.role(role).unet} | dict(
        zip(names, pair.encoder.encoders, strict=False)
    )


def attach_lora(pair: ModelPair, role: Role, file: Path, scale: float = 1.0) -> None:
    """Add a LoRA file of any common format to one role's UNet and the text encoders.

    The reader of LoRA files gives the tensors and each layer's strength, so that the images are those of the same file
    folded into the weights. diffusers' own reader gives some files another strength.

    Args:
        pair: models without a trained LoRA; a distillation LoRA stays active.
        role: whose UNet gets it.
        file: a safetensors file.
        scale: of the LoRA; 1 as trained.

    Raises:
        ModelError: the file is damaged, or a part of it does not fit these models.
    """
    components = components_of(pair, role)
    layers = {name: dict(module.named_modules()) for name, module in components.items()}
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for part in read_lora(file).to_peft(layers):
        for path, down, up in folded(part, torch.float32):
            name = path if path in layers[part.component] else path.removeprefix("text_model.")
            layer = layers[part.component][name]
            shapes = _layer_shapes(layer, down, up)
            if shapes is None:
                raise _misfit(f"{part.component} {path} has another shape", str(file))
            tensors[part.component] |= {
                f"{name}.lora_A.weight": down.reshape(shapes[0]),
                f"{name}.lora_B.weight": up.reshape(shapes[1]),
            }
    for name, state in tensors.items():
        add_trained_lora(components[name], state, scale)
        keep_on(pair.device, components[name])


def _layer_shapes(layer: Any, down: Tensor, up: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the shapes of A and B for a linear layer or a convolution; None if they do not fit it."""
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    if weight is None or weight.dim() < 2 or getattr(layer, "groups", 1) != 1:
        return None
    shapes = (len(down), *weight.shape[1:]), (len(weight), len(down), *[1] * (weight.dim() - 2))
    same = down.numel() == math.prod(shapes[0]) and up.numel() == math.prod(shapes[1])
    return shapes if same else None


def _misfit(what: str, lora: str = "The LoRA") -> ModelError:
    return ModelError(f"{lora} does not fit this model: {what}.", "Name the model it was made for with --model.")


@quiet_libraries()
def _attach_with_diffusers(pair: ModelPair, role: Role, file: Path) -> None:
    """Load a LoRA file as every diffusers user does.

    Raises:
        ModelError: diffusers does not read all of the file.
    """
    pipeline = plain_pipeline(pair, role)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of a distillation LoRA
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"diffusers does not read {file} ({first_line}).") from error
    count, matched = len(read_lora(file).modules), sum(map(len, map(lora_layers, components_of(pair, role).values())))
    if matched != count:
        raise ModelError(f"diffusers reads only {matched} of the {count} modules in {file}.")
    pipeline.set_adapters([ADAPTER], [1.0])
    activate(pair.role(role).unet)
    keep_on(pair.device, pair.role(role).unet)


def detach_lora(pair: ModelPair, role: Role) -> None:
    """Remove the trained LoRA from one role's UNet and the text encoders. A distillation LoRA stays."""
    unet = pair.role(role).unet
    run_plain(unet)  # what training computes at once knows the layers of the LoRA
    if is_distilled(unet):
        unet.delete_adapters(ADAPTER)
    elif lora_layers(unet):
        unet.unload_lora()
    for encoder in pair.encoder.encoders:
        if lora_layers(encoder):
            encoder.delete_adapter(ADAPTER)


def check_same_images(
    pair: ModelPair, role: Role, file: Path, prompts: Sequence[str], settings: SamplingSettings, strength: float = 1.0
) -> None:
    """Replace the trained adapters by those in a file and check that the images stay the same.

    The trained adapters are first rounded like those in the file. Only a module that was lost or scaled wrongly can
    then change the images by more than the tolerance.

    Args:
        pair: models with the trained adapters; they keep those of the file.
        role: whose adapters the file holds.
        file: in half precision.
        prompts: one image each.
        settings: of the sampler.
        strength: factor on the UNet's LoRA that the file includes.

    Raises:
        EchoDistillError: the images differ by more than rounding.
        ModelError: diffusers does not read all of the file.
    """
    seeds = list(range(len(prompts)))
    for module in (pair.role(role).unet, *pair.encoder.encoders):
        for parameter in trainable_parameters(module):
            parameter.data = parameter.data.half().to(pair.dtype).float()
    with at_strength(pair.role(role).unet, strength):
        before = list(generate(pair, prompts, seeds, settings))
    detach_lora(pair, role)
    _attach_with_diffusers(pair, role, file)
    after = list(generate(pair, prompts, seeds, settings))
    levels = max(float((a.float() - b.float()).abs().mean()) for a, b in zip(before, after, strict=True))
    if levels > _MEAN_LEVELS:
        raise EchoDistillError(
            f"{file}, read back, generates other images than the trained models "
            f"(mean difference {levels:.1f} of 255 levels).",
            "Report this, with the versions that echodistill doctor lists.",
        )


@torch.no_grad()
def fold_lora(pair: ModelPair, role: Role, weights: Sequence[LoraWeights], name: str = "The LoRA") -> None:
    """Add a LoRA to the weights of one role's UNet and of the text encoders, in float32.

    Args:
        pair: the models.
        role: whose UNet to change.
        weights: of the LoRA.
        name: of the LoRA, for the error.

    Raises:
        ModelError: a module of the LoRA does not exist in the model, or has another shape.
        ConfigError: an adapter has other tensors than A and B.
    """
    components = components_of(pair, role)
    for part in weights:
        if part.component not in components:
            raise _misfit(f"it has no {part.component}", name)
        layers = dict(components[part.component].named_modules())
        for path, down, up in folded(part, torch.float32):
            layer = layers.get(path) or layers.get(path.removeprefix("text_model."))
            if _layer_shapes(layer, down, up) is None:
                raise _misfit(f"{part.component} {path} is missing or has another shape", name)
            weight = layer.weight  # type: ignore[union-attr]
            change = up.flatten(1) @ down.flatten(1)
            weight.copy_(weight.float() + change.reshape(weight.shape).to(weight.device))


def save_pipeline(pair: ModelPair, role: Role, folder: Path, dtype: torch.dtype, card: str | None) -> None:
    """Write one role as a diffusers folder, atomically, with the scheduler that matches our sampler.

    Args:
        pair: models with everything folded in; they are cast to `dtype`.
        role: whose UNet to write.
        folder: to write; an existing one is replaced.
        dtype: precision of the weights.
        card: text of the README.md; None writes none.

    Raises:
        EchoDistillError: the folder cannot be written.
    """
    pipeline = plain_pipeline(pair, role)
    parts = {**components_of(pair, role), "vae": pair.codec.encoder}
    for module in parts.values():
        nn.Module.to(module, dtype)  # diffusers' own .to warns about layers that these models do not have
    with atomically(folder) as temporary:
        with quiet_libraries():
            pipeline.save_pretrained(temporary)
            is_flow = FAMILIES[pair.family].is_flow
            if not is_flow:
                _restore_wrapper(temporary / TEXT_ENCODER / "model.safetensors")
            make_portable(temporary)
            (check_flow_images if is_flow else _check_same_latents)(pair, role, temporary, parts)
        if card is not None:
            write_text(temporary / "README.md", card)


@torch.no_grad()
def _check_same_latents(pair: ModelPair, role: Role, folder: Path, parts: Mapping[str, Any]) -> None:
    """Generate with a written folder's scheduler, tokenizers and settings; compare with our sampler.

    Raises:
        EchoDistillError: the latents differ by more than rounding.
        ModelError: the base model's weights are not finite.
    """
    from diffusers import DiffusionPipeline

    parts[UNET].conv_out.float()  # the loader's hook on this layer gives it float32
    pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    prompt, denoiser = "a photo", pair.role(role)
    noise = seeded_noise([0], (pair.codec.channels, _TEST_SIDE, _TEST_SIDE))
    conditioning, null = pair.encoder.encode([prompt]), pair.encoder.encode_null()
    expected = sample_latents(denoiser, noise, conditioning, null, steps=1, guidance_scale=0.0)
    pixels = _TEST_SIDE * pipeline.vae_scale_factor
    settings: dict[str, Any] = {"height": pixels, "width": pixels, "output_type": "latent"}
    if denoiser.time_ids is not None:
        ids = denoiser.time_ids
        settings |= {"original_size": ids[:2], "crops_coords_top_left": ids[2:4], "target_size": ids[4:]}
    dtype = parts[UNET].conv_in.weight.dtype
    result = pipeline(prompt, num_inference_steps=1, guidance_scale=0.0, latents=noise.to(dtype), **settings).images
    difference = float((result.float() - expected).abs().mean() / expected.abs().mean())
    if not difference < _MOST_DIFFERENCE:
        pair.blame_weights()
        raise EchoDistillError(
            f"diffusers generates other images with the merged model (latents differ by {difference:.0%}).",
            "Report this, with the versions that echodistill doctor lists.",
        )


def save_checkpoint(
    pair: ModelPair, role: Role, path: Path, dtype: torch.dtype, lora_metadata: Mapping[str, str]
) -> None:
    """Write one role as a single-file checkpoint in the original layout, which ComfyUI and A1111 open.

    Args:
        pair: models with everything folded in.
        role: whose UNet to write.
        path: of the file.
        dtype: precision of the weights.
        lora_metadata: header of the LoRA that was folded in; the checkpoint keeps the fields that hold for it.

    Raises:
        ConfigError: the layout cannot hold the model.
        EchoDistillError: the file cannot be written.
    """
    parts = [*components_of(pair, role).values()]
    states = [{name: _cast(value, dtype) for name, value in part.state_dict().items()} for part in parts]
    vae = {name: _cast(value, dtype) for name, value in pair.codec.encoder.state_dict().items()}
    layout = sd_checkpoint if pair.family == "sd" else sdxl_checkpoint
    tensors = layout(states[0], vae, *states[1:])
    # ComfyUI, A1111 and Forge know how an SDXL checkpoint predicts by these empty tensors alone.
    markers = {"v_pred": pair.role(role).schedule.prediction_type == "v_prediction", "ztsnr": has_zero_snr(pair, role)}
    tensors |= {name: torch.zeros(0) for name, holds in markers.items() if holds}
    rows = pair.encoder.tokenizers[0].vocab_size
    for name, value in tensors.items():
        if name.endswith("token_embedding.weight") and len(value) != rows:
            raise ConfigError("A one-file checkpoint cannot hold a new token.", "Use --format pipeline.")
    write_checkpoint(path, tensors, model_metadata(lora_metadata))


def _restore_wrapper(file: Path) -> None:
    """Rename a text encoder's tensors for all releases of transformers; 5.6 and later drop a prefix."""
    state = load_file(file)
    if not any(name.startswith("text_model.") for name in state):
        save_file({f"text_model.{name}": value for name, value in state.items()}, file, {"format": "pt"})


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
