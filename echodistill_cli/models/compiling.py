"""Compile the repeated blocks of the models with torch.compile where that wins time.

Only blocks that a model repeats are compiled, each kind and size once. This takes a fraction of the time that whole
models would take, and LoRA can be switched off and on without compiling again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from echodistill_cli.models.joined import separate_inputs
from echodistill_cli.models.lean import run_plain

# What `train.compile` says, as torch.compile's mode.
MODES = {"default": None, "auto": None, "max": "max-autotune-no-cudagraphs"}
# The blocks of UNets, transformers and image encoders.
_BLOCKS = {
    *("BasicTransformerBlock", "ResnetBlock2D"),
    *("SanaTransformerBlock", "Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    *("ViTLayer", "Dinov2Layer", "CLIPEncoderLayer"),
}
# `auto` compiles from this number of steps on: compiling takes minutes, and a step must win that back.
AUTO_STEPS = 1000
# Graphs per kind of block: sizes, with and without gradient, with and without LoRA, one or two prompts per image.
_MOST_GRAPHS = 64
_COMPILERS = ("c++", "g++", "clang++", "cl")


def missing_compiler(device: torch.device) -> str | None:
    """Return what this machine lacks to compile for a device; None if nothing is missing."""
    if device.type == "mps":
        return "torch does not compile for this device"
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), *_COMPILERS) if name):
        return "no C++ compiler is installed"
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def decide(setting: str, device: torch.device, steps: int) -> tuple[bool, str]:
    """Return whether to compile, and a line that says so; "" if nobody asked for it.

    Args:
        setting: of `train.compile`.
        device: of the models.
        steps: that are left.
    """
    if setting == "off" or (setting == "auto" and device.type == "cpu"):
        return False, ""
    if setting == "auto" and steps < AUTO_STEPS:
        return False, f"Not compiling the models, as {steps} steps are too few to win the time back"
    missing = missing_compiler(device)
    if missing:
        return False, f"Not compiling the models, as {missing}"
    return True, "Compiling the models: the first steps take minutes, later ones less time than without"


def compile_blocks(modules: Iterable[nn.Module], setting: str = "default", backend: str = "inductor") -> int:
    """Compile the repeated blocks of modules, in place, when they first run; return their number.

    Names, weights and hooks of the modules stay as they are.

    Args:
        modules: UNets and image encoders.
        setting: a key of `MODES`.
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": False}
    if backend == "inductor":
        options["mode"] = MODES[setting]
    modules = list(modules)
    for module in modules:
        run_plain(module)
        separate_inputs(module)
    blocks = {block for module in modules for block in module.modules() if type(block).__name__ in _BLOCKS}
    for block in blocks:
        block.compile(**options)
    return len(blocks)
