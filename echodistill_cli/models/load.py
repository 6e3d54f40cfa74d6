"""Load a student and a teacher of one family from hub ids, folders or files into one `ModelPair`.

The two may be separate models, or one base model whose student has a distillation LoRA. On a small device the two UNets
alternate. Models of diffusers are created only here and in `models.flow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from echodistill_cli.config.distilled import student_sampler, student_steps
from echodistill_cli.config.families import (
    FAMILIES,
    check_index,
    check_same_kind,
    check_unet,
    family_of_unet,
    read_json,
    read_model_config,
    reading,
)
from echodistill_cli.config.family import Family
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.config.transformers import family_of_transformer
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec, ModelPair
from echodistill_cli.diffusion.schedule import NoiseSchedule
from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models.adapters import load_distillation_lora, share_weights
from echodistill_cli.models.device import alternate_on_device, pick_device, pick_dtype
from echodistill_cli.models.downloads import fetch_pair
from echodistill_cli.models.flow import (
    TEACHER_STEPS,
    load_codec,
    load_denoiser,
    load_flow_schedule,
    load_prompts,
    load_words,
)
from echodistill_cli.models.parts import load_module, load_schedule, load_tokenizer, quiet_libraries
from echodistill_cli.models.single_file import (
    configuration_folder,
    find_vocabulary,
    load_part,
    prediction_in,
    shipped_configuration,
    stable_diffusion_1,
    vocabulary_in,
    zero_snr_in,
)
from echodistill_cli.models.sources import resolve

# Width of the UNet's first level, and of the text features that it reads.
_SD1_WIDTHS = (320, 768)
_TOKEN = 16  # pixels along one side


@quiet_libraries()
def load_pair(config: ModelConfig, *, teacher: bool = True) -> ModelPair:
    """Load student and teacher in evaluation mode, with all weights frozen.

    Args:
        config: names of the models, and how to load them.
        teacher: whether to load the teacher.

    Raises:
        ModelError: a part is missing or damaged, a model is not supported, or the families differ.
        ConfigError: the device does not exist, the models overflow in its precision, or the resolution does not suit
            the UNet.
    """
    for source in (config.student, config.teacher) if teacher else (config.student,):
        check_index(source)
    if teacher:
        check_same_kind(config.student, config.teacher)
    fetch_pair(config, teacher=teacher)
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    loader = _Loader(config, dtype, device)
    loader.check(teacher=teacher)
    student = replace(
        loader.denoiser(loader.student), timesteps=config.student_timesteps, sampler=student_sampler(config)
    )
    family = loader.family
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


def check_pair(config: ModelConfig) -> list[Any]:
    """Check the JSON files of both models and return the student's tokenizers. Loads no weights.

    Args:
        config: names of the models; all their files are on this machine.

    Raises:
        ModelError: a file is damaged, a model is not supported, or the families differ.
        ConfigError: the resolution does not suit the UNet.
    """
    loader = _Loader(config, torch.float32, torch.device("cpu"))
    loader.check(teacher=True)
    family = loader.family
    return [loader.tokenizer(family, part) for part in family.tokenizers]


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

    def check(self, *, teacher: bool) -> None:
        """Check precision and the JSON files of denoisers, schedules and VAE, before any weights are read."""
        if self.dtype is torch.float16 and not self.family.fp16:
            raise ConfigError(
                f"{self.config.student} overflows in fp16, which is the precision here.",
                "Use --precision bf16, or fp32 on a GPU without bf16.",
            )
        part, is_flow = self.family.denoiser, self.family.is_flow
        channels, levels = (None, 0) if is_flow else self.latent_shape()
        unets = {}
        for source in (self.student, self.teacher) if teacher else (self.student,):
            unet = unets[source.name] = self.model_config(source, part)
            if is_flow:
                self.schedule(source)
                continue
            with reading(self.settings(source, part) / "config.json"):
                # A toy model may read text of this width too, but its first level is narrower.
                widths = unet.get("block_out_channels", [0])
                if source is self.student and (widths[0], unet.get("cross_attention_dim")) == _SD1_WIDTHS:
                    raise stable_diffusion_1(source.name)
                check_unet(unet, source.name, channels)
                if source is self.student and levels:
                    _check_resolution(self.config.resolution, 2 ** (levels + len(widths) - 2))
            self.schedule(source)
        if teacher:
            _check_family(unets[self.student.name], unets[self.teacher.name], self.config, self.family)

    @cached_property
    def family(self) -> Family:
        """Family of the student, by the configuration of its denoiser."""
        path = self.folder(self.student)
        part = path / "transformer"
        if path.is_dir() and (part / "config.json").is_file() and not (path / "unet").exists():
            family = family_of_transformer(read_model_config(part))
            if family is None:
                raise ModelError(f"{self.student.name}: its transformer is not supported.", "Use another --model.")
            return family
        return family_of_unet(self.model_config(self.student, "unet"))

    def latent_shape(self) -> tuple[int | None, int]:
        """Return the VAE's latent channels and number of levels; None and 0 where its file does not say."""
        source, part = self.vae_source()
        vae = self.model_config(source, part)
        levels = vae.get("block_out_channels", vae.get("encoder_block_out_channels"))
        return vae.get("latent_channels"), len(levels) if isinstance(levels, list) else 0

    def vae_source(self) -> tuple[_Source, str]:
        return (_Source(self.config.vae), "") if self.config.vae else (self.student, "vae")

    def model_config(self, source: _Source, part: str) -> dict[str, Any]:
        return read_model_config(self.settings(source, part))

    def schedule(self, source: _Source) -> NoiseSchedule:
        if self.family.is_flow:
            return load_flow_schedule(self.settings(source, "scheduler"), *self.size_and_steps(source))
        prediction, path = source.prediction, self.folder(source, "scheduler")
        zero_snr = path.is_file() and zero_snr_in(path)
        if prediction == "auto" and path.is_file():
            prediction = prediction_in(path) or "auto"
        return load_schedule(self.settings(source, "scheduler"), prediction, zero_snr=zero_snr)

    def size_and_steps(self, source: _Source) -> tuple[int, int]:
        """Return how many tokens of 16 x 16 pixels an image has, and how many steps a model is sampled in."""
        steps = student_steps(self.config) if source is self.student else TEACHER_STEPS
        return (self.config.resolution // _TOKEN) ** 2, steps

    def denoiser(self, source: _Source) -> Denoiser:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        waits = self.config.offload and source is self.teacher
        device = torch.device("cpu") if waits else self.device
        if self.family.is_flow:
            scheduler, load = self.settings(source, "scheduler"), partial(self.load_from, source, device)
            return load_denoiser(self.family, load, scheduler, *self.size_and_steps(source))
        unet = self.load(UNet2DConditionModel, source, "unet", device)
        original, target = source.sizes
        sized = family_of_unet(unet.config).size_conditioning
        sizes = (original, original, 0, 0, target, target) if sized else None
        return as_denoiser(unet, self.schedule(source), sizes)

    def load_from(self, source: _Source, device: torch.device, kind: Any, part: str) -> Any:
        return self.load(kind, source, part, device)

    def prompt_encoder(self, family: Family) -> PromptEncoder:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        if family.is_flow:
            encoder = load_prompts(
                family, partial(self.load_from, self.student, self.device), self.settings(self.student, "tokenizer")
            )
            self.check_vocabulary(encoder.tokenizers[0], encoder.encoders[0])
            return encoder
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        encoders = [self.load(kinds[part], self.student, part) for part in family.text_encoders]
        tokenizers = [self.tokenizer(family, part) for part in family.tokenizers]
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            self.check_vocabulary(tokenizer, encoder)
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        return PromptEncoder(tokenizers, encoders, zero_null=family.zero_null and self.zero_null())

    def check_vocabulary(self, tokenizer: Any, encoder: Any) -> None:
        """Check that the text encoder has a vector for each token."""
        rows = encoder.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ModelError(
                f"{self.config.student}: its tokenizer has {len(tokenizer)} tokens, its text encoder only {rows}.",
                "Use the tokenizer of this model: --set model.tokenizer=DIR",
            )

    def tokenizer(self, family: Family, part: str) -> Any:
        if family.is_flow:
            return load_words(family, self.settings(self.student, part))
        path = self.folder(self.student, part) if self.config.tokenizer is None else None
        if path is not None and (path.is_dir() or self.student.single_file_config is not None):
            return load_tokenizer(self.settings(self.student, part))
        # All families share CLIP's vocabulary and differ only in the padding token.
        configured = self.config.tokenizer
        folder = vocabulary_in(Path(configured)) if configured else find_vocabulary(offline=self.config.offline)
        tokenizer = load_tokenizer(folder)
        tokenizer.pad_token = family.padding[part]
        return tokenizer

    def zero_null(self) -> bool:
        """Return whether the student's index has the empty prompt encoded as zeros; True without an index."""
        path = self.folder(self.student, "unet")
        index = (path if path.is_dir() else self.settings(self.student, "unet").parent) / "model_index.json"
        return not index.is_file() or bool(read_json(index).get("force_zeros_for_empty_prompt", True))

    def codec(self, family: Family) -> LatentCodec:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        if family.is_flow:
            return load_codec(family, partial(self.load_from, self.student, self.device))
        source, part = self.vae_source()
        name = self.model_config(source, part).get("_class_name")
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
        read_model_config(settings)
        if path.is_file():
            with reading(path):
                module = load_part(kind, path, part, settings.parent, self.dtype)
        else:
            module = load_module(kind, settings, self.dtype, self.config.variant)
        return module.to(device or self.device).eval().requires_grad_(False)


def as_denoiser(unet: Any, schedule: NoiseSchedule, time_ids: tuple[int, ...] | None) -> Denoiser:
    """Return a diffusers UNet of any precision as a `Denoiser`, with its last layer in float32."""
    unet.conv_out.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return Denoiser(unet, schedule, time_ids)


def _check_resolution(resolution: int, multiple: int) -> None:
    """Check that a UNet can halve the resolution."""
    if resolution % multiple:
        raise ConfigError(
            f"--resolution {resolution} is not a multiple of {multiple}, which this model needs.",
            f"Try --resolution {max(resolution // multiple, 1) * multiple}.",
        )


def _check_family(student: Mapping[str, Any], teacher: Mapping[str, Any], config: ModelConfig, family: Family) -> None:
    """Check that both models share their latents and text features, and transformers also their layers."""
    for key in family.shared:
        if student.get(key) != teacher.get(key):
            raise ModelError(
                f"Teacher {config.teacher} is of another family than {config.student}: {key} is {teacher.get(key)}, "
                f"not {student.get(key)}.",
                "Name the base model that the student was distilled from with --teacher.",
            )


def _check_fit(pair: ModelPair, config: ModelConfig) -> None:
    """Check the loaded models, which have defaults where their JSON files say nothing."""
    unet, family = pair.student.unet.config, FAMILIES[pair.family]
    _check_resolution(config.resolution, pair.codec.factor * pair.student.multiple)
    if not family.is_flow:
        check_unet(unet, config.student, pair.codec.channels)
    if pair.has_teacher:
        _check_family(unet, pair.teacher.unet.config, config, family)
