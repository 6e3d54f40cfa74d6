"""`python -m examples.contact_sheet RUN`: a sheet of photos, one-step images, and those of the base model.

Also an example of the Python API: `sample` yields images, here each with the base model's image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

import echodistill_cli as ed
from echodistill_cli.cli.options import quiet_libraries
from echodistill_cli.data.grids import caption
from echodistill_cli.runs import open_run

TILE, GAP, HEADING = 128, 8, 22
Picture = Image.Image


def labeled(image: Picture, text: str) -> Picture:
    """Return a tile with a caption below the image."""
    below = caption(text, TILE)
    tile = Image.new("RGB", (TILE, TILE + below.height), "white")
    tile.paste(ImageOps.fit(image.convert("RGB"), (TILE, TILE), Image.Resampling.LANCZOS))
    tile.paste(below, (0, TILE))
    return tile


def sheet(rows: Sequence[tuple[str, Sequence[Picture]]]) -> Picture:
    """Return an image of rows of tiles, each row under a heading."""
    widest = max(len(tiles) for _, tiles in rows)
    width = GAP + widest * (TILE + GAP)
    heights = [HEADING + max(tile.height for tile in tiles) + GAP for _, tiles in rows]
    whole = Image.new("RGB", (width, sum(heights) + GAP), "white")
    top = GAP
    for (heading, tiles), height in zip(rows, heights, strict=True):
        whole.paste(caption(heading, width - 2 * GAP, 1, size=14), (GAP - 2, top))
        for column, tile in enumerate(tiles):
            whole.paste(tile, (GAP + column * (TILE + GAP), top + HEADING))
        top += height
    return whole


def contact_sheet(run: Path, prompts: Sequence[str], columns: int = 8) -> Picture:
    """Generate each prompt once with and without the LoRA, and return everything on one sheet."""
    config = open_run(run).config
    photos = [
        labeled(Image.open(path), path.name)
        for path in sorted(Path(config.concept.photos).iterdir())
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    ]
    samples = list(ed.sample(ed.SampleRequest(prompts, lora=run, compare=True)))
    rows: list[tuple[str, Sequence[Picture]]] = [("photos", photos[:columns])]
    for start in range(0, len(samples), columns):
        part = samples[start : start + columns]
        texts = [one.prompt.replace(config.subject, "…").removeprefix("a ") for one in part]
        rows.append((f"{config.subject}: one step", [labeled(s.image, t) for s, t in zip(part, texts, strict=True)]))
        base = [(one.base, text) for one, text in zip(part, texts, strict=True) if one.base]
        rows.append(("the base model, same prompt and seed", [labeled(image, text) for image, text in base]))
    return sheet(rows)


def main(arguments: list[str] | None = None) -> None:
    """Write the sheet and print its path."""
    parser = argparse.ArgumentParser(prog="python -m examples.contact_sheet", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompt-file", type=Path, required=True, help="one prompt per line")
    parser.add_argument("--output", type=Path, help="default: contact.png in the run")
    options = parser.parse_args(arguments)
    quiet_libraries(offline=True, quiet=True)
    prompts = [line for line in options.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    output = options.output or options.run / "contact.png"
    contact_sheet(options.run, prompts).save(output)
    print(output)


if __name__ == "__main__":
    main()
