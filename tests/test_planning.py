"""What the doctor says of this machine."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from echodistill_cli import planning
from echodistill_cli.config.build import PRESETS


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_preset_is_said_to_fit_with_a_plan_or_not() -> None:
    found = planning.diagnose()
    assert len(found.advice) == len(PRESETS)
    for name, line in zip(PRESETS, found.advice, strict=True):
        assert line.startswith(name)
        wanted = ("model.precision = ", "does not fit on this machine's")
        assert any(words in line for words in (wanted if PRESETS[name].family else ("echodistill train",)))
    assert json.loads(json.dumps(found.to_dict()))["advice"]


def test_a_machine_with_little_memory_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.planning.memory_gib", lambda _device: 4.0)
    *published, mini = planning.diagnose().advice
    assert mini.startswith("mini: runs on any machine")
    assert "--model mini" in mini
    for line in published:
        assert "does not fit on this machine's" in line
        assert "fits into 4.0 GiB: the smallest needs about" in line


def test_a_machine_with_much_memory_may_run_the_whole_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.planning.memory_gib", lambda _device: 80.0)
    for line in planning.diagnose().advice[:-1]:
        assert "model.decoder = full, train.batch_size = 2" in line
