"""Frozen weights that wait in the machine's memory while nothing computes with them.

A GPU's memory is scarce. In a step of training the image encoders have one moment each, and none in replays and in the
teacher's steps. Their weights come by one copy, which the host does not wait for, and leave by freeing their memory:
frozen weights need not be copied back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

_ALIGNMENT = 512  # bytes, as CUDA's allocator has it; kernels read aligned weights faster


class Waiting:
    """The frozen weights of a module, which are on its device only while they are needed.

    All of them become views of one block of memory, which is freed and filled again. Tensors stay the same objects.

    Args:
        module: with frozen weights on one device, which no one moves from now on. To read them while they wait would
            read freed memory, so whatever computes with them calls `come` first.

    Attributes:
        is_here: whether the weights are on the device.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = list(_tensors(module))
        offsets, size = dict[int, int](), 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in offsets:
                offsets[storage._cdata] = size
                size += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        device = tensors[0].device
        self._block = torch.empty(size, dtype=torch.uint8, device=device)
        for tensor in tensors:
            _move(tensor, self._block, offsets[tensor.untyped_storage()._cdata])
        # Only from pinned memory is a copy asynchronous. The meta device has no values to keep.
        self._kept = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        if device.type != "meta":
            self._kept.copy_(self._block)
        self.is_here = True
        self.leave()

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return len(self._kept)

    def come(self) -> None:
        """Bring the weights to the device, unless they are there."""
        if not self.is_here:
            self._block.untyped_storage().resize_(self.size)
            self._block.copy_(self._kept, non_blocking=True)
            self.is_here = True

    def leave(self) -> None:
        """Free the weights' memory on the device; no graph that needs them may be alive."""
        self._block.untyped_storage().resize_(0)
        self.is_here = False


class Waits(Protocol):
    """A module that calls `come` before it computes, if it has `waiting`."""

    waiting: Waiting | None


@contextmanager
def present(module: Waits) -> Iterator[None]:
    """Context in which a module's weights are on its device; afterwards they wait again, if they should."""
    if module.waiting:
        module.waiting.come()
    try:
        yield
    finally:
        if module.waiting:
            module.waiting.leave()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the weights and buffers, each once, and the joined tensors that some of them are views of."""
    yield from (*module.parameters(), *module.buffers())
    groups = {id(shared): shared for each in module.modules() if (shared := getattr(each, "shared", None))}
    for shared in groups.values():
        yield from (tensor for tensor in (shared.weight, shared.bias) if tensor is not None)


def _move(tensor: Tensor, block: Tensor, offset: int) -> None:
    """Make a tensor a view of a block, with the bytes of its storage from an offset on."""
    start = offset // tensor.element_size() + tensor.storage_offset()
    place = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    place.set_(block.untyped_storage(), start, tensor.shape, tensor.stride())
    place.copy_(tensor.data)
    tensor.data = place
