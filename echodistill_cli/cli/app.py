"""The program: commands, exit codes, signals. Each command makes one pipeline call and prints.

The result goes to stdout (paths, a table, or with --json one object), progress and errors go to stderr. Nothing here
imports torch: `echodistill --help` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TextIO, cast

import typer

from echodistill_cli import __version__, pipeline
from echodistill_cli.cli.evaluate import evaluate
from echodistill_cli.cli.export import export
from echodistill_cli.cli.live import live
from echodistill_cli.cli.options import (
    ALIASES,
    Json,
    Quiet,
    bool_option,
    quiet_libraries,
    value_option,
    with_settings,
)
from echodistill_cli.cli.parsing import Command, CommandWithSettings, Program, accepting_aliases
from echodistill_cli.cli.sample import sample
from echodistill_cli.cli.show import (
    diagnosis_table,
    inspection_table,
    photo_table,
    print_error,
    print_paths,
    print_table,
)
from echodistill_cli.cli.train import ALSO, MODELS, config, train
from echodistill_cli.cli.train_many import train_many
from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import LARGEST_SIDE
from echodistill_cli.errors import ConfigError, DeviceMemoryError, EchoDistillError, Interrupted, is_out_of_memory

app = typer.Typer(
    name="echodistill",
    cls=Program,
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
app.command(cls=CommandWithSettings, context_settings=accepting_aliases(ALIASES), epilog=ALSO)(train_many)
app.command(cls=Command, context_settings=accepting_aliases(_SAMPLING_ALIASES))(sample)
app.command(cls=Command)(export)
app.command(cls=Command, context_settings=accepting_aliases(_SAMPLING_ALIASES))(evaluate)


app.command(cls=Command)(config)
app.command(cls=Command)(live)


@app.command(cls=Command)
def check(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="folder of photos", readable=False)],
    resolution: Annotated[
        int, value_option("N", "side of the training images in pixels", min=16, max=LARGEST_SIDE)
    ] = 512,
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


@app.command(cls=Command)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a .safetensors file or a run folder")],
    as_json: Json = False,
) -> None:
    """Show what a LoRA or token file is, and which tools load it."""
    inspection = pipeline.inspect(file)
    print_table(inspection.to_dict(), inspection_table(inspection), as_json=as_json)


@app.command(cls=Command)
def download(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"student to train: {MODELS}")],
    teacher: Annotated[str | None, value_option("ID", "teacher of a model that has no preset")] = None,
    critic: Annotated[
        str | None, value_option("A,B,...", "image encoders of the losses: dino, dinov2, clip, hub ids, or none")
    ] = None,
    scores: Annotated[bool, bool_option("--scores", "also the encoders of evaluate")] = False,
    config_file: Annotated[Path | None, value_option("FILE", "TOML file with settings", "--config")] = None,
    settings: Annotated[
        list[str] | None, value_option("KEY=VALUE", "any setting of train, such as model.decoder=tiny", "--set")
    ] = None,
    to: Annotated[Path | None, value_option("DIR", "also copy everything into a new folder, to use offline")] = None,
    dry_run: Annotated[bool, bool_option("--dry-run", "list files and sizes; download nothing")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download everything that training with a model needs; an interrupted download continues."""
    quiet_libraries(offline=False, quiet=quiet)
    flags = {} if teacher is None else {"model.teacher": teacher}
    config = build_config(model, config_file, with_settings(flags, settings or ()))
    downloaded = pipeline.download(pipeline.DownloadRequest(config, critic, scores, to, dry_run))
    print_paths(downloaded.to_dict(), downloaded.lines(), as_json=as_json)


