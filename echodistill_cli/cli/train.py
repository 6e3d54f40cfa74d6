"""`train`: config from flags, one pipeline call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from echodistill_cli.cli.options import (
    Json,
    Quiet,
    bool_option,
    echo_setting,
    quiet_libraries,
    value_option,
    with_flags,
)
from echodistill_cli.cli.show import TrainingProgress, plan_table, print_paths, print_table, say_to, stderr_console
from echodistill_cli.config.build import PRESETS, build_config
from echodistill_cli.errors import ConfigError
from echodistill_cli.runs import resumed_config

MODELS = f"{', '.join(PRESETS)}, a hub id, a folder or a .safetensors file"
ALSO = "Names that other trainers use, such as --network_dim, --learning_rate and --max_train_steps, are understood."


@with_flags
def train(
    photos: Annotated[
        Path | None, typer.Argument(metavar="PHOTOS", help="folder with three to six photos of the subject")
    ] = None,
    model: Annotated[str | None, value_option("MODEL", f"the student: {MODELS} [dim]\\[sd-turbo][/dim]")] = None,
    config_file: Annotated[
        Path | None, value_option("FILE", "settings as TOML; flags go before them", "--config")
    ] = None,
    vram: Annotated[
        str | None,
        value_option("8|12|16|24|auto", "choose what fits into so many GiB, under all other flags", panel="Models"),
    ] = None,
    resume: Annotated[bool, bool_option("--resume", "go on with a run, by default the newest", "Run")] = False,
    from_step: Annotated[int | None, value_option("N", "with --resume: the checkpoint's step", panel="Run")] = None,
    overwrite: Annotated[bool, bool_option("--overwrite", "replace the run that is there", "Run")] = False,
    echo: Annotated[
        bool | None, bool_option("--echo/--no-echo", "the student's own pictures train both models", "Echo phase")
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
        raise ConfigError("--from-step says where to --resume.", "Use both, or neither.")
    overrides = dict(flags) | ({} if photos is None else {"concept.photos": str(photos)})
    own = resume and model is None and config_file is None
    build = functools.partial(build_config, model, config_file)
    layered = resumed_config if own else build
    overrides |= echo_setting(echo, flags, lambda: layered(overrides))
    config = layered(overrides)
    if not config.concept.photos:
        raise ConfigError("No photos were named.", "echodistill train PHOTOS --token sks --class-name dog")
    quiet_libraries(offline=config.model.offline, quiet=quiet)
    from echodistill_cli import pipeline

    if vram is not None and not own:
        config = pipeline.suited(functools.partial(build, overrides), vram, say_to(stderr_console(), quiet=quiet))
    if dry_run:
        plan = pipeline.plan(config)
        print_table(plan, plan_table(plan), as_json=as_json)
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
    print_paths(result.to_dict(), [result.lora], as_json=as_json)
