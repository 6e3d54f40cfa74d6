"""`python -m examples.live_screenshots RUN...`: the pictures of docs/live.md, taken of the page in a real Chromium.

Both tabs, 1280 pixels wide in light colors and 390 pixels wide in dark ones. The runs are copied to a temporary folder
first, so that nothing is written beside them.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from examples.live_browser import Visit, browser, served

ROOT = Path(__file__).parents[1]
COLORS = 192  # of a picture's palette: small files whose text stays sharp
PLACES = ("in the jungle", "on a purple rug", "in the snow")
ALL_DRAWN = "document.querySelectorAll('#picture img, #base img').length === 2"


def shoot(visit: Visit, file: Path) -> None:
    """Write a picture of the whole page."""
    visit.page.wait_for_timeout(1200)  # until messages have faded and plots are drawn
    with Image.open(io.BytesIO(visit.page.screenshot(full_page=True))) as image:
        small = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        small.save(file, optimize=True)
    print(f"{file} ({small.width} x {small.height}, {file.stat().st_size // 1024} KiB)")


def generate(visit: Visit, phrase: str, *, keep: bool) -> None:
    """Type some prompts, keep an image of each, and show four seeds of the last one."""
    for number, place in enumerate(PLACES if keep else PLACES[-1:], start=1):
        visit.type(f"a photo of a {phrase} {place}")
        if keep:
            visit.page.click("#keep")
            visit.page.wait_for_function(f"document.querySelectorAll('#kept img').length >= {number}")
    if keep:
        visit.page.click("#four")
        visit.page.wait_for_function("document.querySelectorAll('#grid img').length === 4")
    visit.page.wait_for_function(ALL_DRAWN)
    visit.page.mouse.move(0, 0)
    visit.page.wait_for_timeout(4000)  # a message says what was kept


def main(arguments: list[str] | None = None) -> None:
    """Take four pictures."""
    parser = argparse.ArgumentParser(prog="python -m examples.live_screenshots", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folder; the first is shown")
    parser.add_argument("--phrase", default="sks dog", help="what stands for the subject of the first run")
    parser.add_argument("--photos", type=Path, default=ROOT / "examples" / "photos")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    photos = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    with tempfile.TemporaryDirectory() as name, browser() as started:
        folder = Path(name)
        for run in options.runs:
            shutil.copytree(run, folder / "runs" / run.name, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
        with served(folder, folder / "runs" / options.runs[0].name, "--model", "mini") as (address, _):
            for width, height, dark in ((1280, 800, False), (390, 844, True)):
                visit = Visit(started, address, width=width, height=height, dark=dark)
                generate(visit, options.phrase, keep=not dark)
                shoot(visit, options.output / f"live-generate-{width}.png")
                visit.upload(photos)
                visit.page.fill("#class-name input, #class-name textarea", options.phrase.partition(" ")[2])
                visit.page.wait_for_selector("#preview img")
                shoot(visit, options.output / f"live-train-{width}.png")
                visit.page.close()


if __name__ == "__main__":
    main()
