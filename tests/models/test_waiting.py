"""Weights that wait in the machine's memory: nothing changes but where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.models.joined import fold_factors, share_inputs
from echodistill_cli.models.vision import ImageBackbone, load_image_backbone
from echodistill_cli.models.waiting import present

NAMES = ["dino", "dinov2", "clip"]


def load(folder: Path) -> ImageBackbone:
    encoder = load_image_backbone(str(folder), ModelConfig(offline=True), torch.device("cpu"), torch.float32)
    fold_factors(encoder)
    share_inputs(encoder)
    return encoder


def results(encoder: ImageBackbone) -> list[Tensor]:
    """Features and their gradient."""
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (features,) = encoder.features(images)
    return [features.detach(), *torch.autograd.grad(features.square().sum(), images)]


def held(encoder: ImageBackbone) -> int:
    """Bytes of memory that the weights, the buffers and the joined weights hold."""
    shared: list[Any] = [module.shared for module in encoder.modules() if hasattr(module, "shared")]
    tensors = [*encoder.parameters(), *encoder.buffers(), *(each.weight for each in shared)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_wait_hold_no_memory_and_come_back_to_the_bit(name: str, small_backbones: dict[str, Path]) -> None:
    encoder = load(small_backbones[name])
    expected, before = results(encoder), held(encoder)
    objects = [id(parameter) for parameter in encoder.parameters()]
    encoder.let_wait()
    assert held(encoder) == 0
    for _ in range(2):
        with present(encoder):
            assert before <= held(encoder) <= 1.5 * before + 10**5  # tensors are aligned
            assert all(map(torch.equal, results(encoder), expected))
        assert held(encoder) == 0
    assert [id(parameter) for parameter in encoder.parameters()] == objects


def test_weights_that_are_missing_come_by_themselves(small_backbones: dict[str, Path]) -> None:
    encoder = load(small_backbones["clip"])
    expected = results(encoder)
    for _ in range(2):  # once is enough
        encoder.let_wait()
    assert held(encoder) == 0
    assert all(map(torch.equal, results(encoder), expected))
    assert held(encoder) > 0


def test_a_module_that_never_waits_stays_where_it_is(small_backbones: dict[str, Path]) -> None:
    encoder = load(small_backbones["dino"])
    before = held(encoder)
    with present(encoder):
        assert held(encoder) == before
    assert held(encoder) == before
