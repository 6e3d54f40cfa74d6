"""LoRA adapters on UNets and text encoders: add, scale, disable, save and load.

Each module has one trained adapter, in float32 over a frozen base of any precision. diffusers and transformers share
the methods through which they use peft; only these are used here.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Conv2d, Linear, LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from echodistill_cli.config.family import Family
from echodistill_cli.diffusion.pair import Denoiser
from echodistill_cli.errors import EchoDistillError, ModelError
from echodistill_cli.lora.safetensors_io import read_header

ADAPTER = "default"
# The frozen LoRA that makes a base model one-step, if the student is made that way.
DISTILLATION = "distilled"
# Key and value of the cross-attention are enough to learn a concept (Custom Diffusion, Kumari et al. 2023).
UNET_LAYERS: Mapping[str, tuple[str, ...]] = {
    "cross-kv": ("attn2.to_k", "attn2.to_v"),
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    # Levels without attention, such as the finest one, can learn a subject's details in their convolutions only.
    "attention-conv": ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"),
}
# All four, because A1111 ignores the attention block of a text encoder if one is missing.
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


def layers_of(family: Family, targets: str) -> tuple[str, ...] | str:
    """Return the layers that get the LoRA: endings of names in a UNet, a pattern in a transformer.

    Args:
        family: of the model.
        targets: value of `adapter.targets`.
    """
    return family.layers[targets] if family.is_flow else UNET_LAYERS[targets]


def add_lora(module: Any, targets: tuple[str, ...] | str, rank: int, alpha: float, seed: int) -> None:
    """Freeze a module and add a LoRA that does not change its output yet.

    Args:
        module: a UNet, transformer or text encoder.
        targets: endings of the names of the layers that get the LoRA, or a pattern of whole names.
        rank: of each LoRA.
        alpha: scale times rank.
        seed: decides the random start of A alone; B starts at zero.
    """
    module.requires_grad_(False)
    names = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=True, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the distillation LoRA's
        torch.manual_seed(seed)
        module.add_adapter(config, adapter_name=ADAPTER)
    activate(module)
    for parameter in trainable_parameters(module):
        parameter.data = parameter.data.float()
    _run_lean(module)


def lora_layers(module: nn.Module, adapter: str = ADAPTER) -> list[Any]:
    """Return the layers of a module that have a LoRA of this name."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer) and adapter in layer.lora_A]


def keep_on(device: torch.device, module: nn.Module) -> None:
    """Move a module's LoRA to a device; its frozen weights may stay elsewhere."""
    for layer in lora_layers(module):
        layer.lora_A[ADAPTER].to(device)
        layer.lora_B[ADAPTER].to(device)


def activate(module: Any, scale: float = 1.0) -> None:
    """Enable a module's LoRA at a scale, together with a distillation LoRA if there is one."""
    if not is_distilled(module):
        return
    module.set_adapters([DISTILLATION, ADAPTER], [1.0, scale])
    for name, parameter in module.named_parameters():
        if f".{DISTILLATION}." in name:
            parameter.requires_grad_(False)


def _run_lean(module: Any) -> None:
    """Let a module's LoRA layers run in fewer operations; their names and tensors stay peft's."""
    if is_distilled(module):  # two adapters per layer
        return
    lean = {Linear: _LeanLinear, Conv2d: _LeanConv2d}
    layers = {layer for layer in lora_layers(module) if type(layer) in (*lean, *lean.values())}
    for layer in layers:
        layer.__class__ = lean.get(type(layer), type(layer))


class _LeanLinear(Linear):  # type: ignore[misc]
    """A linear layer of peft with fewer operations.

    Attributes:
        folded: the weight with the LoRA added, for passes without gradient; None outside the context `folded`.
    """

    folded: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if not _runs_lean(self):
            return torch.as_tensor(super().forward(x, *args, **kwargs))
        if self.folded is not None and not torch.is_grad_enabled():
            return F.linear(x, self.folded, base.bias)
        output, dtype = base(x), product_dtype(x.dtype)
        low = F.linear(x.to(dtype), self.lora_A[ADAPTER].weight.to(dtype))
        up, scale = self.lora_B[ADAPTER].weight.to(dtype), self.scaling[ADAPTER]
        if output.dtype != dtype:
            return torch.add(output, F.linear(low, up), alpha=scale).to(output.dtype)
        return torch.addmm(output.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale).view(output.shape)


