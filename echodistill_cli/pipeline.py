"""The façade: one function per command, which wires the packages below. No math, no file format.

Each function takes one frozen request (or a `Config`) and returns one frozen result with `to_dict()`. `on_message` is
called with lines about progress, `on_step` with the metrics of each training step. Torch is imported inside the
functions only, so that a command that fails early does not wait for it.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echodistill_cli.config.build import build_config, config_from_dict, config_to_dict, with_absolute_paths
from echodistill_cli.config.schema import Config
from echodistill_cli.config.warnings import check_vram
from echodistill_cli.errors import counted
from echodistill_cli.many import batch
from echodistill_cli.many.batch import Many, PlannedSubject
from echodistill_cli.many.checks import check_before, warnings_before
from echodistill_cli.many.schedule import OnEvent
from echodistill_cli.many.subject import Event
from echodistill_cli.outputs.requests import (
    BenchmarkRequest,
    EngineRequest,
    EvaluationRequest,
    ExportRequest,
    LiveRequest,
    ManyRequest,
    SampleRequest,
)
from echodistill_cli.runs import OnMessage, OnStep, Run, check_output, create_run, newest_run, open_run, resume_run

if TYPE_CHECKING:  # these modules import torch; `__getattr__` imports them when a type is needed
    from echodistill_cli.data.photos import Photo, PhotoReport
    from echodistill_cli.evaluation.dreambench import Benchmark
    from echodistill_cli.evaluation.evaluate import Evaluation
    from echodistill_cli.lora.inspect import Inspection
    from echodistill_cli.models.downloads import Downloaded, DownloadRequest
    from echodistill_cli.outputs.export import ExportResult, TrainResult
    from echodistill_cli.outputs.sample import Sample, WrittenSamples
    from echodistill_cli.planning import Diagnosis, Plan
    from echodistill_cli.training.state import TrainingState

__all__ = [
    "Benchmark", "BenchmarkRequest", "Diagnosis", "DownloadRequest", "Downloaded", "EngineRequest", "Evaluation",
    "EvaluationRequest", "Event", "ExportRequest", "ExportResult", "Inspection", "LiveRequest", "Many", "ManyRequest",
    "OnEvent", "OnMessage", "OnStep", "PhotoReport", "Plan", "PlannedSubject", "Sample", "SampleRequest", "TrainResult",
    "WrittenSamples",
    "benchmark", "check", "doctor", "download", "evaluate", "export", "fit_to_memory", "inspect", "live", "plan",
    "plan_many", "require_photos", "resumed_config", "sample", "train", "train_many", "write_samples",
]  # fmt: skip
_RESULTS = {
    "Benchmark": "evaluation.dreambench", "Diagnosis": "planning", "DownloadRequest": "models.downloads",
    "Downloaded": "models.downloads", "Evaluation": "evaluation.evaluate", "ExportResult": "outputs.export",
    "Inspection": "lora.inspect", "PhotoReport": "data.photos", "Plan": "planning", "Sample": "outputs.sample",
    "TrainResult": "outputs.export", "WrittenSamples": "outputs.sample",
}  # fmt: skip


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
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train teacher and student on a subject's photos, and write their LoRA files.

    Args:
        config: of the run.
        overwrite: replace an existing run at `config.output`.
        resume: continue the run at `config.output`.
        from_step: with `resume`, the checkpoint to continue from; None for the newest.
        on_step: called with the metrics of each step.
        on_message: called with lines about progress.
        stop: called after each step, in this thread; True saves the run and ends it, as SIGINT does.

    Raises:
        ConfigError: a setting is wrong, the output exists, or the run cannot be resumed.
        PhotoError: there are too few usable photos.
        ModelError: a model is missing or does not fit.
        DeviceMemoryError: the device ran out of memory.
        Interrupted: SIGINT, SIGTERM or `stop` ended the run; its state is saved.
        EchoDistillError: training diverged, or a file could not be written.
    """
    started, report = time.time(), check_before(config)
    if not resume:
        check_output(config, overwrite=overwrite)
    if overwrite and not resume and config.output.is_dir():  # tell before anything is loaded that it is being trained
        with Run(config.output, config).locked():
            pass
    from echodistill_cli.models.downloads import check_reachable  # without torch

    check_reachable(config)
    config = with_absolute_paths(config)
    for warning in warnings_before(config, report):
        on_message(warning)
    session = _Session(started, report.photos, on_step, on_message, stop)
    if resume:
        run = resume_run(config)
        with run.locked():
            return _resume(run, from_step, session)
    return _start(config, session, overwrite=overwrite)


