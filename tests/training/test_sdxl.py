"""The whole method on a small pair of SDXL's structure: train, resume, export, stock diffusers, sample."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image

from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.data.photos import Photo
from echodistill_cli.data.views import teacher_views
from echodistill_cli.diffusion.pair import Denoiser, ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate, seeded_noise
from echodistill_cli.diffusion.schedule import NoiseSchedule
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.lora.read import read_lora
from echodistill_cli.models.adapters import trainable_parameters
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.export import TrainResult
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.pipeline import train
from echodistill_cli.training.batches import student_pass, teacher_batch
from echodistill_cli.training.state import add_trained_parts, build_state
from echodistill_cli.training.steps import student_step, training_step
from tests.helpers.runs import export_files, small_config, small_photos

Pair = tuple[Path, Path]
Configure = Callable[..., Config]
FAST = {"echo__start": 2, "train__lr": 0.1, "train__text_lr": 0.1}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def configure(small_sdxl_pair: Pair, small_backbones: dict[str, Path], photo_folder: Path) -> Configure:
    """A short run's settings, with changes by key."""

    def with_changes(output: Path, **changes: Any) -> Config:
        short = {"train__steps": 3, "run__save_every": 2, "run__sample_every": 3, "run__sample_seeds": 1}
        own = {"concept__photos": str(photo_folder), "run__output": str(output)}
        return small_config(small_sdxl_pair, small_backbones, **short | own | changes)

    return with_changes


@pytest.fixture(scope="module")
def trained(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A finished run with LoRA on both text encoders, which learned fast; its files were read back by it."""
    return train(configure(tmp_path_factory.mktemp("runs") / "lora", **FAST))


def load(pair: Pair, **changes: Any) -> ModelPair:
    student, teacher = map(str, pair)
    defaults: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "resolution": 64,
        "device": "cpu",
        "offline": True,
    }
    return load_pair(ModelConfig(**defaults | changes))


def generate_with_diffusers(folder: Path, seed: int, *loras: Path, prompt: str, steps: int = 1) -> np.ndarray:
    """Generate an image with a stock SDXL pipeline of the folder and LoRA files, as an integer array."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    for file in loras:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    noise = seeded_noise([seed], (4, 8, 8))
    settings: dict[str, Any] = {"latents": noise, "height": 64, "width": 64, "output_type": "np"}
    images = pipeline(prompt, num_inference_steps=steps, guidance_scale=0.0, **settings).images
    return (np.asarray(images[0]) * 255).round().astype(int)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- the pair ---------------------------------------------------------------------------------------------------------


def test_an_sdxl_pair_loads_with_two_text_encoders_and_its_sizes(small_sdxl_pair: Pair) -> None:
    pair = load(small_sdxl_pair, teacher_original_size=1024)
    assert pair.family == "sdxl"
    assert pair.student.time_ids == (64, 64, 0, 0, 64, 64)
    assert pair.teacher.time_ids == (1024, 1024, 0, 0, 64, 64)
    assert [type(encoder).__name__ for encoder in pair.encoder.encoders] == [
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ]
    assert pair.codec.encoder.config.scaling_factor == 0.13025


def test_the_model_index_says_whether_the_empty_prompt_is_zeros(small_sdxl_pair: Pair, tmp_path: Path) -> None:
    assert not load(small_sdxl_pair).encoder.encode_null().hidden.any()
    student = Path(shutil.copytree(small_sdxl_pair[0], tmp_path / "student"))
    index = json.loads((student / "model_index.json").read_text())
    (student / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert load((student, small_sdxl_pair[1])).encoder.encode_null().hidden.any()
    (student / "model_index.json").unlink()
    assert not load((student, small_sdxl_pair[1])).encoder.encode_null().hidden.any()


def test_each_unet_is_conditioned_on_its_own_sizes_and_on_the_crops_of_samples(small_sdxl_pair: Pair) -> None:
    pair = load(small_sdxl_pair, teacher_original_size=1024)
    with torch.no_grad():
        conditioning = pair.encoder.encode(["a dog", "a cat"])
    expected = UNet2DConditionModel.from_pretrained(small_sdxl_pair[1] / "unet")
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])

    def by_diffusers(*rows: list[float]) -> torch.Tensor:
        added = {"text_embeds": conditioning.pooled, "time_ids": torch.tensor(rows)}
        output = expected(noisy, timesteps, encoder_hidden_states=conditioning.hidden, added_cond_kwargs=added)
        return torch.as_tensor(output.sample)

    with torch.no_grad():
        plain = pair.teacher(noisy, timesteps, conditioning)
        torch.testing.assert_close(plain, by_diffusers(*[[1024.0, 1024, 0, 0, 64, 64]] * 2))
        cropped = pair.teacher(noisy, timesteps, pair.teacher.at_crops(conditioning, [(3, 4), (0, 17)]))
        rows = ([1024.0, 1024, 3, 4, 64, 64], [1024.0, 1024, 0, 17, 64, 64])
        torch.testing.assert_close(cropped, by_diffusers(*rows))
    assert not torch.equal(cropped, plain)


