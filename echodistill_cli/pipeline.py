"""The façade: one function per command, which wires the packages below. No math, no file format.

Each function takes one frozen request (or a `Config`) and returns one frozen result with `to_dict()`. `on_message` is
called with lines about progress, `on_step` with the metrics of each training step. Torch is imported inside the
functions only, so that a command that fails early does not wait for it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echodistill_cli.config.schema import Config, warnings
from echodistill_cli.outputs.requests import BenchmarkRequest, EvaluationRequest, ExportRequest, SampleRequest
from echodistill_cli.runs import (
    OnMessage,
    OnStep,
    check_name,
    check_output,
    create_run,
    resume_run,
    resumed_config,
)

if TYPE_CHECKING:  # these modules import torch; `__getattr__` imports them when a type is needed
    from echodistill_cli.data.photos import Photo, PhotoReport
    from echodistill_cli.evaluation.dreambench import Benchmark
    from echodistill_cli.evaluation.evaluate import Evaluation
    from echodistill_cli.lora.inspect import Inspection
    from echodistill_cli.outputs.export import ExportResult, TrainResult
    from echodistill_cli.outputs.sample import Sample, WrittenSamples
    from echodistill_cli.planning import Diagnosis, Downloaded, Plan
    from echodistill_cli.training.state import TrainingState

__all__ = [
    "Benchmark",
    "BenchmarkRequest",
    "Diagnosis",
    "Downloaded",
    "Evaluation",
    "EvaluationRequest",
    "ExportRequest",
    "ExportResult",
    "Inspection",
    "OnMessage",
    "OnStep",
    "PhotoReport",
    "Plan",
    "Sample",
    "SampleRequest",
    "TrainResult",
    "WrittenSamples",
    "benchmark",
    "check",
    "doctor",
    "download",
    "evaluate",
    "export",
    "fit_to_memory",
    "inspect",
    "plan",
    "require_photos",
    "resumed_config",
    "sample",
    "train",
    "write_samples",
]
_RESULTS = {
    "Benchmark": "evaluation.dreambench",
    "Diagnosis": "planning",
    "Downloaded": "planning",
    "Evaluation": "evaluation.evaluate",
    "ExportResult": "outputs.export",
    "Inspection": "lora.inspect",
    "PhotoReport": "data.photos",
    "Plan": "planning",
    "Sample": "outputs.sample",
    "TrainResult": "outputs.export",
    "WrittenSamples": "outputs.sample",
}


def __getattr__(name: str) -> Any:
    """Import a result type when it is first used."""
    if name not in _RESULTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"echodistill_cli.{_RESULTS[name]}"), name)


def _ignore(_: object) -> None:
    """Drop a message or a step's metrics."""


def train(
    config: Config,
    *,
    overwrite: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    on_step: OnStep = _ignore,
    on_message: OnMessage = _ignore,
) -> TrainResult:
    """Train teacher and student on a subject's photos, and write their LoRA files.

    Args:
        config: of the run.
        overwrite: replace an existing run at `config.output`.
        resume: continue the run at `config.output`.
        from_step: with `resume`, the checkpoint to continue from; None for the newest.
        on_step: called with the metrics of each step.
        on_message: called with lines about progress.

    Raises:
        ConfigError: a setting is wrong, the output exists, or the run cannot be resumed.
        PhotoError: there are too few usable photos.
        ModelError: a model is missing or does not fit.
        DeviceMemoryError: the device ran out of memory.
        Interrupted: SIGINT or SIGTERM stopped the run; its state is saved.
        EchoDistillError: training diverged, or a file could not be written.
    """
    started = time.time()
    report = _check_before(config)
    for warning in _warnings(config, report):
        on_message(warning)
    if not resume:
        check_output(config, overwrite=overwrite)
    run = resume_run(config) if resume else None
    saved = run.resumable_state(from_step, len(report.photos)) if run else None

    from echodistill_cli.outputs.export import write_results
    from echodistill_cli.training.loop import train_to_end

    state = _loaded_state(config, report.photos, saved, on_message)
    if run is None:
        run = create_run(config, overwrite=overwrite)
    else:
        run.rewind(state.step)
    start = f"continuing after {state.place}" if state.step or state.head_start_step else "from the start"
    on_message(f"Training in {run.folder}, {start}")
    train_to_end(state, run, on_step, on_message)
    return write_results(state.pair, state.state_dict(), run, started, on_message)


def _loaded_state(
    config: Config, photos: Sequence[Photo], saved: dict[str, Any] | None, on_message: OnMessage
) -> TrainingState:
    """Load the models, encode the photos, and restore a checkpoint's state if there is one."""
    from echodistill_cli.planning import assumptions, check_settings, fetch_models
    from echodistill_cli.training.state import build_state

    check_settings(config)
    fetch_models(config)
    for line in assumptions(config.model):
        on_message(line)
    on_message(f"Loading {config.model.student} and {config.model.teacher}, encoding {len(photos)} photos")
    state = build_state(config, photos)
    if saved:
        state.load_state_dict(saved)
    return state


def plan(config: Config) -> Plan:
    """Return what `train` would do: photos, models, downloads, memory. Loads no model.

    Raises:
        ConfigError: a setting is wrong.
        PhotoError: there are too few usable photos.
    """
    report = _check_before(config)

    from echodistill_cli.planning import check_settings, plan_run

    check_settings(config)
    return plan_run(config, len(report.photos), tuple(_warnings(config, report)))


