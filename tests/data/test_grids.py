"""Grids of images, and what stands below each of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from echodistill_cli.data.grids import SMALLEST, caption, grid, tile

COLORS = ["red", "lime", "blue", "yellow", "cyan"]
LONG = "a watercolor painting of a sks dog under a large tree in a green meadow at sunset, mountains behind it"


def tiles(count: int, size: tuple[int, int] = (6, 4)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in COLORS[:count]]


def ink(image: Image.Image) -> NDArray[np.bool_]:
    """Where a caption is dark, [H, W]."""
    return np.asarray(image.convert("L")) < 128


def runs(dark: NDArray[np.bool_]) -> list[int]:
    """Return the lengths of the runs of false values between true ones."""
    places = np.flatnonzero(dark)
    return [int(gap) - 1 for gap in np.diff(places) if gap > 1]


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [(1, None, (6, 4)), (3, 3, (22, 4)), (4, None, (14, 10)), (5, 2, (14, 16)), (5, None, (22, 10))],
)
def test_a_grid_has_white_lines_between_its_pictures(count: int, columns: int | None, size: tuple[int, int]) -> None:
    sheet = grid(tiles(count), columns)
    assert sheet.size == size
    if count > 1 and columns != 1:
        assert sheet.getpixel((6, 0)) == (255, 255, 255)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)


def test_a_grid_is_filled_row_by_row() -> None:
    sheet = grid(tiles(3), columns=2)
    assert sheet.getpixel((8, 0)) == (0, 255, 0)
    assert sheet.getpixel((0, 6)) == (0, 0, 255)
    assert sheet.getpixel((8, 6)) == (255, 255, 255)


@pytest.mark.parametrize(("side", "factor"), [(32, 5), (64, 3), (128, 2), (160, 1), (512, 1)])
def test_small_images_with_captions_are_enlarged_by_a_whole_factor(side: int, factor: int) -> None:
    noise = Image.effect_noise((side, side), 90).convert("RGB")
    sheet, width = grid([noise, noise], 2, ["a dog", "a frog"]), side * factor
    assert sheet.crop((0, 0, width, width)) == noise.resize((width, width), Image.Resampling.NEAREST)
    assert ink(sheet.crop((0, width, width, sheet.height))).any()


@pytest.mark.parametrize("labels", [None, ["", "a dog", LONG, "", "", LONG * 3]])
@pytest.mark.parametrize("side", [16, 64, 200])
def test_an_image_comes_back_from_its_place_in_the_grid(labels: list[str] | None, side: int) -> None:
    images = [Image.effect_noise((side, side), 20 * number).convert("RGB") for number in range(1, 7)]
    sheet = grid(images, 3, labels)
    assert [tile(sheet, index, 3, 2, side) for index in range(6)] == images


@pytest.mark.parametrize(("columns", "rows", "side"), [(2, 2, 64), (3, 2, 60), (3, 2, 500), (3, 9, 64)])
def test_a_sheet_of_other_images_has_no_such_tile(columns: int, rows: int, side: int) -> None:
    assert tile(grid(tiles(5, (64, 64)), 3, ["a dog"] * 5), 0, columns, rows, side) is None


@pytest.mark.parametrize("width", [64, 192, 512, 1024])
def test_captions_of_any_length_have_letters_of_the_same_readable_size(width: int) -> None:
    short = ink(caption("dog", width)).max(axis=1)
    long = ink(caption(f"dog {LONG}", width)).max(axis=1)
    first = np.flatnonzero(short)
    assert len(first) >= SMALLEST * 0.7
    assert len(first) >= width / 60
    assert long[first].all()


def test_words_stand_as_far_apart_as_people_read_them() -> None:
    for width in (64, 192, 512):
        widest_inside = max(runs(ink(caption("nnnn", width)).max(axis=0)))
        between = max(runs(ink(caption("nn nn", width)).max(axis=0)))
        assert between >= widest_inside + 2


def test_a_caption_that_is_too_long_ends_in_dots_inside_its_column() -> None:
    for text in (LONG * 3, "sks" * 200, "犬" * 300):
        image = caption(text, 192)
        assert image.size == caption("one two " * 100, 192).size
        assert not ink(image)[:, -2:].any(), text
        rows = ink(image)[-round(SMALLEST * 1.3) - 4 :]
        # The last line ends in three dots: three runs at its right end, as low as the base line.
        last = np.flatnonzero(rows.max(axis=0))[-8:]
        assert rows[: rows.shape[0] // 2, last[-3:]].sum() == 0, text


def test_a_word_that_is_wider_than_its_column_is_broken() -> None:
    assert caption("n" * 40, 128).height > caption("n", 128).height
    assert caption("犬" * 40, 128).height > caption("犬", 128).height
    assert caption("", 128).height == caption("n", 128).height


def test_captions_are_written_without_freetype_too(monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr("echodistill_cli.data.grids.features.check", lambda _name: False)
    monkeypatch.setattr(ImageFont, "load_default", lambda: bitmap)
    assert ink(caption("a dog 犬", 192)).any()
