"""The `live` command before it serves: what it refuses, and how soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import command, files_below

ROOT = Path(__file__).parents[2]
# gradio looks as if it were not installed.
WITHOUT_GRADIO = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "gradio" else found(name, *rest)
from echodistill_cli.cli import main
try:
    main(["live", "--model", "mini"])
except SystemExit as ended:
    print(ended.code, {"torch", "gradio"} & set(sys.modules))
"""


def test_without_gradio_it_names_the_command_that_installs_it_and_imports_no_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GRADIO],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "2 set()\n"
    assert done.stderr == "error: echodistill live needs gradio. Install it in a checkout: pip install '.[live]'\n"
    assert files_below(tmp_path) == set()


@pytest.fixture(autouse=True)
def _gradio_seems_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.live.server.check_extra", lambda: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets others on the network use this page. Set a password: --auth"),
        (["--auth", "me"], "--auth needs a name and a password. Write --auth USER:PASSWORD"),
        (["--auth", ":x"], "--auth needs a name and a password."),
        (["--host", "203.0.113.5", "--auth", "a:b"], "--host 203.0.113.5 --port 7860 cannot be used"),
        (["--port", "0", "--output", "new", "nowhere"], "nowhere: no such run folder or LoRA file."),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("live", *words)
    assert done.code == 2
    assert done.err.startswith(f"error: {message}")
    assert len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