def fit_to_memory(build: Callable[[Mapping[str, Any]], Config], vram: str, on_message: OnMessage = _ignore) -> Config:
    """Return a configuration that fits a device, and report what was chosen.

    Args:
        build: makes the configuration; takes the chosen settings as defaults below what a person set.
        vram: memory of the device in GiB, or "auto" for the device of the run.
        on_message: called with the chosen settings and the expected memory.

    Raises:
        ConfigError: nothing fits, or `vram` is not a number.
        ModelError: the size of the model is not known.
    """
    from echodistill_cli.models import device

    memory_plan = device.fit_to_memory(build, vram)
    for line in device.memory_lines(memory_plan):
        on_message(line)
    return build(memory_plan.settings)


def sample(request: SampleRequest, *, on_message: OnMessage = _ignore) -> Iterator[Sample]:
    """Generate images with a trained LoRA, in the order of prompts, then seeds.

    Raises:
        ConfigError: there is no run or LoRA file to sample from.
        ModelError: a model is missing, or the LoRA does not fit it.
    """
    from echodistill_cli.outputs.sample import sample as sample_images

    return sample_images(request, on_message)


def write_samples(request: SampleRequest, folder: Path, *, on_message: OnMessage = _ignore) -> WrittenSamples:
    """Generate images and write one PNG each, and a grid of all; nothing is overwritten.

    Raises:
        ConfigError: there is no run or LoRA file to sample from.
        ModelError: a model is missing, or the LoRA does not fit it.
        EchoDistillError: a file cannot be written.
    """
    from echodistill_cli.outputs.sample import write_samples as write_images

    return write_images(request, folder, on_message)


def export(request: ExportRequest, *, on_message: OnMessage = _ignore) -> ExportResult:
    """Write LoRA files, merged models or ONNX graphs for other tools, and push them to the hub on request.

    Raises:
        ConfigError: there is no such run, or a file exists already.
        ModelError: a model is missing, or the LoRA does not fit it.
        EchoDistillError: a file cannot be written or pushed.
    """
    from echodistill_cli.outputs.export import export as write_export

    return write_export(request, on_message)


def evaluate(request: EvaluationRequest, *, on_message: OnMessage = _ignore) -> Evaluation:
    """Generate what is missing, score it with CLIP-I, DINO and CLIP-T, and write `evaluation.json`.

    Raises:
        ConfigError: there is no LoRA, or its subject is not known.
        PhotoError: there is no usable photo.
        ModelError: a model or an encoder is missing or does not fit.
    """
    from echodistill_cli.evaluation.evaluate import evaluate as score_images

    return score_images(request, on_message)


def benchmark(request: BenchmarkRequest, *, on_step: OnStep = _ignore, on_message: OnMessage = _ignore) -> Benchmark:
    """Train, generate and score every DreamBench subject that has no result yet.

    Raises:
        ConfigError: the checkout is incomplete, or a run was made with other settings.
        ModelError: a model or an encoder is missing or does not fit.
        Interrupted: SIGINT or SIGTERM came; the same call continues from there.
    """
    from echodistill_cli.evaluation.dreambench import run_benchmark

    return run_benchmark(request, train, on_message, on_step)


def check(folder: Path, *, resolution: int = 512, masks: str = "auto", captions: bool = True) -> PhotoReport:
    """Return a verdict on each file of a photo folder. Loads no model.

    Args:
        folder: with the photos.
        resolution: side of the training images, in pixels.
        masks: "off" ignores subject masks.
        captions: read the .txt files.

    Raises:
        PhotoError: the folder is missing or cannot be read.
    """
    from echodistill_cli.data.photos import check_photos

    return check_photos(folder, resolution=resolution, masks=masks, captions=captions)


def require_photos(report: PhotoReport, folder: Path, min_photos: int) -> None:
    """Check that a report has enough usable photos.

    Raises:
        PhotoError: there are fewer than `min_photos`; it names the skipped files.
    """
    from echodistill_cli.data.photos import require_enough

    require_enough(report, folder, min_photos)


def inspect(file: Path) -> Inspection:
    """Return what a LoRA or token file is, and which tools load it.

    Raises:
        ConfigError: the file does not exist.
        ModelError: the file is damaged or not a safetensors file.
    """
    from echodistill_cli.lora.inspect import inspect_file

    return inspect_file(file)


def download(model: str, teacher: str | None = None, *, to: Path | None = None, dry_run: bool = False) -> Downloaded:
    """Download all that training with a model loads.

    Args:
        model: preset, hub id, folder or file of the student.
        teacher: of another student; None for the default one.
        to: new folder for a copy of everything, to carry to a machine without a network.
        dry_run: only list the files.

    Raises:
        ConfigError: the folder exists already.
        ModelError: a model does not exist, or the hub cannot be reached or refuses it.
    """
    from echodistill_cli import planning

    return planning.download(model, teacher, to=to, dry_run=dry_run)


def doctor() -> Diagnosis:
    """Return versions, devices and memory of this machine, and what it can train. Opens no socket."""
    from echodistill_cli.planning import diagnose

    return diagnose()


def _check_before(config: Config) -> PhotoReport:
    """Return the photos, after every check that needs no model."""
    from echodistill_cli.data.photos import load_photos

    check_name(config)
    if config.run.report_to:
        from echodistill_cli.training.loop import check_trackers

        check_trackers(config.run.report_to)
    return load_photos(
        Path(config.concept.photos),
        min_photos=config.concept.min_photos,
        resolution=config.model.resolution,
        masks=config.concept.masks,
        captions=config.concept.captions,
    )


def _warnings(config: Config, report: PhotoReport) -> Iterator[str]:
    for file in report.files:
        if file.verdict != "ok":
            yield f"{file.name}: {file.verdict}: {'; '.join(file.notes)}"
    yield from report.warnings
    yield from warnings(config)
