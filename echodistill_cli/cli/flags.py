"""The flags of `train` as data: one row per configuration key. `options` makes Typer's options of them.

A flag that is not given leaves its key to the TOML file, the preset and the default, in that order. Names that other
trainers use are understood, but not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Headings of `train --help`, in the order in which a person needs them; options without one come first.
PANELS = ("Subject", "Run", "Training", "LoRA and text side", "Models", "Losses and critics", "Echo phase")


@dataclass(frozen=True)
class Flag:
    """A configuration key with its names on the command line.

    Args:
        key: dotted, such as "train.lr". names: with dashes; the first is the one in the help. panel: heading there.
        repeated: may come many times.
    """

    key: str
    names: tuple[str, ...]
    panel: str
    repeated: bool = False

    @property
    def parameter(self) -> str:
        """Name of the option as a Python parameter."""
        return self.key.replace(".", "_")

    @property
    def shown(self) -> tuple[str, ...]:
        """The names in the help: the first, and a single letter."""
        return tuple(name for name in self.names if name == self.names[0] or not name.startswith("--"))


def _rows(panel: str, rows: Mapping[str, str]) -> list[Flag]:
    return [Flag(key, tuple(names.split()), panel) for key, names in rows.items()]


# The extra names are what users of kohya's scripts, diffusers' and other trainers type.
FLAGS: tuple[Flag, ...] = (
    *_rows(
        "Subject",
        {
            "concept.token": "--token --trigger-word",
            "concept.class_name": "--class-name --class",
            "concept.min_photos": "--min-photos",
            "concept.masks": "--masks",
            "concept.captions": "--captions/--no-captions",
            "concept.views": "--views",
            "concept.augmentation": "--augmentation",
            "concept.recolour": "--recolour",
            "concept.tint_scenes": "--tint-scenes/--no-tint-scenes",
        },
    ),
    *_rows(
        "Models",
        {
            "model.teacher": "--teacher",
            "model.resolution": "--resolution",
            "model.precision": "--precision --mixed-precision",
            "model.device": "--device",
            "model.decoder": "--decoder",
            "model.tiny_decoder": "--tiny-decoder",
            "model.vae": "--vae",
            "model.tokenizer": "--tokenizer",
            "model.variant": "--variant",
            "model.student_lora": "--student-lora",
            "model.student_revision": "--revision",
            "model.teacher_revision": "--teacher-revision",
            "model.single_file_config": "--single-file-config",
            "model.teacher_single_file_config": "--teacher-single-file-config",
            "model.student_prediction": "--student-prediction",
            "model.teacher_prediction": "--teacher-prediction",
            "model.student_original_size": "--student-original-size",
            "model.student_target_size": "--student-target-size",
            "model.teacher_original_size": "--teacher-original-size",
            "model.teacher_target_size": "--teacher-target-size",
            "model.offload": "--offload/--no-offload",
            "model.offline": "--offline/--no-offline",
        },
    ),
    *_rows(
        "LoRA and text side",
        {
            "adapter.rank": "--rank --lora-rank --network-dim",
            "adapter.alpha": "--alpha --lora-alpha --network-alpha",
            "adapter.targets": "--targets",
            "adapter.strength": "--strength",
            "text.form": "--text",
            "text.trained_by": "--text-trained-by",
            "text.rank": "--text-rank",
            "text.initializer": "--initializer",
        },
    ),
    *_rows(
        "Training",
        {
            "train.steps": "--steps --max-train-steps",
            "train.batch_size": "--batch-size --train-batch-size",
            "train.lr": "--lr --learning-rate",
            "train.teacher_lr": "--teacher-lr",
            "train.text_lr": "--text-lr --token-lr --text-encoder-lr",
            "train.joint_text_share": "--joint-text-share",
            "train.discriminator_lr": "--discriminator-lr --disc-lr",
            "train.lr_schedule": "--lr-schedule --lr-scheduler",
            "train.weight_decay": "--weight-decay",
            "train.max_grad_norm": "--max-grad-norm",
            "train.target_steps": "--target-steps",
            "train.target_strength": "--target-strength",
            "train.replays": "--replays",
            "train.first_targets": "--first-targets",
            "train.head_start": "--head-start",
            "train.teacher_mean": "--teacher-mean/--no-teacher-mean",
            "train.carry_over": "--carry-over/--no-carry-over",
            "train.scene_share": "--scene-share",
            "train.class_share": "--class-share",
            "train.pair_share": "--pair-share",
            "train.guidance_scale": "--guidance-scale",
            "train.gradient_checkpointing": "--gradient-checkpointing/--no-gradient-checkpointing",
            "train.max_bad_steps": "--max-bad-steps",
        },
    ),
    *_rows(
        "Losses and critics",
        {
            "loss.denoising": "--denoising-weight",
            "loss.latent": "--latent-weight",
            "loss.identity": "--identity-weight",
            "loss.sliced_wasserstein": "--sliced-wasserstein-weight --swd-weight",
            "loss.prior": "--prior-weight --prior-loss-weight",
            "loss.adversarial": "--adversarial-weight",
            "critic.discriminators": "--discriminators",
            "critic.identity": "--identity",
            "critic.identity_target": "--identity-target",
            "critic.head_width": "--head-width",
            "critic.swd_scales": "--swd-scales",
            "critic.swd_projections": "--swd-projections",
            "critic.swd_patch": "--swd-patch",
        },
    ),
    *_rows(
        "Echo phase",
        {
            "echo.start": "--echo-start",
            "echo.every": "--echo-every",
            "echo.candidates": "--echo-candidates",
            "echo.pool_size": "--echo-pool-size",
            "echo.min_identity": "--echo-min-identity",
            "echo.max_similarity": "--echo-max-similarity",
            "echo.teacher_share": "--echo-teacher-share",
            "echo.teacher_noise": "--echo-teacher-noise",
            "echo.teacher_steps": "--echo-teacher-steps",
            "echo.null_share": "--echo-null-share",
            "echo.real_weight": "--echo-real-weight",
            "echo.carry_back": "--carry-back",
        },
    ),
    *_rows(
        "Run",
        {
            "run.name": "--name",
            "run.output": "--output -o --output-dir",
            "run.seed": "--seed",
            "run.save_every": "--save-every --checkpointing-steps",
            "run.keep": "--keep",
            "run.sample_every": "--sample-every",
            "run.sample_seeds": "--sample-seeds",
            "run.report_to": "--report-to",
        },
    ),
    Flag("concept.scenes", ("--scene",), "Subject", repeated=True),
    Flag("concept.class_prompts", ("--class-prompt",), "Subject", repeated=True),
    Flag("run.sample_prompts", ("--sample-prompt", "--validation-prompt"), "Run", repeated=True),
)

ALIASES: Mapping[str, str] = {
    name: flag.names[0] for flag in FLAGS for name in flag.names[1:] if name not in flag.shown
} | {"--pretrained-model-name-or-path": "--model"}
