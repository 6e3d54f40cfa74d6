"""Paths as people write them, and what may be said of them in files that others get to see: the last part."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

_SEPARATOR = re.compile(r"[/\\]")
_RELATIVE = re.compile(r"\.\.?[/\\]")


def expanded(path: str | Path) -> Path:
    """A path with `~` and `~user` replaced as a shell does it: those of an unknown user stay, where pathlib raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def public_name(value: str) -> str:
    """A path as its last part; any other text, such as a hub id, as it is."""
    return last_part(value) if is_path(value) else value


def last_part(path: str) -> str:
    """What stands behind the last separator of a path of any system."""
    return _SEPARATOR.split(path.rstrip("/\\"))[-1]


def is_path(value: str) -> bool:
    """Whether a text is a path: by its form, as it may be gone by now or of another machine, or as it is here."""
    if not _SEPARATOR.search(value):
        return False
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    if absolute or value.startswith(("~", "\\")) or _RELATIVE.match(value):
        return True
    try:
        return Path(value).exists()
    except OSError:  # such as a prompt that is longer than any name
        return False
