"""Pictures on disk: PNGs that say how they were made, and grids of them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from echodistill_cli.files import write_bytes

_GAP = 2  # pixels between the pictures of a grid


def to_image(pixels: Tensor) -> Image.Image:
    """A Pillow image of a uint8 picture [H, W, 3]."""
    return Image.fromarray(pixels.numpy())


def grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows; a square arrangement unless the number of columns is given."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (width + _GAP), index // columns * (height + _GAP)))
    return sheet


def png_bytes(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """A PNG with text chunks, such as the prompt and the seed."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically; see `files.atomically` for its errors."""
    write_bytes(path, png_bytes(image, texts))
