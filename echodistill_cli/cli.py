"""The command line: parse, build a `Config`, make one pipeline call, print. torch is imported inside the commands only.

stdout carries the result (a path, or with --json one object); stderr carries progress and errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from echodistill_cli import __version__
from echodistill_cli.errors import ConfigError, EchoDistillError, Interrupted
from echodistill_cli.flags import with_flags
from echodistill_cli.libraries import prepare_libraries
from echodistill_cli.presets import PRESETS, build_config

app = typer.Typer(
    name="echodistill",
    help="Personalize one-step text-to-image models: a few photos and a rare word in, a LoRA out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--pretrained-model-name-or-path",
        help=f"{', '.join(PRESETS)}, a hub id, a folder or a .safetensors file [dim]\\[sd-turbo][/dim]",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; flags go before it")]


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    """Options of the program itself."""
    if version:
        typer.echo(f"echodistill {__version__}")
        raise typer.Exit


@app.command()
@with_flags()
def train(
    photos: Annotated[Path | None, typer.Argument(help="folder with three to six photos of the subject")] = None,
    model: ModelName = None,
    config_file: ConfigFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --output")] = False,
    from_step: Annotated[int | None, typer.Option("--from-step", help="with --resume: the checkpoint's step")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in --output")] = False,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="let the student's pictures train both models")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check photos and settings, write nothing")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    *,
    flags: Mapping[str, Any],
) -> None:
    """Learn a subject from photos: [bold]echodistill train ./photos --token sks --class-name dog[/bold]"""
    overrides = dict(flags) | ({} if echo else {"echo.start": None})
    if photos is not None:
        overrides["concept.photos"] = str(photos)
    config = build_config(model, config_file, overrides)
    if not config.concept.photos:
        raise ConfigError("No photos were named.", "echodistill train PHOTOS --token sks --class-name dog")
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other.", "Use one of them.")
    prepare_libraries(offline=config.model.offline, quiet=quiet)
    from echodistill_cli import pipeline
    from echodistill_cli.progress import TrainingProgress

    if dry_run:
        _print_result(pipeline.plan(config), as_json)
        return
    with TrainingProgress(_stderr(), config.train.steps, quiet=quiet) as progress:
        result = pipeline.train(
            config,
            overwrite=overwrite,
            resume=resume,
            from_step=from_step,
            observe=progress.observe,
            say=progress.say,
        )
    _print_result(result.to_dict(), as_json, result.lora)


@app.command()
def sample(
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="what to draw; may be repeated")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="a text file, one prompt per line")] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="pictures per prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of a prompt's first picture")] = 0,
    lora: Annotated[Path | None, typer.Option("--lora", help="LoRA file or run folder; unset: the newest run")] = None,
    lora_scale: Annotated[float, typer.Option("--lora-scale", help="strength; 1 is as trained")] = 1.0,
    role: Annotated[Literal["student", "teacher"], typer.Option(help="who draws")] = "student",
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps [dim]\\[1; teacher 25][/dim]")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "--guidance-scale", min=0, help="[dim]\\[0; teacher 7.5][/dim]")
    ] = None,
    size: Annotated[int | None, typer.Option("--size", "--resolution", min=16, help="side in pixels")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="pictures at once")] = 4,
    compare: Annotated[bool, typer.Option("--compare", help="draw the base model's pictures beside")] = False,
    model: ModelName = None,
    teacher: Annotated[str | None, typer.Option(help="with --model and --role teacher")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16, fp16 or fp32")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="open no socket")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the pictures")] = Path("samples"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw with a trained LoRA: [bold]echodistill sample --prompt "a photo of a sks dog on the beach"[/bold]"""
    prompts = [*(prompt or []), *_read_prompts(prompt_file)]
    if not prompts:
        raise ConfigError("Nothing to draw.", 'Say what: --prompt "a photo of a sks dog on the beach"')
    prepare_libraries(offline=offline, quiet=quiet)
    from echodistill_cli import pipeline

    request = pipeline.SampleRequest(
        prompts=prompts,
        count=num,
        seed=seed,
        lora=lora,
        lora_scale=lora_scale,
        role=role,
        steps=steps,
        guidance_scale=guidance,
        size=size,
        batch_size=batch_size,
        compare=compare,
        model=model,
        model_overrides=_given(teacher=teacher, device=device, precision=precision, offline=offline or None),
    )
    written = pipeline.sample_to_folder(request, output, say=_say(quiet))
    _print_result(written.to_dict(), as_json, *written.files, written.grid)


