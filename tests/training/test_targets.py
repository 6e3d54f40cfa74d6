"""Extensions: targets of several teacher steps, and their replays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.models.adapters import lora_tensors
from echodistill_cli.training.batches import student_pass
from echodistill_cli.training.losses import latent_alignment, paired_adversarial
from echodistill_cli.training.steps import (
    INSTANCE_NOISE,
    begin,
    paired_critic_step,
    paired_pull,
    replay_step,
    training_step,
)
from echodistill_cli.training.targets import base_x0, replay_batch
from tests.helpers.runs import NewState, checkpoint_of, moved, seeded, student_pass_at, take_steps, trained

each_text_form = pytest.mark.parametrize("form", ["lora", "token", "frozen"])


def test_targets_of_several_steps_depend_on_the_seed_alone(new_state: NewState) -> None:
    state = new_state(train__target_steps=3)
    generated = student_pass(state)
    assert generated.alpha_bar.tolist() == [1.0] * len(generated.images.latents)
    several = student_pass_at(state, 7)
    assert torch.equal(several.target.latents, student_pass_at(new_state(train__target_steps=3), 7).target.latents)
    one = student_pass_at(new_state(train__target_steps=1), 7)
    assert torch.equal(one.images.latents, several.images.latents)
    assert not torch.equal(one.target.latents, several.target.latents)


def test_targets_from_the_students_image_stay_closer_to_it(new_state: NewState) -> None:
    passes = [
        student_pass_at(new_state(train__target_steps=4, train__target_strength=strength), 7)
        for strength in (1.0, 0.5, 0.0)
    ]
    assert all(torch.equal(one.images.latents, passes[0].images.latents) for one in passes)
    distances = [float((one.target.latents - one.images.latents.detach()).square().mean()) for one in passes]
    assert distances[0] > distances[1] > distances[2] > 0
    plain = student_pass_at(new_state(train__target_steps=4), 7)
    assert torch.equal(plain.target.latents, passes[0].target.latents)


def test_replays_mix_targets_with_images_of_the_class_by_the_base_student(new_state: NewState) -> None:
    colours = ("a red {} on the moon", "a blue {}")
    replays = {"train__target_steps": 2, "train__replays": 1, "train__batch_size": 4}
    whole = new_state(**replays, train__class_share=1.0, concept__class_prompts=colours)
    student_pass(whole)
    assert whole.prior is not None
    assert set(whole.prior.prompts) == {"a red dog on the moon", "a blue dog"}
    batch = replay_batch(whole)
    noise, target, prompts = batch.noise, batch.target, batch.prompts
    assert batch.subject_rows == []
    rows = [int((whole.prior.noise == one).flatten(1).all(dim=1).nonzero()) for one in noise]
    assert [whole.prior.prompts[row] for row in rows] == prompts
    assert torch.equal(whole.prior.latents[rows], target)

    some = new_state(**replays, train__class_share=0.25, concept__class_prompts=colours)
    student_pass(some)
    prompts = [prompt for _ in range(100) for prompt in replay_batch(some).prompts]
    assert 0.15 < sum("sks" not in prompt for prompt in prompts) / len(prompts) < 0.35
    assert all("sks" in prompt for prompt in some.replay_buffer.prompts)  # the buffer is not overwritten
    assert "teacher_prior" not in take_steps(some, 1)[0]  # the losses of the prior have their own weight


@each_text_form
def test_pairs_replay_the_base_students_image_of_the_class_from_the_same_noise(new_state: NewState, form: str) -> None:
    replays = {"train__target_steps": 2, "train__replays": 1, "train__batch_size": 4, "train__lr": 0.05}
    state = new_state(**replays, train__pair_share=1.0, text__form=form, text__trained_by="both", train__text_lr=0.05)
    noise = torch.randn(4, *state.photos.latents.shape[1:], generator=seeded(3))
    before = student_x0(state.pair.student, noise, state.pair.encoder.encode(["a dog"] * 4))
    take_steps(state, 3)
    now = student_x0(state.pair.student, noise, state.pair.encoder.encode(["a dog"] * 4))
    assert not torch.equal(now, before)
    assert torch.equal(base_x0(state, noise, ["a dog"] * 4), before)

    class_prompts = [prompt.replace("sks dog", "dog") for prompt in state.replay_buffer.prompts]
    batch = replay_batch(state)
    target, prompts = batch.target, batch.prompts
    assert set(prompts) <= set(class_prompts)
    assert not any("sks" in prompt for prompt in prompts)
    torch.testing.assert_close(target, base_x0(state, batch.noise, prompts))
    assert batch.subject_rows == []
    assert all("sks" in prompt for prompt in state.replay_buffer.prompts)  # the buffer is not overwritten

    some = new_state(**replays, train__pair_share=0.25)
    student_pass(some)
    prompts = [prompt for _ in range(100) for prompt in replay_batch(some).prompts]
    assert 0.15 < sum("sks" not in prompt for prompt in prompts) / len(prompts) < 0.35


def test_the_first_targets_are_stored_before_the_first_step_and_train_nothing(new_state: NewState) -> None:
    replays = {"train__target_steps": 2, "train__replays": 1, "train__first_targets": 3, "train__head_start": 1}
    state = new_state(**replays, train__carry_over=True)
    batch = state.config.train.batch_size
    begin(state)
    assert len(state.replay_buffer) == 3 * batch
    student, teacher = (lora_tensors(state.pair.role(role).unet) for role in ("student", "teacher"))
    assert all(torch.equal(student[name], teacher[name]) for name in teacher)  # copied, and not yet trained
    joint = new_state(**replays)
    take_steps(joint, 2)
    assert len(joint.replay_buffer) == (3 + 2) * batch


@pytest.mark.parametrize("without", [{"train__replays": 0}, {"train__target_steps": 1}, {"loss__latent": 0.0}])
def test_without_replays_there_are_no_first_targets(new_state: NewState, without: dict[str, Any]) -> None:
    state = new_state(**{"train__target_steps": 2, "train__replays": 1, "train__first_targets": 3} | without)
    begin(state)
    assert len(state.replay_buffer) == 0
    assert "replay" not in training_step(state)


PAIRED = {"train__target_steps": 2, "train__replays": 1, "train__first_targets": 1, "loss__paired": 0.5}


def test_the_paired_critic_learns_to_tell_targets_from_images_and_nothing_else_moves(new_state: NewState) -> None:
    state = new_state(**PAIRED)
    critic = state.paired_critic
    assert critic is not None
    noise = torch.randn(8, *state.photos.latents.shape[1:], generator=seeded(1))
    soft, sharp = 0.3 * noise, noise
    before = trained(state)
    steps = [float(paired_critic_step(state, critic, soft, sharp)["discriminator_paired"]) for _ in range(40)]
    assert steps[0] == pytest.approx(math.log(2), abs=0.1)  # it knows nothing yet
    assert steps[-1] < 0.1
    assert moved(before, state) == {"paired"}


def test_the_pull_of_the_paired_critic_is_that_of_the_latent_loss(new_state: NewState) -> None:
    state = new_state(**PAIRED, loss__latent=3.0)
    critic, shape = state.paired_critic, state.photos.latents.shape[1:]
    assert critic is not None
    x0 = torch.randn(4, *shape, generator=seeded(1)).requires_grad_()
    target = torch.randn(4, *shape, generator=seeded(2))
    rows = [0, 2]
    state.generator.manual_seed(3)
    pull = paired_pull(state, critic, x0, x0[rows], target[rows])
    (gradient,) = torch.autograd.grad(pull, x0)
    state.generator.manual_seed(3)
    noisy, compared = (latents + INSTANCE_NOISE * state.randn_like(latents) for latents in (x0[rows], target[rows]))
    plain = paired_adversarial(critic(noisy), critic(compared)).sum() / len(x0)
    (direction,) = torch.autograd.grad(plain, x0)
    torch.testing.assert_close(gradient / gradient.norm(), direction / direction.norm(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(pull / plain, gradient.norm() / direction.norm(), rtol=1e-4, atol=1e-6)
    latent = 3.0 * latent_alignment(x0[rows], target[rows]).sum() / len(x0)
    (expected,) = torch.autograd.grad(latent, x0)
    assert float(gradient.norm()) == pytest.approx(float(expected.norm()), rel=1e-4)
    assert not gradient[[1, 3]].any()  # of the class, which the critic does not judge
    assert all(parameter.grad is None and parameter.requires_grad for parameter in critic.parameters())


def test_replays_train_student_and_paired_critic_and_report_both(new_state: NewState) -> None:
    state = new_state(**PAIRED)
    begin(state)
    before = trained(state)
    metrics = replay_step(state)
    assert moved(before, state) == {"student", "paired"}
    assert {"replay", "paired", "discriminator_paired"} <= set(metrics)


@pytest.mark.parametrize("without", [{"loss__paired": 0.0}, {"train__replays": 0}, {"train__target_steps": 1}])
def test_without_replays_or_its_weight_there_is_no_paired_critic(new_state: NewState, without: dict[str, Any]) -> None:
    state = new_state(**PAIRED | without)
    assert state.paired_critic is None
    assert "paired" not in state.optimizers
    assert "paired" not in take_steps(state, 1)[0]


def test_the_paired_critic_starts_from_the_seed_alone_and_resumes(new_state: NewState) -> None:
    first, second = new_state(**PAIRED), new_state(**PAIRED)
    take_steps(first, 2)
    second.load_state_dict(checkpoint_of(first))
    assert take_steps(first, 1) == take_steps(second, 1)
    assert first.paired_critic is not None
    assert second.paired_critic is not None
    pairs = zip(first.paired_critic.parameters(), second.paired_critic.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
