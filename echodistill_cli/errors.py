"""Errors a person can act on. Each says what is wrong, where, and what to do next.

    EchoDistillError            exit 1   anything that stops a command
    ├── ConfigError             exit 2   a flag, a config key or a value is wrong
    ├── PhotoError              exit 3   the photos cannot be trained on
    ├── ModelError              exit 4   a model or a part of one is missing or does not fit
    ├── DeviceMemoryError       exit 5   the device has too little memory
    └── Interrupted             exit 130 or 143, after saving

`typer` itself exits with 2 on a malformed command line, which is why `ConfigError` does too.
"""

from __future__ import annotations

import errno
import os
import re
from typing import ClassVar


class EchoDistillError(Exception):
    """Stops a command with one line: the message, then the hint if there is one.

    Args:
        message: what is wrong, and which file, flag or setting it is.
        hint: what to do next, with a command or a flag if possible.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message} {hint}")
        self.message = message
        self.hint = hint


class ConfigError(EchoDistillError):
    """A flag, a config key or a value is wrong. Nothing has been written."""

    exit_code = 2


class PhotoError(EchoDistillError):
    """The photos cannot be trained on."""

    exit_code = 3


class ModelError(EchoDistillError):
    """A model, or a part of one, is missing, unreachable or of the wrong family."""

    exit_code = 4


class DeviceMemoryError(EchoDistillError):
    """The device ran out of memory. The hint names the next setting to try."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python or torch means that memory ran out. Does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(words in text for words in _MEMORY_WORDS)


# What reports exhausted memory with errors of other types and numbers.
_MEMORY_WORDS = (
    "out of memory",  # MPS
    "can't allocate memory",  # torch's allocator of the CPU
    "cannot allocate memory",  # the system, also while a library is imported
    "failed to map segment",  # the loader of shared libraries
    "could not create a primitive",  # oneDNN
    "could not create a memory object",
    "bad_alloc",  # C++
)


class Interrupted(EchoDistillError):
    """A signal stopped the run after its state was saved.

    Args:
        message: what was saved and how to continue.
        signal_number: 2 (SIGINT) or 15 (SIGTERM); the exit code is 128 plus this number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


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


def failed_write(error: Exception) -> tuple[str | None, str | None]:
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


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as "1 image" or "2 images".

    Args:
        number: how many.
        noun: for one.
        plural: for any other number; None for the noun with an s.
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
