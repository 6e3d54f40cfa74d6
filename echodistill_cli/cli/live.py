"""The `live` command: a page on which a person types and sees the subject, and trains a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from echodistill_cli import pipeline
from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.show import say_to, stderr_console
from echodistill_cli.cli.train import MODELS
from echodistill_cli.errors import ConfigError


def live(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="run folders or LoRA files to show first", readable=False),
    ] = None,
    output: Annotated[
        Path, value_option("FOLDER", "folder of the runs, kept images and temporary files", "--output", "-o")
    ] = Path("runs"),
    model: Annotated[str | None, value_option("MODEL", f"base model: {MODELS}; unset: the run's")] = None,
    host: Annotated[
        str, value_option("ADDRESS", "address to listen at; others than loopback need --auth")
    ] = "127.0.0.1",
    port: Annotated[int, value_option("N", "port to listen at; 0 for any free one", min=0, max=65535)] = 7860,
    names: Annotated[
        list[str] | None, value_option("NAME", "name of a proxy through which people come; repeatable", "--allow-host")
    ] = None,
    auth: Annotated[str | None, value_option("USER:PASSWORD", "ask for a name and a password")] = None,
    train: Annotated[bool, bool_option("--train/--no-train", "offer training")] = True,
    config_file: Annotated[
        Path | None, value_option("FILE", "TOML file with settings of each training", "--config")
    ] = None,
    device: Annotated[str | None, value_option("NAME", "device: auto, cpu, cuda or mps; unset: the run's")] = None,
    precision: Annotated[
        str | None, value_option("NAME", "precision of the weights: auto, bf16, fp16 or fp32; unset: the run's")
    ] = None,
    offline: Annotated[bool, bool_option("--offline", "do not use the network")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Type a prompt and see your subject while you type, in a browser: [bold]echodistill live[/bold]"""
    quiet_libraries(offline=offline, quiet=quiet)
    on_message = say_to(stderr_console(), quiet=quiet)
    request = pipeline.LiveRequest(
        runs=runs or [],
        output=output,
        model=model,
        host=host,
        port=port,
        names=names or (),
        auth=parse_auth(auth),
        training=train,
        config=config_file,
        device=device,
        precision=precision,
        offline=offline,
    )

    def on_ready(address: str) -> None:
        typer.echo(json.dumps({"url": address}) if as_json else address)
        on_message("Open this address in a browser. Ctrl-C ends it.")

    pipeline.live(request, on_message=on_message, on_ready=on_ready)


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """Return the user and the password of USER:PASSWORD.

    Raises:
        ConfigError: one of them is missing.
    """
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise ConfigError("--auth needs a name and a password.", "Write --auth USER:PASSWORD")
    return user, password
