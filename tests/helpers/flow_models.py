"""Pairs of real diffusers transformers, tiny and random: SANA-Sprint with SANA, and FLUX.2 klein with its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.random_models import WORDS, byte_letters

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_LANGUAGE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8}
_LANGUAGE |= {"num_key_value_heads": 1, "max_position_embeddings": 4096}


def build_small_sana_pair(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write a SANA-Sprint student and a SANA teacher. Images are 64 pixels, latents 8 x 8 x 4."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_scm import SCMScheduler
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    tokenizer = small_gemma_tokenizer()
    config = Gemma2Config(vocab_size=len(tokenizer), num_hidden_layers=2, **_LANGUAGE, eos_token_id=1, bos_token_id=2)
    blocks = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
    shared = {
        "vae": AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 8, 16, 16),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            scaling_factor=0.41407,
        ),
        "text_encoder": Gemma2Model(config),
        "tokenizer": tokenizer,
    }
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return (
        _save(
            folder / "student",
            "SanaSprintPipeline",
            {**shared, "transformer": _sana(guidance_embeds=True), "scheduler": SCMScheduler()},
        ),
        _save(
            folder / "teacher",
            "SanaPipeline",
            {**shared, "transformer": _sana(), "scheduler": DPMSolverMultistepScheduler(**flow)},
        ),
    )


def build_small_flux2_pair(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """Write a FLUX.2 klein student and its base. Images are 64 pixels, tokens 16 x 16 pixels of 16 channels."""
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = small_qwen_tokenizer()
    # The pipeline reads the hidden states 9, 18 and 27.
    language = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=27, **_LANGUAGE, tie_word_embeddings=True)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    shared = {"vae": vae, "text_encoder": Qwen3ForCausalLM(language), "tokenizer": tokenizer}
    shared["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return (
        _save(folder / "student", "Flux2KleinPipeline", {**shared, "transformer": _flux2()}, is_distilled=True),
        _save(folder / "teacher", "Flux2KleinPipeline", {**shared, "transformer": _flux2()}, is_distilled=False),
    )


def _sana(**changes: Any) -> Any:
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=_LANGUAGE["hidden_size"],
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        **changes,
    )


def _flux2() -> Any:
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * _LANGUAGE["hidden_size"],
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def small_gemma_tokenizer() -> Any:
    """Gemma's tokenizer class over a few words and every byte; a space is "▁"."""
    from transformers import GemmaTokenizer

    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    signs = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*_SPECIAL, *letters, "▁", *signs]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        before = "▁"
        for letter in word:
            merges += [(before, letter)] * ((before, letter) not in merges)
            before += letter
            tokens += [before] * (before not in tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, merges=merges)


def small_qwen_tokenizer() -> Any:
    """Qwen's tokenizer class over every byte and the tokens of its chat."""
    from transformers import Qwen2Tokenizer

    vocabulary = {token: index for index, token in enumerate(byte_letters())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_CHAT[1:3])})
    tokenizer.add_tokens(list(_CHAT[3:]))
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def _save(folder: Path, kind: str, parts: dict[str, Any], **settings: Any) -> Path:
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.42.1"} | settings
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
