"""Pictures on disk, and texts inside PNG files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from echodistill_cli.data.images import a1111_text, png_bytes, save_new_png, save_png, to_image
from echodistill_cli.errors import EchoDistillError

COLORS = ["red", "lime", "blue", "yellow", "cyan"]


def tiles(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (6, 4), colour) for colour in COLORS[:count]]


def test_a_tensor_becomes_a_picture_of_the_same_values() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 4, 3)
    image = to_image(pixels)
    assert image.size == (4, 2)
    assert image.getpixel((3, 1)) == (21, 22, 23)


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
