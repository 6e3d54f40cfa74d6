"""Our closed forms against diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_scm import SCMScheduler
from torch import Tensor

from echodistill_cli.diffusion.schedule import (
    NoiseSchedule,
    PredictionType,
    add_noise,
    ddim_step,
    flow_schedule,
    guide,
    noise_from_x0,
    predict_x0,
    prediction_target,
    pure_noise,
    trailing_timesteps,
)
from echodistill_cli.errors import ConfigError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
each_prediction = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])


def schedule(prediction: PredictionType = "epsilon") -> NoiseSchedule:
    return NoiseSchedule(DDPMScheduler(**BETAS).alphas_cumprod, prediction)


def drawn(seed: int, batch: int = 5) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def unet(noisy: Tensor, timestep: int) -> Tensor:
    """Stands for a model: any fixed function of z_t and t."""
    return torch.sin(3 * noisy + timestep / 250)


LATENTS, NOISE, TIMESTEPS = drawn(0), drawn(1), torch.tensor([0, 1, 250, 749, 999])


def test_noise_is_added_as_by_diffusers_ddpm() -> None:
    expected = DDPMScheduler(**BETAS).add_noise(LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(add_noise(schedule(), LATENTS, NOISE, TIMESTEPS), expected, rtol=0, atol=1e-6)


def test_the_v_target_is_diffusers_velocity_and_the_epsilon_target_is_the_noise() -> None:
    expected = DDPMScheduler(**BETAS).get_velocity(LATENTS, NOISE, TIMESTEPS)
    target = prediction_target(schedule("v_prediction"), LATENTS, NOISE, TIMESTEPS)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
    assert torch.equal(prediction_target(schedule(), LATENTS, NOISE, TIMESTEPS), NOISE)


@each_prediction
def test_x0_comes_back_from_a_perfect_prediction(prediction: PredictionType) -> None:
    noisy = add_noise(schedule(), LATENTS, NOISE, TIMESTEPS)
    output = prediction_target(schedule(prediction), LATENTS, NOISE, TIMESTEPS)
    x0 = predict_x0(schedule(prediction), output, noisy, TIMESTEPS)
    torch.testing.assert_close(x0, LATENTS, rtol=0, atol=2e-5)


def test_the_noise_comes_back_from_x0() -> None:
    noisy = add_noise(schedule(), LATENTS, NOISE, TIMESTEPS)
    # At t = 0 the noise is all but gone: its error is amplified 34 times.
    torch.testing.assert_close(noise_from_x0(schedule(), LATENTS, noisy, TIMESTEPS), NOISE, rtol=0, atol=1e-4)


def test_half_precision_goes_in_and_single_precision_comes_out() -> None:
    half = [tensor.half() for tensor in (LATENTS, NOISE)]
    for function in (add_noise, prediction_target, predict_x0, noise_from_x0):
        assert function(schedule(), half[0], half[1], TIMESTEPS).dtype == torch.float32
    assert pure_noise(schedule(), half[0]).dtype == torch.float32
    assert guide(half[0], half[1], 2.0).dtype == torch.float32


@each_prediction
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_path_of_ddim_steps_is_diffusers_euler_path_with_trailing_spacing(
    prediction: PredictionType, steps: int
) -> None:
    euler = EulerDiscreteScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing")
    euler.set_timesteps(steps)
    sample = NOISE * euler.init_noise_sigma
    noisy = pure_noise(schedule(prediction), NOISE)
    timesteps = trailing_timesteps(schedule(prediction), steps)
    assert euler.timesteps.tolist() == timesteps
    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        scaled = euler.scale_model_input(sample, float(now))
        torch.testing.assert_close(noisy, scaled, rtol=0, atol=1e-4)
        sample = euler.step(unet(scaled, now), float(now), sample).prev_sample
        at = torch.full((len(noisy),), now)
        x0 = predict_x0(schedule(prediction), unet(noisy, now), noisy, at)
        noisy = x0 if then is None else ddim_step(schedule(prediction), x0, noisy, now, then)
    torch.testing.assert_close(noisy, sample, rtol=1e-4, atol=1e-3)


@each_prediction
def test_a_ddim_step_is_diffusers_with_eta_0(prediction: PredictionType) -> None:
    ddim = DDIMScheduler(
        **BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    ddim.set_timesteps(4)
    timesteps = ddim.timesteps.tolist()
    ours = theirs = NOISE
    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        at = torch.full((len(ours),), now)
        x0 = predict_x0(schedule(prediction), unet(ours, now), ours, at)
        ours = x0 if then is None else ddim_step(schedule(prediction), x0, ours, now, then)
        theirs = ddim.step(unet(theirs, now), now, theirs, eta=0.0).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_one_step_starts_at_the_noise_level_of_the_last_timestep() -> None:
    assert schedule().last_timestep == 999
    at_last = add_noise(schedule(), torch.zeros_like(NOISE), NOISE, torch.full((5,), 999))
    torch.testing.assert_close(pure_noise(schedule(), NOISE), at_last)


@pytest.mark.parametrize(("steps", "expected"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_trailing_timesteps_start_at_the_last_one(steps: int, expected: list[int]) -> None:
    assert trailing_timesteps(schedule(), steps) == expected


@pytest.mark.parametrize(("steps", "expected"), [(1, [399]), (2, [399, 199]), (4, [399, 299, 199, 99])])
def test_trailing_timesteps_can_start_earlier(steps: int, expected: list[int]) -> None:
    assert trailing_timesteps(schedule(), steps, 399) == expected


def test_no_timestep_comes_twice() -> None:
    assert trailing_timesteps(schedule(), 1000) == list(range(999, -1, -1))
    for steps, first in ((1001, None), (2500, None), (401, 399)):  # the last step of 2,500 would be at timestep -1
        with pytest.raises(ConfigError, match=rf"--steps {steps} is more than .* timesteps"):
            trailing_timesteps(schedule(), steps, first)


@pytest.mark.parametrize("steps", [3, 7, 25, 30, 50])
def test_trailing_timesteps_equal_diffusers(steps: int) -> None:
    euler = EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    euler.set_timesteps(steps)
    assert trailing_timesteps(schedule(), steps) == euler.timesteps.tolist()


def test_guidance_is_the_unconditional_at_0_and_the_conditional_at_1_and_goes_on_from_there() -> None:
    assert torch.equal(guide(LATENTS, NOISE, 0.0), NOISE)
    torch.testing.assert_close(guide(LATENTS, NOISE, 1.0), LATENTS)
    torch.testing.assert_close(guide(LATENTS, NOISE, 7.5), NOISE + 7.5 * (LATENTS - NOISE))


@each_prediction
def test_guiding_the_output_is_guiding_x0(prediction: PredictionType) -> None:
    noisy, at = add_noise(schedule(), LATENTS, NOISE, TIMESTEPS), TIMESTEPS
    first, second = unet(noisy, 1), unet(noisy, 2)
    guided = predict_x0(schedule(prediction), guide(first, second, 7.5), noisy, at)
    x0s = [predict_x0(schedule(prediction), output, noisy, at) for output in (first, second)]
    torch.testing.assert_close(guided, guide(x0s[0], x0s[1], 7.5), rtol=1e-4, atol=1e-3)


# --- rectified flow ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_noised_as_by_diffusers_flow_matching(shift: float) -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = flow_schedule(shift)
    # diffusers counts from 1000 down, and its timesteps are 1000 σ.
    expected = euler.scale_noise(LATENTS, euler.timesteps[999 - TIMESTEPS], NOISE)
    torch.testing.assert_close(add_noise(flow, LATENTS, NOISE, TIMESTEPS), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(1000 * flow.times(TIMESTEPS), euler.timesteps[999 - TIMESTEPS], rtol=1e-6, atol=1e-4)


def test_a_flow_gives_noise_and_latent_back() -> None:
    flow = flow_schedule(3.0)
    noisy = add_noise(flow, LATENTS, NOISE, TIMESTEPS)
    velocity = prediction_target(flow, LATENTS, NOISE, TIMESTEPS)
    assert torch.equal(velocity, NOISE - LATENTS)
    torch.testing.assert_close(predict_x0(flow, velocity, noisy, TIMESTEPS), LATENTS, rtol=0, atol=1e-5)
    torch.testing.assert_close(noise_from_x0(flow, LATENTS, noisy, TIMESTEPS), NOISE, rtol=0, atol=1e-3)
    assert torch.equal(pure_noise(flow, NOISE), NOISE)
    torch.testing.assert_close(pure_noise(flow, NOISE, 499), 0.75 * NOISE)
    # Losses are weighted by the share of the signal in the variance.
    sigma = flow.times(TIMESTEPS)
    expected = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    torch.testing.assert_close(flow.alpha_bar(TIMESTEPS), expected)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (4, 1.0), (4, 3.0)])
def test_a_path_of_ddim_steps_in_a_flow_is_diffusers_euler_path(steps: int, shift: float) -> None:
    euler, flow = FlowMatchEulerDiscreteScheduler(shift=shift), flow_schedule(shift)
    euler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)])
    timesteps = trailing_timesteps(flow, steps)
    ours = theirs = NOISE
    for now, then, t in zip(timesteps, [*timesteps[1:], None], euler.timesteps, strict=True):
        at = torch.full((len(ours),), now)
        x0 = predict_x0(flow, unet(ours, now), ours, at)
        ours = x0 if then is None else ddim_step(flow, x0, ours, now, then)
        theirs = euler.step(unet(theirs, now), t, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_trigflow_is_the_same_flow_in_other_coordinates() -> None:
    # SANA-Sprint's pipeline converts between them; what is left is x0 = z_t - σ v, and the next z_t.
    scm, flow, sigma_data = SCMScheduler(), flow_schedule(), 0.5
    steps = (949, 499)
    sigmas = [float(flow.times(torch.tensor([t]))) for t in steps]
    angles = [torch.atan2(torch.tensor(s), torch.tensor(1 - s)) for s in sigmas]
    scm.set_timesteps(2, timesteps=[*map(float, angles), 0.0], max_timesteps=None, intermediate_timesteps=None)
    scm.set_begin_index(0)
    at, s, sigma = torch.full((len(LATENTS),), steps[0]), angles[0], sigmas[0]
    z_t = add_noise(flow, LATENTS, NOISE, at)
    velocity = unet(z_t, steps[0])
    norm = (sigma**2 + (1 - sigma) ** 2) ** 0.5
    output = ((1 - 2 * sigma) * z_t + (1 - 2 * sigma + 2 * sigma**2) * velocity) / norm
    sample = sigma_data * (torch.cos(s) * LATENTS + torch.sin(s) * NOISE)
    generator = torch.Generator().manual_seed(5)
    following, x0 = scm.step(sigma_data * output, s, sample, generator=generator, return_dict=False)
    ours = predict_x0(flow, velocity, z_t, at)
    torch.testing.assert_close(x0 / sigma_data, ours, rtol=0, atol=1e-5)
    fresh = torch.randn(NOISE.shape, generator=torch.Generator().manual_seed(5))
    then = torch.full_like(at, steps[1])
    scale = torch.cos(angles[1]) + torch.sin(angles[1])  # from the circle to the line
    expected = add_noise(flow, ours, fresh, then)
    torch.testing.assert_close(following / sigma_data / scale, expected, rtol=0, atol=1e-5)


def test_a_timestep_of_another_flow_is_the_one_with_as_much_noise() -> None:
    plain, shifted = flow_schedule(), flow_schedule(3.0)
    for t in (999, 749, 10):
        there = shifted.timestep_like(plain, t)
        assert abs(float(shifted.times(torch.tensor([there]))) - float(plain.times(torch.tensor([t])))) < 2e-3
    assert shifted.timestep_like(shifted, 321) == 321
    assert schedule().timestep_like(schedule("v_prediction"), 249) == 249
