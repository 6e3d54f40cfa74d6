"""`python look_at_wheel.py WHEEL CHECKOUT`: print what a wheel is, and fail if it lacks a file of the packages."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

MOST_MEGABYTES = 45  # the aim; a larger wheel is reported, because the embedded models decide it
PACKAGES = ("echodistill_cli", "echodistill")


def main(wheel: Path, checkout: Path) -> None:
    """Compare the wheel with the files that git tracks in the packages."""
    listed = subprocess.run(
        ["git", "-C", str(checkout), "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        capture_output=True,
        text=True,
        check=True,
    )
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (information,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(information).decode())
    folder = information.rpartition("/")[0]
    wanted = {*listed.stdout.split(), f"{folder}/licenses/LICENSE", f"{folder}/entry_points.txt"}
    wanted |= {f"{folder}/licenses/echodistill_cli/models/embedded/NOTICE"}
    if missing := sorted(wanted - names):
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    if extra := sorted(name for name in names - wanted if not name.startswith(folder)):
        sys.exit(f"{wheel.name} has what git does not: {', '.join(extra)}")
    size = wheel.stat().st_size / 1e6
    print(f"{metadata['Name']} {metadata['Version']}: {len(names)} files, {size:.1f} MB (aim: {MOST_MEGABYTES})")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
