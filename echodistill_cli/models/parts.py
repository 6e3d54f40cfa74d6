"""Load one part of a model: weights, tokenizer or noise schedule. Runs no code of its folder.

The log lines and progress bars of diffusers and transformers are hidden here, for the command line and the Python API
alike: what a person should know about a model is said in one line of our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from echodistill_cli.config.families import check_regular_files, read_json, read_model_config, reading
from echodistill_cli.diffusion.schedule import NoiseSchedule, PredictionType
from echodistill_cli.errors import ModelError
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.sources import WEIGHT_NAMES, is_variant, weight_variant


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context or decorator: diffusers and transformers log errors only and show no progress bars."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [
        (library, library.get_verbosity(), library.is_progress_bar_enabled())
        for library in (of_diffusers, of_transformers)
    ]
    try:
        for library, _, _ in before:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, is_shown in before:
            library.set_verbosity(verbosity)
            if is_shown:
                library.enable_progress_bar()


def check_weights(folder: Path, variant: str | None) -> None:
    """Check that the weight files of a part are complete safetensors files.

    Args:
        folder: of the part.
        variant: as `weight_variant` returns it.

    Raises:
        ModelError: a file is empty, truncated, damaged or not a safetensors file.
    """
    for file in sorted(folder.glob("*.safetensors")):
        plain = file.name.count(".") == 1
        if file.name.startswith(WEIGHT_NAMES) and (is_variant(file.name, variant) if variant else plain):
            read_header(file)


def load_schedule(folder: Path, prediction: str = "auto", *, zero_snr: bool = False) -> NoiseSchedule:
    """Load the noise schedule from a scheduler's folder, whichever scheduler with betas it names.

    Args:
        folder: with scheduler_config.json.
        prediction: what the model predicts; "auto" to read it from the folder.
        zero_snr: rescale the betas to zero terminal SNR, even if the folder does not say so.

    Raises:
        ModelError: the file is damaged, or the schedule has no betas.
        ModelError: the prediction type is neither ε, v nor z, or it is ε at zero terminal SNR.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    file = folder / "scheduler_config.json"
    settings, remedy = read_json(file), "Use a model with the noise schedule of Stable Diffusion."
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    present = {key: settings[key] for key in keys if settings.get(key) is not None}
    kind = str(settings.get("_class_name", "its class"))
    has_betas = "trained_betas" in present or {"beta_start", "beta_end", "beta_schedule"} <= present.keys()
    if not has_betas or kind.startswith(("EDM", "FlowMatch")) or settings.get("use_flow_sigmas"):
        raise ModelError(f"{file}: a noise schedule without betas ({kind}) is not supported.", remedy)
    prediction_type = str(settings.get("prediction_type", "epsilon") if prediction == "auto" else prediction)
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"{folder.parent.name}: models that predict {prediction_type!r} are not supported.", remedy)
    with reading(file):
        scheduler = DDPMScheduler(**present | {"rescale_betas_zero_snr": zero_snr or settings.get(keys[-1], False)})
        alphas = scheduler.alphas_cumprod.float()
        falls = len(alphas) > 1 and bool((alphas.diff() <= 0).all()) and float(alphas[-1]) < float(alphas[0])
        if not falls or not bool(((scheduler.betas >= 0) & (scheduler.betas <= 1)).all()):
            raise ModelError(f"{file}: the betas are not those of a noise schedule.", remedy)
    if prediction_type == "epsilon" and float(alphas[-1]) == 0:
        raise ModelError(
            f"{file}: a model cannot predict noise (epsilon) from pure noise, at zero terminal SNR.",
            "If it predicts v: --set model.student_prediction=v_prediction, or model.teacher_prediction.",
        )
    return NoiseSchedule(alphas, cast(PredictionType, prediction_type))


def load_module(kind: Any, folder: Path, dtype: torch.dtype, variant: str | None = None, **extra: Any) -> Any:
    """Load the safetensors weights of one part of a model, all of them.

    Args:
        kind: the part's class in diffusers or transformers.
        folder: with config.json and the weights.
        dtype: of the loaded weights.
        variant: preferred file variant.
        **extra: for the constructor.

    Raises:
        ModelError: a file is damaged, or weights are missing, which transformers would fill at random.
    """
    read_model_config(folder)
    variant = weight_variant(folder, variant)
    check_weights(folder, variant)
    if kind.__module__.startswith("transformers"):
        # A configuration may name code on the hub instead. Gemma 2 has no fast attention.
        extra["attn_implementation"] = "sdpa" if kind._supports_sdpa else "eager"
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    with reading(folder):
        module, report = kind.from_pretrained(folder, output_loading_info=True, **options, **extra)
    missing = sorted(str(name) for name in report["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of its weights, such as {missing[0]}.", "Download the model again."
        )
    return module


def load_tokenizer(folder: Path) -> Any:
    """Load a CLIP tokenizer; runs no code of the folder.

    Raises:
        ModelError: a file is damaged.
    """
    from transformers import CLIPTokenizer

    check_regular_files(folder)
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    with reading(folder):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer("a photo").input_ids
        if tokenizer.model_max_length < 3:
            raise ModelError(
                f"{folder}: model_max_length is {tokenizer.model_max_length}.", "Download the model again."
            )
        if len(ids) < 3 or tokenizer.eos_token_id is None:
            raise ModelError(f"{folder}: the tokenizer has no vocabulary of CLIP.", "Download the model again.")
    return tokenizer
