"""Load a student and a teacher of one family, from hub ids, folders or single files, into one `ModelPair`.

The two may be separate models, or one base model whose student has a distillation LoRA. On a small device the two UNets
alternate. Models of diffusers are created only here.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from echodistill_cli.config.families import Family, family_of_unet
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec, ModelPair
from echodistill_cli.diffusion.schedule import NoiseSchedule, PredictionType
from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.adapters import DISTILLATION, lora_layers
from echodistill_cli.models.device import pick_device, pick_dtype
from echodistill_cli.models.single_file import (
    configuration_folder,
    load_part,
    prediction_in,
    shipped_configuration,
    stable_diffusion_1,
)
from echodistill_cli.models.sources import find_vocabulary, resolve, vocabulary_in, weight_variant

# Width of the UNet's first level, and of the text features that it reads.
_SD1_WIDTHS = (320, 768)


def load_pair(config: ModelConfig, *, teacher: bool = True) -> ModelPair:
    """Load student and teacher in evaluation mode, with all weights frozen.

    Args:
        config: names of the models, and how to load them.
        teacher: whether to load the teacher.

    Raises:
        ModelError: a part is missing, the student is a Stable Diffusion 1 model, or the families differ.
        ConfigError: the device does not exist, or the resolution does not suit the UNet.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    loader = _Loader(config, dtype, device)
    loader.check_generation()
    student = replace(loader.denoiser(loader.student), timestep=config.student_timestep)
    family = family_of_unet(student.unet.config)
    base = share_weights(student, loader.teacher.sizes) if config.student_lora and teacher else None
    if config.student_lora:
        load_distillation_lora(student, family, Path(config.student_lora), fold=base is None)
    pair = ModelPair(
        family=family.name,
        encoder=loader.prompt_encoder(family),
        codec=loader.codec(family),
        student=student,
        loaded_teacher=base or (loader.denoiser(loader.teacher) if teacher else None),
        device=device,
        dtype=dtype,
    )
    _check_fit(pair, config)
    if config.offload and pair.has_teacher and base is None:
        alternate_on_device(pair)
    return pair


@dataclass(frozen=True)
class _Source:
    """Where the model of one role is, and what a person declares about it.

    Args:
        name: hub id, folder, single file, or a model of this package.
        revision: git revision on the hub.
        single_file_config: folder or hub id of a single file's configuration.
        prediction: what the model predicts; "auto" to read it from the files.
        sizes: original and target size in pixels, for a UNet that is conditioned on them.
    """

    name: str
    revision: str | None = None
    single_file_config: str | None = None
    prediction: str = "auto"
    sizes: tuple[int, int] = (0, 0)


