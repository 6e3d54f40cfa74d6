"""A folder of files → checked, oriented, described subject photos; and the report of what was wrong with each.

Every file gets one verdict: `ok`, `warning` (used, but look at it) or `skipped`, each with its reasons. Pictures come
out upright, 8-bit, in sRGB, without transparency. The thresholds were set on the 42 photos of eight DreamBooth
subjects: none of those is warned about, while blurred versions and re-encoded copies of them are.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from echodistill_cli.data.images import Notes, UnusableError, read_picture
from echodistill_cli.errors import PhotoError

MIN_SIDE = 16  # pixels; smaller pictures are icons
SHARPNESS = 250.0  # the real photos reach 1100 or more; blurred with sigma 3 at 768 px, 92 at most
COPY_CORRELATION = 0.95  # different photos of one subject reach 0.73; a strongly re-encoded copy has 0.99
MIN_CONTRAST = 4.0  # standard deviation of the grey values, of 255
PANORAMA = 2.2  # aspect ratio
MAX_CUT = 0.4  # share of the picture outside its square crop: 16:9 is told, 3:2 is not
MAX_MASK_CUT = 0.1  # share of the subject outside the square crop
_IGNORED = {".txt", ".json", ".md"}


@dataclass(frozen=True, eq=False)
class Photo:
    """A usable photo. `image` is kept at most at twice the training resolution (short side): no zoom asks for more."""

    path: Path
    image: Image.Image  # RGB
    mask: Image.Image | None  # L, same size, 255 where the subject is; None if unknown
    caption: str | None  # first line of <stem>.txt
    crop: tuple[int, int, int, int]  # the square of `image` to train on: left, top, right, bottom in pixels


@dataclass(frozen=True)
class FileReport:
    """One file's verdict; `size` (width, height of the upright original) and `format` are None if undecodable."""

    name: str
    verdict: Literal["ok", "warning", "skipped"]
    notes: tuple[str, ...]
    size: tuple[int, int] | None = None
    format: str | None = None


