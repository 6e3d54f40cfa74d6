"""`python -m examples.benchmark.report`: the benchmark's rows as tables and as one figure.

A contestant's mean is over subjects and training seeds. What follows the ± is its standard error: of the seeds' means
or, with a single seed, of the subjects' values. All rows of a table are by one judge. A letter names the kind of
machine. A lead is a difference of rows from one kind, or has a dagger where there are none.
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

from echodistill_cli.cli.options import quiet_libraries
from examples.benchmark.contestants import CONTESTANTS, RATES, TEACHERS
from examples.benchmark.run import REAL, RESULTS, sheet_file
from examples.benchmark.subjects import SEEDS, SPLITS, TEST, reference_pictures
from examples.mini_world.world import contact_sheet

Row = Mapping[str, Any]
SCORES = (
    *("recognition", "recognition_plain", "recognition_recolored", "subject_fidelity", "prompt_fidelity"),
    *("copy_rate", "diversity", "sharpness", "drift"),
    *("sharpness_share", "named", "steps", "cpu_seconds"),
)
PARTS = ("recognition", "subject_fidelity", "prompt_fidelity", "sharpness", "drift")
FIRST_JUDGE = "judge-0"  # of rows that name none
BEFORE, AFTER = "teacher-before-echo", "teacher-after-echo"
ENDS = (BEFORE, AFTER, *(name for rows in TEACHERS.values() for name in rows if name != AFTER))
ORDER = (REAL, *CONTESTANTS, *ENDS)
# Rows of an earlier preset are compared with the contestant that still has that preset.
WHOLE = {"ours-without-strength": "ours-with-pictures"}
ACROSS = "†"
SHEET_SUBJECTS = TEST[:6]


def summary(rows: Sequence[Row], score: str) -> tuple[float, float] | None:
    """Return mean and standard error of a score over one contestant's rows; None if no row has it."""
    known = [row for row in rows if row.get(score) is not None]
    if not known:
        return None
    seeds = {seed: [row[score] for row in known if row["training_seed"] == seed] for seed in _seeds(known)}
    if len(seeds) > 1:
        return mean(row[score] for row in known), standard_error([mean(values) for values in seeds.values()])
    values = [row[score] for row in known]
    return mean(values), standard_error(values)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _seeds(rows: Sequence[Row]) -> list[int]:
    return sorted({row["training_seed"] for row in rows})


def of_length(rows: Sequence[Row], scale: float | None) -> list[Row]:
    """Return the rows of one scale; None selects the largest scale among rows that are no trials."""
    longest = max((row["scale"] for row in rows if not row["trial"]), default=1.0)
    return [row for row in rows if row["scale"] == (longest if scale is None else scale)]


