"""Extensions: targets of several teacher steps, their tints, and their replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from echodistill_cli.data.recolour import tinted_latents
from echodistill_cli.diffusion.sampling import sample_latents, student_x0
from echodistill_cli.models.adapters import lora_tensors
from echodistill_cli.training.batches import student_pass
from echodistill_cli.training.steps import begin, training_step
from echodistill_cli.training.targets import base_models, base_x0, multi_step_target, replay_batch
from tests.helpers.runs import NewState, seeded, student_pass_at, take_steps

each_text_form = pytest.mark.parametrize("form", ["lora", "token", "frozen"])
COLORED = {"train__scene_share": 1.0, "train__batch_size": 2, "train__target_steps": 2, "train__replays": 1}


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


def test_targets_in_a_color_are_generated_in_the_subjects_own_and_then_tinted(new_state: NewState) -> None:
    state = new_state(**COLORED, concept__tint_scenes=True)
    take_steps(state, 2)  # so that the teacher differs from the base teacher, which masks the subject
    noise = torch.randn(2, *state.photos.latents.shape[1:], generator=seeded())
    state.generator.manual_seed(1)
    prompts = ["a red sks dog on the moon", "a sks dog on pink fabric"]
    with torch.no_grad():
        conditioning, null = state.pair.encoder.encode_with_null(prompts)
    target = multi_step_target(state, noise, noise, prompts, conditioning, null)
    plain = sample_latents(
        state.pair.teacher,
        noise,
        state.pair.encoder.encode(["a sks dog on the moon", "a sks dog on pink fabric"]),
        state.pair.encoder.encode_null(),
        steps=2,
        guidance_scale=state.config.train.guidance_scale,
    )
    with base_models(state):
        expected = tinted_latents(plain, ["red", None], "dog", state.pair, seeded(1))
    assert torch.equal(target, expected)
    assert torch.equal(target[1], plain[1])
    assert not torch.equal(target[0], plain[0])
    # Stored with the student's prompt.
    assert state.replay_buffer.prompts[-2:] == prompts
    assert state.replay_buffer.latents is not None
    assert torch.equal(state.replay_buffer.latents[-2:], target)


@pytest.mark.parametrize("changes", [{"concept__scenes": ("a {} on pink fabric",)}, {"concept__class_name": None}])
def test_targets_without_a_color_or_a_class_name_are_not_tinted(new_state: NewState, changes: dict[str, Any]) -> None:
    tinted, plain = (
        student_pass_at(new_state(**COLORED, **changes, concept__tint_scenes=tint), 7) for tint in (True, False)
    )
    assert torch.equal(tinted.target.latents, plain.target.latents)


def test_replays_mix_targets_with_images_of_the_class_by_the_base_student(new_state: NewState) -> None:
    colours = ("a red {} on the moon", "a blue {}")
    replays = {"train__target_steps": 2, "train__replays": 1, "train__batch_size": 4}
    whole = new_state(**replays, train__class_share=1.0, concept__class_prompts=colours)
    student_pass(whole)
    assert whole.prior is not None
    assert set(whole.prior.prompts) == {"a red dog on the moon", "a blue dog"}
    noise, target, prompts = replay_batch(whole)
    rows = [int((whole.prior.noise == one).flatten(1).all(dim=1).nonzero()) for one in noise]
    assert [whole.prior.prompts[row] for row in rows] == prompts
    assert torch.equal(whole.prior.latents[rows], target)

    some = new_state(**replays, train__class_share=0.25, concept__class_prompts=colours)
    student_pass(some)
    prompts = [prompt for _ in range(100) for prompt in replay_batch(some)[2]]
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
    noise, target, prompts = replay_batch(state)
    assert set(prompts) <= set(class_prompts)
    assert not any("sks" in prompt for prompt in prompts)
    torch.testing.assert_close(target, base_x0(state, noise, prompts))
    assert all("sks" in prompt for prompt in state.replay_buffer.prompts)  # the buffer is not overwritten

    some = new_state(**replays, train__pair_share=0.25)
    student_pass(some)
    prompts = [prompt for _ in range(100) for prompt in replay_batch(some)[2]]
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
