"""Students of several steps: each step is trained where the student is when it gets there by itself."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from echodistill_cli.config.build import build_config
from echodistill_cli.diffusion.sampling import student_start, student_x0, teacher_x0
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.outputs.artifact import find
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.pipeline import train
from echodistill_cli.planning import assumptions
from echodistill_cli.training import batches
from echodistill_cli.training.batches import student_pass
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import begin, echo_step, replay_step
from echodistill_cli.training.targets import draw_start, replay_batch
from tests.helpers.random_models import write_distillation
from tests.helpers.runs import (
    NewState,
    checkpoint_of,
    export_files,
    moved,
    same,
    seeded,
    small_tables,
    student_pass_at,
    take_steps,
    trained,
)

FOUR = (999, 749, 499, 249)
FEW: dict[str, Any] = {"model__student_timesteps": FOUR}
REPLAYS: dict[str, Any] = {"train__target_steps": 3, "train__target_strength": 0.8, "train__replays": 1}
RECIPE: dict[str, Any] = REPLAYS | {
    "train__first_targets": 4,
    "train__class_share": 0.3,
    "train__pair_share": 0.3,
    "loss__paired": 0.3,
    "loss__prior": 0.5,
    "echo__start": 1,
}


@contextmanager
def calls_of(unet: Any) -> Iterator[list[tuple[list[int], bool]]]:
    """The timesteps of each forward pass of a UNet, and whether it builds a graph."""
    calls: list[tuple[list[int], bool]] = []

    def note(_module: Any, inputs: tuple[Any, ...]) -> None:
        calls.append((inputs[1].tolist(), torch.is_grad_enabled()))

    hook = unet.register_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def test_a_student_of_one_step_takes_its_own_noise_from_the_stream_and_nothing_else(new_state: NewState) -> None:
    # What every run did before students could have several steps, by hand.
    state, again = new_state(), new_state()
    generated = student_pass_at(state, 7)
    again.generator.manual_seed(7)
    pair, size = again.pair, again.config.train.batch_size
    with torch.no_grad():
        conditioning, null = pair.encoder.encode_with_null(batches._student_prompts(again, 0))
        noise = torch.randn(size, 4, 8, 8, generator=again.generator)
        alpha_bar = pair.student.schedule.alphas_cumprod[-1]
        noisy = (1 - alpha_bar).sqrt() * noise
        x0 = noisy - (1 - alpha_bar).sqrt() * pair.student(noisy, torch.full((size,), 999), conditioning)
        x0 /= alpha_bar.sqrt()
        renoise, timesteps = again.randn_like(noise), again.randint(1000, size)
        noised = add_noise(pair.teacher.schedule, generated.images.latents.detach(), noise, timesteps)
        target = teacher_x0(pair.teacher, noised, timesteps, conditioning, null, 7.5)
    assert torch.equal(generated.images.latents, x0)
    assert torch.equal(generated.images.noise, renoise)
    assert torch.equal(generated.images.timesteps, timesteps)
    assert torch.equal(generated.target.latents, target)
    assert torch.equal(state.generator.get_state(), again.generator.get_state())


def passes_by_place(state: TrainingState) -> dict[int, int]:
    """A seed of the run's generator for each step that a student pass can draw."""
    seeds: dict[int, int] = {}
    for seed in range(40):
        with calls_of(state.pair.student.unet) as calls:
            student_pass_at(state, seed)
        seeds.setdefault(len(calls) - 1, seed)
        if len(seeds) == len(FOUR):
            break
    return seeds


def test_a_training_pass_samples_down_to_one_of_the_steps_and_has_a_gradient_in_that_one(new_state: NewState) -> None:
    state = new_state(**FEW)
    assert state.pair.student.sampler == "lcm"
    seeds = passes_by_place(state)
    assert sorted(seeds) == [0, 1, 2, 3]
    for place, seed in seeds.items():
        with calls_of(state.pair.student.unet) as calls, calls_of(state.pair.teacher.unet) as of_the_teacher:
            generated = student_pass_at(state, seed)
        assert [timesteps[0] for timesteps, _ in calls] == list(FOUR[: place + 1])
        assert [has_graph for _, has_graph in calls] == [False] * place + [True]
        assert generated.images.latents.grad_fn is not None
        # The target is no noisier than the student's input, which shows the image already.
        assert max(max(timesteps) for timesteps, _ in of_the_teacher) <= (999 if place == 0 else FOUR[place])


def test_the_step_that_is_trained_starts_on_the_students_own_trajectory(new_state: NewState) -> None:
    state = new_state(**FEW, model__student_sampler="ddim")
    with torch.no_grad():
        conditioning = state.pair.encoder.encode(["a sks dog"] * 2)
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    places = set()
    for seed in range(12):
        state.generator.manual_seed(seed)
        start = draw_start(state, noise, conditioning)
        expected = student_start(state.pair.student, noise, conditioning, start.place, lambda: noise)
        assert torch.equal(start.latents, expected.latents)
        places.add(start.place)
    assert places == {0, 1, 2, 3}


def test_targets_of_several_steps_start_at_the_students_timestep(new_state: NewState) -> None:
    state = new_state(**FEW, **REPLAYS)
    for place, seed in passes_by_place(state).items():
        with calls_of(state.pair.teacher.unet) as calls:
            student_pass_at(state, seed)
        last = FOUR[place] + 1
        expected = [round(last - index * last / 3) - 1 for index in range(3)][1:]
        assert [timesteps[0] for timesteps, _ in calls] == expected