@app.command()
def export(
    run: Annotated[Path | None, typer.Argument(help="run folder; unset: the newest")] = None,
    role: Annotated[Literal["student", "teacher", "both"], typer.Option(help="whose LoRA")] = "student",
    layout: Annotated[
        Literal["kohya", "diffusers", "both"], typer.Option("--format", help="kohya is read by every tool")
    ] = "kohya",
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="of the tensors")] = "fp16",
    metadata: Annotated[bool, typer.Option("--metadata/--no-metadata", help="say in the file how it was made")] = True,
    step: Annotated[int | None, typer.Option(help="of the checkpoint; unset: the newest")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="folder; unset: RUN/export")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there")] = False,
    as_json: Json = False,
) -> None:
    """Write LoRA files from a run's checkpoint."""
    prepare_libraries(offline=False, quiet=True)
    from echodistill_cli import pipeline
    from echodistill_cli.export import ExportSettings

    files = pipeline.export(
        run,
        roles=("student", "teacher") if role == "both" else (role,),
        layouts=("kohya", "diffusers") if layout == "both" else (layout,),
        output=output,
        step=step,
        overwrite=overwrite,
        settings=ExportSettings(dtype=dtype, metadata=metadata),
    )
    _print_result({"files": [str(file) for file in files]}, as_json, *files)


@app.command()
def check(
    photos: Annotated[Path, typer.Argument(help="folder of photos")],
    resolution: Annotated[int, typer.Option(min=16, help="side that training will use")] = 512,
    min_photos: Annotated[int, typer.Option("--min-photos", min=1, help="fewest usable photos")] = 3,
    masks: Annotated[Literal["auto", "off"], typer.Option(help="auto: alpha and masks/ say what is subject")] = "auto",
    captions: Annotated[bool, typer.Option("--captions/--no-captions", help="read sidecar .txt files")] = True,
    as_json: Json = False,
) -> None:
    """Look at every photo as training would, and say what is wrong with each."""
    from echodistill_cli import photos as checking
    from echodistill_cli.report import photo_table

    report = checking.check_photos(photos, resolution=resolution, masks=masks, captions=captions)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        Console().print(photo_table(report))
    checking.require_enough(report, photos, min_photos)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="a .safetensors file")], as_json: Json = False) -> None:
    """Say what a LoRA or token file is, and which tools load it."""
    from echodistill_cli.inspection import inspect_file
    from echodistill_cli.report import inspection_table

    found = inspect_file(file)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        Console().print(inspection_table(found))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and memory, and what this machine can train."""
    prepare_libraries(offline=True, quiet=True)
    from echodistill_cli.doctor import diagnose
    from echodistill_cli.report import diagnosis_table

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        Console().print(diagnosis_table(found))


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; turns every `EchoDistillError` into one line and its exit code."""
    arguments = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        app(args=arguments, prog_name="echodistill")
    except Interrupted as stopped:
        _fail(stopped, 128 + stopped.signal_number)
    except EchoDistillError as error:
        _fail(error, error.exit_code)


def _dashed(argument: str) -> str:
    """`--batch_size=2` as `--batch-size=2`: users of other trainers type underscores."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {file}: it cannot be read ({error}).") from error
    return [line.strip() for line in lines if line.strip()]


def _stderr() -> Console:
    return Console(stderr=True)


def _say(quiet: bool) -> Any:
    console = _stderr()
    return (
        (lambda _line: None)
        if quiet
        else lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    )


def _print_result(result: Mapping[str, Any], as_json: bool, *paths: Path | None) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    for path in paths:
        if path is not None:
            typer.echo(str(path))
    if not paths:
        for key, value in result.items():
            typer.echo(f"{key}: {value}")


def _fail(error: EchoDistillError, code: int) -> NoReturn:
    _stderr().print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
