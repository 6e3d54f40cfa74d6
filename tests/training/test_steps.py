"""One step at a time on the small pair: who moves, who does not, and that the same run gives the same bits."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from echodistill_cli.data.recolour import tinted_latents
from echodistill_cli.diffusion.sampling import sample_latents, student_x0
from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.models.adapters import load_lora_tensors, lora_tensors
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training import steps as training
from echodistill_cli.training.batches import StudentPass, draw_echo, draw_reals, draw_student_pass, draw_teacher_batch
from echodistill_cli.training.critics import TeacherBackbone, look
from echodistill_cli.training.losses import photo_distance
from echodistill_cli.training.state import MAX_BAD_STEPS, TrainingState, build_state
from echodistill_cli.training.steps import (
    CARRY_BACK_RATE,
    active_losses,
    begin,
    carry_back_step,
    discriminator_step,
    echo_step,
    head_start_step,
    replay_step,
    student_step,
    teacher_prior,
    teacher_step,
    training_step,
)
from echodistill_cli.training.targets import base_models, base_x0, draw_replay, drawn_target
from tests.helpers.runs import seeded, small_config, small_photos

NewState = Callable[..., TrainingState]
Tensors = dict[str, Tensor]


@pytest.fixture
def new_state(small_pair: tuple[Path, Path], small_backbones: dict[str, Path]) -> NewState:
    """Builds a fresh run with changes such as text__form="token"."""

    def build(**changes: Any) -> TrainingState:
        return build_state(small_config(small_pair, small_backbones, **changes), small_photos())

    return build


def trained(state: TrainingState) -> dict[str, Tensors]:
    """Copies of all that training may move, by optimizer."""
    if state.token:
        text = {name: value.detach().clone() for name, value in state.token.state_dict().items()}
    else:
        text = lora_tensors(state.pair.encoder.encoders[0]) if state.config.text.form == "lora" else {}
    heads = {
        f"{critic.name}.{name}": value.detach().clone()
        for critic in state.critics
        for name, value in critic.heads.state_dict().items()
    }
    return {
        "teacher": lora_tensors(state.pair.teacher.unet),
        "text": text,
        "student": lora_tensors(state.pair.student.unet),
        "discriminators": heads,
    }


def frozen_weights(state: TrainingState) -> list[Tensor]:
    """Copies of all that training may not move."""
    pair = state.pair
    modules = [pair.teacher.unet, pair.student.unet, pair.codec.encoder, *pair.encoder.encoders]
    modules += [critic.backbone for critic in state.critics] + ([state.judge] if state.judge else [])
    movable = {id(p) for optimizer in state.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    return [p.detach().clone() for module in modules for p in module.parameters() if id(p) not in movable]


def moved(before: dict[str, Tensors], state: TrainingState) -> set[str]:
    """Names of the parts of which any tensor differs from before."""
    now = trained(state)
    return {
        part for part in now if any(not torch.equal(value, before[part][name]) for name, value in now[part].items())
    }


def same(first: dict[str, Tensors], second: dict[str, Tensors]) -> bool:
    return all(torch.equal(value, second[part][name]) for part in first for name, value in first[part].items())


def steps(state: TrainingState, count: int) -> list[dict[str, float]]:
    return [training_step(state) for _ in range(count)]


def gradients(state: TrainingState, part: str) -> list[Tensor]:
    parameters = [p for group in state.optimizers[part].param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]


def saved(state: TrainingState) -> dict[str, Any]:
    """The state through a file's bytes, as a checkpoint has it."""
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


# --- who moves --------------------------------------------------------------------------------------------------------

each_text_form = pytest.mark.parametrize("form", ["lora", "token", "frozen"])


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
    student_pass = draw_student_pass(state)
    before = trained(state)
    discriminator_step(state, student_pass)
    assert moved(before, state) == {"discriminators"}


@pytest.mark.parametrize("changes", [{}, {"train__gradient_checkpointing": True}, {"text__form": "token"}])
def test_whole_steps_move_every_trained_part_and_no_frozen_weight(new_state: NewState, changes: dict[str, Any]) -> None:
    state = new_state(echo__start=1, echo__every=1, **changes)
    before, frozen = trained(state), frozen_weights(state)
    steps(state, 3)
    assert moved(before, state) == {"teacher", "text", "student", "discriminators"}
    assert len(frozen) > 100
    assert all(torch.equal(a, b) for a, b in zip(frozen, frozen_weights(state), strict=True))


@pytest.mark.parametrize("step", ["teacher", "student", "discriminators"])
def test_a_step_leaves_no_gradient_with_the_others(new_state: NewState, step: str) -> None:
    state = new_state()
    own = {"teacher": {"teacher", "text"}}.get(step, {step})
    if step == "teacher":
        teacher_step(state)
    elif step == "student":
        student_step(state)
    else:
        discriminator_step(state, draw_student_pass(state))
    assert {part for part in state.optimizers if gradients(state, part)} == own


def test_after_the_students_step_the_heads_can_be_trained_again(new_state: NewState) -> None:
    state = new_state()
    student_step(state)
    assert all(p.requires_grad and p.grad is None for critic in state.critics for p in critic.heads.parameters())