def of_judge(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the newest judge alone; no score of one judge is compared with another's."""
    newest = max((row.get("judge", FIRST_JUDGE) for row in rows), default=FIRST_JUDGE)
    return [row for row in rows if row.get("judge", FIRST_JUDGE) == newest]


def machine_letters(rows: Sequence[Row]) -> dict[str, str]:
    """Return a letter for each kind of machine, in alphabetical order of the kinds."""
    return {kind: chr(ord("a") + index) for index, kind in enumerate(sorted({row["machine"] for row in rows}))}


def of_split(rows: Sequence[Row], split: str) -> dict[str, list[Row]]:
    """Return the rows of a split by contestant, in the table's order, without trials."""
    kept = [row for row in rows if row["split"] == split and not row["trial"]]
    return {name: own for name in ORDER if (own := [row for row in kept if row["contestant"] == name])}


def table(rows: Sequence[Row], split: str) -> str:
    """Return all scores that any row has as a Markdown table; the last column names the kinds of machines."""
    contestants, letters = of_split(rows, split), machine_letters(rows)
    scores = [score for score in SCORES if any(summary(own, score) for own in contestants.values())]
    heads = ["runs", *(score.replace("_", " ") for score in scores), "machine"]
    lines = [f"| {split} | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name, own in contestants.items():
        cells = []
        for score in scores:
            value = summary(own, score)
            plain = score in ("steps", "cpu_seconds")
            cells.append("" if value is None else f"{value[0]:.0f}" if plain else f"{value[0]:.3f} ± {value[1]:.3f}")
        kinds = " ".join(sorted({letters[row["machine"]] for row in own}))
        lines.append(f"| {name} | {len(own)} | " + " | ".join([*cells, kinds]) + " |")
    return "\n".join(lines)


def margin(rows: Sequence[Row], first: str, second: str, score: str = "recognition") -> tuple[float, float, int] | None:
    """Return by how much one contestant leads another on the same subjects, training seeds and kind of machine.

    Returns:
        mean of the paired differences, standard error, number of pairs; None with fewer than two pairs.
    """
    found = {
        (r["contestant"], r["subject"], r["training_seed"], r["machine"]): r[score] for r in rows if not r["trial"]
    }
    differences = [
        value - found[other]
        for key, value in found.items()
        if (other := (second, *key[1:])) in found and key[0] == first
    ]
    if len(differences) < 2:
        return None
    return mean(differences), standard_error(differences), len(differences)


def marked_margin(
    rows: Sequence[Row], first: str, second: str, score: str = "recognition"
) -> tuple[float, float, str] | None:
    """Return `margin`, or if no kind of machine has both, the lead across kinds, with a dagger at its pairs."""
    if (one := margin(rows, first, second, score)) is not None:
        return *one[:2], str(one[2])
    across = margin([{**row, "machine": ""} for row in rows], first, second, score)
    return None if across is None else (*across[:2], f"{across[2]}{ACROSS}")


def margins(rows: Sequence[Row], split: str) -> str:
    """Return the leads of `ours` over every other method, and between the teacher's ends, as a Markdown table."""
    others = [name for name in of_split(rows, split) if name in CONTESTANTS and not name.startswith("ours")]
    contests = [("ours", name) for name in others]
    contests += [(AFTER, name) for name in ENDS if name != AFTER]
    contests += [(name, BEFORE) for name in ENDS if name not in (BEFORE, AFTER)]
    own = [row for row in rows if row["split"] == split]
    lines = ["| recognition, paired | ahead by | pairs |", "|---|---|---|"]
    for first, second in contests:
        if found := marked_margin(own, first, second):
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
        found = [pair for score in PARTS if (pair := marked_margin(own, name, whole, score))]
        if found:
            cells = " | ".join(f"{ahead:+.3f} ± {error:.3f}" for ahead, error, _ in found)
            shown = name if whole == "ours" else f"{name}, minus {whole}"
            lines.append(f"| {shown} | {cells} | {found[0][2]} |")
    return "\n".join(lines)


def origins(rows: Sequence[Row], split: str) -> str:
    """Return where and when each contestant's training seeds were run, as a Markdown table."""
    lines = ["| contestant | training seeds | date | machine |", "|---|---|---|---|"]
    letters = machine_letters(rows)
    for name, own in of_split(rows, split).items():
        for machine in sorted({row["machine"] for row in own}):
            here = [row for row in own if row["machine"] == machine]
            first, last = min(row["date"] for row in here), max(row["date"] for row in here)
            seeds, days = ", ".join(map(str, _seeds(here))), first if first == last else f"{first} to {last}"
            lines.append(f"| {name} | {seeds} | {days} | {letters[machine]}: {machine} |")
    return "\n".join(lines)


def grid(rows: Sequence[Row], split: str, scale: float | None) -> str:
    """Return the trials of the learning rates: recognition by factor, the best in bold, as a Markdown table.

    Args:
        rows: of any kind.
        split: as everywhere.
        scale: of the rows that count; None selects the largest.
    """
    kept = [row for row in rows if row["split"] == split and row["trial"] in {f"rate={rate:g}" for rate in RATES}]
    longest = max((row["scale"] for row in kept), default=1.0)
    kept = [row for row in kept if row["scale"] == (longest if scale is None else scale)]
    lines = ["| recognition, rates × | " + " | ".join(f"{rate:g}" for rate in RATES) + " | runs each |"]
    lines.append("|---" * (2 + len(RATES)) + "|")
    for name in [name for name in CONTESTANTS if any(row["contestant"] == name for row in kept)]:
        found = [[r for r in kept if (r["contestant"], r["trial"]) == (name, f"rate={rate:g}")] for rate in RATES]
        means = [summary(own, "recognition") for own in found]
        best = max(value[0] for value in means if value)
        cells = [
            f"**{value[0]:.3f}**" if value and value[0] == best else f"{value[0]:.3f}" if value else ""
            for value in means
        ]
        runs = sorted({len(own) for own in found})
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {' or '.join(map(str, runs))} |")
    return "\n".join(lines)


def figure(rows: Sequence[Row], split: str, path: Path) -> None:
    """Plot subject fidelity against prompt fidelity with spreads; the right panel enlarges the best corner."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("--figure needs matplotlib: pip install --group benchmark") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plot, (overview, corner) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    colours = mpl.colormaps["tab20"].colors
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
    parser.add_argument("--split", choices=[*SPLITS], default="test")
    parser.add_argument("--scale", type=float, help="fraction of the preset's steps (default: the largest)")
    parser.add_argument("--grid", action="store_true", help="the trials of the learning rates instead")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args(arguments)
    if not options.results.is_file():
        raise SystemExit(f"{options.results} is missing. Make it: python -m examples.benchmark.run")
    everything = of_judge(json.loads(options.results.read_text()))
    if options.grid:
        print(grid(everything, options.split, options.scale))
        return
    rows = of_length(everything, options.scale)
    if (options.figure or options.sheet) and not rows:
        raise SystemExit(f"{options.results} has no rows of this judge. Make some: python -m examples.benchmark.run")
    tables = [part(rows, options.split) for part in (table, margins, parts, origins)]
    print(*(text for text in tables if text.count("\n") > 1), sep="\n\n")  # skip tables without rows
    if options.figure:
        figure(rows, options.split, options.figure)
    if options.sheet:
        subjects_sheet(options.sheet, rows[0]["scale"])


if __name__ == "__main__":
    quiet_libraries(offline=True, quiet=True)
    main()
