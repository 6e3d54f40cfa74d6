"""The `evaluate` command: CLIP-I, DINO and CLIP-T of a run or LoRA, or of every subject of DreamBench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from echodistill_cli import pipeline
from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.sample import (
    BatchSize,
    Device,
    Guidance,
    LoraScale,
    Model,
    Precision,
    Role,
    Seed,
    Size,
    Steps,
    Teacher,
    parse_seed,
    read_prompts,
)
from echodistill_cli.cli.show import (
    benchmark_table,
    evaluation_table,
    print_table,
    say_to,
    stderr_console,
)
from echodistill_cli.cli.train_many import ON, ManyProgress
from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError

_ENCODERS = "Encoders"
_DREAMBENCH = "DreamBench"
_SOURCE = "hub id (@revision) or folder; auto: the paper's, or the embedded one for an embedded student"


def evaluate(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN|LORA", help="run folder or LoRA file; unset: the newest run")
    ] = None,
    photos: Annotated[
        Path | None, value_option("DIR", "folder of real photos of the subject; unset: those of the training")
    ] = None,
    prompts: Annotated[
        Path | None,
        value_option("FILE", "text file with one prompt per line, {} for the subject; unset: 16 built-in prompts"),
    ] = None,
    token: Annotated[str | None, value_option("WORD", "token of the subject; unset: the one in the LoRA file")] = None,
    class_name: Annotated[
        str | None, value_option("WORD", "what the subject is; unset: the class in the LoRA file")
    ] = None,
    output: Annotated[
        Path | None,
        value_option("FOLDER", "folder for evaluation.json and the images; unset: in the run", "--output", "-o"),
    ] = None,
    offline: Annotated[
        bool | None, bool_option("--offline/--no-offline", "do not use the network; unset: as in training")
    ] = None,
    html: Annotated[
        bool, bool_option("--html", "write a page, report.html, with photos, images and scores; score the base too")
    ] = False,
    seeds: Annotated[int, value_option("N", "images per prompt", panel="Generation", min=1)] = 4,
    seed: Seed = "0",
    lora_scale: LoraScale = 1.0,
    role: Role = "student",
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    batch_size: BatchSize = 4,
    model: Model = None,
    teacher: Teacher = None,
    device: Device = None,
    precision: Precision = None,
    clip: Annotated[
        str, value_option("MODEL", f"CLIP model of CLIP-I and CLIP-T: {_SOURCE}", panel=_ENCODERS)
    ] = "auto",
    dino: Annotated[str, value_option("MODEL", f"ViT of the DINO score: {_SOURCE}", panel=_ENCODERS)] = "auto",
    dreambench: Annotated[
        Path | None,
        value_option("DIR", "checkout of google/dreambooth: train and score its subjects", panel=_DREAMBENCH),
    ] = None,
    subject: Annotated[
        list[str] | None,
        value_option("NAME", "subject to run; may be given several times; unset: all", panel=_DREAMBENCH),
    ] = None,
    config_file: Annotated[
        Path | None, value_option("FILE", "settings of the training as TOML", "--config", panel=_DREAMBENCH)
    ] = None,
    train_steps: Annotated[
        int | None, value_option("N", "training steps of each subject", panel=_DREAMBENCH, min=1)
    ] = None,
    on: Annotated[str | None, value_option("ENGINE", f"{ON} [dim]\\[local][/dim]", panel=_DREAMBENCH)] = None,
    workers: Annotated[
        int | None,
        value_option("N", "subjects at once; unset: one per GPU, or one on a CPU", panel=_DREAMBENCH, min=1),
    ] = None,
    gpus_per_subject: Annotated[
        float | None,
        value_option("X", "GPUs that a subject takes, such as 0.5; unset: 1 where there are GPUs", panel=_DREAMBENCH),
    ] = None,
    store: Annotated[
        str | None, value_option("URL", "also keep every run there, such as s3://bucket/bench", panel=_DREAMBENCH)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score subject and prompt of generated images: [bold]echodistill evaluate --photos ./photos[/bold]"""
    _check_options(
        dreambench,
        evaluation_only={"RUN|LORA": source, "--photos": photos, "--class-name": class_name, "--html": html},
        benchmark_only={
            **{"--subject": subject, "--config": config_file, "--train-steps": train_steps, "--on": on},
            **{"--workers": workers, "--gpus-per-subject": gpus_per_subject, "--store": store},
        },
    )
    templates = _read_templates(prompts) if prompts else ()
    quiet_libraries(offline=bool(offline), quiet=quiet)
    options = {"teacher": teacher, "device": device, "precision": precision, "offline": offline}
    overrides = {key: value for key, value in options.items() if value is not None}
    sampling = pipeline.SampleRequest(
        prompts=templates,
        count=seeds,
        seed=parse_seed(seed, say_to(stderr_console(), quiet=quiet)),
        lora=source,
        lora_scale=lora_scale,
        role=role,
        steps=steps,
        guidance_scale=guidance,
        size=size,
        batch_size=batch_size,
        model=model if dreambench is None else None,
        model_overrides=overrides,
    )
    if dreambench is not None:
        config = _training_config(model, config_file, {"concept.token": token, "train.steps": train_steps}, overrides)
        output = output or Path("dreambench")
        engine = pipeline.EngineRequest(on or "local", workers, gpus_per_subject)
        benchmark = pipeline.BenchmarkRequest(
            *(dreambench, output, config, sampling), subject or (), clip, dino, engine, store or ""
        )
        _run_benchmark(benchmark, as_json=as_json, quiet=quiet)
    else:
        evaluation = pipeline.EvaluationRequest(photos, sampling, token, class_name, clip, dino, output, html)
        _run_evaluation(evaluation, as_json=as_json, quiet=quiet)


