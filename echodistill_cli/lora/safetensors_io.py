"""safetensors files as such: the same bytes for the same content, written whole or not at all, read with a reason.

Format: 8 bytes little-endian length, that many bytes of JSON header, then the tensors' bytes, the *body*.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from echodistill_cli.errors import EchoDistillError, ModelError
from echodistill_cli.files import atomically

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no more
_FOREIGN_FILES = (
    (b"PK\x03\x04", "is a zip archive or a PyTorch .ckpt under another name", "Convert it to safetensors first."),
    (b"\x80", "is a Python pickle, which can run code when opened", "Convert it to safetensors first."),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Fetch the file with `git lfs pull`."),
    (b"<", "is a web page, not a model", "The download needs a login or another address."),
)


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; equal content gives equal bytes, whatever the order of the mappings.

    Args:
        tensors: at least one, any device and layout; NaN and infinity are refused.
        metadata: the header's texts.

    Raises:
        EchoDistillError: no tensors, or a tensor that is not finite, by name.
    """
    if not tensors:
        raise EchoDistillError("There are no tensors to write.")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise EchoDistillError(
                f"{name} holds NaN or infinity in {_short(tensor.dtype)}, so nothing was written.",
                "Train with a lower --lr. If only half precision overflowed: echodistill export --dtype fp32",
            )
    # Copies, because the library refuses views and tensors that share their memory.
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content: bytes = save(plain, dict(metadata))
    start = _body_start(content)
    # The library writes the metadata in the order of a hash table, another one in each process. Sorted, the bytes
    # are reproducible; the body, to which the offsets are relative, stays as it is.
    header = json.dumps(json.loads(content[LENGTH_BYTES:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + content[start:]


def body_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of the body that `serialize` writes: kohya's and A1111's hash of a model, free of its header."""
    content = serialize(tensors, {})
    return hashlib.sha256(memoryview(content)[_body_start(content) :]).hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file under a temporary name beside `path`, read it back, compare, and only then rename it to `path`.

    An existing file is replaced. On any failure it stays as it was, and nothing else is left behind.

    Raises:
        EchoDistillError: a tensor is not finite, the disk is full, the folder is missing or not writable, or what was
            read back differs from what was written.
    """
    content = serialize(tensors, metadata)
    with atomically(path) as temporary:
        temporary.write_bytes(content)
        _compare(temporary, tensors, metadata)


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_safetensors` for whole models: one tensor at a time instead of the file in memory.

    Args:
        tensors: no two of them may share memory.

    Raises:
        EchoDistillError: as `write_safetensors`.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise EchoDistillError(f"{name} holds NaN or infinity, so nothing was written.", "Use another --dtype.")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        save_file(plain, temporary, dict(metadata))
        _sort_header(temporary)
        _compare(temporary, plain, metadata)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """Metadata, and the dtype ("F16") and shape of every tensor by key, without reading the tensors.

    Raises:
        ModelError: the file is missing, empty, cut off, damaged or no safetensors file, saying which.
    """
    _check_frame(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            table = {key: (str(part.get_dtype()), tuple(part.get_shape())) for key, part in slices.items()}
            return dict(file.metadata() or {}), table
    except SafetensorError as error:
        raise _damaged(path, error) from error


def read_tensors(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, one at a time, on the CPU, as they are stored.

    Raises:
        ModelError: a tensor holds NaN or infinity, or the file was damaged meanwhile.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for key in keys:
                tensor: Tensor = file.get_tensor(key)
                if not is_finite(tensor):
                    raise ModelError(f"{path}: {key} holds NaN or infinity; the training that made it had diverged.")
                yield key, tensor
    except SafetensorError as error:
        raise _damaged(path, error) from error


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype is free of NaN and infinity."""
    # The cast serves the 8-bit floats, which know no isfinite.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _sort_header(path: Path) -> None:
    """Make the bytes reproducible, as `serialize` does; in place, since the body may have gigabytes."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.dumps(json.loads(file.read(length)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content = header.encode()
        if len(content) <= length:
            file.seek(LENGTH_BYTES)
            file.write(content.ljust(length))


def _compare(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    found, table = read_header(path)
    same = found == dict(metadata) and table.keys() == tensors.keys()
    same = same and all(_same_bits(tensors[key], tensor) for key, tensor in read_tensors(path, table))
    if not same:
        raise EchoDistillError(f"{path.parent}: a file read back differs from what was written.", "Check the disk.")


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*bits)


def _check_frame(path: Path) -> None:
    """Refuse what cannot be a safetensors file, in words that say what it is instead."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except IsADirectoryError as error:
        raise ModelError(f"{path} is a folder.", "Name the .safetensors file in it.") from error
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from error
    if size == 0:
        raise ModelError(f"{path} is empty (0 bytes).", "Download or export it again.")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and LENGTH_BYTES + length <= size:
        return
    for signature, what, remedy in _FOREIGN_FILES:
        if start.lstrip().startswith(signature):
            raise ModelError(f"{path} {what}.", remedy)
    if size < LENGTH_BYTES or (length <= MAX_HEADER_BYTES and LENGTH_BYTES + length > size):
        raise ModelError(f"{path} is cut off inside its header ({size} bytes).", "Download or export it again.")
    raise ModelError(f"{path} is not a safetensors file: it claims a header of {length} bytes.")


def _damaged(path: Path, error: SafetensorError) -> ModelError:
    return ModelError(f"{path} is cut off or damaged ({error}).", "Download or export it again.")


def _body_start(content: bytes) -> int:
    return LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
