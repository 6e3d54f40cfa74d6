"""How the parts of a run are moved: learning rates over the steps, backward, clipping, and what was not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from echodistill_cli.errors import EchoDistillError
from echodistill_cli.training.state import TrainingState, learning_rates

Metrics = dict[str, float]

# Half-precision gradients of small losses vanish below 6e-8; this keeps them above. Exact, being a power of two.
_FP16_LOSS_SCALE = 1024.0


def set_rates(state: TrainingState) -> None:
    """Give every optimizer its learning rate for the coming joint step: `train.lr_schedule` over `train.steps`.

    A teacher that is averaged at the end (`train.teacher_mean`) keeps its own.
    """
    settings = state.config.train
    done = min(1.0, state.step / settings.steps)
    share = 0.5 * (1 + math.cos(math.pi * done)) if settings.lr_schedule == "cosine" else 1.0
    rates = learning_rates(settings)
    rates["text"] *= settings.joint_text_share
    for name, optimizer in state.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name] * (1.0 if name == "teacher" and settings.teacher_mean else share)


def optimize(state: TrainingState, loss: Tensor, parts: Sequence[str]) -> Metrics:
    """The one place where anything is trained: zero, backward, clip, step, for the named parts of the run.

    Returns:
        the gradient norm of each part before clipping; or, where loss or gradient was not finite and nothing has been
        moved, `skipped_<part>` = 1.
    """
    optimizers = {name: state.optimizers[name] for name in parts if name in state.optimizers}
    if not optimizers or not loss.requires_grad:
        return {}
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    scale = _FP16_LOSS_SCALE if state.pair.dtype is torch.float16 else 1.0
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    norms = {name: _unscale_and_clip(optimizer, scale, state) for name, optimizer in optimizers.items()}
    if not all(math.isfinite(value) for value in (float(loss.detach()), *norms.values())):
        return {f"skipped_{name}": 1.0 for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
    return {f"grad_norm_{name}": norm for name, norm in norms.items()}


def trained_weights(state: TrainingState, parts: Sequence[str]) -> list[nn.Parameter]:
    """All that the optimizers of the named parts of the run move, in a fixed order."""
    return [p for name in parts if name in state.optimizers for p in _parameters(state.optimizers[name])]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _unscale_and_clip(optimizer: torch.optim.Optimizer, scale: float, state: TrainingState) -> float:
    parameters = [parameter for parameter in _parameters(optimizer) if parameter.grad is not None]
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.div_(scale)
    return float(torch.nn.utils.clip_grad_norm_(parameters, state.config.train.max_grad_norm or math.inf))


def count_skips(state: TrainingState, metrics: Metrics) -> None:
    """Count steps in which an optimizer was skipped.

    Raises:
        EchoDistillError: too many in a row.
    """
    skipped = sorted(name.removeprefix("skipped_") for name in metrics if name.startswith("skipped_"))
    state.bad_steps_in_a_row = state.bad_steps_in_a_row + 1 if skipped else 0
    state.bad_steps += bool(skipped)
    if state.bad_steps_in_a_row >= state.config.train.max_bad_steps:
        raise EchoDistillError(
            f"Loss or gradient of {', '.join(skipped)} was not finite in the last {state.bad_steps_in_a_row} steps.",
            "Lower --lr and --teacher-lr, or use --precision fp32, and --resume from the last checkpoint.",
        )
