"""Drawing pictures: as diffusers does, and each by its own seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from torch import Tensor

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.pair import Denoiser, ModelPair, Sampler
from echodistill_cli.diffusion.sampling import (
    SamplingSettings,
    StudentStart,
    generate,
    seeded_noise,
    seeded_noises,
    student_sample,
    student_start,
    student_x0,
    teacher_x0,
    to_uint8,
)
from echodistill_cli.diffusion.schedule import PredictionType, add_noise, guide, predict_x0
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ConfigError, EchoDistillError, ModelError
from echodistill_cli.models.load import load_pair
from tests.helpers.commands import missing_flags

PROMPTS = ("a photo of a dog", "a cat in the snow", "a teapot on the beach", "", "a very small toy")
SEEDS = (11, 12, 13, 14, 15)
FOUR = (999, 749, 499, 249)


@pytest.fixture(scope="module")
def pair(small_pair: tuple[Path, Path]) -> ModelPair:
    student, teacher = map(str, small_pair)
    return load_pair(ModelConfig(student=student, teacher=teacher, resolution=64, device="cpu", offline=True))


def starting_at(pair: ModelPair, *timesteps: int, sampler: Sampler = "ddim") -> Denoiser:
    """The student with timesteps of its own."""
    return replace(pair.student, timesteps=timesteps, sampler=sampler)


def draw(pair: ModelPair, **settings: Any) -> np.ndarray:
    drawn = generate(pair, PROMPTS, SEEDS, SamplingSettings(**{"size": 64, "batch_size": 5} | settings))
    return np.stack([pixels.numpy() for pixels in drawn]).astype(int)


def draw_with_diffusers(folder: Path, **settings: Any) -> np.ndarray:
    """The same pictures by a stock pipeline over the same files."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    noise = seeded_noise(SEEDS, (4, 8, 8))
    images = pipeline(list(PROMPTS), latents=noise, height=64, width=64, output_type="np", **settings).images
    return (np.asarray(images) * 255).round().astype(int)


def test_one_step_pictures_are_those_of_diffusers(pair: ModelPair, small_pair: tuple[Path, Path]) -> None:
    expected = draw_with_diffusers(small_pair[0], num_inference_steps=1, guidance_scale=0.0)
    drawn = draw(pair)
    assert np.abs(drawn - expected).max() <= 1
    assert drawn.std() > 5
    assert np.abs(drawn[0] - drawn[1]).mean() > 5


def test_the_student_with_several_steps_is_diffusers_too(pair: ModelPair, small_pair: tuple[Path, Path]) -> None:
    expected = draw_with_diffusers(small_pair[0], num_inference_steps=3, guidance_scale=0.0)
    assert np.abs(draw(pair, steps=3) - expected).max() <= 1


