"""A pair with a random LoRA, and what a pass through its student computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.models.adapters import UNET_LAYERS, add_lora, trainable_parameters
from echodistill_cli.models.load import load_pair
from tests.helpers.models import model_config


def with_random_lora(models: tuple[Path, Path], targets: str, **settings: Any) -> ModelPair:
    """Return a pair whose student has a LoRA of rank 2 and scale 2 with random weights."""
    pair = load_pair(model_config(*models, **settings))
    add_lora(pair.student.unet, UNET_LAYERS[targets], 2, 4, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(pair.student.unet):
        parameter.data.normal_(std=0.1, generator=generator)
    return pair


def passes(pair: ModelPair) -> list[Tensor]:
    """The student's output and the gradients of its LoRA."""
    generator = torch.Generator().manual_seed(2)
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([999, 10])
    with torch.no_grad():
        conditioning = pair.encoder.encode(["a dog", "a cat"])
    output = pair.student(noisy, timesteps, conditioning)
    return [output, *torch.autograd.grad(output.square().mean(), trainable_parameters(pair.student.unet))]
