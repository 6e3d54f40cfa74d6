"""`python -m examples.mini_world.score`: how well the embedded pair generates, by a judge; makes the README's table.

Every noun in every place, plain and in a color, one image each; the same scenes rendered by the world itself, in
the styles that the pair was trained on, are the ceiling. Sharpness is a share of what the pair's VAE leaves of such
renders. Needs the drawings (`npm` fetches them) and a judge. No judge counts malformed subjects: `--sheet DIR` draws
200 one-step images in numbered sheets of 50, for a person to count.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from echodistill_cli.config.build import build_config
from echodistill_cli.data.grids import grid
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate, to_uint8
from echodistill_cli.models.load import load_pair
from examples.benchmark.measure import JUDGE, detail
from examples.mini_world.judges import Examiner
from examples.mini_world.models import as_tensor
from examples.mini_world.nouns import CORE, HELD_OUT_VENDOR, noun_words
from examples.mini_world.places import PLACES
from examples.mini_world.sprites import default_work_directory
from examples.mini_world.world import COLORS, SIDE, Scene, World, contact_sheet, open_world

TEACHER = SamplingSettings(role="teacher", steps=25, guidance_scale=3.5, size=SIDE, batch_size=64)
STUDENT = SamplingSettings(role="student", steps=1, size=SIDE, batch_size=64)
SEEDS_PER_PROMPT = 4
MALFORMED_IMAGES, ON_A_SHEET, SHEET_COLUMNS = 200, 50, 10


@dataclass(frozen=True)
class Asked:
    """What an image must show: noun, place, color (or None)."""

    noun: str
    place: str
    colour: str | None

    @property
    def prompt(self) -> str:
        """In words, such as "a photo of a red frog on the beach"."""
        words = f"{self.colour} {noun_words(self.noun)}" if self.colour else noun_words(self.noun)
        return f"a photo of a {words} {PLACES[self.place][1][0]}"


def every_scene() -> list[Asked]:
    """Every noun in every place: plain, then in one of the colors in turn."""
    plain = [Asked(noun, place, None) for noun in CORE for place in PLACES]
    colours = list(COLORS)
    return plain + [Asked(one.noun, one.place, colours[index % 6]) for index, one in enumerate(plain)]


def rendered(world: World, asked: list[Asked], seed: int) -> NDArray[np.uint8]:
    """Return the world's own images of scenes, (count, 64, 64, 3)."""
    rng = np.random.default_rng(seed)
    pictures = []
    for one in asked:
        vendor = str(rng.choice(world.vendors[one.noun]))
        scene = Scene(one.noun, vendor, one.place, one.colour, one.prompt, float(rng.uniform(0.5, 0.85)),
                      float(rng.uniform(-15, 15)), bool(rng.random() < 0.5), int(rng.integers(2**31)))  # fmt: skip
        pictures.append(world.render(scene).image)
    return np.stack(pictures)


def drawn(pair: ModelPair, asked: list[Asked], seeds: list[int], settings: SamplingSettings) -> NDArray[np.uint8]:
    """Return a model's images of scenes, (count, 64, 64, 3)."""
    return np.stack([picture.numpy() for picture in generate(pair, [one.prompt for one in asked], seeds, settings)])


def recognized(examiner: Examiner, pictures: NDArray[np.uint8], asked: list[Asked]) -> dict[str, float]:
    """Return the fractions of images with the right noun, place and, where one was requested, color."""
    reading = examiner.read(pictures)
    hits = [given == one.colour for given, one in zip(reading.answers["colour"], asked, strict=True) if one.colour]
    return {
        "noun": reading.right("noun", [one.noun for one in asked]),
        "place": reading.right("place", [one.place for one in asked]),
        "colour": float(np.mean(hits)),
    }


def spread(examiner: Examiner, pictures: NDArray[np.uint8]) -> float:
    """Mean distance in the judge's features between the images of each prompt, which stand together."""
    groups = examiner.read(pictures).features.view(-1, SEEDS_PER_PROMPT, 512)
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean())


def repeated(asked: list[Asked]) -> tuple[list[Asked], list[int]]:
    """One prompt a noun, each in another place, with several seeds each."""
    chosen = [asked[row * len(PLACES) + row % len(PLACES)] for row in range(len(CORE))]
    return [one for one in chosen for _ in range(SEEDS_PER_PROMPT)], [*range(SEEDS_PER_PROMPT)] * len(chosen)


