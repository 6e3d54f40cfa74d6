"""Load the parts of flow-matching transformers: schedules, denoisers, language models, VAEs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from echodistill_cli.config.families import check_regular_files, read_json, reading
from echodistill_cli.config.family import Family
from echodistill_cli.diffusion.flux2 import Flux2Codec, Flux2Denoiser, Flux2Prompts
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec
from echodistill_cli.diffusion.sana import SPRINT_GUIDANCE, SanaDenoiser, SanaPrompts
from echodistill_cli.diffusion.schedule import NoiseSchedule, flow_schedule
from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.errors import ModelError

# Loads a part of a model: its class and its subfolder.
Load = Callable[[Any, str], Any]
# SANA-Sprint's scheduler; its transformer is told times up to 1.
_SPRINT = "SCMScheduler"
# The steps whose shift a teacher is trained and sampled with; `sample` takes as many.
TEACHER_STEPS = 25


def load_flow_schedule(folder: Path, tokens: int, steps: int) -> NoiseSchedule:
    """Load the schedule of a rectified flow from a scheduler's folder, whichever of diffusers' it names.

    Args:
        folder: with scheduler_config.json.
        tokens: of an image, for a shift that depends on them.
        steps: of the sampler, for such a shift.

    Raises:
        ModelError: the file is damaged, or it is not of a rectified flow.
    """
    file = folder / "scheduler_config.json"
    settings = read_json(file)
    kind = str(settings.get("_class_name", "its class"))
    is_flow = kind.startswith("FlowMatch") or kind == _SPRINT or bool(settings.get("use_flow_sigmas"))
    with reading(file):
        shift = float(settings.get("shift") or settings.get("flow_shift") or 1.0)
        if not is_flow or shift <= 0 or not math.isfinite(shift):
            raise ModelError(f"{file}: {kind} is not the schedule of a rectified flow.", "Download the model again.")
    if settings.get("use_dynamic_shifting"):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        shift = math.exp(compute_empirical_mu(tokens, steps))
    return flow_schedule(1.0 if kind == _SPRINT else shift)


def is_sprint(folder: Path) -> bool:
    """Return whether the scheduler in a folder is SANA-Sprint's."""
    return read_json(folder / "scheduler_config.json").get("_class_name") == _SPRINT


def load_denoiser(family: Family, load: Load, scheduler: Path, tokens: int, steps: int) -> Denoiser:
    """Load a transformer of a family.

    Args:
        family: of the model.
        load: loads a part of it.
        scheduler: folder of its scheduler.
        tokens: as in `load_flow_schedule`.
        steps: as in `load_flow_schedule`.

    Raises:
        ModelError: a file is damaged, or the model has inputs that are not known here.
    """
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    schedule = load_flow_schedule(scheduler, tokens, steps)
    if family.name == "flux2":
        flux = load(Flux2Transformer2DModel, family.denoiser)
        if flux.config.guidance_embeds:
            raise ModelError("This FLUX.2 model has a guidance embedding, which is not supported.", "Use FLUX.2 klein.")
        return Flux2Denoiser(flux, schedule, schedule_of=partial(load_flow_schedule, scheduler, steps=steps))
    sana = load(SanaTransformer2DModel, family.denoiser)
    scale = 1.0 if is_sprint(scheduler) else 1000.0 * float(sana.config.timestep_scale)
    guidance = SPRINT_GUIDANCE if sana.config.guidance_embeds else None
    return SanaDenoiser(sana, schedule, time_scale=scale, guidance=guidance)


def load_prompts(family: Family, load: Load, tokenizer: Path) -> PromptEncoder:
    """Load the language model of a family with its tokenizer; runs no code of the folder.

    Args:
        family: of the model.
        load: loads a part of it.
        tokenizer: folder of the tokenizer.

    Raises:
        ModelError: a file is damaged.
    """
    from transformers import Gemma2Model, Qwen3ForCausalLM

    if family.name == "flux2":
        return Flux2Prompts(load_words(family, tokenizer), load(Qwen3ForCausalLM, "text_encoder"))
    return SanaPrompts(load_words(family, tokenizer), load(Gemma2Model, "text_encoder"), _instruction())


def load_words(family: Family, folder: Path) -> Any:
    """Load the tokenizer of a family's language model.

    Raises:
        ModelError: a file is damaged.
    """
    from transformers import GemmaTokenizer, Qwen2Tokenizer

    check_regular_files(folder)
    with reading(folder):
        kind = Qwen2Tokenizer if family.name == "flux2" else GemmaTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token_id is None or not tokenizer("a photo", add_special_tokens=False).input_ids:
            raise ModelError(f"{folder}: the tokenizer has no vocabulary.", "Download the model again.")
    return tokenizer


def _instruction() -> list[str]:
    """Return the instruction that SANA was trained with, which diffusers has as a default argument."""
    from diffusers.pipelines.sana.pipeline_sana_sprint import SanaSprintPipeline

    default = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    return list(default)


def load_codec(family: Family, load: Load) -> LatentCodec:
    """Load the VAE of a family.

    Raises:
        ModelError: a file is damaged.
    """
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    if family.name == "flux2":
        flux = load(AutoencoderKLFlux2, "vae")
        return Flux2Codec(flux, flux)
    sana = load(AutoencoderDC, "vae")
    return LatentCodec(sana, sana)
