"""What a run is said to need: against the true architectures, and the plans that are made from it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from echodistill_cli import planning
from echodistill_cli.config.build import build_config
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.family import VAE
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.diffusion.pair import Family
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models import device
from echodistill_cli.models.adapters import TEXT_LAYERS, UNET_LAYERS
from echodistill_cli.models.device import next_saving, plan_memory
from echodistill_cli.models.downloads import planned_downloads, sources_of
from echodistill_cli.models.memory import BACKBONES, TINY_DECODER, estimate
from examples.benchmark.true_size import configuration
from tests.helpers.original_layout import build_sd2_pair, sd2_state, write

CONFIGURATIONS = Path(planning.__file__).parent / "models" / "configurations"


def shipped(family: str, part: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((CONFIGURATIONS / family / part / "config.json").read_text())
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def lora_size(module: torch.nn.Module, targets: tuple[str, ...]) -> int:
    """LoRA parameters per rank."""
    weights = [layer.weight for name, layer in module.named_modules() if name.endswith(targets)]
    # A convolution's A has its kernel, and B is 1 × 1.
    return sum(weight[0].numel() + weight.shape[0] for weight in weights)


@pytest.fixture
def _on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


# --- sizes, against the architectures themselves ----------------------------------------------------------------------


@pytest.mark.usefixtures("_on_meta")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_shipped_configurations_build_the_true_models_of_the_counted_size(family: str) -> None:
    folder = FAMILIES[family].configuration
    size = FAMILIES[family].size
    unet = UNet2DConditionModel(**shipped(folder, "unet"))
    assert count(unet) == size.unet
    for name, targets in UNET_LAYERS.items():
        assert lora_size(unet, targets) == size.adapter[name]
    encoders: list[torch.nn.Module] = [CLIPTextModel(CLIPTextConfig(**shipped(folder, "text_encoder")))]
    if family == "sdxl":
        encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**shipped(folder, "text_encoder_2"))))
    assert sum(map(count, encoders)) == size.text
    assert sum(lora_size(encoder, TEXT_LAYERS) for encoder in encoders) == size.text_adapter
    assert count(AutoencoderKL(**shipped(folder, "vae"))) == VAE
    assert (unet.config.cross_attention_dim, unet.config.in_channels) == (FAMILIES[family].text_width, 4)


@pytest.mark.usefixtures("_on_meta")
def test_the_backbones_and_the_tiny_decoder_have_the_counted_size() -> None:
    large: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    small: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    clip = CLIPVisionConfig(**large, intermediate_size=4096, projection_dim=768)
    assert count(AutoencoderTiny()) == TINY_DECODER
    assert {
        "dino": count(ViTModel(ViTConfig(**small), add_pooling_layer=False)),
        "dinov2": count(Dinov2Model(Dinov2Config(**large, image_size=518))),
        "clip": count(CLIPVisionModelWithProjection(clip)),
    } == BACKBONES


# --- estimates --------------------------------------------------------------------------------------------------------


PAPER = {"loss.sliced_wasserstein": 0.1, "adapter.targets": "cross-kv", "adapter.rank": 16, "text.form": "lora"}
SPARING = {"model.decoder": "tiny", "train.batch_size": 1}


def test_the_estimate_of_the_lean_sd_step_is_the_sum_of_the_counted_parts() -> None:
    # As `examples.benchmark.step_cost` counts it. Without replays all graphs are in memory at once.
    config = build_config("sd-turbo", overrides=PAPER | SPARING | {"train.target_steps": 1, "train.replays": 0})
    parts = estimate(config, FAMILIES["sd"], half=True).parts
    assert parts["UNets"] == pytest.approx(3.23, abs=0.01)
    assert parts["text encoders"] == pytest.approx(0.63, abs=0.01)
    assert parts["VAE"] == pytest.approx(0.005, abs=0.001)  # the decoder; the encoder leaves the device
    assert parts["critics"] == pytest.approx(0.57, abs=0.01)  # CLIP alone, the largest together with its activations
    assert parts["activations"] == pytest.approx(1.08, abs=0.05)
    assert estimate(config, FAMILIES["sd"], half=False).parts["UNets"] == 2 * parts["UNets"]


# Tensors at the peak of a step at 512 pixels, batch 1, by `python -m examples.benchmark.step_cost` (2026-12-01).
@pytest.mark.parametrize(
    ("family", "recipe", "counted"),
    [("sd", "paper", 5.55), ("sd", "preset", 5.04), ("sdxl", "paper", 13.39), ("sdxl", "preset", 13.52)],
)
def test_the_plan_is_what_a_step_of_the_true_models_was_counted_to_hold(
    family: Family, recipe: str, counted: float
) -> None:
    config = configuration(family, "lean", 512, 1, "meta", paper=recipe == "paper")
    expected = estimate(config, FAMILIES[family], half=True)
    assert expected.total - expected.parts["libraries"] == pytest.approx(counted, rel=0.01)


def test_the_default_recipe_of_sd_turbo_stays_within_7_gib_and_sdxl_turbo_within_14_and_a_half() -> None:
    for preset, most in (("sd-turbo", 7.0), ("sdxl-turbo", 14.5)):
        family = FAMILIES[preset.partition("-")[0]]
        assert estimate(build_config(preset, overrides=SPARING), family, half=True).total <= most


def test_where_a_device_has_no_memory_of_its_own_nothing_waits_elsewhere() -> None:
    config = build_config("sd-turbo", overrides=SPARING | {"model.precision": "bf16", "model.device": "cpu"})
    on_gpu, on_cpu = (estimate(config, FAMILIES["sd"], half=True, on_gpu=value) for value in (True, False))
    assert on_cpu.parts["critics"] - on_gpu.parts["critics"] == pytest.approx(0.61, abs=0.01)
    assert on_cpu.parts["VAE"] - on_gpu.parts["VAE"] == pytest.approx(0.16, abs=0.01)
    assert device.expected_memory(config) == on_cpu


@pytest.mark.parametrize(
    "change",
    [
        {"model.decoder": "tiny"},
        {"train.batch_size": 1},
        {"model.resolution": 256},
        {"train.gradient_checkpointing": True},
        {"critic.discriminators": ("dino", "clip")},
        {"model.offload": True},
        {"text.form": "token"},
        {"loss.sliced_wasserstein": 0.0},
    ],
)
def test_each_saving_saves(change: dict[str, Any]) -> None:
    paper = {"text.form": "lora", "loss.sliced_wasserstein": 0.1}
    whole = estimate(build_config("sdxl-turbo", overrides=paper), FAMILIES["sdxl"], half=True)
    saved = estimate(build_config("sdxl-turbo", overrides=paper | change), FAMILIES["sdxl"], half=True)
    assert saved.total < whole.total


def test_a_vae_in_fp16_is_counted_in_single_precision() -> None:
    bf16, fp16 = (
        estimate(build_config("sdxl-turbo", overrides={"model.precision": name}), FAMILIES["sdxl"], half=True).parts
        for name in ("bf16", "fp16")
    )
    assert fp16["VAE"] == 2 * bf16["VAE"]


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "vram", "chosen"),
    [
        ("sd-turbo", "6.5", ("tiny", 1, ("dino", "dinov2", "clip"), False, False)),
        ("sd-turbo", "8", ("tiny", 2, ("dino", "dinov2", "clip"), False, False)),
        ("sd-turbo", "12", ("tiny", 2, ("dino", "dinov2", "clip"), False, False)),
        ("sd-turbo", "16", ("full", 2, ("dino", "dinov2", "clip"), False, False)),
        ("sdxl-turbo", "12", ("tiny", 1, ("dino", "dinov2", "clip"), True, True)),
        ("sdxl-turbo", "16", ("tiny", 1, ("dino", "dinov2", "clip"), False, False)),
        ("sdxl-turbo", "24", ("tiny", 2, ("dino", "dinov2", "clip"), False, False)),
    ],
)
def test_a_plan_keeps_as_much_of_the_method_as_fits(preset: str, vram: str, chosen: tuple[Any, ...]) -> None:
    build = partial(build_config, preset, None, {})
    plan = device.fit_to_memory(build, vram)
    config = build(plan.settings)
    train = config.train
    found = (config.model.decoder, train.batch_size, config.critic.discriminators, train.gradient_checkpointing)
    assert (*found, config.model.offload) == chosen
    assert config.model.precision == "bf16"
    assert plan.estimate.total < float(vram)


def test_what_a_person_set_is_not_changed_by_a_plan(tmp_path: Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text('[critic]\ndiscriminators = ["dinov2"]\n')
    build = partial(build_config, "sd-turbo", file, {"train.batch_size": 3, "model.precision": "fp16"})
    config = build(device.fit_to_memory(build, "12").settings)
    assert (config.train.batch_size, config.critic.discriminators) == (3, ("dinov2",))
    assert (config.model.precision, config.model.decoder) == ("fp16", "tiny")


def test_a_model_that_fits_in_no_way_is_refused_with_the_least_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"does not fit into 8\.0 GiB: the smallest plan needs about 9\.\d"):
        device.fit_to_memory(partial(build_config, "sdxl-turbo", None, {}), "8")


def test_a_plan_says_what_it_chose_and_what_it_expects() -> None:
    plan = device.fit_to_memory(partial(build_config, "sd-turbo", None, {}), "8")
    first, second = device.memory_lines(plan)
    assert first.startswith("Plan for 8.0 GiB: model.precision = bf16, model.decoder = tiny")
    assert first.endswith("train.batch_size = 2")
    assert second.startswith("About 6.5 GiB of device memory: UNets 3.2, ")


def test_auto_plans_for_this_machine() -> None:
    def build(fitted: Mapping[str, Any]) -> Config:
        return build_config("sd-turbo", None, {"model.device": "cpu", "model.resolution": 64}, fitted)

    try:
        plan = device.fit_to_memory(build, "auto")
    except ConfigError as error:
        pytest.skip(f"too little memory is free here: {error}")
    assert plan.settings["model.precision"] == "bf16"


@pytest.mark.parametrize("vram", ["lots", "-1", "nan"])
def test_a_size_that_is_none_is_refused(vram: str) -> None:
    with pytest.raises(ConfigError, match=f"--vram {vram}"):
        device.fit_to_memory(partial(build_config, "sd-turbo", None, {}), vram)


def test_models_of_unknown_size_have_no_plan(small_pair: tuple[Path, Path]) -> None:
    build = partial(build_config, str(small_pair[0]), None, {})
    assert device.expected_memory(build({})) is None
    with pytest.raises(ModelError, match=r"The memory that .* needs is not known"):
        device.fit_to_memory(build, "8")


def one_file(path: Path, width: int | None) -> Path:
    """Write a checkpoint in one file, of which only the layer that tells the family is there, or not."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({"other": torch.zeros(2)} if width is None else {key: torch.zeros(320, width)}, path)
    return path


