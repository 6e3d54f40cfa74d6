"""Fixtures of the training tests: fresh states of the small pair, and one that is only read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.training.state import TrainingState, build_state
from tests.helpers.runs import NewState, small_config, small_photos


@pytest.fixture
def new_state(small_pair: tuple[Path, Path], small_backbones: dict[str, Path]) -> NewState:
    """Builds a fresh run with changed settings, such as text__form="token"."""

    def build(**changes: Any) -> TrainingState:
        return build_state(small_config(small_pair, small_backbones, **changes), small_photos())

    return build


@pytest.fixture(scope="session")
def plain_state(small_pair: tuple[Path, Path], small_backbones: dict[str, Path]) -> TrainingState:
    """A run without changed settings; neither to be trained nor to be changed."""
    return build_state(small_config(small_pair, small_backbones), small_photos())
