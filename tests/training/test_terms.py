"""The sum of the student's losses: the gradient of the plain sum, with one image encoder in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from echodistill_cli.models.memory import builds_graph_last
from echodistill_cli.models.waiting import Waiting
from echodistill_cli.training import dataset
from echodistill_cli.training.batches import student_pass
from echodistill_cli.training.critics import frozen
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import echo_step, student_step
from echodistill_cli.training.terms import active_losses, weighted_losses
from tests.helpers.runs import NewState, gradients, same, seeded, take_steps, trained


@pytest.fixture(scope="module")
def sparing(tmp_path_factory: pytest.TempPathFactory, small_backbones: dict[str, Path]) -> dict[str, Any]:
    """Settings with a tiny decoder, every image encoder and replays."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    shape: dict[str, Any] = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    shape |= {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**shape).save_pretrained(folder)
    encoders = tuple(str(small_backbones[name]) for name in ("dino", "dinov2", "clip"))
    recipe = {"train__target_steps": 2, "train__replays": 1, "train__scene_share": 0.5, "train__batch_size": 4}
    text = {"text__form": "token", "text__trained_by": "both"}
    decoder = {"model__decoder": "tiny", "model__tiny_decoder": str(folder)}
    return {**recipe, **text, **decoder, "critic__discriminators": encoders}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU count as a device with memory of its own."""
    monkeypatch.setattr(dataset, "has_own_memory", lambda _device: True)


def plainly(state: TrainingState) -> None:
    """The student's step with the whole graph at once, as `weighted_losses` must not differ from."""
    with frozen(state.critics):
        generated = student_pass(state)
        total = torch.zeros(())
        for term in active_losses(state, generated):
            total = total + getattr(state.config.loss, term.name) * term.function(state, generated).mean()
        state.optimizers.step(total, state.student_parts)


def student_gradients(state: TrainingState) -> list[Tensor]:
    return [gradient.clone() for part in state.student_parts for gradient in gradients(state, part)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss__prior": 1.0, "critic__identity_target": "photos"},
        {"loss__sliced_wasserstein": 0.0, "loss__identity": 0.0},
        {"train__scene_share": 0.0, "critic__discriminators": ("teacher",)},
        {"loss__adversarial": 0.0},
    ],
)
def test_the_gradient_is_that_of_the_plain_sum_to_the_bit(
    new_state: NewState, sparing: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sparing | {"train__replays": 0} | changes
    plain, step_by_step, last = (new_state(**settings) for _ in range(3))
    for state in (plain, step_by_step, last):
        state.generator = seeded(5)
    plainly(plain)
    student_step(step_by_step)
    monkeypatch.setattr("echodistill_cli.training.batches.builds_graph_last", lambda _config: True)
    _, metrics = student_step(last)
    expected = student_gradients(plain)
    assert len(expected) > 2
    for state in (step_by_step, last):
        assert all(map(torch.equal, student_gradients(state), expected))
        assert same(trained(state), trained(plain))
    assert {"latent", "grad_norm_student"} <= set(metrics)


def test_a_scaled_loss_has_the_same_gradient(new_state: NewState, sparing: dict[str, Any]) -> None:
    plain, scaled = new_state(**sparing), new_state(**sparing)
    scaled.optimizers.loss_scale = 1024.0
    for state in (plain, scaled):
        student_step(state)
    for one, other in zip(student_gradients(scaled), student_gradients(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_the_graph_of_an_encoder_is_gone_before_the_next_one_runs(new_state: NewState, sparing: dict[str, Any]) -> None:
    state = new_state(**sparing)
    assert builds_graph_last(state.config)
    with frozen(state.critics):
        generated = student_pass(state)
        assert generated.images.latents.is_leaf
        of_images, _, metrics = weighted_losses(state, generated)
    assert of_images.requires_grad
    kept = [*generated.images.features.values(), *generated.photo_images.features.values()]
    assert len(kept) == 3
    assert not any(tap.requires_grad for taps in kept for tap in taps)
    assert list(metrics) == [term.name for term in active_losses(state, generated)]


@pytest.mark.usefixtures("gpu")
def test_encoders_that_wait_change_nothing_and_are_here_one_at_a_time(
    new_state: NewState, sparing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = new_state(**sparing, echo__start=1)
    with monkeypatch.context() as patched:
        patched.setattr(dataset, "has_own_memory", lambda _device: False)
        always_here = new_state(**sparing, echo__start=1)
    encoders = {critic.backbone for critic in waiting.critics} | {waiting.identity_encoder}
    here = [encoder.waiting for encoder in encoders if encoder and isinstance(encoder.waiting, Waiting)]
    assert len(here) == 3
    most, come = 0, Waiting.come

    def counted(one: Waiting) -> None:
        nonlocal most
        come(one)
        most = max(most, sum(each.is_here for each in here))

    monkeypatch.setattr(Waiting, "come", counted)
    first, second = take_steps(waiting, 3), take_steps(always_here, 3)
    assert first == second
    echo_step(waiting)
    echo_step(always_here)
    assert same(trained(waiting), trained(always_here))
    assert (most, [each.is_here for each in here]) == (1, [False] * 3)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("changes", [{"model__decoder": "full"}, {"train__compile": "default"}])
def test_encoders_stay_where_memory_is_not_scarce_or_addresses_may_be_kept(
    new_state: NewState, sparing: dict[str, Any], changes: dict[str, Any]
) -> None:
    state = new_state(**sparing | changes)
    assert not any(getattr(critic.backbone, "waiting", None) for critic in state.critics)
