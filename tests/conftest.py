"""Shared fixtures: small random models, the embedded pair, and photos made here."""

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
from tests.helpers.drawn_subjects import DrawnSubject, drawn_subjects
from tests.helpers.flow_models import build_small_flux2_pair, build_small_sana_pair
from tests.helpers.random_models import build_small_backbones, build_small_pair, build_small_sdxl_pair


@pytest.fixture(scope="session", autouse=True)
def _signals_as_on_a_terminal() -> None:
    """Shells start background jobs with SIGINT ignored, which children inherit; signal tests would never end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Use one thread, so that the order of sums is the same everywhere, and no progress bars of other libraries."""
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a student and a teacher with random weights. Read-only."""
    return build_small_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def small_sdxl_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a student and a teacher with random weights and SDXL's structure. Read-only."""
    return build_small_sdxl_pair(tmp_path_factory.mktemp("sdxl-pair"))


@pytest.fixture(scope="session")
def small_flow_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folders of a student and a teacher by family of transformers, with random weights. Read-only."""
    folder = tmp_path_factory.mktemp("flow-pairs")
    return {"sana": build_small_sana_pair(folder / "sana"), "flux2": build_small_flux2_pair(folder / "flux2")}


@pytest.fixture(scope="session")
def small_backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny DINO, DINOv2 and CLIP by name. Read-only."""
    return build_small_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def mini_pair() -> ModelPair:
    """The embedded pair, without adapters. Tests must not train it."""
    return load_pair(build_config("mini").model)


@pytest.fixture(scope="session")
def backpacks() -> list[DrawnSubject]:
    """Five images of a backpack that the embedded pair never saw, with their true masks."""
    return drawn_subjects()


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four different 96-pixel JPEGs of a colored rectangle on a textured ground."""
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
