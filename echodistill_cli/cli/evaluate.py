"""The `evaluate` command: CLIP-I, DINO and CLIP-T of a run or LoRA, or of every subject of DreamBench."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.show import (
    TrainingProgress,
    benchmark_table,
    evaluation_table,
    print_table,
    say_to,
    stderr_console,
)
from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError

_DRAWING = "How pictures are drawn"
_JUDGES = "Encoders"
_WHOLE = "The whole of DreamBench"
_ENCODER = "hub id (@revision) or folder; auto: the paper's, or the embedded pair's own"


def evaluate(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN|LORA", help="run folder or LoRA file; unset: the newest run")
    ] = None,
    photos: Annotated[Path | None, value_option("DIR", "real photos of the subject")] = None,
    prompts: Annotated[
        Path | None, value_option("FILE", "one per line, {} for the subject; unset: 16 of our own")
    ] = None,
    token: Annotated[str | None, value_option("WORD", "of the subject; unset: the run's, or the file's")] = None,
    class_name: Annotated[
        str | None, value_option("WORD", "what the subject is; unset: the run's, or the file's")
    ] = None,
    output: Annotated[
        Path | None, value_option("FOLDER", "for evaluation.json and pictures; unset: in the run", "--output", "-o")
    ] = None,
    seeds: Annotated[int, value_option("N", "pictures per prompt", panel=_DRAWING, min=1)] = 4,
    seed: Annotated[
        int, value_option("N", "of a prompt's first picture; the next count up", panel=_DRAWING, min=0)
    ] = 0,
    lora_scale: Annotated[
        float, value_option("X", "strength; 1 is as trained, 0 the base model: the row to compare with", panel=_DRAWING)
    ] = 1.0,
    role: Annotated[Literal["student", "teacher"], value_option("NAME", "who draws", panel=_DRAWING)] = "student",
    steps: Annotated[
        int | None, value_option("N", "denoising steps [dim]\\[student 1, teacher 25][/dim]", panel=_DRAWING, min=1)
    ] = None,
    guidance: Annotated[
        float | None, value_option("X", "guidance [dim]\\[student 0, teacher the run's][/dim]", panel=_DRAWING, min=0)
    ] = None,
    size: Annotated[
        int | None, value_option("N", "side in pixels; unset: as in training", panel=_DRAWING, min=16)
    ] = None,
    batch_size: Annotated[int, value_option("N", "pictures at once; changes speed only", panel=_DRAWING, min=1)] = 4,
    model: Annotated[
        str | None, value_option("MODEL", "as of sample, and of train; unset: the run's", panel=_DRAWING)
    ] = None,
    teacher: Annotated[str | None, value_option("MODEL", "with --model", panel=_DRAWING)] = None,
    device: Annotated[
        str | None, value_option("NAME", "auto, cpu, cuda or mps; unset: the run's", panel=_DRAWING)
    ] = None,
    precision: Annotated[
        str | None, value_option("NAME", "auto, bf16, fp16 or fp32; unset: the run's", panel=_DRAWING)
    ] = None,
    clip: Annotated[str, value_option("MODEL", f"a whole CLIP: {_ENCODER}", panel=_JUDGES)] = "auto",
    dino: Annotated[str, value_option("MODEL", f"a ViT: {_ENCODER}", panel=_JUDGES)] = "auto",
    dreambench: Annotated[
        Path | None, value_option("DIR", "checkout of google/dreambooth: train and measure its subjects", panel=_WHOLE)
    ] = None,
    subject: Annotated[
        list[str] | None, value_option("NAME", "only this one; may come many times", panel=_WHOLE)
    ] = None,
    config_file: Annotated[
        Path | None, value_option("FILE", "of the training, as TOML", "--config", panel=_WHOLE)
    ] = None,
    train_steps: Annotated[int | None, value_option("N", "of each subject's training", panel=_WHOLE, min=1)] = None,
    offline: Annotated[
        bool | None, bool_option("--offline/--no-offline", "open no socket; unset: as in training")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure subject and prompt in drawn pictures: [bold]echodistill evaluate --photos ./photos[/bold]"""
    whole = {"--subject": subject, "--config": config_file, "--train-steps": train_steps}
    single = {"RUN|LORA": source, "--photos": photos, "--class-name": class_name}
    _refuse(single if dreambench else whole, "does not go with" if dreambench else "needs")
    if photos is None and dreambench is None:
        raise ConfigError("No real photos were named to compare with.", "echodistill evaluate RUN --photos DIR")
    templates = () if prompts is None else _read_templates(prompts)
    quiet_libraries(offline=bool(offline), quiet=quiet)
    given = {"teacher": teacher, "device": device, "precision": precision, "offline": offline}
    changed = {key: value for key, value in given.items() if value is not None}
    drawing: dict[str, Any] = {
        "prompts": templates,
        "count": seeds,
        "seed": seed,
        "lora_scale": lora_scale,
        "role": role,
        "steps": steps,
        "guidance_scale": guidance,
        "size": size,
        "batch_size": batch_size,
        "model_overrides": changed,
    }
    on_message = say_to(stderr_console(), quiet=quiet)
    if photos is not None:
        subjects = {"token": token, "class_name": class_name, "clip": clip, "dino": dino, "output": output}
        found = _measure(photos, {**drawing, "lora": source, "model": model}, subjects, on_message)
        print_table({"file": str(found.file), **found.to_dict()}, evaluation_table(found), as_json=as_json)
    elif dreambench is not None:
        training = {
            "concept.token": token,
            "train.steps": train_steps,
            **{f"model.{key}": changed[key] for key in changed},
        }
        overrides = {key: value for key, value in training.items() if value is not None}
        build = functools.partial(_build, model, config_file, overrides)
        settings = {"build": build, "names": subject or (), "clip": clip, "dino": dino}
        with TrainingProgress(stderr_console(), build({}), quiet=quiet) as progress:
            result = _benchmark(dreambench, output or Path("dreambench"), drawing, settings, progress)
        print_table(result.to_dict(), benchmark_table(result), as_json=as_json)


