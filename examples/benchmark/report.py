"""`python -m examples.benchmark.report`: the benchmark's rows as tables and as one figure.

A contestant's mean is over subjects and training seeds. Its spread is the standard deviation of the seeds' means or,
with a single seed, the standard error over subjects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from examples.benchmark.contestants import CONTESTANTS, TEACHERS
from examples.benchmark.run import REAL, RESULTS, sheet_file
from examples.benchmark.subjects import SEEDS, TEST, reference_pictures
from examples.mini_world.world import contact_sheet

Row = Mapping[str, Any]
SCORES = (
    *("recognition", "subject_fidelity", "prompt_fidelity", "copy_rate", "diversity", "sharpness", "drift"),
    *("steps", "seconds"),
)
PARTS = ("recognition", "subject_fidelity", "prompt_fidelity", "sharpness", "drift")
BEFORE, AFTER = "teacher-before-echo", "teacher-after-echo"
ENDS = (BEFORE, AFTER, *(name for rows in TEACHERS.values() for name in rows if name != AFTER))
ORDER = (REAL, *CONTESTANTS, *ENDS)
# Rows of an earlier preset are compared with the contestant that still has that preset.
WHOLE = {"ours-without-strength": "ours-with-pictures"}
SHEET_SUBJECTS = TEST[:6]


def summary(rows: Sequence[Row], score: str) -> tuple[float, float] | None:
    """Return mean and spread of a score over one contestant's rows; None if no row has it."""
    known = [row for row in rows if row.get(score) is not None]
    if not known:
        return None
    seeds = {seed: [row[score] for row in known if row["training_seed"] == seed] for seed in _seeds(known)}
    if len(seeds) > 1:
        return mean(row[score] for row in known), stdev(mean(values) for values in seeds.values())
    values = [row[score] for row in known]
    return mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({row["training_seed"] for row in rows})


def of_length(rows: Sequence[Row], scale: float | None) -> list[Row]:
    """Return the rows of one scale; None selects the largest scale among rows that are no trials."""
    longest = max((row["scale"] for row in rows if not row["trial"]), default=1.0)
    return [row for row in rows if row["scale"] == (longest if scale is None else scale)]


def of_split(rows: Sequence[Row], split: str) -> dict[str, list[Row]]:
    """Return the rows of a split by contestant, in the table's order, without trials."""
    kept = [row for row in rows if row["split"] == split and not row["trial"]]
    return {name: own for name in ORDER if (own := [row for row in kept if row["contestant"] == name])}


def table(rows: Sequence[Row], split: str) -> str:
    """Return all scores as a Markdown table."""
    lines = [f"| {split} | runs | " + " | ".join(SCORES).replace("_", " ") + " |", "|---" * (2 + len(SCORES)) + "|"]
    for name, own in of_split(rows, split).items():
        cells = []
        for score in SCORES:
            value = summary(own, score)
            plain = score in ("steps", "seconds")
            cells.append("" if value is None else f"{value[0]:.0f}" if plain else f"{value[0]:.3f} ± {value[1]:.3f}")
        lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def margin(rows: Sequence[Row], first: str, second: str, score: str = "recognition") -> tuple[float, float, int] | None:
    """Return by how much one contestant leads another on the same subjects and training seeds.

    Returns:
        mean of the paired differences, standard error, number of pairs; None with fewer than two pairs.
    """
    found = {(r["contestant"], r["subject"], r["training_seed"]): r[score] for r in rows if not r["trial"]}
    pairs = [
        (value, found[other])
        for key, value in found.items()
        if (other := (second, *key[1:])) in found and key[0] == first
    ]
    differences = [one - two for one, two in pairs]
    if len(differences) < 2:
        return None
    return mean(differences), stdev(differences) / len(differences) ** 0.5, len(differences)


def margins(rows: Sequence[Row], split: str) -> str:
    """Return the leads of `ours` over every other method, and between the teacher's ends, as a Markdown table."""
    others = [name for name in of_split(rows, split) if name in CONTESTANTS and not name.startswith("ours")]
    contests = [("ours", name) for name in others]
    contests += [(AFTER, name) for name in ENDS if name != AFTER]
    contests += [(name, BEFORE) for name in ENDS if name not in (BEFORE, AFTER)]
    own = [row for row in rows if row["split"] == split]
    lines = ["| recognition, paired | ahead by | pairs |", "|---|---|---|"]
    for first, second in contests:
        if found := margin(own, first, second):
            lines.append(f"| {first} over {second} | {found[0]:+.3f} ± {found[1]:.3f} | {found[2]} |")
    return "\n".join(lines)


