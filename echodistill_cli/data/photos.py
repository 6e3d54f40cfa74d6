"""Check a folder of subject photos: the usable photos, and a verdict on each file.

The verdict is `ok`, `warning` (used, but worth a look) or `skipped`, with reasons. The thresholds were set on the 42
photos of eight DreamBooth subjects: they cause no warning, but blurred versions and re-encoded copies of them do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echodistill_cli.data.images import Notes, UnusableError, read_image
from echodistill_cli.errors import PhotoError
from echodistill_cli.files import read_small

MIN_SIDE = 16  # pixels; smaller images are icons
SHARPNESS = 250.0  # the reference photos have at least 1100; blurred with sigma 3 at 768 px, at most 92
COPY_CORRELATION = 0.95  # different photos of one subject have at most 0.73; a strongly re-encoded copy has 0.99
MIN_CONTRAST = 4.0  # standard deviation of gray values 0…255
PANORAMA = 2.2  # aspect ratio
_LONGEST_CAPTION = 10_000  # characters; models read 77 tokens
MAX_CUT = 0.4  # fraction of the image outside its square crop: 16:9 is reported, 3:2 is not
MAX_MASK_CUT = 0.1  # fraction of the subject outside the square crop
_IGNORED = {".txt", ".json", ".md"}


@dataclass(frozen=True, eq=False)
class Photo:
    """A usable photo.

    Attributes:
        path: the file.
        image: RGB; its short side is at most twice the training resolution, which suffices for every zoom.
        mask: L, of the image's size, 255 on the subject; None if unknown.
        caption: first line of <stem>.txt, if there is one.
        crop: the square to train on: left, top, right, bottom in pixels.
    """

    path: Path
    image: Image.Image
    mask: Image.Image | None
    caption: str | None
    crop: tuple[int, int, int, int]


@dataclass(frozen=True)
class FileReport:
    """The verdict on one file.

    Attributes:
        name: the file's name, without its folder.
        verdict: "ok", "warning" or "skipped".
        notes: warnings or the reason for skipping, then remarks.
        size: width and height of the upright original; None if the file cannot be decoded.
        format: such as "JPEG"; None if the file cannot be decoded.
    """

    name: str
    verdict: Literal["ok", "warning", "skipped"]
    notes: tuple[str, ...]
    size: tuple[int, int] | None = None
    format: str | None = None


@dataclass(frozen=True, eq=False)
class PhotoReport:
    """The result of checking a folder.

    Attributes:
        files: one report per file, in natural order of the names.
        photos: the usable photos, in the same order.
        warnings: about the folder as a whole.
    """

    files: tuple[FileReport, ...]
    photos: tuple[Photo, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for `--json`, without folder names."""
        used = {photo.path.name: photo for photo in self.photos}
        files = []
        for file in self.files:
            photo = used.get(file.name)
            extra = {
                "mask": bool(photo and photo.mask),
                "caption": photo and photo.caption,
                "crop": photo and photo.crop,
            }
            files.append(asdict(file) | extra)
        return {"usable": len(self.photos), "warnings": list(self.warnings), "files": files}


def load_photos(folder: Path, *, min_photos: int, resolution: int, masks: str, captions: bool) -> PhotoReport:
    """Check a folder and require a number of usable photos. Other arguments are those of `check_photos`.

    Args:
        folder: holds the photos.
        min_photos: the number required.
        resolution: side of the training images in pixels.
        masks: "off" ignores masks.
        captions: whether to read captions.

    Raises:
        PhotoError: the folder is missing, unreadable or not a folder.
        PhotoError: fewer than `min_photos` photos are usable.
    """
    report = check_photos(folder, resolution=resolution, masks=masks, captions=captions)
    require_enough(report, folder, min_photos)
    return report


