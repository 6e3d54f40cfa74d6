"""Read image files as upright 8-bit sRGB without transparency, and write PNGs.

An alpha channel that cuts out a subject is returned separately.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from echodistill_cli.files import explained, scratch, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
GRAY = (128, 128, 128)  # 0 in [-1, 1], the empty canvas of augmented views; leaves no bright or dark fringe
MIN_TRANSPARENT = 0.01  # fraction of transparent pixels below which alpha only rounds the corners
# Larger files may be decompression bombs. A JPEG is decoded at a fraction of its size; phones make up to 200 million.
MOST_PIXELS, MOST_JPEG_PIXELS = 89_478_485, 400_000_000
_RAW = {
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SUBFILE_TYPE, _DNG_VERSION = 254, 50706  # TIFF tags
_INTEROPERABILITY = 0xA005  # EXIF
_IDENTITY = 2  # a profile that moves no color by more than this many levels of 255 is sRGB
# (X, Y, Z) of red, green and blue, adapted to D50 as in ICC profiles.
_SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
_ADOBE_RGB = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
_D50 = (0.9642, 1.0, 0.8249)
# Pillow's decoders raise all of these on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, struct.error, zlib.error)
_RAW_REASON = "is a camera's raw file, which is not read; export it as JPEG or PNG"


class UnusableError(Exception):
    """A file cannot be used. The message is the reason, without a subject ("is empty")."""


@dataclass
class Notes:
    """Notes on one file.

    Attributes:
        remarks: what was done to the image.
        warnings: what may be wrong with it; these change the verdict.
        size: width and height of the upright original; None until it is decoded.
    """

    remarks: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None


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
    with warnings.catch_warnings(record=True) as caught, _no_pixel_limit():
        warnings.simplefilter("always")
        image, alpha, kind = _decode(path, notes)
    # Pillow reports damaged metadata as UserWarning. Other categories, such as deprecations, are not about the file.
    messages = dict.fromkeys(str(warning.message).strip() for warning in caught if warning.category is UserWarning)
    notes.warnings += [f"Pillow says: {text}" for text in messages]
    return *_flatten(image, alpha, notes), kind


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Context in which Pillow opens a file of any size. `_shrink` has limits of its own, by format."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(path: Path, notes: Notes) -> tuple[Image.Image, Image.Image | None, str]:
    """Return RGB, alpha and format of the first frame, before the image is flattened."""
    header = b""
    try:
        if not path.is_file():  # a broken link, or a pipe, which would block
            raise UnusableError("cannot be read: not a regular file")
        with path.open("rb") as file:
            header = file.read(12)
            image = Image.open(file, formats=_formats())
            _require_photo(image, path, header)
            whole = image.size
            _shrink(image, notes)
            frames = getattr(image, "n_frames", 1)
            image.seek(0)
            image.load()
            kind = str(image.format)
            is_smaller = image.size != whole
            upright = _upright(image, notes)
            is_turned = (upright.width < upright.height) != (whole[0] < whole[1])
            notes.size = (whole[::-1] if is_turned else whole) if is_smaller else upright.size
            rgb, alpha = _to_srgb(upright, notes)
    except UnidentifiedImageError as error:
        raise UnusableError(_why_unidentified(path, header)) from error
    except _DECODE_ERRORS as error:
        raise UnusableError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if kind == "MPO":  # a phone's JPEG with a second view of the scene, not an animation
        return rgb, alpha, "JPEG"
    if frames > 1:
        notes.remarks.append(f"has {frames} frames; only the first is used")
    return rgb, alpha, kind


def _why_unidentified(path: Path, header: bytes) -> str:
    if not header:
        return "is empty (0 bytes)"
    if path.suffix.lower() in _RAW:
        return _RAW_REASON
    if header[4:8] == b"ftyp" and header[8:] in _HEIC_BRANDS:
        return "is HEIC, which needs pillow-heif: pip install pillow-heif"
    return f"is not an image of a known kind ({', '.join(_formats())})"


def _require_photo(image: Image.Image, path: Path, header: bytes) -> None:
    """Reject a TIFF that begins with a small preview, as camera raw files (DNG, NEF, CR2, ...) do."""
    if image.format != "TIFF":
        return
    tags = getattr(image, "tag_v2", {})
    if _DNG_VERSION in tags or header[8:10] == b"CR" or path.suffix.lower() in _RAW:
        raise UnusableError(_RAW_REASON)
    kind = tags.get(_SUBFILE_TYPE)
    if isinstance(kind, int) and kind & 1:
        raise UnusableError("begins with a preview of the photo, as camera raw files do; export it as JPEG or PNG")


def _shrink(image: Image.Image, notes: Notes) -> None:
    """Let a huge JPEG be decoded at 1/2, 1/4 or 1/8 of its size; refuse what is too large to decode."""
    pixels, is_jpeg = image.width * image.height, image.format in ("JPEG", "MPO")
    if pixels <= MOST_PIXELS:
        return
    if pixels > (MOST_JPEG_PIXELS if is_jpeg else MOST_PIXELS):
        raise UnusableError(
            f"has too many pixels ({image.width} x {image.height}); make it smaller, such as 4000 pixels wide"
        )
    size = image.size
    fraction = next(part for part in (2, 4, 8) if pixels <= MOST_PIXELS * part**2)
    image.draft(None, (size[0] // fraction, size[1] // fraction))
    notes.remarks.append(f"has {size[0]} x {size[1]} pixels; it is read at {image.width} x {image.height}")


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
    profile, alpha = _profile_of(image), None
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


def _profile_of(image: Image.Image) -> bytes | None:
    """Return the embedded ICC profile, or one for what EXIF or a PNG's gAMA chunk says; None means sRGB."""
    if embedded := image.info.get("icc_profile"):
        return bytes(embedded)
    with suppress(*_DECODE_ERRORS, KeyError, TypeError):  # damaged EXIF
        if image.getexif().get_ifd(_INTEROPERABILITY).get(1) == "R03":  # cameras write it instead of a profile
            return _matrix_profile("Adobe RGB", _ADOBE_RGB, 563 / 256)
    gamma = 1 / max(float(image.info.get("gamma") or 1 / 2.2), 0.1)
    if "srgb" not in image.info and abs(gamma - 2.2) > 0.1:  # 2.2 stands for sRGB's own curve
        return _matrix_profile(f"gamma {gamma:.2g}", _SRGB, gamma)
    return None


