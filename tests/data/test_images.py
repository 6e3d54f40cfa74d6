"""Pictures on disk: grids, and texts inside PNG files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from echodistill_cli.data.images import a1111_text, grid, png_bytes, save_new_png, save_png, to_image
from echodistill_cli.errors import EchoDistillError

COLOURS = ["red", "lime", "blue", "yellow", "cyan"]


def tiles(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (6, 4), colour) for colour in COLOURS[:count]]


def test_a_tensor_becomes_a_picture_of_the_same_values() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 4, 3)
    image = to_image(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (21, 22, 23)


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


def test_texts_of_any_language_come_back_from_the_file(tmp_path: Path) -> None:
    texts = {"prompt": "ein süßer Hund, 可爱的狗 🐕", "seed": "7"}
    save_png(tmp_path / "a.png", tiles(1)[0], texts)
    with Image.open(tmp_path / "a.png") as image:
        assert dict(image.info) == texts
    assert png_bytes(tiles(1)[0], texts) == (tmp_path / "a.png").read_bytes()


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(EchoDistillError, match=r"none/a.png could not be written .*--output"):
        save_png(tmp_path / "none" / "a.png", tiles(1)[0])
    assert list(tmp_path.iterdir()) == []


def test_labels_are_written_below_the_images_and_long_ones_are_cut() -> None:
    tiles = [Image.new("RGB", (64, 32), "red")] * 2
    plain, short, long = grid(tiles, 2), grid(tiles, 2, ["a dog", "犬"]), grid(tiles, 2, ["a dog " * 40, ""])
    assert plain.height < short.height < long.height <= 32 + 3 * 16
    for sheet in (short, long):
        assert sheet.crop((0, 0, 130, 32)).tobytes() == plain.tobytes()
        assert sheet.convert("L").crop((0, 32, 64, sheet.height)).getextrema()[0] < 100


def test_a_new_file_takes_no_name_that_exists(tmp_path: Path) -> None:
    red, blue = tiles(1)[0], Image.new("RGB", (6, 4), "blue")
    assert save_new_png(tmp_path / "a.png", red)
    assert not save_new_png(tmp_path / "a.png", blue)
    assert (tmp_path / "a.png").read_bytes() == png_bytes(red)
    with pytest.raises(EchoDistillError, match="could not be written"):
        save_new_png(tmp_path / "none" / "a.png", red)


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_has_its_name_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    file, seen = tmp_path / "a.png", list[bool]()
    monkeypatch.setattr(os, "fsync", lambda _file: seen.append(file.exists()))
    if not links:  # as on exFAT
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    assert save_new_png(file, tiles(1)[0])
    assert seen == [False]
    assert file.read_bytes() == png_bytes(tiles(1)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_values_with_commas_are_quoted_as_a1111_does() -> None:
    assert a1111_text("a dog", {"Steps": 1, "Model": "a, b"}) == 'a dog\nSteps: 1, Model: "a, b"'