def test_a_student_that_starts_earlier_is_given_unit_noise_and_its_own_timestep(pair: ModelPair) -> None:
    early, conditioning = starting_at(pair, 399), pair.encoder.encode(["a dog"])
    noise, timesteps = seeded_noise([3], (4, 8, 8)), torch.tensor([399])
    alpha_bar = early.schedule.alphas_cumprod[399]
    with torch.no_grad():
        output = pair.student(noise, timesteps, conditioning)
        x0 = student_x0(early, noise, conditioning)
    torch.testing.assert_close(x0, (noise - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt())
    assert not torch.allclose(x0, student_x0(pair.student, noise, conditioning), atol=0.1)
    only = replace(pair, student=early)
    assert np.array_equal(draw(only)[0], to_uint8(pair.codec.decode(_first_x0(only)))[0].numpy().astype(int))
    assert np.array_equal(draw(only, role="teacher", steps=2), draw(pair, role="teacher", steps=2))


def _first_x0(pair: ModelPair) -> Tensor:
    with torch.no_grad():
        return student_x0(pair.student, seeded_noise(SEEDS, (4, 8, 8)), pair.encoder.encode(PROMPTS))


def test_one_step_at_an_earlier_timestep_is_that_of_diffusers_lcm_scheduler(
    pair: ModelPair, small_pair: tuple[Path, Path]
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(small_pair[0], safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    noise = seeded_noise(SEEDS, (4, 8, 8))
    settings = {"timesteps": [399], "guidance_scale": 0.0, "height": 64, "width": 64, "output_type": "np"}
    expected = (np.asarray(pipeline(list(PROMPTS), latents=noise, **settings).images) * 255).round().astype(int)
    assert np.abs(draw(replace(pair, student=starting_at(pair, 399))) - expected).max() <= 1


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}),
    "lcm": (LCMScheduler, {}),
}


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_few_steps_give_the_latents_of_diffusers_from_the_same_seeds(
    pair: ModelPair, small_pair: tuple[Path, Path], sampler: Sampler, prediction: PredictionType
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(small_pair[0], safety_checker=None, feature_extractor=None)
    pipeline.set_progress_bar_config(disable=True)
    kind, settings = SCHEDULERS[sampler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, prediction_type=prediction, **settings)
    steps: dict[str, Any] = {"timesteps": list(FOUR)} if sampler == "lcm" else {"num_inference_steps": 4}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    common: dict[str, Any] = {"guidance_scale": 0.0, "height": 64, "width": 64, "output_type": "latent"}
    expected = pipeline(list(PROMPTS), generator=generators, **common, **steps).images

    student = starting_at(pair, *FOUR, sampler=sampler)
    student = replace(student, schedule=replace(student.schedule, prediction_type=prediction))
    noises, conditioning = seeded_noises(SEEDS, (4, 8, 8)), pair.encoder.encode(PROMPTS)
    with torch.no_grad():
        latents = student_sample(student, next(noises), conditioning, noises.__next__)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_an_image_in_few_steps_is_where_the_last_step_ends(pair: ModelPair) -> None:
    student = starting_at(pair, *FOUR, sampler="lcm")
    few = replace(pair, student=student)
    noises, conditioning = seeded_noises(SEEDS, (4, 8, 8)), pair.encoder.encode(PROMPTS)
    with torch.no_grad():
        latents = student_sample(student, next(noises), conditioning, noises.__next__)
    assert np.array_equal(draw(few, steps=4), to_uint8(pair.codec.decode(latents)).numpy().astype(int))
    one = draw(few, steps=1)  # of the first timestep
    assert np.abs(draw(few, steps=4) - one).mean() > 1
    assert np.array_equal(one, draw(replace(pair, student=starting_at(pair, 999)), steps=1))


@torch.no_grad()
def test_each_step_starts_where_the_sampler_is_by_then_and_knows_the_noise_in_it(pair: ModelPair) -> None:
    conditioning, noise = pair.encoder.encode(PROMPTS[:2]), seeded_noise(SEEDS[:2], (4, 8, 8))
    fresh = seeded_noise(SEEDS[2:4], (4, 8, 8))
    for sampler in SCHEDULERS:
        student = starting_at(pair, *FOUR, sampler=sampler)  # type: ignore[arg-type]
        assert student_start(student, noise, conditioning, 0, lambda: fresh) == StudentStart(noise, noise)
        first = student_x0(student, noise, conditioning)
        start = student_start(student, noise, conditioning, 1, lambda: fresh)
        at = torch.tensor([749, 749])
        torch.testing.assert_close(add_noise(student.schedule, first, start.noise, at), start.latents)
        assert torch.allclose(start.noise, fresh, atol=1e-3) == (sampler == "lcm")
        assert not torch.allclose(start.noise, noise, atol=1e-3)
        assert start.places == [1, 1]


@torch.no_grad()
def test_steps_at_different_places_share_a_batch(pair: ModelPair) -> None:
    student, conditioning = starting_at(pair, *FOUR, sampler="euler"), pair.encoder.encode(PROMPTS[:3])
    latents = seeded_noise(SEEDS[:3], (4, 8, 8))
    together = student_x0(student, latents, conditioning, [0, 3, 1])
    for row, place in enumerate((0, 3, 1)):
        alone = student_x0(student, latents[[row]], conditioning.take([row]), [place])
        torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], student_x0(starting_at(pair, 999), latents, conditioning)[0])  # unit noise


def test_a_timestep_after_the_last_one_is_refused(pair: ModelPair) -> None:
    with pytest.raises(ConfigError, match=r"--student-timesteps 1000 is after the last timestep, 999"):
        starting_at(pair, 1000)


def test_the_guided_teacher_in_several_steps_is_diffusers(pair: ModelPair, small_pair: tuple[Path, Path]) -> None:
    expected = draw_with_diffusers(small_pair[1], num_inference_steps=4, guidance_scale=7.5)
    drawn = draw(pair, role="teacher", steps=4, guidance_scale=7.5)
    assert np.abs(drawn - expected).max() <= 1
    assert np.abs(drawn - draw(pair, role="teacher", steps=4)).max() > 1


def test_a_picture_depends_on_its_own_seed_and_prompt_alone(pair: ModelPair) -> None:
    together = draw(pair)
    for batch_size in (1, 2):
        assert np.abs(draw(pair, batch_size=batch_size) - together).max() <= 1
    alone = next(iter(generate(pair, PROMPTS[3:4], SEEDS[3:4], SamplingSettings(size=64))))
    assert np.abs(alone.numpy().astype(int) - together[3]).max() <= 1
    assert np.array_equal(draw(pair), together)


