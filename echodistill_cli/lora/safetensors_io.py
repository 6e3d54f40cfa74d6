"""Read and write safetensors files: reproducible bytes, atomic writes and precise errors.

The format is that of `lora.frame`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from echodistill_cli.errors import EchoDistillError, ModelError
from echodistill_cli.files import atomically
from echodistill_cli.lora.frame import LENGTH_BYTES, body_start, check_frame

# Dtype ("F16") and shape of every tensor of a file, by key.
Table = dict[str, tuple[str, tuple[int, ...]]]
MAX_TENSORS = 100_000  # the largest published models have some thousands
_LONGEST_KEY = 1000


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file; they do not depend on the order of the mappings.

    Args:
        tensors: at least one, on any device and in any layout.
        metadata: the header's metadata.

    Raises:
        EchoDistillError: there are no tensors.
        EchoDistillError: a tensor holds NaN or infinity.
    """
    if not tensors:
        raise EchoDistillError("There are no tensors to write.")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise EchoDistillError(
                f"{name} holds NaN or infinity in {_dtype_name(tensor.dtype)}, so nothing was written.",
                "Train with a lower --lr. If only half precision overflowed, use echodistill export --dtype fp32.",
            )
    # Copies, because the library rejects views and tensors that share memory.
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    content: bytes = save(plain, dict(metadata))
    start = body_start(content)
    # The library writes the metadata in hash order, which differs between processes. Sorting it makes the bytes
    # reproducible. The offsets are relative to the body, so they stay valid.
    header = json.dumps(json.loads(content[LENGTH_BYTES:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + content[start:]


def body_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the body that `serialize` writes, in hex: kohya's and A1111's hash of a model."""
    content = serialize(tensors, {})
    return hashlib.sha256(memoryview(content)[body_start(content) :]).hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically, after reading it back and comparing it.

    An existing file is replaced. After a failure it is unchanged, and no temporary file remains.

    Args:
        path: where to write.
        tensors: as in `serialize`.
        metadata: the header's metadata.

    Raises:
        EchoDistillError: a tensor holds NaN or infinity.
        EchoDistillError: the disk is full, or the folder is missing or not writable.
        EchoDistillError: the file read back differs from what was written.
    """
    content = serialize(tensors, metadata)
    with atomically(path) as temporary:
        temporary.write_bytes(content)
        _compare(temporary, tensors, metadata)


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole model atomically, without holding the serialized file in memory.

    Args:
        path: where to write.
        tensors: no two of them may share memory.
        metadata: the header's metadata.

    Raises:
        EchoDistillError: a tensor holds NaN or infinity.
        EchoDistillError: the disk is full, or the folder is missing or not writable.
        EchoDistillError: the file read back differs from what was written.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise EchoDistillError(f"{name} holds NaN or infinity, so nothing was written.", "Use another --dtype.")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        save_file(plain, temporary, dict(metadata))
        _sort_header(temporary)
        _compare(temporary, plain, metadata)


def read_header(path: Path) -> tuple[dict[str, str], Table]:
    """Return the metadata and a table of dtype ("F16") and shape by key, without reading the tensors.

    Raises:
        ModelError: the file is missing, empty, truncated, damaged or not a safetensors file.
    """
    check_frame(path)
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            _check_keys(path, keys)
            slices = {key: file.get_slice(key) for key in keys}
            table = {key: (str(part.get_dtype()), tuple(part.get_shape())) for key, part in slices.items()}
            return dict(file.metadata() or {}), table
    except SafetensorError as error:
        raise _damaged(path, error) from error


def read_tensors(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield keys and tensors one at a time, on the CPU, in their stored dtype.

    Raises:
        ModelError: a tensor holds NaN or infinity.
        ModelError: a key is missing, or the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for key in keys:
                yield key, _finite_tensor(file, path, key)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _finite_tensor(file: Any, path: Path, key: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(key)
        finite = is_finite(tensor)
    except (NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path}: the dtype of {key} is not supported.", "Convert it to fp16.") from error
    if not finite:
        raise ModelError(f"{path}: {key} holds NaN or infinity; the training diverged.")
    return tensor


def _check_keys(path: Path, keys: Sequence[str]) -> None:
    """Raise a ModelError if the number of keys or one of them cannot be a model's."""
    if len(keys) > MAX_TENSORS:
        raise ModelError(f"{path} claims {len(keys)} tensors, more than any model has.")
    for key in keys:
        if len(key) > _LONGEST_KEY or not key.isprintable():
            raise ModelError(f"{path} has a tensor whose name is too long or holds control characters.")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor infinity."""
    # The cast is for 8-bit floats, which have no isfinite.
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _sort_header(path: Path) -> None:
    """Make the bytes reproducible, as `serialize` does, but in place: the body may have gigabytes."""
    with path.open("rb+") as file:
        length = body_start(file.read(LENGTH_BYTES)) - LENGTH_BYTES
        header = json.dumps(json.loads(file.read(length)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content = header.encode()
        if len(content) <= length:
            file.seek(LENGTH_BYTES)
            file.write(content.ljust(length))


def _compare(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    written_metadata, table = read_header(path)
    same = written_metadata == dict(metadata) and table.keys() == tensors.keys()
    same = same and all(_same_bits(tensors[key], tensor) for key, tensor in read_tensors(path, table))
    if not same:
        raise EchoDistillError(f"{path.parent}: a file read back differs from what was written.", "Check the disk.")


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*bits)


def _damaged(path: Path, error: SafetensorError) -> ModelError:
    return ModelError(f"{path} is truncated or damaged ({error}).", "Download or export it again.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