def coded(pair: ModelPair, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images (count, 64, 64, 3) through the pair's VAE: the sharpest that it can generate."""
    with torch.no_grad():
        parts = [to_uint8(pair.codec.decode(pair.codec.encode(part))) for part in torch.split(as_tensor(pictures), 64)]
    again: NDArray[np.uint8] = torch.cat(parts).numpy()
    return again


def numbered_sheet(pictures: NDArray[np.uint8], first: int, words: list[str]) -> Image.Image:
    """Return a sheet of images, enlarged, each above its number and noun.

    Args:
        pictures: (count, 64, 64, 3).
        first: number of the first.
        words: what each shows.
    """
    captions = [f"{first + index} {word}" for index, word in enumerate(words)]
    return grid([Image.fromarray(picture) for picture in pictures], SHEET_COLUMNS, captions)


def malformed_sheets(pair: ModelPair, folder: Path, count: int = MALFORMED_IMAGES) -> list[Path]:
    """Draw one-step images of all nouns in turn, each in a place, and write them in sheets; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    places = list(PLACES)
    # The place moves on by one more each time that the nouns start over, so that every noun meets every place.
    asked = [Asked(CORE[n % len(CORE)], places[(n + n // len(CORE)) % len(places)], None) for n in range(count)]
    pictures = drawn(pair, asked, [*range(1000, 1000 + count)], STUDENT)
    files = []
    for first in range(0, count, ON_A_SHEET):
        part = slice(first, first + ON_A_SHEET)
        sheet = numbered_sheet(pictures[part], first + 1, [noun_words(one.noun) for one in asked[part]])
        files.append(folder / f"student-{first + 1:03d}.png")
        sheet.save(files[-1])
    return files


def reconstruction(pair: ModelPair, world: World) -> float:
    """The VAE's mean PSNR in dB over 128 renders, from bytes to bytes."""
    pictures = world.batch(np.random.default_rng(21), 128)
    with torch.no_grad():
        again = to_uint8(pair.codec.decode(pair.codec.encode(as_tensor(pictures))))
    error = (again.float() - torch.from_numpy(pictures).float()).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(255**2 / error)).mean())


def milliseconds(pair: ModelPair) -> float:
    """One image in one step at batch 1 on one core: the median of twenty."""
    threads, taken = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for seed in range(22):
        began = time.perf_counter()
        list(generate(pair, ["a photo of a frog on the beach"], [seed], SamplingSettings(size=SIDE)))
        taken.append(1000 * (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return float(np.median(taken[2:]))


def score(pair: ModelPair, examiner: Examiner, work: Path, sheets: Path | None) -> dict[str, Any]:
    """Every figure of the table; sheets of the images go to a folder if one is given."""
    world, asked = open_world(work, len(CORE)), every_scene()
    seeds = [*range(len(asked))]
    several, several_seeds = repeated(asked)
    rows: dict[str, Any] = {}
    real = rendered(world, asked, 1)
    rows["renders"] = recognized(examiner, real, asked)
    ceiling = detail(coded(pair, real))
    rows["renders"]["sharpness_share"] = detail(real) / ceiling
    real_spread = spread(examiner, rendered(world, several, 2))
    for settings in (TEACHER, STUDENT):
        pictures = drawn(pair, asked, seeds, settings)
        seen = recognized(examiner, pictures, asked)
        ratio = spread(examiner, drawn(pair, several, several_seeds, settings)) / real_spread
        rows[settings.role] = seen | {"diversity": ratio, "sharpness_share": detail(pictures) / ceiling}
        if sheets:
            contact_sheet(list(pictures), 2 * len(PLACES)).save(sheets / f"{settings.role}.png")
    rows["vae_psnr"] = {
        "trained": reconstruction(pair, world),
        "held_out": reconstruction(pair, World(world.sprites, CORE, [HELD_OUT_VENDOR])),
    }
    rows["one_step_milliseconds"] = milliseconds(pair)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the table's figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_world.score", description=__doc__)
    parser.add_argument("--student", default="mini:student", help="folder of another student")
    parser.add_argument("--teacher", default="mini:teacher", help="folder of another teacher")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--work", type=Path, default=default_work_directory())
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of the pictures")
    parser.add_argument(
        "--sheet", type=Path, metavar="DIR", help="only draw 200 images in sheets of 50, to count malformed subjects"
    )
    options = parser.parse_args(arguments)
    models = {"model.student": options.student, "model.teacher": options.teacher, "model.precision": "fp32"}
    pair = load_pair(build_config("mini", None, models).model)
    if options.sheet:
        print(*malformed_sheets(pair, options.sheet), sep="\n")
        return
    figures = score(pair, Examiner(options.judge), options.work, options.sheets)
    about = {"date": date.today().isoformat(), "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps(about | figures, indent=2))


if __name__ == "__main__":
    main()
