"""Serve the page of `echodistill live` until a signal; leave nothing behind but runs and kept images.

Gradio and torch are imported late, so that a missing extra is told at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import check_folder
from echodistill_cli.live.guard import MOST_UPLOAD, HostGuard, check_host, check_links, private_folder
from echodistill_cli.outputs.requests import LiveRequest
from echodistill_cli.runs import OnMessage

if TYPE_CHECKING:  # these import torch and gradio
    from echodistill_cli.live.desk import Desk
    from echodistill_cli.live.trainer import Trainer

OnReady = Callable[[str], None]
_SWEEP, _OLD = 60, 600  # seconds: gradio's own temporary files are looked through, and deleted at this age
_WARM_UP = "a photo"


def serve(request: LiveRequest, on_message: OnMessage, on_ready: OnReady) -> None:
    """Serve the page until a signal ends it.

    Args:
        request: what to serve, and where.
        on_message: receives lines about the progress.
        on_ready: receives the address, once the first key would be answered at once.

    Raises:
        ConfigError: gradio is missing, the address cannot be used, or there is no such run or file.
        ModelError: a model is missing or damaged.
        EchoDistillError: the output folder cannot be written.
    """
    check_folder(request.output)
    check_extra()
    check_host(request.host, request.auth)
    check_links(request.output)
    port = _free_port(request.host, request.port)
    desk, trainer = _backstage(request, on_message)
    private = private_folder(request.output)
    try:
        _serve(request, port, private, desk, trainer, on_ready)
    finally:
        shutil.rmtree(private, ignore_errors=True)
        with contextlib.suppress(OSError):  # unless photos or logs of a training are there
            private.parent.rmdir()


def check_extra() -> None:
    """Check that gradio is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("echodistill live needs gradio.", "Install it in a checkout: pip install '.[live]'")


def _backstage(request: LiveRequest, on_message: OnMessage) -> tuple[Desk, Trainer]:
    """Return what draws and what trains, after a first image: the first key is then answered at once."""
    from echodistill_cli.live.desk import Desk
    from echodistill_cli.live.studio import Studio, Wish
    from echodistill_cli.live.subjects import check_named
    from echodistill_cli.live.trainer import Trainer

    changes = {"device": request.device, "precision": request.precision, "offline": request.offline or None}
    studio = Studio(request.model, {key: value for key, value in changes.items() if value is not None}, on_message)
    check_named(request.runs)
    desk = Desk(studio, request.output, request.runs)
    first = next(iter(desk.subjects().values()), None)
    if first or request.model:
        try:
            studio.draw(Wish(first.path if first else None, first.prompt if first else _WARM_UP))
        except EchoDistillError as error:
            if request.runs or request.model or first is None:
                raise
            on_message(f"{first.path} cannot be shown. {error}")
    else:
        on_message(f"There is no finished run below {request.output}: the page offers training.")
    return desk, Trainer(request.output, request.model, request.config, request.offline)


def _serve(request: LiveRequest, port: int, private: Path, desk: Desk, trainer: Trainer, on_ready: OnReady) -> None:
    from starlette.middleware import Middleware

    from echodistill_cli.live.page import build, look

    page = build(desk, trainer, private, training=request.training, sweep=(_SWEEP, _OLD))
    middleware = [Middleware(HostGuard, host=request.host, names=request.names)]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the address alone
            page.launch(
                server_name=request.host, server_port=port, auth=request.auth, share=False, quiet=True,
                prevent_thread_lock=True, max_file_size=MOST_UPLOAD, allowed_paths=[], ssr_mode=False, pwa=False,
                mcp_server=False, enable_monitoring=False, strict_cors=True, show_error=True, inbrowser=False,
                footer_links=[], app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None}, **look(),
            )  # fmt: skip
        shown = f"[{request.host}]" if ":" in request.host else request.host
        on_ready(f"http://{shown}:{port}")
        threading.Event().wait()
    finally:
        _close(page)
        for name in trainer.close():
            desk.studio.on_message(f"The training of {name} was stopped and saved: echodistill live resumes it")


def _close(page: Any) -> None:
    with contextlib.suppress(Exception):  # a server that never started
        page.close(verbose=False)


def _free_port(host: str, port: int) -> int:
    """Return a port to listen at; 0 stands for any free one.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be used ({error.strerror}).", "Try --port 0."
            ) from error
        return int(probe.getsockname()[1])
