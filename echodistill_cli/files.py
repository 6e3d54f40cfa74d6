"""Write files atomically, explain failed writes in one line, and show paths without their folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from echodistill_cli.errors import EchoDistillError

_CUT_SHORT = "The disk is probably full: free some space, or choose another place with --output."
_REMEDIES = {
    errno.ENOSPC: "The disk is full: free some space, or choose another place with --output.",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another place with --output.",
    errno.EFBIG: "A file may not be that large there (see ulimit -f): choose another place with --output.",
    errno.EACCES: "You may not write there: choose another place with --output.",
    errno.EPERM: "You may not write there: choose another place with --output.",
    errno.EROFS: "That disk is read-only: choose another place with --output.",
    errno.ENOENT: "Its folder does not exist: create it, or choose another place with --output.",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another place with --output.",
    errno.ENAMETOOLONG: "The name is too long: choose a shorter one with --output.",
}
# Libraries report a failed write with errors of their own, where Python raises an OSError with a number. They are
# recognized by their words, because none of them is imported here. Libraries in Rust (safetensors, tokenizers) put the
# number into the text, before safetensors 0.6 in the second form; torch and numpy only say that a part is missing.
_NUMBERED = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
_PARTLY_WRITTEN = re.compile(
    r"unexpected pos \d+ vs|iostream error|PytorchStreamWriter failed .*: file |requested and \d+ written"
)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Context that turns a failed write into one line with a remedy; other errors pass unchanged.

    Raises:
        EchoDistillError: the block raised an `OSError`, or what a library raises in its place.
    """
    try:
        yield
    except EchoDistillError:
        raise
    except Exception as error:
        reason, remedy = _failed_write(error)
        if reason is None:
            raise
        raise EchoDistillError(f"{path} could not be written ({reason}).", remedy) from error


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Context that yields a temporary path and renames it to `path` if the block succeeds.

    An existing file is replaced by a file, and an existing folder by a folder. After a failure `path` is unchanged and
    nothing else is left behind.

    Raises:
        EchoDistillError: the disk is full, or the folder is missing or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explained(path):
            yield temporary
            _finish(temporary)
            _put_in_place(temporary, path)
    finally:
        _remove(temporary)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises the errors of `atomically`."""
    with atomically(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically; raises the errors of `atomically`."""
    write_bytes(path, content.encode())


def make_folder(path: Path) -> Path:
    """Create a folder with its parents, unless it exists, and return it.

    Raises:
        EchoDistillError: it cannot be created.
    """
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failed_write(error: Exception) -> tuple[str | None, str | None]:
    """Return the reason of a failed write and its remedy; no reason for any other error."""
    text = str(error)
    if numbered := _NUMBERED.search(text):
        # Windows has numbers of its own. OSError translates them to errno only if they are its fourth argument.
        number = int(numbered[1] or numbered[2])
        error = OSError(number, "", None, number)
    if isinstance(error, OSError) and error.errno:
        return error.strerror or os.strerror(error.errno), _REMEDIES.get(error.errno)
    if _PARTLY_WRITTEN.search(text):
        return "only a part of it was written", _CUT_SHORT
    return (text, None) if isinstance(error, OSError) else (None, None)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.is_dir()):
        temporary.replace(path)
        return
    # A folder cannot be renamed onto one that holds files: move the old one aside, and back again if that fails.
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    _remove(old)


def _finish(path: Path) -> None:
    """Flush a file, or the files of a folder, to the disk and give them the usual permissions.

    safetensors 0.8 writes files that only their owner may read.
    """
    os.umask(mask := os.umask(0))  # there is no way to read it without setting it
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
            with contextlib.suppress(PermissionError):  # the file system has no permissions
                file.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # for example, the name is too long
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_SEPARATOR = re.compile(r"[/\\]")
_RELATIVE = re.compile(r"\.\.?[/\\]")


def expanded(path: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded. An unknown user stays as it is, where pathlib raises."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def public_name(value: str) -> str:
    """Return the last part of a path, to hide folders; other text, such as a hub id, is unchanged."""
    return last_part(value) if is_path(value) else value


def last_part(path: str) -> str:
    """Return the text after the last separator of a POSIX or Windows path."""
    return _SEPARATOR.split(path.rstrip("/\\"))[-1]


def is_path(value: str) -> bool:
    """Return whether a text is a path: by its form, as on another machine, or because it exists."""
    if not _SEPARATOR.search(value):
        return False
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    if absolute or value.startswith(("~", "\\")) or _RELATIVE.match(value):
        return True
    try:
        return Path(value).exists()
    except OSError:  # for example, a prompt longer than any file name
        return False
