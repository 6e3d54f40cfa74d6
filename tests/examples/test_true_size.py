"""The true-size benchmark's parts, on small models: that both designs are real steps, and that its configurations hold.

The true sizes themselves are run by `python -m examples.benchmark.true_size`; here they are too large.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echodistill_cli.models.adapters import trainable_parameters
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training.state import build_state
from echodistill_cli.training.steps import training_step
from examples.benchmark.reference_design import reference_step
from examples.benchmark.true_size import configuration, matmul_rate, measure
from tests.helpers.runs import small_config, small_photos

CPU = torch.device("cpu")


@pytest.mark.parametrize("design", ["lean", "reference"])
def test_both_designs_train_every_part_and_are_measured(
    small_pair: tuple[Path, Path], small_backbones: dict[str, Path], design: str
) -> None:
    discriminators = tuple(str(small_backbones[name]) for name in ("dino", "dinov2"))
    config = small_config(small_pair, small_backbones, critic__discriminators=discriminators)
    state = build_state(config, small_photos())
    modules = list(state.trained_modules().values())
    before = [[p.detach().clone() for p in trainable_parameters(module)] for module in modules]
    heads = [p.detach().clone() for critic in state.critics for p in critic.heads.parameters()]
    photos = torch.rand(2, 3, 64, 64)

    def step() -> None:
        if design == "reference":
            reference_step(state, photos)
        else:
            state.settle(training_step(state))

    found = measure(state, step, steps=2, warmup=1, count_flops=True)
    assert found.seconds > 0
    assert found.images > 0
    assert found.peak > 0.1
    assert found.flops is not None
    assert found.flops > 1e6
    assert state.step == 4
    for module, saved in zip(modules, before, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(saved, trainable_parameters(module), strict=True))
    after = [p for critic in state.critics for p in critic.heads.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(heads, after, strict=True) if a.dim() > 1)


def test_the_reference_design_looks_anew_for_every_loss(
    small_pair: tuple[Path, Path], small_backbones: dict[str, Path]
) -> None:
    clip = str(small_backbones["clip"])
    state = build_state(small_config(small_pair, small_backbones, critic__discriminators=(clip,)), small_photos())
    backbone = state.critics[0].backbone
    assert backbone is state.identity_encoder
    assert isinstance(backbone, ImageBackbone)
    looks = []
    backbone.model.register_forward_hook(lambda *_: looks.append(1))
    photos = torch.rand(2, 3, 64, 64)
    reference_step(state, photos)
    reference = len(looks)
    training_step(state)
    # Anew: as judge on both pictures at once, as critic on the student's, then on photos and pictures once more.
    assert (reference, len(looks) - reference) == (4, 1)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_designs_differ_as_they_are_said_to(family: str, device: str) -> None:
    lean = configuration(family, "lean", 512, 1, device)  # type: ignore[arg-type]
    assert (lean.model.precision, lean.model.decoder) == ("bf16", "tiny")
    reference = configuration(family, "reference", 512, 2, device)  # type: ignore[arg-type]
    assert (reference.model.precision, reference.model.decoder, reference.train.batch_size) == ("fp32", "full", 2)
    if device == "cuda":
        assert lean.critic.discriminators == ("dino", "dinov2", "clip")
        assert reference.critic.identity == "clip-h"


def test_the_matmul_rate_is_a_rate() -> None:
    assert matmul_rate(CPU, torch.float32, size=256) > 1e8