class _Loader:
    """Loads single parts of one configured pair."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        side = config.resolution
        self.student = _Source(
            config.student,
            config.student_revision,
            config.single_file_config,
            config.student_prediction,
            (side, side),
        )
        # The teacher has its own configuration: two single files may predict different things, ε and v.
        self.teacher = _Source(
            config.teacher,
            config.teacher_revision,
            config.teacher_single_file_config,
            config.teacher_prediction,
            (config.teacher_original_size or side, side),
        )

    def folder(self, source: _Source, *parts: str) -> Path:
        config = self.config
        return resolve(source.name, parts, variant=config.variant, revision=source.revision, offline=config.offline)

    def check_generation(self) -> None:
        """Refuse a Stable Diffusion 1 student before its weights are read."""
        unet = json.loads((self.settings(self.student, "unet") / "config.json").read_text())
        # A toy model may read text of this width too, but its first level is narrower.
        if (unet.get("block_out_channels", [0])[0], unet.get("cross_attention_dim")) == _SD1_WIDTHS:
            raise stable_diffusion_1(self.config.student)

    def denoiser(self, source: _Source) -> Denoiser:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        waits = self.config.offload and source is self.teacher
        unet = self.load(UNet2DConditionModel, source, "unet", torch.device("cpu") if waits else self.device)
        prediction = source.prediction
        if prediction == "auto" and (path := self.folder(source, "scheduler")).is_file():
            prediction = prediction_in(path) or "auto"
        original, target = source.sizes
        sized = family_of_unet(unet.config).size_conditioning
        sizes = (original, original, 0, 0, target, target) if sized else None
        return as_denoiser(unet, load_schedule(self.settings(source, "scheduler"), prediction), sizes)

    def prompt_encoder(self, family: Family) -> PromptEncoder:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        encoders = [self.load(kinds[part], self.student, part) for part in family.text_encoders]
        tokenizers = [self.tokenizer(family, part) for part in family.tokenizers]
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        return PromptEncoder(tokenizers, encoders, zero_null=family.zero_null and self.zero_null())

    def tokenizer(self, family: Family, part: str) -> Any:
        from transformers import CLIPTokenizer

        path = self.folder(self.student, part) if self.config.tokenizer is None else None
        if path is not None and (path.is_dir() or self.student.single_file_config is not None):
            return CLIPTokenizer.from_pretrained(self.settings(self.student, part))
        # All families share CLIP's vocabulary and differ only in the padding token.
        configured = self.config.tokenizer
        folder = vocabulary_in(Path(configured)) if configured else find_vocabulary(offline=self.config.offline)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.pad_token = family.padding[part]
        return tokenizer

    def zero_null(self) -> bool:
        """Return whether the empty prompt is encoded as zeros, per the student's index; if that is missing, True."""
        path = self.folder(self.student, "unet")
        index = (path if path.is_dir() else self.settings(self.student, "unet").parent) / "model_index.json"
        return not index.is_file() or bool(json.loads(index.read_text()).get("force_zeros_for_empty_prompt", True))

    def codec(self, family: Family) -> LatentCodec:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        source, part = (_Source(self.config.vae), "") if self.config.vae else (self.student, "vae")
        name = json.loads((self.settings(source, part) / "config.json").read_text())["_class_name"]
        vae = self.load(AutoencoderTiny if name == "AutoencoderTiny" else AutoencoderKL, source, part)
        if self.dtype is torch.float16 and vae.config.get("force_upcast"):
            vae.float()  # these VAEs overflow in half precision and give black images
        if self.config.decoder == "full" or name == "AutoencoderTiny":
            return LatentCodec(vae, vae)
        tiny = _Source(self.config.tiny_decoder or family.tiny_decoder)
        return LatentCodec(vae, self.load(AutoencoderTiny, tiny, ""))

    def settings(self, source: _Source, part: str) -> Path:
        """Return the folder with the JSON files of one part, also for a single file."""
        path = self.folder(source, part)
        if path.is_dir():
            return path / part
        if not part:
            raise ModelError(
                f"{source.name}: a VAE or AutoencoderTiny cannot be read from a single file.", "Name a folder."
            )
        if source.single_file_config is None:
            return shipped_configuration(path) / part
        return configuration_folder(source.single_file_config, [part], offline=self.config.offline) / part

    def load(self, kind: Any, source: _Source, part: str, device: torch.device | None = None) -> Any:
        path, settings = self.folder(source, part), self.settings(source, part)
        if path.is_file():
            module = load_part(kind, path, part, settings.parent, self.dtype)
        else:
            variant = weight_variant(settings, self.config.variant)
            module = kind.from_pretrained(settings, dtype=self.dtype, variant=variant, use_safetensors=True)
        return module.to(device or self.device).eval().requires_grad_(False)


def as_denoiser(unet: Any, schedule: NoiseSchedule, time_ids: tuple[int, ...] | None) -> Denoiser:
    """Return a diffusers UNet of any precision as a `Denoiser`, with its last layer in float32."""
    unet.conv_out.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return Denoiser(unet, schedule, time_ids)


