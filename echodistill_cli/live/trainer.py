"""Train from the page: a process of the command line with a run folder, which outlives the page.

A run that was started in a terminal is shown alike: its progress is read from its folder, not from the process.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from echodistill_cli.config.build import PRESETS, build_config, is_too_long
from echodistill_cli.data.photos import PhotoReport, check_photos
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import make_folder, read_small, remove
from echodistill_cli.live.guard import MOST_PHOTOS, MOST_UPLOAD, check_whole, check_word, check_words
from echodistill_cli.locks import lock_holder
from echodistill_cli.models.device import expected_memory
from echodistill_cli.runs import CONFIG_FILE, LOCK, Run, open_run

State = Literal["starting", "training", "done", "stopped", "failed"]
LOSSES = ("denoising", "latent", "identity", "adversarial")
MOST_STEPS = 100_000
_MOST_POINTS = 200  # of a curve
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)
_PREVIEW = re.compile(r"step-\d{1,9}\.png")
# A line of the command line's progress without a terminal, such as "head start 140/200  4 min left".
_PROGRESS = re.compile(r"^(head start|carry back|step) (\d+)/\d+", re.MULTILINE)


@dataclass(frozen=True)
class Order:
    """What to train.

    Attributes:
        photos: folder.
        token: rare word that stands for the subject.
        class_name: what the subject is.
        model: a name of `Trainer.models`.
        steps: of the training; None for the model's default.
    """

    photos: Path
    token: str
    class_name: str
    model: str
    steps: int | None

    @property
    def name(self) -> str:
        """The name of the run."""
        return f"{self.token}-{self.class_name}".replace(" ", "-").replace("'", "")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        name: of the run.
        state: starting, training, done, stopped or failed.
        step: finished steps of all phases.
        steps: steps of all phases; 0 while they are not known.
        line: what the process said last, or how it ended.
        losses: a mapping per joint step, with "step".
        preview: the newest grid of previews.
    """

    name: str
    state: State
    step: int = 0
    steps: int = 0
    line: str = ""
    losses: Sequence[Mapping[str, float]] = ()
    preview: Path | None = None

    @property
    def is_running(self) -> bool:
        """Whether a process trains it now."""
        return self.state in ("starting", "training")