def test_guidance_0_and_1_both_mean_without(pair: ModelPair) -> None:
    without = draw(pair, role="teacher", steps=2)
    assert np.array_equal(draw(pair, role="teacher", steps=2, guidance_scale=1.0), without)


def test_pictures_of_another_size_can_be_drawn(pair: ModelPair) -> None:
    shapes = {tuple(pixels.shape) for pixels in generate(pair, PROMPTS[:1], SEEDS[:1], SamplingSettings(size=96))}
    assert shapes == {(96, 96, 3)}


def test_a_picture_that_overflows_is_an_error_whose_remedies_each_command_has(small_pair: tuple[Path, Path]) -> None:
    student, teacher = map(str, small_pair)
    own = load_pair(ModelConfig(student=student, teacher=teacher, resolution=64, device="cpu", offline=True))
    with torch.no_grad():
        own.codec.decoder.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(EchoDistillError, match=r"not finite.*--precision fp32") as told:
        draw(own)
    assert not missing_flags(str(told.value.hint), "train", "sample", "evaluate")
    with torch.no_grad():  # a damaged file: no precision and no other VAE is the remedy
        own.student.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"The student is damaged: its weight conv_out\.bias holds NaN"):
        draw(own)


def test_noise_is_one_draw_per_seed_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    noise = seeded_noise([3, 4, 3], (4, 8, 8))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], seeded_noise([4], (4, 8, 8)))
    assert torch.equal(torch.get_rng_state(), state)


def encoded(pair: ModelPair) -> tuple[Conditioning, Conditioning]:
    with torch.no_grad():
        return pair.encoder.encode(PROMPTS[:2]), pair.encoder.encode_null()


def noised(pair: ModelPair) -> tuple[Tensor, Tensor]:
    noise, timesteps = seeded_noise(SEEDS[:2], (4, 8, 8)), torch.tensor([100, 800])
    return add_noise(pair.teacher.schedule, noise.flip(0), noise, timesteps), timesteps


@torch.no_grad()
def test_the_teachers_target_is_guidance_on_two_plain_passes(pair: ModelPair) -> None:
    conditioning, null = encoded(pair)
    noisy, timesteps = noised(pair)
    outputs = [pair.teacher(noisy, timesteps, c) for c in (conditioning, null.expand(2))]
    expected = predict_x0(pair.teacher.schedule, guide(outputs[0], outputs[1], 7.5), noisy, timesteps)
    target = teacher_x0(pair.teacher, noisy, timesteps, conditioning, null, 7.5)
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)
    plain = predict_x0(pair.teacher.schedule, outputs[0], noisy, timesteps)
    torch.testing.assert_close(teacher_x0(pair.teacher, noisy, timesteps, conditioning, null, 1.0), plain)


def test_the_students_picture_has_a_gradient_through_its_unet(pair: ModelPair) -> None:
    conditioning, _ = encoded(pair)
    noise = seeded_noise(SEEDS[:2], (4, 8, 8)).requires_grad_()
    x0 = student_x0(pair.student, noise, conditioning)
    x0.sum().backward()
    assert x0.dtype == torch.float32
    assert noise.grad is not None
    assert noise.grad.abs().sum() > 0


def test_pixels_are_rounded_and_clipped() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 0.0]).view(1, 3, 1, 2)
    pixels = to_uint8(values)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 1, 2, 3)
    assert pixels.flatten().tolist() == [0, 128, 255, 0, 255, 128]


class EchoOfTheInput(torch.nn.Module):
    """Answers with exactly the noise that its rounded input holds, so that x0 is exactly 0."""

    def __init__(self, dtype: torch.dtype, sigma: float) -> None:
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 4, 1, dtype=dtype)
        self.sigma = sigma

    def forward(self, noisy: Tensor, _timesteps: Tensor, **_rest: Any) -> tuple[Tensor]:
        return (noisy.float() / self.sigma,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_x0_is_computed_from_the_input_as_the_unet_reads_it(pair: ModelPair, dtype: torch.dtype) -> None:
    # Rounding the input alone would leave errors in x0 of 0.024 in bfloat16 and 0.003 in float16.
    schedule = replace(pair.student.schedule, prediction_type="epsilon")
    sigma = float((1 - schedule.alphas_cumprod[-1].double()).sqrt())
    student = Denoiser(EchoOfTheInput(dtype, sigma), schedule)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = Conditioning(torch.zeros(2, 1, 8))
    assert student_x0(student, noise, conditioning).abs().max() < 2e-5
    last = torch.full((2,), schedule.last_timestep)
    noisy = sigma * noise
    assert teacher_x0(student, noisy, last, conditioning, conditioning.take([0]), 1.0).abs().max() < 2e-5
