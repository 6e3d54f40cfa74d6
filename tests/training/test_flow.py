"""The whole method on small random transformers: SANA-Sprint with SANA, FLUX.2 klein with its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import sample_latents, seeded_noise
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.live.studio import Studio, Wish
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.lora.read import read_lora
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.export import TrainResult
from echodistill_cli.outputs.requests import EvaluationRequest, SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.pipeline import evaluate, train
from echodistill_cli.planning import check_settings
from echodistill_cli.training import batches
from echodistill_cli.training.state import build_state
from echodistill_cli.training.steps import student_step, teacher_step
from tests.helpers.random_models import build_score_encoders
from tests.helpers.runs import (
    checkpoint_of,
    export_files,
    gradients,
    same,
    small_photos,
    small_tables,
    take_steps,
    trained,
)

Pairs = dict[str, tuple[Path, Path]]
Configure = Callable[..., Config]
PROMPT = "a photo of a sks dog"
# Layers with a LoRA: 2 blocks of two attentions; 1 double block of eight layers and 2 single ones of two.
LAYERS = {"sana": 2 * 2 * 4, "flux2": 8 + 2 * 2}
REPLAYS: dict[str, Any] = {"train__target_steps": 3, "train__replays": 1, "train__first_targets": 1}
SHORT: dict[str, Any] = REPLAYS | {"train__steps": 2, "train__head_start": 1, "train__carry_over": True}
SHORT |= {"echo__start": 2, "echo__carry_back": 1, "train__lr": 0.1, "run__sample_seeds": 1, "run__save_every": 1}
each_family = pytest.mark.parametrize("family", ["sana", "flux2"])


@pytest.fixture(scope="module")
def configure(small_flow_pairs: Pairs, small_backbones: dict[str, Path], photo_folder: Path) -> Configure:
    """A short run's settings on a family's pair, as of a person who names the student's folder, with changes by key."""

    def with_changes(family: str, output: Path | str = "run", **changes: Any) -> Config:
        student, teacher = small_flow_pairs[family]
        tables = small_tables((student, teacher), small_backbones)
        values = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
        values |= {"adapter.targets": "attention", "critic.discriminators": (str(small_backbones["dino"]),)}
        values |= {"concept.photos": str(photo_folder), "concept.views": 4, "run.output": str(output)}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        own = ("model.student", "text.form", "text.rank", "text.trained_by")
        values = {key: value for key, value in values.items() if key not in own or key.replace(".", "__") in changes}
        return build_config(str(student), overrides=values)

    return with_changes