def parts(rows: Sequence[Row], split: str) -> str:
    """Return the paired change in each score when a part of `ours` is left out, as a Markdown table."""
    own = [row for row in rows if row["split"] == split]
    lines = [
        "| minus ours, paired | " + " | ".join(PARTS).replace("_", " ") + " | pairs |",
        "|---" * (2 + len(PARTS)) + "|",
    ]
    for name in [name for name in of_split(rows, split) if name.startswith("ours-")]:
        whole = WHOLE.get(name, "ours")
        found = [pair for score in PARTS if (pair := margin(own, name, whole, score))]
        if found:
            cells = " | ".join(f"{ahead:+.3f} ± {error:.3f}" for ahead, error, _ in found)
            shown = name if whole == "ours" else f"{name}, minus {whole}"
            lines.append(f"| {shown} | {cells} | {found[0][2]} |")
    return "\n".join(lines)


def origins(rows: Sequence[Row], split: str) -> str:
    """Return where and when each contestant's training seeds were run, as a Markdown table."""
    lines = ["| contestant | training seeds | date | machine |", "|---|---|---|---|"]
    for name, own in of_split(rows, split).items():
        for machine in sorted({row["machine"] for row in own}):
            here = [row for row in own if row["machine"] == machine]
            first, last = min(row["date"] for row in here), max(row["date"] for row in here)
            seeds = ", ".join(map(str, _seeds(here)))
            lines.append(f"| {name} | {seeds} | {first if first == last else f'{first} to {last}'} | {machine} |")
    return "\n".join(lines)


def figure(rows: Sequence[Row], split: str, path: Path) -> None:
    """Plot subject fidelity against prompt fidelity with spreads; the right panel enlarges the best corner."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plot, (overview, corner) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for index, (name, own) in enumerate(of_split(rows, split).items()):
        across, up = summary(own, "prompt_fidelity"), summary(own, "subject_fidelity")
        if across is None or up is None:
            continue
        kind = "*" if name == REAL else "s" if name in ENDS else "^" if name.startswith("ours-") else "o"
        for axes in (overview, corner):
            axes.errorbar(
                *(across[0], up[0], up[1], across[1]),
                fmt=kind,
                color="black" if name == REAL else colours[index % len(colours)],
                elinewidth=0.8,
                capsize=2,
                markersize=11 if name == "ours" else 6,
                label=name if axes is corner else None,
            )
    corner.set_xlim(0.84, 1.02)
    corner.set_ylim(0.54, 0.68)
    overview.set_ylabel("subject fidelity (mean cosine to the references)")
    plot.supxlabel("prompt fidelity (fraction of images with the requested place and color)", fontsize="medium")
    plot.suptitle(f"One-step personalization on the mini world, {split} subjects, equal compute")
    plot.legend(loc="outside right upper", fontsize=8)
    for axes in (overview, corner):
        axes.grid(alpha=0.3)
    plot.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(plot)


def subjects_sheet(path: Path, scale: float, contestant: str = "ours") -> None:
    """Write a sheet: per subject its references, then the first image of every other prompt (first six subjects)."""
    tiles = []
    for noun in SHEET_SUBJECTS:
        if not (file := sheet_file(contestant, noun, 0, scale)).exists():
            raise SystemExit(f"{file} is missing. Run {contestant} with seed 0 first: python -m examples.benchmark.run")
        with Image.open(file) as opened:
            drawn = np.asarray(opened.convert("RGB"))
        side = drawn.shape[0] // len(SEEDS)
        first = [drawn[:side, left : left + side] for left in range(0, drawn.shape[1], 2 * side)]
        gap = np.full((side, side, 3), 255, dtype=np.uint8)
        tiles += [*reference_pictures(noun), gap, *first]
    contact_sheet(tiles, len(tiles) // len(SHEET_SUBJECTS), zoom=1).save(path)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; write the figure and the sheet if requested."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--scale", type=float, help="fraction of the preset's steps (default: the largest)")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args(arguments)
    rows = of_length(json.loads(options.results.read_text()), options.scale)
    tables = [part(rows, options.split) for part in (table, margins, parts, origins)]
    print(*(text for text in tables if text.count("\n") > 1), sep="\n\n")  # skip tables without rows
    if options.figure:
        figure(rows, options.split, options.figure)
    if options.sheet:
        subjects_sheet(options.sheet, rows[0]["scale"])


if __name__ == "__main__":
    main()
