"""Check a run before a model is loaded: its name, trackers, photos, and an earlier run in its place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from echodistill_cli.config.schema import Config
from echodistill_cli.config.warnings import check_trackers, toy_warning, warnings
from echodistill_cli.runs import CONFIG_FILE, check_name, resume_run

if TYPE_CHECKING:
    from echodistill_cli.data.photos import PhotoReport


def check_before(config: Config) -> PhotoReport:
    """Return the photos of a run, after every check that needs no model.

    Raises:
        ConfigError: the name or a tracker is wrong.
        PhotoError: there are too few usable photos.
    """
    from echodistill_cli.data.photos import load_photos

    check_name(config)
    check_trackers(config.run.report_to)
    return load_photos(
        Path(config.concept.photos),
        min_photos=config.concept.min_photos,
        resolution=config.model.resolution,
        masks=config.concept.masks,
        captions=config.concept.captions,
    )


def warnings_before(config: Config, report: PhotoReport) -> Iterator[str]:
    """Yield a line for each photo and setting that a person should look at."""
    for file in report.files:
        if file.verdict != "ok":
            yield f"{file.name}: {file.verdict}: {'; '.join(file.notes)}"
    yield from report.warnings
    if toy := toy_warning(config, max((max(file.size) for file in report.files if file.size), default=0)):
        yield toy
    yield from warnings(config)


def check_resumable(config: Config) -> bool:
    """Return whether there is a run at `config.output` that these settings continue.

    Raises:
        ConfigError: it was made with other settings.
    """
    if not (config.output / CONFIG_FILE).is_file():
        return False
    resume_run(config)
    return True


def photos_fingerprint(folder: Path) -> str:
    """Return a hash of the names and sizes of the files below a folder of photos; "" without the folder.

    It recognizes other photos without reading them, which takes hours for ten thousand subjects.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(folder).as_posix()}\n{path.stat().st_size}\n" for path in files)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16] if files else ""
