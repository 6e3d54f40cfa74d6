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
