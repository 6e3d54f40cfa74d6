"""One training of the benchmark: a contestant on a subject with a seed, as a configuration and as a training state."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import load_photos
from echodistill_cli.models.load import load_pair
from echodistill_cli.training.state import TrainingState, build_state
from examples.benchmark.contestants import CONTESTANTS, Contestant
from examples.benchmark.flow_pair import as_flow
from examples.benchmark.subjects import TOKEN, class_name, vendor_of, write_photos


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        contestant: a key of CONTESTANTS.
        split: a key of SPLITS.
        noun: the subject.
        seed: the training seed.
        trial: settings that override the contestant's own, as (key, value) pairs.
        scale: fraction of the preset's steps, the same for every phase.
        rate: factor on the preset's learning rates; None for the contestant's own.
        flow: train the pair as rectified flows.
    """

    contestant: str
    split: str
    noun: str
    seed: int
    trial: tuple[tuple[str, Any], ...] = ()
    scale: float = 1.0
    rate: float | None = None
    flow: bool = False

    @property
    def entry(self) -> Contestant:
        """The contestant's row of the table."""
        return CONTESTANTS[self.contestant]

    @property
    def lengths(self) -> dict[str, int]:
        """The preset's numbers of steps by dotted key, each times `scale`."""
        preset = build_config("mini")
        train = preset.train
        full = {f"train.{key}": getattr(train, key) for key in ("steps", "head_start", "first_targets")}
        if preset.echo.start is not None:
            full |= {"echo.start": preset.echo.start, "echo.carry_back": preset.echo.carry_back}
        return {key: max(1, round(value * self.scale)) if value else 0 for key, value in full.items()}

    @property
    def rates(self) -> dict[str, float]:
        """The preset's learning rates by dotted key, each times the factor."""
        train, factor = build_config("mini").train, self.entry.rate if self.rate is None else self.rate
        return {f"train.{key}": factor * getattr(train, key) for key in ("lr", "teacher_lr", "text_lr")}

    @property
    def about_trial(self) -> str:
        """What is tried, as one line; empty for the contestant as it is."""
        factor = [] if self.rate is None else [f"rate={self.rate:g}"]
        return ", ".join([*factor, *(f"{key}={value}" for key, value in self.trial)])

    @property
    def head_start(self) -> int:
        """The teacher's steps before the joint steps, by this run's settings."""
        return int((self.lengths | dict(self.entry.settings) | dict(self.trial))["train.head_start"])

    def config(self, photos: Path, steps: int | None) -> Config:
        """Return the whole configuration.

        Args:
            photos: folder of the reference images.
            steps: joint steps; None keeps the preset's. A trial's own number takes precedence over both.
        """
        settings: dict[str, Any] = {
            "concept.photos": str(photos),
            "concept.token": TOKEN,
            "concept.class_name": class_name(self.noun),
            "run.seed": self.seed,
            **self.lengths,
            **self.rates,
            **self.entry.settings,
            **({} if steps is None else {"train.steps": steps}),
            **dict(self.trial),
        }
        return build_config("mini", overrides=settings)

    def build(self, steps: int | None) -> TrainingState:
        """Write the subject's photos to a temporary folder, read them, and return a state ready for its first step.

        Args:
            steps: as in `config`.
        """
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(write_photos(self.noun, Path(folder), vendor_of(self.split)), steps)
            report = load_photos(Path(folder), min_photos=3, resolution=64, masks="auto", captions=True)
            pair = load_pair(config.model)
            return build_state(config, tuple(report.photos), pair=as_flow(pair) if self.flow else pair)
