"""The three phases of a run: head start, joint training, carry back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from echodistill_cli.models.adapters import load_lora_tensors, lora_tensors
from echodistill_cli.training.dataset import doubts
from echodistill_cli.training.optimizers import Metrics
from echodistill_cli.training.state import CARRY_BACK, HEAD_START, JOINT, TrainingState
from echodistill_cli.training.steps import (
    CARRY_BACK_RATE,
    PHASE_STEPS,
    begin,
    carry_back_step,
    head_start_step,
    teacher_step,
    training_step,
)
from tests.helpers.runs import NewState, same, take_steps, trained


def test_a_run_goes_through_its_phases_in_order_and_says_where_it_is(new_state: NewState) -> None:
    settings = {"train__head_start": 2, "train__carry_over": True, "train__steps": 1, "echo__start": 1}
    state = new_state(**settings, echo__carry_back=2)
    places = [state.place]
    phases = []
    while state.phase:
        phases.append(state.phase)
        PHASE_STEPS[state.phase](state)
        places.append(state.place)
    assert phases == [HEAD_START, HEAD_START, JOINT, CARRY_BACK, CARRY_BACK]
    start, back = ([f"step {number} of the {phase}" for number in (1, 2)] for phase in ("head start", "carry back"))
    assert places == ["step 0 of 1", *start, "step 1 of 1", *back]


def test_the_teachers_head_start_comes_before_the_first_joint_step_only(
    new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_state(train__head_start=3)
    steps: list[int] = []

    def counted(run: TrainingState) -> Metrics:
        steps.append(run.step)
        return teacher_step(run)

    monkeypatch.setattr("echodistill_cli.training.steps.teacher_step", counted)
    take_steps(state, 2)
    assert steps == [0, 0, 0, 0, 1]


def test_the_head_start_ends_at_the_mean_of_its_second_half(new_state: NewState) -> None:
    state = new_state(train__head_start=4)
    after: list[list[torch.Tensor]] = []
    for _ in range(4):
        head_start_step(state)
        after.append([weight.detach().clone() for weight in state.optimizers.weights(["teacher", "text"])])
    alone = new_state(train__head_start=5)  # its fourth step is not the last, so nothing is averaged
    for _ in range(4):
        head_start_step(alone)
    last = [weight.detach() for weight in alone.optimizers.weights(["teacher", "text"])]
    assert any(not torch.equal(mean, weight) for mean, weight in zip(after[3], last, strict=True))
    for mean, third, fourth in zip(after[3], after[2], last, strict=True):
        torch.testing.assert_close(mean, (third + fourth) / 2)
    assert state.optimizers.mean.count == 0


def test_with_carry_over_the_student_starts_from_the_teachers_lora(new_state: NewState) -> None:
    state = new_state(train__head_start=2, train__carry_over=True)
    begin(state)
    teacher, student = (lora_tensors(state.pair.role(role).unet) for role in ("teacher", "student"))
    assert all(torch.equal(teacher[name], value) for name, value in student.items())
    assert any(value.any() for name, value in student.items() if "lora_B" in name)
    fresh = new_state(train__head_start=2)
    begin(fresh)
    assert not any(v.any() for name, v in lora_tensors(fresh.pair.student.unet).items() if "lora_B" in name)


def test_the_carry_back_trains_the_students_lora_on_the_photos_and_averages_it(new_state: NewState) -> None:
    settings: dict[str, Any] = {"train__carry_over": True, "train__head_start": 1, "train__steps": 2}
    settings |= {"echo__start": 1, "echo__min_identity": 0.0, "echo__teacher_share": 1.0}
    state, other = new_state(**settings, echo__carry_back=4), new_state(**settings)
    for run in (state, other):
        training_step(run)
        assert run.phase is JOINT
        training_step(run)
    assert same(trained(state), trained(other))
    numbers, denoising = [], []
    while state.phase is CARRY_BACK:
        metrics = carry_back_step(state)
        denoising.append(float(metrics["denoising"]))
        numbers.append(metrics["carry_back_step"])
    assert (numbers, other.phase) == ([1, 2, 3, 4], None)
    assert max(denoising) > 0  # on so few latents, a small view may have no cell without canvas
    after, without = trained(state), trained(other)
    for part in ("student", "text", "discriminators"):  # the student is finished
        assert same({part: after[part]}, {part: without[part]})
    assert state.optimizers["teacher"].param_groups[0]["lr"] == CARRY_BACK_RATE * state.config.train.teacher_lr

    # The same by hand: the student's LoRA, four steps, the mean of the last two.
    load_lora_tensors(other.pair.teacher.unet, lora_tensors(other.pair.student.unet))
    for group in other.optimizers["teacher"].param_groups:
        group["lr"] = CARRY_BACK_RATE * other.config.train.teacher_lr
    values = []
    for _ in range(4):
        teacher_step(other, parts=["teacher"], echo=False)
        values.append(lora_tensors(other.pair.teacher.unet))
    assert state.optimizers.mean.count == 0
    for name, value in lora_tensors(state.pair.teacher.unet).items():
        torch.testing.assert_close(value, (values[2][name] + values[3][name]) / 2)
    assert any(not torch.equal(values[0][name], values[3][name]) for name in values[0])


def test_nothing_is_carried_back_without_echo_images_or_a_denoising_loss(new_state: NewState) -> None:
    state = new_state(train__carry_over=True, train__steps=1, echo__carry_back=2, echo__start=1)
    training_step(state)
    assert state.pool
    assert state.phase is CARRY_BACK
    for pool in (state.pool.take([]), None):
        assert dataclasses.replace(state, pool=pool).phase is None
    weights = dataclasses.replace(state.config.loss, denoising=0.0)
    assert dataclasses.replace(state, config=dataclasses.replace(state.config, loss=weights)).phase is None


def test_an_interrupted_carry_back_starts_over_after_more_joint_steps(new_state: NewState) -> None:
    settings = {"train__carry_over": True, "train__steps": 1, "echo__min_identity": 0.0, "echo__start": 1}
    state = new_state(**settings, echo__carry_back=4)
    training_step(state)
    for _ in range(3):
        carry_back_step(state)
    assert state.optimizers.mean.count == 1
    state.config = dataclasses.replace(state.config, train=dataclasses.replace(state.config.train, steps=2))
    assert state.phase is JOINT
    training_step(state)
    assert (state.phase, state.finished_in(CARRY_BACK)) == (CARRY_BACK, 0)
    carry_back_step(state)
    assert state.optimizers.mean.count == 0


def test_a_step_is_taken_at_the_rate_of_its_number(new_state: NewState) -> None:
    state = new_state(train__lr_schedule="cosine", train__steps=2)
    take_steps(state, 2)
    assert state.optimizers["student"].param_groups[0]["lr"] == pytest.approx(state.config.train.lr / 2)


@pytest.mark.parametrize(
    ("carry_over", "kind", "count"), [(True, "epsilon", 1), (True, "v_prediction", 0), (False, "epsilon", 0)]
)
def test_a_lora_carried_between_noise_and_velocity_is_doubted(
    new_state: NewState, carry_over: bool, kind: str, count: int
) -> None:
    state = new_state(train__carry_over=carry_over, train__head_start=1, model__student_prediction=kind)
    assert state.pair.teacher.schedule.prediction_type == "v_prediction"
    sentences = list(doubts(state.config, state.pair))
    assert len(sentences) == count
    assert all("predicts v_prediction to a student that predicts epsilon" in sentence for sentence in sentences)
