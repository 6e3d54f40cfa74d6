"""`python -m examples.benchmark.step_cost`: what one training step asks of a GPU, counted on any CPU.

SD-Turbo's and SDXL-Turbo's pairs are built at their true size on torch's meta device, which computes shapes but no
values. Their step is the project's own code, once with the paper's settings and once with those of the preset, which
users run. It takes seconds and no memory, and its counts have no noise:

- *operations*: what torch dispatches, each of which costs the host time
- *kernels*: those operations that launch work on a GPU. Views, allocations and CPU tensors do not count; an operation
  on a list of tensors counts once per 30 of them. A kernel that cuDNN or cuBLAS splits counts once.
- *fetches*: reads of a device value, for which the host waits until the device has finished all work before it
- *blocking copies*: copies to the device from memory that is not pinned, for which the host waits as well; those that
  torch hides in indexing by a list are not seen
- *TFLOP*: two per multiply-add of matrix products, convolutions and attention
- *peak*: bytes of all tensors alive at once, weights included

Attention runs as on a GPU: one fused kernel. A step whose column of fetches is 0 never waits for the device.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from echodistill_cli.config.schema import TrainConfig
from echodistill_cli.diffusion.pair import Family
from echodistill_cli.training.state import TrainingState
from echodistill_cli.training.steps import training_step
from examples.benchmark.true_size import GIB, configuration, prepared

FAMILIES: tuple[Family, ...] = ("sd", "sdxl")
Recipe = Literal["paper", "preset"]
RECIPES: tuple[Recipe, ...] = ("paper", "preset")
# A preset's replays differ in their prompts. The one that is counted shows the subject, so that the
# paired critic, a thirtieth of a replay, judges it; it leaves out those of the class.
_COUNTED_REPLAYS = 1
_REPLAYED = ("replays", "paired critic")
PRESET_REPLAYS = TrainConfig().replays
# Without class images of the prior, which would have to be generated first. They would only change the prompts. With a
# photo prompt in every batch: discriminators rest in a batch of scenes, and the counted step is one that costs most.
_PRESET_SETTINGS = {"train__replays": _COUNTED_REPLAYS, "train__class_share": 0.0, "train__scene_share": 0.0}
# The innermost of these functions that is running decides to which part of the step an operation belongs.
PARTS = {
    "teacher_step": "teacher",
    "student_step": "student",
    "replay_step": "replays",
    "paired_critic_step": "paired critic",
    "discriminator_step": "critics",
    "add_first_targets": "target",
    "_one_step_target": "target",
    "multi_step_target": "target",
    "echo_step": "echo",
}
_TENSORS_PER_KERNEL = 30  # of torch's multi-tensor kernels, at the depth that AdamW needs
# AdamW's fused kernel has shapes for the meta device, but the optimizer asks for a device that computes.
ANY_DEVICE = mock.patch("torch.optim.adam._device_dtype_check_for_fused", return_value=None)
_NO_KERNEL = {"detach", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
_NO_KERNEL |= {"_local_scalar_dense", "new_empty_strided", "is_same_size", "scalar_tensor", "_reshape_alias"}


@dataclasses.dataclass
class Cost:
    """What one part of a step asks of the device; see the docstring of this module."""

    operations: int = 0
    kernels: int = 0
    fetches: int = 0
    blocking_copies: int = 0
    flops: float = 0.0

    def add(self, other: Cost) -> None:
        """Add the counts of another part."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def times(self, factor: int) -> Cost:
        """Return the counts of as many parts like this one."""
        return Cost(*(factor * getattr(self, field.name) for field in dataclasses.fields(self)))


