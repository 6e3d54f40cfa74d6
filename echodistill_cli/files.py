"""Writing files so that none is ever half there: a temporary name, then a rename; and errors in one line."""

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
# How libraries tell of a failed write where Python would raise an OSError with a number; by their words, since none of
# them is imported here. Those written in Rust (safetensors, tokenizers) name the number in the text alone, those before
# safetensors 0.6 as the second does; torch and numpy tell no more than that a part is missing.
_NUMBERED = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")
_PARTLY_WRITTEN = re.compile(
    r"unexpected pos \d+ vs|iostream error|PytorchStreamWriter failed .*: file |requested and \d+ written"
)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an `OSError` about `path`, and what libraries raise instead of one, into one line with a remedy.

    Raises:
        EchoDistillError: whenever the block raises an `OSError`, or a library could not write. Any other error of the
            block passes unchanged.
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
            _finish(temporary)
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failed_write(error: Exception) -> tuple[str | None, str | None]:
    """Why a file could not be written, and what to do about it; no reason if the error is about something else."""
    text = str(error)
    if numbered := _NUMBERED.search(text):
        # On Windows the number is its own, and only as the fourth argument is it turned into one of errno's.
        number = int(numbered[1] or numbered[2])
        error = OSError(number, "", None, number)
    if isinstance(error, OSError) and error.errno:
        return error.strerror or os.strerror(error.errno), _REMEDIES.get(error.errno)
    if _PARTLY_WRITTEN.search(text):
        return "not all of it was taken", _CUT_SHORT
    return (text, None) if isinstance(error, OSError) else (None, None)


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


def _finish(path: Path) -> None:
    """Have the operating system put a file, or the files of a folder, on the disk before it gets its final name.

    All get the usual permissions: safetensors 0.8 writes files that none but their owner may read.
    """
    os.umask(mask := os.umask(0))  # only by setting it can it be read
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
            with contextlib.suppress(PermissionError):  # a file system that keeps none
                file.chmod(0o666 & ~mask)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # such as a name too long to be asked about
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
