"""What a step is computed on: views, masks, prompts, noise, and features that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training.batches import critic_features, real_batch, student_pass, teacher_batch
from echodistill_cli.training.critics import ImageBatch, TeacherBackbone, features_of
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import echo_step, training_step
from tests.helpers.runs import NewState, take_steps


def test_the_teacher_learns_from_captions_masks_and_framings(new_state: NewState) -> None:
    state = new_state(train__batch_size=64, concept__views=32)
    batch = teacher_batch(state)
    latents, masks, prompts = batch.latents, batch.masks, batch.prompts
    assert latents.shape == (64, 4, 8, 8)
    assert masks.shape == (64, 1, 8, 8)
    assert 0 <= float(masks.min()) < 1 == float(masks.max())
    assert all("sks dog" in prompt for prompt in prompts)
    assert any("on the beach" in prompt for prompt in prompts)
    assert any(prompt.endswith(("far away", "very small", "zoomed in", "close up")) for prompt in prompts)


def test_plain_views_have_no_canvas_and_no_framing(new_state: NewState) -> None:
    state = new_state(concept__augmentation="plain", concept__views=16)
    assert {view.framing for view in state.photos.views} == {""}
    assert {view.framing for view in new_state(concept__views=16).photos.views} > {""}


def test_masks_by_the_teacher_weight_the_loss_and_change_no_image(
    new_state: NewState, plain_state: TrainingState
) -> None:
    plain, masked = plain_state, new_state(concept__masks="teacher")
    assert torch.equal(plain.photos.latents, masked.photos.latents)
    assert torch.equal(plain.photos.real_latents, masked.photos.real_latents)
    assert plain.photos.masks.max() == 1
    assert masked.photos.masks.mean() < plain.photos.masks.mean()
    unnamed = new_state(concept__masks="teacher", concept__class_name=None)
    assert torch.equal(unnamed.photos.masks, plain.photos.masks)


def test_cached_features_of_reals_equal_new_ones(new_state: NewState) -> None:
    state = new_state()
    reals = real_batch(state, student_pass(state).images)
    image_critics = [critic for critic in state.critics if isinstance(critic.backbone, ImageBackbone)]
    assert set(reals.cached) == {critic.name for critic in image_critics} == {"dino"}
    for critic in image_critics:
        with torch.no_grad():
            now = features_of(reals.images, critic.backbone)
        torch.testing.assert_close(reals.features(critic)[0], now[0], rtol=1e-4, atol=1e-5)


def test_cached_features_of_echo_images_equal_new_ones(new_state: NewState) -> None:
    state = new_state()
    echo_step(state)
    reals = real_batch(state, student_pass(state).images)
    assert len(reals.images.latents) == 2 * state.config.train.batch_size
    assert reals.weights.tolist() == [1.0, 1.0, 0.25, 0.25]
    for critic in state.critics:
        with torch.no_grad():
            now = features_of(reals.images, critic.backbone)
        for cached, new in zip(reals.features(critic), now, strict=True):
            torch.testing.assert_close(cached, new, rtol=1e-4, atol=1e-5)


def test_each_backbone_runs_on_the_students_images_once_per_step(
    new_state: NewState, small_backbones: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # CLIP is identity encoder and discriminator here.
    names = tuple(str(small_backbones.get(name, name)) for name in ("dino", "clip", "teacher"))
    state = new_state(critic__discriminators=names)
    assert state.identity_encoder in [critic.backbone for critic in state.critics]
    runs: list[tuple[str, bool]] = []
    image_features, latent_features = ImageBackbone.features, TeacherBackbone.features
    batch = state.config.train.batch_size

    def of_image(backbone: ImageBackbone, image: Tensor) -> list[Tensor]:
        runs.append((f"{len(image) // batch} of images", image.requires_grad))
        return image_features(backbone, image)

    def of_latents(backbone: TeacherBackbone, images: ImageBatch) -> list[Tensor]:
        runs.append(("latent", images.latents.requires_grad))
        return latent_features(backbone, images)

    monkeypatch.setattr(ImageBackbone, "features", of_image)
    monkeypatch.setattr(TeacherBackbone, "features", of_latents)
    training_step(state)
    assert sorted(kind for kind, has_gradient in runs if has_gradient) == [
        "1 of images",
        "2 of images",  # the identity encoder sees the target in the same pass
        "latent",
    ]
    # Of the reals only the latent features depend on this step's noise.
    assert [kind for kind, has_gradient in runs if not has_gradient] == ["latent"]


def test_discriminators_do_not_see_the_students_scenes(new_state: NewState, monkeypatch: pytest.MonkeyPatch) -> None:
    state = new_state(train__scene_share=0.5, train__batch_size=4, concept__scenes=("a {} on the moon",))
    prompts: list[str] = []
    encode = state.pair.encoder.encode

    def noted(texts: Sequence[str]) -> Conditioning:
        prompts.extend(texts)
        return encode(texts)

    monkeypatch.setattr(state.pair.encoder, "encode", noted)
    generated = student_pass(state)
    assert ["on the moon" in prompt for prompt in prompts[:4]] == [False, False, True, True]
    assert generated.photo_prompts == 2
    for critic in state.critics:
        assert all(len(tap) == 2 for tap in critic_features(state, generated, critic))
    assert state.identity_encoder is not None
    assert len(features_of(generated.images, state.identity_encoder)[0]) == 4
    take_steps(state, 1)


def test_the_one_step_target_is_renoised_with_the_students_own_noise(new_state: NewState) -> None:
    # Computed from the inputs of both networks, with the alphas of diffusers.
    state = new_state()
    inputs_of: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _module, inputs: inputs_of.update({name: (inputs[0].float(), inputs[1])})

    hooks = [
        unet.register_forward_pre_hook(watch(name))
        for name, unet in (("student", state.pair.student.unet), ("teacher", state.pair.teacher.unet))
    ]
    generated = student_pass(state)
    for hook in hooks:
        hook.remove()
    alphas = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    student_noise = inputs_of["student"][0] / (1 - alphas[999]).sqrt()
    noisy, timesteps = inputs_of["teacher"][0].chunk(2)[0], inputs_of["teacher"][1].chunk(2)[0]
    signal = alphas[timesteps].view(-1, 1, 1, 1)
    renoised_with = (noisy - signal.sqrt() * generated.images.latents.detach()) / (1 - signal).sqrt()
    torch.testing.assert_close(renoised_with, student_noise, atol=1e-4, rtol=1e-4)
