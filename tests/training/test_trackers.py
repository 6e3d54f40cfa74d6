"""Trackers: what they receive, and that a wrong name is reported before models are loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from echodistill_cli.config.build import build_config
from echodistill_cli.config.warnings import TRACKERS, check_trackers
from echodistill_cli.errors import ConfigError
from echodistill_cli.training.loop import tracking
from tests.helpers.commands import command, small_toml


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with tracking(build_config(), tmp_path) as track:
        track({"step": 1.0, "latent": 2.0})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_or_missing_tracker_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"tensorbord is unknown; choose from tensorboard, trackio, .*Did you mean tensorboard\?"
    ):
        check_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match=r"clearml is not supported, as it needs an account or a repository; choose"):
        check_trackers(["clearml"])
    for name in ("trackio", "wandb", "mlflow", "aim"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(ConfigError, match=rf"{name} needs the package {name}. Install it: pip install {name}"):
                check_trackers([name])


def test_every_tracker_is_one_of_accelerates() -> None:
    assert set(TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)


def test_a_missing_tracker_is_reported_before_anything_is_written(
    small_pair: tuple[Path, Path], small_backbones: dict[str, Path], photo_folder: Path, tmp_path: Path
) -> None:
    file = small_toml(tmp_path, small_pair, small_backbones)
    done = command("train", photo_folder, "--config", file, "-o", tmp_path / "run", "--report-to", "comet")
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "run").exists()
    assert "Loading" not in done.err


def test_tensorboard_gets_every_metric_of_every_step_and_no_path(
    small_pair: tuple[Path, Path], small_backbones: dict[str, Path], photo_folder: Path, tmp_path: Path
) -> None:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    file = small_toml(tmp_path, small_pair, small_backbones, train__steps=2, echo__start="off")
    done = command("train", photo_folder, "--config", file, "-o", tmp_path / "run", "--report-to", "tensorboard", "-q")
    assert (done.code, done.err) == (0, "")
    logs = tmp_path / "run" / "logs" / "echodistill"
    events = accumulator.EventAccumulator(str(logs))
    events.Reload()
    assert {"denoising", "latent", "adversarial", "lr_student", "step_seconds"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("latent")] == [1, 2]
    for written in logs.rglob("*"):
        assert not written.is_file() or str(small_pair[0].parent).encode() not in written.read_bytes()
        assert not written.is_file() or str(photo_folder).encode() not in written.read_bytes()
