"""What may reach the page: which hosts, which words and numbers, and where its temporary files lie.

Anybody who reaches the port can call a handler with any values, without the page. So each value is checked here.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil

from echodistill_cli.errors import ConfigError
from echodistill_cli.files import host_mark, make_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_STRENGTH, MOST_SEED, STEPS = 2.0, 2**32 - 1, (0, 1, 2, 4)
MOST_LETTERS = 1000
MOST_PHOTOS, MOST_UPLOAD = 30, 50 * 2**20  # files, bytes each
_MOST_BODY = 2**20  # bytes of a request that uploads nothing
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_WORDS = re.compile(r"[^\W_][\w' -]{0,63}")
Scope = Mapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def check_host(host: str, auth: object) -> None:
    """Check that only this machine reaches a page without a password.

    Raises:
        ConfigError: the host is another address than loopback, and there is no password.
    """
    if host not in LOOPBACK and not auth:
        raise ConfigError(
            f"--host {host} lets others on the network use this page.", "Set a password: --auth USER:PASSWORD"
        )


class HostGuard:
    """Refuses requests that name another host, that another site's page sends, or that are too large.

    A page from elsewhere can have its own name lead to this machine (DNS rebinding); its requests carry that name. It
    can also show this page in a frame, and let people click where they do not look.

    Args:
        app: what to protect.
        host: that the server listens on.
        names: further names under which people reach it, such as that of a proxy.
    """

    def __init__(self, app: App, host: str, names: Sequence[str] = ()) -> None:
        self.app, self.host, self.names = app, host, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 403."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not (self.allows(headers.get("host", "")) and _is_of_this_page(headers)):
            await _refuse(scope, send, 403, b"Refused: this page answers under its own address only.\n")
            return
        most = _MOST_BODY + MOST_PHOTOS * MOST_UPLOAD * scope["path"].endswith("/upload")
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) <= most:
            await self.app(scope, _limited(receive, most), send)
        else:
            await _refuse(scope, send, 413, b"Refused: the request is too large.\n")

    def allows(self, host: str) -> bool:
        """Return whether a Host header names this server.

        Loopback does. If others on the network are served, so does any address, and this machine's name.
        """
        name = (_split(f"//{host}").hostname or "").lower()
        if name in LOOPBACK or name in self.names:
            return True
        if self.host in LOOPBACK:
            return False
        own = socket.gethostname().lower()
        return name in (self.host.lower(), own, f"{own.partition('.')[0]}.local") or _is_address(name)


def _is_of_this_page(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from this page, from a person, or from no browser."""
    origin, from_elsewhere = headers.get("origin"), headers.get("sec-fetch-site") in ("cross-site", "same-site")
    is_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    if from_elsewhere and not is_link:
        return False
    return origin is None or _split(origin).netloc == headers.get("host", "")


def _split(address: str) -> SplitResult:
    """Return the parts of an address; none of them if it is malformed, such as "http://[x"."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _limited(receive: Any, most: int) -> Any:
    """Return `receive` for a body that may not tell its length; what is too large ends as if cut off."""
    read = 0

    async def limited() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return message if read <= most else {"type": "http.disconnect"}

    return limited


async def _refuse(scope: Scope, send: Any, status: int, body: bytes) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": 1008})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_prompt(prompt: object) -> str:
    """Return a prompt; "" while nothing is typed.

    Raises:
        ConfigError: it is no text, or too long.
    """
    if not isinstance(prompt, str) or any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError("The prompt is no text.", "Type one.")
    if len(prompt) > MOST_LETTERS:
        raise ConfigError(f"The prompt has {len(prompt)} characters.", f"Use at most {MOST_LETTERS}.")
    return "" if not prompt.strip() else prompt


def check_number(what: str, value: object, low: float, high: float) -> float:
    """Return a number in a range.

    Raises:
        ConfigError: it is no number, or out of range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise ConfigError(f"{what} {str(value)[:40]!r} is not a number from {low:g} to {high:g}.", "Choose another.")
    return float(value)  # type: ignore[arg-type]


def check_whole(what: str, value: object, low: int, high: int) -> int:
    """Return a whole number in a range; raises the error of `check_number`."""
    number = check_number(what, value, low, high)
    if number != int(number):
        raise ConfigError(f"{what} {number} is not a whole number.", "Choose another.")
    return int(number)


def check_word(what: str, value: object) -> str:
    """Return a name of letters, digits, - and _, which can be a folder's name and leads nowhere else.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value.strip()):
        raise ConfigError(f"{what} {str(value)[:40]!r} cannot be used.", "Use letters, digits, - and _, at most 64.")
    return value.strip()


def check_words(what: str, value: object) -> str:
    """Return one or more plain words, such as "alarm clock".

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, str) or not _WORDS.fullmatch(value.strip()):
        raise ConfigError(f"{what} {str(value)[:40]!r} cannot be used.", 'Use plain words, such as "alarm clock".')
    return value.strip()


def check_links(output: Path) -> None:
    """Check that what the page writes and serves lies in the output folder, which may be a stranger's.

    Raises:
        ConfigError: a folder of the page's own is a link that leads elsewhere, or an image that it kept is a link.
    """
    own = [output / name for name in (".live", ".live/photos", "kept")]
    for path in (*own, *own[-1].glob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(output.resolve()):
            raise ConfigError(f"{path} is a link that leads elsewhere.", "Delete it, or choose another --output.")


def private_folder(output: Path) -> Path:
    """Return the empty folder of the page's temporary files, which gradio is told to use.

    Must be called before gradio is imported, which reads then that it sends nothing to anybody.

    Args:
        output: folder of the runs.
    """
    here = f"tmp-{host_mark()}-"  # the disk may be shared with other hosts
    folder = output.absolute() / ".live" / f"{here}{os.getpid()}"
    for old in folder.parent.glob(f"{here}*"):
        process = old.name.removeprefix(here)
        if process.isdecimal() and not psutil.pid_exists(int(process)):  # its page was killed
            shutil.rmtree(old, ignore_errors=True)
    make_folder(folder).chmod(0o700)
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return folder