def test_the_learned_token_moves_no_other_word(new_state: NewState) -> None:
    state = new_state(text__form="token", concept__token="zwx", train__weight_decay=0.5)
    before = state.pair.encoder.encode(["a photo of the dog in snow"]).hidden
    steps(state, 2)
    assert torch.equal(state.pair.encoder.encode(["a photo of the dog in snow"]).hidden, before)


def test_a_word_of_several_tokens_is_refused_unless_it_is_learned(new_state: NewState) -> None:
    with pytest.raises(ConfigError, match="--text token"):
        new_state(concept__token="zwx")


def test_a_learning_rate_of_0_leaves_its_part(new_state: NewState) -> None:
    state = new_state(train__text_lr=0.0)
    before = trained(state)
    training_step(state)
    assert "text" not in moved(before, state)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["teacher", "text", "student", "discriminators"])
def test_every_parts_gradients_are_clipped_after_backward(new_state: NewState, part: str) -> None:
    state = new_state(train__max_grad_norm=1e-3)
    metrics = training_step(state)
    used = torch.stack([gradient.norm() for gradient in gradients(state, part)]).norm()
    assert metrics[f"grad_norm_{part}"] > 2e-3  # before clipping
    assert float(used) == pytest.approx(1e-3, rel=1e-2)


def test_without_a_norm_nothing_is_clipped(new_state: NewState) -> None:
    state = new_state(train__max_grad_norm=0.0)
    metrics = training_step(state)
    used = torch.stack([gradient.norm() for gradient in gradients(state, "discriminators")]).norm()
    assert float(used) == pytest.approx(metrics["grad_norm_discriminators"], rel=1e-5)


def test_a_half_precision_loss_is_scaled_for_backward_only(new_state: NewState) -> None:
    plain, scaled = new_state(), new_state()
    scaled.pair.dtype = torch.float16  # what decides the scaling; the weights stay in single precision to be compared
    metrics = [teacher_step(state) for state in (plain, scaled)]
    assert metrics[0].keys() == metrics[1].keys()
    assert list(metrics[0].values()) == pytest.approx(list(metrics[1].values()), rel=1e-4)
    for first, second in zip(gradients(plain, "teacher"), gradients(scaled, "teacher"), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-7)


def test_gradient_checkpointing_changes_nothing_but_memory(new_state: NewState) -> None:
    plain, checkpointed = new_state(), new_state(train__gradient_checkpointing=True)
    metrics = [steps(state, 3)[-1] for state in (plain, checkpointed)]
    assert metrics[0].keys() == metrics[1].keys()
    assert list(metrics[0].values()) == pytest.approx(list(metrics[1].values()), rel=1e-3, abs=1e-5)


def test_the_students_conditioning_and_target_carry_no_gradient(new_state: NewState) -> None:
    student_pass = draw_student_pass(new_state())
    assert student_pass.pictures.latents.requires_grad
    assert not student_pass.pictures.conditioning.hidden.requires_grad
    assert not student_pass.target.requires_grad
    assert not student_pass.target_image.requires_grad
    assert not student_pass.identity_features()[1].requires_grad
    assert student_pass.identity_features()[0].requires_grad


