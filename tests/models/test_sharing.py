"""One base model as student and teacher: a distillation LoRA makes it one-step, and neither role disturbs the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.diffusion.pair import Denoiser, ModelPair
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.models.adapters import DISTILLATION, UNET_LAYERS, add_lora, trainable_parameters
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.pipeline import train
from echodistill_cli.training.state import build_state
from echodistill_cli.training.steps import training_step
from echodistill_cli.training.targets import base_x0
from tests.helpers.random_models import write_distillation
from tests.helpers.runs import small_config, small_photos

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def distillation(small_sdxl_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_distillation(small_sdxl_pair[1], tmp_path_factory.mktemp("distilled") / "one-step.safetensors")


def model(base: Path, lora: Path | None, **changes: Any) -> ModelConfig:
    common: dict[str, Any] = {"student": str(base), "teacher": str(base), "resolution": 64, "offline": True}
    return ModelConfig(**common | {"device": "cpu", "student_lora": None if lora is None else str(lora)} | changes)


@pytest.fixture
def shared(small_sdxl_pair: Pair, distillation: Path) -> ModelPair:
    return load_pair(model(small_sdxl_pair[1], distillation))


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    hidden, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 32, 80), (2, 40)))
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([999, 999]), Conditioning(hidden, pooled)


def gradients(denoiser: Denoiser) -> list[torch.Tensor]:
    return [p.grad.clone() for p in trainable_parameters(denoiser.unet) if p.grad is not None]


# --- one set of weights -----------------------------------------------------------------------------------------------


def test_both_roles_hold_the_very_same_frozen_weights(shared: ModelPair) -> None:
    ours = {name: p.data_ptr() for name, p in shared.teacher.unet.named_parameters()}
    theirs = {
        name.replace(".base_layer", ""): p.data_ptr()
        for name, p in shared.student.unet.named_parameters()
        if f".{DISTILLATION}." not in name
    }
    assert ours == theirs
    assert not any(p.requires_grad for p in (*shared.student.unet.parameters(), *shared.teacher.unet.parameters()))


def test_the_student_is_the_base_with_the_lora_as_stock_diffusers_has_it(
    shared: ModelPair, small_sdxl_pair: Pair, distillation: Path
) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(small_sdxl_pair[1])
    noisy, timesteps, conditioning = inputs()
    added = conditioning.added((64, 64, 0, 0, 64, 64))

    def by_diffusers() -> torch.Tensor:
        output = pipeline.unet(noisy, timesteps, encoder_hidden_states=conditioning.hidden, added_cond_kwargs=added)
        return torch.as_tensor(output.sample)

    with torch.no_grad():
        torch.testing.assert_close(shared.teacher(noisy, timesteps, conditioning), by_diffusers())
        pipeline.load_lora_weights(str(distillation.parent), weight_name=distillation.name)
        expected = by_diffusers()
        torch.testing.assert_close(shared.student(noisy, timesteps, conditioning), expected)
    assert not torch.allclose(expected, shared.teacher(noisy, timesteps, conditioning))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_two_separate_unets(shared: ModelPair, checkpointing: bool) -> None:
    separate = [copy.deepcopy(role.unet) for role in (shared.student, shared.teacher)]
    pairs = [(shared.student, shared.teacher), tuple(Denoiser(u, shared.student.schedule) for u in separate)]
    noisy, timesteps, conditioning = inputs()
    found = []
    for student, teacher in pairs:
        student.time_ids = teacher.time_ids = (64, 64, 0, 0, 64, 64)
        for seed, role in enumerate((student, teacher)):
            add_lora(role.unet, UNET_LAYERS["cross-kv"], 2, 4.0, seed)
            for parameter in trainable_parameters(role.unet):
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            if checkpointing:
                role.unet.enable_gradient_checkpointing()
                role.unet.train()
        # The student's graph is alive while the teacher goes forward and backward: the trap of switched adapters.
        student_loss = student(noisy, timesteps, conditioning).square().mean()
        teacher(noisy, timesteps, conditioning).square().mean().backward()
        student_loss.backward()
        found.append((gradients(student), gradients(teacher)))
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) == len(theirs) > 0
        assert all(gradient.abs().sum() > 0 for gradient in ours)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_a_student_that_is_alone_has_the_lora_in_its_weights(
    shared: ModelPair, small_sdxl_pair: Pair, distillation: Path
) -> None:
    alone = load_pair(model(small_sdxl_pair[1], distillation), teacher=False)
    names = {name for name, _ in UNet2DConditionModel.from_pretrained(small_sdxl_pair[1] / "unet").named_parameters()}
    assert {name for name, _ in alone.student.unet.named_parameters()} == names
    assert not any(parameter.requires_grad for parameter in alone.student.unet.parameters())
    with torch.no_grad():
        expected = shared.student(*inputs())
        torch.testing.assert_close(alone.student(*inputs()), expected, rtol=1e-4, atol=1e-5)


# --- the whole method -------------------------------------------------------------------------------------------------


def configure(base: Path, lora: Path, backbones: dict[str, Path], **changes: Any) -> Config:
    return small_config((base, base), backbones, model__student_lora=str(lora), **changes)


def test_training_moves_both_roles_adapters_and_nothing_else(
    small_sdxl_pair: Pair, distillation: Path, small_backbones: dict[str, Path]
) -> None:
    state = build_state(configure(small_sdxl_pair[1], distillation, small_backbones), small_photos())
    roles = [state.pair.role("student").unet, state.pair.teacher.unet]
    frozen = [{n: p.detach().clone() for n, p in unet.named_parameters() if not p.requires_grad} for unet in roles]
    assert any(f".{DISTILLATION}." in name for name in frozen[0])
    before = [[p.detach().clone() for p in trainable_parameters(unet)] for unet in roles]
    for _ in range(2):
        training_step(state)
    for unet, kept, moved in zip(roles, frozen, before, strict=True):
        named = dict(unet.named_parameters())
        assert all(torch.equal(named[name], value) for name, value in kept.items())
        assert len(moved) == 2 * 2 * 17
        assert not any(torch.equal(a, b) for a, b in zip(moved, trainable_parameters(unet), strict=True))


def test_untouched_a_distilled_base_still_draws_in_one_step(
    small_sdxl_pair: Pair, distillation: Path, small_backbones: dict[str, Path]
) -> None:
    config = configure(small_sdxl_pair[1], distillation, small_backbones, train__lr=0.1)
    state = build_state(config, small_photos())
    noise = torch.randn(1, *state.photos.latents.shape[1:])

    def drawn() -> torch.Tensor:
        with torch.no_grad():
            return student_x0(state.pair.student, noise, state.pair.encoder.encode(["a dog"]))

    before = drawn()
    training_step(state)
    after = drawn()
    assert not torch.equal(before, after)
    torch.testing.assert_close(base_x0(state, noise, ["a dog"]), before)
    assert torch.equal(drawn(), after)


def test_a_run_over_a_distilled_base_writes_files_that_are_read_back_and_drawn_with(
    small_sdxl_pair: Pair, distillation: Path, small_backbones: dict[str, Path], photo_folder: Path, tmp_path: Path
) -> None:
    changes = {"train__steps": 2, "train__lr": 0.1, "run__output": str(tmp_path / "run"), "run__sample_seeds": 1}
    config = configure(small_sdxl_pair[1], distillation, small_backbones, concept__photos=str(photo_folder), **changes)
    result = train(config)
    assert "together with one-step.safetensors, 1 step" in str(inspect_file(result.lora).usage)
    (drawn,) = sample(SampleRequest(["a sks dog"], seed=3, lora=result.run, compare=True))
    assert drawn.base is not None
    assert np.abs(np.asarray(drawn.image).astype(int) - np.asarray(drawn.base).astype(int)).max() > 0
    # The base of the comparison is the one-step model, not the model that was distilled.
    (plain,) = sample(SampleRequest(["a sks dog"], seed=3, lora=result.run, role="teacher", steps=1, compare=True))
    assert plain.base is not None
    assert np.abs(np.asarray(drawn.base).astype(int) - np.asarray(plain.base).astype(int)).max() > 0


# --- what is refused --------------------------------------------------------------------------------------------------


def test_the_model_is_the_teacher_too() -> None:
    config = build_config("someone/base", overrides={"model.student_lora": "one-step.safetensors"})
    assert config.model.teacher == "someone/base"
    with pytest.raises(ConfigError, match="one base model is student and teacher"):
        build_config("sdxl-turbo", overrides={"model.student_lora": "one-step.safetensors"})


def test_a_lora_of_another_family_or_none_is_refused(small_pair: Pair, distillation: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_pair(model(small_pair[0], tmp_path / "none.safetensors"))
    with pytest.raises(ModelError, match=r"one-step\.safetensors"):
        load_pair(model(small_pair[0], distillation))
