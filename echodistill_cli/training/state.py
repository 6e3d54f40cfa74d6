"""Everything a training run holds: models, trained parts, photos, optimizers, randomness, phases.

`build_state` makes it from a configuration; `state_dict` and `load_state_dict` carry what changes through a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config, TrainConfig
from echodistill_cli.data.photos import Photo, photo_records
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.schedule import send
from echodistill_cli.diffusion.text import LearnedToken, check_token
from echodistill_cli.errors import EchoDistillError
from echodistill_cli.models.adapters import (
    TEXT_LAYERS,
    add_lora,
    at_strength,
    keep_on,
    layers_of,
    load_lora_tensors,
    lora_tensors,
    trainable_parameters,
)
from echodistill_cli.models.lean import run_lean
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.vision import ImageBackbone, load_image_backbone
from echodistill_cli.training.critics import Discriminator, PairedCritic, build_discriminators
from echodistill_cli.training.dataset import Prior, TrainingSet, ViewGenerators, build_prior, encode_photos
from echodistill_cli.training.optimizers import FP16_LOSS_SCALE, PAIRED_LR, Metrics, Optimizers
from echodistill_cli.training.pools import EchoPool, ReplayBuffer


class Stream(IntEnum):
    """The independent random streams of a run. Never change a number: old runs resume with it."""

    TEACHER = 0
    STUDENT = 1
    TEXT = 2
    HEADS = 3
    VIEWS = 4
    STEPS = 5
    PRIOR = 6
    MASKS = 8  # 7 was a stream of version 0.1
    PAIRED = 9


def seed_for(config: Config, stream: Stream) -> int:
    """The seed of one stream."""
    return config.run.seed * 1000 + stream


def generator_for(config: Config, stream: Stream) -> torch.Generator:
    """A CPU generator at the beginning of one stream."""
    return torch.Generator().manual_seed(seed_for(config, stream))


@dataclass(frozen=True)
class Phase:
    """A part of a run that counts its own steps.

    Args:
        name: in words.
        counter: the field of the state that counts its finished steps; also a key of metrics and checkpoints.
        length: how many steps the phase has in a state; 0 when it does not take place.
    """

    name: str
    counter: str
    length: Callable[[TrainingState], int]


def _head_start_length(state: TrainingState) -> int:
    return state.config.train.head_start if state.config.loss.denoising and state.step == 0 else 0


def _carry_back_length(state: TrainingState) -> int:
    """An echo that kept no image gives the teacher nothing to start from."""
    return state.config.echo.carry_back if state.config.loss.denoising and state.pool else 0


HEAD_START = Phase("head start", "head_start_step", _head_start_length)
JOINT = Phase("training", "step", lambda state: state.config.train.steps)
CARRY_BACK = Phase("carry back", "carry_back_step", _carry_back_length)
PHASES = (HEAD_START, JOINT, CARRY_BACK)
# A run ends after this many consecutive steps in which a loss or gradient was not finite.
MAX_BAD_STEPS = 5


@dataclass
class TrainingState:
    """A run's models, trained parts and progress.

    Args:
        config: of the run.
        pair: teacher, student, and what they share.
        critics: the discriminators.
        identity_encoder: of the identity loss and the echo; None if neither is active.
        photos: the photos, encoded.
        photo_count: how many photos the run was started with.
        photo_records: the names and hashes of these photos.
        token: the learned token; None for other forms of the text side.
        optimizers: one per trained part, and the average of the teacher's weights.
        generator: the only source of randomness in a step.
        prior: images of the class by the base student; None if nothing uses them.
        paired_critic: of the paired loss; None without it.
        step: finished joint steps.
        head_start_step: finished steps of the teacher alone before the joint ones.
        carry_back_step: finished steps of the teacher alone after the joint ones.
        bad_steps: steps in which a loss or gradient was not finite.
        bad_steps_in_a_row: how many of them were consecutive up to now.
        pool: images of the echo; None before the first echo.
        replay_buffer: targets of earlier steps.
    """

    config: Config
    pair: ModelPair
    critics: list[Discriminator]
    identity_encoder: ImageBackbone | None
    photos: TrainingSet
    photo_count: int
    photo_records: list[dict[str, str]]
    token: LearnedToken | None
    optimizers: Optimizers
    generator: torch.Generator
    prior: Prior | None = None
    paired_critic: PairedCritic | None = None
    step: int = 0
    head_start_step: int = 0
    carry_back_step: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    pool: EchoPool | None = None
    replay_buffer: ReplayBuffer = field(default_factory=ReplayBuffer)

    def finished_in(self, phase: Phase) -> int:
        """How many steps of a phase are finished."""
        return int(getattr(self, phase.counter))

    @property
    def phase(self) -> Phase | None:
        """The phase of the next step; None at the end of the run."""
        return next((phase for phase in PHASES if self.finished_in(phase) < phase.length(self)), None)

    @property
    def place(self) -> str:
        """The last finished step, in words."""
        last = next((phase for phase in reversed(PHASES) if self.finished_in(phase)), JOINT)
        total = f"{self.config.train.steps}" if last is JOINT else f"the {last.name}"
        return f"step {self.finished_in(last)} of {total}"

    @property
    def progress(self) -> float:
        """The finished fraction of the joint steps."""
        return self.step / self.config.train.steps

    @property
    def echo_is_due(self) -> bool:
        """Whether the echo pool is refreshed after the last finished joint step.

        After the last step of all, only the carry back could use new images.
        """
        echo, steps = self.config.echo, self.config.train.steps
        if echo.start is None or self.step < echo.start or (self.step == steps and not echo.carry_back):
            return False
        return (self.step - echo.start) % echo.every == 0

    @property
    def student_parts(self) -> list[str]:
        """What the student's losses train: its LoRA and, if `text.trained_by` is "both", the text side."""
        return ["student", "text"] if self.config.text.trained_by == "both" else ["student"]

    def finish_step(self, phase: Phase = JOINT) -> None:
        """Count a step of a phase."""
        setattr(self, phase.counter, self.finished_in(phase) + 1)
        if phase is JOINT:
            self.carry_back_step = 0  # left over from a shorter run that continues beyond its end

    def settle(self, metrics: Metrics) -> dict[str, float]:
        """Return a step's metrics as numbers (`Optimizers.fetch`); count the step if it was not finite.

        Raises:
            EchoDistillError: a loss or gradient was not finite in `MAX_BAD_STEPS` consecutive steps.
            ModelError: that is because a model's weights are not finite.
        """
        values = self.optimizers.fetch(metrics)
        skipped = sorted(name.removeprefix("skipped_") for name in values if name.startswith("skipped_"))
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if skipped else 0
        self.bad_steps += bool(skipped)
        if self.bad_steps_in_a_row >= MAX_BAD_STEPS:
            self.pair.blame_weights()
            raise EchoDistillError(
                f"Loss or gradient of {', '.join(skipped)} was not finite in the last {self.bad_steps_in_a_row} steps.",
                "Lower --lr and --teacher-lr, or use --precision fp32, and --resume from the last checkpoint.",
            )
        return values

    def randn_like(self, other: Tensor) -> Tensor:
        """Unit noise with the shape and device of another tensor, drawn on the CPU from the run's generator."""
        return send(torch.randn(other.shape, generator=self.generator), other.device)

    def randint(self, high: int, count: int) -> Tensor:
        """Draw `count` integers in 0…high - 1, on the CPU."""
        return torch.randint(high, (count,), generator=self.generator)

    def random_rows(self, share: float) -> list[int]:
        """Draw rows of a batch, each with probability `share`. A share of 0 consumes no randomness."""
        if not share:
            return []
        uniform = torch.rand(self.config.train.batch_size, generator=self.generator)
        return [int(row) for row in (uniform < share).nonzero().flatten()]

    def at_export_scale(self) -> AbstractContextManager[None]:
        """Context in which the student's LoRA has the scale of its exported file; not for training."""
        return at_strength(self.pair.student.unet, self.config.adapter.strength)

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules that carry a LoRA, by name."""
        modules = {"student": self.pair.student.unet, "teacher": self.pair.teacher.unet}
        if self.config.text.form == "lora":
            modules.update({text_name(i): encoder for i, encoder in enumerate(self.pair.encoder.encoders)})
        return modules

    def state_dict(self) -> dict[str, Any]:
        """What training changes, and what an export needs to know of the models; plain values and tensors."""
        roles: tuple[Role, ...] = ("student", "teacher")
        return {
            "family": self.pair.family,
            "prediction_types": {role: self.pair.role(role).schedule.prediction_type for role in roles},
            "photo_count": self.photo_count,
            "photos": self.photo_records,
            "step": self.step,
            "head_start_step": self.head_start_step,
            "carry_back_step": self.carry_back_step,
            "bad_steps": self.bad_steps,
            "lora": {name: lora_tensors(module) for name, module in self.trained_modules().items()},
            "token": self.token.state_dict() if self.token else None,
            "heads": {critic.name: critic.heads.state_dict() for critic in self.critics},
            "paired_critic": self.paired_critic.state_dict() if self.paired_critic else None,
            "optimizers": self.optimizers.state_dict(),
            "generator": self.generator.get_state(),
            "pool": vars(self.pool) if self.pool else None,
            "targets": self.replay_buffer.state_dict(),
            "teacher_mean": self.optimizers.mean.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict` of a run with the same configuration; only the learning rates may differ."""
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.head_start_step, self.carry_back_step = state["head_start_step"], state["carry_back_step"]
        for name, module in self.trained_modules().items():
            load_lora_tensors(module, state["lora"][name])
        if self.token:
            self.token.load_state_dict(state["token"])
        for critic in self.critics:
            critic.heads.load_state_dict(state["heads"][critic.name])
        if self.paired_critic:
            self.paired_critic.load_state_dict(state["paired_critic"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.generator.set_state(state["generator"])
        self.pool = EchoPool(**state["pool"]).to(self.pair.device) if state["pool"] else None
        self.replay_buffer.load_state_dict(state["targets"], self.pair.device)
        self.optimizers.mean.load_state_dict(state["teacher_mean"], self.pair.device)


def text_name(index: int) -> str:
    """The name of a text encoder in diffusers: text_encoder, text_encoder_2."""
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"


def build_state(
    config: Config,
    photos: Sequence[Photo],
    *,
    pair: ModelPair | None = None,
    backbone: Callable[[str], ImageBackbone] | None = None,
) -> TrainingState:
    """Load the models and prepare a run for its first step.

    Args:
        config: of the run.
        photos: the usable photos, in order.
        pair: models that are already loaded; training changes them.
        backbone: returns a loaded image backbone by name; None loads each from its files.

    Raises:
        ModelError: a model or image encoder cannot be loaded.
        ConfigError: the token does not fit the text encoder or the class name.
    """
    pair = pair or load_pair(config.model)
    words = None if FAMILIES[pair.family].is_flow else pair.encoder.tokenizers[0]
    check_token(words, config.concept.token, config.concept.class_name, learned=config.text.form == "token")
    token = add_trained_parts(config, pair)
    pair.encoder.keep_null = config.text.form != "lora"  # a learned token is not in the empty prompt
    backbone = backbone or _backbone_loader(config, pair)
    needs_identity = config.loss.identity or config.echo.start is not None
    identity = backbone(config.critic.identity) if config.critic.identity != "none" and needs_identity else None
    names, seed = config.critic.discriminators if config.loss.adversarial else (), seed_for(config, Stream.HEADS)
    critics = build_discriminators(names, backbone, pair.teacher, config.critic.head_width, seed)
    critics = [critic.to(pair.device) for critic in critics]
    paired_critic = _paired_critic(config, pair)
    run_lean(pair, filter(None, [*(critic.backbone for critic in critics), identity]))
    return TrainingState(
        config=config,
        pair=pair,
        critics=critics,
        identity_encoder=identity,
        photos=encode_photos(config, photos, pair, critics, identity, _generators(config)),
        photo_count=len(photos),
        photo_records=photo_records(photos),
        token=token,
        optimizers=_optimizers(config, pair, token, critics, paired_critic),
        generator=generator_for(config, Stream.STEPS),
        prior=build_prior(config, pair, generator_for(config, Stream.PRIOR)),
        paired_critic=paired_critic,
    )


def _generators(config: Config) -> ViewGenerators:
    return ViewGenerators(views=generator_for(config, Stream.VIEWS), masks=generator_for(config, Stream.MASKS))


def _paired_critic(config: Config, pair: ModelPair) -> PairedCritic | None:
    is_used = config.loss.paired and config.replays
    return PairedCritic(pair.codec.channels, seed_for(config, Stream.PAIRED)).to(pair.device) if is_used else None


def add_trained_parts(config: Config, pair: ModelPair) -> LearnedToken | None:
    """Add LoRA to the UNets and the trained form of the text side; return the learned token, if any."""
    layers, rank = layers_of(FAMILIES[pair.family], config.adapter.targets), config.adapter.rank
    for denoiser, stream in ((pair.student, Stream.STUDENT), (pair.loaded_teacher, Stream.TEACHER)):
        if denoiser is not None:
            add_lora(denoiser.unet, layers, rank, config.lora_alpha, seed_for(config, stream))
            keep_on(pair.device, denoiser.unet)
            if config.train.gradient_checkpointing:
                denoiser.unet.enable_gradient_checkpointing()
    if config.text.form == "lora":
        for encoder in pair.encoder.encoders:
            add_lora(encoder, TEXT_LAYERS, config.text.rank, config.text.rank, seed_for(config, Stream.TEXT))
    if config.text.form != "token":
        return None
    initializer = config.text.initializer or config.concept.class_name or "object"
    return LearnedToken(pair.encoder, config.concept.token, initializer).to(pair.device)


def _backbone_loader(config: Config, pair: ModelPair) -> Callable[[str], ImageBackbone]:
    """Return a function that loads each image backbone once."""
    loaded: dict[str, ImageBackbone] = {}

    def load(name: str) -> ImageBackbone:
        if name not in loaded:
            loaded[name] = load_image_backbone(name, config.model, pair.device, pair.dtype)
        return loaded[name]

    return load


def _optimizers(
    config: Config,
    pair: ModelPair,
    token: LearnedToken | None,
    critics: Sequence[Discriminator],
    paired_critic: PairedCritic | None,
) -> Optimizers:
    settings = config.train
    text = [p for encoder in pair.encoder.encoders for p in trainable_parameters(encoder)]
    return Optimizers(
        {
            "teacher": trainable_parameters(pair.teacher.unet),
            "text": list(token.parameters()) if token else text,
            "student": trainable_parameters(pair.student.unet),
            "discriminators": [p for critic in critics for p in critic.heads.parameters()],
            "paired": list(paired_critic.parameters()) if paired_critic else [],
        },
        learning_rates(settings),
        schedule=settings.lr_schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        loss_scale=FP16_LOSS_SCALE if pair.dtype is torch.float16 else 1.0,
    )


def learning_rates(settings: TrainConfig) -> dict[str, float]:
    """The initial learning rate of each trained part, by the name of its optimizer."""
    return {
        "teacher": settings.teacher_lr,
        "text": settings.text_lr,
        "student": settings.lr,
        "discriminators": settings.discriminator_lr,
        "paired": PAIRED_LR,
    }