@pytest.mark.parametrize(("width", "preset"), [(1024, "sd-turbo"), (2048, "sdxl-turbo")])
def test_a_checkpoint_of_another_tool_gets_the_plan_of_its_family(width: int, preset: str, tmp_path: Path) -> None:
    file = one_file(tmp_path / "own.safetensors", width)
    plan = device.fit_to_memory(partial(build_config, str(file), None, {"model.teacher": "someone/base"}), "16")
    assert plan.estimate.total == device.fit_to_memory(partial(build_config, preset, None, {}), "16").estimate.total


@pytest.mark.parametrize(
    ("name", "width", "told"),
    [
        ("missing.safetensors", 0, "no such folder or file"),
        ("checkpoints/missing.safetensors", 0, "no such folder or file"),
        ("old.safetensors", 768, "is a Stable Diffusion 1 model"),
        ("stub.safetensors", None, "the family of its weights is unknown"),
    ],
)
def test_a_plan_says_what_is_wrong_with_a_file(
    name: str, width: int | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if width != 0:
        one_file(tmp_path / name, width)
    with pytest.raises(ModelError, match=told):
        device.fit_to_memory(partial(build_config, name, None, {}), "12")


def test_the_family_of_a_model_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").touch()
    (folder / "unet" / "config.json").write_text(json.dumps(shipped("sdxl", "unet")))
    assert device.family_of(ModelConfig(student=str(folder))) is FAMILIES["sdxl"]
    assert device.family_of(ModelConfig(student="stabilityai/sdxl-turbo")) is FAMILIES["sdxl"]
    assert device.family_of(ModelConfig(student="someone/something", offline=True)) is None


def test_a_single_file_that_does_not_say_what_it_predicts_is_spoken_of(tmp_path: Path) -> None:
    student = build_sd2_pair(tmp_path / "sd2")[0]
    file = write(tmp_path / "mine.safetensors", sd2_state(student))
    (said,) = planning.assumptions(ModelConfig(student=str(file), teacher=str(student)))
    assert said.startswith("mine.safetensors does not say what it predicts; noise (epsilon) is assumed.")
    assert "--set model.student_prediction=v_prediction" in said
    assert not list(planning.assumptions(ModelConfig(student=str(file), student_prediction="epsilon")))


def test_offline_every_part_to_fetch_is_named_without_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = build_config("sdxl-turbo", overrides={"model.offline": True, "model.decoder": "tiny"})
    found = dict(planned_downloads(config.model, sources_of(config)))
    assert "stabilityai/sdxl-turbo/text_encoder_2" in found
    assert "stabilityai/stable-diffusion-xl-base-1.0/unet" in found
    assert "stabilityai/stable-diffusion-xl-base-1.0/vae" not in found
    assert {"madebyollin/taesdxl", "facebook/dino-vits16"} <= found.keys()
    assert set(found.values()) == {None}


def test_a_student_made_by_a_lora_needs_one_unet_and_the_lora(tmp_path: Path) -> None:
    file = tmp_path / "one-step.safetensors"
    file.write_bytes(bytes(2**20))
    changes = {"model.student_lora": str(file)}
    shared = estimate(build_config("someone/base", overrides=changes), FAMILIES["sdxl"], half=True).parts
    two = estimate(build_config("someone/base"), FAMILIES["sdxl"], half=True).parts
    assert shared["UNets"] == two["UNets"] / 2
    assert shared["student LoRA"] == pytest.approx(1 / 1024)


def dry_run(photos: Path, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`train --dry-run` in a process of its own, with an empty cache and no network."""
    words = [sys.executable, "-m", "echodistill_cli", "train", str(photos), "--dry-run", "--offline", *options]
    folders = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | folders)


def test_a_dry_run_of_sdxl_turbo_is_readable_offline(photo_folder: Path, tmp_path: Path) -> None:
    done = dry_run(photo_folder, tmp_path, "--model", "sdxl-turbo", "--vram", "16")
    assert done.returncode == 0, done.stderr
    assert "Plan for 16.0 GiB: model.precision = bf16, model.decoder = tiny" in done.stderr
    assert "About 14.5 GiB of device memory: UNets 9.6, text encoders 1.5" in done.stderr
    assert "stabilityai/sdxl-turbo (to be downloaded)" in done.stdout
    assert "stabilityai/stable-diffusion-xl-base-1.0/unet (about 5.13 GB)" in done.stdout
    assert "GB in total" in done.stdout
    assert "about 14.5 GiB (UNets 9.6" in done.stdout


def test_a_dry_run_in_json_has_the_estimate_and_every_download(photo_folder: Path, tmp_path: Path) -> None:
    done = dry_run(photo_folder, tmp_path, "--model", "sd-turbo", "--vram", "7", "--batch-size", "4", "--json", "-q")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["memory"]["gib"] == pytest.approx(sum(plan["memory"]["parts"].values()))
    assert plan["downloads"]["stabilityai/sd-turbo/unet"] is None
    # What was given on the command line stays; the rest makes room for it.
    assert plan["config"]["train"]["batch_size"] == 4
    assert plan["config"]["model"]["offload"]


def test_after_an_exhausted_memory_the_savings_of_a_plan_are_named_one_after_the_other() -> None:
    steps: list[dict[str, Any]] = [
        {"model.precision": "fp32"},
        {"model.precision": "auto"},
        {"model.decoder": "tiny"},
        {"train.batch_size": 1},
        {"train.gradient_checkpointing": True},
        {"model.offload": True},
    ]
    hints: dict[str, list[str]] = {"sd-turbo": [], "sdxl-turbo": []}
    for preset, said in hints.items():
        changes: dict[str, Any] = {"train.batch_size": 2}
        for step in steps:
            changes |= step
            said.append(next_saving(build_config(preset, overrides=changes)).removeprefix("Try ").removesuffix("."))
    first, offload = ["--precision bf16", "--decoder tiny", "--batch-size 1"], "--set model.offload=true"
    last = "a smaller --resolution, or a device with more memory"
    # One encoder waits for the next, so that leaving one out saves nothing, and SD's UNet keeps less than they need.
    assert hints == {
        "sd-turbo": [*first, offload, offload, last],
        "sdxl-turbo": [*first, "--gradient-checkpointing", offload, last],
    }
    compiled = {"model.decoder": "tiny", "train.batch_size": 1, "train.compile": "default"}
    assert next_saving(build_config("sd-turbo", overrides=compiled)) == "Try --discriminators dino,clip."


def test_after_an_exhausted_memory_no_setting_is_named_that_saves_nothing() -> None:
    common = {"model.decoder": "tiny", "train.batch_size": 1, "train.gradient_checkpointing": True}
    # On small images this critic is smaller than the others, and it contradicts offloading.
    critics = {"critic.discriminators": ("teacher",), "model.resolution": 64}
    assert "--resolution" in next_saving(build_config("sd-turbo", overrides=common | critics))
    shared = {"model.student_lora": "one-step.safetensors", "critic.discriminators": ("dino",)}
    assert "--resolution" in next_saving(build_config("someone/base", overrides=common | shared))


def test_a_plan_is_made_by_arithmetic_alone() -> None:
    plan = plan_memory(partial(build_config, "sd-turbo", None, {}), FAMILIES["sd"], 100.0, "fp32")
    assert plan.settings == {"model.precision": "fp32", "model.decoder": "full", "train.batch_size": 2}
