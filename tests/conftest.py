"""Shared fixtures: the small random pair and backbones of `tests.helpers.random_models`, and photos made here."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from echodistill_cli.config.build import build_config
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.models.load import load_pair
from examples.benchmark.subjects import references
from examples.mini_world.world import Picture
from tests.helpers.random_models import build_small_backbones, build_small_pair, build_small_sdxl_pair


@pytest.fixture(scope="session", autouse=True)
def _signals_as_on_a_terminal() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that: signal tests would never end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """One thread, so that sums come in the same order everywhere; no progress bars of other libraries."""
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a student and a teacher with random weights; not to be written to."""
    return build_small_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def small_sdxl_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same of SDXL's structure; not to be written to."""
    return build_small_sdxl_pair(tmp_path_factory.mktemp("sdxl-pair"))


@pytest.fixture(scope="session")
def small_backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny DINO, DINOv2 and CLIP by name; not to be written to."""
    return build_small_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def mini_pair() -> ModelPair:
    """The embedded pair, untrained; not to be trained."""
    return load_pair(build_config("mini").model)


@pytest.fixture(scope="session")
def backpack_pictures() -> list[Picture]:
    """Five pictures of a backpack that the embedded pair never saw, with their true masks."""
    return references("backpack")


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four different 96-pixel JPEGs of a coloured disc on a textured ground."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(4):
        ground = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize((96, 96), Image.Resampling.NEAREST)
        disc = Image.new("L", (96, 96), 0)
        disc.paste(255, (20 + 5 * index, 20, 60 + 5 * index, 70))
        image.paste((220, 60 + 20 * index, 30), mask=disc)
        image.save(folder / f"photo-{index}.jpg", quality=95)
    return folder