def test_sd_is_not_conditioned_on_crops() -> None:
    conditioning = Conditioning(torch.zeros(1, 2, 3))
    schedule = NoiseSchedule(torch.linspace(0.9, 0.1, 10), "epsilon")
    assert Denoiser(None, schedule).at_crops(conditioning, [(1, 2)]) is conditioning


def test_views_know_where_they_were_cropped() -> None:
    image = Image.new("RGB", (300, 200))
    photo = Photo(Path("wide.png"), image, None, None, (50, 0, 250, 200))
    views = teacher_views([photo], resolution=100, count=60, generator=torch.Generator().manual_seed(0))
    zoomed = [view for view in views if view.framing in ("zoomed in", "close up")]
    assert {view.crop for view in views if view not in zoomed} == {(0, 0)}
    assert len({view.crop for view in zoomed}) > 5
    for top, left in (view.crop for view in zoomed):
        # At a zoom of 1.2 to 1.4 the photo is 180 to 210 pixels wide, of which the crop leaves 30 to 35 out on a side.
        assert 0 <= top <= 40
        assert 30 <= left <= 75


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "token", "frozen"])
def test_every_form_of_the_text_side_trains(configure: Configure, tmp_path: Path, form: str) -> None:
    state = build_state(configure(tmp_path / form, text__form=form), small_photos())
    # SDXL reads the states before the last layer: of the first encoder, that layer learns nothing.
    first, second = (trainable_parameters(encoder) for encoder in state.pair.encoder.encoders)
    trained = {
        "lora": [*first[:8], *second],
        "token": list(state.token.vectors) if state.token else [],
        "frozen": [],
    }[form]
    before = [parameter.detach().clone() for parameter in trained]
    for _ in range(2):
        metrics = state.settle(training_step(state))
        assert all(np.isfinite(value) for value in metrics.values())
        assert not [name for name in metrics if name.startswith("skipped")]
    # The second step moves LoRA's A too; both encoders learn.
    assert [bool((a == b).all()) for a, b in zip(before, trained, strict=True)] == [False] * len(trained)
    assert len(trained) == {"lora": 8 + 16, "token": 2, "frozen": 0}[form]


def test_only_the_teachers_denoising_loss_is_conditioned_on_crops(configure: Configure, tmp_path: Path) -> None:
    state = build_state(configure(tmp_path / "run", train__batch_size=16), small_photos())
    crops = teacher_batch(state).crops
    assert len(crops) == 16
    assert any(crop != (0, 0) for crop in crops)
    assert student_pass(state).images.conditioning.time_ids is None


def test_with_offload_every_gradient_is_the_same(configure: Configure, tmp_path: Path) -> None:
    gradients = []
    for offload in (False, True):
        changes = {"critic__discriminators": (), "model__offload": offload, "train__gradient_checkpointing": offload}
        state = build_state(configure(tmp_path / "run", **changes), small_photos())
        assert state.pair.alternating == offload
        metrics = state.settle(training_step(state))
        student_step(state)
        both = (state.pair.role("student").unet, state.pair.teacher.unet)
        gradients.append([p.grad.clone() for unet in both for p in trainable_parameters(unet) if p.grad is not None])
        assert not [name for name in metrics if name.startswith("skipped")]
    plain, offloaded = gradients
    assert len(plain) == len(offloaded) > 0
    for one, other in zip(plain, offloaded, strict=True):
        torch.testing.assert_close(one, other)


def test_with_offload_trained_weights_stay_on_the_device(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path, critic__discriminators=(), text__form="frozen")
    pair = load_pair(config.model)
    pair.device = torch.device("meta")  # both UNets wait on the CPU, and any machine has this other device
    add_trained_parts(config, pair)
    for unet in (pair.student.unet, pair.teacher.unet):
        assert {p.device.type for p in trainable_parameters(unet)} == {"meta"}
        assert {p.device.type for p in unet.parameters() if not p.requires_grad} == {"cpu"}


