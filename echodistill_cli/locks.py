"""A lock is a file: held by one process of any host, and free as soon as that process is dead."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from echodistill_cli.errors import EchoDistillError
from echodistill_cli.files import IDLE, read_small, remove


@contextlib.contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Context that holds a lock file, which is deleted in the end; the lock of a dead process is free.

    Where files cannot be locked, as on Windows, the file itself is the lock; where it cannot be made, nothing is held.

    Args:
        file: holds the ID of this process and the name of its host meanwhile.
        what: is done under the lock, such as "runs/dog is being trained".

    Raises:
        EchoDistillError: another process holds the lock.
    """
    descriptor, holder = _lock(file)
    if holder is not None:
        raise EchoDistillError(f"{what} by {holder}.", "Wait until it ends, or stop it.")
    try:
        yield
    finally:
        if descriptor is not None:
            if _is_same(descriptor, file):
                remove(file)
            os.close(descriptor)


_SETTLING = 0.2  # seconds between the creation of a lock's file and a look at who won


def _lock(file: Path) -> tuple[int | None, str | None]:
    """Return the descriptor of the lock if it was taken, or words for the process that holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _claim(file)
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:
            return None, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 300).decode("utf-8", "replace")
            os.close(descriptor)
            return (None, _holder(holder)) if isinstance(error, BlockingIOError) else _claim(file)
        if _is_same(descriptor, file):
            _sign(descriptor)
            return descriptor, None
        os.close(descriptor)  # deleted by its last holder, between opening and locking


def _claim(file: Path) -> tuple[int | None, str | None]:
    """Take a lock by creating its file, where files cannot be locked; results are those of `_lock`."""
    import psutil

    for _ in range(5):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            time.sleep(_SETTLING)  # whoever has just created it signs it
            text = read_small(file).decode("utf-8", "replace") if file.is_file() else ""
            process, host = lock_holder(text)
            if host not in ("", platform.node()):
                is_dead = time.time() - max(entry.lstat().st_mtime for entry in file.parent.iterdir()) > IDLE
            else:
                is_dead = not process.isdecimal() or int(process) == os.getpid() or not psutil.pid_exists(int(process))
            if not is_dead:
                return None, f"{_holder(text)} (if it is gone, delete {file})"
            remove(file)
        except OSError:
            return None, None
        else:
            _sign(descriptor)
            time.sleep(_SETTLING)  # another process may have taken it for that of a dead one before
            if _is_same(descriptor, file):
                return descriptor, None
            os.close(descriptor)
    return None, "another process"


def _sign(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # without room for the ID the lock still holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {platform.node()}".encode())


def lock_holder(text: str) -> tuple[str, str]:
    """Return the process ID and the host that a lock file's content names; the host is "" in older files."""
    process, _, host = text.strip().partition(" ")
    return process, host


def _holder(text: str) -> str:
    """Return words for the process that a lock file names."""
    process, host = lock_holder(text)
    if not process.isdecimal():
        return "another process"
    return f"process {process} on {host}" if host else f"process {process}"


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except OSError:  # the file was moved or deleted
        return False
