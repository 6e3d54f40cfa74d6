"""The embedded pair as flows: the same networks in other coordinates, and a short run of the method on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from echodistill_cli.config.build import build_config
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.schedule import add_noise, predict_x0
from echodistill_cli.models.adapters import lora_tensors
from echodistill_cli.models.load import load_pair
from echodistill_cli.training.steps import training_step
from examples.benchmark.flow_pair import FlowDenoiser, as_flow
from examples.benchmark.measure import STUDENT, draw
from examples.benchmark.training import Run


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return load_pair(build_config("mini").model)


@pytest.mark.parametrize("timestep", [100, 500, 900])
def test_a_flow_finds_the_x0_of_the_same_noise(pair: ModelPair, timestep: int) -> None:
    flow = as_flow(pair).teacher
    assert isinstance(flow, FlowDenoiser)
    generator = torch.Generator().manual_seed(timestep)
    clean, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    prompts = pair.encoder.encode(["a photo of a dog", "a photo of a red frog in the snow"])
    at = torch.tensor([timestep] * 2)
    own = flow.own_timesteps[at]
    # The same ratio of signal to noise to within half a timestep of the UNet's own schedule.
    wanted, found = flow.schedule.alpha_bar(at), pair.teacher.schedule.alpha_bar(own)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0.02)
    noisy = add_noise(flow.schedule, clean, noise, at)
    with torch.no_grad():
        x0 = predict_x0(flow.schedule, flow(noisy, at, prompts), noisy, at)
        z_t = add_noise(pair.teacher.schedule, clean, noise, own)
        expected = predict_x0(pair.teacher.schedule, pair.teacher(z_t, own, prompts), z_t, own)
    assert float((x0 - expected).square().mean().sqrt()) < 0.02


def test_the_student_generates_the_same_images(pair: ModelPair) -> None:
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = pair.encoder.encode(["a photo of a dog", "a photo of a red frog in the snow"])
    with torch.no_grad():
        expected, found = (student_x0(one.student, noise, prompts) for one in (pair, as_flow(pair)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_method_runs_on_flows() -> None:
    short = (("train.steps", 1), ("train.head_start", 1), ("train.first_targets", 1), ("echo.start", None))
    run = Run("ours", "dev", "dog", 0, short, flow=True)
    state = run.build(None)
    assert {state.pair.role(role).schedule.prediction_type for role in ("student", "teacher")} == {"flow"}
    before = {name: tensor.clone() for name, tensor in lora_tensors(state.pair.student.unet).items()}
    state.settle(training_step(state))
    after = lora_tensors(state.pair.student.unet)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    images = draw(state.pair, "dog", STUDENT, with_token=True)
    assert images.shape == (64, 64, 64, 3)
    assert np.unique(images).size > 100
