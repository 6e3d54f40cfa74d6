"""The methods of the benchmark as data: their settings, training steps, and what they do at the end.

All of them use the same training state (photos, views, LoRA, optimizer), so that only the method differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from echodistill_cli.config.build import read_toml
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.diffusion.schedule import add_noise, prediction_target
from echodistill_cli.models.adapters import load_lora_tensors, lora_tensors, without_lora
from echodistill_cli.training import losses
from echodistill_cli.training.batches import teacher_batch
from echodistill_cli.training.optimizers import Metrics
from echodistill_cli.training.state import CARRY_BACK, TrainingState
from echodistill_cli.training.steps import (
    begin,
    carry_back_step,
    discriminator_step,
    replay_step,
    student_step,
    teacher_step,
    training_step,
)

Step = Callable[[TrainingState], Metrics]
PSO_BETA = 100.0
PAPER = Path(__file__).parents[1] / "paper.toml"
# Tried for every contestant on `dev`, so that each has the same number of trials: `run --split dev --grid`.
RATES = (0.25, 0.5, 1.0, 2.0)
# What follows from the size of the models, not from the method: here `paper` is as every other contestant.
SCALE = {
    *("train.steps", "train.batch_size", "train.lr", "train.teacher_lr", "train.text_lr", "train.discriminator_lr"),
    *("adapter.rank", "critic.identity", "critic.head_width"),
    *("critic.swd_scales", "critic.swd_projections", "critic.swd_patch"),
}


@dataclass(frozen=True)
class Contestant:
    """One row of the benchmark.

    Args:
        about: a description.
        settings: overrides of the `mini` preset by dotted key.
        rate: factor on the preset's learning rates of student, teacher and text side; the best of `RATES` on `dev`.
        step: one training step, including its learning rates; None for a model that is not trained.
        finish: called when training has ended.
        costs_as: the contestant whose step costs the same, if this one's cost is not measured.
    """

    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    step: Step | None = training_step
    finish: Callable[[TrainingState], None] = lambda _state: None
    costs_as: str = ""


def teacher_lora_step(state: TrainingState) -> Metrics:
    """Train the teacher alone."""
    state.optimizers.set_rates(state.progress)
    return teacher_step(state)


def denoising_step(state: TrainingState) -> Metrics:
    """DreamBooth-LoRA on the one-step model: its denoising loss on the photos at every timestep, text side included."""
    state.optimizers.set_rates(state.progress)
    student = state.pair.student
    batch = teacher_batch(state)
    conditioning = student.at_crops(state.pair.encoder.encode(batch.prompts), batch.crops)
    noise = state.randn_like(batch.latents)
    noisy = add_noise(student.schedule, batch.latents, noise, batch.timesteps)
    target = prediction_target(student.schedule, batch.latents, noise, batch.timesteps)
    loss = losses.denoising(student(noisy, batch.timesteps, conditioning), target, batch.masks).mean()
    return {"denoising": loss.detach()} | state.optimizers.step(loss, ["student", "text"])


def token_step(state: TrainingState) -> Metrics:
    """Textual inversion: train one token vector with the teacher's denoising loss; both UNets are frozen."""
    state.optimizers.set_rates(state.progress)
    teacher, batch = state.pair.teacher, teacher_batch(state)
    conditioning = teacher.at_crops(state.pair.encoder.encode(batch.prompts), batch.crops)
    noise = state.randn_like(batch.latents)
    noisy = add_noise(teacher.schedule, batch.latents, noise, batch.timesteps)
    target = prediction_target(teacher.schedule, batch.latents, noise, batch.timesteps)
    loss = losses.denoising(teacher(noisy, batch.timesteps, conditioning), target, batch.masks).mean()
    return {"denoising": loss.detach()} | state.optimizers.step(loss, ["text"])


def pso_step(state: TrainingState) -> Metrics:
    """Pairwise sample optimization (arXiv 2410.03190) at the student's timestep: photos win, its images lose.

    The likelihood ratio of an image compares Gaussians around the one-step images that the tuned and the base model
    make of it, renoised to the last timestep.
    """
    state.optimizers.set_rates(state.progress)
    student, batch = state.pair.student, state.config.train.batch_size
    photos = teacher_batch(state)
    latents, prompts = photos.latents, photos.prompts
    conditioning = state.pair.encoder.encode(prompts)
    last = torch.full((batch,), student.schedule.last_timestep, device=latents.device)
    with torch.no_grad():
        losing = student_x0(student, state.randn_like(latents), conditioning)
    noise = state.randn_like(latents)
    ratios = []
    for clean in (latents, losing):
        noisy = add_noise(student.schedule, clean, noise, last)
        target = prediction_target(student.schedule, clean, noise, last)
        error = (student(noisy, last, conditioning).float() - target).square().mean(dim=(1, 2, 3))
        with torch.no_grad(), without_lora(student.unet):
            base = (student(noisy, last, conditioning).float() - target).square().mean(dim=(1, 2, 3))
        ratios.append(base - error)
    loss = -F.logsigmoid(PSO_BETA * (ratios[0] - ratios[1])).mean()
    return {"pso": loss.detach()} | state.optimizers.step(loss, ["student", "text"])


