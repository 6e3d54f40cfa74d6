"""Drive `echodistill live` in a real Chromium: the server as a process, the page as a person sees it.

Debian's Chromium and the Python package playwright suffice; playwright's own download of browsers is not needed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Gradio's client closes its event stream when no event is pending, and now and then logs that as an error.
OWN_ABORT = "AbortError: BodyStreamBuffer was aborted"
# Settings of a training that ends soon: for what happens around it, not for its result.
SHORT = """
[concept]
views = 4
[train]
steps = 2
head_start = 2
replays = 1
first_targets = 0
class_share = 0.0
[echo]
start = "off"
carry_back = 0
[run]
sample_every = 1
save_every = 1
"""


def chromium() -> str | None:
    """Return the program; None if it is not installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def served(folder: Path, *words: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Context in which the page is served from a working directory; provides its address and its process."""
    command = [sys.executable, "-m", "echodistill_cli", "live", "--port", "0", "--offline", *map(str, words)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with (folder / "server.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address.startswith("http"):
            raise RuntimeError((folder / "server.log").read_text(encoding="utf-8"))
        yield address, process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Context that provides a headless Chromium."""
    from playwright.sync_api import sync_playwright

    # Without a sandbox, because root has none; the pages are our own.
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=flags)
        try:
            yield started
        finally:
            started.close()


class Visit:
    """A page that a person opens, and all that it asks for and complains about.

    Attributes:
        page: playwright's page.
        hosts: of all requests.
        complaints: errors on the page's console, without the client's own closing of a stream.
    """

    def __init__(self, started: Browser, address: str, *, width: int = 1280, height: int = 860, dark: bool = False):
        scheme = "dark" if dark else "light"
        context = started.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        context.set_default_timeout(100_000)
        self.page: Page = context.new_page()
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("console", lambda line: self._complain(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self._complain(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#picture figure, #upload")

    def _note(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.hosts.add(url.split("/")[2].partition(":")[0])

    def _complain(self, text: str) -> None:
        if OWN_ABORT not in text:
            self.complaints.append(text)

    def picture(self, which: str = "picture") -> str:
        """Return the image that is shown, as it is embedded in the page."""
        return str(self.page.get_attribute(f"#{which} img", "src"))

    def type(self, text: str, delay: float = 60.0) -> None:
        """Replace the prompt, a key at a time, and wait for the image of the whole text."""
        box = self.page.locator("#prompt textarea")
        box.fill("")
        box.press_sequentially(text, delay=delay)
        self.shows(text)

    def shows(self, prompt: str) -> None:
        """Wait until the image of a prompt is shown."""
        self.page.wait_for_function(
            "text => document.querySelector('#picture img')?.dataset.prompt === text", arg=prompt
        )

    def upload(self, photos: Sequence[Path]) -> None:
        """Add photos in the Train tab, and wait for their verdicts."""
        self.page.get_by_role("tab", name="Train").click()
        self.page.set_input_files("#upload input[type=file]", [str(photo) for photo in photos])
        self.page.wait_for_selector("#verdicts .ed-card")
