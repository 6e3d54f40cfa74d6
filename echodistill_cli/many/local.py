"""The engine of one machine: a process per subject, on a GPU each, or one at a time on a CPU."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from echodistill_cli.errors import ConfigError
from echodistill_cli.files import make_folder
from echodistill_cli.many.subject import Event, Subject

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalEngine:
    """Runs attempts in processes of this machine.

    A process has its own session, so that Ctrl-C reaches it through `stop` alone. It saves and ends if this process is
    killed.

    Args:
        logs: folder for a log per subject.
        workers: processes at once; None for as many as the GPUs take, or one.
        gpus_per_subject: share of a GPU that a subject takes, at most 1; None for a whole one.
        on_gpu: whether the subjects may use a GPU.

    Raises:
        ConfigError: a subject would take several GPUs.
    """

    def __init__(self, logs: Path, workers: int | None, gpus_per_subject: float | None, *, on_gpu: bool) -> None:
        share = 1.0 if gpus_per_subject is None else gpus_per_subject
        if share > 1:
            raise ConfigError(f"--gpus-per-subject {share:g}: a subject cannot use several GPUs.", "Use 1 or less.")
        self.gpus = visible_gpus() if on_gpu and share > 0 else ()
        self.slots = workers or int(len(self.gpus) / (share or 1) + 1e-9) or 1
        self.logs = make_folder(logs)
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._slot_of: dict[str, int] = {}
        self._events: queue.Queue[Event] = queue.Queue()

    @property
    def has_room(self) -> bool:
        """Whether another attempt can start now."""
        return len(self.processes) < self.slots

    def start(self, subject: Subject) -> None:
        """Start an attempt; its events follow."""
        slot = min(set(range(self.slots)) - set(self._slot_of.values()))
        with (self.logs / f"{subject.name}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "echodistill_cli.many.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env=os.environ | self.environment(slot),
                start_new_session=True,
            )
        self.processes[subject.name], self._slot_of[subject.name] = process, slot
        threading.Thread(target=self._read, args=(subject, process), daemon=True).start()

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what happened since the last call; waits for up to `seconds` if nothing did."""
        found = list[Event]()
        try:
            found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for event in found:
            if event.kind in ("end", "died"):
                del self.processes[event.name], self._slot_of[event.name]
        return found

    def stop(self) -> None:
        """Ask every running attempt to save and end; their events follow."""
        for process in self.processes.values():
            process.terminate()

    def kill(self) -> None:
        """End every running attempt at once."""
        for process in self.processes.values():
            process.kill()

    def close(self) -> None:
        """Nothing outlives the attempts."""

    def environment(self, slot: int) -> Mapping[str, str]:
        """Return the variables that place the process of a slot."""
        if self.gpus:
            return {_VISIBLE: self.gpus[slot % len(self.gpus)]}
        if self.slots == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.slots))}

    def _read(self, subject: Subject, process: subprocess.Popen[str]) -> None:
        """Pass on the events of a process until it is gone."""
        assert process.stdin is not None
        assert process.stdout is not None
        end: Any = None
        try:
            process.stdin.write(json.dumps(subject.to_dict()) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                kind, data = json.loads(line)
                if kind == "end":
                    end = data
                else:
                    self._events.put(Event(subject.name, kind, data))
        except (OSError, ValueError):  # killed at the start, or in the middle of a line
            pass
        code = process.wait()  # before the next attempt gets the GPU
        process.stdout.close()
        with contextlib.suppress(OSError):
            process.stdin.close()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        died = Event(subject.name, "died", f"Its process ended early ({how}): see {self.logs / subject.name}.log.")
        self._events.put(died if end is None else Event(subject.name, "end", end))


def visible_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs for CUDA_VISIBLE_DEVICES. Asks the driver, without loading torch."""
    if (visible := os.environ.get(_VISIBLE)) is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
    if not (tool := shutil.which("nvidia-smi")):
        return ()
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return tuple(done.stdout.split()) if done.returncode == 0 else ()