class StepCounter(TorchDispatchMode):
    """Counts what is dispatched while it is active, by part of the step.

    Args:
        device: whose kernels are counted; everything else is host work.
        functions: the name of the part that each function of the step belongs to.

    Attributes:
        parts: the counts.
        names: how often each operation launched kernels.
        live: bytes of the device's tensors that are alive.
        peak: the most of them at once.
    """

    def __init__(self, device: torch.device, functions: dict[str, str] = PARTS) -> None:
        super().__init__()
        self.device, self.functions = device, functions
        self.parts: dict[str, Cost] = collections.defaultdict(Cost)
        self.names: collections.Counter[str] = collections.Counter()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._changing: list[torch.UntypedStorage] = []  # blocks that are freed and filled again

    @property
    def total(self) -> Cost:
        """The counts of all parts."""
        total = Cost()
        for cost in self.parts.values():
            total.add(cost)
        return total

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operation and run it."""
        kwargs = kwargs or {}
        cost = self.parts[self._part()]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reads_device = any(tensor.device == self.device for tensor in inputs)
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense" and reads_device and self.device.type == "meta":
            output: Any = 1.0  # the meta device has no values
        else:
            output = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        on_device = reads_device or any(tensor.device == self.device for tensor in outputs)
        cost.operations += 1
        if on_device:
            kernels = self._kernels(function, args)
            self.names[name] += kernels
            cost.kernels += kernels
        cost.fetches += name == "_local_scalar_dense" and reads_device
        cost.fetches += reads_device and any(tensor.device != self.device for tensor in outputs)
        cost.blocking_copies += self._copies(name, inputs, outputs, args, kwargs)
        if function.overloadpacket in flop_registry:
            cost.flops += flop_registry[function.overloadpacket](*args, **kwargs, out_val=output)
        for tensor in outputs:
            self.watch(tensor)
        return output

    def _part(self) -> str:
        """Return the part whose function is running. Of the optimizers' work, backward passes count for their part."""
        frame: FrameType | None = sys._getframe(2)
        in_backward = in_optimizer = False
        while frame is not None:
            name, file = frame.f_code.co_name, frame.f_code.co_filename
            if name in self.functions and "echodistill_cli" in file:
                part = self.functions[name]
                return "optimizers" if in_optimizer and not in_backward and part not in _REPLAYED else part
            in_optimizer = in_optimizer or file.endswith("optimizers.py")
            in_backward = in_backward or (name == "backward" and file.endswith("_tensor.py"))
            frame = frame.f_back
        return "other"

    def _kernels(self, function: Any, args: tuple[Any, ...]) -> int:
        name = function.overloadpacket.__name__
        if name in _NO_KERNEL or function.is_view:
            return 0
        if name.startswith(("_foreach", "_fused_adam")):
            return math.ceil(len(args[0]) / _TENSORS_PER_KERNEL)
        if name == "convolution_backward":
            return sum(args[-1])
        return 1

    def _copies(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], args: Any, kwargs: dict[str, Any]
    ) -> bool:
        """Return whether the host waits for a copy to the device."""
        host = [tensor for tensor in inputs if tensor.device != self.device]
        if name in ("_to_copy", "copy_"):
            goes_on = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            return bool(host) and any(t.device == self.device for t in outputs) and not goes_on
        return name == "lift_fresh" and any(tensor.device == self.device for tensor in inputs)

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        if tensor.device != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._freed, key)
            if not storage.nbytes():
                self._changing.append(storage)
        for each in (storage, *self._changing):
            self.live += each.nbytes() - self._sizes[each._cdata]
            self._sizes[each._cdata] = each.nbytes()
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class FusedAttention(TorchFunctionMode):
    """Replaces attention by the fused kernels of a GPU, which the meta device does not choose by itself."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        kwargs = kwargs or {}
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = (args + tuple(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        causal, scale = bool(kwargs.get("is_causal", False)), kwargs.get("scale")
        if mask is None and query.dtype.itemsize == 2:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, 0.0, causal, False, scale=scale)[0]
        needs_gradient = torch.is_grad_enabled() and query.requires_grad
        bias = None if mask is None else mask.expand(*query.shape[:3], key.shape[2]).to(query.dtype)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, needs_gradient, 0.0, causal, scale=scale)[0]


@contextmanager
def counting(device: torch.device) -> Iterator[StepCounter]:
    """Context in which operations on a device are counted."""
    with ExitStack() as stack:
        stack.enter_context(FusedAttention())
        yield stack.enter_context(StepCounter(device))


def prepare(
    family: Family, folder: Path, *, side: int, batch: int, recipe: Recipe = "paper", **settings: Any
) -> TrainingState:
    """Return a run of the true architectures on the meta device, after its first step.

    Args:
        family: sd or sdxl.
        folder: for the photos.
        side: of the images, in pixels.
        batch: images per step.
        recipe: whose settings.
        settings: of the step, by section and name, such as train__target_steps.
    """
    config = configuration(family, "lean", side, batch, "meta", paper=recipe == "paper")
    for key, value in ((_PRESET_SETTINGS if recipe == "preset" else {}) | settings).items():
        section, _, name = key.partition("__")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    with FusedAttention(), ANY_DEVICE:
        state = prepared(config, family, folder)
        state.step = 1  # step 0 would begin with the teacher's head start and the first targets
        training_step(state)
    return state


def count(state: TrainingState, step: Callable[[TrainingState], Any] = training_step) -> StepCounter:
    """Count one step of a run on the meta device, and the memory at its peak."""
    device = state.pair.device
    with counting(device) as counter, ANY_DEVICE:
        for tensor in persistent(state):
            counter.watch(tensor)
        step(state)
    for part in counter.parts.keys() & _REPLAYED:
        counter.parts[part] = counter.parts[part].times(PRESET_REPLAYS // _COUNTED_REPLAYS)
    return counter


def persistent(state: TrainingState) -> Iterator[Tensor]:
    """Yield the tensors that a run holds between steps: weights, moments, photos."""
    pair = state.pair
    # A full VAE beside a tiny decoder has left the device.
    modules = [pair.student.unet, pair.teacher.unet, *pair.encoder.encoders, pair.codec.decoder]
    modules += [critic.backbone for critic in state.critics] + [critic.heads for critic in state.critics]
    modules += [state.paired_critic] if state.paired_critic else []
    for module in (*modules, *([state.identity_encoder] if state.identity_encoder else [])):
        yield from (*module.parameters(), *module.buffers())
    for optimizer in state.optimizers.values():
        yield from (value for moments in optimizer.state.values() for value in moments.values())
    yield from tree_leaves([state.photos.latents, state.photos.masks, state.photos.critics])


def lines(counter: StepCounter) -> Iterator[str]:
    """Yield a table with a row per part and one for the whole step."""
    yield f"{'part':12} {'operations':>10} {'kernels':>8} {'fetches':>8} {'blocking copies':>16} {'TFLOP':>7}"
    for name, cost in (*sorted(counter.parts.items()), ("step", counter.total)):
        yield (
            f"{name:12} {cost.operations:10,} {cost.kernels:8,} {cost.fetches:8} {cost.blocking_copies:16} "
            f"{cost.flops / 1e12:7.2f}"
        )
    yield f"peak memory of tensors: {counter.peak / GIB:.1f} GiB"


def record(counter: StepCounter) -> dict[str, Any]:
    """Return the counts as plain values, for JSON."""
    parts = {name: dataclasses.asdict(cost) for name, cost in sorted(counter.parts.items())}
    return {"parts": parts, "step": dataclasses.asdict(counter.total), "peak_gib": counter.peak / GIB}


def main(arguments: list[str] | None = None) -> None:
    """Print a table per family and recipe, or one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark.step_cost", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--top", type=int, default=0, help="also list so many operations by their kernels")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    records: dict[str, dict[str, Any]] = {family: {} for family in options.family}
    for family, recipe in itertools.product(options.family, options.recipe):
        with tempfile.TemporaryDirectory() as folder:
            state = prepare(family, Path(folder), side=options.side, batch=options.batch, recipe=recipe)
            counter = count(state)
        records[family][recipe] = record(counter)
        if not options.json:
            print(
                f"{family}, {recipe}, {options.side} px, batch {options.batch}", *lines(counter), sep="\n", flush=True
            )
            print(*(f"{kernels:8,} {name}" for name, kernels in counter.names.most_common(options.top)), sep="\n")
    if options.json:
        print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
