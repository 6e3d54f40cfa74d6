"""The families of flow-matching transformers as data, and what a run with them cannot do. No torch.

To add a family:

1. a record in `TRANSFORMERS`, with the names of its LoRA layers, and a preset in `config/presets`;
2. its denoiser and its prompt encoder in a module of `diffusion`, as `diffusion/sana.py`;
3. a row in `models/flow.py`, which loads them;
4. a row in `ARCHITECTURES` of `lora/transformer_keys.py`, by which LoRA files are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from echodistill_cli.config.family import Family, Size
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError

# Activations are a quarter of those at 1024 pixels, the families' size, because some do not grow with the image.
_ATTENTION = r"to_q|to_k|to_v|to_out\.0"
TRANSFORMERS: Mapping[str, Family] = {
    "sana": Family(
        name="sana",
        preset="sana-sprint",
        architectures=("sana",),
        configuration="",
        pipeline="SanaSprintPipeline",
        text_width=2304,
        size_conditioning=False,
        zero_null=False,
        padding={"tokenizer": "<pad>"},
        tiny_decoder="",
        checkpoint_prefix="",
        size=Size(
            unet=1_610_237_472,
            text=2_614_341_888,
            adapter={"cross-kv": 179_200, "attention": 716_800},
            text_adapter=0,
            activations={"cross-kv": 0.98, "attention": 1.26},
            checkpointed=0.02,
            vae=312_250_275,
            decoder=3.61,
        ),
        transformer="SanaTransformer2DModel",
        teacher_pipeline="SanaPipeline",
        shared=("in_channels", "caption_channels", "num_layers", "num_attention_heads", "attention_head_dim"),
        layers={"cross-kv": r".*\.attn2\.(to_k|to_v)", "attention": rf".*\.attn[12]\.({_ATTENTION})"},
        names=r"(^|/)sana(_sprint|1\.5|_\d+m)_",
        sampling="guidance 4.5 (embedded, without CFG)",
        resolution=1024,
        fp16=False,  # Gemma 2 was trained in bf16, and its features overflow
    ),
    "flux2": Family(
        name="flux2",
        preset="flux2-klein",
        architectures=("flux2",),
        configuration="",
        pipeline="Flux2KleinPipeline",
        text_width=7680,
        size_conditioning=False,
        zero_null=False,
        padding={"tokenizer": "<|endoftext|>"},
        tiny_decoder="",
        checkpoint_prefix="",
        size=Size(
            unet=3_875_544_576,
            text=4_022_468_096,
            adapter={"attention": 1_167_360},
            text_adapter=0,
            activations={"attention": 4.85},
            checkpointed=0.17,
            vae=84_046_115,
            decoder=2.78,
        ),
        transformer="Flux2Transformer2DModel",
        shared=("in_channels", "joint_attention_dim", "num_layers", "num_single_layers", "num_attention_heads"),
        layers={
            "attention": rf"transformer_blocks\.\d+\.attn\.({_ATTENTION}|add_[qkv]_proj|to_add_out)"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        },
        names=r"(^|/)flux\.?2-klein",
        sampling="no guidance (CFG 1)",
        resolution=1024,
    ),
}


def family_of_transformer(settings: Mapping[str, Any]) -> Family | None:
    """Return the family of a transformer from its diffusers configuration; None if there is none."""
    kind = settings.get("_class_name")
    return next((family for family in TRANSFORMERS.values() if family.transformer == kind), None)


def family_of_name(source: str) -> Family | None:
    """Return the family that a hub id names; None if it names none."""
    return next((family for family in TRANSFORMERS.values() if re.search(family.names, source.lower())), None)


# (condition, message, remedy): what a run with a transformer cannot do. The message may name the preset.
_UNSUPPORTED: tuple[tuple[Callable[[Config, Family], Any], str, str], ...] = (
    (
        lambda c, _: c.text.form != "frozen",
        "The text encoder of {0} is a language model, in which no token vector and no LoRA is trained.",
        "Use --text frozen.",
    ),
    (
        lambda c, family: c.adapter.targets not in family.layers,
        "{0} has no layers for adapter.targets = {1}.",
        "Use --set adapter.targets=attention.",
    ),
    (
        lambda c, _: "teacher" in c.critic.discriminators and c.loss.adversarial,
        "The teacher of {0} cannot be a discriminator: only a UNet has the blocks for it.",
        "Use --discriminators dino.",
    ),
    (lambda c, _: c.model.decoder == "tiny", "{0} has no tiny decoder.", "Use --decoder full."),
    (
        lambda c, _: c.model.student_lora,
        "A distillation LoRA on {0} is not supported.",
        "Name the distilled model with --model, and its base with --teacher.",
    ),
    (
        lambda c, family: c.model.precision == "fp16" and not family.fp16,
        "{0} overflows in fp16.",
        "Use --precision bf16, or fp32 on a GPU without bf16.",
    ),
    (lambda c, _: c.model.vae, "{0} is used with its own VAE.", "Omit --vae."),
    (lambda c, _: c.model.tokenizer, "{0} is used with its own tokenizer.", "Remove model.tokenizer."),
    (
        lambda c, _: {c.model.student_prediction, c.model.teacher_prediction} != {"auto"},
        "The models of {0} predict a velocity, so model.student_prediction and model.teacher_prediction are auto.",
        "Remove both.",
    ),
)


def check_supported(config: Config, family: Family) -> None:
    """Check that a run asks nothing of its models that transformers cannot do.

    Args:
        config: of the run.
        family: of its models; nothing is checked for UNets.

    Raises:
        ConfigError: it does.
    """
    if not family.is_flow:
        return
    for condition, message, remedy in _UNSUPPORTED:
        if condition(config, family):
            raise ConfigError(message.format(family.preset, config.adapter.targets), remedy)