@dataclass(frozen=True, eq=False)
class PhotoReport:
    """Verdicts in natural order of the names, the usable photos in the same order, and warnings about the folder."""

    files: tuple[FileReport, ...]
    photos: tuple[Photo, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report for `--json`: plain values, file names without folders."""
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
    """`check_photos`, insisting on `min_photos` usable ones.

    Raises:
        PhotoError: the folder is missing, unreadable or not a folder, or holds fewer than `min_photos` usable photos.
    """
    report = check_photos(folder, resolution=resolution, masks=masks, captions=captions)
    require_enough(report, folder, min_photos)
    return report


def require_enough(report: PhotoReport, folder: Path, min_photos: int) -> None:
    """Insist on `min_photos` usable ones.

    Raises:
        PhotoError: there are fewer; it names the first skipped files with their reasons.
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
    found = f"{usable or 'none'} among {total} file{'s' * (total != 1)}{listed}."
    raise PhotoError(f"{expected} {found}", f"`echodistill check {folder}` gives the verdict on each file.")


def check_photos(folder: Path, *, resolution: int, masks: str, captions: bool) -> PhotoReport:
    """Judge every file of a folder; subfolders, hidden files, .txt, .json and .md files are left out.

    Args:
        folder: holds the photos; `masks/<stem>.png` (white is the subject) and `<stem>.txt` go with `<stem>.jpg`.
        resolution: side of the training pictures in pixels.
        masks: "off" uses none; all else takes them from `masks/` and from alpha channels.
        captions: whether to read the .txt files.

    Raises:
        PhotoError: the folder is missing, unreadable or not a folder.
    """
    paths = [path for path in _entries(folder) if path.suffix.lower() not in _IGNORED]
    mask_files = {}
    wanted = masks != "off"
    in_folder = wanted and (folder / "masks").is_dir()
    if in_folder:
        mask_files = {path.stem: path for path in _entries(folder / "masks") if path.suffix.lower() == ".png"}
    files: list[FileReport] = []
    photos: list[Photo] = []
    thumbnails: dict[str, NDArray[np.float64]] = {}
    for path in paths:
        notes = Notes()
        try:
            image, alpha, kind = read_picture(path, notes)
            mask = _subject_mask(mask_files.get(path.stem), image.size, alpha, notes) if wanted else None
            photo = _photo(path, image, mask, resolution, _caption(path, notes) if captions else None)
        except UnusableError as error:
            files.append(FileReport(path.name, "skipped", (str(error),)))
            continue
        notes.warnings += _quality_warnings(photo, image.size, resolution) + _copy_warnings(photo, thumbnails)
        verdict: Literal["ok", "warning"] = "warning" if notes.warnings else "ok"
        files.append(FileReport(path.name, verdict, (*notes.warnings, *notes.remarks), image.size, kind))
        photos.append(photo)
    unmatched = _mask_warnings(mask_files, paths) if in_folder else []
    return PhotoReport(tuple(files), tuple(photos), tuple(unmatched))


def square_crop(image: Image.Image, mask: Image.Image | None) -> tuple[int, int, int, int]:
    """The largest square of a picture, placed along its long side where the subject is: left, top, right, bottom.

    With a mask it centres on the mask's bounding box. Without, it takes the square with the largest share of the
    picture's gradient energy, less its squared distance from the centre (as a share of the room there is): subjects
    have more detail than their background, and photographers centre them.
    """
    (width, height), side = image.size, min(image.size)
    room, wide = max(width, height) - side, width > height
    box = mask.point(lambda value: 255 * (value > 127)).getbbox() if mask else None
    if box:
        offset = ((box[0] + box[2] if wide else box[1] + box[3]) - side) / 2
    else:
        small = _grey(image, 64)
        detail = np.add(*np.abs(np.gradient(small))).sum(axis=0 if wide else 1)
        shares = np.convolve(detail, np.ones(min(small.shape)), mode="valid") / max(float(detail.sum()), 1e-8)
        places = (np.arange(len(shares)) + 0.5) / len(shares)  # 0…1 of the room
        offset = room * float(places[np.argmax(shares - (places - 0.5) ** 2)])
    start = min(max(round(offset), 0), room)
    return (start, 0, start + side, side) if wide else (0, start, side, start + side)


def _entries(folder: Path, *, folders: bool = False) -> list[Path]:
    """Visible files, or else folders, in natural order: 2.jpg before 10.jpg, whatever the case."""
    expected = "Give the folder that holds 3 to 6 photos of the subject."
    try:
        if not folder.exists():
            raise PhotoError(f"{folder} does not exist.", expected)
        if not folder.is_dir():
            raise PhotoError(f"{folder} is a file, not a folder.", expected)
        shown = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
        visible = [entry for entry in shown if entry.is_dir() == folders]
    except OSError as error:
        raise PhotoError(f"{folder} cannot be read: {error.strerror}.", expected) from error
    return sorted(visible, key=lambda entry: (_padded(entry.name.casefold()), entry.name))


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
    """The mask file if there is a good one, else the photo's own alpha."""
    if path is not None:
        name, aspect = f"masks/{path.name}", size[0] / size[1]
        try:
            picture, cutout, _ = read_picture(path, Notes())
        except UnusableError as error:
            notes.warnings.append(f"{name} is ignored: it {error}")
            return alpha
        mask = cutout or picture.convert("L")
        if abs(mask.width / mask.height / aspect - 1) > 0.02:
            notes.warnings.append(f"{name} is ignored: it has {mask.size}, the photo {size}")
        elif mask.point(lambda value: 255 * (value > 127)).getbbox() is None:
            notes.warnings.append(f"{name} is ignored: it has no white, so no subject")
        else:
            notes.remarks.append(f"subject mask from {name}")
            return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
    if alpha is not None:
        notes.remarks.append("its transparency is the subject mask")
    return alpha


def _caption(path: Path, notes: Notes) -> str | None:
    file = path.with_suffix(".txt")
    if not file.exists():
        return None
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        notes.warnings.append(f"{file.name} is ignored: it cannot be read as UTF-8 text ({type(error).__name__})")
        return None
    if not lines:
        notes.warnings.append(f"{file.name} is ignored: it is empty")
        return None
    return lines[0]


def _quality_warnings(photo: Photo, size: tuple[int, int], resolution: int) -> list[str]:
    (width, height), aspect = size, max(size) / min(size)
    sample = _grey(photo.image.crop(photo.crop), 384)
    flat, cut, cut_mask = bool(sample.std() < MIN_CONTRAST), 1 - 1 / aspect, 0.0
    if photo.mask is not None:
        inside = np.asarray(photo.mask.crop(photo.crop), dtype=np.float64).sum()
        cut_mask = 1 - float(inside / np.asarray(photo.mask, dtype=np.float64).sum())
    findings = (
        (min(size) < resolution, f"{width} x {height} is smaller than the resolution {resolution}, so it is enlarged"),
        (flat, "almost one colour"),
        (not flat and _sharpness(sample) < SHARPNESS, "looks blurred"),
        (aspect > PANORAMA, f"is a panorama ({aspect:.1f} : 1); the square crop cuts {cut:.0%} of it away"),
        (cut > MAX_CUT and aspect <= PANORAMA and photo.mask is None, f"the square crop cuts {cut:.0%} of it away"),
        (cut_mask > MAX_MASK_CUT, f"the square crop cuts {cut_mask:.0%} of the subject away"),
    )
    return [text for found, text in findings if found]


def _sharpness(grey: NDArray[np.float64]) -> float:
    """Largest variance of the Laplacian among up to 8 x 8 tiles: one sharp place is enough, backgrounds may be soft."""
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    count = min(8, max(1, len(laplacian) // 8))  # tiles of fewer than 8 pixels a side would measure noise
    tile = len(laplacian) // count
    tiles = laplacian[: count * tile, : count * tile].reshape(count, tile, count, tile)
    return float(tiles.var(axis=(1, 3)).max())


def _copy_warnings(photo: Photo, thumbnails: dict[str, NDArray[np.float64]]) -> list[str]:
    """Compare with the photos before and remember this one.

    Correlation of 32 x 32 grey thumbnails: on the real photos other views reach 0.73 at most and brightened copies
    0.94 at least, where a 128-bit dHash leaves no gap (a brightened copy differs in 23 %, another view in 23 %).
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
    """What in `masks/` would otherwise be silently ignored."""
    stems = {path.stem for path in paths}
    if not stems & set(mask_files):
        return [
            f"masks/ holds {len(mask_files)} .png files, none named like a photo (masks/<stem>.png): no mask is used"
        ]
    orphans = [f"masks/{file.name} is named like no photo" for stem, file in mask_files.items() if stem not in stems]
    bare = [path.name for path in paths if path.stem not in mask_files]
    return orphans + ([f"masks/ has no mask for {', '.join(bare)}"] if bare else [])


def _grey(image: Image.Image, side: int) -> NDArray[np.float64]:
    """Grey values 0…255 [H, W], reduced (never enlarged) to a short side of `side` pixels."""
    scale = min(1.0, side / min(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
