"""The program: commands, exit codes, signals. Each command makes one pipeline call and prints.

The result goes to stdout (paths, a table, or with --json one object), progress and errors go to stderr. Nothing here
imports torch: `echodistill --help` is quick.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer
from rich.text import Text

from echodistill_cli import __version__, pipeline
from echodistill_cli.cli.evaluate import evaluate
from echodistill_cli.cli.export import export
from echodistill_cli.cli.options import (
    ALIASES,
    CommandWithSettings,
    Json,
    Quiet,
    accepting_aliases,
    bool_option,
    quiet_libraries,
    value_option,
)
from echodistill_cli.cli.sample import sample
from echodistill_cli.cli.show import diagnosis_table, inspection_table, photo_table, print_error, print_table
from echodistill_cli.cli.train import ALSO, MODELS, train
from echodistill_cli.errors import DeviceMemoryError, EchoDistillError, Interrupted, is_out_of_memory

app = typer.Typer(
    name="echodistill",
    help="Personalize one-step text-to-image models: from a few photos and a rare token to a LoRA.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]} | accepting_aliases(),
    rich_markup_mode="rich",
)


def show_version(requested: bool) -> None:
    """Print the version and exit, if it is requested."""
    if requested:
        print(f"echodistill {__version__}")
        raise typer.Exit


@app.callback()
def version_option(
    version: Annotated[  # its callback runs before Typer requires a command
        bool, typer.Option("--version", metavar="", help="print the version", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Options of the program itself."""


_SAMPLING_ALIASES = {"--guidance-scale": "--guidance", "--resolution": "--size"}
app.command(cls=CommandWithSettings, context_settings=accepting_aliases(ALIASES), epilog=ALSO)(train)
app.command(context_settings=accepting_aliases(_SAMPLING_ALIASES))(sample)
app.command()(export)
app.command(context_settings=accepting_aliases(_SAMPLING_ALIASES))(evaluate)


@app.command()
def check(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="folder of photos")],
    resolution: Annotated[int, value_option("N", "side of the training images in pixels", min=16)] = 512,
    min_photos: Annotated[int, value_option("N", "fail with fewer usable photos", min=1)] = 3,
    masks: Annotated[
        Literal["auto", "off"], typer.Option(help="subject masks: auto = alpha channel or masks/NAME.png")
    ] = "auto",
    captions: Annotated[bool, bool_option("--captions/--no-captions", "read sidecar .txt files")] = True,
    as_json: Json = False,
) -> None:
    """Check each photo as `train` does, and show a verdict on each."""
    report = pipeline.check(photos, resolution=resolution, masks=masks, captions=captions)
    print_table(report.to_dict(), photo_table(report), as_json=as_json)
    pipeline.require_photos(report, photos, min_photos)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a .safetensors file")], as_json: Json = False
) -> None:
    """Show what a LoRA or token file is, and which tools load it."""
    inspection = pipeline.inspect(file)
    print_table(inspection.to_dict(), inspection_table(inspection), as_json=as_json)


@app.command()
def download(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"what to train with: {MODELS}")],
    teacher: Annotated[str | None, value_option("ID", "teacher of a model that has no preset")] = None,
    to: Annotated[Path | None, value_option("DIR", "also copy everything into a new folder, to use offline")] = None,
    dry_run: Annotated[bool, bool_option("--dry-run", "list files and sizes; download nothing")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download everything that training with a model needs; an interrupted download continues."""
    quiet_libraries(offline=False, quiet=quiet)
    downloaded = pipeline.download(model, teacher, to=to, dry_run=dry_run)
    print_table(downloaded.to_dict(), Text("\n".join(downloaded.lines())), as_json=as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and memory, and what this machine can train."""
    quiet_libraries(offline=True, quiet=True)
    diagnosis = pipeline.doctor()
    print_table(diagnosis.to_dict(), diagnosis_table(diagnosis), as_json=as_json)


class Terminated(SystemExit):
    """SIGTERM as an exception, so that temporary files are removed on the way out."""


@contextmanager
def terminating() -> Iterator[None]:
    """Context in which SIGTERM raises `Terminated`, as SIGINT raises `KeyboardInterrupt`."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script. Any error becomes one line on stderr and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminating():
            code = app(args=arguments or ["--help"], prog_name="echodistill", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
        full_stop = "" if message.endswith((".", "?")) else "."
        _fail(f"{message}{full_stop} Help: echodistill {_command(arguments)}--help", error.exit_code)
    except Interrupted as stopped:
        _fail(str(stopped), 128 + stopped.signal_number, label="")
    except Terminated:
        _fail("Stopped by SIGTERM.", 128 + signal.SIGTERM, label="")
    except EchoDistillError as error:
        _fail(str(error), error.exit_code)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        detail = f" while allocating {size[1]}" if size else ""
        hint = "Try a smaller --batch-size or image size, --precision bf16, or a device with more memory."
        _fail(f"Out of memory{detail}. {hint}", DeviceMemoryError.exit_code)
    if code == 130:  # Typer returns it after a KeyboardInterrupt
        _fail("Interrupted.", code, label="")
    sys.exit(code or 0)


def _command(arguments: Sequence[str]) -> str:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return next((f"{argument} " for argument in arguments if argument in names), "")


def _fail(message: str, code: int, label: str = "error: ") -> NoReturn:
    print_error(message, label)
    sys.exit(code)
