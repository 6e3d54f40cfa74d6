"""Learning rates, and averages of weights: by hand, through a checkpoint, and in half precision."""

from __future__ import annotations

import math

import pytest
import torch

from echodistill_cli.training.optimizers import Optimizers, WeightMean

CPU = torch.device("cpu")


def small_optimizers(schedule: str) -> Optimizers:
    parts = {name: [torch.nn.Parameter(torch.ones(2))] for name in ("student", "teacher")}
    rates = {"student": 2e-3, "teacher": 1e-3}
    return Optimizers(parts | {"text": []}, rates, schedule=schedule, weight_decay=0.0, max_grad_norm=0.0)


def test_learning_rates_are_constant_or_fall_to_0() -> None:
    def rates(schedule: str) -> list[float]:
        optimizers, values = small_optimizers(schedule), []
        for step in range(5):
            optimizers.set_rates(step / 4)
            values.append(optimizers.rate("student"))
            assert optimizers.rate("teacher") == pytest.approx(values[-1] / 2)
        return values

    assert rates("constant") == [2e-3] * 5
    half = math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([2e-3, 1e-3 * (1 + half), 1e-3, 1e-3 * (1 - half), 0.0])


def test_one_parts_rate_can_be_scaled_and_a_part_that_does_not_exist_is_ignored() -> None:
    optimizers = small_optimizers("constant")
    optimizers.scale_rate("teacher", 0.25)
    optimizers.scale_rate("text", 0.25)
    assert {name: optimizers.rate(name) for name in optimizers} == {"student": 2e-3, "teacher": 0.25e-3}


def test_the_mean_is_that_of_all_moments_and_is_forgotten_once_used() -> None:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    mean = WeightMean()
    mean.add(weights)
    weights[0].add_(3)
    mean.add(weights)
    weights[0].add_(3)
    weights[1].mul_(4)
    mean.add(weights)
    mean.move_into(weights)
    torch.testing.assert_close(weights, [torch.tensor([4.0, 5.0]), torch.tensor([[8.0]])])
    assert (mean.count, mean.means) == (0, [])


def test_without_a_moment_weights_stay() -> None:
    weight = torch.ones(2)
    WeightMean().move_into([weight])
    assert torch.equal(weight, torch.ones(2))


def test_a_checkpoint_in_the_middle_changes_nothing() -> None:
    first, second = torch.randn(3, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    whole, resumed = WeightMean(), WeightMean()
    for weight in (first, second):
        whole.add([weight])
    before = WeightMean()
    before.add([first])
    resumed.load_state_dict(before.state_dict(), CPU)
    resumed.add([second])
    assert torch.equal(whole.means[0], resumed.means[0])


def test_half_precision_weights_are_averaged_in_single() -> None:
    weight = torch.tensor([1.0], dtype=torch.float16)
    mean = WeightMean()
    for step in range(1000):
        weight.fill_(1 + (step % 2) * 2**-10)
        mean.add([weight])
    assert mean.means[0].dtype is torch.float32
    torch.testing.assert_close(mean.means[0], torch.tensor([1 + 2**-11]), rtol=0, atol=1e-6)


def trained_weight(steps: int) -> tuple[torch.nn.Parameter, Optimizers]:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizers = Optimizers({"student": [weight]}, {"student": 0.1}, weight_decay=0.0, max_grad_norm=1.0)
    for _ in range(steps):
        optimizers.step((weight * torch.tensor([3.0, 4.0])).sum(), ["student"])
    return weight, optimizers


def test_metrics_stay_on_the_device_until_they_are_fetched_in_one_transfer() -> None:
    weight, optimizers = trained_weight(0)
    metrics = optimizers.step((weight * torch.tensor([3.0, 4.0])).sum(), ["student"])
    assert isinstance(metrics["grad_norm_student"], torch.Tensor)
    assert optimizers.fetch(metrics | {"step": 3.0}) == {"grad_norm_student": 5.0, "step": 3.0}


def test_a_skipped_update_of_several_is_reported_once_and_the_next_step_is_not_skipped() -> None:
    weight, optimizers = trained_weight(1)
    before, count = weight.detach().clone(), float(optimizers["student"].state[weight]["step"])
    metrics = optimizers.step(weight.sum() * math.inf, ["student"])
    optimizers.step((weight * 0).sum(), ["student"])
    assert optimizers.fetch({"loss": 1.0, **metrics}) == {"loss": 1.0, "skipped_student": 1.0}
    assert float(optimizers["student"].state[weight]["step"]) == count + 1  # the skipped one is not counted
    assert not torch.equal(before, weight)  # by the second update, from its momentum
    assert optimizers.fetch({"loss": 1.0}) == {"loss": 1.0}


def test_a_checkpoint_of_a_version_that_did_not_fuse_continues() -> None:
    weight, optimizers = trained_weight(2)
    state = optimizers.state_dict()
    for group in state["student"]["param_groups"]:
        group |= {"fused": None, "foreach": None}
    other, resumed = trained_weight(2)
    resumed.load_state_dict(state)
    for each, target in ((optimizers, weight), (resumed, other)):
        each.step((target * torch.tensor([3.0, 4.0])).sum(), ["student"])
    assert torch.equal(weight, other)
