"""Frozen layers that read the same input, computed as one, and factors that their weights can hold.

A step of small batches does not wait for arithmetic but for operations to be dispatched, so one product is faster than
three. Joined weights become views of one tensor; modules keep their names and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from echodistill_cli.models.adapters import ADAPTER

# What attentions of transformers' encoders call the layers that read their input.
_INPUTS = ("q_proj", "k_proj", "v_proj")
_QUICK_GELU = 1.702


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


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + (x Aᵀ) Bᵀ for frozen W and b, in three operations less than autograd needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        """Arguments are [N, in], W [out, in], b [out], A [r, in] and B [out, r], of one precision."""
        low = x @ down.t()
        ctx.save_for_backward(x, low, weight, down, up)
        return F.linear(x, weight, bias).addmm_(low, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        """Return the gradients of x, A and B."""
        x, low, weight, down, up = ctx.saved_tensors
        of_low = gradient @ up
        of_x = (gradient @ weight).addmm_(of_low, down) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.t() @ x, gradient.t() @ low


class Stack(torch.autograd.Function):
    """`torch.stack` in another precision.

    Gradients are contiguous, so that autograd need not copy each of them.
    """

    @staticmethod
    def forward(_ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        """Return float32 tensors as one."""
        return torch.stack(tensors).to(dtype)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return a view of one float32 tensor for each."""
        whole = gradient.to(torch.float32, memory_format=torch.contiguous_format)
        return (None, *whole.unbind())


class GatedGelu(torch.autograd.Function):
    """x GELU(gate) of a feed-forward layer; it keeps a third less for its gradient than autograd."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """Return [B, N, D] of x and gate [B, N, 2 D]."""
        ctx.save_for_backward(both)
        x, gate = both.chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradients of x and gate as one tensor."""
        (both,) = ctx.saved_tensors
        (x, gate), slopes = both.chunk(2, dim=-1), torch.empty_like(both)
        of_x, of_gate = slopes.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=of_x)
        torch.ops.aten.gelu_backward.grad_input(gradient * x, gate, grad_input=of_gate)
        return slopes


class Projections:
    """Linear layers that read the same input, as one layer; or a single layer.

    Args:
        layers: of equal shape, with or without LoRA.

    Attributes:
        is_adapted: whether the layers have the LoRA.
        folded: the weight with the LoRA added; None outside of the context `folding`.
        weight: of the current pass, [out, in].
        lora: A [r, in] and B [out, r] of the current pass; None if the LoRA is off or folded.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.is_adapted = all(ADAPTER in getattr(layer, "lora_A", ()) for layer in layers)
        bases = [getattr(layer, "base_layer", layer) for layer in layers]
        self.frozen = joined([base.weight for base in bases])
        self.bias = None if bases[0].bias is None else joined([base.bias for base in bases])
        self.folded: Tensor | None = None
        self.weight = self.frozen
        self.lora: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [B, N, out] of [B, N, in]."""
        if self.lora is None:
            return F.linear(x, self.weight, self.bias)
        down, up = self.lora
        if down.dtype != x.dtype:
            low = F.linear(x.to(down.dtype), down)
            return (F.linear(x, self.weight, self.bias) + F.linear(low, up)).to(x.dtype)
        flat: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2), self.weight, self.bias, down, up
        )
        return flat.view(*x.shape[:-1], -1)


