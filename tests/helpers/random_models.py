"""Pairs of real diffusers models, a thousand times smaller than SD-Turbo and SDXL-Turbo, with random weights.

The tests train on them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

# Each word here becomes one token; anything else falls back to bytes. The order is from common to rare.
WORDS = (
    *("a", "photo", "of", "the", "in", "on", "dog", "cat", "teapot", "toy", "close", "up", "far", "away", "very"),
    *("small", "rendering", "snow", "beach", "ohwx", "sks"),
)

_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
_EULER = {k: v for k, v in _SCHEDULE.items() if k not in ("set_alpha_to_one", "clip_sample")}
# As in the published files: CLIP resizes the short side and crops, DINO resizes to a square.
CLIP_SEES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
DINO_SEES = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def build_small_pair(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write a student (ε, Euler trailing) and a teacher (v, DDIM), both whole diffusers folders; returns their paths.

    Pictures are 64 pixels, latents 8 x 8 x 4.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    torch.manual_seed(seed)
    shared = _shared_parts(folder)
    student = EulerDiscreteScheduler(**_EULER, prediction_type="epsilon", timestep_spacing="trailing")
    teacher = DDIMScheduler(**_SCHEDULE, prediction_type="v_prediction")
    return (
        _save(folder / "student", {**shared, "unet": _unet(), "scheduler": student}),
        _save(folder / "teacher", {**shared, "unet": _unet(), "scheduler": teacher}),
    )


def build_small_sdxl_pair(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """The same for SDXL: a student (ε, EulerAncestral trailing) and a teacher (ε, Euler leading), two text encoders.

    The cross-attention reads 32 + 48 wide text; pictures are 64 pixels, latents 8 x 8 x 4, scaled as SDXL's.
    """
    from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    shared = _shared_parts(folder)
    shared["vae"].register_to_config(scaling_factor=0.13025, force_upcast=True)
    settings: dict[str, Any] = shared["text_encoder"].config.to_dict()
    settings |= {"hidden_size": 48, "num_attention_heads": 3, "projection_dim": 40}
    shared |= {
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**settings)),
        "tokenizer_2": shared["tokenizer"],
    }
    ancestral = {key: value for key, value in _EULER.items() if key != "interpolation_type"}
    student = EulerAncestralDiscreteScheduler(**ancestral, prediction_type="epsilon", timestep_spacing="trailing")
    teacher = EulerDiscreteScheduler(**_EULER, prediction_type="epsilon", timestep_spacing="leading")
    xl = {
        "cross_attention_dim": 32 + 48,
        # Three levels of two layers, as in the true ones: their block numbers are in the names of LoRA files.
        "block_out_channels": (8, 16, 24),
        "attention_head_dim": (1, 2, 3),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    }
    return (
        _save(folder / "student", {**shared, "unet": _unet(**xl), "scheduler": student}),
        _save(folder / "teacher", {**shared, "unet": _unet(**xl), "scheduler": teacher}),
    )


def build_small_backbones(folder: Path, *, seed: int = 0) -> dict[str, Path]:
    """Write a tiny DINO (ViT), DINOv2 and CLIP vision tower with random weights; returns their folders by name."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    models = {
        "dino": ViTModel(ViTConfig(**size, intermediate_size=64), add_pooling_layer=False),
        "dinov2": Dinov2Model(Dinov2Config(**size, mlp_ratio=2)),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**size, intermediate_size=64, projection_dim=24)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def _shared_parts(folder: Path) -> dict[str, Any]:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = small_tokenizer(folder / "vocabulary")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=2,  # as the published configurations have it
        )
    )
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}


def _unet(**changes: Any) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**settings | changes)


def small_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer class over a few words and every byte."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair, pieces = pieces[:2], [pieces[0] + pieces[1], *pieces[2:]]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
            if pieces[0] not in tokens:
                tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 32})
    )
    return CLIPTokenizer.from_pretrained(folder)


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in byte-level BPE (Radford et al. 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in plain]
    by_byte = {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}
    return [by_byte[byte] for byte in range(256)]


def _save(folder: Path, parts: dict[str, Any]) -> Path:
    is_xl = "text_encoder_2" in parts
    kind = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.42.1"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
    none = [None, None]
    index |= {"feature_extractor": none} | (
        {"image_encoder": none, "force_zeros_for_empty_prompt": True} if is_xl else {"safety_checker": none}
    )
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_distillation(base: Path, file: Path) -> Path:
    """Write a random LoRA on attention and convolutions in diffusers' layout, as Hyper-SD's and LCM's are."""
    from diffusers import StableDiffusionPipeline
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(5)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        file.parent,
        unet_lora_layers=layers,
        weight_name=file.name,
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return file


def build_score_encoders(folder: Path, backbones: dict[str, Path]) -> tuple[Path, Path]:
    """Folders of a whole tiny CLIP with its tokenizer, and of a tiny ViT, both with random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    clip, dino = folder / "clip", folder / "dino"
    tokenizer = small_tokenizer(clip)
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "projection_dim": 24}
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=size | words, vision_config=size | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    CLIPModel(config).save_pretrained(clip)
    shutil.copytree(backbones["dino"], dino)
    for place, sees in ((clip, CLIP_SEES), (dino, DINO_SEES)):
        (place / "preprocessor_config.json").write_text(json.dumps(sees))
    return clip, dino