def _measure(
    photos: Path, drawing: Mapping[str, Any], settings: Mapping[str, Any], on_message: Callable[[str], None]
) -> Any:
    from echodistill_cli import pipeline

    request = pipeline.EvaluationRequest(photos, pipeline.SampleRequest(**drawing), **settings)
    return pipeline.evaluate(request, on_message=on_message)


def _benchmark(
    folder: Path,
    output: Path,
    drawing: Mapping[str, Any],
    settings: Mapping[str, Any],
    progress: TrainingProgress,
) -> Any:
    from echodistill_cli import pipeline

    request = pipeline.BenchmarkRequest(folder, output, drawing=pipeline.SampleRequest(**drawing), **settings)
    return pipeline.benchmark(request, on_step=progress.on_step, on_message=progress.on_message)


def _build(model: str | None, file: Path | None, chosen: Mapping[str, Any], own: Mapping[str, Any]) -> Config:
    """A subject's configuration: its own settings over what was chosen for all."""
    return build_config(model, file, {**chosen, **own})


def _refuse(flags: Mapping[str, Any], how: str) -> None:
    for name, value in flags.items():
        if value:
            raise ConfigError(f"{name} {how} --dreambench.", "See: echodistill evaluate --help")


def _read_templates(file: Path) -> tuple[str, ...]:
    """The prompts of a file, each with a place for the subject."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file}: it cannot be read ({error}).") from error
    found = tuple(line.strip() for line in lines if line.strip())
    for line in found:
        if "{}" not in line and "{subject}" not in line:
            raise ConfigError(f"--prompts {file}: {line!r} has no place for the subject.", "Write {} where it stands.")
    if not found:
        raise ConfigError(f"--prompts {file}: it has no prompt.", "Write one per line, with {} for the subject.")
    return found
