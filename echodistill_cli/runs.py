"""A run folder: resolved configuration, metrics, samples and atomic checkpoints, and how a run is found and resumed.

runs/sks-dog/
  config.toml                 the resolved configuration
  metrics.jsonl               one object per step
  samples/step-000100.png     one grid per preview
  checkpoints/step-000250/    state.pt and manifest.json (its SHA-256)
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from echodistill_cli.config.build import build_config, config_from_dict, config_to_dict, config_to_toml, read_toml
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import atomically, explained, make_folder, write_text

OnStep = Callable[[Mapping[str, float]], None]
OnMessage = Callable[[str], None]
CONFIG_FILE = "config.toml"
SAMPLES = "samples"
# What may differ when a run goes on: how long, where and how it is watched, and what a run that diverged or ran out of
# memory is told to change; not what else is computed.
_FREE_TO_CHANGE = {
    *("concept.photos", "concept.min_photos", "model.device", "model.offline", "model.precision"),
    *("train.steps", "train.lr", "train.teacher_lr", "train.text_lr", "train.discriminator_lr"),
    "train.gradient_checkpointing",
}


class Run:
    """One run folder; made by `create` or `open_run`."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.metrics_file = folder / "metrics.jsonl"
        self.samples = folder / SAMPLES
        self.checkpoints = folder / "checkpoints"

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics; what is not finite becomes null, since JSON knows no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with explained(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def read_metrics(self) -> list[dict[str, float]]:
        """All steps logged so far; a line that a crash cut off is left out."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def rewind(self, step: int) -> None:
        """Make the folder ready to go on after `step`: what came later is forgotten, the settings are written."""
        write_text(self.folder / CONFIG_FILE, config_to_toml(self.config))
        kept = [entry for entry in self.read_metrics() if entry["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in kept))
        for later in self.list_checkpoints():
            if later.name > f"step-{step:06d}":
                shutil.rmtree(later)

    def save_checkpoint(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint whole or not at all, then drop the oldest beyond `run.keep`.

        One of the same step stays until then: the teacher's steps alone, before and after the joint ones, share one.
        """
        make_folder(self.checkpoints)
        target = self.checkpoints / f"step-{step:06d}"

        with atomically(target) as folder:
            folder.mkdir()
            torch.save(dict(state), folder / "state.pt")
            manifest = {"step": step, "sha256": _sha256(folder / "state.pt")}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for old in self.list_checkpoints()[: -self.config.run.keep]:
            shutil.rmtree(old)
        return target

    def list_checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []

    def load_checkpoint(self, step: int | None = None) -> dict[str, Any]:
        """The state in the newest checkpoint, or in that of a step.

        Raises:
            ConfigError: there is none.
            EchoDistillError: it is damaged; the one before it is offered.
        """
        found = self.list_checkpoints()
        if step is not None:
            found = [path for path in found if path.name == f"step-{step:06d}"]
        if not found:
            if there := ", ".join(str(_step_of(path)) for path in self.list_checkpoints()):
                raise ConfigError(f"{self.folder} has no checkpoint of step {step}.", f"There is one of {there}.")
            raise ConfigError(f"{self.folder} has no checkpoint yet.", "Start anew with train --overwrite.")
        return self._read_checkpoint(found[-1])

    def _read_checkpoint(self, folder: Path) -> dict[str, Any]:

        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if _sha256(folder / "state.pt") != manifest["sha256"]:
                raise ValueError("its content does not match its checksum")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            earlier = [path for path in self.list_checkpoints() if path < folder]
            remedy = "Start anew with train --overwrite."
            if earlier:
                number = _step_of(earlier[-1])
                remedy = f"Use the one before it: train --resume --from-step {number}, or export --step {number}."
            raise EchoDistillError(f"Checkpoint {folder} is damaged ({error}).", remedy) from error
        return dict(state)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def check_output(config: Config, *, overwrite: bool) -> None:
    """See that a new run may be made where the configuration says; nothing is touched.

    Raises:
        ConfigError: something is there already and `overwrite` is off, or it is no run folder.
    """
    folder = config.output
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"{folder} exists already.", "Go on with --resume, replace it with --overwrite, or name another --output."
        )
    if not ((folder / CONFIG_FILE).is_file() and (folder / SAMPLES).is_dir()):
        raise ConfigError(f"{folder} is not a run folder, so it is not overwritten.", "Name another --output.")
    for kept, what in ((Path(config.concept.photos), "the photos"), (Path(), "the working directory")):
        if kept.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder} holds {what}, so it is not overwritten.", "Name another --output.")


def create_run(config: Config, *, overwrite: bool) -> Run:
    """Make a new run folder with its configuration; an old run that is in the way is removed.

    Raises:
        ConfigError: see `check_output`. EchoDistillError: the folder cannot be written.
    """
    check_output(config, overwrite=overwrite)
    folder = config.output
    with explained(folder):
        if folder.exists():
            shutil.rmtree(folder)
    run = Run(make_folder(folder), config)
    write_text(folder / CONFIG_FILE, config_to_toml(config))
    make_folder(run.samples)
    return run


def open_run(folder: Path) -> Run:
    """A run folder that is there.

    Raises:
        ConfigError: it is no run folder, or its configuration is not readable.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG_FILE}.")
    return Run(folder, config_from_dict(read_toml(folder / CONFIG_FILE)))


def newest_run(root: Path = Path("runs")) -> Run:
    """The run under `root` that was written to last.

    Raises:
        ConfigError: there is none.
    """
    found = [path.parent for path in root.glob(f"*/{CONFIG_FILE}")]
    if not found:
        raise ConfigError(f"There is no run under {root}/.", "Train one first, or name a LoRA file or a run folder.")
    return open_run(max(found, key=_last_written))


def resumed_config(overrides: Mapping[str, Any]) -> Config:
    """The configuration of a run to go on with, as it is in its folder, with settings changed.

    Args:
        overrides: by dotted key. What names a run (its output, name or subject) says which; else, if not even photos
            are named, it is the newest.

    Raises:
        ConfigError: there is no such run, or a key or value is wrong.
    """
    naming = {"run.output", "run.name", "concept.token", "concept.class_name", "concept.photos"}
    run = open_run(build_config(overrides=overrides).output) if naming & set(overrides) else newest_run()
    tables = config_to_dict(run.config)
    for key, value in {**overrides, "run.output": str(run.folder)}.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return config_from_dict(tables)


def resume_run(config: Config) -> Run:
    """The run of a configuration, to go on with it.

    Raises:
        ConfigError: it does not exist, or was made with settings that decide the result differently.
    """
    run = open_run(config.output)
    ours, theirs = _deciding(config), _deciding(run.config)
    for key, value in theirs.items():
        if ours[key] != value:
            raise ConfigError(
                f"{config.output} was made with {key} = {value!r}, not {ours[key]!r}.",
                "Resume with the same settings, or start anew in another --output.",
            )
    remove_leftovers(run.folder)
    return Run(run.folder, config)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that a killed process left in a run folder."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _deciding(config: Config) -> dict[str, Any]:
    """Settings by dotted key that must not change when a run goes on."""
    tables = config_to_dict(config)
    tables["run"] = {"seed": config.run.seed}
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {key: value for key, value in flat.items() if key not in _FREE_TO_CHANGE}


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder / CONFIG_FILE, folder / "metrics.jsonl") if path.exists())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
