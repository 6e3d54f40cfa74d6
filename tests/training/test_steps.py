"""Which weights each step moves, and the table of losses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echodistill_cli.errors import ConfigError
from echodistill_cli.training.batches import student_pass
from echodistill_cli.training.losses import photo_distance
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import (
    discriminator_step,
    replay_step,
    student_step,
    teacher_prior,
    teacher_step,
    training_step,
)
from echodistill_cli.training.terms import STUDENT_LOSSES, active_losses
from tests.helpers.runs import NewState, moved, take_steps, trained

STUDENT_TERMS = ("latent", "identity", "sliced_wasserstein", "prior", "adversarial")
each_text_form = pytest.mark.parametrize("form", ["lora", "token", "frozen"])


def frozen_weights(state: TrainingState) -> list[Tensor]:
    """Copies of everything that training must not move."""
    pair = state.pair
    modules = [pair.teacher.unet, pair.student.unet, pair.codec.encoder, *pair.encoder.encoders]
    modules += [critic.backbone for critic in state.critics] + (
        [state.identity_encoder] if state.identity_encoder else []
    )
    movable = {id(p) for optimizer in state.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    return [p.detach().clone() for module in modules for p in module.parameters() if id(p) not in movable]


@each_text_form
def test_the_teachers_step_moves_the_teacher_and_the_text_side_alone(new_state: NewState, form: str) -> None:
    state = new_state(text__form=form)
    before = trained(state)
    teacher_step(state)
    assert moved(before, state) == ({"teacher"} if form == "frozen" else {"teacher", "text"})


@each_text_form
def test_the_students_step_moves_the_student_alone(new_state: NewState, form: str) -> None:
    state = new_state(text__form=form)
    before = trained(state)
    student_step(state)
    assert moved(before, state) == {"student"}


@each_text_form
def test_the_discriminators_step_moves_their_heads_alone(new_state: NewState, form: str) -> None:
    state = new_state(text__form=form)
    generated = student_pass(state)
    before = trained(state)
    discriminator_step(state, generated)
    assert moved(before, state) == {"discriminators"}


@pytest.mark.parametrize("changes", [{}, {"train__gradient_checkpointing": True}, {"text__form": "token"}])
def test_whole_steps_move_every_trained_part_and_no_frozen_weight(new_state: NewState, changes: dict[str, Any]) -> None:
    state = new_state(echo__start=1, echo__every=1, **changes)
    before, frozen = trained(state), frozen_weights(state)
    take_steps(state, 3)
    assert moved(before, state) == {"teacher", "text", "student", "discriminators"}
    assert len(frozen) > 100
    assert all(torch.equal(a, b) for a, b in zip(frozen, frozen_weights(state), strict=True))


def test_the_learned_token_changes_no_other_word(new_state: NewState) -> None:
    state = new_state(text__form="token", concept__token="zwx", train__weight_decay=0.5)
    before = state.pair.encoder.encode(["a photo of the dog in snow"]).hidden
    take_steps(state, 2)
    assert torch.equal(state.pair.encoder.encode(["a photo of the dog in snow"]).hidden, before)


def test_a_word_of_several_tokens_is_refused_unless_it_is_learned(new_state: NewState) -> None:
    with pytest.raises(ConfigError, match="--text token"):
        new_state(concept__token="zwx")


def test_a_learning_rate_of_0_freezes_its_part(new_state: NewState) -> None:
    state = new_state(train__text_lr=0.0)
    before = trained(state)
    training_step(state)
    assert "text" not in moved(before, state)


@pytest.mark.parametrize("form", ["lora", "token"])
@pytest.mark.parametrize(("trained_by", "moves"), [("teacher", {"student"}), ("both", {"student", "text"})])
def test_the_students_losses_train_the_text_side_only_if_they_should(
    new_state: NewState, form: str, trained_by: str, moves: set[str]
) -> None:
    state = new_state(
        text__form=form, text__trained_by=trained_by, train__target_steps=2, train__replays=1, loss__prior=1.0
    )
    before = trained(state)
    student_step(state)
    assert moved(before, state) == moves
    before = trained(state)
    replay_step(state)
    assert moved(before, state) == moves


def test_every_loss_has_a_weight_and_every_weight_a_loss(plain_state: TrainingState) -> None:
    # The teacher's loss, and that of replays.
    weights = set(vars(plain_state.config.loss)) - {"denoising", "paired"}
    assert weights == set(STUDENT_TERMS) == {term.name for term in STUDENT_LOSSES}


@pytest.mark.parametrize("name", STUDENT_TERMS)
def test_a_weight_of_0_removes_its_term(new_state: NewState, name: str) -> None:
    state = new_state(**{"loss__prior": 1.0, f"loss__{name}": 0.0})
    metrics = training_step(state)
    assert {term.name for term in active_losses(state, student_pass(state))} == set(STUDENT_TERMS) - {name}
    assert set(metrics) & set(STUDENT_TERMS) == set(STUDENT_TERMS) - {name}
    assert bool(state.critics) == (name != "adversarial")
    assert (state.identity_encoder is None) == (name == "identity")  # the echo needs it too, but is off


def test_without_the_denoising_loss_the_teacher_stays_as_it_is(new_state: NewState) -> None:
    state = new_state(loss__denoising=0.0, train__weight_decay=0.5)
    before = trained(state)
    metrics = training_step(state)
    assert "denoising" not in metrics
    assert moved(before, state) == {"student", "discriminators"}


@pytest.mark.parametrize(("reference", "weighted"), [("teacher", True), ("photos", False)])
def test_only_what_is_compared_with_the_target_is_weighted_by_alpha_bar(
    new_state: NewState, reference: str, weighted: bool
) -> None:
    state = new_state(critic__identity_target=reference, loss__prior=1.0)
    generated = student_pass(state)
    blind = replace(generated, alpha_bar=torch.zeros_like(generated.alpha_bar))
    state.generator.manual_seed(0)
    values = {
        term.name: float(term.function(state, blind).detach().abs().sum()) for term in active_losses(state, blind)
    }
    assert set(values) == set(STUDENT_TERMS)
    assert values["latent"] == values["sliced_wasserstein"] == 0
    assert (values["identity"] == 0) == weighted
    assert values["adversarial"] > 0


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_loss_is_scaled_by_its_weight_and_its_samples_by_alpha_bar(new_state: NewState, weight: float) -> None:
    others = {f"loss__{name}": 0.0 for name in STUDENT_TERMS if name != "latent"}
    state = new_state(loss__latent=weight, train__max_grad_norm=0.0, **others)
    generator = state.generator.get_state()
    generated, unsettled = student_step(state)
    metrics = state.settle(unsettled)
    latents, target = generated.images.latents.detach(), generated.target.latents
    squares = (latents - target).square().mean(dim=(1, 2, 3))
    assert metrics["latent"] == pytest.approx(float((0.5 * squares * generated.alpha_bar).mean()), rel=1e-5)
    one = new_state(loss__latent=1.0, train__max_grad_norm=0.0, **others)
    one.generator.set_state(generator)
    unweighted = one.settle(student_step(one)[1])
    assert metrics["grad_norm_student"] == pytest.approx(weight * unweighted["grad_norm_student"], rel=1e-4)


@pytest.mark.parametrize("names", [(), ("teacher",), ("dino",), ("dino", "teacher", "clip")])
def test_any_set_of_discriminators_trains(
    new_state: NewState, small_backbones: dict[str, Path], names: tuple[str, ...]
) -> None:
    sources = tuple(str(small_backbones.get(name, name)) for name in names)
    state = new_state(critic__discriminators=sources)
    metrics = take_steps(state, 2)[-1]
    assert {key for key in metrics if key.startswith("discriminator_")} == {f"discriminator_{name}" for name in names}
    assert ("adversarial" in metrics) == bool(names)
    assert ("discriminators" in state.optimizers) == bool(names)
    assert all(math.isfinite(value) for value in metrics.values())


def test_discriminators_rest_in_a_batch_of_scenes(new_state: NewState) -> None:
    state = new_state(train__batch_size=1, train__scene_share=0.5, concept__scenes=("a {} on the moon",))
    critics = {"adversarial", *(f"discriminator_{critic.name}" for critic in state.critics)}
    assert len(critics) > 1
    assert [critics & set(metrics) for metrics in take_steps(state, 4)] == [critics, set(), critics, set()]


def test_a_run_without_an_identity_encoder_trains(new_state: NewState) -> None:
    state = new_state(critic__identity="none")
    assert "identity" not in training_step(state)
    assert state.identity_encoder is None


def test_identity_can_be_measured_against_the_photos(new_state: NewState) -> None:
    state = new_state(critic__identity_target="photos")
    generated = student_pass(state)
    (term,) = [term for term in active_losses(state, generated) if term.name == "identity"]
    values = term.function(state, generated)
    assert values.requires_grad
    assert state.identity_encoder is not None
    assert state.photos.identity is not None
    features = state.identity_encoder.features(generated.images.image)[0][:, 0]
    assert torch.equal(values, photo_distance(features, state.photos.identity))
    assert "image" not in vars(generated.target)  # it is not decoded


def test_the_prior_shows_the_class_by_the_base_student_and_pulls_both_models_back(
    new_state: NewState, plain_state: TrainingState
) -> None:
    state = new_state(loss__prior=1.0)
    assert state.prior is not None
    assert not any("sks" in prompt for prompt in state.prior.prompts)
    first, *_, last = take_steps(state, 6)
    assert first["teacher_prior"] == pytest.approx(0, abs=1e-9)  # nothing has moved yet
    assert 0 < first["prior"] < last["prior"]  # the teacher's first step has moved the text side
    assert last["teacher_prior"] > 0
    assert new_state(loss__prior=1.0, concept__class_name=None).prior is None
    assert plain_state.prior is None


def test_the_priors_gradient_reaches_the_teacher_and_the_text_side(new_state: NewState) -> None:
    state = new_state(loss__prior=1.0)
    take_steps(state, 1)
    before = trained(state)
    loss = teacher_prior(state, state.prior)  # type: ignore[arg-type]
    state.optimizers.step(loss, ["teacher", "text"])
    assert moved(before, state) == {"teacher", "text"}