@dataclass
class Trainer:
    """Starts, stops and watches the trainings of one folder of runs.

    Attributes:
        folder: of the runs.
        model: the model that the page was started with, offered beside the presets.
        config: TOML file with further settings of every training.
        offline: do not use the network.
    """

    folder: Path
    model: str | None = None
    config: Path | None = None
    offline: bool = False
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """The models that the page offers; a browser cannot name any other."""
        return list(dict.fromkeys([*filter(None, [self.model]), *PRESETS]))

    def order(self, photos: Path | None, token: object, class_name: object, model: object, steps: object) -> Order:
        """Return an order made of what a browser sent.

        Raises:
            ConfigError: a value is none that the page offers, or the photos are missing.
        """
        if photos is None:
            raise ConfigError("There are no photos.", "Add three to six photos of the subject.")
        if model not in self.models:
            raise ConfigError(f"The model {str(model)[:40]!r} cannot be used.", f"Choose {', '.join(self.models)}.")
        count = None if steps in (None, "", 0) else check_whole("Steps", steps, 1, MOST_STEPS)
        words = check_word("The token", token), check_words("The class", class_name)
        order = Order(photos, *words, str(model), count)
        if is_too_long(f"{order.name}-teacher.safetensors"):
            raise ConfigError(f"The name {order.name[:20]}… is too long for a file.", "Choose a shorter class.")
        return order

    def needs(self, order: Order) -> float | None:
        """Return the device memory that a training is expected to need, in GiB; None if unknown."""
        expected = expected_memory(build_config(order.model, self.config))
        return expected.total if expected else None

    def start(self, order: Order) -> str:
        """Start a training and return the name of its run.

        Raises:
            ConfigError: a run of this name exists, or another run trains now.
            EchoDistillError: the photos cannot be copied.
        """
        if busy := self.running():
            raise ConfigError(f"{busy} is being trained.", "Wait until it ends, or stop it.")
        if (self.folder / order.name).exists():
            raise ConfigError(f"A run {order.name} exists.", "Resume it, or choose another token.")
        photos = self.folder / ".live" / "photos" / order.name
        remove(photos)
        make_folder(photos.parent)
        shutil.copytree(order.photos, photos)
        words = ["train", str(photos), f"--token={order.token}", f"--class-name={order.class_name}"]
        words += [f"--model={order.model}"] + ([f"--steps={order.steps}"] if order.steps else [])
        words += [f"--config={self.config}"] if self.config else []
        self._launch(order.name, words)
        return order.name

    def resume(self, name: object) -> str:
        """Continue a stopped run and return its name; raises the errors of `start`."""
        known = self._known(name)
        if busy := self.running():
            raise ConfigError(f"{busy} is being trained.", "Wait until it ends, or stop it.")
        self._launch(known, ["train", "--resume"])
        return known

    def stop(self, name: object) -> None:
        """Ask the process that trains a run to save it and end, also one that was started in a terminal.

        Raises:
            ConfigError: nothing trains this run.
        """
        known = self._known(name)
        process = self._processes.get(known)
        if process and process.poll() is None:
            process.terminate()
        elif holder := _holder(self.folder / known):
            holder.terminate()
        else:
            raise ConfigError(f"{known} is not being trained.", "Choose a run that is.")

    def names(self) -> list[str]:
        """Return the names of all runs, the newest first."""
        runs = {file.parent.name: file.stat().st_mtime for file in self.folder.glob(f"[!.]*/{CONFIG_FILE}")}
        runs |= {name: time.time() for name in self._processes}
        return sorted(runs, key=lambda name: runs[name], reverse=True)

    def running(self) -> str | None:
        """Return the name of a run that trains now; None if none does."""
        for name in self.names():
            process = self._processes.get(name)
            if (process and process.poll() is None) or _holder(self.folder / name):
                return name
        return None

    def progress(self, name: object) -> Progress:
        """Return how far a run is.

        Raises:
            ConfigError: there is no such run.
        """
        known = self._known(name)
        process, said = self._processes.get(known), self._said(known)
        line = said.strip().rpartition("\n")[2]
        alive = bool(process and process.poll() is None)
        try:
            run = open_run(self.folder / known)
        except EchoDistillError as error:
            if alive:
                return Progress(known, "starting", line=line)
            return Progress(known, "failed" if process else "stopped", line=line or str(error))
        trains = _holder(run.folder) is not None
        metrics = run.read_metrics()
        step, steps = _counted(run, len(metrics), said if alive else "")
        state: State = "training" if trains else "starting" if alive else _end(run, process)
        every = max(1, len(metrics) // _MOST_POINTS)
        losses = [{key: one[key] for key in ("step", *LOSSES) if key in one} for one in metrics[::every]]
        preview = max((file for file in run.samples.glob("step-*.png") if _is_preview(file)), default=None)
        return Progress(known, state, steps if state == "done" else step, steps, line, losses, preview)

    def close(self) -> list[str]:
        """Stop the trainings of this page, and return the names of those that were saved."""
        stopped = [name for name, process in self._processes.items() if process.poll() is None]
        for name in stopped:
            self._processes[name].terminate()
        for name in stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[name].wait(timeout=60)
        return stopped

    def _launch(self, name: str, words: Sequence[str]) -> None:
        command = [sys.executable, "-m", "echodistill_cli", *words, f"--output={self.folder / name}"]
        if self.offline:
            command.append("--offline")
        log = self._log(name)
        make_folder(log.parent)
        remove(log)  # it may be a stranger's link
        with log.open("xb") as file:
            # In a session of its own, so that Ctrl-C in the terminal of the page reaches it only through `close`.
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    def _log(self, name: str) -> Path:
        return self.folder / ".live" / f"{name}.log"

    def _said(self, name: str) -> str:
        log = self._log(name)
        return read_small(log).decode(errors="replace") if log.is_file() and not log.is_symlink() else ""

    def _known(self, name: object) -> str:
        if not isinstance(name, str) or name not in self.names():
            raise ConfigError(f"There is no run {str(name)[:40]!r}.", "Choose one of the list.")
        return name


def _counted(run: Run, joint: int, said: str) -> tuple[int, int]:
    """Return the finished steps of all phases, and how many there are.

    Args:
        run: the run.
        joint: its finished joint steps.
        said: what its process said; only that knows of the phases with the teacher alone.
    """
    head, steps, back = run.config.train.head_start, run.config.train.steps, run.config.echo.carry_back
    alone = {"head start": 0, "carry back": 0}
    for phase, number in _PROGRESS.findall(said):
        alone[phase] = int(number)
    started = head if joint else alone["head start"]
    return min(started + joint + alone["carry back"], head + steps + back), head + steps + back


def _end(run: Run, process: subprocess.Popen[bytes] | None) -> State:
    if process and process.returncode not in (0, *_STOPPED):
        return "failed"
    return "done" if (run.folder / f"{run.config.name}.safetensors").is_file() else "stopped"


def _is_preview(file: Path) -> bool:
    return bool(_PREVIEW.fullmatch(file.name)) and file.is_file() and not file.is_symlink()


def _holder(folder: Path) -> psutil.Process | None:
    """Return the process of the command line that trains in a folder.

    The lock itself is not tried: a training that starts at that moment would find it taken.
    """
    try:
        if not (folder / LOCK).is_file():  # a stranger's pipe would never be read to its end
            return None
        number, host = lock_holder(read_small(folder / LOCK).decode())
        if host not in ("", platform.node()):  # trained on another machine that shares this disk
            return None
        process = psutil.Process(int(number))
        return process if any("echodistill" in word for word in process.cmdline()) else None
    except (OSError, ValueError, OverflowError, psutil.Error):
        return None


def gather(files: Sequence[str], folder: Path) -> Path:
    """Copy uploaded photos into a new folder and return it.

    Args:
        files: paths of temporary files.
        folder: to create.

    Raises:
        ConfigError: there are too many files, or one is too large.
        EchoDistillError: they cannot be copied.
    """
    if len(files) > MOST_PHOTOS:
        raise ConfigError(f"There are {len(files)} files.", f"Use at most {MOST_PHOTOS}; three to six are enough.")
    make_folder(folder)
    for number, file in enumerate(map(Path, files), start=1):
        if file.stat().st_size > MOST_UPLOAD:
            shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(f"{file.name} is larger than {MOST_UPLOAD // 2**20} MiB.", "Make it smaller.")
        place = folder / file.name
        shutil.copyfile(file, place if not place.exists() else folder / f"{number}-{file.name}")
    return folder


def look_at(photos: Path, model: str) -> PhotoReport:
    """Return the verdict of `check` on each photo, at the resolution of a model."""
    return check_photos(photos, resolution=build_config(model).model.resolution, masks="auto", captions=True)