@dataclass(frozen=True)
class _Session:
    """One call of `train`: when it started, its photos and its callbacks."""

    started: float
    photos: Sequence[Photo]
    on_step: OnStep
    on_message: OnMessage
    stop: Callable[[], bool]


def _start(config: Config, session: _Session, *, overwrite: bool) -> TrainResult:
    """Train a new run from its first step."""
    from echodistill_cli.training.loop import removed_if_untrained

    state = _loaded_state(config, session)
    run = create_run(config, overwrite=overwrite)
    with removed_if_untrained(run), run.locked():
        return _train_to_end(state, run, session)


def _resume(run: Run, from_step: int | None, session: _Session) -> TrainResult:
    """Continue a run from a checkpoint, or from its first step if it has none."""
    from echodistill_cli.training.loop import restore, resumable_state

    saved = resumable_state(run, from_step, session.photos, session.on_message)
    state = _loaded_state(run.config, session)
    if saved:
        restore(state, saved, run)
    if damaged := run.rewind(state.step, state.carry_back_step if state.step else state.head_start_step):
        session.on_message(f"{run.metrics_file}: {damaged} damaged lines were dropped")
    return _train_to_end(state, run, session)


def _loaded_state(config: Config, session: _Session) -> TrainingState:
    from echodistill_cli.models.downloads import download_command, fetch, sources_of
    from echodistill_cli.planning import assumptions, check_settings
    from echodistill_cli.training.dataset import doubts, unread_texts
    from echodistill_cli.training.state import build_state

    check_settings(config)
    fetch(config.model, sources_of(config), lambda: download_command(config))
    for line in assumptions(config.model):
        session.on_message(line)
    names = f"{config.model.student} and {config.model.teacher}"
    session.on_message(f"Loading {names}, encoding {counted(len(session.photos), 'photo')}")
    state = build_state(config, session.photos)
    for line in (*unread_texts(config, session.photos, state.pair.encoder), *doubts(config, state.pair)):
        session.on_message(line)
    return state


def _train_to_end(state: TrainingState, run: Run, session: _Session) -> TrainResult:
    from echodistill_cli.evaluation.report import report_of_run
    from echodistill_cli.outputs.export import write_results
    from echodistill_cli.training.loop import train_to_end

    start = f"continuing after {state.place}" if state.step or state.head_start_step else "from the start"
    session.on_message(f"Training in {run.folder}, {start}")
    train_to_end(state, run, session.on_step, session.on_message, session.stop)
    result = write_results(state.pair, state.state_dict(), run, session.started, session.on_message)
    report = report_of_run(run, session.photos)
    session.on_message(f"Photos, previews and losses on one page: {report}")
    return replace(result, report=report)


def train_many(request: ManyRequest, *, on_event: OnEvent = _ignore, on_message: OnMessage = _ignore) -> Many:
    """Train every subject of a manifest, each in a process of its own; a second call resumes.

    Raises:
        ConfigError: the manifest, a setting or the engine is wrong; nothing was started.
        PhotoError: a subject has too few usable photos; nothing was started.
        Interrupted: SIGINT or SIGTERM stopped the subjects that ran; their states are saved.
    """
    return batch.train_many(request, train, on_event, on_message)


def plan_many(request: ManyRequest, *, on_message: OnMessage = _ignore) -> tuple[PlannedSubject, ...]:
    """Return what `train_many` would do, and raise what it would raise before it starts. Loads no model."""
    return batch.plan_many(request, train, on_message)


def resumed_config(overrides: Mapping[str, Any]) -> Config:
    """Return the settings of the run to resume, with some of them changed.

    Args:
        overrides: changed settings by dotted key. The output, name, token, class or photos also select the run; without
            any of them it is the newest run.

    Raises:
        ConfigError: there is no such run, or a key or value is wrong.
    """
    selecting = {"run.output", "run.name", "concept.token", "concept.class_name", "concept.photos"}
    run = open_run(build_config(overrides=overrides).output) if selecting & set(overrides) else newest_run()
    tables = config_to_dict(run.config)
    for key, value in {**overrides, "run.output": str(run.folder)}.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return config_from_dict(tables)


def plan(config: Config) -> Plan:
    """Return what `train` would do: photos, models, downloads, memory. Loads no model.

    Raises:
        ConfigError: a setting is wrong.
        PhotoError: there are too few usable photos.
    """
    report = check_before(config)
    from echodistill_cli.planning import check_settings, plan_run

    check_settings(config)
    return plan_run(config, len(report.photos), tuple(warnings_before(config, report)))


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
    check_vram(build({}).model.student, vram)  # without torch
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
    request.check_paths()  # without torch
    from echodistill_cli.outputs.sample import sample as sample_images

    return sample_images(request, on_message)