def test_the_teacher_is_no_critic_under_offload(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only one UNet on the device.* model.offload=false"):
        configure(tmp_path, model__offload=True)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    configure: Configure, trained: TrainResult, tmp_path: Path
) -> None:
    config = configure(tmp_path / "again", **FAST)
    train(config)
    result = train(config, resume=True, from_step=2)
    lora, expected = read_lora(result.lora), read_lora(trained.lora)
    assert len(lora.modules) == len(expected.modules) > 0
    images = [list(sample(SampleRequest(["a photo of a sks dog"], lora=run.run))) for run in (result, trained)]
    assert np.abs(pixels(images[0][0].image) - pixels(images[1][0].image)).max() <= 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_lora_covers_the_unet_and_both_text_encoders(trained: TrainResult) -> None:
    lora = read_lora(trained.lora)
    components = [module.component for module in lora.modules]
    # Attentions: 2 of depth 1 and 2 of depth 2 down, 1 of depth 2 in the middle, 3 of 2 and 3 of 1 up; key and value.
    assert {name: components.count(name) for name in set(components)} == {
        "unet": 2 * (2 + 4 + 2 + 6 + 3),
        "text_encoder": 8,
        "text_encoder_2": 8,
    }
    assert trained.token is None


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stock_diffusers_generates_the_same_image_from_the_exported_file(
    trained: TrainResult, small_sdxl_pair: Pair, tmp_path: Path, steps: int
) -> None:
    prompt = "a photo of a sks dog"
    (generated,) = sample(SampleRequest([prompt], seed=7, lora=trained.run, steps=steps))
    base = generate_with_diffusers(small_sdxl_pair[0], 7, prompt=prompt, steps=steps)
    assert np.abs(pixels(generated.image) - base).max() > 3
    for layout in ("kohya", "diffusers"):
        (file,) = export_files(trained.run, layouts=(layout,), output=tmp_path / layout)
        expected = generate_with_diffusers(small_sdxl_pair[0], 7, file, prompt=prompt, steps=steps)
        assert np.abs(pixels(generated.image) - expected).max() <= 2


def test_the_teachers_file_generates_with_guidance(trained: TrainResult) -> None:
    images = list(sample(SampleRequest(["a sks dog"], lora=trained.run, role="teacher", steps=2)))
    assert pixels(images[0].image).std() > 1


def test_a_learned_token_is_a_file_of_two_tensors_that_stock_diffusers_loads(
    configure: Configure, small_sdxl_pair: Pair, tmp_path: Path
) -> None:
    config = configure(tmp_path / "token", text__form="token", concept__token="zwx", train__text_lr=0.1)
    result = train(config)
    assert result.token is not None
    from safetensors.torch import load_file

    vectors = load_file(result.token)
    assert {name: tuple(value.shape) for name, value in vectors.items()} == {"clip_l": (1, 32), "clip_g": (1, 48)}
    (generated,) = sample(SampleRequest(["a photo of a zwx dog"], seed=3, lora=result.run))
    pipeline = StableDiffusionXLPipeline.from_pretrained(small_sdxl_pair[0])
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(result.lora.parent), weight_name=result.lora.name)
    for name, which in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = (getattr(pipeline, part + which) for part in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(vectors[name], token="zwx", text_encoder=encoder, tokenizer=tokenizer)
    # The published configurations pool at the largest id, which an added token would be (see the README).
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    settings: dict[str, Any] = {"latents": seeded_noise([3], (4, 8, 8)), "height": 64, "width": 64}
    settings |= {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np"}
    expected = (np.asarray(pipeline("a photo of a zwx dog", **settings).images[0]) * 255).round()
    assert np.abs(pixels(generated.image) - expected).max() <= 2


# --- the VAE ----------------------------------------------------------------------------------------------------------


def overflowing(pair: ModelPair) -> None:
    """Scale the decoder's first layer up until half precision overflows, as SDXL's VAE does; its weights do not."""
    weight = pair.codec.decoder.decoder.conv_in.weight
    with torch.no_grad():
        weight.mul_(6e4 / weight.abs().max().float())


def generate_image(pair: ModelPair) -> np.ndarray:
    settings = SamplingSettings(size=64)
    return np.stack([one.numpy() for one in generate(pair, ["a dog"], [0], settings)])


def test_in_fp16_the_vae_decodes_in_single_precision_and_the_image_is_not_black(small_sdxl_pair: Pair) -> None:
    pair = load(small_sdxl_pair, precision="fp16")
    assert pair.codec.decoder.dtype == torch.float32
    overflowing(pair)
    assert generate_image(pair).std() > 1


def test_another_vae_may_be_named_and_one_that_overflows_is_an_error_not_a_black_image(
    small_sdxl_pair: Pair, tmp_path: Path
) -> None:
    vae = Path(shutil.copytree(small_sdxl_pair[0] / "vae", tmp_path / "vae"))
    settings = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(settings | {"force_upcast": False}))
    pair = load(small_sdxl_pair, precision="fp16", vae=str(vae))
    assert pair.codec.decoder.dtype == torch.float16
    assert generate_image(pair).std() > 1
    overflowing(pair)
    with pytest.raises(EchoDistillError, match=r"overflowed in the VAE.*--precision fp32"):
        generate_image(pair)


def test_the_tiny_decoder_is_that_of_the_family(small_pair: Pair, small_sdxl_pair: Pair) -> None:
    for pair, name in ((small_pair, "madebyollin/taesd"), (small_sdxl_pair, "madebyollin/taesdxl")):
        with pytest.raises(EchoDistillError, match=rf"{name} is not in the cache"):
            load(pair, decoder="tiny")


def test_a_runs_settings_hold_the_teachers_original_size(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path, model__teacher_original_size=1024)
    assert dataclasses.asdict(config.model)["teacher_original_size"] == 1024
