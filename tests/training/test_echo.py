"""The echo phase: when it happens, what it reports, and what its images are used for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from echodistill_cli.training.batches import real_batch, student_pass, teacher_batch
from echodistill_cli.training.steps import echo_step
from tests.helpers.runs import NewState, checkpoint_of, moved, take_steps, trained


def test_the_echo_begins_at_its_start_and_repeats(new_state: NewState) -> None:
    state = new_state(echo__start=2, echo__every=2)
    assert ["echo_made" in metrics for metrics in take_steps(state, 4)] == [False, True, False, True]
    state.config = replace(state.config, echo=replace(state.config.echo, start=4, every=3))
    assert [step for step in range(1, 12) if replace(state, step=step).echo_is_due] == [4, 7, 10]


@pytest.mark.parametrize(("carry_back", "expected"), [(0, [4, 7]), (1, [4, 7, 10])])
def test_images_that_no_step_would_use_are_not_generated(
    new_state: NewState, carry_back: int, expected: list[int]
) -> None:
    changes = {"train__steps": 10, "train__carry_over": True, "train__head_start": 1}
    state = new_state(echo__start=4, echo__every=3, echo__carry_back=carry_back, **changes)
    assert [step for step in range(1, 11) if replace(state, step=step).echo_is_due] == expected


def test_without_a_start_there_is_no_echo(new_state: NewState) -> None:
    state = new_state()
    assert not any("echo_made" in metrics for metrics in take_steps(state, 2))
    assert state.pool is None
    assert not any(replace(state, step=step).echo_is_due for step in range(12))


def test_an_echo_reports_a_verdict_on_every_image(new_state: NewState) -> None:
    state = new_state(echo__candidates=5, echo__pool_size=2, train__batch_size=2)
    metrics = echo_step(state)
    verdicts = ("kept", "identity", "photo_copy", "duplicate", "crowded")
    assert metrics["echo_made"] == sum(metrics[f"echo_{verdict}"] for verdict in verdicts) == 5
    assert state.pool is not None
    assert metrics["echo_pool"] == len(state.pool) <= 2
    assert all("sks dog" in prompt for prompt in state.pool.prompts)
    assert not state.pool.latents.requires_grad


def test_an_echo_moves_nothing(new_state: NewState) -> None:
    state = new_state()
    before = trained(state)
    echo_step(state)
    assert moved(before, state) == set()


def test_with_an_empty_pool_training_uses_the_photos_alone(new_state: NewState) -> None:
    state = new_state(echo__start=1, echo__every=1, echo__min_identity=50.0)
    metrics = take_steps(state, 3)
    assert [entry["echo_kept"] for entry in metrics] == [0.0] * 3
    assert state.pool is not None
    assert len(state.pool) == 0
    assert len(real_batch(state, student_pass(state).images).weights) == 2
    state.load_state_dict(checkpoint_of(state))
    take_steps(state, 1)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 8), (0.5, None)])
def test_the_teacher_draws_its_share_from_the_pool(new_state: NewState, share: float, expected: int | None) -> None:
    state = new_state(echo__teacher_share=share, train__batch_size=8)
    echo_step(state)
    assert state.pool is not None
    state.pool = replace(state.pool, prompts=["ECHO"] * len(state.pool))
    batch = teacher_batch(state)
    latents, masks, prompts = batch.latents, batch.masks, batch.prompts
    from_pool = [prompt == "ECHO" for prompt in prompts]
    assert sum(from_pool) == expected if expected is not None else 0 < sum(from_pool) < 8
    for row, is_echo in enumerate(from_pool):
        assert (latents[row] == state.pool.latents).flatten(1).all(dim=1).any() == is_echo
        assert not is_echo or masks[row].min() == 1
    assert "ECHO" not in teacher_batch(state, echo=False).prompts


def test_the_teacher_sees_echo_images_only_at_noisy_timesteps(new_state: NewState) -> None:
    state = new_state(echo__teacher_share=1.0, echo__teacher_noise=0.7, train__batch_size=64)
    assert int(teacher_batch(state).timesteps.min()) < 300  # photos at any
    echo_step(state)
    assert int(teacher_batch(state).timesteps.min()) >= 700


def test_a_real_weight_of_0_keeps_echo_images_from_the_discriminators(new_state: NewState) -> None:
    state = new_state(echo__real_weight=0.0)
    echo_step(state)
    assert len(real_batch(state, student_pass(state).images).images.latents) == 2
