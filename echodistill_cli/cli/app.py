"""The command line: parse, build a `Config`, make one pipeline call, print. torch is imported inside the commands only.

stdout carries the result (a path, or with --json one object); stderr carries progress and errors.
"""

from __future__ import annotations

import functools
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from echodistill_cli import __version__
from echodistill_cli.cli.evaluate import evaluate
from echodistill_cli.cli.export import export
from echodistill_cli.cli.flags import ALIASES
from echodistill_cli.cli.libraries import prepare_libraries
from echodistill_cli.cli.options import Json, Quiet, echo_setting, option, switch, understanding, with_flags
from echodistill_cli.cli.progress import TrainingProgress, print_error, say_to, stderr_console
from echodistill_cli.cli.report import (
    diagnosis_table,
    inspection_table,
    photo_table,
    plan_table,
    print_paths,
    print_table,
)
from echodistill_cli.config.build import build_config
from echodistill_cli.config.catalogue import PRESETS
from echodistill_cli.errors import ConfigError, DeviceMemoryError, EchoDistillError, Interrupted, is_out_of_memory
from echodistill_cli.runs import resumed_config
from echodistill_cli.training.signals import Terminated, terminating

app = typer.Typer(
    name="echodistill",
    help="Personalize one-step text-to-image models: a few photos and a rare word in, a LoRA out.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]} | understanding(),
    rich_markup_mode="rich",
)

