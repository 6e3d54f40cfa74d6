"""Writing files so that none is ever half there: a temporary name, then a rename; and errors in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from echodistill_cli.errors import EchoDistillError

_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, or choose another place with --output.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another place with --output.",
    errno.EACCES: "You may not write there: choose another place with --output.",
    errno.EPERM: "You may not write there: choose another place with --output.",
    errno.EROFS: "That disk is read-only: choose another place with --output.",
    errno.ENOENT: "Its folder does not exist: create it, or choose another place with --output.",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another place with --output.",
    errno.ENAMETOOLONG: "The name is too long: choose a shorter one with --output.",
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` about `path` into one line with a remedy.

    Raises:
        EchoDistillError: whenever the block raises an `OSError`.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        raise EchoDistillError(f"{path} could not be written ({error.strerror or error}).", remedy) from error


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write a file or folder to; rename it to `path` if the block succeeds.

    An existing file is replaced, and a folder by a folder. On any failure it stays as it was, and nothing else is left
    behind.

    Raises:
        EchoDistillError: the disk is full, the folder is missing or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            yield temporary
            _flush(temporary)
            _put_in_place(temporary, path)
    finally:
        _remove(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically; see `atomically` for its errors."""
    with atomically(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a whole UTF-8 text file atomically; see `atomically` for its errors."""
    write_bytes(path, content.encode())


def make_folder(path: Path) -> Path:
    """Make a folder and its parents; one that is there is fine.

    Raises:
        EchoDistillError: it cannot be made.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _put_in_place(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.is_dir()):
        temporary.replace(path)
        return
    # A folder cannot be renamed onto one with files in it: the old one steps aside, and comes back if that fails.
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    _remove(old)


def _flush(path: Path) -> None:
    """Have the operating system put a file, or the files of a folder, on the disk before it gets its final name."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # such as a name too long to be asked about
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