def load_schedule(folder: Path, prediction: str = "auto") -> NoiseSchedule:
    """Load the noise schedule from a scheduler's folder, whichever scheduler class it names.

    Args:
        folder: with scheduler_config.json.
        prediction: what the model predicts; "auto" to read it from the folder.

    Raises:
        ModelError: the prediction type is neither ε nor v.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    settings = json.loads((folder / "scheduler_config.json").read_text())
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler = DDPMScheduler(**{key: settings[key] for key in keys if key in settings})
    prediction_type = str(settings.get("prediction_type", "epsilon") if prediction == "auto" else prediction)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"{folder.parent.name}: models that predict {prediction_type!r} are not supported.")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), cast(PredictionType, prediction_type))


def _check_fit(pair: ModelPair, config: ModelConfig) -> None:
    """Check that the UNet can halve the resolution, and that both UNets share their latents and text features."""
    multiple = pair.codec.factor * 2 ** (len(pair.student.unet.config.block_out_channels) - 1)
    if config.resolution % multiple:
        raise ConfigError(
            f"--resolution {config.resolution} is not a multiple of {multiple}, which this model needs.",
            f"Try --resolution {max(config.resolution // multiple, 1) * multiple}.",
        )
    if not pair.has_teacher:
        return
    for key in ("cross_attention_dim", "in_channels", "addition_embed_type"):
        student, teacher = (role.unet.config[key] for role in (pair.student, pair.teacher))
        if student != teacher:
            raise ModelError(
                f"Teacher {config.teacher} is of another family than {config.student}: {key} is {teacher}, not "
                f"{student}.",
                "Name the base model that the student was distilled from with --teacher.",
            )


def share_weights(denoiser: Denoiser, sizes: tuple[int, int]) -> Denoiser:
    """Return a second UNet that shares the frozen weights of the first but carries its own adapters.

    It takes almost no memory. Switching adapters on one module is error-prone: a backward pass under another adapter
    than its forward pass gives wrong gradients without an error. Two module trees over one set of weights cannot be
    mixed up.

    Args:
        denoiser: the first one.
        sizes: original and target size in pixels for the second one, if it is conditioned on them.
    """
    tensors = (*denoiser.unet.parameters(), *denoiser.unet.buffers())
    unet = copy.deepcopy(denoiser.unet, {id(tensor): tensor for tensor in tensors})
    original, target = sizes
    time_ids = None if denoiser.time_ids is None else (original, original, 0, 0, target, target)
    return Denoiser(unet, denoiser.schedule, time_ids)


def load_distillation_lora(student: Denoiser, family: Family, file: Path, *, fold: bool) -> None:
    """Make a base model one-step with a frozen LoRA, such as Hyper-SD's, DMD2's or LCM's.

    Args:
        student: the base model.
        family: its family.
        file: the LoRA.
        fold: whether to add the LoRA to the weights; otherwise it stays a separate adapter.

    Raises:
        ModelError: the file is missing or damaged, or does not fit the model.
    """
    import diffusers

    kind, remedy = getattr(diffusers, family.pipeline), "Name the base model that it was made for with --model."
    read_header(file)
    try:
        unet_config = student.unet.config
        state, alphas, metadata = kind.lora_state_dict(str(file), return_lora_metadata=True, unet_config=unet_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # modules that do not fit are counted below
            kind.load_lora_into_unet(state, alphas, student.unet, adapter_name=DISTILLATION, metadata=metadata)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{file} does not fit this model ({first_line}).", remedy) from error
    modules = {re.sub(r"\.lora.*", "", name) for name in state if name.startswith("unet.") and ".lora" in name}
    matches = len(lora_layers(student.unet, DISTILLATION))
    if not modules or matches != len(modules):
        raise ModelError(f"{file} does not fit this model: {matches} of its {len(modules)} UNet modules match.", remedy)
    if fold:
        student.unet.fuse_lora(adapter_names=[DISTILLATION])
        student.unet.unload_lora()
    student.unet.requires_grad_(False)


def alternate_on_device(pair: ModelPair) -> None:
    """Keep the frozen weights of one UNet at a time on the device, of the one in use; the other's wait on the CPU."""
    pair.alternating = True
    roles = (pair.student, pair.teacher)
    for role, other in (roles, roles[::-1]):
        exchange = functools.partial(_exchange, role.unet, other.unet, pair.device)
        role.unet.register_forward_pre_hook(lambda _unet, _inputs, exchange=exchange: exchange())
    _exchange(pair.student.unet, pair.teacher.unet, pair.device)


def _exchange(active: Any, idle: Any, device: torch.device) -> None:
    """Move frozen weights; adapters stay on the device, because the optimizer holds them."""
    for unet, place in ((idle, torch.device("cpu")), (active, device)):
        for tensor in (*unet.parameters(), *unet.buffers()):
            if not tensor.requires_grad and tensor.device.type != place.type:
                tensor.data = tensor.data.to(place)