class TextProjections:
    """The keys and values of all cross-attentions: the layers that read the text features.

    Args:
        layers: sorted by width.

    Attributes:
        outputs: of the current pass, [B, L, width] by layer.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.all = Projections(layers)
        self.widths: dict[int, list[Any]] = {}
        for layer in layers:
            self.widths.setdefault(layer.out_features, []).append(layer)
        self.outputs: dict[Any, Tensor] = {}

    def compute(self, text: Tensor, lora: tuple[Tensor, Sequence[Tensor]] | None) -> None:
        """Compute all layers' outputs.

        Args:
            text: [B, L, in].
            lora: A of all layers, [layers · r, in], and B [layers, width, r] per width; None if off or folded.
        """
        outputs = F.linear(text, self.all.weight).flatten(0, 1)
        parts = outputs.split([width * len(layers) for width, layers in self.widths.items()], dim=1)  # type: ignore[no-untyped-call]
        products = [None] * len(parts) if lora is None else self._products(text, *lora)
        for layers, part, product in zip(self.widths.values(), parts, products, strict=True):
            each = part.unflatten(1, (len(layers), -1)).transpose(0, 1)
            if product is not None:
                low, up = product
                same = low.dtype == each.dtype
                each = torch.baddbmm(each, low, up) if same else (each + torch.bmm(low, up)).to(each.dtype)
            for layer, output in zip(layers, each.unbind(), strict=True):
                self.outputs[layer] = output.unflatten(0, text.shape[:2])

    def _products(self, text: Tensor, down: Tensor, ups: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (x Aᵀ, Bᵀ) per width, [layers, B · L, r] and [layers, r, width]."""
        low = F.linear(text.to(down.dtype), down).flatten(0, 1)
        lows = low.split([len(up) * up.shape[2] for up in ups], dim=1)  # type: ignore[no-untyped-call]
        return [
            (part.unflatten(1, (len(up), -1)).transpose(0, 1), up.transpose(1, 2))
            for part, up in zip(lows, ups, strict=True)
        ]

    def fold(self, down: Tensor, ups: Sequence[Tensor]) -> Tensor:
        """Return the weight of all layers with the LoRA added; arguments as in `compute`."""
        sizes = [len(up) * up.shape[2] for up in ups]
        products = [
            torch.bmm(up, part.unflatten(0, (len(up), -1))).flatten(0, 1)
            for up, part in zip(ups, down.split(sizes), strict=True)  # type: ignore[no-untyped-call]
        ]
        return self.all.frozen + torch.cat(products)


def block_diagonal(matrices: Tensor, count: int) -> Tensor:
    """Put each `count` matrices on the diagonal of one.

    One product then serves all layers that share an input.

    Args:
        matrices: [n · count, out, r].
        count: of the layers.

    Returns:
        [n, count · out, count · r].
    """
    if count == 1:
        return matrices
    diagonal = torch.diag_embed(matrices.view(-1, count, *matrices.shape[1:]).permute(0, 2, 3, 1))
    return diagonal.permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)


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


@torch.no_grad()
def fold_factors(encoder: nn.Module) -> None:
    """Fold the factors of an image encoder's layers into its frozen weights.

    They are DINOv2's layer scales, and those of CLIP's activation x σ(1.702 x) = SiLU(1.702 x) / 1.702.

    Args:
        encoder: of images, in evaluation mode. Nothing is left to fold the second time.
    """
    for module in list(encoder.modules()):
        if hasattr(getattr(module, "layer_scale1", None), "lambda1"):
            layer: Any = module
            last = layer.mlp.fc2 if hasattr(layer.mlp, "fc2") else layer.mlp.down_proj
            _multiply(layer.attention.o_proj, layer.layer_scale1.lambda1)
            _multiply(last, layer.layer_scale2.lambda1)
            layer.layer_scale1 = layer.layer_scale2 = nn.Identity()
        elif type(getattr(module, "activation_fn", None)).__name__ == "QuickGELUActivation":
            mlp: Any = module
            _multiply(mlp.fc1, torch.tensor(_QUICK_GELU))
            mlp.fc2.weight.div_(_QUICK_GELU)
            mlp.activation_fn = nn.SiLU()


def _multiply(layer: nn.Linear, factor: Tensor) -> None:
    """Multiply a layer's output [B, N, out] by a factor, [out] or a scalar."""
    layer.weight.mul_(factor.unsqueeze(-1))
    layer.bias.mul_(factor)


def _alike(layers: Sequence[nn.Linear]) -> bool:
    return len({(layer.weight.shape, layer.bias is None) for layer in layers}) == 1
