"""Frozen layers that read the same input, computed as one: their weights become views of one tensor.

A step of small batches does not wait for arithmetic but for operations to be dispatched, so one product is faster than
three. Modules keep their names and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What attentions of transformers' encoders call the layers that read their input.
_INPUTS = ("q_proj", "k_proj", "v_proj")


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return frozen weights as one tensor, of which they become views; no memory is added.

    Args:
        tensors: [n, ...] each, equal but for n.
    """
    sizes = [len(tensor) for tensor in tensors]
    whole = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, whole.split(sizes), strict=True):  # type: ignore[no-untyped-call]
        tensor.data = part
    return whole


class _Shared:
    """The product of several layers with their input, which the first layer to run computes for all.

    Args:
        layers: linear ones that read the same tensor.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self.weight = joined([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else joined([layer.bias for layer in layers])
        self.source: Tensor | None = None
        self.waiting: dict[nn.Module, Tensor] = {}

    def output(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return one layer's output, [B, N, out]."""
        if self.source is not x or layer not in self.waiting:
            every = F.linear(x, self.weight, self.bias).chunk(len(self.layers), dim=-1)
            self.source, self.waiting = x, dict(zip(self.layers, every, strict=True))
        output = self.waiting.pop(layer)
        if not self.waiting:
            self.source = None
        return output


class _SharedLinear(nn.Linear):
    """A linear layer that takes its output from the product of several."""

    shared: _Shared

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, N, out] of [B, N, in]."""
        return self.shared.output(self, x)


def share_inputs(module: nn.Module) -> None:
    """Compute queries, keys and values of every attention of an encoder as one.

    Attentions with a LoRA stay as they are.

    Args:
        module: with frozen weights, which stay on their device.
    """
    for attention in module.modules():
        layers: list[Any] = [getattr(attention, name, None) for name in _INPUTS]
        if all(type(layer) is nn.Linear and not layer.weight.requires_grad for layer in layers) and _alike(layers):
            shared = _Shared(layers)
            for layer in layers:
                layer.__class__, layer.shared = _SharedLinear, shared


def separate_inputs(module: nn.Module) -> None:
    """Undo `share_inputs`; inside a compiled block it would gain nothing."""
    for layer in [layer for layer in module.modules() if type(layer) is _SharedLinear]:
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        del layer.shared


def _alike(layers: Sequence[nn.Linear]) -> bool:
    return len({(layer.weight.shape, layer.bias is None) for layer in layers}) == 1
