"""`train`: build a configuration from flags, `--set` and a file, and make one pipeline call."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from echodistill_cli import pipeline
from echodistill_cli.cli.options import (
    LOSSES_AND_ECHO,
    MODELS_AND_MEMORY,
    RUN,
    Json,
    Quiet,
    bool_option,
    echo_setting,
    naming_flags,
    quiet_libraries,
    value_option,
    with_flags,
    with_settings,
)
from echodistill_cli.cli.progress import TrainingProgress
from echodistill_cli.cli.show import plan_table, print_paths, print_table, say_to, stderr_console
from echodistill_cli.config.build import PRESETS, build_config, config_to_toml, json_schema
from echodistill_cli.errors import ConfigError

MODELS = f"{', '.join(PRESETS)}, a hub id, a folder or a .safetensors file"
ALSO = (
    "All settings, for --set and --config: examples/train.toml. "
    "Names that other trainers use, such as --network_dim, --learning_rate and --max_train_steps, are understood."
)


Vram = Annotated[
    str | None, value_option("GIB", "fit settings to device memory: 8, 12, 16, 24 or auto", panel=MODELS_AND_MEMORY)
]


@with_flags
def train(
    photos: Annotated[
        Path | None, typer.Argument(metavar="PHOTOS", help="folder with three to six photos", readable=False)
    ] = None,
    model: Annotated[str | None, value_option("MODEL", f"student: {MODELS} [dim]\\[sd-turbo][/dim]")] = None,
    config_file: Annotated[Path | None, value_option("FILE", "TOML file with settings", "--config")] = None,
    settings: Annotated[
        list[str] | None, value_option("KEY=VALUE", "any setting, such as train.target_steps=5; repeatable", "--set")
    ] = None,
    vram: Vram = None,
    resume: Annotated[bool, bool_option("--resume", "continue the newest run, or that of --output", RUN)] = False,
    from_step: Annotated[int | None, value_option("N", "checkpoint from which to --resume", panel=RUN)] = None,
    overwrite: Annotated[bool, bool_option("--overwrite", "replace an existing run", RUN)] = False,
    echo: Annotated[
        bool | None,
        bool_option("--echo/--no-echo", "check the student's images; then train the teacher from it", LOSSES_AND_ECHO),
    ] = None,
    dry_run: Annotated[bool, bool_option("--dry-run", "check photos and settings; load and write nothing")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    flags: Mapping[str, Any],
) -> None:
    """Learn a subject from photos: [bold]echodistill train ./photos --token sks --class-name dog[/bold]"""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other.", "Use one of them.")
    if from_step is not None and not resume:
        raise ConfigError("--from-step needs --resume.", "Use both, or neither.")
    if resume and photos is not None and (photos / "config.toml").is_file():
        raise ConfigError(f"PHOTOS {photos} is a run folder.", f"Run echodistill train --resume --output {photos}")
    flags = flags if photos is None else {**flags, "concept.photos": str(photos)}
    flags = flags if model is None else {**flags, "model.student": model}
    overrides = with_settings(flags, settings or ())
    model = overrides.pop("model.student", None)
    is_resumed = resume and model is None and config_file is None
    build = functools.partial(build_config, model, config_file)
    layered = pipeline.resumed_config if is_resumed else build
    with nullcontext() if is_resumed else naming_flags(flags):
        overrides |= echo_setting(echo, overrides, flags, lambda: layered(overrides))
        config = layered(overrides)
    if not config.concept.photos:
        raise ConfigError(
            "The folder of photos is missing.", "Run echodistill train PHOTOS --token sks --class-name dog."
        )
    quiet_libraries(offline=config.model.offline, quiet=quiet)
    if vram is not None and not is_resumed:
        on_message = say_to(stderr_console(), quiet=quiet)
        config = pipeline.fit_to_memory(functools.partial(build, overrides), vram, on_message)
    if dry_run:
        plan = pipeline.plan(config)
        print_table(plan.to_dict(), plan_table(plan, resume=resume, overwrite=overwrite), as_json=as_json)
        return
    with TrainingProgress(stderr_console(), config, quiet=quiet) as progress:
        result = pipeline.train(
            config,
            overwrite=overwrite,
            resume=resume,
            from_step=from_step,
            on_step=progress.on_step,
            on_message=progress.on_message,
        )
        progress.show_end(result.run)
    print_paths(result.to_dict(), [result.lora], as_json=as_json)


def config(
    model: Annotated[str | None, value_option("MODEL", f"student: {MODELS} [dim]\\[sd-turbo][/dim]")] = None,
    config_file: Annotated[Path | None, value_option("FILE", "TOML file with settings", "--config")] = None,
    settings: Annotated[
        list[str] | None, value_option("KEY=VALUE", "any setting, such as train.target_steps=5; repeatable", "--set")
    ] = None,
    schema: Annotated[bool, bool_option("--schema", "print the JSON Schema of a configuration file instead")] = False,
) -> None:
    """Print all settings of `train` as TOML, as a preset, a file and --set decide them."""
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    overrides = with_settings({} if model is None else {"model.student": model}, settings or ())
    typer.echo(config_to_toml(build_config(overrides.pop("model.student", None), config_file, overrides)), nl=False)
