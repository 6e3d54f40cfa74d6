"""The façade: one function per thing a person asks for. It wires objects together and holds no maths.

`train`, `sample`, `export`, `check` and `inspect` are what the command line calls, and what a program may call as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import config_to_dict
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import PhotoReport, check_photos, load_photos
from echodistill_cli.errors import ConfigError
from echodistill_cli.evaluation.dreambench import Benchmark, run_benchmark
from echodistill_cli.evaluation.evaluate import Evaluation, evaluate
from echodistill_cli.lora.inspect import Inspection, inspect_file
from echodistill_cli.models.sources import where
from echodistill_cli.outputs.export import ExportResult, TrainResult, check_name, export, write_results
from echodistill_cli.outputs.requests import BenchmarkRequest, EvaluationRequest, ExportRequest, SampleRequest
from echodistill_cli.outputs.sample import Sample, WrittenSamples, sample, write_samples
from echodistill_cli.planning import (
    assumptions,
    expected_memory,
    memory_lines,
    planned_downloads,
    sources_of,
    suit_device,
)
from echodistill_cli.runs import OnMessage, OnStep, Run, check_output, create_run, resume_run
from echodistill_cli.training.loop import check_trackers, train_to_end
from echodistill_cli.training.state import build_state

__all__ = [
    "Benchmark",
    "BenchmarkRequest",
    "Evaluation",
    "EvaluationRequest",
    "ExportRequest",
    "ExportResult",
    "Sample",
    "SampleRequest",
    "TrainResult",
    "WrittenSamples",
    "benchmark",
    "check",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "sample",
    "suited",
    "train",
    "write_samples",
]


def train(
    config: Config,
    *,
    overwrite: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    on_step: OnStep = lambda _metrics: None,
    on_message: OnMessage = lambda _line: None,
) -> TrainResult:
    """Learn a subject: photos in, LoRA files out.

    Args:
        overwrite: replace the run that is in the way. resume: go on with it, from its newest checkpoint or `from_step`.
        observe: called after each step with its metrics. say: called with lines on what is being done.

    Raises:
        EchoDistillError: any of its children; see there.
    """
    started = time.time()
    report = _check_before(config)
    for warning in _warnings(config, report):
        on_message(warning)
    if not resume:
        check_output(config, overwrite=overwrite)
    run = resume_run(config) if resume else None
    saved = _saved_state(run, from_step, len(report.photos)) if run else None
    for line in assumptions(config.model):
        on_message(line)
    on_message(f"Loading {config.model.student} and {config.model.teacher}, encoding {len(report.photos)} photos")
    state = build_state(config, report.photos)
    if run is None:
        run = create_run(config, overwrite=overwrite)
    else:
        if saved:
            state.load_state_dict(saved)
        run.rewind(state.step)
    begun = state.step or state.head_start_step
    on_message(f"Training in {run.folder}, {f'on from {state.place}' if begun else 'from the start'}")
    train_to_end(state, run, on_step, on_message)
    return write_results(state.pair, state.state_dict(), run, started, on_message)


def suited(
    build: Callable[[Mapping[str, Any]], Config], vram: str, on_message: OnMessage = lambda _line: None
) -> Config:
    """The configuration with what suits a device of `vram` GiB (or "auto") under what was set; says what it chose.

    Raises:
        ConfigError: nothing fits. ModelError: the model's size is not known.
    """
    chosen = suit_device(build, vram)
    for line in memory_lines(chosen):
        on_message(line)
    return build(chosen.settings)


def plan(config: Config) -> dict[str, Any]:
    """What `train` would do with a configuration: photos, models and where they are, steps; loads and writes nothing.

    Raises:
        PhotoError: the photos will not do. ConfigError: a setting is wrong.
    """
    report = _check_before(config)
    memory = expected_memory(config)
    return {
        "subject": config.subject,
        "photos": len(report.photos),
        "warnings": list(_warnings(config, report)),
        "models": {source: where(source) for source, _, _ in sources_of(config)},
        "assumptions": list(assumptions(config.model)),
        "downloads": {download.file: download.size for download in planned_downloads(config)},
        "memory": None if memory is None else {"gib": memory.total, "parts": dict(memory.parts)},
        "steps": config.train.steps,
        "echo_from_step": config.echo.start,
        "output": str(config.output),
        "output_exists": config.output.exists(),
        "config": config_to_dict(config),
    }


def _check_before(config: Config) -> PhotoReport:
    """The photos, after all that would otherwise be found wrong only when models are loaded, or a run has ended."""
    check_name(config)
    check_trackers(config.run.report_to)
    return load_photos(
        Path(config.concept.photos),
        min_photos=config.concept.min_photos,
        resolution=config.model.resolution,
        masks=config.concept.masks,
        captions=config.concept.captions,
    )


def _saved_state(run: Run, step: int | None, photos: int) -> dict[str, Any] | None:
    """What a run saved last, or at a step; None if it was stopped before it saved anything."""
    if step is None and not run.list_checkpoints():
        return None
    saved = run.load_checkpoint(step)
    if saved["photo_count"] != photos:
        raise ConfigError(
            f"{run.folder} was trained on {saved['photo_count']} photos, and {run.config.concept.photos} has {photos}.",
            "Resume with the same photos, or start anew in another --output.",
        )
    if saved["step"] > run.config.train.steps:
        raise ConfigError(
            f"{run.folder} is at step {saved['step']} already, beyond --steps {run.config.train.steps}.",
            f"End it there with --steps {saved['step']}, or go back with --from-step.",
        )
    return saved


def _warnings(config: Config, report: PhotoReport) -> Iterator[str]:
    for file in report.files:
        if file.verdict != "ok":
            yield f"{file.name}: {file.verdict}: {'; '.join(file.notes)}"
    yield from report.warnings
    wanting = {
        "--masks teacher": config.concept.masks == "teacher",
        "--recolour": config.concept.recolour,
        "--tint-scenes": config.concept.tint_scenes,
        "--prior-weight": config.loss.prior,
        "--class-share": config.replays and config.train.class_share,
        "--pair-share": config.replays and config.train.pair_share,
    }
    if config.concept.class_name is None and any(wanting.values()):
        yield f"Without --class-name nothing comes of {', '.join(flag for flag, on in wanting.items() if on)}."
    yield from _settings_without_effect(config)


def _settings_without_effect(config: Config) -> Iterator[str]:
    """A line for what was asked for in vain, with what it waits for."""
    train, start, once = config.train, config.echo.start, config.train.target_steps == 1
    in_vain = (
        ("--target-steps above 1", "--target-strength", once and train.target_strength < 1),
        ("--target-steps above 1", "--replays", once and train.replays),
        ("loss.latent above 0", "--replays", not config.loss.latent and train.replays),
        ("--replays", "--first-targets", train.first_targets and not train.replays),
        ("--replays", "--class-share", train.class_share and not train.replays),
        ("--replays", "--pair-share", train.pair_share and not train.replays),
    )
    yield from (f"Without {needed} nothing comes of {flag}." for needed, flag, vain in in_vain if vain)
    if train.scene_share and train.photo_prompts == train.batch_size:
        yield f"--scene-share {train.scene_share:g} of --batch-size {train.batch_size} is no whole sample: no scenes."
    if start is not None and start > train.steps:
        yield f"The echo would begin at step {start} of {train.steps}: there is none. --echo-start says when."


def benchmark(
    request: BenchmarkRequest,
    *,
    on_step: OnStep = lambda _metrics: None,
    on_message: OnMessage = lambda _line: None,
) -> Benchmark:
    """Train and score every subject of DreamBench that has no result yet."""
    return run_benchmark(request, train, on_message, on_step)


def check(folder: Path, *, resolution: int = 512, masks: str = "auto", captions: bool = True) -> PhotoReport:
    """A verdict on every file of a folder of photos; no model is loaded.

    Raises:
        PhotoError: the folder is missing, or has no picture.
    """
    return check_photos(folder, resolution=resolution, masks=masks, captions=captions)


def inspect(file: Path) -> Inspection:
    """What a LoRA or token file is, and which tools load it.

    Raises:
        ModelError: the file is missing, damaged or no safetensors file.
    """
    return inspect_file(file)
