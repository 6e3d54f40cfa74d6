"""What may reach the page: hosts, names, numbers; and its temporary files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli.errors import ConfigError
from echodistill_cli.files import host_mark
from echodistill_cli.live import guard
from echodistill_cli.live.guard import HostGuard, check_host, private_folder

OTHER_HOST = "0123ab"


def passes(
    host: str,
    *,
    at: str = "127.0.0.1",
    origin: str | None = None,
    kind: str = "http",
    names: tuple[str, ...] = (),
    fetch: tuple[str, str, str] | None = None,
) -> bool:
    """Whether a request with these headers reaches the page."""
    reached: list[bool] = []
    sent: list[dict[str, Any]] = []

    async def page(_scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(True)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    fields = ("sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest") if fetch else ()
    headers += [(name.encode(), value.encode()) for name, value in zip(fields, fetch or (), strict=True)]
    asyncio.run(HostGuard(page, at, names)({"type": kind, "headers": headers, "path": "/"}, None, send))
    assert bool(reached) != bool(sent)
    assert all(message.get("status", 403) == 403 for message in sent)
    return bool(reached)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_this_machine_reaches_its_page(host: str) -> None:
    assert passes(host)
    assert passes(host, kind="websocket")
    assert passes(host, origin=f"http://{host}")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.9", "", "x@y", "[::1"]
)
def test_a_name_that_leads_here_from_elsewhere_does_not(host: str) -> None:
    assert not passes(host)
    assert not passes(host, kind="websocket")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "http://[x"])
def test_another_sites_page_does_not(origin: str) -> None:
    assert not passes("127.0.0.1:7860", origin=origin)


@pytest.mark.parametrize(
    ("fetch", "reaches"),
    [
        (("cross-site", "navigate", "iframe"), False),  # a frame in which people click where they do not look
        (("same-site", "navigate", "iframe"), False),  # of another server on this machine
        (("cross-site", "no-cors", "image"), False),
        (("cross-site", "navigate", "document"), True),  # a link
        (("none", "navigate", "document"), True),  # a typed address
        (("same-origin", "cors", "empty"), True),
    ],
)
def test_another_sites_page_can_link_to_it_and_not_show_it(fetch: tuple[str, str, str], reaches: bool) -> None:
    assert passes("127.0.0.1:7860", fetch=fetch) == reaches


def body_read(path: str, length: int, *, told: bool) -> tuple[int, int]:
    """Send a body in pieces of 100,000 bytes; return the status, and how many bytes the page received of it."""
    left, received, status = length, 0, 200

    async def receive() -> dict[str, Any]:
        nonlocal left
        size = min(left, 100_000)
        left -= size
        return {"type": "http.request", "body": bytes(size), "more_body": left > 0}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    async def page(_scope: Any, receive: Any, _send: Any) -> None:
        nonlocal received
        message: dict[str, Any] = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            received += len(message.get("body", b""))

    headers = [(b"host", b"localhost")] + ([(b"content-length", str(length).encode())] if told else [])
    asyncio.run(HostGuard(page, "127.0.0.1")({"type": "http", "headers": headers, "path": path}, receive, send))
    return status, received


def test_a_body_without_end_is_not_read() -> None:
    assert body_read("/gradio_api/queue/join", 900_000, told=True) == (200, 900_000)
    assert body_read("/gradio_api/queue/join", 2**40, told=True) == (413, 0)
    status, received = body_read("/gradio_api/queue/join", 2**40, told=False)
    assert (status, received) == (200, 1_000_000), "it ends as if the sender had left"
    assert body_read("/gradio_api/upload", 3_000_000, told=True) == (200, 3_000_000)
    assert body_read("/gradio_api/upload", 2**40, told=True) == (413, 0)
    assert body_read("/", int("9" * 4000), told=True) == (413, 0)


@pytest.mark.parametrize("prompt", [None, 5, ["a"], "a \ud800"])
def test_a_prompt_is_text(prompt: object) -> None:
    with pytest.raises(ConfigError, match="The prompt is no text"):
        guard.check_prompt(prompt)


def test_links_of_a_strangers_folder_lead_nowhere(tmp_path: Path) -> None:
    private, output = tmp_path / "private", tmp_path / "runs"
    for name in (".live", ".live/photos", "kept", "kept/0000_s1.png"):
        link = output / name
        link.parent.mkdir(parents=True, exist_ok=True)
        guard.check_links(output)
        link.symlink_to(private)
        with pytest.raises(ConfigError, match=rf"{name} is a link that leads elsewhere\. Delete it"):
            guard.check_links(output)
        link.unlink()
    (output / "kept" / "again.png").symlink_to(output / "kept" / "0000_s1.png")
    guard.check_links(output)


def test_on_a_network_any_address_reaches_it_but_no_foreign_name() -> None:
    assert passes("192.168.1.9:7860", at="0.0.0.0")
    assert passes("studio.lan:7860", at="studio.lan")
    assert not passes("evil.example", at="0.0.0.0")
    assert passes("live.example.org", at="0.0.0.0", names=("Live.example.org",), origin="https://live.example.org")


def test_other_hosts_than_loopback_need_a_password() -> None:
    check_host("127.0.0.1", None)
    check_host("0.0.0.0", ("me", "secret"))
    for host in ("0.0.0.0", "192.168.1.9", "::"):
        with pytest.raises(ConfigError, match=f"--host {host} lets others .* --auth USER:PASSWORD"):
            check_host(host, None)


@pytest.mark.parametrize("value", ["../x", "/etc", "", " ", "a/b", "a\\b", ".hidden", "-x", "a" * 65, "a\0b", None, 5])
def test_a_path_is_no_name(value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        guard.check_word("The token", value)
    with pytest.raises(ConfigError, match="cannot be used"):
        guard.check_words("The class", value if value != "a" * 65 else "a" * 66)


def test_plain_words_are_names() -> None:
    assert guard.check_word("The token", " sks ") == "sks"
    assert guard.check_words("The class", "alarm clock") == "alarm clock"
    assert guard.check_words("The class", "Zuckerhütchen") == "Zuckerhütchen"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 2.1, "1", None, True, [1]])
def test_what_is_no_number_in_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="is not a number from 0 to 2"):
        guard.check_number("The strength", value, 0, 2)
    with pytest.raises(ConfigError, match="not a whole number"):
        guard.check_whole("The seed", 1.5, 0, 2)


def test_temporary_files_of_a_dead_page_are_deleted_and_those_of_a_living_one_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_SHARE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    here = tmp_path / ".live" / f"tmp-{host_mark()}"
    dead, living = here.with_name(f"{here.name}-{2**31 - 1}"), here.with_name(f"{here.name}-{os.getppid()}")
    elsewhere = here.with_name(f"tmp-{OTHER_HOST}-{2**31 - 1}")
    for page in (dead, living, elsewhere):
        page.mkdir(parents=True)
    folder = private_folder(tmp_path)
    assert not dead.exists()
    assert living.exists()
    assert elsewhere.exists(), "process IDs of another host say nothing here"
    assert folder.stat().st_mode & 0o077 == 0, "others on the machine cannot read uploaded photos"
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