def write_samples(
    request: SampleRequest,
    folder: Path,
    *,
    on_message: OnMessage = _ignore,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> WrittenSamples:
    """Generate images and write one PNG each, and a grid of all; nothing is overwritten.

    Args:
        request: what to generate.
        folder: of the images.
        on_message: called with lines about progress.
        on_image: called with the number of finished images and of all.

    Raises:
        EchoDistillError: a file cannot be written, or any error of `sample`.
    """
    request.check_paths(folder)
    from echodistill_cli.outputs.sample import write_samples as write_images

    return write_images(request, folder, on_message, on_image)


def export(request: ExportRequest, *, on_message: OnMessage = _ignore) -> ExportResult:
    """Write LoRA files, merged models or ONNX graphs for other tools, and push them to the hub on request.

    Raises:
        ConfigError: there is no such run, or a file exists already.
        ModelError: a model is missing, or the LoRA does not fit it.
        EchoDistillError: a file cannot be written or pushed.
    """
    request.check_paths()  # without torch
    from echodistill_cli.outputs.export import export as write_export

    return write_export(request, on_message)


def evaluate(request: EvaluationRequest, *, on_message: OnMessage = _ignore) -> Evaluation:
    """Generate what is missing, score it with CLIP-I, DINO and CLIP-T, and write `evaluation.json`.

    Raises:
        ConfigError: there is no LoRA, or its subject is not known.
        PhotoError: there is no usable photo.
        ModelError: a model or an encoder is missing or does not fit.
    """
    request.sampling.check_paths(request.output)
    from echodistill_cli.evaluation.evaluate import evaluate as score_images

    return score_images(request, on_message)


def benchmark(request: BenchmarkRequest, *, on_event: OnEvent = _ignore, on_message: OnMessage = _ignore) -> Benchmark:
    """Train, generate and score every DreamBench subject that has no result yet, as `train_many` does.

    Raises:
        ConfigError: the checkout is incomplete, or a run was made with other settings.
        ModelError: a model or an encoder is missing or does not fit.
        Interrupted: SIGINT or SIGTERM came; the same call continues from there.
    """
    from echodistill_cli.evaluation.dreambench import run_benchmark

    return run_benchmark(request, train, on_message, on_event)


def check(folder: Path, *, resolution: int = 512, masks: str = "auto", captions: bool = True) -> PhotoReport:
    """Return a verdict on each file of a folder of photos. Loads no model.

    Args:
        folder: the photos.
        resolution: side of the training images, in pixels.
        masks: "off" ignores subject masks.
        captions: read the .txt files.

    Raises:
        PhotoError: the folder is missing or cannot be read.
    """
    from echodistill_cli.data.photos import check_photos

    return check_photos(folder, resolution=resolution, masks=masks, captions=captions)


def require_photos(report: PhotoReport, folder: Path, min_photos: int) -> None:
    """Raise PhotoError, with the skipped files, if a report has fewer than `min_photos` usable ones."""
    from echodistill_cli.data.photos import require_enough

    require_enough(report, folder, min_photos)


def inspect(file: Path) -> Inspection:
    """Return what a LoRA or token file, or the LoRA file of a run, is, and which tools load it.

    Raises:
        ConfigError: the file does not exist, or the run is not finished.
        ModelError: the file is damaged or not a safetensors file.
    """
    SampleRequest([], lora=file).check_paths()  # without torch
    from echodistill_cli.lora.inspect import inspect_file
    from echodistill_cli.outputs.artifact import find

    return inspect_file(find(file).lora("student") if file.is_dir() else file)


def download(request: DownloadRequest) -> Downloaded:
    """Download all that training with a model loads. Files that are here already are kept.

    Raises:
        ConfigError: the folder of the copy exists already.
        ModelError: a model does not exist, or the hub cannot be reached or refuses it.
        EchoDistillError: the folder of the copy cannot be written.
    """
    from echodistill_cli.models.downloads import download as download_models

    return download_models(request)


def live(request: LiveRequest, *, on_message: OnMessage = _ignore, on_ready: Callable[[str], None] = _ignore) -> None:
    """Serve the page that draws while a person types, until a signal; `on_ready` receives its address."""
    from echodistill_cli.live.server import serve

    serve(request, on_message, on_ready)


def doctor() -> Diagnosis:
    """Return versions, devices and memory of this machine, and what it can train. Opens no socket."""
    from echodistill_cli.planning import diagnose

    return diagnose()