def test_replays_repeat_the_step_that_each_target_is_of(new_state: NewState) -> None:
    state = new_state(**FEW, **RECIPE | {"loss__paired": 0.0}, train__batch_size=8)
    begin(state)
    assert len(set(state.replay_buffer.places)) > 1
    assert state.prior is not None
    assert set(state.prior.places) == {0, 1, 2, 3}
    x0s = state.prior.latents
    with torch.no_grad():
        rows = [0, 8, 16, 24]
        places = [state.prior.places[row] for row in rows]
        again = student_x0(state.pair.student, state.prior.noise[rows], state.prior.conditioning.take(rows), places)
    torch.testing.assert_close(again, x0s[rows], rtol=1e-3, atol=1e-3)  # its LoRA does nothing yet

    state.generator.manual_seed(5)
    batch = replay_batch(state)
    state.generator.manual_seed(5)
    before = trained(state)
    with calls_of(state.pair.student.unet) as calls:
        metrics = replay_step(state)
    assert calls == [([FOUR[place] for place in batch.places], True)]
    assert moved(before, state) == {"student"}
    assert math.isfinite(float(metrics["replay"]))


def test_the_echo_looks_at_finished_images(new_state: NewState) -> None:
    state = new_state(**FEW, train__batch_size=4)
    with calls_of(state.pair.student.unet) as calls:
        echo_step(state)
    assert calls == [([t] * 4, False) for t in FOUR]


def test_the_whole_recipe_trains_and_resumes_to_the_bit(new_state: NewState) -> None:
    without_prior = {"train__class_share": 0.0, "loss__prior": 0.0, "train__first_targets": 2}
    changes = FEW | RECIPE | without_prior | {"train__head_start": 1, "train__carry_over": True}
    first, second = new_state(**changes), new_state(**changes)
    before = trained(first)
    metrics = take_steps(first, 1)
    assert moved(before, first) >= {"student", "teacher", "discriminators", "paired"}
    assert {"latent", "replay", "paired", "echo_kept"} <= set(metrics[0])
    second.load_state_dict(checkpoint_of(first))
    assert take_steps(first, 1) == take_steps(second, 1)
    assert same(trained(first), trained(second))


def test_sdxl_base_with_a_published_four_step_lora_is_a_student_of_four_steps(
    small_sdxl_pair: tuple[Path, Path], small_backbones: dict[str, Path], photo_folder: Path, tmp_path: Path
) -> None:
    base = small_sdxl_pair[1]
    lora = write_distillation(base, tmp_path / "dmd2_sdxl_4step_lora.safetensors")
    tables = small_tables((base, base), small_backbones)
    overrides = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    del overrides["model.student"], overrides["model.teacher"]
    overrides |= {"concept.photos": str(photo_folder), "model.student_lora": str(lora), "run.sample_seeds": 1}
    overrides |= {"train.steps": 1, "train.lr": 0.1, "run.output": str(tmp_path / "run"), "text.form": "frozen"}
    config = build_config(str(base), overrides=overrides)
    assert config.model.student_timesteps == FOUR
    (line,) = assumptions(config.model)
    assert line.startswith("dmd2_sdxl_4step_lora.safetensors: 4 steps, guidance 0 (CFG 1), timesteps 999, 749")
    result = train(config)
    assert "together with dmd2_sdxl_4step_lora.safetensors, 4 steps" in str(inspect_file(result.lora).usage)
    assert "**4 steps**" in (result.run / "README.md").read_text(encoding="utf-8")

    (image,) = sample(SampleRequest(["a sks dog"], seed=3, lora=result.run))
    assert (image.texts["steps"], "Sampler: LCM" in image.texts["parameters"]) == ("4", True)
    kept = find(Path(shutil.copy(result.lora, tmp_path))).models(str(base))  # the file alone, without its run
    assert (kept.student_timesteps, kept.student_sampler) == (FOUR, "lcm")
    (folder,) = export_files(result.run, layouts=("pipeline",), output=tmp_path, dtype="fp32")
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 64, "guidance_scale": 0.0, "generator": [seeded(3)], "output_type": "np"}
    for steps in ({"num_inference_steps": 4}, {"timesteps": list(FOUR)}):
        settings["generator"] = [seeded(3)]
        stock = pipeline("a sks dog", **settings, **steps).images[0]
        assert np.abs(np.asarray(image.image) - 255 * stock).max() < 2


def test_a_student_that_predicts_the_image_itself_trains(new_state: NewState) -> None:
    state = new_state(model__student_prediction="sample", **REPLAYS)
    noise, conditioning = torch.randn(1, 4, 8, 8, generator=seeded(1)), state.pair.encoder.encode(["a dog"])
    noisy, timesteps = state.pair.student.pure_noise(noise)
    with torch.no_grad():
        output = state.pair.student(noisy, timesteps, conditioning)
        assert torch.equal(student_x0(state.pair.student, noise, conditioning), output)
    before = trained(state)
    take_steps(state, 1)
    assert "student" in moved(before, state)
    assert state.state_dict()["prediction_types"] == {"student": "sample", "teacher": "v_prediction"}


def test_a_checkpoint_of_an_older_version_has_targets_of_first_steps(new_state: NewState) -> None:
    state, resumed = new_state(**REPLAYS), new_state(**REPLAYS)
    student_pass(state)
    old = checkpoint_of(state)
    assert set(old["targets"].pop("places")) == {0}
    resumed.load_state_dict(old)
    assert resumed.replay_buffer.places == [0] * len(resumed.replay_buffer)
    assert take_steps(resumed, 1) == take_steps(state, 1)


def test_with_offload_the_steps_are_the_same(new_state: NewState) -> None:
    changes = FEW | {"critic__discriminators": (), "loss__adversarial": 0.0}
    plain, alternating = new_state(**changes), new_state(**changes, model__offload=True)
    assert alternating.pair.alternating
    # Without offload several layers are one product, which rounds otherwise.
    (expected,), (metrics,) = take_steps(plain, 1), take_steps(alternating, 1)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-7)