def _check_options(
    dreambench: Path | None, *, evaluation_only: Mapping[str, Any], benchmark_only: Mapping[str, Any]
) -> None:
    """Check that no option belongs to the other kind of evaluation."""
    misplaced, reason = evaluation_only, "cannot be combined with --dreambench."
    if dreambench is None:
        misplaced, reason = benchmark_only, "has no effect without --dreambench."
    for name, value in misplaced.items():
        if value:
            raise ConfigError(f"{name} {reason}", "See: echodistill evaluate --help")


def _training_config(
    model: str | None, file: Path | None, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Config:
    """Return the settings that all runs of the benchmark share."""
    settings = dict(settings) | {f"model.{key}": value for key, value in overrides.items()}
    return build_config(model, file, {key: value for key, value in settings.items() if value is not None})


def _run_evaluation(request: pipeline.EvaluationRequest, *, as_json: bool, quiet: bool) -> None:
    result = pipeline.evaluate(request, on_message=say_to(stderr_console(), quiet=quiet))
    files = {"file": str(result.file)} | ({"report": str(result.report)} if result.report else {})
    print_table({**files, **result.to_dict()}, evaluation_table(result), as_json=as_json)


def _run_benchmark(request: pipeline.BenchmarkRequest, *, as_json: bool, quiet: bool) -> None:
    console = stderr_console()
    with ManyProgress(console, quiet=quiet) as progress:
        result = pipeline.benchmark(request, on_event=progress.on_event, on_message=say_to(console, quiet=quiet))
    print_table(result.to_dict(), benchmark_table(result), as_json=as_json)


def _read_templates(file: Path) -> list[str]:
    """Return the prompts of a file; each must have a place for the subject."""
    templates = read_prompts("--prompts", file)
    for template in templates:
        if "{}" not in template and "{subject}" not in template:
            raise ConfigError(
                f"--prompts {file}: {template!r} has no place for the subject.", "Write {} in place of the subject."
            )
    if not templates:
        raise ConfigError(f"--prompts {file} has no prompt.", "Write one per line, with {} in place of the subject.")
    return templates