def test_the_null_prompt_is_encoded_with_the_text_encoder_as_it_is_now(
    new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    nulls: list[Tensor] = []
    encode_null = PromptEncoder.encode_null

    def remember(encoder: PromptEncoder) -> Any:
        null = encode_null(encoder)
        nulls.append(null.hidden)
        return null

    monkeypatch.setattr(PromptEncoder, "encode_null", remember)
    state = new_state()
    steps(state, 2)
    assert len(nulls) == 2
    assert not torch.equal(nulls[0], nulls[1])


# --- losses as data ---------------------------------------------------------------------------------------------------

STUDENT_TERMS = ("latent", "identity", "sliced_wasserstein", "prior", "adversarial")


def test_every_loss_has_a_weight_and_every_weight_a_loss(new_state: NewState) -> None:
    weights = set(vars(new_state().config.loss)) - {"denoising"}
    assert weights == set(STUDENT_TERMS) == {term.name for term in training.STUDENT_LOSSES}


@pytest.mark.parametrize("name", STUDENT_TERMS)
def test_a_weight_of_0_removes_its_term(new_state: NewState, name: str) -> None:
    state = new_state(**{"loss__prior": 1.0, f"loss__{name}": 0.0})
    metrics = training_step(state)
    assert {term.name for term in active_losses(state)} == set(STUDENT_TERMS) - {name}
    assert set(metrics) & set(STUDENT_TERMS) == set(STUDENT_TERMS) - {name}
    assert bool(state.critics) == (name != "adversarial")
    assert (state.judge is None) == (name == "identity")  # the echo, which needs it too, is off


def test_without_the_denoising_loss_the_teacher_rests(new_state: NewState) -> None:
    state = new_state(loss__denoising=0.0, train__weight_decay=0.5)
    before = trained(state)
    metrics = training_step(state)
    assert "denoising" not in metrics
    assert moved(before, state) == {"student", "discriminators"}


def test_alignment_is_weighted_by_the_signal_and_the_adversary_is_not() -> None:
    assert {term.name for term in training.STUDENT_LOSSES if not term.weighted_by_alpha_bar} == {"adversarial", "prior"}


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_term_counts_by_its_weight_and_its_samples_by_their_signal(new_state: NewState, weight: float) -> None:
    others = {f"loss__{name}": 0.0 for name in STUDENT_TERMS if name != "latent"}
    state = new_state(loss__latent=weight, train__max_grad_norm=0.0, **others)
    generator = state.generator.get_state()
    student_pass, metrics = student_step(state)
    latents, target = student_pass.pictures.latents.detach(), student_pass.target
    squares = (latents - target).square().mean(dim=(1, 2, 3))
    assert metrics["latent"] == pytest.approx(float((0.5 * squares * student_pass.alpha_bar).mean()), rel=1e-5)
    one = new_state(loss__latent=1.0, train__max_grad_norm=0.0, **others)
    one.generator.set_state(generator)
    assert metrics["grad_norm_student"] == pytest.approx(weight * student_step(one)[1]["grad_norm_student"], rel=1e-4)


@pytest.mark.parametrize("names", [(), ("teacher",), ("dino",), ("dino", "teacher", "clip")])
def test_any_set_of_discriminators_trains(
    new_state: NewState, small_backbones: dict[str, Path], names: tuple[str, ...]
) -> None:
    sources = tuple(str(small_backbones.get(name, name)) for name in names)
    state = new_state(critic__discriminators=sources)
    metrics = steps(state, 2)[-1]
    assert {key for key in metrics if key.startswith("discriminator_")} == {f"discriminator_{name}" for name in names}
    assert ("adversarial" in metrics) == bool(names)
    assert ("discriminators" in state.optimizers) == bool(names)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_run_without_an_identity_encoder_trains(new_state: NewState) -> None:
    state = new_state(critic__identity="none")
    assert "identity" not in training_step(state)
    assert state.judge is None


# --- features, once ---------------------------------------------------------------------------------------------------


def test_remembered_features_of_reals_are_those_of_now(new_state: NewState) -> None:
    state = new_state()
    reals = draw_reals(state, draw_student_pass(state).pictures)
    image_critics = [critic for critic in state.critics if isinstance(critic.backbone, ImageBackbone)]
    assert set(reals.cached) == {critic.name for critic in image_critics} == {"dino"}
    for critic in image_critics:
        with torch.no_grad():
            now = look(critic.backbone, reals.pictures)
        torch.testing.assert_close(reals.features(critic)[0], now[0], rtol=1e-4, atol=1e-5)


def test_remembered_features_of_echoed_pictures_are_those_of_now_too(new_state: NewState) -> None:
    state = new_state()
    echo_step(state)
    reals = draw_reals(state, draw_student_pass(state).pictures)
    assert len(reals.pictures.latents) == 2 * state.config.train.batch_size
    assert reals.weights.tolist() == [1.0, 1.0, 0.25, 0.25]
    for critic in state.critics:
        with torch.no_grad():
            now = look(critic.backbone, reals.pictures)
        for ours, theirs in zip(reals.features(critic), now, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_backbone_looks_at_the_students_pictures_once_a_step(
    new_state: NewState, small_backbones: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # CLIP is judge and discriminator here.
    names = tuple(str(small_backbones.get(name, name)) for name in ("dino", "clip", "teacher"))
    state = new_state(critic__discriminators=names)
    assert state.judge in [critic.backbone for critic in state.critics]
    looks: list[tuple[type, bool]] = []

    def counted(backbone: Any, pictures: Any) -> Any:
        looks.append((type(backbone), pictures.latents.requires_grad))
        return look(backbone, pictures)

    monkeypatch.setattr("echodistill_cli.training.batches.look", counted)
    training_step(state)
    at_fakes = [kind for kind, of_student in looks if of_student]
    assert sorted(kind.__name__ for kind in at_fakes) == ["ImageBackbone", "ImageBackbone", "TeacherBackbone"]
    # Of the reals only the latent backbone's features depend on this step's noise.
    assert [kind for kind, of_student in looks if not of_student] == [TeacherBackbone]


def test_the_teacher_learns_from_captions_masks_and_framings(new_state: NewState) -> None:
    state = new_state(train__batch_size=64, concept__views=32)
    batch = draw_teacher_batch(state)
    latents, masks, prompts = batch.latents, batch.masks, batch.prompts
    assert latents.shape == (64, 4, 8, 8)
    assert masks.shape == (64, 1, 8, 8)
    assert 0 <= float(masks.min()) < 1 == float(masks.max())
    assert all("sks dog" in prompt for prompt in prompts)
    assert any("on the beach" in prompt for prompt in prompts)
    assert any(prompt.endswith(("far away", "very small", "zoomed in", "close up")) for prompt in prompts)


# --- what is not finite -----------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_moves_nothing_is_counted_and_ends_the_run(new_state: NewState) -> None:
    state = new_state()
    steps(state, 1)
    with torch.no_grad():
        state.photos.latents.fill_(math.nan)  # the teacher's loss
        state.pair.codec.decoder.decoder.conv_out.bias.fill_(math.nan)  # every picture's
    before, moments = trained(state), saved(state)["optimizers"]
    for bad in range(1, MAX_BAD_STEPS):
        metrics = training_step(state)
        skipped = {name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_")}
        assert skipped == {"teacher", "text", "student", "discriminators"}
        assert (state.bad_steps, state.bad_steps_in_a_row) == (bad, bad)
    with pytest.raises(EchoDistillError, match=r"was not finite in the last 5 steps.*--lr.*--resume"):
        training_step(state)
    assert moved(before, state) == set()
    assert state.step == 5  # the bad step that ended the run is not counted as done
    for part in moments:
        for key, values in saved(state)["optimizers"][part]["state"].items():
            assert all(torch.equal(value, moments[part]["state"][key][name]) for name, value in values.items())


def test_only_the_part_that_is_not_finite_rests(new_state: NewState) -> None:
    state = new_state()
    state.photos.latents.fill_(math.nan)
    before = trained(state)
    metrics = training_step(state)
    assert {name for name in metrics if name.startswith("skipped_")} == {"skipped_teacher", "skipped_text"}
    assert moved(before, state) == {"student", "discriminators"}


def test_a_finite_loss_with_a_gradient_that_is_not_moves_nothing(new_state: NewState) -> None:
    state = new_state()
    weight = next(p for p in state.pair.teacher.unet.parameters() if p.requires_grad)
    before = trained(state)
    loss = (weight * 0).sum().sqrt()  # 0, with an infinite slope times 0
    assert float(loss.detach()) == 0
    assert state.optimizers.step(loss, ["teacher", "text"]) == {"skipped_teacher": 1.0, "skipped_text": 1.0}
    assert moved(before, state) == set()


def test_good_steps_in_between_start_the_count_anew(new_state: NewState) -> None:
    state = new_state()
    for metrics in ({"skipped_teacher": 1.0}, {}, {"skipped_student": 1.0}, {}) * MAX_BAD_STEPS:
        state.count_skips(metrics)
    assert (state.bad_steps, state.bad_steps_in_a_row) == (2 * MAX_BAD_STEPS, 0)


# --- the same run, the same bits --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(new_state: NewState) -> None:
    runs = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        state = new_state(echo__start=2, echo__every=1)
        torch.manual_seed(global_seed + 10)
        runs.append((steps(state, 3), trained(state)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


def test_another_seed_gives_another_run(new_state: NewState) -> None:
    first, second = (new_state(run__seed=seed) for seed in (0, 1))
    assert moved(trained(first), second) >= {"teacher", "text", "student", "discriminators"}
    assert steps(first, 1) != steps(second, 1)


@each_text_form
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(new_state: NewState, form: str) -> None:
    settings = {"text__form": form, "echo__start": 1, "echo__every": 2}
    whole = new_state(**settings)
    steps(whole, 2)
    checkpoint = saved(whole)
    assert whole.pool
    rest = steps(whole, 2)
    resumed = new_state(**settings)
    resumed.load_state_dict(checkpoint)
    assert resumed.step == 2
    assert resumed.pool is not None
    assert steps(resumed, 2) == rest
    assert same(trained(whole), trained(resumed))
    assert whole.pool.prompts == resumed.pool.prompts
    assert torch.equal(whole.pool.latents, resumed.pool.latents)
    assert torch.equal(whole.generator.get_state(), resumed.generator.get_state())


def test_the_pool_of_a_checkpoint_lands_on_the_runs_device(new_state: NewState) -> None:
    state = new_state()
    echo_step(state)
    checkpoint = saved(state)
    state.pair.device = torch.device("meta")
    state.load_state_dict(checkpoint)
    assert state.pool is not None
    assert state.pool.latents.device.type == "meta"


# --- the echo ---------------------------------------------------------------------------------------------------------


def test_the_echo_begins_at_its_start_and_repeats(new_state: NewState) -> None:
    state = new_state(echo__start=2, echo__every=2)
    assert ["echo_made" in metrics for metrics in steps(state, 6)] == [False, True, False, True, False, True]


def test_without_a_start_there_is_no_echo(new_state: NewState) -> None:
    state = new_state()
    assert not any("echo_made" in metrics for metrics in steps(state, 3))
    assert state.pool is None


def test_an_echo_says_what_became_of_every_picture(new_state: NewState) -> None:
    state = new_state(echo__candidates=5, echo__pool_size=2, train__batch_size=2)
    metrics = echo_step(state)
    fates = ("kept", "identity", "photo_copy", "duplicate", "crowded")
    assert metrics["echo_made"] == sum(metrics[f"echo_{fate}"] for fate in fates) == 5
    assert state.pool is not None
    assert metrics["echo_pool"] == len(state.pool) <= 2
    assert all("sks dog" in prompt for prompt in state.pool.prompts)
    assert not state.pool.latents.requires_grad


def test_an_echo_moves_nothing(new_state: NewState) -> None:
    state = new_state()
    before = trained(state)
    echo_step(state)
    assert moved(before, state) == set()


def test_a_pool_that_stays_empty_leaves_the_training_to_the_photos(new_state: NewState) -> None:
    state = new_state(echo__start=1, echo__every=1, echo__min_identity=50.0)
    metrics = steps(state, 3)
    assert [entry["echo_kept"] for entry in metrics] == [0.0] * 3
    assert state.pool is not None
    assert len(state.pool) == 0
    assert len(draw_reals(state, draw_student_pass(state).pictures).weights) == 2
    state.load_state_dict(saved(state))
    steps(state, 1)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 8), (0.5, None)])
def test_the_teacher_draws_its_share_from_the_pool(new_state: NewState, share: float, expected: int | None) -> None:
    state = new_state(echo__teacher_share=share, train__batch_size=8)
    echo_step(state)
    assert state.pool is not None
    state.pool = replace(state.pool, prompts=["ECHO"] * len(state.pool))
    batch = draw_teacher_batch(state)
    latents, masks, prompts = batch.latents, batch.masks, batch.prompts
    echoed = [prompt == "ECHO" for prompt in prompts]
    assert sum(echoed) == expected if expected is not None else 0 < sum(echoed) < 8
    for row, is_echo in enumerate(echoed):
        assert (latents[row] == state.pool.latents).flatten(1).all(dim=1).any() == is_echo
        assert not is_echo or masks[row].min() == 1
    assert "ECHO" not in draw_teacher_batch(state, echoes=False).prompts


def test_a_real_weight_of_0_keeps_echoed_pictures_from_the_discriminators(new_state: NewState) -> None:
    state = new_state(echo__real_weight=0.0)
    echo_step(state)
    assert len(draw_reals(state, draw_student_pass(state).pictures).pictures.latents) == 2


# --- beyond the paper: scenes, the class as it was, plain photos, noise for the echo ----------------------------------


def test_scenes_are_asked_of_the_student_and_the_discriminators_do_not_see_them(new_state: NewState) -> None:
    state = new_state(train__scene_share=0.5, train__batch_size=4, concept__scenes=("a {} on the moon",))
    asked: list[str] = []
    encode = state.pair.encoder.encode
    state.pair.encoder.encode = lambda prompts: (asked.extend(prompts), encode(prompts))[1]  # type: ignore[method-assign]
    student_pass = draw_student_pass(state)
    assert ["on the moon" in prompt for prompt in asked[:4]] == [False, False, True, True]
    assert student_pass.photo_prompts == 2
    for taps in student_pass.features.values():
        assert all(len(tap) == 2 for tap in taps)
    assert len(student_pass.identity_features()[0]) == 4
    steps(state, 1)


def test_the_prior_is_what_the_untouched_models_draw_and_pulls_both_back_to_it(new_state: NewState) -> None:
    state = new_state(loss__prior=1.0)
    assert state.prior is not None
    assert not any("sks" in prompt for prompt in state.prior.prompts)
    first, *_, last = steps(state, 6)
    assert first["teacher_prior"] == pytest.approx(0, abs=1e-9)  # nothing has moved yet
    assert 0 < first["prior"] < last["prior"]  # only the teacher's first step with the text side
    assert last["teacher_prior"] > 0
    assert new_state(loss__prior=1.0, concept__class_name=None).prior is None
    assert new_state().prior is None


def test_the_priors_gradient_reaches_the_teacher_and_the_text_side(new_state: NewState) -> None:
    state = new_state(loss__prior=1.0)
    steps(state, 1)
    before = trained(state)
    loss = teacher_prior(state, state.prior)  # type: ignore[arg-type]
    state.optimizers.step(loss, ["teacher", "text"])
    assert moved(before, state) == {"teacher", "text"}


def test_plain_views_have_no_canvas_and_no_framing(new_state: NewState) -> None:
    state = new_state(concept__augmentation="plain", concept__views=16)
    assert {view.framing for view in state.photos.views} == {""}
    assert {view.framing for view in new_state(concept__views=16).photos.views} > {""}


def test_the_teacher_sees_the_pool_only_in_enough_noise(new_state: NewState) -> None:
    state = new_state(echo__teacher_share=1.0, echo__teacher_noise=0.7, train__batch_size=64)
    assert int(draw_teacher_batch(state).timesteps.min()) < 300  # photos at any
    echo_step(state)
    assert int(draw_teacher_batch(state).timesteps.min()) >= 700


def test_targets_of_several_steps_are_what_the_teacher_draws_from_the_same_noise(new_state: NewState) -> None:
    state = new_state(train__target_steps=3)
    student_pass = draw_student_pass(state)
    pictures = student_pass.pictures
    assert student_pass.alpha_bar.tolist() == [1.0] * len(pictures.latents)
    again = new_state(train__target_steps=3)
    again.generator.manual_seed(7)
    state.generator.manual_seed(7)
    assert torch.equal(draw_student_pass(state).target, draw_student_pass(again).target)
    one = new_state(train__target_steps=1)
    one.generator.manual_seed(7)
    assert torch.equal(draw_student_pass(one).pictures.latents, draw_student_pass_at(again, 7).pictures.latents)
    assert not torch.equal(draw_student_pass_at(one, 7).target, draw_student_pass_at(again, 7).target)


def test_targets_may_begin_with_the_students_picture_and_stay_nearer_to_it(new_state: NewState) -> None:
    passes = [
        draw_student_pass_at(new_state(train__target_steps=4, train__target_strength=strength), 7)
        for strength in (1.0, 0.5, 0.0)
    ]
    assert all(torch.equal(one.pictures.latents, passes[0].pictures.latents) for one in passes)
    distances = [float((one.target - one.pictures.latents.detach()).square().mean()) for one in passes]
    assert distances[0] > distances[1] > distances[2] > 0
    plain = draw_student_pass_at(new_state(train__target_steps=4), 7)
    assert torch.equal(plain.target, passes[0].target)


def test_the_one_step_target_is_renoised_with_the_noise_that_the_student_drew_from(new_state: NewState) -> None:
    # What the networks were given says it: the student's input holds its noise, the teacher's the noise it was renoised
    # with. The alphas are diffusers' own, not ours.
    state = new_state()
    given: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, inputs: given.update({name: (inputs[0].float(), inputs[1])})

    hooks = [
        unet.register_forward_pre_hook(watch(name))
        for name, unet in (("student", state.pair.student.unet), ("teacher", state.pair.teacher.unet))
    ]
    student_pass = draw_student_pass(state)
    for hook in hooks:
        hook.remove()
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    drawn_from = given["student"][0] / (1 - alphas[999]).sqrt()
    noisy, timesteps = given["teacher"][0].chunk(2)[0], given["teacher"][1].chunk(2)[0]
    signal = alphas[timesteps].view(-1, 1, 1, 1)
    renoised_with = (noisy - signal.sqrt() * student_pass.pictures.latents.detach()) / (1 - signal).sqrt()
    torch.testing.assert_close(renoised_with, drawn_from, atol=1e-4, rtol=1e-4)


def draw_student_pass_at(state: TrainingState, seed: int) -> StudentPass:
    state.generator.manual_seed(seed)
    return draw_student_pass(state)


def test_replays_show_the_class_as_it_was_among_the_targets(new_state: NewState) -> None:
    colours = ("a red {} on the moon", "a blue {}")
    replayed = {"train__target_steps": 2, "train__replays": 1, "train__batch_size": 4}
    whole = new_state(**replayed, train__class_share=1.0, concept__class_prompts=colours)
    draw_student_pass(whole)
    assert whole.prior is not None
    assert set(whole.prior.prompts) == {"a red dog on the moon", "a blue dog"}
    noise, target, prompts = draw_replay(whole)
    rows = [int((whole.prior.noise == one).flatten(1).all(dim=1).nonzero()) for one in noise]
    assert [whole.prior.prompts[row] for row in rows] == prompts
    assert torch.equal(whole.prior.latents[rows], target)

    some = new_state(**replayed, train__class_share=0.25, concept__class_prompts=colours)
    draw_student_pass(some)
    drawn = [prompt for _ in range(100) for prompt in draw_replay(some)[2]]
    assert 0.15 < sum("sks" not in prompt for prompt in drawn) / len(drawn) < 0.35
    assert all("sks" in prompt for prompt in some.targets.prompts)  # what is remembered is not written over
    assert "teacher_prior" not in steps(some, 1)[0]  # the prior's own losses have a weight of their own


def test_the_first_targets_are_remembered_before_the_first_step_and_move_nothing(new_state: NewState) -> None:
    replayed = {"train__target_steps": 2, "train__replays": 1, "train__first_targets": 3, "train__head_start": 1}
    state = new_state(**replayed, train__carry_over=True)
    batch = state.config.train.batch_size
    begin(state)
    assert len(state.targets) == 3 * batch
    student, teacher = (lora_tensors(state.pair.role(role).unet) for role in ("student", "teacher"))
    assert all(torch.equal(student[name], teacher[name]) for name in teacher)  # carried over, and not yet trained
    joint = new_state(**replayed)
    steps(joint, 2)
    assert len(joint.targets) == (3 + 2) * batch


@pytest.mark.parametrize("without", [{"train__replays": 0}, {"train__target_steps": 1}, {"loss__latent": 0.0}])
def test_without_replays_there_are_no_first_targets(new_state: NewState, without: dict[str, Any]) -> None:
    state = new_state(**{"train__target_steps": 2, "train__replays": 1, "train__first_targets": 3} | without)
    begin(state)
    assert len(state.targets) == 0
    assert "replay" not in training_step(state)


@each_text_form
def test_pairs_ask_for_the_class_from_the_same_noise_and_keep_what_was_drawn_of_it(
    new_state: NewState, form: str
) -> None:
    replayed = {"train__target_steps": 2, "train__replays": 1, "train__batch_size": 4, "train__lr": 0.05}
    state = new_state(**replayed, train__pair_share=1.0, text__form=form, text__trained_by="both", train__text_lr=0.05)
    before = torch.randn(4, *state.photos.latents.shape[1:], generator=torch.Generator().manual_seed(3))
    drawn = student_x0(state.pair.student, before, state.pair.encoder.encode(["a dog"] * 4))
    steps(state, 3)
    now = student_x0(state.pair.student, before, state.pair.encoder.encode(["a dog"] * 4))
    assert not torch.equal(now, drawn)
    assert torch.equal(base_x0(state, before, ["a dog"] * 4), drawn)

    remembered = [prompt.replace("sks dog", "dog") for prompt in state.targets.prompts]
    noise, target, prompts = draw_replay(state)
    assert set(prompts) <= set(remembered)
    assert not any("sks" in prompt for prompt in prompts)
    torch.testing.assert_close(target, base_x0(state, noise, prompts))
    assert all("sks" in prompt for prompt in state.targets.prompts)  # what is remembered is not written over

    some = new_state(**replayed, train__pair_share=0.25)
    draw_student_pass(some)
    drawn_prompts = [prompt for _ in range(100) for prompt in draw_replay(some)[2]]
    assert 0.15 < sum("sks" not in prompt for prompt in drawn_prompts) / len(drawn_prompts) < 0.35


@pytest.mark.parametrize("form", ["lora", "token"])
@pytest.mark.parametrize(("trained_by", "moves"), [("teacher", {"student"}), ("both", {"student", "text"})])
def test_the_students_losses_train_the_text_side_where_they_shall(
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


def test_recoloured_views_are_the_teachers_alone_and_change_no_other_view(new_state: NewState) -> None:
    plain, some = new_state(), new_state(concept__recolour=0.5)
    colours = [view.colour for view in some.photos.views]
    assert sum(map(bool, colours)) == round(0.5 * len(colours))
    assert not any(view.colour for view in some.photos.real_views)
    for index, colour in enumerate(colours):
        assert bool(colour) != torch.equal(plain.photos.latents[index], some.photos.latents[index])
    assert torch.equal(plain.photos.real_latents, some.photos.real_latents)
    assert torch.equal(plain.photos.masks, some.photos.masks)
    assert not any(view.colour for view in new_state(concept__recolour=0.5, concept__class_name=None).photos.views)


COLOURED = {"train__scene_share": 1.0, "train__batch_size": 2, "train__target_steps": 2, "train__replays": 1}


def test_targets_in_a_colour_are_drawn_in_the_subjects_own_and_tinted(new_state: NewState) -> None:
    state = new_state(**COLOURED, concept__tint_scenes=True)
    steps(state, 2)  # a trained teacher draws, an untrained one says where the subject is
    noise = torch.randn(2, *state.photos.latents.shape[1:], generator=seeded())
    state.generator.manual_seed(1)
    prompts = ["a red sks dog on the moon", "a sks dog on pink fabric"]
    target = drawn_target(state, noise, noise, prompts, state.pair.encoder.encode(prompts).detach())
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
    # Remembered for the prompt that the student was asked.
    assert state.targets.prompts[-2:] == prompts
    assert state.targets.latents is not None
    assert torch.equal(state.targets.latents[-2:], target)


@pytest.mark.parametrize("changes", [{"concept__scenes": ("a {} on pink fabric",)}, {"concept__class_name": None}])
def test_targets_without_a_colour_or_a_class_name_are_not_tinted(new_state: NewState, changes: dict[str, Any]) -> None:
    tinted, plain = (
        draw_student_pass_at(new_state(**COLOURED, **changes, concept__tint_scenes=tint), 7) for tint in (True, False)
    )
    assert torch.equal(tinted.target, plain.target)


def test_the_echo_is_judged_in_the_subjects_own_colours_and_tinted_where_it_is_good(new_state: NewState) -> None:
    prompts = ["a red sks dog on the moon", "a sks dog on the moon"]
    pools = {}
    for least, tint in ((0.0, True), (1.0, True), (0.0, False)):
        state = new_state(concept__tint_scenes=tint, echo__min_identity=least)
        state.generator.manual_seed(7)
        pools[least, tint] = draw_echo(state, prompts)
    good, bad, untinted = pools.values()
    assert good.prompts == prompts
    torch.testing.assert_close(good.scores, bad.scores)
    assert not torch.equal(good.latents[0], bad.latents[0])
    assert torch.equal(good.latents[1], bad.latents[1])
    assert torch.equal(good.latents[1], untinted.latents[1])
    assert not torch.equal(bad.latents[0], untinted.latents[0])  # another prompt: the colour is not asked for


def test_masks_that_the_teacher_finds_weigh_the_loss_and_change_no_picture(new_state: NewState) -> None:
    plain, found = new_state(), new_state(concept__masks="teacher")
    assert torch.equal(plain.photos.latents, found.photos.latents)
    assert torch.equal(plain.photos.real_latents, found.photos.real_latents)
    assert plain.photos.masks.max() == 1
    assert found.photos.masks.mean() < plain.photos.masks.mean()
    unnamed = new_state(concept__masks="teacher", concept__class_name=None)
    assert torch.equal(unnamed.photos.masks, plain.photos.masks)


def test_the_teachers_head_start_comes_before_the_first_joint_step_only(
    new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = new_state(train__head_start=3)
    taken: list[int] = []
    step = training.teacher_step
    monkeypatch.setattr(training, "teacher_step", lambda run: (taken.append(run.step), step(run))[1])
    steps(state, 2)
    assert taken == [0, 0, 0, 0, 1]


def test_the_head_start_ends_at_the_mean_of_its_second_half(new_state: NewState) -> None:
    state = new_state(train__head_start=4)
    after: list[list[torch.Tensor]] = []
    for _ in range(4):
        head_start_step(state)
        after.append([weight.detach().clone() for weight in state.optimizers.weights(["teacher", "text"])])
    alone = new_state(train__head_start=5)  # its fourth step is an inner one, where nothing is moved
    for _ in range(4):
        head_start_step(alone)
    last = [weight.detach() for weight in alone.optimizers.weights(["teacher", "text"])]
    assert any(not torch.equal(mean, weight) for mean, weight in zip(after[3], last, strict=True))
    for mean, third, fourth in zip(after[3], after[2], last, strict=True):
        torch.testing.assert_close(mean, (third + fourth) / 2)
    assert state.teacher_mean.count == 0


def test_the_student_may_begin_with_what_the_teacher_has_learned(new_state: NewState) -> None:
    state = new_state(train__head_start=2, train__carry_over=True)
    begin(state)
    teacher, student = (lora_tensors(state.pair.role(role).unet) for role in ("teacher", "student"))
    assert all(torch.equal(teacher[name], value) for name, value in student.items())
    assert any(value.any() for name, value in student.items() if "lora_B" in name)
    fresh = new_state(train__head_start=2)
    begin(fresh)
    assert not any(v.any() for name, v in lora_tensors(fresh.pair.student.unet).items() if "lora_B" in name)


def test_the_teacher_ends_with_the_students_lora_and_a_look_at_the_photos(new_state: NewState) -> None:
    settings = {"train__carry_over": True, "train__head_start": 1, "train__steps": 2}
    settings |= {"echo__start": 1, "echo__min_identity": 0.0, "echo__teacher_share": 1.0}
    state, kept = new_state(**settings, echo__carry_back=4), new_state(**settings)
    for run in (state, kept):
        training_step(run)
        assert not run.in_carry_back
        training_step(run)
    assert same(trained(state), trained(kept))
    numbers = []
    while state.in_carry_back:
        metrics = carry_back_step(state)
        assert metrics["denoising"] > 0
        numbers.append(metrics["carry_back_step"])
    assert (numbers, kept.in_carry_back) == ([1, 2, 3, 4], False)
    after, without = trained(state), trained(kept)
    for part in ("student", "text", "discriminators"):  # the student is done
        assert same({part: after[part]}, {part: without[part]})
    assert state.optimizers["teacher"].param_groups[0]["lr"] == CARRY_BACK_RATE * state.config.train.teacher_lr

    # The same by hand: the student's LoRA, four steps, the mean of the last two.
    load_lora_tensors(kept.pair.teacher.unet, lora_tensors(kept.pair.student.unet))
    for group in kept.optimizers["teacher"].param_groups:
        group["lr"] = CARRY_BACK_RATE * kept.config.train.teacher_lr
    moments = []
    for _ in range(4):
        teacher_step(kept, parts=["teacher"], echoes=False)
        moments.append(lora_tensors(kept.pair.teacher.unet))
    assert state.teacher_mean.count == 0
    for name, value in lora_tensors(state.pair.teacher.unet).items():
        torch.testing.assert_close(value, (moments[2][name] + moments[3][name]) / 2)
    assert any(not torch.equal(moments[0][name], moments[3][name]) for name in moments[0])


def test_nothing_is_carried_back_without_kept_pictures_or_a_loss_of_the_teachers_own(new_state: NewState) -> None:
    keeps = {"echo__start": 1, "echo__min_identity": 0.0}
    for settings, expected in (
        (keeps, True),
        ({"echo__start": None}, False),
        ({"echo__start": 1, "echo__min_identity": 10.0}, False),
        (keeps | {"loss__denoising": 0.0}, False),
    ):
        state = new_state(train__carry_over=True, train__steps=1, echo__carry_back=2, **settings)
        training_step(state)
        assert state.in_carry_back == expected


def test_a_carry_back_cut_short_begins_anew_after_more_steps(new_state: NewState) -> None:
    settings = {"train__carry_over": True, "train__steps": 1, "echo__min_identity": 0.0, "echo__start": 1}
    state = new_state(**settings, echo__carry_back=4)
    training_step(state)
    for _ in range(3):
        carry_back_step(state)
    assert state.teacher_mean.count == 1
    state.config = dataclasses.replace(state.config, train=dataclasses.replace(state.config.train, steps=2))
    assert not state.in_carry_back
    training_step(state)
    assert (state.in_carry_back, state.finished_in("carry back")) == (True, 0)
    carry_back_step(state)
    assert state.teacher_mean.count == 0


def test_learning_rates_stay_or_fall_to_0_over_the_steps(new_state: NewState) -> None:
    def rates(schedule: str) -> list[float]:
        state = new_state(train__lr_schedule=schedule, train__steps=4, train__lr=2e-3, train__teacher_lr=1e-3)
        found = []
        for state.step in range(5):
            state.set_rates()
            found.append(state.optimizers["student"].param_groups[0]["lr"])
            assert state.optimizers["teacher"].param_groups[0]["lr"] == pytest.approx(found[-1] / 2)
        return found

    assert rates("constant") == [2e-3] * 5
    half = math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([2e-3, 1e-3 * (1 + half), 1e-3, 1e-3 * (1 - half), 0.0])


def test_a_step_is_taken_at_the_rate_of_its_number(new_state: NewState) -> None:
    state = new_state(train__lr_schedule="cosine", train__steps=2)
    steps(state, 2)
    assert state.optimizers["student"].param_groups[0]["lr"] == pytest.approx(state.config.train.lr / 2)


def test_identity_can_be_measured_against_the_photos(new_state: NewState) -> None:
    state = new_state(critic__identity_target="photos")
    student_pass = draw_student_pass(state)
    (term,) = [term for term in active_losses(state) if term.name == "identity"]
    values = term.function(student_pass)
    assert values.requires_grad
    assert state.photos.identity is not None
    assert torch.equal(values, photo_distance(student_pass.judged(), state.photos.identity))
    assert "target_image" not in vars(student_pass)
