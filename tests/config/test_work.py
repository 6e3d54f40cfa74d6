"""The work of a run by hand, in forward passes of a UNet over one sample."""

from __future__ import annotations

import dataclasses

import pytest

from echodistill_cli.config.build import build_config
from echodistill_cli.config.work import CARRY_BACK, HEAD_START, JOINT, PhaseCost, work_of


def test_the_phases_of_the_recipe_are_counted() -> None:
    head_start, joint, carry_back = work_of(build_config("sd-turbo", overrides={"concept.class_name": "dog"})).phases
    assert head_start == PhaseCost(HEAD_START, 300, 2 * 2)  # two samples, there and back
    # A target: four guided steps and an image of the class, for two samples; and the image that it starts from.
    assert (joint.name, joint.steps, joint.before) == (JOINT, 200, 20 * (2 * (4 * 2 + 1) + 2))
    echo = 4 * 32 * (1 + 2) / 200
    assert joint.each == pytest.approx(2 * 2 + 2 * 2 + 2 * (4 * 2 + 1) + 2 * 6 + 10 * 2 * 2 + echo)
    assert carry_back == PhaseCost(CARRY_BACK, 60, 2 * 2)


def test_the_papers_step_has_one_target_and_no_replays() -> None:
    off = {"train.target_steps": 1, "train.replays": 0, "echo.start": None, "model.decoder": "tiny"}
    _, joint, _ = work_of(build_config("sd-turbo", overrides={**off, "train.batch_size": 1})).phases
    assert (joint.each, joint.before) == (2 + 2 + 2 + 1, 0)


@pytest.mark.parametrize(("key", "value"), [("train.batch_size", 3), ("loss.prior", 1.0), ("train.replays", 11)])
def test_more_of_anything_is_more_work(key: str, value: float) -> None:
    less, more = (
        work_of(build_config("sd-turbo", overrides={"concept.class_name": "dog", **extra})).phases[1].each
        for extra in ({}, {key: value})
    )
    assert more > less


def test_what_is_left_shrinks_to_nothing() -> None:
    work = work_of(build_config("mini", overrides={"concept.class_name": "dog"}))
    starts = [work.seconds_left(phase.name, 0, phase.each) for phase in work.phases]
    ends = [work.seconds_left(phase.name, phase.steps, phase.each) for phase in work.phases]
    assert starts[1:] == pytest.approx([end - phase.before for end, phase in zip(ends, work.phases[1:], strict=False)])
    assert ends[-1] == 0
    assert all(dataclasses.astuple(phase)[2] > 0 for phase in work.phases)
