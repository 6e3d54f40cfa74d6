"""Read image files as upright 8-bit sRGB without transparency, and write PNGs and grids.

An alpha channel that cuts out a subject is returned separately.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from echodistill_cli.files import explained, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
GRAY = (128, 128, 128)  # 0 in [-1, 1], the empty canvas of augmented views; leaves no bright or dark fringe
MIN_TRANSPARENT = 0.01  # fraction of transparent pixels below which alpha only rounds the corners
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# Pillow's decoders raise all of these on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, struct.error, zlib.error)


class UnusableError(Exception):
    """A file cannot be used. The message is the reason, without a subject ("is empty")."""


@dataclass
class Notes:
    """Notes on one file.

    Attributes:
        remarks: what was done to the image.
        warnings: what may be wrong with it; these change the verdict.
    """

    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_image(path: Path, notes: Notes) -> tuple[Image.Image, Image.Image | None, str]:
    """Read the first frame of a file.

    Args:
        path: the image file.
        notes: extended with remarks and warnings.

    Returns:
        The upright RGB image, its alpha channel (None unless it cuts something out), and the file format.

    Raises:
        UnusableError: the file cannot be decoded, or is entirely transparent.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image, alpha, kind = _decode(path, notes)
    # Pillow reports damaged metadata as UserWarning. Other categories, such as deprecations, are not about the file.
    messages = dict.fromkeys(str(warning.message).strip() for warning in caught if warning.category is UserWarning)
    notes.warnings += [f"Pillow says: {text}" for text in messages]
    return *_flatten(image, alpha, notes), kind


def _decode(path: Path, notes: Notes) -> tuple[Image.Image, Image.Image | None, str]:
    """Return RGB, alpha and format of the first frame, before the image is flattened."""
    header = b""
    try:
        if not path.is_file():  # a broken link, or a pipe, which would block
            raise UnusableError("cannot be read: not a regular file")
        with path.open("rb") as file:
            header = file.read(12)
            image = Image.open(file, formats=_formats())
            frames = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            kind = str(image.format)
            rgb, alpha = _to_srgb(_upright(image, notes), notes)
    except UnidentifiedImageError as error:
        reason = f"is not an image of a known kind ({', '.join(_formats())})" if header else "is empty (0 bytes)"
        if header[4:8] == b"ftyp" and header[8:] in _HEIC_BRANDS:
            reason = "is HEIC, which needs pillow-heif: pip install echodistill[heic]"
        raise UnusableError(reason) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnusableError(f"has too many pixels to be safe: {error}") from error
    except _DECODE_ERRORS as error:
        raise UnusableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if kind == "MPO":  # a phone's JPEG with a second view of the scene, not an animation
        return rgb, alpha, "JPEG"
    if frames > 1:
        notes.remarks.append(f"has {frames} frames; only the first is used")
    return rgb, alpha, kind


def _formats() -> list[str]:
    """Return the formats that this installation decodes; HEIC needs pillow-heif."""
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN and name != "HEIF"]
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return known
    register_heif_opener()
    return [*known, "HEIF"]


def _upright(image: Image.Image, notes: Notes) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, struct.error) as error:
        notes.warnings.append(f"has unreadable EXIF data, so its orientation is a guess: {error}")
        return image


def _to_srgb(image: Image.Image, notes: Notes) -> tuple[Image.Image, Image.Image | None]:
    """Return the image in sRGB, and its alpha channel."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image, notes)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image, alpha = rgba.convert("L" if image.mode == "LA" else "RGB"), rgba.getchannel("A")
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        return _apply_profile(image, profile, notes), alpha
    if image.mode == "CMYK":
        notes.remarks.append("is CMYK without a color profile; its colors are approximate")
    return image.convert("RGB"), alpha


def _eight_bit(image: Image.Image, notes: Notes) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    low, high = 0.0, 65535.0
    if not image.mode.startswith("I;16"):
        low, high = float(values.min()), float(values.max())
        notes.remarks.append(f"has {image.mode} values, stretched from {low:g}...{high:g} to 0...255")
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-8))).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes, notes: Notes) -> Image.Image:
    """Convert to sRGB with the embedded ICC profile; a profile that does not fit is ignored with a warning."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        space = {"GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "RGB")
        fitting = image.convert("RGB") if space == "RGB" and image.mode == "L" else image
        if "srgb" in name.lower() and fitting.mode == "RGB":
            return fitting
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, fitting.mode, "RGB")
        converted = ImageCms.applyTransform(fitting, transform) or fitting
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.warnings.append(f"has an invalid color profile, so its colors are assumed to be sRGB: {error}")
        return image.convert("RGB")
    notes.remarks.append(f"converted from {name} to sRGB")
    return converted


