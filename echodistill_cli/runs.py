"""A run folder: settings, metrics, previews, atomic checkpoints; how a run is found and resumed.

runs/sks-dog/
  config.toml                 the resolved configuration
  metrics.jsonl               one object per step
  samples/step-000100.png     one grid per preview
  checkpoints/step-000250/    state.pt and manifest.json (its SHA-256)
  .lock                       ID and host of the process that trains it, while it does

A checkpoint of the head start is called step-000000-head-000010, one of the carry back step-001500-back-000010. No two
share a name, so that none is replaced. Old runs have such checkpoints without the second number.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import (
    absolute,
    config_from_dict,
    config_to_dict,
    config_to_toml,
    is_file_name,
    is_too_long,
    read_toml,
)
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import (
    atomically,
    discard,
    explained,
    make_folder,
    read_metrics,
    read_small,
    recover,
    recover_below,
    remove,
    sha256,
    write_text,
)
from echodistill_cli.locks import locked
from echodistill_cli.lora.keys import RESERVED_NAMES

OnStep = Callable[[Mapping[str, float]], None]
OnMessage = Callable[[str], None]
CONFIG_FILE, SAMPLES, LOCK, REPORT = "config.toml", "samples", ".lock", "report.html"  # the report is never sent
# Settings that may change when a run is resumed: its length, its device, and what the hints suggest to a run that
# diverged or ran out of memory. The steps before stay valid; those after use the new value.
_FREE_TO_CHANGE = {
    *("concept.photos", "concept.min_photos", "model.device", "model.offline", "model.precision"),
    *("train.steps", "train.lr", "train.teacher_lr", "train.text_lr", "train.discriminator_lr"),
    *("train.gradient_checkpointing", "train.compile"),
}
_CHECKPOINT = re.compile(r"step-(\d+)(?:-(?:head|back)-(\d+))?")
# What reading a damaged or forged checkpoint raises.
_READING = (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError)


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
        """Return the metrics of all steps so far, without lines that a crash or a full disk damaged."""
        return read_metrics(self.metrics_file)[0]

    def locked(self) -> AbstractContextManager[None]:
        """Context in which no other process can train in this folder."""
        return locked(self.folder / LOCK, f"{self.folder} is being trained")

    def rewind(self, step: int, phase_step: int = 0) -> int:
        """Prepare to continue after `step`: drop later checkpoints and metrics, write the settings.

        A kill in the middle leaves a run whose newest checkpoint has all of its metrics.

        Args:
            step: joint training steps to keep.
            phase_step: steps to keep of the head start, if `step` is 0, or of the carry back.

        Returns:
            how many damaged lines of the metrics were dropped.
        """
        make_folder(self.samples)
        for later in reversed(self.list_checkpoints()):
            if _place_of(later) > (step, phase_step):
                discard(later)
        entries, damaged = read_metrics(self.metrics_file)
        lines = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step]
        write_text(self.metrics_file, "".join(lines))
        write_text(self.folder / CONFIG_FILE, config_to_toml(self.config))
        return damaged

    def save_checkpoint(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint with the deciding settings, delete the oldest, and return its folder.

        Args:
            step: joint training steps so far.
            state: `TrainingState.state_dict()`.

        Raises:
            EchoDistillError: the checkpoint cannot be written.
        """
        import torch

        make_folder(self.checkpoints)
        target = self.checkpoints / _checkpoint_name(step, state)
        with atomically(target) as folder:
            folder.mkdir()
            torch.save({**state, "settings": _result_settings(self.config)}, folder / "state.pt")
            manifest = {"step": step, "sha256": sha256(folder / "state.pt")}
            (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for old in self.list_checkpoints()[: -self.config.run.keep]:
            discard(old)
        return target

    def list_checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        folders = (path for path in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir())
        return sorted(folders, key=_place_of)

    def load_checkpoint(self, step: int | None = None) -> dict[str, Any]:
        """Return the state that a checkpoint holds.

        Args:
            step: of the checkpoint; None for the newest. Of several with this step, it is the newest undamaged one.

        Raises:
            ConfigError: there is no such checkpoint, or config.toml was changed after it was written.
            EchoDistillError: it is damaged. The hint names the checkpoint before it.
        """
        checkpoints = self.list_checkpoints()
        if not checkpoints:
            raise ConfigError(f"{self.folder} has no checkpoint yet.", "Start again with train --overwrite.")
        matching = checkpoints[-1:] if step is None else [path for path in checkpoints if _place_of(path)[0] == step]
        if not matching:
            steps = ", ".join(str(number) for number in sorted({_place_of(path)[0] for path in checkpoints}))
            raise ConfigError(f"{self.folder} has no checkpoint of step {step}.", f"Choose one of {steps}.")
        state: dict[str, Any] | None = None
        while state is None and len(matching) > 1:
            with contextlib.suppress(EchoDistillError):
                state = self._read_checkpoint(matching.pop())
        state = state or self._read_checkpoint(matching[0])
        if change := _difference(dict(state.get("settings", {})), _result_settings(self.config)):
            key, before, now = change
            message = f"{self.folder / CONFIG_FILE} has {key} = {now!r}, but the run was trained with {before!r}."
            raise ConfigError(message, "Restore that value, or start a new run in another --output.")
        return state

    def _read_checkpoint(self, folder: Path) -> dict[str, Any]:
        import torch

        try:
            manifest = json.loads(read_small(folder / "manifest.json"))
            if sha256(folder / "state.pt") != manifest["sha256"]:
                raise ValueError("its content does not match its checksum")
            state = dict(torch.load(folder / "state.pt", map_location="cpu", weights_only=True))
            if type(state["step"]) is not int or state.get("family", "sd") not in FAMILIES:
                raise ValueError("its content is not a run's state")
        except _READING as error:
            is_code = isinstance(error, pickle.UnpicklingError)  # torch's text tells how to run it
            reason = "it holds more than plain tensors, perhaps code" if is_code else error
            earlier = [path for path in self.list_checkpoints() if _place_of(path) < _place_of(folder)]
            remedy = "Start again with train --overwrite."
            if earlier:
                number = _place_of(earlier[-1])[0]
                remedy = f"Use the one before it: train --resume --from-step {number}, or export --step {number}."
            raise EchoDistillError(f"Checkpoint {folder} is damaged ({reason}).", remedy) from error
        return state


def _checkpoint_name(step: int, state: Mapping[str, Any]) -> str:
    phases = {"back": state.get("carry_back_step", 0), "head": 0 if step else state.get("head_start_step", 0)}
    return f"step-{step:06d}" + "".join(f"-{phase}-{number:06d}" for phase, number in phases.items() if number)


def _place_of(checkpoint: Path) -> tuple[int, int]:
    """Return the joint step of a checkpoint, and its step of the head start or the carry back."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def check_name(config: Config) -> None:
    """Check that a run's files can have their names, before anything is trained or exported.

    Raises:
        ConfigError: a name holds a character that no file name may have, is reserved or too long, or names two files.
    """
    names = {"--name": config.run.name, "--token": config.concept.token, "--class-name": config.concept.class_name}
    for flag, text in names.items():
        if text is not None and not is_file_name(text):
            raise ConfigError(f"{flag} {text!r} cannot be used as a file name.", "Use letters, digits, - and _.")
    for name in (config.name, config.concept.token):
        if is_too_long(f"{name}-teacher.safetensors"):
            raise ConfigError(f"The name {name[:20]}… is too long for a file.", "Choose a shorter --name.")
    if config.name.lower() in RESERVED_NAMES:
        raise ConfigError(f"A1111 cannot load a LoRA named {config.name!r}.", "Choose another --name.")
    if config.text.form == "token" and config.name == config.concept.token:
        raise ConfigError(
            f"The LoRA and the learned token would both be {config.name}.safetensors.", "Choose another --name."
        )


def check_output(config: Config, *, overwrite: bool) -> None:
    """Check that a new run may be created at `config.output`; settles what a killed process left.

    Args:
        config: of the new run.
        overwrite: allow an old run there.

    Raises:
        ConfigError: `overwrite` is off, or the folder is no run or holds the photos or the working directory.
        EchoDistillError: another process trains there.
    """
    folder = config.output
    with explained(folder):
        recover(Path(os.path.realpath(folder)))  # pathlib raises another error in a circle of links
        with contextlib.suppress(FileNotFoundError):
            folder.stat()  # pathlib takes a circle of links for a folder that does not exist
        if not folder.exists() or _is_fresh(folder):
            return
    if not overwrite:
        raise ConfigError(
            f"{folder} exists already.",
            "Continue it with --resume, replace it with --overwrite, or choose another --output.",
        )
    if not _is_run(folder):
        raise ConfigError(f"{folder} is not a run folder, so it is not overwritten.", "Choose another --output.")
    for path, what in ((Path(config.concept.photos), "the photos"), (Path(), "the working directory")):
        if path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder} holds {what}, so it is not overwritten.", "Choose another --output.")


def _is_fresh(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only what a run has that was killed while it was created."""
    if not folder.is_dir():
        return False
    recover_below(folder)
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]
    return all(entry.name == SAMPLES and entry.is_dir() and not any(entry.iterdir()) for entry in entries)


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run, whole or partly deleted. Anything else is never overwritten."""
    config_file = folder / CONFIG_FILE
    if config_file.is_file() and (folder / SAMPLES).is_dir():
        return True
    if any(folder.glob("checkpoints/step-*/manifest.json")) or any(folder.glob(f"{SAMPLES}/step-*.png")):
        return True
    try:  # a run that was killed while it was created has its settings alone, as this program writes them
        return read_small(config_file).decode() == config_to_toml(config_from_dict(read_toml(config_file)))
    except (OSError, ValueError, EchoDistillError):
        return False


def create_run(config: Config, *, overwrite: bool) -> Run:
    """Create a run folder with its settings; an old run in its place is deleted last if `overwrite` is on.

    Args:
        config: of the new run.
        overwrite: allow an old run there.

    Raises:
        ConfigError: `check_output` refuses the folder.
        EchoDistillError: the folder cannot be written, or another process trains there.
    """
    check_output(config, overwrite=overwrite)
    run = Run(make_folder(config.output), config)
    with run.locked():
        check_output(config, overwrite=overwrite)
        if _is_fresh(run.folder):
            _fill(run.folder, config)
        else:
            _replace(run.folder.resolve(), config)
    return run


def _replace(folder: Path, config: Config) -> None:
    """Replace an old run by a new one, in one step if its folder can be renamed."""
    try:
        with atomically(folder) as temporary:
            temporary.mkdir()
            _fill(temporary, config)
    except EchoDistillError as error:
        number = getattr(error.__cause__, "errno", None)
        if number not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV):
            raise
        for entry in folder.iterdir():  # a disk of its own, or a folder in a folder that is read-only
            if entry.name not in (LOCK, CONFIG_FILE):
                remove(entry)
        _fill(folder, config)


def _fill(folder: Path, config: Config) -> None:
    """Write a new run. The settings, without which it is no run, come last."""
    make_folder(folder / SAMPLES)
    write_text(folder / CONFIG_FILE, config_to_toml(config))


def open_run(folder: Path) -> Run:
    """Open an existing run folder.

    Raises:
        ConfigError: it is not a run folder, its settings cannot be read, a name in them is no file name, or a folder in
            it is a link that leads out of it.
    """
    if not (folder / CONFIG_FILE).is_file():
        recover(Path(os.path.realpath(folder)))
    if not (folder / CONFIG_FILE).is_file():
        lora = next(folder.glob("*.safetensors"), None)
        hint = f"Name the LoRA file: {lora}" if lora else None
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG_FILE}.", hint)
    config = config_from_dict(read_toml(folder / CONFIG_FILE))
    check_name(config)  # a stranger's run must not lead an export out of its folder
    for path in folder.rglob("*"):
        if path.is_symlink() and path.is_dir() and not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{path} is a link that leads out of the run.", "Put a folder in its place.")
    return Run(folder, config)


def newest_run(root: Path = Path("runs")) -> Run:
    """Open the run below `root` that was written to last.

    Raises:
        ConfigError: there is no run.
    """
    for old in root.glob(".*.old.tmp"):  # that --overwrite moved aside before it was killed
        recover(root / old.name[1:].rsplit(".", 3)[0])
    folders = [path.parent for path in root.glob(f"[!.]*/{CONFIG_FILE}")]
    if not folders:
        raise ConfigError(f"There is no run under {root}/.", "Train one first, or name a LoRA file or a run folder.")
    return open_run(max(folders, key=_last_written))


def resume_run(config: Config) -> Run:
    """Open the run at `config.output` to continue it with these settings. Changes nothing.

    Raises:
        ConfigError: the run does not exist, or a setting that decides its result differs.
    """
    run = open_run(config.output)
    if change := _difference(_result_settings(run.config), _result_settings(config)):
        key, before, now = change
        raise ConfigError(
            f"{config.output} was made with {key} = {before!r}, not {now!r}.",
            "Resume with the same settings, or start a new run in another --output.",
        )
    return Run(run.folder, config)


def _result_settings(config: Config) -> dict[str, Any]:
    """Return, by dotted key, the settings that must not change when a run is resumed."""
    tables = config_to_dict(config)
    tables["run"] = {"seed": config.run.seed}
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    return {key: value for key, value in flat.items() if key not in _FREE_TO_CHANGE}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first setting that differs: its key and both values. Paths may be relative or absolute."""
    changes = ((key, before[key], now[key]) for key in before.keys() & now.keys())
    return next((one for one in sorted(changes, key=str) if absolute(one[1]) != absolute(one[2])), None)


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder / CONFIG_FILE, folder / "metrics.jsonl") if path.exists())
