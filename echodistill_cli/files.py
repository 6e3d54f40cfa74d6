"""Write files atomically, recover after a kill, explain failed writes, and shorten shown paths.

While `NAME` is written it is called `.NAME.PID-HOST.tmp`. A folder that it replaces is called `.NAME.PID-HOST.old.tmp`
until the new one is in place. `recover` settles what a killed process left under these names. HOST tells hosts and
containers apart that share a disk: the process IDs of another one say nothing here.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from echodistill_cli.errors import ConfigError, EchoDistillError, failed_write


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Context that turns a failed write into an `EchoDistillError` with a remedy; others pass unchanged."""
    try:
        yield
    except EchoDistillError:
        raise
    except Exception as error:
        reason, remedy = failed_write(error)
        if reason is None:
            raise
        raise EchoDistillError(f"{path} could not be written ({reason}).", remedy) from error


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Context that yields a temporary path and renames it to `path` if the block succeeds.

    An existing file is replaced by a file, and an existing folder by a folder. After a failure `path` is unchanged and
    nothing else is left behind. What a killed process left of the same path is settled first.

    Raises:
        EchoDistillError: the disk is full, or the folder is missing or not writable.
    """
    temporary = _temporary(path)
    recover(path)
    try:
        with explained(path):
            yield temporary
            _finish(temporary)
            _put_in_place(temporary, path)
    finally:
        remove(temporary)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Context that yields an empty folder beside a path; `recover` deletes it after a kill."""
    recover(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            temporary.mkdir()
        yield temporary
    finally:
        remove(temporary)


def discard(folder: Path) -> None:
    """Delete a folder so that a kill never leaves a part of it under its name; raises as `atomically`."""
    with explained(folder):
        temporary = _temporary(folder)
        folder.replace(temporary)
        shutil.rmtree(temporary)


def recover(path: Path) -> None:
    """Restore an old version of a path that a killed process moved aside; delete what else it left."""
    for leftover, target, is_old in _leftovers(path.parent):
        if target.name == path.name:
            _settle(leftover, target, is_old=is_old)


def recover_below(folder: Path) -> None:
    """Settle what killed processes left anywhere in a folder. Links are neither followed nor deleted."""
    for parent, names, _ in os.walk(folder):
        for leftover, target, is_old in _leftovers(Path(parent)):
            _settle(leftover, target, is_old=is_old)
        names[:] = [name for name in names if not _LEFTOVER.fullmatch(name)]


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the entries of a metrics file, and how many other lines it has. Values are numbers or null."""
    entries, damaged = list[dict[str, Any]](), 0
    *lines, _cut_off = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for line in lines:
        try:
            entry = json.loads(line.decode())
            numbers = [value for value in entry.values() if value is not None]
            if type(entry["step"]) is not int or not all(abs(number) < 2**63 for number in numbers):
                raise ValueError
            entries.append(entry)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            damaged += 1
    return entries, damaged


_MOST_BYTES = 50_000_000  # of a text file; the largest are vocabularies and lists of a model's weights


def read_small(path: Path) -> bytes:
    """Return the content of a small file, or of a pipe that something writes to; else raise an `OSError`."""
    with open(path, "rb", opener=_opened) as file:
        content = file.read(_MOST_BYTES + 1)
        if not content and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EPIPE, "nothing writes to this pipe", str(path))
    if len(content) > _MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


def _opened(path: str, flags: int) -> int:
    """Open a file; do not wait for somebody to open the other end of a pipe. Reading waits for who did."""
    if not hasattr(os, "O_NONBLOCK"):  # Windows
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises as `atomically`."""
    with atomically(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically; escape names that are not UTF-8. Raises as `atomically`."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def check_folder(folder: Path) -> None:
    """Check that --output is a folder or can be made, by making one in it or above it.

    Raises:
        ConfigError: it is a file or a link that leads nowhere.
        EchoDistillError: nothing can be written there.
    """
    if not folder.is_dir() and os.path.lexists(folder):
        kind = "file" if folder.exists() else "link to nowhere"
        raise ConfigError(f"--output {folder} is a {kind}.", "Name a folder with --output.")
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(dir=existing, prefix=".echodistill-").cleanup()
    except OSError as error:
        raise EchoDistillError(f"{folder} cannot be written ({error.strerror}).", "Choose another --output.") from error


def make_folder(path: Path) -> Path:
    """Create a folder with its parents, unless it exists, and return it; raises as `atomically`."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Context in which a folder exists. After a failure, what was made for it is deleted."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _put_in_place(temporary: Path, path: Path) -> None:
    if not (temporary.is_dir() and path.is_dir()):
        temporary.replace(path)
        return
    # A folder cannot be renamed onto one that holds files: move the old one aside, and back again if that fails.
    old = _temporary(path, ".old")
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    # Only a whole folder may have a name from which `recover` restores it.
    with contextlib.suppress(FileNotFoundError):  # another host has settled it
        old.replace(temporary)
    remove(temporary)


_LEFTOVER = re.compile(r"\.(.+)\.(\d{1,10})(?:-([0-9a-f]{6}))?(\.old)?\.tmp")  # without HOST in older versions
IDLE = 3600  # seconds without a change, after which the process of another host is taken for dead


def _temporary(path: Path, suffix: str = "") -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{host_mark()}{suffix}.tmp")


@functools.cache
def host_mark() -> str:
    """Return six hexadecimal digits that stand for this host and, on Linux, for its container."""
    container = Path("/proc/self/ns/pid")
    text = f"{platform.node()} {container.readlink() if container.is_symlink() else ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _leftovers(folder: Path) -> list[tuple[Path, Path, bool]]:
    """Return what dead processes left in a folder: the path, its target, and whether it is an old version."""
    leftovers = []
    with contextlib.suppress(OSError):  # what writes there explains why it cannot be read
        for entry in os.scandir(folder):
            match = _LEFTOVER.fullmatch(entry.name)
            if match and not entry.is_symlink() and _is_abandoned(folder / entry.name, match):
                leftovers.append((folder / entry.name, folder / match[1], bool(match[4])))
    return leftovers


def _is_abandoned(path: Path, match: re.Match[str]) -> bool:
    """Return whether the process is gone that made a temporary file or folder of this name."""
    if match[3] in (None, host_mark()):
        import psutil

        # In containers, this process often has the ID of the one before.
        return int(match[2]) == os.getpid() or not psutil.pid_exists(int(match[2]))
    if match[4]:  # whoever settles an old version first, nothing is lost
        return True
    return time.time() - max(entry.lstat().st_mtime for entry in (path, *path.rglob("*"))) > IDLE


def _settle(leftover: Path, target: Path, *, is_old: bool) -> None:
    if is_old and not os.path.lexists(target):
        with contextlib.suppress(OSError):
            leftover.replace(target)
        return
    if is_old:  # while it is deleted, it must not have a name from which it would be restored
        with contextlib.suppress(OSError):
            leftover = leftover.replace(_temporary(target))
    remove(leftover)


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


def remove(path: Path) -> None:
    """Delete a file, folder or link if it exists; failures are ignored."""
    with contextlib.suppress(OSError):  # for example, the name is too long
        if path.is_dir() and not path.is_symlink():
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


def same_content(left: Path, right: Path) -> bool:
    """Return whether two files, or all files of two folders, are equal."""
    if not (left.is_dir() and right.is_dir()):
        return left.is_file() and right.is_file() and filecmp.cmp(left, right, shallow=False)
    names, others = ({path.relative_to(side) for path in side.rglob("*")} for side in (left, right))
    return names == others and all(same_content(left / name, right / name) for name in names)
