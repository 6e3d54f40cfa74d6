"""Gradients: clipped, scaled, absent where they should be, and skipped when they are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.errors import EchoDistillError
from echodistill_cli.training.batches import student_pass
from echodistill_cli.training.critics import features_of
from echodistill_cli.training.optimizers import FP16_LOSS_SCALE
from echodistill_cli.training.state import MAX_BAD_STEPS, TrainingState
from echodistill_cli.training.steps import discriminator_step, student_step, teacher_step
from tests.helpers.runs import NewState, checkpoint_of, gradients, moved, take_steps, trained


@pytest.mark.parametrize("step", ["teacher", "student", "discriminators"])
def test_a_step_leaves_no_gradient_in_other_parts(new_state: NewState, step: str) -> None:
    state = new_state()
    expected = {"teacher": {"teacher", "text"}}.get(step, {step})
    if step == "teacher":
        teacher_step(state)
    elif step == "student":
        student_step(state)
    else:
        discriminator_step(state, student_pass(state))
    assert {part for part in state.optimizers if gradients(state, part)} == expected


def test_after_the_students_step_the_heads_can_be_trained_again(new_state: NewState) -> None:
    state = new_state()
    student_step(state)
    assert all(p.requires_grad and p.grad is None for critic in state.critics for p in critic.heads.parameters())


def gradient_norm(state: TrainingState, part: str) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients(state, part)]).norm())


def test_every_parts_gradients_are_clipped_after_backward(new_state: NewState) -> None:
    state = new_state(train__max_grad_norm=1e-3)
    metrics, norms = state.settle(teacher_step(state)), dict[str, float]()
    norms |= {part: gradient_norm(state, part) for part in ("teacher", "text")}
    generated, found = student_step(state)
    metrics |= state.settle(found | discriminator_step(state, generated))
    norms |= {part: gradient_norm(state, part) for part in ("student", "discriminators")}
    assert set(norms) == set(state.optimizers)
    for part, norm in norms.items():
        assert metrics[f"grad_norm_{part}"] > 2e-3  # before clipping
        assert norm == pytest.approx(1e-3, rel=1e-2)


def test_no_gradient_of_an_update_lies_beside_the_next_graph(new_state: NewState) -> None:
    state = new_state(train__target_steps=2, train__replays=1)
    seen: list[set[str]] = []

    def note(*_: Any) -> None:
        seen.append({part for part in state.optimizers if gradients(state, part)})

    for unet in (state.pair.student.unet, state.pair.teacher.unet):
        unet.register_forward_hook(note)
    take_steps(state, 2)
    assert len(seen) > 4
    assert not any(seen)


def test_without_a_norm_nothing_is_clipped(new_state: NewState) -> None:
    state = new_state(train__max_grad_norm=0.0)
    metrics = take_steps(state, 1)[0]
    assert gradient_norm(state, "discriminators") == pytest.approx(metrics["grad_norm_discriminators"], rel=1e-5)


def test_a_half_precision_loss_is_scaled_for_backward_only(new_state: NewState) -> None:
    plain, scaled = new_state(), new_state()
    assert plain.optimizers.loss_scale == 1
    scaled.optimizers.loss_scale = FP16_LOSS_SCALE  # the weights stay in single precision for comparison
    metrics = [state.settle(teacher_step(state)) for state in (plain, scaled)]
    assert metrics[0].keys() == metrics[1].keys()
    assert list(metrics[0].values()) == pytest.approx(list(metrics[1].values()), rel=1e-4)
    for first, second in zip(gradients(plain, "teacher"), gradients(scaled, "teacher"), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-7)


def test_gradient_checkpointing_changes_nothing_but_memory(new_state: NewState) -> None:
    plain, checkpointed = new_state(), new_state(train__gradient_checkpointing=True)
    metrics = [take_steps(state, 3)[-1] for state in (plain, checkpointed)]
    assert metrics[0].keys() == metrics[1].keys()
    assert list(metrics[0].values()) == pytest.approx(list(metrics[1].values()), rel=1e-3, abs=1e-5)


def test_the_students_conditioning_and_target_carry_no_gradient(new_state: NewState) -> None:
    state = new_state()
    generated = student_pass(state)
    assert state.identity_encoder is not None
    assert generated.images.latents.requires_grad
    assert not generated.images.conditioning.hidden.requires_grad
    assert not generated.target.latents.requires_grad
    assert not generated.target.image.requires_grad
    assert features_of(generated.images, state.identity_encoder)[0].requires_grad
    assert not features_of(generated.target, state.identity_encoder)[0].requires_grad


def test_the_null_prompt_is_encoded_with_the_current_text_encoder(
    new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    nulls: list[Tensor] = []
    encode_with_null = PromptEncoder.encode_with_null

    def recorded(encoder: PromptEncoder, prompts: list[str]) -> Any:
        both = encode_with_null(encoder, prompts)
        nulls.append(both[1].hidden)
        return both

    monkeypatch.setattr(PromptEncoder, "encode_with_null", recorded)
    state = new_state()
    take_steps(state, 2)
    assert len(nulls) == 2
    assert not torch.equal(nulls[0], nulls[1])


def test_a_step_that_is_not_finite_moves_nothing_is_counted_and_ends_the_run(new_state: NewState) -> None:
    state = new_state()
    take_steps(state, 1)
    with torch.no_grad():
        state.photos.latents.fill_(math.nan)  # the teacher's loss
    # Every decoded image, without a weight that is to blame.
    state.pair.codec.decoder.decoder.conv_out.register_forward_hook(lambda _layer, _input, output: output * math.nan)
    before, moments = trained(state), checkpoint_of(state)["optimizers"]
    for bad in range(1, MAX_BAD_STEPS):
        metrics = take_steps(state, 1)[0]
        skipped = {name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_")}
        assert skipped == {"teacher", "text", "student", "discriminators"}
        assert (state.bad_steps, state.bad_steps_in_a_row) == (bad, bad)
    with pytest.raises(EchoDistillError, match=r"was not finite in the last 5 steps.*--lr.*--resume"):
        take_steps(state, 1)
    assert moved(before, state) == set()
    assert state.bad_steps_in_a_row == MAX_BAD_STEPS
    for part in moments:
        for key, values in checkpoint_of(state)["optimizers"][part]["state"].items():
            assert all(torch.equal(value, moments[part]["state"][key][name]) for name, value in values.items())


def test_only_the_part_that_is_not_finite_is_skipped(new_state: NewState) -> None:
    state = new_state()
    state.photos.latents.fill_(math.nan)
    before = trained(state)
    metrics = take_steps(state, 1)[0]
    assert {name for name in metrics if name.startswith("skipped_")} == {"skipped_teacher", "skipped_text"}
    assert moved(before, state) == {"student", "discriminators"}


def test_a_finite_loss_with_a_gradient_that_is_not_moves_nothing(new_state: NewState) -> None:
    state = new_state()
    weight = next(p for p in state.pair.teacher.unet.parameters() if p.requires_grad)
    before = trained(state)
    loss = (weight * 0).sum().sqrt()  # 0, with an infinite slope times 0
    assert float(loss.detach()) == 0
    metrics = state.optimizers.fetch(state.optimizers.step(loss, ["teacher", "text"]))
    assert metrics == {"skipped_teacher": 1.0, "skipped_text": 1.0}
    assert moved(before, state) == set()


def test_a_good_step_resets_the_count_of_bad_steps_in_a_row(new_state: NewState) -> None:
    state = new_state()
    for metrics in ({"skipped_teacher": 1.0}, {}, {"skipped_student": 1.0}, {}) * MAX_BAD_STEPS:
        assert state.settle(dict(metrics)) == metrics
    assert (state.bad_steps, state.bad_steps_in_a_row) == (2 * MAX_BAD_STEPS, 0)
