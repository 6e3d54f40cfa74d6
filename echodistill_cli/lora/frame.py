"""Tell, without torch, what a file is that cannot be a safetensors file.

Format: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes, called the *body*.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import stat
from pathlib import Path

from echodistill_cli.errors import ModelError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_FOREIGN_FILES = (
    (b"PK\x03\x04", "is a zip archive or a PyTorch .ckpt under another name", "Convert it to safetensors first."),
    (b"\x80", "is a Python pickle, which can run code when opened", "Convert it to safetensors first."),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Fetch the file with `git lfs pull`."),
    (b"<", "is a web page, not a model", "Log in or use another address, then download it again."),
)


def body_start(content: bytes) -> int:
    """Return the offset of the body, from a file's first bytes."""
    return LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")


def check_frame(path: Path) -> None:
    """Check that a file can be a safetensors file.

    Args:
        path: of the file, which need not exist.

    Raises:
        ModelError: it cannot, and the message says what it is instead.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelError(f"{path} is a folder.", "Give the .safetensors file in it.")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe or a device could wait forever
            raise ModelError(f"{path} is not a regular file.", "Give a .safetensors file.")
        size = status.st_size
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from error
    if size == 0:
        raise ModelError(f"{path} is empty (0 bytes).", "Download or export it again.")
    body = body_start(start)
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and body <= size:
        return
    for signature, what, remedy in _FOREIGN_FILES:
        if start.lstrip().startswith(signature):
            raise ModelError(f"{path} {what}.", remedy)
    length = body - LENGTH_BYTES
    if size < LENGTH_BYTES or (length <= MAX_HEADER_BYTES and body > size):
        raise ModelError(f"{path} is truncated in its header ({size} bytes).", "Download or export it again.")
    raise ModelError(f"{path} is not a safetensors file: it claims a header of {length} bytes.")
