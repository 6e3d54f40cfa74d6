"""The models inside the package, named `mini:student`, `mini:teacher`, `mini:identity`, `mini:clip` and `mini:vit`.

A 64-pixel toy world, trained by this project (`examples/mini_world`), in the formats of the real models: whatever runs
with them runs with SD-Turbo. No torch here.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from echodistill_cli.errors import ModelError

PREFIX = "mini:"


def is_embedded(source: str) -> bool:
    """Whether a model's source names one of the package's own."""
    return source.startswith(PREFIX)


def embedded_folder(source: str) -> Path:
    """The folder of an embedded model.

    Raises:
        ModelError: there is none of this name.
    """
    home = Path(str(files("echodistill_cli"))) / "embedded"
    folder = home / source.removeprefix(PREFIX)
    if not folder.is_dir():
        there = ", ".join(f"{PREFIX}{path.name}" for path in sorted(home.glob("*/")))
        raise ModelError(f"{source}: no model of this name is in the package.", f"There are {there or 'none'}.")
    return folder
