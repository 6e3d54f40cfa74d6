"""Everything a training run holds: frozen models, what is trained, the photos in encoded form, optimizers, randomness.

`build_state` makes it from a configuration; `state_dict` and `load_state_dict` carry what changes through a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor, nn

from echodistill_cli.config.schema import Config, TrainConfig
from echodistill_cli.data.photos import Photo
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.text import LearnedToken, check_token
from echodistill_cli.errors import EchoDistillError
from echodistill_cli.models.adapters import (
    TEXT_LAYERS,
    UNET_LAYERS,
    add_lora,
    at_strength,
    keep_on,
    load_lora_tensors,
    lora_tensors,
    trainable_parameters,
)
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.vision import ImageBackbone, load_image_backbone
from echodistill_cli.training.critics import Discriminator, build_discriminators
from echodistill_cli.training.dataset import Prior, TrainingSet, ViewGenerators, build_prior, encode_photos
from echodistill_cli.training.optimizers import FP16_LOSS_SCALE, Metrics, Optimizers, WeightMean, schedule_share
from echodistill_cli.training.pools import EchoPool, TargetMemory


class Stream(IntEnum):
    """What must not share a random stream; a number, once given, stays: old runs are resumed by it."""

    TEACHER = 0
    STUDENT = 1
    TEXT = 2
    HEADS = 3
    VIEWS = 4
    STEPS = 5
    PRIOR = 6
    TINTS = 7
    MASKS = 8


def seed_for(config: Config, stream: Stream) -> int:
    """The seed of one stream."""
    return config.run.seed * 1000 + stream


def generator_for(config: Config, stream: Stream) -> torch.Generator:
    """A CPU generator at the beginning of one stream."""
    return torch.Generator().manual_seed(seed_for(config, stream))


# Steps in a row in which something was not finite, after which a run ends.
MAX_BAD_STEPS = 5
Phase = Literal["head start", "training", "carry back"]


@dataclass
class TrainingState:
    """A run's models, trained parts and progress.

    `step` counts finished steps, `head_start_step` and `carry_back_step` those of the teacher alone before and after
    them; `teacher_mean` gathers the mean of its weights in each; `prior` is what is to be kept.
    """

    config: Config
    pair: ModelPair
    critics: list[Discriminator]
    judge: ImageBackbone | None
    photos: TrainingSet
    photo_count: int
    token: LearnedToken | None
    optimizers: Optimizers
    generator: torch.Generator
    prior: Prior | None = None
    step: int = 0
    head_start_step: int = 0
    carry_back_step: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    pool: EchoPool | None = None
    targets: TargetMemory = field(default_factory=TargetMemory)
    teacher_mean: WeightMean = field(default_factory=WeightMean)

    @property
    def in_head_start(self) -> bool:
        """Whether the teacher is still to learn alone before the first joint step."""
        planned = self.config.train.head_start if self.config.loss.denoising else 0
        return self.step == 0 and self.head_start_step < planned

    @property
    def in_carry_back(self) -> bool:
        """Whether the echo has still to end in steps of the teacher alone; one that kept no picture has none."""
        planned = self.config.echo.carry_back if self.config.loss.denoising and self.pool else 0
        return self.step == self.config.train.steps and self.carry_back_step < planned

    @property
    def phase(self) -> Phase:
        """What the coming step belongs to; the teacher is alone in the first and the last of the three."""
        return "head start" if self.in_head_start else "carry back" if self.in_carry_back else "training"

    def finished_in(self, phase: Phase) -> int:
        """How many steps of a phase are finished."""
        return {"head start": self.head_start_step, "training": self.step, "carry back": self.carry_back_step}[phase]

    @property
    def place(self) -> str:
        """The last finished step, in words."""
        if self.carry_back_step:
            return f"step {self.carry_back_step} of the carry back"
        if self.step or not self.head_start_step:
            return f"step {self.step} of {self.config.train.steps}"
        return f"step {self.head_start_step} of the head start"

    @property
    def student_parts(self) -> list[str]:
        """What the student's losses move: its LoRA and, if they shall, the text side it shares with the teacher."""
        return ["student", "text"] if self.config.text.trained_by == "both" else ["student"]

    def set_rates(self) -> None:
        """Give every part its learning rate for the coming joint step: `train.lr_schedule` over `train.steps`."""
        settings = self.config.train
        share = schedule_share(settings.lr_schedule, self.step / settings.steps)
        self.optimizers.set_rates(dict.fromkeys(self.optimizers, share))

    def count_skips(self, metrics: Metrics) -> None:
        """Count steps in which an optimizer was skipped.

        Raises:
            EchoDistillError: too many in a row.
        """
        skipped = sorted(name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_"))
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if skipped else 0
        self.bad_steps += bool(skipped)
        if self.bad_steps_in_a_row >= MAX_BAD_STEPS:
            raise EchoDistillError(
                f"Loss or gradient of {', '.join(skipped)} was not finite in the last {self.bad_steps_in_a_row} steps.",
                "Lower --lr and --teacher-lr, or use --precision fp32, and --resume from the last checkpoint.",
            )

    def randn_like(self, other: Tensor) -> Tensor:
        """Unit noise of another tensor's shape and device, drawn on the CPU from the run's generator."""
        return torch.randn(other.shape, generator=self.generator).to(other.device)

    def randint(self, high: int, count: int) -> Tensor:
        """`count` whole numbers below `high`, on the CPU."""
        return torch.randint(high, (count,), generator=self.generator)

    def chosen(self, share: float) -> list[int]:
        """A share of a batch's rows, each drawn by itself; nothing is drawn for none."""
        if not share:
            return []
        drawn = torch.rand(self.config.train.batch_size, generator=self.generator)
        return [int(row) for row in (drawn < share).nonzero().flatten()]

    def at_export_scale(self) -> AbstractContextManager[None]:
        """Inside, the student draws as its file will, at `adapter.strength`; nothing is trained there."""
        return at_strength(self.pair.student.unet, self.config.adapter.strength)

    def trained_modules(self) -> dict[str, nn.Module]:
        """What carries a LoRA, by name."""
        modules = {"student": self.pair.student.unet, "teacher": self.pair.teacher.unet}
        if self.config.text.form == "lora":
            modules.update({text_name(i): encoder for i, encoder in enumerate(self.pair.encoder.encoders)})
        return modules

    def state_dict(self) -> dict[str, Any]:
        """All that changes while training, and what an export must know of the models; plain values and tensors."""
        roles: tuple[Role, ...] = ("student", "teacher")
        return {
            "family": self.pair.family,
            "prediction_types": {role: self.pair.role(role).schedule.prediction_type for role in roles},
            "photo_count": self.photo_count,
            "step": self.step,
            "head_start_step": self.head_start_step,
            "carry_back_step": self.carry_back_step,
            "bad_steps": self.bad_steps,
            "lora": {name: lora_tensors(module) for name, module in self.trained_modules().items()},
            "token": self.token.state_dict() if self.token else None,
            "heads": {critic.name: critic.heads.state_dict() for critic in self.critics},
            "optimizers": self.optimizers.state_dict(),
            "generator": self.generator.get_state(),
            "pool": vars(self.pool) if self.pool else None,
            "targets": self.targets.state_dict(),
            "teacher_mean": self.teacher_mean.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a run with the same configuration, but for the learning rates."""
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.head_start_step, self.carry_back_step = state["head_start_step"], state["carry_back_step"]
        for name, module in self.trained_modules().items():
            load_lora_tensors(module, state["lora"][name])
        if self.token:
            self.token.load_state_dict(state["token"])
        for critic in self.critics:
            critic.heads.load_state_dict(state["heads"][critic.name])
        self.optimizers.load_state_dict(state["optimizers"])
        self.generator.set_state(state["generator"])
        self.pool = EchoPool(**state["pool"]).to(self.pair.device) if state["pool"] else None
        self.targets.load_state_dict(state["targets"], self.pair.device)
        self.teacher_mean.load_state_dict(state["teacher_mean"], self.pair.device)


def text_name(index: int) -> str:
    """diffusers' name of a text encoder: text_encoder, text_encoder_2."""
    return "text_encoder" if index == 0 else f"text_encoder_{index + 1}"


def build_state(config: Config, photos: Sequence[Photo], *, pair: ModelPair | None = None) -> TrainingState:
    """Load the models and make a run ready for its first step.

    Args:
        photos: the usable ones, in order.
        pair: already loaded models, which this changes.

    Raises:
        ModelError, ConfigError: see `load_pair`, `load_image_backbone` and `check_token`.
    """
    pair = pair or load_pair(config.model)
    learned = config.text.form == "token"
    check_token(pair.encoder.tokenizers[0], config.concept.token, config.concept.class_name, learned=learned)
    token = add_trained_parts(config, pair)
    backbone = _backbone_loader(config, pair)
    judged = config.critic.identity != "none" and (config.loss.identity or config.echo.start is not None)
    judge = backbone(config.critic.identity) if judged else None
    seed = seed_for(config, Stream.HEADS)
    names = config.critic.discriminators if config.loss.adversarial else ()
    critics = build_discriminators(names, backbone, pair.teacher, config.critic.head_width, seed)
    for critic in critics:
        critic.to(pair.device)
    return TrainingState(
        config=config,
        pair=pair,
        critics=critics,
        judge=judge,
        photos=encode_photos(config, photos, pair, critics, judge, _generators(config)),
        photo_count=len(photos),
        token=token,
        optimizers=_optimizers(config, pair, token, critics),
        generator=generator_for(config, Stream.STEPS),
        prior=build_prior(config, pair, generator_for(config, Stream.PRIOR)),
    )


def _generators(config: Config) -> ViewGenerators:
    return ViewGenerators(
        views=generator_for(config, Stream.VIEWS),
        masks=generator_for(config, Stream.MASKS),
        tints=generator_for(config, Stream.TINTS),
    )


def add_trained_parts(config: Config, pair: ModelPair) -> LearnedToken | None:
    """Put LoRA on both UNets and give the text side its trained form; returns the learned token, if that is it."""
    targets, rank = UNET_LAYERS[config.adapter.targets], config.adapter.rank
    for role, stream in ((pair.student, Stream.STUDENT), (pair.loaded_teacher, Stream.TEACHER)):
        if role is not None:
            add_lora(role.unet, targets, rank, config.lora_alpha, seed_for(config, stream))
            keep_on(pair.device, role.unet)
            if config.train.gradient_checkpointing:
                role.unet.enable_gradient_checkpointing()
    if config.text.form == "lora":
        for encoder in pair.encoder.encoders:
            add_lora(encoder, TEXT_LAYERS, config.text.rank, config.text.rank, seed_for(config, Stream.TEXT))
    if config.text.form != "token":
        return None
    initializer = config.text.initializer or config.concept.class_name or "object"
    return LearnedToken(pair.encoder, config.concept.token, initializer).to(pair.device)


def _backbone_loader(config: Config, pair: ModelPair) -> Callable[[str], ImageBackbone]:
    """A loader that loads each image backbone once."""
    loaded: dict[str, ImageBackbone] = {}

    def load(name: str) -> ImageBackbone:
        if name not in loaded:
            loaded[name] = load_image_backbone(name, config.model, pair.device, pair.dtype)
        return loaded[name]

    return load


def _optimizers(
    config: Config, pair: ModelPair, token: LearnedToken | None, critics: Sequence[Discriminator]
) -> Optimizers:
    """One AdamW per trained part of a run."""
    settings = config.train
    text = [p for encoder in pair.encoder.encoders for p in trainable_parameters(encoder)]
    return Optimizers(
        {
            "teacher": trainable_parameters(pair.teacher.unet),
            "text": list(token.parameters()) if token else text,
            "student": trainable_parameters(pair.student.unet),
            "discriminators": [p for critic in critics for p in critic.heads.parameters()],
        },
        learning_rates(settings),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        loss_scale=FP16_LOSS_SCALE if pair.dtype is torch.float16 else 1.0,
    )


def learning_rates(settings: TrainConfig) -> dict[str, float]:
    """The first learning rate of each trained part, by the name of its optimizer."""
    return {
        "teacher": settings.teacher_lr,
        "text": settings.text_lr,
        "student": settings.lr,
        "discriminators": settings.discriminator_lr,
    }
