"""LoRA weights, files and tiny pipelines for the tests of LoRA files."""

from __future__ import annotations

import logging
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from echodistill_cli.lora import keys as lora_keys
from echodistill_cli.lora.header import LoraHeader
from echodistill_cli.lora.inspect import Inspection, inspect_file
from echodistill_cli.lora.readers import Verdict
from echodistill_cli.lora.safetensors_io import write_safetensors
from echodistill_cli.lora.tensors import LoraWeights

TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1"]
# The published architectures, as far as they decide names: hub configs of stabilityai/sd-turbo and sdxl-turbo.
SD2_UNET = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
TINY_SD_UNET = {
    "block_out_channels": (16, 32),
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_SDXL_UNET = SDXL_UNET | {
    "block_out_channels": (8, 16, 16),
    "attention_head_dim": (2, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64,
    "norm_num_groups": 4,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
}
TEXT_LAYER = {f"encoder.layers.0.self_attn.{name}": (8, 8) for name in TEXT_LAYERS}
TEXT_WIDTHS = {"sd2": {"text_encoder": 1024}, "sdxl": {"text_encoder": 768, "text_encoder_2": 1280}}
READERS = ("diffusers", "ComfyUI", "A1111", "Forge", "sd-scripts", "InvokeAI", "SD.Next", "stable-diffusion.cpp")


def tiny_text_encoder(kind: type[nn.Module]) -> Any:
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return kind(config).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    letters = list(string.ascii_lowercase)
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {word: index for index, word in enumerate(words)} | {"<|startoftext|>": 52, "<|endoftext|>": 53}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def tiny_sd() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=tiny_text_encoder(CLIPTextModel),
        tokenizer=tiny_tokenizer(),
        unet=UNet2DConditionModel(sample_size=8, **TINY_SD_UNET).eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=tiny_text_encoder(CLIPTextModel),
        text_encoder_2=tiny_text_encoder(CLIPTextModelWithProjection),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=UNet2DConditionModel(sample_size=8, **TINY_SDXL_UNET).eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


@torch.no_grad()
def predict(pipe: Any) -> Tensor:
    """The UNet's output through all text encoders, from fixed inputs."""
    ids = torch.tensor([[52, 5, 9, 40, 53]])
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    encoded = [pipe.text_encoder(ids, output_hidden_states=True)]
    extra = None
    if hasattr(pipe, "text_encoder_2"):
        encoded.append(pipe.text_encoder_2(ids, output_hidden_states=True))
        extra = {"text_embeds": encoded[1].text_embeds, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    # The last hidden states, so that every layer's LoRA shows.
    hidden = torch.cat([output.hidden_states[-1] for output in encoded], dim=-1)
    return pipe.unet(sample, 999, hidden, added_cond_kwargs=extra).sample


def random_adapters(pipe: Any) -> list[LoraWeights]:
    """Give a pipeline random adapters, as if trained, and take them out as peft has them; α is 2.5 times the rank."""
    weights = []
    for component in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, component, None)
        if module is None:
            continue
        # The text side has another rank, as by default.
        rank, targets = (4, UNET_LAYERS) if component == "unet" else (2, TEXT_LAYERS)
        alpha = 2.5 * rank
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        module.add_adapter(config, adapter_name="default")
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        weights.append(LoraWeights(component, get_peft_model_state_dict(module), rank, alpha))
    return weights


@contextmanager
def log_lines() -> Iterator[list[str]]:
    """Everything that diffusers and transformers warn about."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector = Collector(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(collector)
        logger.setLevel(logging.WARNING)  # a test of the benchmark may have quieted it before
    try:
        yield lines
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(collector)
            logger.setLevel(level)


def random_weights(component: str, modules: dict[str, tuple[int, int]], rank: int = 2) -> LoraWeights:
    tensors = {}
    for path, (width_in, width_out) in modules.items():
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, width_in)
        tensors[f"{path}.lora_B.weight"] = torch.randn(width_out, rank)
    return LoraWeights(component, tensors, rank, float(rank))


SMALL = random_weights("unet", {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (1024, 8)})


def header_fields(family: str) -> LoraHeader:
    return LoraHeader(
        name="sks-dog",
        family="sdxl" if family == "sdxl" else "sd",
        base_model="stabilityai/sdxl-turbo" if family == "sdxl" else "stabilityai/sd-turbo",
        token="sks",
        class_name="dog",
        trigger="sks dog",
        rank=1,
        alpha=2.0,
        resolution=512,
        steps=1000,
        seed=0,
        photos=5,
        role="student",
        prediction_type="epsilon",
        usage="1 step, guidance 0, 512x512.",
        config_sha256="0" * 64,
        version="0.1.0",
    )


def constant_weights(paths: list[str], context: int, component: str = "unet") -> LoraWeights:
    """LoRA of rank 1 on these modules; all widths but the cross-attention's context are short."""
    tensors = {}
    for path in paths:
        width = context if component != "unet" or path.endswith(("attn2.to_k", "attn2.to_v")) else 4
        tensors[f"{path}.lora_A.weight"] = torch.ones(1, width)
        tensors[f"{path}.lora_B.weight"] = torch.ones(4, 1)
    return LoraWeights(component, tensors, rank=1, alpha=2.0)


def full_weights(family: str, also: tuple[str, ...] = ()) -> list[LoraWeights]:
    """What `--targets attention --text lora` trains, and modules with other endings, at the true architecture."""
    unet = [path for path in lora_keys.unet_paths(family) if ".attn" in path or path.endswith(also)]
    weights = [constant_weights(unet, lora_keys.ARCHITECTURES[family].context)]
    for component, layers in lora_keys.ARCHITECTURES[family].text_layers.items():
        text = [path for path in lora_keys.text_paths(layers) if path.endswith(tuple(TEXT_LAYERS))]
        weights.append(constant_weights(text, TEXT_WIDTHS[family][component], component))
    return weights


def kohya_pair(module: str, width: int = 1024, rank: int = 2) -> dict[str, Tensor]:
    return {f"{module}.lora_down.weight": torch.ones(rank, width), f"{module}.lora_up.weight": torch.ones(4, rank)}


def inspection_of(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Inspection:
    path = folder / "some.safetensors"
    write_safetensors(path, tensors, metadata or {})
    return inspect_file(path)


def by_reader(inspection: Inspection) -> dict[str, Verdict]:
    return {verdict.reader: verdict for verdict in inspection.readers}
