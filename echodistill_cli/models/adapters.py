"""Everything trainable that is neither a critic nor the learned word: LoRA on UNets and text encoders.

One adapter per module, kept in float32 over a frozen base of any precision (diffusers and transformers both speak to
peft through the same methods, which is all that is used here).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from echodistill_cli.errors import EchoDistillError

ADAPTER = "default"
# The LoRA that makes a base model one-step, where the student is made so; it stays as it was loaded.
DISTILLATION = "distilled"
# That the cross-attention's key and value carry a concept is Custom Diffusion's finding (Kumari et al. 2023).
UNET_LAYERS: Mapping[str, tuple[str, ...]] = {
    "cross-kv": ("attn2.to_k", "attn2.to_v"),
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    # Where a UNet has no attention, as on its finest level, the convolutions are all that can learn a subject's detail.
    "attention-conv": ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"),
}
# All four or none: A1111 applies a text encoder's attention block only when it is complete.
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(module: Any, targets: tuple[str, ...], rank: int, alpha: float, seed: int) -> None:
    """Freeze a module and put LoRA on its layers whose names end in `targets`.

    B starts at zero, so the module computes the same as before; A is drawn from `seed` and nothing else.
    """
    module.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of the LoRA that made it one-step
        torch.manual_seed(seed)
        module.add_adapter(config, adapter_name=ADAPTER)
    activate(module)
    for parameter in trainable_parameters(module):
        parameter.data = parameter.data.float()


def lora_layers(module: nn.Module, adapter: str = ADAPTER) -> list[Any]:
    """The layers of a module that carry a LoRA of this name."""
    from peft.tuners.lora import LoraLayer

    return [layer for layer in module.modules() if isinstance(layer, LoraLayer) and adapter in layer.lora_A]


def keep_on(device: torch.device, module: nn.Module) -> None:
    """Put what is trained of a module on a device; its frozen weights may wait elsewhere, where its LoRA was made."""
    for layer in lora_layers(module):
        layer.lora_A[ADAPTER].to(device)
        layer.lora_B[ADAPTER].to(device)


def activate(module: Any, scale: float = 1.0) -> None:
    """Make a module's LoRA take effect at a strength, beside the one that made it one-step if there is that."""
    if not is_distilled(module):
        return
    module.set_adapters([DISTILLATION, ADAPTER], [1.0, scale])
    for name, parameter in module.named_parameters():
        if f".{DISTILLATION}." in name:
            parameter.requires_grad_(False)


@contextmanager
def at_strength(module: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the LoRA that is trained takes effect `strength` times as strongly; for drawing, not for training."""
    layers = lora_layers(module)
    for layer in layers:
        layer.set_scale(ADAPTER, strength)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def is_distilled(module: Any) -> bool:
    """Whether a LoRA made this module one-step."""
    return DISTILLATION in getattr(module, "peft_config", {})


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves, in the module's own order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def lora_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the adapter's tensors by peft's names, such as `….attn2.to_k.lora_A.weight`."""
    tensors = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def load_lora_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors from `lora_tensors` back.

    Raises:
        EchoDistillError: names or shapes do not match the module's adapter.
    """
    expected = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    ours, theirs = ({(name, t.shape) for name, t in side.items()} for side in (expected, tensors))
    if ours != theirs:
        odd = sorted({name for name, _ in ours ^ theirs})
        raise EchoDistillError(
            f"The adapter does not fit this model: {len(odd)} names or shapes differ, such as {odd[0]}."
        )
    set_peft_model_state_dict(module, dict(tensors), adapter_name=ADAPTER)


@contextmanager
def without_lora(module: Any) -> Iterator[None]:
    """Inside, the module is its frozen base, one-step if a LoRA made it so; without a LoRA to train it always is.

    Not to be entered with gradient checkpointing on: the backward pass recomputes with the adapter, outside.
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