def _matrix_profile(name: str, primaries: Sequence[Sequence[float]], gamma: float) -> bytes:
    """Return an ICC version 2 profile of three primaries and a power curve."""

    def xyz(values: Sequence[float]) -> bytes:
        return struct.pack(">3i", *(round(value * 65536) for value in values))

    text = name.encode("ascii") + b"\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + xyz(_D50),
    }
    for color, values in zip((b"r", b"g", b"b"), primaries, strict=True):
        tags[color + b"XYZ"] = b"XYZ " + bytes(4) + xyz(values)
        tags[color + b"TRC"] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(">I4xI4s4s4s", start + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + xyz(_D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _apply_profile(image: Image.Image, profile: bytes, notes: Notes) -> Image.Image:
    """Convert to sRGB with an ICC profile; a profile that does not fit is ignored with a warning."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        space = {"GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "RGB")
        fitting = image.convert("RGB") if space == "RGB" and image.mode == "L" else image
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), fitting.mode, "RGB")
        if _changes_nothing(transform, fitting.mode):
            return fitting.convert("RGB")
        converted = ImageCms.applyTransform(fitting, transform) or fitting
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.warnings.append(f"has an invalid color profile, so its colors are assumed to be sRGB: {error}")
        return image.convert("RGB")
    notes.remarks.append(f"converted from {name} to sRGB")
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return whether a profile is sRGB by what it does: its name is not its curve."""
    if mode not in ("L", "RGB"):
        return False
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3)
    probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    converted = ImageCms.applyTransform(probe, transform) or probe
    difference = np.asarray(converted, dtype=np.int64) - np.asarray(probe.convert("RGB"), dtype=np.int64)
    return bool(np.abs(difference).max() <= _IDENTITY)


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


def to_image(pixels: Tensor) -> Image.Image:
    """Return uint8 pixels [H, W, 3] as a Pillow image."""
    return Image.fromarray(pixels.numpy())


def png_bytes(image: Image.Image, texts: Mapping[str, str] | None = None, level: int = 6) -> bytes:
    """Return a PNG file with text chunks, such as the prompt; a lower `level` is faster and larger."""
    chunks = PngImagePlugin.PngInfo()
    for key, text in (texts or {}).items():
        chunks.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks, compress_level=level)
    return buffer.getvalue()


def data_uri(image: Image.Image, side: int) -> str:
    """Return an image as the address that embeds it in a page: a JPEG that fits a square of `side` pixels."""
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save_png(path: Path, image: Image.Image, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically; see `files.atomically` for its errors."""
    write_bytes(path, png_bytes(image, texts))


def save_new_png(path: Path, image: Image.Image, texts: Mapping[str, str] | None = None) -> bool:
    """Write a PNG whole unless its name is taken, even by another process; return whether it was.

    Raises:
        EchoDistillError: the file cannot be written.
    """
    if os.path.lexists(path):
        return False
    with scratch(path) as folder, explained(path), suppress(FileExistsError):
        new = folder / path.name
        write_bytes(new, png_bytes(image, texts))
        try:
            os.link(new, path)
        except OSError as error:
            if isinstance(error, FileExistsError):
                return False
            path.touch(exist_ok=False)  # a disk without hard links
            new.replace(path)
        return True
    return False


def a1111_text(prompt: str, fields: Mapping[str, object]) -> str:
    """Return the PNG "parameters" text that A1111 and Forge read: the prompt, then a line of settings."""
    values = {name: str(value) for name, value in fields.items()}
    quoted = {n: json.dumps(v, ensure_ascii=False) if re.search(r"[,:\n]", v) else v for n, v in values.items()}
    return f"{prompt}\n" + ", ".join(f"{name}: {value}" for name, value in quoted.items())