def require_enough(report: PhotoReport, folder: Path, min_photos: int) -> None:
    """Require a number of usable photos.

    Raises:
        PhotoError: there are fewer than `min_photos`; the message names the first skipped files with their reasons.
    """
    usable, total = len(report.photos), len(report.files)
    if usable >= min_photos:
        return
    expected = f"{folder}: expected at least {min_photos} usable photo{'s' * (min_photos != 1)} of the subject, found"
    if not report.files:
        nested = [entry for entry in _entries(folder, folders=True) if entry.name != "masks"]
        hint = f"Subfolders are not read; did you mean {nested[0]}?" if nested else "Copy 3 to 6 photos into it."
        raise PhotoError(f"{expected} no files.", hint)
    skipped = [f"{file.name} ({file.notes[0]})" for file in report.files if file.verdict == "skipped"]
    more = f" and {len(skipped) - 3} more" * (len(skipped) > 3)
    listed = f"; skipped {', '.join(skipped[:3])}{more}" * bool(skipped)
    summary = f"{usable or 'none'} among {total} file{'s' * (total != 1)}{listed}."
    raise PhotoError(f"{expected} {summary}", f"Run `echodistill check {folder}` for the verdict on each file.")


def check_photos(folder: Path, *, resolution: int, masks: str, captions: bool) -> PhotoReport:
    """Check every file of a folder except subfolders, hidden files, .txt, .json and .md files.

    Args:
        folder: holds the photos; `masks/<stem>.png` (white on the subject) and `<stem>.txt` belong to `<stem>.jpg`.
        resolution: side of the training images in pixels.
        masks: "off" ignores masks; any other value reads them from `masks/` and alpha channels.
        captions: whether to read captions from .txt files.

    Raises:
        PhotoError: the folder is missing, unreadable or not a folder.
    """
    paths = [path for path in _entries(folder) if path.suffix.lower() not in _IGNORED]
    mask_files = {}
    with_masks = masks != "off"
    has_mask_folder = with_masks and (folder / "masks").is_dir()
    if has_mask_folder:
        mask_files = {path.stem: path for path in _entries(folder / "masks") if path.suffix.lower() == ".png"}
    files: list[FileReport] = []
    photos: list[Photo] = []
    thumbnails: dict[str, NDArray[np.float64]] = {}
    for path in paths:
        notes = Notes()
        try:
            image, alpha, kind = read_image(path, notes)
            mask = _subject_mask(mask_files.get(path.stem), image.size, alpha, notes) if with_masks else None
            photo = _photo(path, image, mask, resolution, _caption(path, notes) if captions else None)
        except UnusableError as error:
            files.append(FileReport(path.name, "skipped", (str(error),)))
            continue
        size = notes.size or image.size
        notes.warnings += _quality_warnings(photo, size, resolution) + _copy_warnings(photo, thumbnails)
        verdict: Literal["ok", "warning"] = "warning" if notes.warnings else "ok"
        files.append(FileReport(path.name, verdict, (*notes.warnings, *notes.remarks), size, kind))
        photos.append(photo)
    warnings = _mask_warnings(mask_files, paths) if has_mask_folder else []
    return PhotoReport(tuple(files), tuple(photos), tuple(warnings))


def square_crop(image: Image.Image, mask: Image.Image | None) -> tuple[int, int, int, int]:
    """Return the largest square (left, top, right, bottom), placed along the long side at the subject.

    With a mask, the square is centered on the mask's bounding box. Without a mask, it maximizes its fraction of the
    image's gradient energy minus its squared distance from the center: subjects have more detail than backgrounds, and
    photographers center them.
    """
    (width, height), side = image.size, min(image.size)
    room, wide = max(width, height) - side, width > height
    box = mask.point(lambda value: 255 * (value > 127)).getbbox() if mask else None
    if box:
        offset = ((box[0] + box[2] if wide else box[1] + box[3]) - side) / 2
    else:
        small = _gray(image, 64)
        detail = np.add(*np.abs(np.gradient(small))).sum(axis=0 if wide else 1)
        shares = np.convolve(detail, np.ones(min(small.shape)), mode="valid") / max(float(detail.sum()), 1e-8)
        places = (np.arange(len(shares)) + 0.5) / len(shares)  # 0…1 of the room
        offset = room * float(places[np.argmax(shares - (places - 0.5) ** 2)])
    start = min(max(round(offset), 0), room)
    return (start, 0, start + side, side) if wide else (0, start, side, start + side)


