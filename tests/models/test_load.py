"""Loading a pair: families, precisions, file variants, codecs, one base model for both roles; and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file

from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec, ModelPair
from echodistill_cli.diffusion.sampling import student_x0, to_uint8
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.models.adapters import DISTILLATION, UNET_LAYERS, add_lora, trainable_parameters
from echodistill_cli.models.device import fit_to_memory, pick_device, pick_dtype
from echodistill_cli.models.load import _Loader, load_pair
from echodistill_cli.models.parts import load_schedule, load_tokenizer
from echodistill_cli.models.single_file import zero_snr_in
from echodistill_cli.models.vision import DinoScorer
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.pipeline import train
from echodistill_cli.planning import check_settings
from echodistill_cli.training.state import build_state
from echodistill_cli.training.steps import training_step
from echodistill_cli.training.targets import base_x0
from tests.helpers.random_models import DINO_SEES, write_distillation
from tests.helpers.runs import small_config, small_photos

Pair = tuple[Path, Path]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def settings(pair: Pair, **changes: Any) -> ModelConfig:
    student, teacher = map(str, pair)
    common: dict[str, Any] = {
        "student": student,
        "teacher": teacher,
        "resolution": 64,
        "device": "cpu",
        "offline": True,
    }
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


# --- damaged and foreign models ---------------------------------------------------------------------------------------

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lack_half(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensors[name] for name in sorted(tensors)[: len(tensors) // 2]}, file)


def reshape(file: Path) -> None:
    save_file({name: torch.zeros(3, *tensor.shape) for name, tensor in load_file(file).items()}, file)


def unlink_blob(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/deleted")


def become_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("damage", [cut, lack_half, reshape, unlink_blob, become_pointer, Path.touch])
def test_damaged_weights_are_refused_in_one_line_that_names_them(
    copied: Pair, part: str, damage: Callable[[Path], None]
) -> None:
    file = copied[0] / WEIGHTS[part]
    if damage is Path.touch:
        file.unlink()
    damage(file)
    with pytest.raises(ModelError, match=rf"student/{part}") as caught:
        load_pair(settings(copied))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b"[" * 100_000])
@pytest.mark.parametrize(
    "name",
    [
        *("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "model_index.json"),
    ],
)
def test_broken_json_is_refused_in_one_line_that_names_it(copied: Pair, name: str, content: bytes) -> None:
    (copied[0] / name).write_bytes(content)
    if name == "model_index.json":
        with pytest.raises(ModelError, match=name):
            _Loader(settings(copied), torch.float32, torch.device("cpu")).zero_null()
        return
    with pytest.raises(ModelError, match=f"student/{name} (is|holds)") as caught:
        load_pair(settings(copied))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet/config.json", {"act_fn": "strange"}, "student/unet cannot be read"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("unet/config.json", {"block_out_channels": "x"}, "student/unet"),
        ("unet/config.json", {"in_channels": 9}, "reads 9 channels instead of the latent's 4"),
        ("unet/config.json", {"time_cond_proj_dim": 16}, "guidance embedding"),
        ("unet/config.json", {"class_embed_type": "projection"}, "its UNet has class_embed_type"),
        ("unet/config.json", {"num_class_embeds": 1000}, "its UNet has num_class_embeds"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type 'image' is not supported"),
        ("unet/config.json", {"quantization_config": {"quant_method": "x"}}, "quantized weights are not supported"),
        ("text_encoder/config.json", {"hidden_act": "strange"}, "student/text_encoder cannot be read"),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "x"}}, "quantized weights"),
        ("text_encoder/config.json", {"attn_implementation": "owner/kernel"}, "names code on the hub"),
        ("text_encoder/config.json", {"_attn_implementation": "owner/kernel"}, "names code on the hub"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "strange"}, "scheduler_config.json cannot be read"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}, "scheduler_config.json"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "not those of a noise schedule"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "without betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "from pure noise"),
    ],
)
def test_what_a_configuration_says_and_is_not_supported_is_refused(
    copied: Pair, name: str, change: dict[str, Any], message: str
) -> None:
    file = copied[0] / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message) as caught:
        load_pair(settings(copied))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_schedule_without_betas_is_refused_by_its_class(kind: Any, tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=kind.__name__):
        load_schedule(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{}")
    with pytest.raises(ModelError, match="without betas"):
        load_schedule(tmp_path)


def test_an_sdxl_unet_with_other_blocks_is_refused_before_training(small_sdxl_pair: Pair, tmp_path: Path) -> None:
    student = Path(shutil.copytree(small_sdxl_pair[0], tmp_path / "koala"))
    file = student / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_per_block": 1}))
    with pytest.raises(ModelError, match="koala: an SDXL UNet with layers_per_block 1 is not supported"):
        load_pair(settings((student, small_sdxl_pair[1])))


def test_code_that_comes_with_an_encoder_is_never_run(small_backbones: dict[str, Path], tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(small_backbones["dino"], tmp_path / "encoder"))
    foreign = {"image_processor_type": "Strange", "auto_map": {"AutoImageProcessor": "strange.Strange"}}
    (encoder / "preprocessor_config.json").write_text(json.dumps(DINO_SEES | foreign))
    (encoder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Strange: pass\n")
    with pytest.raises(ModelError, match="image_processor_type is 'Strange', not one of CLIP, ViT, Bit"):
        DinoScorer(encoder, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_a_single_file_may_declare_zero_terminal_snr(small_pair: Pair, tmp_path: Path) -> None:
    save_file({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "z.safetensors")
    assert zero_snr_in(tmp_path / "z.safetensors")
    schedule = load_schedule(small_pair[1] / "scheduler", "v_prediction", zero_snr=True)
    assert float(schedule.alphas_cumprod[-1]) == 0
    assert float(load_schedule(small_pair[1] / "scheduler").alphas_cumprod[-1]) > 0.004


def test_the_implementation_of_attention_is_torchs_own(small_pair: Pair) -> None:
    pair = load_pair(settings(small_pair))
    assert [encoder.config._attn_implementation for encoder in pair.encoder.encoders] == ["sdpa"]


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


@pytest.mark.parametrize("role", [0, 1])
def test_a_model_without_a_unet_is_refused_by_its_kind_before_anything_else(copied: Pair, role: int) -> None:
    index = {"_class_name": "ZImagePipeline", "transformer": ["diffusers", "ZImageTransformer2DModel"]}
    (copied[role] / "model_index.json").write_text(json.dumps(index))
    (copied[1] / "unet" / "config.json").unlink()
    with pytest.raises(ModelError, match="is a ZImagePipeline, which has no UNet and is not supported"):
        load_pair(settings(copied))
    with pytest.raises(ModelError, match=f"{copied[role].name} is a ZImagePipeline"):
        check_settings(small_config(copied, {"dino": Path("dino"), "clip": Path("clip")}))


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
    assert fit_to_memory(build, "12").settings["model.precision"] == "bf16"


@pytest.mark.gpu
@needs_cuda
def test_a_number_of_gib_is_planned_in_the_half_precision_of_the_card() -> None:
    build = partial(build_config, "sd-turbo", None, {"model.device": "cuda"})
    expected = {torch.bfloat16: "bf16", torch.float16: "fp16"}[pick_dtype("auto", torch.device("cuda"))]
    assert fit_to_memory(build, "12").settings["model.precision"] == expected


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


def test_what_a_schedule_says_that_the_model_predicts_is_known_or_refused(copied: Pair) -> None:
    file = copied[1] / "scheduler" / "scheduler_config.json"
    change_json(file, prediction_type="sample")
    assert load_schedule(file.parent).prediction_type == "sample"
    change_json(file, prediction_type="trajectory")
    with pytest.raises(ModelError, match="predict 'trajectory' are not supported"):
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


# --- one base model for both roles ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distillation(small_sdxl_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_distillation(small_sdxl_pair[1], tmp_path_factory.mktemp("distilled") / "one-step.safetensors")


def one_base(base: Path, lora: Path) -> ModelConfig:
    """One model for both roles, made one-step by a LoRA."""
    return settings((base, base), student_lora=str(lora))


@pytest.fixture
def shared(small_sdxl_pair: Pair, distillation: Path) -> ModelPair:
    return load_pair(one_base(small_sdxl_pair[1], distillation))


def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    hidden, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 32, 80), (2, 40)))
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([999, 999]), Conditioning(hidden, pooled)


def gradients(denoiser: Denoiser) -> list[torch.Tensor]:
    return [p.grad.clone() for p in trainable_parameters(denoiser.unet) if p.grad is not None]


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
    alone = load_pair(one_base(small_sdxl_pair[1], distillation), teacher=False)
    names = {name for name, _ in UNet2DConditionModel.from_pretrained(small_sdxl_pair[1] / "unet").named_parameters()}
    assert {name for name, _ in alone.student.unet.named_parameters()} == names
    assert not any(parameter.requires_grad for parameter in alone.student.unet.parameters())
    with torch.no_grad():
        expected = shared.student(*inputs())
        torch.testing.assert_close(alone.student(*inputs()), expected, rtol=1e-4, atol=1e-5)


# --- training over one base model -------------------------------------------------------------------------------------


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


# --- refused distillation LoRAs ---------------------------------------------------------------------------------------


def test_the_model_is_the_teacher_too() -> None:
    config = build_config("someone/base", overrides={"model.student_lora": "one-step.safetensors"})
    assert config.model.teacher == "someone/base"
    with pytest.raises(ConfigError, match="one base model is student and teacher"):
        build_config("sdxl-turbo", overrides={"model.student_lora": "one-step.safetensors"})


def test_a_lora_of_another_family_or_none_is_refused(small_pair: Pair, distillation: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_pair(one_base(small_pair[0], tmp_path / "none.safetensors"))
    with pytest.raises(ModelError, match=r"one-step\.safetensors"):
        load_pair(one_base(small_pair[0], distillation))


@pytest.mark.parametrize("length", [-1, 0, 2, 1e999])
def test_a_tokenizer_without_room_for_a_prompt_is_refused_in_one_line(
    small_pair: tuple[Path, Path], tmp_path: Path, length: float
) -> None:
    folder = Path(shutil.copytree(small_pair[0] / "tokenizer", tmp_path / "tokenizer"))
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"model_max_length": length}))
    if length == float("inf"):
        assert load_tokenizer(folder).model_max_length > 3
        return
    with pytest.raises(ModelError, match="model_max_length is "):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer_config.json", "unet/config.json", "text_encoder/extra.json"])
def test_a_pipe_in_a_models_folder_is_refused_instead_of_waited_for(copied: Pair, name: str) -> None:
    (copied[0] / name).unlink(missing_ok=True)
    os.mkfifo(copied[0] / name)
    with pytest.raises(ModelError, match=r"is a pipe or a device|config\.json is missing"):
        load_pair(settings(copied))