def _flatten(rgb: Image.Image, alpha: Image.Image | None, notes: Notes) -> tuple[Image.Image, Image.Image | None]:
    """Paste the image on gray: `convert("RGB")` would reveal the colors of transparent pixels."""
    if alpha is None or alpha.getextrema()[0] == 255:
        return rgb, None
    if alpha.getextrema()[1] == 0:
        raise UnusableError("is entirely transparent")
    canvas = Image.new("RGB", rgb.size, GRAY)
    canvas.paste(rgb, mask=alpha)
    notes.remarks.append("its transparency is filled with gray, the color of the empty training canvas")
    transparent = float((np.asarray(alpha) < 128).mean())
    return canvas, alpha if transparent >= MIN_TRANSPARENT else None


_GAP = 2  # pixels between the images of a grid
_LABEL_LINES = 3  # a longer label is cut


def to_image(pixels: Tensor) -> Image.Image:
    """Return uint8 pixels [H, W, 3] as a Pillow image."""
    return Image.fromarray(pixels.numpy())


def grid(images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None) -> Image.Image:
    """Arrange images of one size in a grid, as square as possible unless `columns` is given.

    Args:
        images: at least one.
        columns: images per row.
        labels: one text per image, written below it; None for no text.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    texts = [_label(text, width) for text in labels or ()]
    step = height + max((text.height for text in texts), default=0) + _GAP
    size = (columns * (width + _GAP) - _GAP, math.ceil(len(images) / columns) * step - _GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        left, top = index % columns * (width + _GAP), index // columns * step
        sheet.paste(image, (left, top))
        if texts:
            sheet.paste(texts[index], (left, top + height))
    return sheet


def _label(text: str, width: int) -> Image.Image:
    """Return black text on white, wrapped to a width in pixels."""
    size = max(10, min(width // 32, 24))
    # Without FreeType there is one size, and only Latin characters.
    scalable = features.check("freetype2")
    font = ImageFont.load_default(size) if scalable else ImageFont.load_default()
    text = text if scalable else text.encode("latin-1", "replace").decode("latin-1")
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    lines = [line for line in lines if line]
    if len(lines) > _LABEL_LINES:
        lines = [*lines[: _LABEL_LINES - 1], f"{lines[_LABEL_LINES - 1]} ..."]
    height = round(size * 1.3)
    label = Image.new("RGB", (width, max(len(lines), 1) * height + 2), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(label).text((1, 1 + row * height), line, fill="black", font=font)
    return label


def png_bytes(image: Image.Image, texts: Mapping[str, str] | None = None) -> bytes:
    """Return a PNG file with text chunks, such as the prompt and the seed."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically; see `files.atomically` for its errors."""
    write_bytes(path, png_bytes(image, texts))


def save_new_png(path: Path, image: Image.Image, texts: Mapping[str, str] | None = None) -> bool:
    """Write a PNG unless the name is taken, also by another process at the same time; return whether it was written.

    Raises:
        EchoDistillError: the file cannot be written.
    """
    with explained(path):
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
    try:
        save_png(path, image, texts)
    except BaseException:
        path.unlink(missing_ok=True)  # the empty file that held the name
        raise
    return True


def a1111_text(prompt: str, fields: Mapping[str, object]) -> str:
    """Return the text of the PNG chunk "parameters", which A1111 and Forge read: prompt, then settings in a line."""
    values = {name: str(value) for name, value in fields.items()}
    quoted = {n: json.dumps(v, ensure_ascii=False) if re.search(r"[,:\n]", v) else v for n, v in values.items()}
    return f"{prompt}\n" + ", ".join(f"{name}: {value}" for name, value in quoted.items())