def _entries(folder: Path, *, folders: bool = False) -> list[Path]:
    """Return visible files, or folders, in natural order: 2.jpg before 10.jpg, ignoring case."""
    remedy = "Give the folder that holds 3 to 6 photos of the subject."
    try:
        if not folder.exists():
            raise PhotoError(f"{folder} does not exist.", remedy)
        if not folder.is_dir():
            raise PhotoError(f"{folder} is a file, not a folder.", remedy)
        visible = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
        entries = [entry for entry in visible if entry.is_dir() == folders]
    except OSError as error:
        raise PhotoError(f"{folder} cannot be read: {error.strerror}.", remedy) from error
    return sorted(entries, key=lambda entry: (_padded(entry.name.casefold()), entry.name))


def _padded(name: str) -> str:
    return re.sub(r"\d+", lambda digits: digits[0].zfill(20), name)


def _photo(path: Path, image: Image.Image, mask: Image.Image | None, resolution: int, caption: str | None) -> Photo:
    if min(image.size) < MIN_SIDE:
        raise UnusableError(f"has only {image.width} x {image.height} pixels")
    scale = 2 * resolution / min(image.size)
    if scale < 1:
        smaller = (round(image.width * scale), round(image.height * scale))
        image = image.resize(smaller, Image.Resampling.LANCZOS)
        mask = mask.resize(smaller, Image.Resampling.BILINEAR) if mask else None
    return Photo(path, image, mask, caption, square_crop(image, mask))


def _subject_mask(
    path: Path | None, size: tuple[int, int], alpha: Image.Image | None, notes: Notes
) -> Image.Image | None:
    """Return the mask file if it is usable, else the photo's alpha channel."""
    if path is not None:
        name, aspect = f"masks/{path.name}", size[0] / size[1]
        try:
            image, cutout, _ = read_image(path, Notes())
        except UnusableError as error:
            notes.warnings.append(f"{name} is ignored: it {error}")
            return alpha
        mask = cutout or image.convert("L")
        if abs(mask.width / mask.height / aspect - 1) > 0.02:
            notes.warnings.append(f"{name} is ignored: it has size {mask.size}, but the photo has {size}")
        elif mask.point(lambda value: 255 * (value > 127)).getbbox() is None:
            notes.warnings.append(f"{name} is ignored: it has no white, so no subject")
        else:
            notes.remarks.append(f"subject mask from {name}")
            return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
    if alpha is not None:
        notes.remarks.append("its transparency is used as the subject mask")
    return alpha