@pytest.fixture(scope="module", params=["sana", "flux2"])
def result(request: pytest.FixtureRequest, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family and a finished run of it, which read its own files back."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    return request.param, train(configure(request.param, folder, **SHORT))


@pytest.fixture(scope="module")
def pairs(configure: Configure) -> dict[str, ModelPair]:
    """The loaded pairs, without adapters. Tests must not train them."""
    return {family: load_pair(configure(family).model) for family in LAYERS}


def pipeline_of(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated_by(pipeline: Any, family: str, noise: torch.Tensor, steps: int, **settings: Any) -> np.ndarray:
    """An image by a stock pipeline, [64, 64, 3] in 0…1."""
    settings |= {"height": 64, "width": 64, "output_type": "np", "latents": noise.clone()}
    if family == "sana":
        settings |= {"use_resolution_binning": False}
    if type(pipeline).__name__ == "SanaSprintPipeline":
        settings |= {"intermediate_timesteps": None}
    return np.asarray(pipeline(prompt=PROMPT, num_inference_steps=steps, **settings).images[0])


# --- sampling ---------------------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize(("role", "guidance"), [("student", 0.0), ("teacher", 4.5)])
def test_images_are_those_of_diffusers_pipeline(
    pairs: dict[str, ModelPair], small_flow_pairs: Pairs, family: str, role: Role, guidance: float
) -> None:
    pair, folder = pairs[family], small_flow_pairs[family][role == "teacher"]
    pipeline, steps = pipeline_of(folder), pair.student.steps
    settings: dict[str, Any] = {}
    if role == "teacher":
        # The shift of FLUX.2's teacher is that of so many steps. SANA's own solver is of another order.
        steps = 25 if family == "flux2" else 4
        settings = {"guidance_scale": guidance, "sigmas": [1 - index / steps for index in range(steps)]}
        if family == "sana":
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    side = 64 // pair.codec.factor
    noise = seeded_noise([3], (pair.codec.channels, side, side))
    with torch.no_grad():
        conditioning, null = pair.encoder.encode([PROMPT]), pair.encoder.encode_null()
        latents = sample_latents(pair.role(role), noise, conditioning, null, steps=steps, guidance_scale=guidance)
        ours = (pair.codec.decode(latents)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    expected = generated_by(pipeline, family, noise, steps, **settings)
    assert ours.std() > 0.01
    assert np.abs(ours - expected).max() < 1e-4


def test_sana_sprint_in_two_steps_is_diffusers_pipeline_with_the_same_fresh_noise(
    pairs: dict[str, ModelPair], small_flow_pairs: Pairs
) -> None:
    student = replace(pairs["sana"].student, timesteps=(999, 782), sampler="lcm")
    noise, fresh = seeded_noise([3], (4, 8, 8)), torch.Generator().manual_seed(9)
    encoder = pairs["sana"].encoder
    with torch.no_grad():
        draw = [torch.randn(1, 4, 8, 8, generator=fresh)]
        latents = sample_latents(
            student, noise, encoder.encode([PROMPT]), encoder.encode_null(), steps=2, guidance_scale=0.0, fresh=draw.pop
        )
    pipeline = pipeline_of(small_flow_pairs["sana"][0])
    settings: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "output_type": "latent"}
    angle = float(torch.atan2(torch.tensor(0.783), torch.tensor(1 - 0.783)))
    settings |= {
        "intermediate_timesteps": angle,
        "generator": torch.Generator().manual_seed(9),
        "latents": noise.clone(),
    }
    expected = pipeline(PROMPT, num_inference_steps=2, **settings).images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


@each_family
def test_latents_are_those_of_diffusers_and_prompts_do_not_depend_on_their_batch(
    pairs: dict[str, ModelPair], family: str
) -> None:
    pair = pairs[family]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pair.codec.encode(images)
    assert latents.shape == (1, pair.codec.channels, 64 // pair.codec.factor, 64 // pair.codec.factor)
    if family == "flux2":
        from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

        packed = Flux2KleinPipeline._patchify_latents(pair.codec.encoder.encode(images).latent_dist.mode())
        norm = pair.codec.encoder.bn
        shape = (1, -1, 1, 1)
        spread = (norm.running_var + pair.codec.encoder.config.batch_norm_eps).sqrt()
        expected = (packed - norm.running_mean.view(shape)) / spread.view(shape)
        torch.testing.assert_close(latents, expected)
    both, alone = pair.encoder.encode([PROMPT, "a cat"]), pair.encoder.encode(["a cat"])
    assert torch.equal(both.take([1]).hidden, alone.hidden)
    long = " ".join(["toy"] * 700)
    assert long.endswith(pair.encoder.cut_off(long))
    assert pair.encoder.cut_off(long)
    assert not pair.encoder.cut_off(PROMPT)


# --- training ---------------------------------------------------------------------------------------------------------


@each_family
def test_the_teachers_gradient_is_that_of_the_velocity_by_hand(configure: Configure, family: str) -> None:
    state, again = (build_state(configure(family), small_photos()) for _ in range(2))
    for one in (state, again):
        one.generator.manual_seed(5)
    teacher_step(state)
    batch = batches.teacher_batch(again)
    noise = again.randn_like(batch.latents)
    teacher = again.pair.teacher
    sigma = torch.tensor([float(teacher.schedule.sigmas[t]) for t in batch.timesteps]).view(-1, 1, 1, 1)  # type: ignore[index]
    noisy = (1 - sigma) * batch.latents + sigma * noise
    output = teacher(noisy, batch.timesteps, again.pair.encoder.encode(batch.prompts))
    squared = (output - (noise - batch.latents)) ** 2
    weighted = (squared * batch.masks).mean(dim=(1, 2, 3)) / batch.masks.mean(dim=(1, 2, 3)).clamp(min=1e-8)
    weighted.mean().backward()
    for ours, expected in zip(gradients(state, "teacher"), gradients(again, "teacher"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@each_family
def test_the_students_gradient_is_that_of_its_distance_to_the_target_by_hand(configure: Configure, family: str) -> None:
    changes = {"critic__discriminators": (), "loss__identity": 0.0, "loss__sliced_wasserstein": 0.0}
    changes |= {"loss__adversarial": 0.0, "model__student_timesteps": ()}
    state, again = (build_state(configure(family, **changes), small_photos()) for _ in range(2))
    for one in (state, again):
        one.generator.manual_seed(5)
    generated, _ = student_step(state)
    again.generator.manual_seed(5)
    prompts = batches._student_prompts(again, 0)
    noise = torch.randn(generated.images.latents.shape, generator=again.generator)
    student = again.pair.student
    last = torch.full((len(noise),), 999)
    x0 = noise - student(noise, last, again.pair.encoder.encode(prompts))
    torch.testing.assert_close(x0, generated.images.latents)
    distance = F.mse_loss(x0, generated.target.latents, reduction="none").mean(dim=(1, 2, 3))
    (0.5 * generated.alpha_bar * distance).mean().backward()
    for ours, expected in zip(gradients(state, "student"), gradients(again, "student"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-8)


@each_family
def test_a_run_resumes_to_the_bit(configure: Configure, family: str) -> None:
    first, second = (build_state(configure(family, **REPLAYS), small_photos()) for _ in range(2))
    take_steps(first, 1)
    second.load_state_dict(checkpoint_of(first))
    second.pair.encoder._kept.clear()  # type: ignore[attr-defined]
    assert take_steps(first, 1) == take_steps(second, 1)
    assert same(trained(first), trained(second))


def test_a_later_step_of_the_student_has_targets_at_its_own_noise(configure: Configure) -> None:
    state = build_state(configure("flux2", **REPLAYS), small_photos())
    pair = state.pair
    sigmas = [float(pair.student.schedule.sigmas[t]) for t in pair.student.timesteps]  # type: ignore[index]
    assert pair.student.timesteps == (999, 749, 499, 249)
    assert pair.student.sampler == "euler"
    teacher = pair.teacher.schedule.sigmas
    assert teacher is not None
    for place, sigma in enumerate(sigmas):
        assert abs(float(teacher[pair.teacher_timestep(place)]) - sigma) < 5e-3


@each_family
def test_with_offload_and_checkpointing_the_gradients_are_the_same(configure: Configure, family: str) -> None:
    found = []
    for changes in ({}, {"model__offload": True, "train__gradient_checkpointing": True}):
        state = build_state(configure(family, critic__discriminators=(), **changes), small_photos())
        student_step(state)
        found.append(gradients(state, "student"))
    for plain, lean in zip(*found, strict=True):
        torch.testing.assert_close(plain, lean, rtol=1e-3, atol=1e-7)


# --- files ------------------------------------------------------------------------------------------------------------


def test_stock_diffusers_reads_every_key_and_generates_the_same_image(
    result: tuple[str, TrainResult], small_flow_pairs: Pairs, pairs: dict[str, ModelPair]
) -> None:
    family, run = result
    assert {module.component for module in read_lora(run.lora).modules} == {"transformer"}
    assert len(read_lora(run.lora).modules) == LAYERS[family]
    (generated,) = sample(SampleRequest([PROMPT], seed=7, lora=run.run))
    pair, pipeline = pairs[family], pipeline_of(small_flow_pairs[family][0])
    side = 64 // pair.codec.factor
    noise = seeded_noise([7], (pair.codec.channels, side, side))
    base = generated_by(pipeline, family, noise, pair.student.steps)
    pipeline.load_lora_weights(str(run.lora.parent), weight_name=run.lora.name)
    adapted = [name for name, _ in pipeline.transformer.named_parameters() if ".lora_A." in name]
    assert len(adapted) == LAYERS[family]
    expected = generated_by(pipeline, family, noise, pair.student.steps)
    assert np.abs(255 * expected - np.asarray(generated.image)).max() < 2
    assert np.abs(expected - base).max() > 0.01


def test_a_merged_folder_is_a_stock_pipeline_that_needs_no_lora(
    result: tuple[str, TrainResult], pairs: dict[str, ModelPair], tmp_path: Path
) -> None:
    family, run = result
    (folder,) = export_files(run.run, layouts=("pipeline",), output=tmp_path, dtype="fp32")
    pair = pairs[family]
    side = 64 // pair.codec.factor
    noise = seeded_noise([7], (pair.codec.channels, side, side))
    image = generated_by(pipeline_of(folder), family, noise, pair.student.steps)
    (generated,) = sample(SampleRequest([PROMPT], seed=7, lora=run.run))
    assert np.abs(255 * image - np.asarray(generated.image)).max() < 2
    assert "DiffusionPipeline.from_pretrained" in (folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"no checkpoint layout for {family}.*--format diffusers"):
        export_files(run.run, layouts=("checkpoint",), output=tmp_path)


def test_kohyas_names_of_klein_are_read_by_stock_diffusers_and_by_sample(
    result: tuple[str, TrainResult], small_flow_pairs: Pairs, pairs: dict[str, ModelPair], tmp_path: Path
) -> None:
    family, run = result
    if family == "sana":  # for which kohya's tools have no names
        with pytest.raises(ConfigError, match=r"no kohya layout for sana.*--format diffusers"):
            export_files(run.run, output=tmp_path)
        return
    (file,) = export_files(run.run, output=tmp_path, dtype="fp32")
    assert not list(tmp_path.glob("*-comfyui.json"))
    report = inspect_file(file)
    assert (report.family, report.format, report.modules) == ("flux2", "kohya", {"transformer": 4 + 2 * 2})
    assert [(verdict.reader, verdict.loads) for verdict in report.readers] == [
        ("diffusers", "fully"),
        ("ComfyUI", "fully"),
    ]
    expected = next(sample(SampleRequest([PROMPT], seed=7, lora=run.run))).image
    (ours,) = sample(SampleRequest([PROMPT], seed=7, lora=file, model=str(small_flow_pairs[family][0]), size=64))
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(expected)).max() < 2
    pipeline = pipeline_of(small_flow_pairs[family][0])
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    names = [name for name, _ in pipeline.transformer.named_parameters() if ".lora_A." in name]
    assert len(names) == LAYERS[family]
    noise = seeded_noise([7], (16, 4, 4))
    stock = generated_by(pipeline, family, noise, pairs[family].student.steps)
    assert np.abs(255 * stock - np.asarray(expected)).max() < 2


def test_a_run_is_evaluated_and_drawn_on_the_page(
    result: tuple[str, TrainResult], photo_folder: Path, small_backbones: dict[str, Path], tmp_path: Path
) -> None:
    _, run = result
    clip, dino = build_score_encoders(tmp_path, small_backbones)
    sampling = SampleRequest(["a photo of {}"], lora=run.run)
    for role in ("student", "teacher"):
        request = EvaluationRequest(
            photo_folder,
            replace(sampling, role=role),
            clip=str(clip),
            dino=str(dino),
            output=tmp_path / role,
            html=role == "student",
        )
        scores = evaluate(request).to_dict()
        assert scores["pictures"] == 1
        assert -1 <= scores["clip_i"] <= 1
    page = Studio(on_message=lambda _line: None)
    drawn = {strength: page.draw(Wish(run.run, "a sks dog", strength)).images[0] for strength in (0.0, 1.0)}
    expected = next(sample(SampleRequest(["a sks dog"], lora=run.run))).image
    assert np.array_equal(np.asarray(drawn[1.0]), np.asarray(expected))
    assert not np.array_equal(np.asarray(drawn[0.0]), np.asarray(expected))


def test_a_file_says_what_it_is(result: tuple[str, TrainResult]) -> None:
    family, run = result
    report = inspect_file(run.lora)
    assert (report.family, report.format, report.kind) == (family, "diffusers", "lora")
    assert report.modules == {"transformer": LAYERS[family]}
    assert [(verdict.reader, verdict.loads) for verdict in report.readers] == [("diffusers", "fully")]
    card = (run.run / "README.md").read_text(encoding="utf-8")
    steps = {"sana": ("**one step**", "SanaSprintPipeline"), "flux2": ("**4 steps**", "Flux2KleinPipeline")}[family]
    assert all(text in card for text in steps)
    assert str(report.usage).startswith({"sana": "1 step, guidance 4.5 (embedded", "flux2": "4 steps, no guid"}[family])
    images = list(sample(SampleRequest([PROMPT], lora=run.run, role="teacher", steps=2)))
    assert np.asarray(images[0].image).std() > 1


def test_klein_of_another_shape_is_shifted_as_in_its_pipeline(
    result: tuple[str, TrainResult], small_flow_pairs: Pairs, pairs: dict[str, ModelPair]
) -> None:
    family, run = result
    student = replace(pairs[family].student)
    before = student.schedule
    student.set_tokens(4096)
    if family == "sana":  # whose shift is fixed
        assert student.schedule is before
        return
    assert float(student.schedule.sigmas[499]) > float(before.sigmas[499]) + 0.01  # type: ignore[index]
    (generated,) = sample(SampleRequest([PROMPT], seed=7, lora=run.run, lora_scale=0.0, width=128, height=96))
    pipeline = pipeline_of(small_flow_pairs[family][0])
    settings: dict[str, Any] = {"height": 96, "width": 128, "output_type": "np", "guidance_scale": 1.0}
    image = pipeline(prompt=PROMPT, num_inference_steps=4, latents=seeded_noise([7], (16, 6, 8)), **settings).images[0]
    assert np.abs(255 * np.asarray(image) - np.asarray(generated.image)).max() < 2


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("sana", {"text__form": "token"}, r"no token vector and no LoRA.* --text frozen"),
        ("flux2", {"text__form": "lora"}, r"no token vector and no LoRA.* --text frozen"),
        ("flux2", {"adapter__targets": "cross-kv"}, r"no layers for adapter.targets = cross-kv"),
        ("sana", {"adapter__targets": "attention-conv"}, r"no layers for adapter.targets = attention-conv"),
        ("sana", {"critic__discriminators": ("teacher",)}, r"cannot be a discriminator.* --discriminators dino"),
        ("sana", {"model__decoder": "tiny"}, r"no tiny decoder.* --decoder full"),
        ("sana", {"model__vae": "someone/vae"}, r"its own VAE.* --vae"),
        ("flux2", {"model__student_prediction": "epsilon"}, r"predict a velocity"),
        ("sana", {"model__precision": "fp16"}, r"overflows in fp16.* --precision bf16"),
    ],
)
def test_what_transformers_cannot_do_is_refused_before_anything_is_loaded(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], message: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    with pytest.raises(ConfigError) as refusal:
        check_settings(configure(family, **changes))
    import re

    assert re.search(message, f"{refusal.value.message} {refusal.value.hint}")


def test_sana_is_not_loaded_in_fp16_where_that_is_what_the_gpu_has(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echodistill_cli.models.load.pick_dtype", lambda *_: torch.float16)
    with pytest.raises(ConfigError, match=r"overflows in fp16.* --precision bf16, or fp32"):
        load_pair(configure("sana").model)
    assert load_pair(configure("flux2").model).dtype is torch.float16


def test_a_teacher_of_another_family_is_refused(
    configure: Configure, small_flow_pairs: Pairs, small_pair: tuple[Path, Path]
) -> None:
    with pytest.raises(ModelError, match=r"is of another family than .*: it has a UNet, not a transformer"):
        check_settings(configure("sana", model__teacher=str(small_pair[1])))
    with pytest.raises(ModelError, match=r"is of another family"):
        check_settings(configure("sana", model__teacher=str(small_flow_pairs["flux2"][1])))
