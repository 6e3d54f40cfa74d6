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
    host: str, *, at: str = "127.0.0.1", origin: str | None = None, kind: str = "http", names: tuple[str, ...] = ()
) -> bool:
    """Whether a request with these headers reaches the page."""
    reached: list[bool] = []
    sent: list[dict[str, Any]] = []

    async def page(_scope: Any, _receive: Any, _send: Any) -> None:
        reached.append(True)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    asyncio.run(HostGuard(page, at, names)({"type": kind, "headers": headers}, None, send))
    assert bool(reached) != bool(sent)
    assert all(message.get("status", 403) == 403 for message in sent)
    return bool(reached)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LOCALHOST"])
def test_this_machine_reaches_its_page(host: str) -> None:
    assert passes(host)
    assert passes(host, kind="websocket")
    assert passes(host, origin=f"http://{host}")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "192.168.1.9", "", "x@y"]
)
def test_a_name_that_leads_here_from_elsewhere_does_not(host: str) -> None:
    assert not passes(host)
    assert not passes(host, kind="websocket")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8000"])
def test_another_sites_page_does_not(origin: str) -> None:
    assert not passes("127.0.0.1:7860", origin=origin)


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
