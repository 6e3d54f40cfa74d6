"""LoRA and token files: read, write, convert and explain them. Knows no config, no run and no loaded model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these modules import torch; `__getattr__` imports them when a name is needed
    from echodistill_cli.lora.inspect import inspect_file as inspect_file
    from echodistill_cli.lora.read import LoraFile as LoraFile
    from echodistill_cli.lora.read import read_lora as read_lora
    from echodistill_cli.lora.tensors import LoraWeights as LoraWeights
    from echodistill_cli.lora.tensors import kohya_tensors as kohya_tensors

_HOME = {
    "LoraFile": "read",
    "LoraWeights": "tensors",
    "inspect_file": "inspect",
    "kohya_tensors": "tensors",
    "read_lora": "read",
}


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
