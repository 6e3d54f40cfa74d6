"""Two roles in the memory of one: a twin over the same weights, and turns on the device.

Where a student is a base model with a distillation LoRA, that base model is its own best teacher.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from echodistill_cli.diffusion.pair import Denoiser, Family, ModelPair
from echodistill_cli.errors import ModelError
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.adapters import DISTILLED, lora_layers


def twin(denoiser: Denoiser, sizes: tuple[int, int]) -> Denoiser:
    """A second UNet over the very same frozen weights, to carry adapters of its own; it takes no memory to speak of.

    Switching adapters on one module would do as well, but a forward pass under one adapter whose backward pass comes
    under another has wrong gradients, silently. Two module trees over one set of weights cannot be mixed up.
    """
    tensors = (*denoiser.unet.parameters(), *denoiser.unet.buffers())
    unet = copy.deepcopy(denoiser.unet, {id(tensor): tensor for tensor in tensors})
    original, target = sizes
    time_ids = None if denoiser.time_ids is None else (original, original, 0, 0, target, target)
    return Denoiser(unet, denoiser.schedule, time_ids)


def distil(student: Denoiser, family: Family, file: Path, *, fold: bool) -> None:
    """Put a LoRA such as Hyper-SD's, DMD2's or LCM's on the student, frozen: from now on it is a one-step model.

    Args:
        fold: add it to the weights, which then are not the base's any more; else it stays beside them.

    Raises:
        ModelError: the file is missing, damaged, or made for other models.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    read_header(file)
    try:
        extra = {"unet_config": student.unet.config} if family == "sdxl" else {}
        state, alphas, metadata = kind.lora_state_dict(str(file), return_lora_metadata=True, **extra)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what does not fit is counted below
            kind.load_lora_into_unet(state, alphas, student.unet, adapter_name=DISTILLED, metadata=metadata)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{file} does not fit this model ({first_line}).", "Name the base it was made for.") from error
    held = {re.sub(r"\.lora.*", "", name) for name in state if name.startswith("unet.") and ".lora" in name}
    placed = len(lora_layers(student.unet, DISTILLED))
    if not held or placed != len(held):
        raise ModelError(
            f"{file} does not fit this model: {placed} of its {len(held)} UNet modules match.",
            "Name the base it was made for.",
        )
    if fold:
        student.unet.fuse_lora(adapter_names=[DISTILLED])
        student.unet.unload_lora()
    student.unet.requires_grad_(False)


def take_turns(pair: ModelPair) -> None:
    """From now on only the UNet that is at work has its frozen weights on the device; the other's wait on the CPU."""
    assert pair.teacher is not None
    pair.alternating = True
    roles = (pair.student, pair.teacher)
    for role, other in (roles, roles[::-1]):
        role.prepare = functools.partial(_swap, role.unet, other.unet, pair.device)
    _swap(pair.student.unet, pair.teacher.unet, pair.device)


def _swap(wanted: Any, other: Any, device: torch.device) -> None:
    """Adapters stay on the device, where the optimizer has them."""
    for unet, place in ((other, torch.device("cpu")), (wanted, device)):
        for tensor in (*unet.parameters(), *unet.buffers()):
            if not tensor.requires_grad and tensor.device.type != place.type:
                tensor.data = tensor.data.to(place)
