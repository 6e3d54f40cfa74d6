"""`python -m examples.mini_world.photos NOUN OUTPUT`: images of a subject that no network was shown."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from examples.mini_world.nouns import NOUNS
from examples.mini_world.sprites import default_work_directory, load_sprites
from examples.mini_world.world import SIDE, subject_photos


def main(arguments: list[str] | None = None) -> None:
    """Write `0.png`, `1.png`, ... to the output folder and print what each shows."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_world.photos", description=__doc__)
    parser.add_argument("noun", choices=NOUNS, metavar="NOUN", help="such as frog or automobile")
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=default_work_directory())
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    sprites = load_sprites(options.work)
    pictures = subject_photos(sprites, options.noun, options.count, options.seed, options.side)
    for index, picture in enumerate(pictures):
        path = options.output / f"{index}.png"
        Image.fromarray(picture.image).save(path)
        print(f"{path}: {picture.scene.caption}")


if __name__ == "__main__":
    main()
