"""Small subjects for `train-many`: three folders of photos, a manifest, and the settings of the small random pair."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import small_toml
from tests.many.helpers import NAMES, Batch


@pytest.fixture
def batch(tmp_path: Path, small_pair: tuple[Path, Path], small_backbones: dict[str, Path], photo_folder: Path) -> Batch:
    """Three subjects in an empty folder, of eight steps each, with a checkpoint at every second."""
    toml = small_toml(tmp_path, small_pair, small_backbones, echo__start="off", train__steps=8, run__sample_every=100)
    for name in NAMES:
        shutil.copytree(photo_folder, tmp_path / "photos" / name)
    return Batch(tmp_path, toml)