def _caption(path: Path, notes: Notes) -> str | None:
    """Return the first line of a photo's .txt file that has text, and report what is not read."""
    file = path.with_suffix(".txt")
    try:
        if not file.is_file():  # a pipe would block
            notes.warnings += [f"{file.name} is ignored: it is not a regular file"] * file.exists()
            return None
        lines = [line.strip() for line in read_small(file).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        notes.warnings.append(f"{file.name} is ignored: it cannot be read as UTF-8 text ({type(error).__name__})")
        return None
    if not lines:
        notes.warnings.append(f"{file.name} is ignored: it is empty")
        return None
    if len(lines[0]) > _LONGEST_CAPTION:
        notes.warnings.append(f"{file.name} is ignored: {len(lines[0])} characters are too many for a caption")
        return None
    if more := len(lines) - 1:
        notes.warnings.append(f"only the first line of {file.name} is the caption; {more} more with text not read")
    return lines[0]


def _quality_warnings(photo: Photo, size: tuple[int, int], resolution: int) -> list[str]:
    (width, height), aspect = size, max(size) / min(size)
    sample = _gray(photo.image.crop(photo.crop), 384)
    flat, cut, cut_mask = bool(sample.std() < MIN_CONTRAST), 1 - 1 / aspect, 0.0
    if photo.mask is not None:
        inside = np.asarray(photo.mask.crop(photo.crop), dtype=np.float64).sum()
        cut_mask = 1 - float(inside / np.asarray(photo.mask, dtype=np.float64).sum())
    findings = (
        (min(size) < resolution, f"{width} x {height} is smaller than the resolution {resolution}, so it is enlarged"),
        (flat, "is almost one color"),
        (not flat and _sharpness(sample) < SHARPNESS, "looks blurred"),
        (aspect > PANORAMA, f"is a panorama ({aspect:.1f} : 1); the square crop removes {cut:.0%} of it"),
        (cut > MAX_CUT and aspect <= PANORAMA and photo.mask is None, f"the square crop removes {cut:.0%} of it"),
        (cut_mask > MAX_MASK_CUT, f"the square crop removes {cut_mask:.0%} of the subject"),
    )
    return [text for is_true, text in findings if is_true]


def _sharpness(gray: NDArray[np.float64]) -> float:
    """Return the largest variance of the Laplacian among up to 8 x 8 tiles: backgrounds may be soft."""
    laplacian = 4 * gray[1:-1, 1:-1] - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]
    count = min(8, max(1, len(laplacian) // 8))  # tiles of fewer than 8 pixels a side would measure noise
    tile = len(laplacian) // count
    tiles = laplacian[: count * tile, : count * tile].reshape(count, tile, count, tile)
    return float(tiles.var(axis=(1, 3)).max())


def _copy_warnings(photo: Photo, thumbnails: dict[str, NDArray[np.float64]]) -> list[str]:
    """Compare with the thumbnails of earlier photos, then add this photo's.

    Correlates 32 x 32 gray thumbnails. On the reference photos, other views reach at most 0.73 and brightened copies at
    least 0.94. A 128-bit dHash cannot separate them: both differ in 23 % of the bits.
    """
    small = np.asarray(photo.image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    if small.std() < MIN_CONTRAST:
        return []
    thumbnail = (small - small.mean()) / (small.std() * 32)
    likeness = {name: float((thumbnail * other).sum()) for name, other in thumbnails.items()}
    thumbnails[photo.path.name] = thumbnail
    nearest = max(likeness, key=lambda name: likeness[name], default="")
    return [f"looks like a copy of {nearest}"] if nearest and likeness[nearest] > COPY_CORRELATION else []


def _mask_warnings(mask_files: dict[str, Path], paths: list[Path]) -> list[str]:
    """Report masks without a photo and photos without a mask."""
    stems = {path.stem for path in paths}
    if not stems & set(mask_files):
        count = len(mask_files)
        return [f"masks/ holds {count} .png files, but none is named like a photo (masks/<stem>.png): no mask is used"]
    orphans = [f"masks/{file.name} belongs to no photo" for stem, file in mask_files.items() if stem not in stems]
    bare = [path.name for path in paths if path.stem not in mask_files]
    return orphans + ([f"masks/ has no mask for {', '.join(bare)}"] if bare else [])


def _gray(image: Image.Image, side: int) -> NDArray[np.float64]:
    """Return gray values 0…255 [H, W], scaled down to a short side of at most `side` pixels."""
    scale = min(1.0, side / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)


def photo_records(photos: Sequence[Photo]) -> list[dict[str, str]]:
    """Return the name of each photo and the SHA-256 of its prepared image, its mask and its caption."""
    return [
        {
            "name": photo.path.name,
            "image": _digest(photo.image.size, photo.crop, photo.image.tobytes()),
            "mask": _digest(photo.mask.tobytes() if photo.mask else None),
            "caption": _digest(photo.caption),
        }
        for photo in photos
    ]


def _digest(*parts: object) -> str:
    return hashlib.sha256(
        b"".join(part if isinstance(part, bytes) else repr(part).encode() for part in parts)
    ).hexdigest()
