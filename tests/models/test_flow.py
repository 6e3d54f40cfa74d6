"""The transformers at their true size, on the meta device: layers, counts and the memory that a run needs."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import nn
from transformers import Gemma2Config, Gemma2Model, Qwen3Config, Qwen3ForCausalLM

from echodistill_cli.config.build import PRESETS, build_config
from echodistill_cli.config.families import FAMILIES, check_index, family_of_source
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.transformer_keys import ARCHITECTURES, attention_paths, family_of_layers, is_published, knows
from echodistill_cli.models import device
from echodistill_cli.models.flow import load_flow_schedule, load_words
from tests.helpers.flow_models import small_qwen_tokenizer

# The published configurations (2026-11): Sana_Sprint_0.6B and _1.6B_1024px_diffusers, FLUX.2-klein-4B.
_SANA: dict[str, Any] = {"in_channels": 32, "attention_head_dim": 32, "caption_channels": 2304, "guidance_embeds": True}
_SANA |= {"qk_norm": "rms_norm_across_heads", "sample_size": 32}
SMALL: dict[str, Any] = _SANA | {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
SMALL |= {"cross_attention_head_dim": 72, "cross_attention_dim": 1152}
LARGE: dict[str, Any] = _SANA | {"num_layers": 20, "num_attention_heads": 70, "num_cross_attention_heads": 20}
LARGE |= {"cross_attention_head_dim": 112, "cross_attention_dim": 2240}
KLEIN: dict[str, Any] = {"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128}
KLEIN |= {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
TRUE = {"sana": (SanaTransformer2DModel, LARGE), "flux2": (Flux2Transformer2DModel, KLEIN)}
_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
each_family = pytest.mark.parametrize("family", ["sana", "flux2"])


@functools.cache
def transformer(family: str) -> Any:
    kind, settings = TRUE[family]
    with torch.device("meta"):
        return kind(**settings)


def adapted(module: nn.Module, pattern: str) -> dict[str, Any]:
    """The layers that peft gives a LoRA for a pattern."""
    return {name: layer for name, layer in module.named_modules() if re.fullmatch(pattern, name)}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@each_family
def test_every_layer_of_the_recipe_exists_in_the_published_transformer(family: str) -> None:
    record, model = FAMILIES[family], transformer(family)
    found = adapted(model, record.layers["attention"])
    assert {type(layer) for layer in found.values()} == {nn.Linear}
    assert set(found) == set(attention_paths(family))
    assert len(found) == {"sana": 20 * 8, "flux2": 5 * 8 + 20 * 2}[family]
    assert all(knows(family, path) for path in found)
    for targets, pattern in record.layers.items():
        weights = [layer.weight for layer in adapted(model, pattern).values()]
        assert record.size.adapter[targets] == sum(sum(weight.shape) for weight in weights)
    assert is_published(family, model.config)
    widths = {path: layer.in_features for path, layer in found.items()}
    assert family_of_layers(widths, {}) == family  # by their widths, without a header


def test_cross_attention_of_sana_is_its_keys_and_values_and_the_small_sprint_is_known() -> None:
    found = adapted(transformer("sana"), FAMILIES["sana"].layers["cross-kv"])
    assert sorted({name.split(".", 2)[2] for name in found}) == ["attn2.to_k", "attn2.to_v"]
    with torch.device("meta"):
        small = SanaTransformer2DModel(**SMALL)
    names = adapted(small, FAMILIES["sana"].layers["attention"])
    assert set(names) == set(attention_paths("sana", 0))
    assert family_of_layers({name: layer.in_features for name, layer in names.items()}, {}) == "sana"
    assert not is_published("sana", small.config)  # a plan is made for the larger one
    assert family_of_layers({"transformer_blocks.0.attn2.to_q": 2048}, {}) == "unknown"  # LTX-Video


def test_parts_have_the_counted_sizes() -> None:
    qwen = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    gemma = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
    channels = (128, 256, 512, 512, 1024, 1024)
    scales = ((), (), (), (5,), (5,), (5,))
    with torch.device("meta"):
        sana, flux = FAMILIES["sana"].size, FAMILIES["flux2"].size
        assert (count(transformer("sana")), count(transformer("flux2"))) == (sana.unet, flux.unet)
        assert count(Gemma2Model(Gemma2Config(vocab_size=256_000, **gemma))) == sana.text
        words: dict[str, Any] = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
        assert count(Qwen3ForCausalLM(Qwen3Config(**qwen, **words, tie_word_embeddings=True))) == flux.text
        vae = AutoencoderDC(
            encoder_block_types=_BLOCKS,
            decoder_block_types=_BLOCKS,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
        )
        assert (count(vae), count(AutoencoderKLFlux2())) == (sana.vae, flux.vae)


# Memory of the smallest plan at 1024 pixels, in GiB: with pixel losses, and with latent losses alone.
@pytest.mark.parametrize(("preset", "pixels", "latents"), [("sana-sprint", 32, 12), ("flux2-klein", 32, 24)])
def test_the_smallest_card_of_each_preset(preset: str, pixels: int, latents: int) -> None:
    alone: dict[str, Any] = {"critic.discriminators": (), "critic.identity": "none", "echo.start": None}
    family = FAMILIES[str(PRESETS[preset].family)]
    cards = (12, 16, 24, 32, 40, 48, 80)
    for overrides, expected in (({}, pixels), (alone, latents)):

        def build(fitted: Any, overrides: Any = overrides) -> Any:
            return build_config(preset, None, overrides | {"model.offline": True}, fitted)

        fits = []
        for card in cards:
            try:
                plan = device.plan_memory(build, family, card, "bf16")
            except ConfigError:
                continue
            fits.append(card)
            assert "tiny" not in plan.settings.values()  # there is no tiny decoder for these latents
        assert min(fits) == expected


@pytest.mark.parametrize("preset", ["sana-sprint", "flux2-klein"])
def test_a_preset_goes_with_its_family_and_names_its_models(preset: str) -> None:
    config = build_config(preset)
    family = FAMILIES[str(PRESETS[preset].family)]
    assert family.preset == preset
    assert config.text.form == "frozen"
    assert device.family_of(config.model) is family
    for source in (config.model.student, config.model.teacher):
        assert family_of_source(source) is family
        assert build_config(source).model.teacher == config.model.teacher
        assert build_config(source).text.form == "frozen"
    assert ARCHITECTURES[family.name].pipeline == family.pipeline
    for other in ("black-forest-labs/FLUX.1-schnell", "someone/sanas-sd-turbo", "someone/klein"):
        assert family_of_source(other) is None


def test_transformers_that_are_not_supported_are_refused_by_name(tmp_path: Path) -> None:
    index = '{"_class_name": "ZImagePipeline", "transformer": ["diffusers", "ZImageTransformer2DModel"]}'
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ModelError, match=r"is a ZImagePipeline, which has no UNet and is not supported"):
        check_index(str(tmp_path))


def test_a_schedule_without_a_flow_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ('{"_class_name": "DDIMScheduler"}', "not the schedule of a rectified flow"),
        ('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1}', "not the schedule of a rectified flow"),
        ('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "much"}', "cannot be read"),
    ):
        (tmp_path / "scheduler_config.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            load_flow_schedule(tmp_path, 4096, 4)


def test_klein_is_shifted_as_in_its_pipeline_by_tokens_and_steps(tmp_path: Path) -> None:
    text = '{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true, "shift": 3.0}'
    (tmp_path / "scheduler_config.json").write_text(text)
    middles = [float(load_flow_schedule(tmp_path, *pair).sigmas[499]) for pair in ((4096, 4), (1024, 4), (4096, 25))]  # type: ignore[index]
    # mu of 4096 tokens and 4 steps is 2.29: σ = 0.908 where time is one half.
    assert middles[0] == pytest.approx(0.9077, abs=2e-3)
    assert middles[1] < middles[0]
    assert middles[2] < middles[0]


def test_no_template_of_a_stranger_is_run(tmp_path: Path) -> None:
    tokenizer = small_qwen_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('it was run') }}"
    tokenizer.save_pretrained(tmp_path)
    from echodistill_cli.diffusion.flux2 import Flux2Prompts

    words = load_words(FAMILIES["flux2"], tmp_path)
    assert Flux2Prompts(words, nn.Embedding(1, 1)).room > 400
    for file in tmp_path.iterdir():
        file.write_text("{")
    with pytest.raises(ModelError, match=r"cannot be read"):
        load_words(FAMILIES["flux2"], tmp_path)
