"""What the tests of `train-many` share: a manifest of small subjects, the command as a process, and what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.many.subject import Subject
from tests.helpers.commands import Done, command

NAMES = ("one", "two", "three")
ROOT = Path(__file__).parents[2]
PATIENCE = float(os.environ.get("TEST_PATIENCE", "200"))  # seconds; more for a machine with much else to do


class Batch:
    """A folder with photos, a manifest and an output.

    Args:
        folder: holds all of it.
        toml: settings of every subject.
    """

    def __init__(self, folder: Path, toml: Path) -> None:
        self.folder, self.toml, self.output = folder, toml, folder / "out"
        self.manifest = folder / "subjects.csv"
        self.write(*NAMES)

    def write(self, *names: str, **settings: dict[str, Any]) -> None:
        """Write the manifest; `settings` are those of one subject by dotted key."""
        rows = [{"photos": f"photos/{name}", "class_name": "dog", **settings.get(name, {})} for name in names]
        self.manifest = self.folder / "subjects.jsonl"
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, *more: object) -> list[str]:
        """The arguments of the command."""
        words = ["train-many", self.manifest, "--config", self.toml, "-o", self.output, *more]
        return [str(word) for word in words]

    def __call__(self, *more: object) -> Done:
        """Run the command in this process; subjects have processes of their own."""
        return command(*self.arguments(*more))

    @staticmethod
    def line(subject: Subject) -> str:
        """A subject as a worker reads it."""
        return json.dumps(subject.to_dict()) + "\n"

    def result(self, name: str) -> Any:
        """The result.json of a subject; None without one."""
        file = self.output / name / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def attempts(self, name: str) -> list[dict[str, Any]]:
        """The lines of results.jsonl on a subject."""
        lines = (self.output / "results.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["name"] == name]

    def steps(self, name: str) -> list[int]:
        """The steps in the metrics of a subject."""
        return [json.loads(line)["step"] for line in (self.output / name / "metrics.jsonl").read_text().splitlines()]

    @contextmanager
    def process(self, *more: object) -> Iterator[Watched]:
        """The command as a process of its own, which is killed in the end."""
        process = subprocess.Popen(
            [sys.executable, "-m", "echodistill_cli", *self.arguments(*more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        try:
            yield Watched(process)
        finally:
            process.kill()
            process.communicate()


class Watched:
    """A process whose lines on stderr are read one by one.

    Args:
        process: with pipes for stdout and stderr.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[str]()
        self._alarm: threading.Timer | None = None
        self._wait_again()

    def until(self, words: str, times: int = 1) -> str:
        """Read until so many lines had these words, and return the last of them."""
        assert self.process.stderr is not None
        found = [line for line in self.lines if words in line]
        while len(found) < times:
            line = self.process.stderr.readline()
            assert line, f"no {times} lines with {words!r} in {self.text}"
            self._wait_again()
            self.lines.append(line)
            found += [line] if words in line else []
        return found[times - 1]

    def end(self) -> int:
        """Read the rest and return the exit code."""
        out, err = self.process.communicate()
        self.lines += [out, err]
        if self._alarm:
            self._alarm.cancel()
        return self.process.returncode

    def _wait_again(self) -> None:
        """Kill the process if it says nothing for too long, which must not stop the tests for ever."""
        if self._alarm:
            self._alarm.cancel()
        self._alarm = threading.Timer(PATIENCE, self.process.kill)
        self._alarm.daemon = True
        self._alarm.start()

    @property
    def text(self) -> str:
        """What was read so far."""
        return "".join(self.lines)


def only_if_selected(request: pytest.FixtureRequest, marker: str) -> None:
    """Skip unless `-m` names a marker: these tests start servers, which time out on a machine that is busy."""
    if marker not in request.config.getoption("markexpr"):
        pytest.skip(f"starts servers; run it with: make test-extras-many, or pytest -m {marker}")


def pid_in(line: str) -> int:
    """The ID of the process that a line "NAME: started on HOST, process PID" names."""
    return int(line.rsplit(" ", 1)[1])
