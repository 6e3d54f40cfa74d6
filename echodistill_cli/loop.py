"""The training loop: step, log, preview, save, and stop when asked; everything it decides stands on one page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import psutil
import torch

from echodistill_cli.errors import DeviceMemoryError, Interrupted
from echodistill_cli.pictures import grid, save_png, to_image
from echodistill_cli.runs import Run
from echodistill_cli.sampling import SamplingSettings, generate
from echodistill_cli.signals import StopRequest
from echodistill_cli.state import TrainingState
from echodistill_cli.trackers import tracking
from echodistill_cli.training import training_step

Observer = Callable[[Mapping[str, float]], None]


def train_to_end(state: TrainingState, run: Run, observe: Observer) -> None:
    """Take `state` to its last step, writing into `run` as its configuration says.

    Args:
        observe: called after each step with its metrics.

    Raises:
        Interrupted: SIGINT or SIGTERM came; a checkpoint has been written.
        DeviceMemoryError: the device ran out of memory; the hint names the next thing to try.
        EchoDistillError: training diverged, or a file could not be written.
    """
    every = state.config.run
    last = state.config.train.steps
    if state.step == 0:
        preview(state, run)
    with StopRequest() as stop, tracking(state.config, run.folder) as track:
        while state.step < last:
            metrics = timed_step(state)
            run.log(metrics)
            track(metrics)
            observe(metrics)
            done = state.step == last
            if state.step % every.sample_every == 0 or done:
                preview(state, run)
            if state.step % every.save_every == 0 or done or stop.received:
                saved = run.save_checkpoint(state.step, state.state_dict())
            if stop.received and not done:
                raise Interrupted(f"Stopped at step {state.step}; saved {saved}. Go on with --resume.", stop.received)


def timed_step(state: TrainingState) -> dict[str, float]:
    """One training step's metrics, with its number, its seconds, the learning rates and the peak memory in MiB."""
    started = time.perf_counter()
    try:
        metrics = training_step(state)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"Out of memory on {state.pair.device} at {peak_memory_mib(state.pair.device):,.0f} MiB.", _saving(state)
        ) from error
    rates = {f"lr_{name}": optimizer.param_groups[0]["lr"] for name, optimizer in state.optimizers.items()}
    timing = {
        "step_seconds": time.perf_counter() - started,
        "peak_memory_mib": peak_memory_mib(state.pair.device),
    }
    return {"step": state.step, **metrics, **rates, **timing}


def peak_memory_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: on CUDA by tensors, elsewhere by the process as it is now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20


def preview(state: TrainingState, run: Run) -> None:
    """Write one grid: a row per prompt; first with the concept's word, then without it, so that drift is seen."""
    settings, config = state.config.run, state.config
    without = config.concept.class_name or "object"
    prompts = settings.sample_prompts or (
        f"a photo of a {config.subject}",
        f"a photo of a {config.subject} on the beach",
    )
    asked = [text for prompt in prompts for text in (prompt, prompt.replace(config.subject, without))]
    seeds = list(range(settings.sample_seeds))
    drawn = generate(
        state.pair,
        [prompt for prompt in asked for _ in seeds],
        seeds * len(asked),
        SamplingSettings(size=config.model.resolution, batch_size=config.train.batch_size),
    )
    sheet = grid([to_image(pixels) for pixels in drawn], columns=2 * len(seeds))
    texts = {"prompts": " | ".join(asked), "seeds": ", ".join(map(str, seeds)), "step": str(state.step)}
    save_png(run.samples / f"step-{state.step:06d}.png", sheet, texts)


def _saving(state: TrainingState) -> str:
    """The next setting that saves memory in this run."""
    config = state.config
    if config.train.batch_size > 1:
        return "Try --batch-size 1."
    if not config.train.gradient_checkpointing:
        return "Try --gradient-checkpointing."
    if config.model.decoder == "full":
        return "Try --decoder tiny."
    if set(config.critic.discriminators) - {"teacher"}:
        return "Try --discriminators teacher."
    return "Try a smaller --resolution, or a device with more memory."
