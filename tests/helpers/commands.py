"""Run commands in this process as in a shell: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from echodistill_cli.cli.app import app, main
from echodistill_cli.config.build import config_to_toml
from echodistill_cli.config.schema import Config
from tests.helpers.runs import small_config


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return self.err.splitlines()[-1] if self.err else ""


def command(*arguments: object) -> Done:
    """Run `echodistill` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with unchanged_environment(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            return Done(int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main always exits")


@contextlib.contextmanager
def unchanged_environment() -> Iterator[None]:
    """Context that restores the environment, and in which output is 200 columns wide."""
    before = dict(os.environ)
    os.environ["COLUMNS"] = "200"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def write_config(folder: Path, config: Config) -> Path:
    """Write a configuration as a TOML file."""
    file = folder / "run.toml"
    file.write_text(config_to_toml(config), encoding="utf-8")
    return file


def small_toml(folder: Path, pair: tuple[Path, Path], backbones: dict[str, Path], **changes: Any) -> Path:
    """Write the settings of `tests.helpers.runs`, with four steps and an echo at the third, as TOML."""
    settings = {"train__steps": 4, "echo__start": 3, "run__save_every": 2, "run__sample_every": 2}
    return write_config(folder, small_config(pair, backbones, **{**settings, **changes}))


def files_below(folder: Path) -> set[str]:
    """Return the relative paths of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def trained_run(
    folder: Path, pair: tuple[Path, Path], backbones: dict[str, Path], photos: Path, **changes: Any
) -> Path:
    """Train for two steps and return the run folder, below `folder`/runs; `changes` as in `small_toml`."""
    file = small_toml(folder, pair, backbones, train__steps=2, echo__start="off", **changes)
    output = folder / "runs" / "first"
    assert command("train", photos, "--config", file, "-o", output, "--lr", "1e-2", "-q").code == 0
    return output


def missing_flags(hint: str, *commands: str) -> set[str]:
    """Return the flags of a hint that do not exist in the command named before them, or else in any of `commands`."""
    app_commands: Any = typer.main.get_command(app)
    missing: set[str] = set()
    for part in re.split(r"\. |(?=echodistill [a-z])|(?=hf download)", hint):
        named = re.match(r"echodistill ([a-z]+)", part)
        for name in [named[1]] if named else commands if not part.startswith("hf ") else ():
            options = {flag for one in app_commands.commands[name].params for flag in (*one.opts, *one.secondary_opts)}
            missing |= set(re.findall(r"--[a-z][a-z-]*", part)) - options
    return missing


def without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no hub in reach, and nobody wait for it, whatever is set here about being offline."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # between the hub client's attempts
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def overriding(line: Sequence[object], *more: object) -> list[object]:
    """Return a command line and further options, without those of `line` that are given again."""
    names, words = {word for word in more if str(word).startswith("-")}, list(line)
    for name in names & set(words):
        start = words.index(name)
        has_value = len(words) > start + 1 and not str(words[start + 1]).startswith("-")
        del words[start : start + 1 + has_value]
    return [*words, *more]