_MODELS = f"{', '.join(PRESETS)}, a hub id, a folder or a .safetensors file"
_CFG = "classifier-free guidance"
_ALSO = "Names that other trainers use, such as --network_dim, --learning_rate and --max_train_steps, are understood."


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        print(f"echodistill {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[  # its callback does it, before Typer asks for a command
        bool, typer.Option("--version", metavar="", help="print the version", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command(context_settings=understanding(ALIASES), epilog=_ALSO)
@with_flags
def train(
    photos: Annotated[
        Path | None, typer.Argument(metavar="PHOTOS", help="folder with three to six photos of the subject")
    ] = None,
    model: Annotated[str | None, option("MODEL", f"the student: {_MODELS} [dim]\\[sd-turbo][/dim]")] = None,
    config_file: Annotated[Path | None, option("FILE", "settings as TOML; flags go before them", "--config")] = None,
    vram: Annotated[
        str | None,
        option("8|12|16|24|auto", "choose what fits into so many GiB, under all other flags", panel="Models"),
    ] = None,
    resume: Annotated[bool, switch("--resume", "go on with a run, by default the newest", "Run")] = False,
    from_step: Annotated[int | None, option("N", "with --resume: the checkpoint's step", panel="Run")] = None,
    overwrite: Annotated[bool, switch("--overwrite", "replace the run that is there", "Run")] = False,
    echo: Annotated[
        bool | None, switch("--echo/--no-echo", "the student's own pictures train both models", "Echo phase")
    ] = None,
    dry_run: Annotated[bool, switch("--dry-run", "check photos and settings; load and write nothing")] = False,
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
    prepare_libraries(offline=config.model.offline, quiet=quiet)
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
            observe=progress.observe,
            say=progress.say,
        )
    print_paths(result.to_dict(), [result.lora], as_json=as_json)


@app.command(context_settings=understanding({"--guidance-scale": "--guidance", "--resolution": "--size"}))
def sample(
    prompt: Annotated[list[str] | None, option("TEXT", "what to draw; may come many times", "--prompt", "-p")] = None,
    prompt_file: Annotated[Path | None, option("FILE", "a text file, one prompt per line")] = None,
    num: Annotated[int, option("N", "pictures per prompt", "--num", "-n", min=1)] = 1,
    seed: Annotated[int, option("N", "of a prompt's first picture; the next count up", min=0)] = 0,
    lora: Annotated[Path | None, option("PATH", "LoRA file or run folder; unset: the newest run")] = None,
    lora_scale: Annotated[float, option("X", "strength; 1 is as trained, 0 the base model")] = 1.0,
    role: Annotated[Literal["student", "teacher"], typer.Option(help="who draws")] = "student",
    steps: Annotated[int | None, option("N", "denoising steps [dim]\\[student 1, teacher 25][/dim]", min=1)] = None,
    guidance: Annotated[float | None, option("X", f"{_CFG} [dim]\\[student 0, teacher the run's][/dim]", min=0)] = None,
    size: Annotated[int | None, option("N", "side in pixels; unset: as in training", min=16)] = None,
    batch_size: Annotated[int, option("N", "pictures at once; changes speed only", min=1)] = 4,
    compare: Annotated[bool, switch("--compare", "draw the base model's pictures beside")] = False,
    model: Annotated[str | None, option("MODEL", f"{_MODELS}; unset: the run's")] = None,
    teacher: Annotated[str | None, option("MODEL", "with --model and --role teacher")] = None,
    device: Annotated[str | None, option("NAME", "auto, cpu, cuda or mps; unset: the run's")] = None,
    precision: Annotated[str | None, option("NAME", "auto, bf16, fp16 or fp32; unset: the run's")] = None,
    backend: Annotated[Literal["torch", "onnx"], typer.Option(help="onnx: the run's, see export --format")] = "torch",
    offline: Annotated[bool, switch("--offline", "open no socket")] = False,
    output: Annotated[Path, option("FOLDER", "where the pictures go", "--output", "-o")] = Path("samples"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw with a trained LoRA: [bold]echodistill sample --prompt "a photo of a sks dog on the beach"[/bold]"""
    prompts = [*(prompt or []), *_read_prompts(prompt_file)]
    if not prompts:
        raise ConfigError("Nothing to draw.", 'Say what: --prompt "a photo of a sks dog on the beach"')
    prepare_libraries(offline=offline, quiet=quiet)
    from echodistill_cli import pipeline

    changed = {"teacher": teacher, "device": device, "precision": precision, "offline": offline or None}
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
        model_overrides={key: value for key, value in changed.items() if value is not None},
        backend=backend,
    )
    written = pipeline.sample_to_folder(request, output, say=say_to(stderr_console(), quiet=quiet))
    print_paths(written.to_dict(), [*written.files, *filter(None, [written.grid])], as_json=as_json)


app.command()(export)
app.command(context_settings=understanding({"--guidance-scale": "--guidance", "--resolution": "--size"}))(evaluate)


@app.command()
def check(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="folder of photos")],
    resolution: Annotated[int, option("N", "side that training will use", min=16)] = 512,
    min_photos: Annotated[int, option("N", "fewest usable photos", min=1)] = 3,
    masks: Annotated[Literal["auto", "off"], typer.Option(help="auto: alpha and masks/ say what is subject")] = "auto",
    captions: Annotated[bool, switch("--captions/--no-captions", "read sidecar .txt files")] = True,
    as_json: Json = False,
) -> None:
    """Look at every photo as training would, and say what is wrong with each."""
    from echodistill_cli.data import photos as checking

    report = checking.check_photos(photos, resolution=resolution, masks=masks, captions=captions)
    print_table(report.as_dict(), photo_table(report), as_json=as_json)
    checking.require_enough(report, photos, min_photos)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a .safetensors file")], as_json: Json = False
) -> None:
    """Say what a LoRA or token file is, and which tools load it."""
    from echodistill_cli.lora.inspect import inspect_file

    found = inspect_file(file)
    print_table(found.to_dict(), inspection_table(found), as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and memory, and what this machine can train."""
    prepare_libraries(offline=True, quiet=True)
    from echodistill_cli.doctor import diagnose

    found = diagnose()
    print_table(found.to_dict(), diagnosis_table(found), as_json=as_json)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; turns whatever stops a command into one line on stderr and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminating():
            code = app(args=arguments or ["--help"], prog_name="echodistill", standalone_mode=False)
    except typer.TyperException as error:
        what = error.format_message()
        full_stop = "" if what.endswith((".", "?")) else "."
        _fail(f"{what}{full_stop} Help: echodistill {_command(arguments)}--help", error.exit_code)
    except Interrupted as stopped:
        _fail(str(stopped), 128 + stopped.signal_number, label="")
    except Terminated:
        _fail("Stopped by SIGTERM.", 128 + signal.SIGTERM, label="")
    except EchoDistillError as error:
        _fail(str(error), error.exit_code)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        asked = f" when asking for {wanted[1]}" if wanted else ""
        hint = "Try a smaller --batch-size or picture size, --precision bf16, or a device with more memory."
        _fail(f"Out of memory{asked}. {hint}", DeviceMemoryError.exit_code)
    if code == 130:  # what Typer makes of KeyboardInterrupt
        _fail("Interrupted.", code, label="")
    sys.exit(code or 0)


def _command(arguments: Sequence[str]) -> str:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return next((f"{argument} " for argument in arguments if argument in names), "")


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {file}: it cannot be read ({error}).") from error
    return [line.strip() for line in lines if line.strip()]


def _fail(message: str, code: int, label: str = "error: ") -> NoReturn:
    print_error(message, label)
    sys.exit(code)


if __name__ == "__main__":
    main()
