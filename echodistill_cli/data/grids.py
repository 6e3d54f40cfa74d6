"""Arrange images in a grid, each with a caption that stays readable below images of any size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont, features

GAP = 2  # pixels between the images of a grid
CAPTION_LINES = 3  # a longer caption is cut
NARROWEST = 160  # pixels of a column with captions, about 25 characters; smaller images are enlarged
SMALLEST, LARGEST = 11, 24  # pixels of the font
_SPACE = 0.28  # of the font's size; the built-in font's own space, 0.18 at 11 pixels, lets words run together
_MOST_PIXELS = 2**24  # of all images together: the memory of a grid has a limit
_LEFT, _RIGHT, _BELOW = 2, 6, 6  # pixels between a caption and what is beside and below it


def grid(images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None) -> Image.Image:
    """Arrange images of one size in a grid, as square as possible unless `columns` is given.

    Args:
        images: at least one. With labels, small ones are enlarged by a whole factor, which keeps every pixel.
        columns: images per row.
        labels: one text per image, written below it; None for no text.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = max(1, math.ceil(NARROWEST / images[0].width)) if labels else 1
    width, height = (side * factor for side in images[0].size)
    captions = [caption(text, width) for text in labels or ()]
    step = height + max((one.height for one in captions), default=0) + GAP
    size = (columns * (width + GAP) - GAP, math.ceil(len(images) / columns) * step - GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        left, top = index % columns * (width + GAP), index // columns * step
        sheet.paste(image if factor == 1 else image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            sheet.paste(captions[index], (left, top + height))
    return sheet


def tile(sheet: Image.Image, index: int, columns: int, rows: int, side: int) -> Image.Image | None:
    """Return an image cut out of what `grid` made; None if the sheet was not made of such images.

    Args:
        sheet: with or without captions.
        index: of the image.
        columns: images per row.
        rows: of the sheet.
        side: of the images, which are square, in pixels.
    """
    width, step = (sheet.width + GAP) // columns - GAP, (sheet.height + GAP) // rows
    if width < side or width % side or step < width or sheet.width != columns * (width + GAP) - GAP:
        return None
    left, top = index % columns * (width + GAP), index // columns * step
    # Every pixel was enlarged by a whole factor, so that this takes the enlargement back.
    return sheet.crop((left, top, left + width, top + width)).resize((side, side), Image.Resampling.NEAREST)


def reduced(image: Image.Image, total: int) -> Image.Image:
    """Return an image as large as a grid of `total` images allows."""
    shrink = math.sqrt(min(1.0, _MOST_PIXELS / (total * image.width * image.height)))
    size = (max(1, int(image.width * shrink)), max(1, int(image.height * shrink)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def caption(text: str, width: int, most_lines: int = CAPTION_LINES, size: int | None = None) -> Image.Image:
    """Return black text on white, wrapped to a width in pixels. What does not fit ends in "...".

    Args:
        text: in any language; the built-in font shows only European letters.
        width: of the returned image.
        most_lines: what is longer is cut.
        size: of the font, in pixels; None for one that fits the width.
    """
    size = size or max(SMALLEST, min(width // 32, LARGEST))
    # Without FreeType there is one size, and only Latin characters.
    scalable = features.check("freetype2")
    font = ImageFont.load_default(size) if scalable else ImageFont.load_default()
    text = text if scalable else text.encode("latin-1", "replace").decode("latin-1")
    space = max(round(size * _SPACE), math.ceil(font.getlength(" ")))
    long = functools.partial(_length, font.getlength, space)
    inside = width - _LEFT - _RIGHT
    lines = _cut(_wrapped(text, inside, long), most_lines, inside, long)
    height = round(size * 1.3)
    image = Image.new("RGB", (width, max(len(lines), 1) * height + _BELOW), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        left = float(_LEFT)
        for word in line.split():  # one by one, for the space between them
            draw.text((left, 1 + row * height), word, fill="black", font=font)
            left += font.getlength(word) + space
    return image


def _length(of_word: Callable[[str], float], space: int, line: str) -> float:
    """Return the length of a line in pixels."""
    words = line.split()
    return sum(map(of_word, words)) + space * (len(words) - 1)


def _wrapped(text: str, width: int, long: Callable[[str], float]) -> list[str]:
    """Return the lines of a text. A word wider than a line, such as a Chinese sentence, is broken."""
    lines = [""]
    for word in text.split():
        if long(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for character in word:
            if lines[-1] and long(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def _cut(lines: list[str], most: int, width: int, long: Callable[[str], float]) -> list[str]:
    """Return at most so many lines, the last of them with dots if there were more."""
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and long(f"{last}...") > width:
        last = last.rpartition(" ")[0] or last[:-1]
    return [*lines[: most - 1], f"{last}..."]
