"""Fetch the icon packages and turn their SVG drawings into small RGBA sprites.

The only step of the mini world that needs a network, and it needs `npm` on the path: `npm pack` puts a
tarball in `WORK/sources`, and everything after it works from the cached `WORK/sprites.npz` and `WORK/second.npz`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.mini_world.nouns import NOUNS, SECOND, SECOND_ICONS, SOURCES, Source

SPRITE_SIDE = 96
_RASTER_SIDE = 192
Sprites = dict[tuple[str, str], NDArray[np.uint8]]


def default_work_directory() -> Path:
    """`ECHODISTILL_WORK` when it is set, else `~/.cache/echodistill/mini-world`."""
    return Path(os.environ.get("ECHODISTILL_WORK", "~/.cache/echodistill/mini-world")).expanduser()


def fetch_source(source: Source, directory: Path) -> Path:
    """Return the package's tarball in `directory`, asking npm for it only when it is not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = source.package.removeprefix("@").replace("/", "-")
    tarball = directory / f"{stem}-{source.version}.tgz"
    if not tarball.exists():
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return tarball


def read_icons(tarball: Path) -> dict[str, Any]:
    """The `icons.json` of an iconify package: `icons`, `aliases` and the default `width` and `height`."""
    with tarfile.open(tarball) as archive:
        member = archive.extractfile("package/icons.json")
        if member is None:
            raise FileNotFoundError(f"{tarball} holds no package/icons.json")
        icons: dict[str, Any] = json.load(member)
    return icons


def icon_svg(icons: dict[str, Any], name: str) -> str | None:
    """One icon as a whole SVG document, or None when the package does not draw it."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    box = [
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    view_box = " ".join(str(value) for value in box)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box}">{icon["body"]}</svg>'


def rasterise(svg: str, side: int = SPRITE_SIDE) -> NDArray[np.uint8]:
    """Draw an SVG, crop it to what is painted and center it in a `side` x `side` x 4 RGBA array."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=_RASTER_SIDE, height=_RASTER_SIDE)
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    painted = drawn.getchannel("A").point([255 if alpha > 8 else 0 for alpha in range(256)]).getbbox()
    if painted is None:
        raise ValueError("the drawing is empty")
    drawn = drawn.crop(painted)
    scale = side / max(drawn.size)
    width, height = (max(1, round(length * scale)) for length in drawn.size)
    # Premultiplied, so that the color of transparent pixels does not bleed into the rim.
    drawn = drawn.convert("RGBa").resize((width, height), Image.Resampling.BOX).convert("RGBA")
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(drawn, ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas, dtype=np.uint8)


def build_sprites(work: Path) -> Sprites:
    """Fetch and rasterise every drawing of `NOUNS`; keys are (noun, vendor)."""
    sprites: Sprites = {}
    for source in SOURCES:
        icons = read_icons(fetch_source(source, work / "sources"))
        for noun in NOUNS:
            svg = icon_svg(icons, noun)
            if svg is not None:
                sprites[noun, source.vendor] = rasterise(svg)
    return sprites


def build_second(work: Path) -> Sprites:
    """Fetch and rasterise the drawings of the benchmark's second test set."""
    icons = read_icons(fetch_source(SECOND, work / "sources"))
    svgs = {noun: icon_svg(icons, name) for noun, name in SECOND_ICONS.items()}
    return {(noun, SECOND.vendor): rasterise(svg) for noun, svg in svgs.items() if svg is not None}


def load_sprites(work: Path) -> Sprites:
    """The sprites from `work/sprites.npz`, made (and fetched) on the first call."""
    return _cached(work / "sprites.npz", lambda: build_sprites(work))


def load_second(work: Path) -> Sprites:
    """The second test set's sprites from `work/second.npz`, made (and fetched) on the first call."""
    return _cached(work / "second.npz", lambda: build_second(work))


def _cached(path: Path, build: Callable[[], Sprites]) -> Sprites:
    """Sprites from a file with keys `noun/vendor`, written on the first call."""
    if not path.exists():
        named: dict[str, Any] = {"/".join(key): sprite for key, sprite in build().items()}
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, **named)
        partial.rename(path)
    with np.load(path) as archive:
        return {(key.split("/")[0], key.split("/")[1]): archive[key] for key in archive.files}