def distillation_step(state: TrainingState) -> Metrics:
    """Sequential training: the teacher trains before the first step and is frozen while the student is distilled."""
    if state.step == 0:
        begin(state)
    state.optimizers.set_rates(state.progress)
    generated, metrics = student_step(state)
    for _ in range(state.config.replays):
        metrics |= replay_step(state)
    return metrics | discriminator_step(state, generated)


def carry_over(state: TrainingState) -> None:
    """Load the teacher's LoRA into the student, which is common practice."""
    load_lora_tensors(state.pair.student.unet, lora_tensors(state.pair.teacher.unet))


def end_echo(state: TrainingState) -> None:
    """Take the steps of the carry back, if the echo kept any image."""
    while state.phase is CARRY_BACK:
        carry_back_step(state)


def more_steps(state: TrainingState) -> None:
    """Take as many steps at the same rate, also averaged, but from the teacher's own LoRA."""
    carry_over(state)
    for _ in range(state.config.echo.carry_back):
        carry_back_step(state)


def paper_settings() -> dict[str, Any]:
    """Return `examples/paper.toml` by dotted key, without what follows from size and with backbones of this size."""
    tables = read_toml(PAPER)
    settings = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    own = {key: None if value == "off" and key == "echo.start" else value for key, value in settings.items()}
    # Three encoders of photos there, two here.
    own["critic.discriminators"] = ("mini:vit", "mini:clip")
    return {key: value for key, value in own.items() if key not in SCALE}


_NO_ECHO = {"echo.start": None}
# As in the paper: the kept pictures are examples for both models; soft as they are, of what is where, not of detail.
_PICTURES = {"echo.teacher_share": 0.25, "echo.teacher_noise": 0.5, "echo.real_weight": 0.25}
# What people do today: a LoRA on the text encoder too, which the denoising loss alone trains.
_TODAY = _NO_ECHO | {"text.form": "lora", "text.trained_by": "teacher"}

CONTESTANTS: Mapping[str, Contestant] = {
    "untouched": Contestant("the one-step model asked for the class noun", step=None),
    "teacher-lora": Contestant(
        "the teacher's LoRA (denoising loss), loaded into the student",
        _TODAY,
        step=teacher_lora_step,
        finish=carry_over,
    ),
    "denoising": Contestant("denoising loss on the student (DreamBooth-LoRA)", _TODAY, rate=0.5, step=denoising_step),
    "token-only": Contestant("one learned word (textual inversion)", _NO_ECHO, rate=2.0, step=token_step),
    "pso": Contestant("pairwise sample optimization, at one step", _TODAY, rate=2.0, step=pso_step),
    "sequential": Contestant(
        "teacher first, then distilled into a student that begins anew",
        _NO_ECHO | {"train.carry_over": False},
        step=distillation_step,
    ),
    "paper": Contestant("the paper's method as its authors run it, LoRA on keys and values", paper_settings()),
    "paper-conv": Contestant(
        "the same with the LoRA layers of all others",
        {key: value for key, value in paper_settings().items() if key != "adapter.targets"},
        costs_as="paper",
    ),
    "ours": Contestant("both at once after the teacher's head start, then the echo"),
    "ours-without-pairs": Contestant("no pairs of subject and class", {"train.pair_share": 0.0}),
    "ours-without-adversarial": Contestant("no discriminators", {"loss.adversarial": 0.0}),
    "ours-without-alignment": Contestant("no latent alignment", {"loss.latent": 0.0}),
    "ours-without-identity": Contestant("no identity loss", {"loss.identity": 0.0}),
    "ours-without-paired-critic": Contestant("no critic that compares image and target", {"loss.paired": 0.0}),
    "ours-without-shared-text": Contestant("the text side frozen", {"text.form": "frozen"}),
    "ours-without-class-share": Contestant("no pictures of the class among the replays", {"train.class_share": 0.0}),
    "ours-without-joint-training": Contestant(
        "the teacher rests after its head start, and there is no echo",
        _NO_ECHO,
        step=distillation_step,
    ),
    "ours-without-carry-over": Contestant(
        "the student begins anew after the head start", {"train.carry_over": False, "echo.carry_back": 0}
    ),
    "ours-without-echo": Contestant("no echo phase, and none of what ends it", _NO_ECHO),
    "ours-with-pictures": Contestant("the echo's pictures are examples for teacher and discriminators", _PICTURES),
    "ours-without-first-targets": Contestant("replays begin with the first step's targets", {"train.first_targets": 0}),
}

# Teachers that are scored when training has ended: the name of the row, and what happens first to the final state.
TEACHERS: Mapping[str, Mapping[str, Callable[[TrainingState], None]]] = {
    "ours": {
        "teacher-without-carry-back": lambda _state: None,
        "teacher-with-more-steps": more_steps,
        "teacher-after-echo": end_echo,
    },
    "ours-with-pictures": {"teacher-with-pictures-alone": lambda _state: None, "teacher-with-pictures": end_echo},
}
