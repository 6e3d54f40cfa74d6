"""The random streams of a run: each from a seed of its own, so that none depends on how much another one draws."""

from __future__ import annotations

from enum import IntEnum

import torch

from echodistill_cli.config.schema import Config


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