@app.command(cls=Command)
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and memory, and what this machine can train."""
    quiet_libraries(offline=True, quiet=True)
    diagnosis = pipeline.doctor()
    print_table(diagnosis.to_dict(), diagnosis_table(diagnosis), as_json=as_json)


class Terminated(SystemExit):
    """SIGTERM as an exception, so that temporary files are removed on the way out."""


class _Signals:
    """Context in which a signal ends a command: SIGINT as `KeyboardInterrupt`, SIGTERM as `Terminated`.

    Libraries that are being imported turn the exception into one of their own.

    Args:
        last: whether the process ends after the context. A signal then ends it at once, where Python would print a
            traceback.

    Attributes:
        received: numbers of the signals that came.
        raising: whether a signal raises. While a command's end is explained, no second signal may interrupt that.
    """

    def __init__(self, *, last: bool) -> None:
        self.last, self.raising = last, False
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._end)}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as in a background job
                self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._end)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if self.last else handler)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(number)
        if self.raising:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated(128 + number)


class _Stream:
    """A wrapper of stdout or stderr that accepts any text and survives a full or closed pipe.

    Letters that the stream cannot encode are escaped.

    Args:
        stream: None if the program was started with it closed.

    Attributes:
        error: why text was lost; None if none was.
    """

    def __init__(self, stream: TextIO | None) -> None:
        # A new file takes the number of the closed one, so that no library's message ends up in a checkpoint.
        self._stream = stream or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        self.error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or note why that failed."""
        with self._noting_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or note why that failed."""
        with self._noting_errors():
            self._stream.flush()

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            with contextlib.suppress(OSError, ValueError):  # what is left in the buffer must not fail again at exit
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script. Any error becomes one line on stderr and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = sys.stdout, sys.stderr
    out, err = _Stream(sys.stdout), _Stream(sys.stderr)
    with _Signals(last=argv is None) as signals:
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            code = _run(arguments, signals)
            out.flush()
            if not code and out.error and out.error.errno != errno.EPIPE:  # a reader that is gone wanted no more
                code = _fail(f"The result could not be printed ({out.error.strerror}).", 1)
            err.flush()
        finally:
            sys.stdout, sys.stderr = before
    sys.exit(code)


def _run(arguments: Sequence[str], signals: _Signals) -> int:
    """Run a command and return its exit code, after one line about any error."""
    try:
        try:
            signals.raising = True
            _check_surroundings(arguments)
            code = app(args=arguments or ["--help"], prog_name="echodistill", standalone_mode=False)
            if code == 130:  # Typer returns it after a KeyboardInterrupt
                raise KeyboardInterrupt
            return int(code or 0)
        finally:
            signals.raising = False
    except (Exception, KeyboardInterrupt, Terminated) as error:
        signals.raising = False  # a signal may have come before the line that says so
        code = _explain(error, arguments, signals.received)
        if code is None:
            raise
        return code


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Check what every command relies on.

    Raises:
        ConfigError: an argument is not UTF-8 text, or the working directory was deleted.
    """
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise ConfigError(f"{os.fsencode(argument)!r} is not UTF-8 text.", "Type or rename it in UTF-8.")
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(f"The working directory cannot be used ({error.strerror}).", "Change to another.") from error


def _explain(error: BaseException, arguments: Sequence[str], received: Sequence[int]) -> int | None:
    """Print an error as one line and return its exit code; None for what only a programming error raises."""
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        full_stop = "" if message.endswith((".", "?")) else "."
        return _fail(f"{message}{full_stop} Help: echodistill {_command(arguments)}--help", error.exit_code)
    if isinstance(error, Interrupted):
        return _fail(str(error), 128 + error.signal_number, label="")
    if received or isinstance(error, KeyboardInterrupt):
        if signal.SIGTERM in received:
            return _fail("Stopped by SIGTERM.", 128 + signal.SIGTERM, label="")
        return _fail("Interrupted.", 128 + signal.SIGINT, label="")
    if isinstance(error, EchoDistillError):
        return _fail(str(error), error.exit_code)
    if is_out_of_memory(error):
        size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        detail = f" while allocating {size[1]}" if size else ""
        hint = "Try a smaller --batch-size or image size, --precision bf16, or a device with more memory."
        return _fail(f"Out of memory{detail}. {hint}", DeviceMemoryError.exit_code)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's word for ELOOP
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(error).partition(" from ")[2].strip("'"))
    if isinstance(error, OSError):
        name = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        code = ConfigError.exit_code if error.errno in _WRONG_PATHS else EchoDistillError.exit_code
        reason = (error.strerror or str(error) or type(error).__name__).rstrip(".")
        return _fail(f"{name}{reason}.{_REMEDIES.get(error.errno or 0, '')}", code)
    return None


# A path that no file can have is a wrong argument; other system errors are failures.
_WRONG_PATHS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}
_REMEDIES = {
    errno.ENAMETOOLONG: " Use a shorter name.",
    errno.ELOOP: " Its symbolic links lead in a circle.",
    errno.EACCES: " Change its permissions, or use another place.",
    errno.ENOSPC: " Free some space, or use another place.",
}


def _command(arguments: Sequence[str]) -> str:
    functions = (command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands)
    names = {name.replace("_", "-") for name in functions}  # as Typer names a command after its function
    return next((f"{argument} " for argument in arguments if argument in names), "")


def _fail(message: str, code: int, label: str = "error: ") -> int:
    print_error(message, label)
    return code
