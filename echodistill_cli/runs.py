"""A run folder: settings, metrics, previews, atomic checkpoints; how a run is found and resumed.

runs/sks-dog/
  config.toml                 the resolved configuration
  metrics.jsonl               one object per step
  samples/step-000100.png     one grid per preview
  checkpoints/step-000250/    state.pt and manifest.json (its SHA-256)
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import build_config, config_from_dict, config_to_dict, config_to_toml, read_toml
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import atomically, explained, make_folder, sha256, write_text
from echodistill_cli.lora.keys import RESERVED_NAMES

OnStep = Callable[[Mapping[str, float]], None]
OnMessage = Callable[[str], None]
CONFIG_FILE = "config.toml"
SAMPLES = "samples"
# Settings that may change when a run is resumed: its length, its device, and what the hints suggest to a run that
# diverged or ran out of memory. None of them changes what is computed.
_FREE_TO_CHANGE = {
    *("concept.photos", "concept.min_photos", "model.device", "model.offline", "model.precision"),
    *("train.steps", "train.lr", "train.teacher_lr", "train.text_lr", "train.discriminator_lr"),
    "train.gradient_checkpointing",
}
_NOT_IN_NAMES = {*'\\/:*?"<>|', *map(chr, range(32))}  # on at least one system


class Run:
    """One run folder, made by `create_run` or opened by `open_run`.

    Args:
        folder: the run folder.
        config: its settings.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.metrics_file = folder / "metrics.jsonl"
        self.samples = folder / SAMPLES
        self.checkpoints = folder / "checkpoints"

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics. Values that are not finite become null, because JSON has no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with explained(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")

    def read_metrics(self) -> list[dict[str, float]]:
        """Return the metrics of all steps so far, without a last line that a crash cut off."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def rewind(self, step: int) -> None:
        """Prepare to continue after `step`: write the settings, drop later metrics and checkpoints."""
        write_text(self.folder / CONFIG_FILE, config_to_toml(self.config))
        earlier = [entry for entry in self.read_metrics() if entry["step"] <= step]
        write_text(self.metrics_file, "".join(json.dumps(entry) + "\n" for entry in earlier))
        for later in self.list_checkpoints():
            if later.name > f"step-{step:06d}":
                shutil.rmtree(later)

    def save_checkpoint(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint atomically, then delete the oldest beyond `run.keep`.

        An existing checkpoint of the same step is replaced only after the new one is complete: head-start and
        carry-back checkpoints share a step number.

        Args:
            step: joint training steps so far.
            state: `TrainingState.state_dict()`.

        Returns:
            The checkpoint folder.

        Raises:
            EchoDistillError: the checkpoint cannot be written.
        """
        import torch

        make_folder(self.checkpoints)
        target = self.checkpoints / f"step-{step:06d}"
        with atomically(target) as folder:
            folder.mkdir()
            torch.save(dict(state), folder / "state.pt")
            manifest = {"step": step, "sha256": sha256(folder / "state.pt")}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for old in self.list_checkpoints()[: -self.config.run.keep]:
            shutil.rmtree(old)
        return target

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, oldest first."""
        return sorted(self.checkpoints.glob("step-*")) if self.checkpoints.is_dir() else []

    def load_checkpoint(self, step: int | None = None) -> dict[str, Any]:
        """Return the state that a checkpoint holds.

        Args:
            step: of the checkpoint; None for the newest.

        Raises:
            ConfigError: there is no such checkpoint.
            EchoDistillError: it is damaged. The hint names the checkpoint before it.
        """
        checkpoints = self.list_checkpoints()
        if not checkpoints:
            raise ConfigError(f"{self.folder} has no checkpoint yet.", "Start again with train --overwrite.")
        matching = [path for path in checkpoints if step is None or path.name == f"step-{step:06d}"]
        if not matching:
            steps = ", ".join(str(_step_of(path)) for path in checkpoints)
            raise ConfigError(f"{self.folder} has no checkpoint of step {step}.", f"Choose one of {steps}.")
        return self._read_checkpoint(matching[-1])

    def resumable_state(self, step: int | None, photo_count: int) -> dict[str, Any] | None:
        """Return the state to resume from; None if the run stopped before its first checkpoint.

        Args:
            step: of the checkpoint; None for the newest.
            photo_count: usable photos now.

        Raises:
            ConfigError: the checkpoint does not exist, was trained on another number of photos, or is beyond
                `train.steps`.
            EchoDistillError: the checkpoint is damaged.
        """
        if step is None and not self.list_checkpoints():
            return None
        saved = self.load_checkpoint(step)
        if saved["photo_count"] != photo_count:
            raise ConfigError(
                f"{self.folder} was trained on {saved['photo_count']} photos, but {self.config.concept.photos} has "
                f"{photo_count}.",
                "Resume with the same photos, or start a new run in another --output.",
            )
        if saved["step"] > self.config.train.steps:
            raise ConfigError(
                f"{self.folder} is at step {saved['step']} already, beyond --steps {self.config.train.steps}.",
                f"Finish there with --steps {saved['step']}, or go back with --from-step.",
            )
        return saved

    def _read_checkpoint(self, folder: Path) -> dict[str, Any]:
        import torch

        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if sha256(folder / "state.pt") != manifest["sha256"]:
                raise ValueError("its content does not match its checksum")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            earlier = [path for path in self.list_checkpoints() if path < folder]
            remedy = "Start again with train --overwrite."
            if earlier:
                number = _step_of(earlier[-1])
                remedy = f"Use the one before it: train --resume --from-step {number}, or export --step {number}."
            raise EchoDistillError(f"Checkpoint {folder} is damaged ({error}).", remedy) from error
        return dict(state)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def check_name(config: Config) -> None:
    """Check that a run's files can have their names, before anything is trained.

    Raises:
        ConfigError: the name, the token or the class name holds a character that no file name may have, or the name is
            reserved, or the LoRA and the token would share a file.
    """
    names = {"--name": config.run.name, "--token": config.concept.token, "--class-name": config.concept.class_name}
    for flag, text in names.items():
        if text is not None and (not text.strip(" .") or set(text) & _NOT_IN_NAMES):
            raise ConfigError(f"{flag} {text!r} cannot be used as a file name.", "Use letters, digits, - and _.")
    if config.name.lower() in RESERVED_NAMES:
        raise ConfigError(f"A1111 cannot load a LoRA named {config.name!r}.", "Choose another --name.")
    if config.text.form == "token" and config.name == config.concept.token:
        raise ConfigError(
            f"The LoRA and the learned token would both be {config.name}.safetensors.", "Choose another --name."
        )


def check_output(config: Config, *, overwrite: bool) -> None:
    """Check that a new run may be created at `config.output`; changes nothing.

    Args:
        config: of the new run.
        overwrite: allow an old run there.

    Raises:
        ConfigError: the folder exists and `overwrite` is off, or it is not a run folder, or it holds the photos or the
            working directory.
    """
    folder = config.output
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(
            f"{folder} exists already.",
            "Continue it with --resume, replace it with --overwrite, or choose another --output.",
        )
    if not ((folder / CONFIG_FILE).is_file() and (folder / SAMPLES).is_dir()):
        raise ConfigError(f"{folder} is not a run folder, so it is not overwritten.", "Choose another --output.")
    for path, what in ((Path(config.concept.photos), "the photos"), (Path(), "the working directory")):
        if path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder} holds {what}, so it is not overwritten.", "Choose another --output.")


def create_run(config: Config, *, overwrite: bool) -> Run:
    """Create a run folder with its settings; an old run in its place is deleted if `overwrite` is on.

    Args:
        config: of the new run.
        overwrite: allow an old run there.

    Raises:
        ConfigError: `check_output` refuses the folder.
        EchoDistillError: the folder cannot be written.
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
    """Open an existing run folder.

    Raises:
        ConfigError: it is not a run folder, or its settings cannot be read.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG_FILE}.")
    return Run(folder, config_from_dict(read_toml(folder / CONFIG_FILE)))


def newest_run(root: Path = Path("runs")) -> Run:
    """Open the run below `root` that was written to last.

    Raises:
        ConfigError: there is no run.
    """
    folders = [path.parent for path in root.glob(f"*/{CONFIG_FILE}")]
    if not folders:
        raise ConfigError(f"There is no run under {root}/.", "Train one first, or name a LoRA file or a run folder.")
    return open_run(max(folders, key=_last_written))


def resumed_config(overrides: Mapping[str, Any]) -> Config:
    """Return the settings of the run to resume, with some of them changed.

    Args:
        overrides: changed settings by dotted key. The output, name, token, class or photos also select the run; without
            any of them it is the newest run.

    Raises:
        ConfigError: there is no such run, or a key or value is wrong.
    """
    selecting = {"run.output", "run.name", "concept.token", "concept.class_name", "concept.photos"}
    run = open_run(build_config(overrides=overrides).output) if selecting & set(overrides) else newest_run()
    tables = config_to_dict(run.config)
    for key, value in {**overrides, "run.output": str(run.folder)}.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return config_from_dict(tables)


def resume_run(config: Config) -> Run:
    """Open the run at `config.output` to continue it with these settings.

    Raises:
        ConfigError: the run does not exist, or a setting that decides its result differs.
    """
    run = open_run(config.output)
    current, recorded = _result_settings(config), _result_settings(run.config)
    for key, value in recorded.items():
        if current[key] != value:
            raise ConfigError(
                f"{config.output} was made with {key} = {value!r}, not {current[key]!r}.",
                "Resume with the same settings, or start a new run in another --output.",
            )
    remove_leftovers(run.folder)
    return Run(run.folder, config)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed process left in a run folder."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _result_settings(config: Config) -> dict[str, Any]:
    """Return, by dotted key, the settings that must not change when a run is resumed."""
    tables = config_to_dict(config)
    tables["run"] = {"seed": config.run.seed}
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {key: value for key, value in flat.items() if key not in _FREE_TO_CHANGE}


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder / CONFIG_FILE, folder / "metrics.jsonl") if path.exists())