class _LeanConv2d(Conv2d):  # type: ignore[misc]
    """A convolution of peft with fewer operations.

    Attributes:
        folded: as in `_LeanLinear`.
    """

    folded: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _runs_lean(self):
            return torch.as_tensor(super().forward(x, *args, **kwargs))
        return self.convolve(x, self.base_layer.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, C, h, w] with another bias [C] than the layer's own."""
        base = self.base_layer
        if self.folded is not None and not torch.is_grad_enabled():
            return torch.as_tensor(base._conv_forward(x, self.folded, bias))
        output, dtype, down = base._conv_forward(x, base.weight, bias), product_dtype(x.dtype), self.lora_A[ADAPTER]
        low = down._conv_forward(x.to(dtype), down.weight.to(dtype), None)
        product = F.conv2d(low, self.lora_B[ADAPTER].weight.to(dtype))
        return torch.add(output, product, alpha=self.scaling[ADAPTER]).to(output.dtype)


def convolve(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution with another bias than its own.

    Args:
        layer: a convolution, or one of peft's that has the trained LoRA or none in use.
        x: [B, in, h, w].
        bias: [out], or None for none.

    Returns:
        [B, out, h, w].
    """
    if isinstance(layer, _LeanConv2d) and _runs_lean(layer):
        return layer.convolve(x, bias)
    base = getattr(layer, "base_layer", layer)
    return torch.as_tensor(base._conv_forward(x, base.weight, bias))


def _runs_lean(layer: Any) -> bool:
    return not layer.disable_adapters and not layer.merged and list(layer.active_adapters) == [ADAPTER]


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of a LoRA's products over weights of `dtype`."""
    # In fp16 the gradients of these products would underflow.
    return dtype if dtype is torch.bfloat16 else torch.float32


@contextmanager
def folded(module: Any) -> Iterator[None]:
    """Context in which passes without gradient use weights with the trained LoRA added to them.

    Several passes in a row are faster this way. In half precision it does nothing: added to a weight of 8 bits, the
    small updates of early training would be lost in rounding.
    """
    lean = getattr(module, "lean", None)
    kinds = _LeanConv2d if lean else _LeanLinear | _LeanConv2d
    layers = [layer for layer in lora_layers(module) if isinstance(layer, kinds)]
    layers = [layer for layer in layers if layer.base_layer.weight.dtype is torch.float32]
    for layer in layers:
        with torch.no_grad():
            layer.folded = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    try:
        with lean.folding() if lean and lean.time_weight.dtype is torch.float32 else nullcontext():
            yield
    finally:
        for layer in layers:
            layer.folded = None


@contextmanager
def at_strength(module: nn.Module, strength: float) -> Iterator[None]:
    """Context in which the trained LoRA is scaled by `strength`; for generating images, not for training."""
    layers = lora_layers(module)
    for layer in layers:
        layer.set_scale(ADAPTER, strength)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def is_distilled(module: Any) -> bool:
    """Return whether a distillation LoRA made this module one-step."""
    return DISTILLATION in getattr(module, "peft_config", {})


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters, in the module's own order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def lora_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the LoRA's tensors by peft's names, such as `….attn2.to_k.lora_A.weight`."""
    tensors = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def load_lora_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors from `lora_tensors` into a module's LoRA.

    Raises:
        EchoDistillError: names or shapes do not match.
    """
    expected = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    shapes, new_shapes = ({(name, t.shape) for name, t in side.items()} for side in (expected, tensors))
    if shapes != new_shapes:
        differences = sorted({name for name, _ in shapes ^ new_shapes})
        raise EchoDistillError(
            f"The LoRA does not fit this model: {len(differences)} names or shapes differ, such as {differences[0]}.",
            "Use the models, the adapter.rank and the adapter.targets that it was trained with.",
        )
    set_peft_model_state_dict(module, dict(tensors), adapter_name=ADAPTER)


@contextmanager
def without_lora(module: Any) -> Iterator[None]:
    """Context in which the trained LoRA is disabled. A distillation LoRA, if there is one, stays active.

    Do not use it with gradient checkpointing: the backward pass recomputes outside the context, with the LoRA.
    """
    if not getattr(module, "_hf_peft_config_loaded", False):
        yield
        return
    if is_distilled(module):
        activate(module, 0.0)
    else:
        module.disable_adapters()
    try:
        yield
    finally:
        if is_distilled(module):
            activate(module)
        else:
            module.enable_adapters()


def load_distillation_lora(student: Denoiser, family: Family, file: Path, *, fold: bool) -> None:
    """Make a base model one-step with a frozen LoRA, such as Hyper-SD's, DMD2's or LCM's.

    Args:
        student: the base model.
        family: its family.
        file: the LoRA.
        fold: whether to add the LoRA to the weights; otherwise it stays a separate adapter.

    Raises:
        ModelError: the file is missing or damaged, or does not fit the model.
    """
    import diffusers

    kind, remedy = getattr(diffusers, family.pipeline), "Name the base model that it was made for with --model."
    read_header(file)
    try:
        unet_config = student.unet.config
        state, alphas, metadata = kind.lora_state_dict(str(file), return_lora_metadata=True, unet_config=unet_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # modules that do not fit are counted below
            kind.load_lora_into_unet(state, alphas, student.unet, adapter_name=DISTILLATION, metadata=metadata)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{file} does not fit this model ({first_line}).", remedy) from error
    modules = {re.sub(r"\.lora.*", "", name) for name in state if name.startswith("unet.") and ".lora" in name}
    matches = len(lora_layers(student.unet, DISTILLATION))
    if not modules or matches != len(modules):
        raise ModelError(f"{file} does not fit this model: {matches} of its {len(modules)} UNet modules match.", remedy)
    if fold:
        student.unet.fuse_lora(adapter_names=[DISTILLATION])
        student.unet.unload_lora()
    student.unet.requires_grad_(False)


def share_weights(denoiser: Denoiser, sizes: tuple[int, int]) -> Denoiser:
    """Return a second UNet that shares the frozen weights of the first but carries its own adapters.

    It takes almost no memory. Switching adapters on one module is error-prone: a backward pass under another adapter
    than its forward pass gives wrong gradients without an error. Two module trees over one set of weights cannot be
    mixed up.

    Args:
        denoiser: the first one.
        sizes: original and target size in pixels for the second one, if it is conditioned on them.
    """
    tensors = (*denoiser.unet.parameters(), *denoiser.unet.buffers())
    unet = copy.deepcopy(denoiser.unet, {id(tensor): tensor for tensor in tensors})
    original, target = sizes
    time_ids = None if denoiser.time_ids is None else (original, original, 0, 0, target, target)
    return Denoiser(unet, denoiser.schedule, time_ids)


def add_trained_lora(module: Any, tensors: Mapping[str, Tensor], scale: float) -> None:
    """Add tensors with peft's keys to a module as its trained LoRA; each layer has α = its rank."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in tensors.items() if ".lora_A." in key}
    exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    rank = next(iter(ranks.values()))
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=exact, alpha_pattern=dict(exact), target_modules=list(ranks)
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of a distillation LoRA
        module.add_adapter(config, adapter_name=ADAPTER)
        set_peft_model_state_dict(module, dict(tensors), adapter_name=ADAPTER)
    activate(module, scale)
    for layer in lora_layers(module):
        layer.set_scale(ADAPTER, scale)
    _run_lean(module)
