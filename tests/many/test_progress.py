"""What a person sees of many subjects: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest

from echodistill_cli.cli.show import SafeConsole
from echodistill_cli.cli.train_many import ManyProgress, duration
from echodistill_cli.many.subject import Event, Outcome

LENGTHS = {"head start": 2, "training": 8, "carry back": 0}


def console(*, terminal: bool, height: int = 30) -> SafeConsole:
    return SafeConsole(file=io.StringIO(), force_terminal=terminal, width=100, height=height, color_system=None)


def text_of(progress: ManyProgress) -> str:
    stream = progress.console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def feed(progress: ManyProgress, *events: tuple[str, str, Any]) -> None:
    for event in events:
        progress.on_event(Event(*event))


def ended(name: str, status: str, error: str = "") -> tuple[str, str, Any]:
    return name, "end", Outcome(name, status, error=error, seconds=125).to_dict()


HALF_WAY = (
    *(("one", "waiting", LENGTHS), ("two", "waiting", LENGTHS), ("three", "waiting", LENGTHS)),
    ("one", "begin", {"host": "here", "pid": 7}),
    ("one", "step", {"step": 0, "head_start_step": 1, "step_seconds": 1.0}),
    ("one", "step", {"step": 4, "step_seconds": 60.0}),
    ended("two", "failed", "No photos."),
)


def test_lines_say_what_changed_and_how_many_are_in_which_state() -> None:
    with ManyProgress(console(terminal=False), quiet=False) as progress:
        feed(progress, *HALF_WAY, ("one", "retry", Outcome("one", "died", error="It was killed.").to_dict()))
        feed(progress, ended("one", "done"))
    lines = text_of(progress).splitlines()
    assert lines[0] == "one: started on here, process 7"
    assert lines[1] == "one: head start 1/2, 1 s left"
    assert lines[2].startswith("one: training 4/8, ")
    assert lines[3] == "two: failed: No photos. (1 waiting, 1 failed, 1 training)"
    assert lines[4] == "one: It was killed. Trying again."
    assert lines[5] == "one: done in 2 min (1 done, 1 waiting, 1 failed)"


@pytest.mark.parametrize(("height", "rows"), [(30, ["one", "two", "three"]), (6, ["one", "two"])])
def test_a_table_shows_what_fits_and_first_what_runs(height: int, rows: list[str]) -> None:
    with ManyProgress(console(terminal=True, height=height), quiet=False) as progress:
        feed(progress, *HALF_WAY)
    progress.console.file = io.StringIO()
    progress.console.print(progress.table())
    shown = [line for line in text_of(progress).splitlines() if line.strip()]
    assert [line.split()[0] for line in shown[1:-1]] == rows
    assert shown[0].split() == ["subject", "state", "step", "left"]
    assert shown[1].split()[:3] == ["one", "training", "4/8"]
    assert "min" in shown[1] or " s" in shown[1]
    assert shown[2].split() == ["two", "failed", "No", "photos."]
    assert shown[-1] == "1 waiting, 1 failed, 1 training"


def test_quiet_shows_nothing() -> None:
    with ManyProgress(console(terminal=True), quiet=True) as progress:
        feed(progress, *HALF_WAY)
    assert text_of(progress) == ""


def test_durations_are_rounded_to_what_a_person_plans_with() -> None:
    assert [duration(seconds) for seconds in (3, 89, 125, 5400)] == ["3 s", "89 s", "2 min", "1.5 h"]
