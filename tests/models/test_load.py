"""Loading a pair: families, precisions, file variants, codecs; and what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec
from echodistill_cli.diffusion.sampling import to_uint8
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models.device import pick_device, pick_dtype
from echodistill_cli.models.load import load_pair, load_schedule
from echodistill_cli.planning import suit_device

Pair = tuple[Path, Path]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def settings(pair: Pair, **changes: Any) -> ModelConfig:
    student, teacher = map(str, pair)
    common = {"student": student, "teacher": teacher, "resolution": 64, "device": "cpu", "offline": True}
    return ModelConfig(**common | changes)


@pytest.fixture
def copied(small_pair: Pair, tmp_path: Path) -> Pair:
    """The pair in folders that may be changed."""
    student, teacher = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in small_pair)
    return student, teacher


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny for 8 x 8 x 4 latents of 64-pixel pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    AutoencoderTiny(**widths, **blocks).save_pretrained(folder)
    return folder


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def denoise(denoiser: Denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    hidden = torch.randn(2, 32, 32, generator=generator).to(denoiser.unet.conv_in.weight.dtype)
    return denoiser(noisy, torch.tensor([5, 900]), Conditioning(hidden))


# --- the pair ---------------------------------------------------------------------------------------------------------


def test_the_small_pair_loads_frozen_in_evaluation_mode(small_pair: Pair) -> None:
    pair = load_pair(settings(small_pair))
    assert (pair.family, pair.device, pair.dtype) == ("sd", torch.device("cpu"), torch.float32)
    assert (pair.student.schedule.prediction_type, pair.teacher.schedule.prediction_type) == ("epsilon", "v_prediction")
    modules = (pair.student.unet, pair.teacher.unet, pair.codec.encoder, *pair.encoder.encoders)
    assert not any(module.training for module in modules)
    assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    assert pair.role("student") is pair.student
    assert pair.teacher is pair.teacher


def test_the_weights_are_those_in_the_files(small_pair: Pair) -> None:
    pair = load_pair(settings(small_pair))
    for denoiser, folder in zip((pair.student, pair.teacher), small_pair, strict=True):
        assert denoiser is not None
        expected = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in denoiser.unet.state_dict().items())


def test_without_a_teacher_asking_for_it_names_the_flag(small_pair: Pair) -> None:
    pair = load_pair(settings(small_pair, teacher="nobody/nothing"), teacher=False)
    with pytest.raises(ModelError, match="--teacher"):
        _ = pair.teacher


def test_a_teacher_of_another_family_is_refused_with_both_names(copied: Pair) -> None:
    student, teacher = copied
    config = json.loads((teacher / "unet" / "config.json").read_text())
    other = {key: value for key, value in config.items() if not key.startswith("_")} | {"cross_attention_dim": 48}
    UNet2DConditionModel(**other).save_pretrained(teacher / "unet")
    with pytest.raises(ModelError, match="cross_attention_dim is 48, not 32") as caught:
        load_pair(settings(copied))
    assert str(student) in caught.value.message
    assert str(teacher) in caught.value.message
    assert "--teacher" in str(caught.value.hint)


def test_a_folder_of_stable_diffusion_1_is_refused_by_name_before_its_weights_are_read(copied: Pair) -> None:
    true_size = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
    change_json(copied[0] / "unet" / "config.json", **true_size)
    for lora in (None, "lcm.safetensors"):
        config = settings((copied[0], copied[0]), student_lora=lora)
        with pytest.raises(
            ModelError, match=r"student is a Stable Diffusion 1 model; .* SD 2\.1 and SDXL are supported\. Use sd_turbo"
        ):
            load_pair(config)


def test_a_small_model_that_reads_text_as_wide_as_stable_diffusion_1_does_is_no_such_model(copied: Pair) -> None:
    for folder in copied:
        config = json.loads((folder / "unet" / "config.json").read_text())
        other = {key: value for key, value in config.items() if not key.startswith("_")} | {"cross_attention_dim": 768}
        UNet2DConditionModel(**other).save_pretrained(folder / "unet")
    assert load_pair(settings(copied)).student.unet.config.cross_attention_dim == 768


def test_a_resolution_that_the_unet_cannot_halve_is_refused(small_pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"--resolution 72 is not a multiple of 16, .* Try --resolution 64\."):
        load_pair(settings(small_pair, resolution=72))
    load_pair(settings(small_pair, resolution=80))


# --- precision and devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_keeps_the_last_layer_of_the_unet_in_single(
    small_pair: Pair, precision: str, dtype: torch.dtype
) -> None:
    pair = load_pair(settings(small_pair, precision=precision))
    unet = pair.student.unet
    assert unet.conv_in.weight.dtype == unet.mid_block.resnets[0].conv1.weight.dtype == dtype
    assert unet.conv_out.weight.dtype == torch.float32
    assert pair.encoder.encoders[0].get_input_embeddings().weight.dtype == dtype
    output = denoise(pair.student)
    assert output.dtype == torch.float32
    # The last layer's sums are not rounded to half precision.
    assert not torch.equal(output, output.to(dtype).float())
    torch.testing.assert_close(output, denoise(load_pair(settings(small_pair)).student), rtol=0.1, atol=0.05)


def test_an_fp16_vae_that_would_overflow_is_raised_to_single_precision(copied: Pair) -> None:
    change_json(copied[0] / "vae" / "config.json", force_upcast=False)
    assert load_pair(settings(copied, precision="fp16"), teacher=False).codec.encoder.dtype == torch.float16
    change_json(copied[0] / "vae" / "config.json", force_upcast=True)
    assert load_pair(settings(copied, precision="fp16"), teacher=False).codec.encoder.dtype == torch.float32
    assert load_pair(settings(copied, precision="bf16"), teacher=False).codec.encoder.dtype == torch.bfloat16


def test_auto_precision_is_single_off_cuda_and_a_named_one_is_kept() -> None:
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.gpu
@needs_cuda
def test_auto_precision_is_what_the_card_itself_computes_in() -> None:
    # From compute capability 8.0 on; older cards only emulate bf16.
    for index in range(torch.cuda.device_count()):
        native = torch.cuda.get_device_capability(index) >= (8, 0)
        assert pick_dtype("auto", torch.device("cuda", index)) == (torch.bfloat16 if native else torch.float16)


def test_a_number_of_gib_is_planned_in_half_precision_where_there_is_no_card() -> None:
    build = partial(build_config, "sd-turbo", None, {"model.device": "cpu"})
    assert suit_device(build, "12").settings["model.precision"] == "bf16"


@pytest.mark.gpu
@needs_cuda
def test_a_number_of_gib_is_planned_in_the_half_precision_of_the_card() -> None:
    build = partial(build_config, "sd-turbo", None, {"model.device": "cuda"})
    expected = {torch.bfloat16: "bf16", torch.float16: "fp16"}[pick_dtype("auto", torch.device("cuda"))]
    assert suit_device(build, "12").settings["model.precision"] == expected


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name} does not exist on this machine. Try --device auto"):
        pick_device(name)


def test_the_cpu_can_always_be_asked_for() -> None:
    assert pick_device("cpu") == torch.device("cpu")


# --- schedules --------------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_the_scheduler_on_disk(small_pair: Pair) -> None:
    schedule = load_schedule(small_pair[1] / "scheduler")
    expected = DDIMScheduler.from_pretrained(small_pair[1] / "scheduler").alphas_cumprod
    assert torch.equal(schedule.alphas_cumprod, expected)
    assert float(schedule.alphas_cumprod[-1]) == pytest.approx(0.00466009, rel=1e-4)


def test_a_rescaled_schedule_ends_at_pure_noise(copied: Pair) -> None:
    change_json(copied[1] / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert float(load_schedule(copied[1] / "scheduler").alphas_cumprod[-1]) < 1e-6


def test_a_model_that_predicts_the_sample_is_refused(copied: Pair) -> None:
    change_json(copied[1] / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ModelError, match="predict 'sample' are not supported"):
        load_pair(settings(copied))


def test_a_schedule_that_names_no_prediction_type_predicts_noise(copied: Pair) -> None:
    file = copied[1] / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "prediction_type"}))
    assert load_schedule(file.parent).prediction_type == "epsilon"


# --- file variants ----------------------------------------------------------------------------------------------------


def test_fp16_files_are_taken_where_they_are_and_plain_ones_elsewhere(copied: Pair) -> None:
    student, _ = copied
    unet = UNet2DConditionModel.from_pretrained(student / "unet")
    with torch.no_grad():
        unet.conv_in.bias.fill_(0.25)
    unet.half().save_pretrained(student / "unet", variant="fp16")
    names = {path.name for path in (student / "unet").glob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    bias = load_pair(settings(copied, variant="fp16"), teacher=False).student.unet.conv_in.bias
    assert bias.tolist() == [0.25] * 16
    assert bias.dtype == torch.float32
    bias = load_pair(settings(copied, variant=None), teacher=False).student.unet.conv_in.bias
    assert bias.tolist() != [0.25] * 16


def test_a_variant_in_several_files_is_loaded(copied: Pair) -> None:
    student, _ = copied
    unet = UNet2DConditionModel.from_pretrained(student / "unet").half()
    (student / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(student / "unet", variant="fp16", max_shard_size="200KB")
    assert len(list((student / "unet").glob("*.safetensors"))) > 1
    loaded = load_pair(settings(copied, variant="fp16"), teacher=False).student.unet
    assert torch.equal(loaded.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv1.weight.float())


# --- codecs -----------------------------------------------------------------------------------------------------------


def picture() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_the_scaled_mean_of_the_vae(small_pair: Pair) -> None:
    codec = load_pair(settings(small_pair), teacher=False).codec
    assert (codec.factor, codec.channels) == (8, 4)
    vae = AutoencoderKL.from_pretrained(small_pair[0] / "vae")
    with torch.no_grad():
        expected = vae.encode(picture()).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(codec.encode(picture()), expected)
    assert codec.encode(picture()).shape == (2, 4, 8, 8)


def test_pictures_are_decoded_as_by_diffusers_pipeline(small_pair: Pair) -> None:
    codec = load_pair(settings(small_pair), teacher=False).codec
    pipeline = StableDiffusionPipeline.from_pretrained(small_pair[0], safety_checker=None, feature_extractor=None)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        expected = np.asarray(pipeline.image_processor.postprocess(decoded, output_type="np")) * 255
        ours = to_uint8(codec.decode(latents)).numpy()
    assert np.abs(ours - expected).max() <= 0.51


def test_decoding_carries_a_gradient(small_pair: Pair) -> None:
    codec = load_pair(settings(small_pair), teacher=False).codec
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    codec.decode(latents).sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_the_tiny_decoder_decodes_and_the_vae_encodes(small_pair: Pair, tiny_decoder: Path) -> None:
    config = settings(small_pair, decoder="tiny", tiny_decoder=str(tiny_decoder))
    codec = load_pair(config, teacher=False).codec
    full = load_pair(settings(small_pair), teacher=False).codec
    assert isinstance(codec.encoder, AutoencoderKL)
    assert isinstance(codec.decoder, AutoencoderTiny)
    assert torch.equal(codec.encode(picture()), full.encode(picture()))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = AutoencoderTiny.from_pretrained(tiny_decoder).decode(latents).sample
    decoded = codec.decode(latents)
    torch.testing.assert_close(decoded, expected)
    assert decoded.shape == (2, 3, 64, 64)
    decoded.sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_a_model_whose_own_vae_is_tiny_encodes_and_decodes_with_it(copied: Pair, tiny_decoder: Path) -> None:
    shutil.rmtree(copied[0] / "vae")
    shutil.copytree(tiny_decoder, copied[0] / "vae")
    codec = load_pair(settings(copied), teacher=False).codec
    assert isinstance(codec, LatentCodec)
    assert codec.encoder is codec.decoder
    assert (codec.factor, codec.channels) == (8, 4)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(tiny_decoder).encode(picture()).latents
    torch.testing.assert_close(codec.encode(picture()), expected)


def test_a_single_file_without_its_configuration_says_how_to_name_it(tmp_path: Path, small_pair: Pair) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(small_pair[0] / "unet" / "diffusion_pytorch_model.safetensors", file)
    with pytest.raises(ModelError, match=r"model\.safetensors: a single file .*--set model\.single_file_config=NAME"):
        load_pair(settings(small_pair, student=str(file)), teacher=False)
    with pytest.raises(ModelError, match=r"a single file .*model\.teacher_single_file_config for the teacher"):
        load_pair(settings(small_pair, teacher=str(file)))
