"""Every kind of file that people really have, made here with Pillow, and what is said about it."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter, PngImagePlugin

from echodistill_cli.data.images import _ADOBE_RGB, _SRGB, _matrix_profile
from echodistill_cli.data.photos import FileReport, Photo, PhotoReport, check_photos, load_photos, square_crop
from echodistill_cli.errors import PhotoError

REAL_PHOTOS = Path(__file__).parents[3] / "shared" / "photos"
RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250)


def noise(seed: int = 0, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A sharp picture that looks like no other seed's: coarse blocks with grain."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    grain = random.integers(-20, 21, (size[1], size[0], 1))
    return Image.fromarray(np.clip(np.asarray(blocks, dtype=np.int64) + grain, 0, 255).astype(np.uint8))


def corners(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Red, green / blue, white quarters, read from the top left."""
    image, (x, y) = Image.new("RGB", size), (size[0] // 2, size[1] // 2)
    for colour, left, top in ((RED, 0, 0), (GREEN, x, 0), (BLUE, 0, y), (WHITE, x, y)):
        image.paste(colour, (left, top, left + x, top + y))
    return image


def check(folder: Path, resolution: int = 64, masks: str = "auto", captions: bool = True) -> PhotoReport:
    return check_photos(folder, resolution=resolution, masks=masks, captions=captions)


def only(folder: Path, **settings: Any) -> tuple[FileReport, Photo]:
    """The verdict on the folder's one usable file, and the photo."""
    report = check(folder, **settings)
    assert len(report.files) == 1
    assert report.photos, report.files[0]
    return report.files[0], report.photos[0]


def skipped(folder: Path) -> FileReport:
    report = check(folder)
    assert not report.photos
    assert [file.verdict for file in report.files] == ["skipped"]
    return report.files[0]


def at(photo: Photo, x: float, y: float) -> tuple[int, ...]:
    """The pixel at a relative place."""
    pixel = photo.image.getpixel((int(x * photo.image.width), int(y * photo.image.height)))
    assert isinstance(pixel, tuple)
    return pixel


def near(pixel: tuple[int, ...], colour: tuple[int, ...], tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions do not bind root, which CI often is."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("a.bmp", "BMP")])
def test_a_plain_photo_is_ok_without_a_note(tmp_path: Path, name: str, kind: str) -> None:
    noise().save(tmp_path / name)
    file, photo = only(tmp_path)
    assert file == FileReport(name, "ok", (), (96, 96), kind)
    assert (photo.image.mode, photo.mask, photo.caption, photo.crop) == ("RGB", None, None, (0, 0, 96, 96))


@pytest.mark.parametrize("name", ["a.tiff", "a.avif"])
def test_tiff_and_avif_are_read(tmp_path: Path, name: str) -> None:
    noise().save(tmp_path / name)
    assert only(tmp_path)[0].verdict == "ok"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize(("orientation", "top_left"), [(1, RED), (3, WHITE), (6, BLUE), (8, GREEN)])
def test_the_exif_orientation_is_applied(
    tmp_path: Path, suffix: str, orientation: int, top_left: tuple[int, ...]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corners().save(tmp_path / f"a.{suffix}", exif=exif)
    file, photo = only(tmp_path)
    assert file.size == ((64, 96) if orientation in (6, 8) else (96, 64))
    assert photo.image.size == file.size
    assert near(at(photo, 0.2, 0.2), top_left)


def test_unreadable_exif_is_told_and_the_photo_used(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png", exif=b"garbage!garbage")
    file, _ = only(tmp_path)
    assert file.verdict == "warning"
    assert "EXIF" in file.notes[0]


def test_hidden_colors_behind_transparency_become_gray_and_the_alpha_the_mask(tmp_path: Path) -> None:
    image = noise().convert("RGBA")
    image.paste((255, 0, 255, 0), (0, 0, 48, 96))
    image.save(tmp_path / "a.png")
    file, photo = only(tmp_path)
    assert near(at(photo, 0.2, 0.5), (128, 128, 128), 1)
    assert photo.mask is not None
    assert (photo.mask.getpixel((10, 50)), photo.mask.getpixel((80, 50))) == (0, 255)
    assert file.verdict == "ok"
    assert any("filled with gray" in note for note in file.notes)
    assert any("subject mask" in note for note in file.notes)
    assert only(tmp_path, masks="off")[1].mask is None


def test_an_opaque_alpha_channel_is_no_mask(tmp_path: Path) -> None:
    noise().convert("RGBA").save(tmp_path / "a.png")
    file, photo = only(tmp_path)
    assert photo.mask is None
    assert file.notes == ()


def test_an_entirely_transparent_picture_is_skipped(tmp_path: Path) -> None:
    image = noise().convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    assert skipped(tmp_path).notes == ("is entirely transparent",)


def test_gray_and_palette_transparency_are_composited_too(tmp_path: Path) -> None:
    grey = noise().convert("LA")
    grey.putalpha(Image.linear_gradient("L").resize((96, 96)))
    grey.save(tmp_path / "grey.png")
    noise(1).quantize(32).save(tmp_path / "palette.png", transparency=bytes([0] * 8 + [255] * 24))
    report = check(tmp_path)
    assert [file.verdict for file in report.files] == ["ok", "ok"]
    assert all(photo.mask is not None for photo in report.photos)


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_gray_palette_and_one_bit_pictures_become_rgb(tmp_path: Path, mode: str) -> None:
    noise().convert(mode).save(tmp_path / "a.png")
    file, photo = only(tmp_path)
    assert (file.verdict, photo.image.mode) == ("ok", "RGB")


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_keeps_its_colors_whether_inverted_by_adobe_or_not(tmp_path: Path, suffix: str) -> None:
    corners().convert("CMYK").save(tmp_path / f"a.{suffix}")
    file, photo = only(tmp_path)
    for place, colour in (((0.2, 0.2), RED), ((0.8, 0.2), GREEN), ((0.2, 0.8), BLUE), ((0.8, 0.8), WHITE)):
        assert near(at(photo, *place), colour)
    assert any("CMYK without a color profile" in note for note in file.notes)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 96), (96, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    values = np.asarray(only(tmp_path)[1].image)[50, :, 0]
    assert np.abs(values - np.linspace(0, 255, 96)).max() <= 1


def test_sixteen_bit_rgb_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.repeat(np.tile(np.linspace(0, 65535, 96), (96, 1)).astype(">u2")[..., None], 3, axis=2)
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    header = struct.pack(">IIBBBBB", 96, 96, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, zlib.compress(rows)))
    values = np.asarray(only(tmp_path)[1].image)[50, :, 0]
    assert np.abs(values - np.linspace(0, 255, 96)).max() <= 1


def png(header: bytes, data: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_float_pictures_are_stretched_and_this_is_said(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.linspace(-1, 3, 96, dtype=np.float32), (96, 1))).save(tmp_path / "a.tiff")
    file, photo = only(tmp_path)
    assert photo.image.getextrema()[0] == (0, 255)
    assert any("stretched from -1...3" in note for note in file.notes)


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries are exchanged, under a name of its own."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    tags = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    start, size = struct.unpack(">II", data[tags[b"desc"] + 4 : tags[b"desc"] + 12])
    data[start : start + size] = bytes(data[start : start + size]).replace(
        "sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")
    )
    return bytes(data)


def test_colors_go_through_the_embedded_profile_to_srgb(tmp_path: Path) -> None:
    corners().save(tmp_path / "a.png", icc_profile=swapped_profile())
    file, photo = only(tmp_path)
    assert near(at(photo, 0.2, 0.2), (RED[1], RED[0], RED[2]))
    assert any("to sRGB" in note and "swap" in note for note in file.notes)
    assert file.verdict == "ok"


@pytest.mark.parametrize("name", ["GIMP built-in Linear sRGB", "Linear Rec709", "sRGB"])
def test_a_profile_is_judged_by_its_curve_not_by_its_name(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (96, 96), (55, 55, 55)).save(tmp_path / "a.png", icc_profile=_matrix_profile(name, _SRGB, 1.0))
    file, photo = only(tmp_path)
    assert near(at(photo, 0.5, 0.5), (128, 128, 128), 1)
    assert f"converted from {name} to sRGB" in file.notes


def test_a_curve_near_that_of_srgb_under_another_name_is_converted_and_srgb_itself_is_not(tmp_path: Path) -> None:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    renamed = bytes(profile).replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    assert renamed != bytes(profile)
    noise().save(tmp_path / "same.png", icc_profile=renamed)
    noise(1).save(tmp_path / "wide.png", icc_profile=_matrix_profile("mine", _ADOBE_RGB, 2.2))
    same, wide = check(tmp_path).files
    assert same.notes == ()
    assert wide.notes == ("converted from mine to sRGB",)


def test_adobe_rgb_that_a_camera_writes_into_exif_alone_is_converted(tmp_path: Path) -> None:
    def directory(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack("<HHHI", 1, tag, kind, count) + value.ljust(4, b"\0") + bytes(4)

    # Each directory of one entry has 18 bytes; the first two point to the next.
    pointers = [directory(tag, 4, 1, struct.pack("<I", at)) for tag, at in ((0x8769, 26), (0xA005, 44))]
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + b"".join(pointers) + directory(1, 2, 4, b"R03\0")
    image = Image.new("RGB", (96, 96), (150, 100, 100))
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    file, photo = only(tmp_path)
    assert any("converted from Adobe RGB to sRGB" in note for note in file.notes)
    red, green, _ = at(photo, 0.5, 0.5)
    assert red > 165  # Adobe's red is wider, so that the same number means more of it
    assert green < 101


@pytest.mark.parametrize(("gamma", "expected"), [(100_000, 128), (45_455, 55)])
def test_the_gamma_of_a_png_without_a_profile_counts(tmp_path: Path, gamma: int, expected: int) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", gamma))
    Image.new("RGB", (96, 96), (55, 55, 55)).save(tmp_path / "a.png", pnginfo=chunks)
    assert near(at(only(tmp_path)[1], 0.5, 0.5), (expected,) * 3, 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_an_srgb_profile_changes_nothing_in_any_mode(tmp_path: Path, mode: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = noise().convert(mode)
    image.save(tmp_path / "a.png", icc_profile=profile)
    file, photo = only(tmp_path)
    assert file.notes == ()
    assert photo.image.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_broken_or_foreign_profile_is_told_and_left_out(tmp_path: Path, mode: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes() if mode == "RGB" else b"no profile"
    noise().convert(mode).save(tmp_path / "a.tiff", icc_profile=profile)
    file, _ = only(tmp_path)
    assert file.verdict == "warning"
    assert "invalid color profile" in file.notes[0]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_of_an_animation_the_first_frame_is_used_and_this_is_said(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (96, 96), WHITE), Image.new("RGB", (96, 96), BLUE)]
    corners((96, 96)).save(tmp_path / name, save_all=True, append_images=frames, duration=100)
    file, photo = only(tmp_path)
    assert near(at(photo, 0.2, 0.2), RED, 40)
    assert file.notes == ("has 3 frames; only the first is used",)
    assert file.verdict == "ok"


def test_the_second_view_in_a_phones_jpeg_is_no_animation(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[noise(1)])
    assert only(tmp_path)[0] == FileReport("a.jpg", "ok", (), (96, 96), "JPEG")


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(corners()).save(tmp_path / "a.heic")
    file, photo = only(tmp_path)
    assert file.format == "HEIF"
    assert near(at(photo, 0.2, 0.2), RED, 25)


def test_heic_without_pillow_heif_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.HEIC").write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(64))
    assert "pip install pillow-heif" in skipped(tmp_path).notes[0]


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_picture_is_skipped_and_named(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    noise().save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    file = skipped(tmp_path)
    assert file.name == f"a.{suffix}"
    assert file.notes[0].startswith(("cannot be read: ", "is not an image"))
    assert str(tmp_path) not in file.notes[0]


def test_damaged_bytes_never_raise(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(60):
        suffix = ("jpg", "png", "gif", "webp", "avif", "bmp")[index % 6]
        buffer = io.BytesIO()
        noise(0, (32, 32)).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
        data = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
        data[random.integers(0, min(len(data), 200), 8)] = random.integers(0, 256, 8)
        (tmp_path / f"{index}.{suffix}").write_bytes(data.tobytes())
    assert len(check(tmp_path).files) == 60


def test_a_zero_byte_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert skipped(tmp_path).notes == ("is empty (0 bytes)",)


def test_text_renamed_to_jpg_is_skipped_as_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("this is not a photo")
    assert skipped(tmp_path).notes[0].startswith("is not an image of a known kind (JPEG, PNG")


@pytest.mark.parametrize("side", [12_000, 100_000])
def test_a_decompression_bomb_is_skipped_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, zlib.compress(bytes(1000))))
    assert "too many pixels" in skipped(tmp_path).notes[0]


@pytest.mark.parametrize(("size", "expected"), [((12_000, 9_000), (6_000, 4_500)), ((9_000, 12_000), (4_500, 6_000))])
def test_a_phones_photo_of_108_megapixels_is_read_at_half_its_size(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise().resize(size, Image.Resampling.NEAREST).save(tmp_path / "a.jpg", quality=20, exif=exif)
    file, photo = only(tmp_path)
    assert (file.verdict, file.size) == ("ok", size[::-1])
    assert f"has {size[0]} x {size[1]} pixels; it is read at {expected[0]} x {expected[1]}" in file.notes
    assert min(photo.image.size) == 128


def test_too_many_pixels_are_skipped_with_what_to_do(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 12_000, 9_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(png(header, zlib.compress(bytes(1000))))
    note = skipped(tmp_path).notes[0]
    assert note == "has too many pixels (12000 x 9000); make it smaller, such as 4000 pixels wide"


@pytest.mark.parametrize("name", ["a.dng", "a.NEF", "a.tif"])
@pytest.mark.parametrize("tag", [{254: 1}, {50706: b"\x01\x04\x00\x00"}, {}], ids=["preview", "DNG", "plain"])
def test_a_raw_file_is_not_mistaken_for_its_preview(tmp_path: Path, name: str, tag: dict[int, Any]) -> None:
    noise(0, (160, 120)).save(tmp_path / name, format="TIFF", tiffinfo=tag)
    if name == "a.tif" and not tag:
        assert only(tmp_path)[0].size == (160, 120)
    else:
        assert "raw file" in skipped(tmp_path).notes[0]
        assert "export it as JPEG" in skipped(tmp_path).notes[0]


def test_a_raw_file_that_is_no_tiff_is_named_as_one_and_a_misnamed_jpeg_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.CR3").write_bytes(b"\0\0\0\x18ftypcrx " + bytes(100))
    assert "raw file" in skipped(tmp_path).notes[0]
    (tmp_path / "a.CR3").unlink()
    noise().save(tmp_path / "b.raw", format="JPEG")
    assert only(tmp_path)[0].verdict == "ok"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
def test_pipes_among_photos_captions_and_masks_do_not_block(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    for name in ("b.png", "a.txt", "masks/a.png"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    report = check(tmp_path)
    assert [file.verdict for file in report.files] == ["warning", "skipped", "skipped"]
    assert "a.txt is ignored: it is not a regular file" in report.files[0].notes
    assert any("masks/a.png is ignored" in note for note in report.files[0].notes)


def test_an_icon_is_skipped(tmp_path: Path) -> None:
    noise(0, (12, 12)).save(tmp_path / "a.png")
    assert skipped(tmp_path).notes == ("has only 12 x 12 pixels",)


def test_a_broken_link_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    assert skipped(tmp_path).notes == ("cannot be read: not a regular file",)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions work differently on Windows")
def test_files_and_folders_without_permission_are_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise().save(folder / "a.jpg")
        folder.chmod(0o755)
        check(folder)
        (folder / "a.jpg").chmod(0)
        with unprivileged():
            assert skipped(folder).notes == ("cannot be read: Permission denied",)
        folder.chmod(0)
        with unprivileged(), pytest.raises(PhotoError, match="cannot be read: Permission denied"):
            check(folder)
        folder.chmod(0o700)


def test_a_photo_smaller_than_the_resolution_is_warned_about(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    file, _ = only(tmp_path, resolution=512)
    assert file.verdict == "warning"
    assert file.notes == ("96 x 96 is smaller than the resolution 512, so it is enlarged",)


def test_a_blurred_photo_is_warned_about(tmp_path: Path) -> None:
    noise(0, (512, 512)).filter(ImageFilter.GaussianBlur(6)).save(tmp_path / "a.png")
    assert only(tmp_path, resolution=512)[0].notes == ("looks blurred",)


def test_a_sharp_subject_before_a_soft_background_is_not_blurred(tmp_path: Path) -> None:
    image = noise(0, (512, 512)).filter(ImageFilter.GaussianBlur(12))
    image.paste(noise(1, (128, 128)), (192, 192))
    image.save(tmp_path / "a.png")
    assert only(tmp_path, resolution=512)[0].verdict == "ok"


def test_a_picture_of_almost_one_color_is_warned_about(tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), BLUE).save(tmp_path / "a.png")
    Image.new("RGB", (96, 96), RED).save(tmp_path / "b.png")
    assert [file.notes for file in check(tmp_path).files] == [("is almost one color",)] * 2


def test_a_panorama_and_a_wide_picture_are_told_what_the_crop_cuts(tmp_path: Path) -> None:
    for name, width in (("panorama", 480), ("phone", 288), ("wide", 171)):
        noise(width, (width, 96)).save(tmp_path / f"{name}.png")
    notes = [file.notes for file in check(tmp_path).files]
    assert notes[0] == ("is a panorama (5.0 : 1); the square crop removes 80% of it",)
    assert notes[1] == ("is a panorama (3.0 : 1); the square crop removes 67% of it",)
    assert notes[2] == ("the square crop removes 44% of it",)


def test_with_a_mask_only_a_cut_subject_is_warned_about(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, box in (("small", (10, 20, 80, 70)), ("long", (0, 20, 160, 70))):
        noise(len(name), (171, 96)).save(tmp_path / f"{name}.png")
        mask = Image.new("L", (171, 96))
        mask.paste(255, box)
        mask.save(masks / f"{name}.png")
    long, small = check(tmp_path).files
    assert long.notes[0] == "the square crop removes 40% of the subject"
    assert small.verdict == "ok"


def test_re_encoded_resized_and_brightened_copies_name_the_original(tmp_path: Path) -> None:
    original = noise(0, (256, 256))
    original.save(tmp_path / "1.png")
    original.save(tmp_path / "2.jpg", quality=40)
    original.resize((200, 210)).save(tmp_path / "3.png")
    original.point(lambda value: value * 0.8).save(tmp_path / "4.webp")
    noise(1, (256, 256)).save(tmp_path / "5.png")
    report = check(tmp_path)
    assert [file.verdict for file in report.files] == ["ok", "warning", "warning", "warning", "ok"]
    assert all("looks like a copy of " in file.notes[0] for file in report.files[1:4])
    assert report.files[1].notes[0].endswith("1.png")


def test_a_mask_file_of_another_size_is_resized_when_the_aspect_agrees(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    mask = Image.new("L", (48, 48))
    mask.paste(255, (0, 0, 24, 48))
    mask.save(tmp_path / "masks" / "a.png")
    file, photo = only(tmp_path)
    assert photo.mask is not None
    assert photo.mask.size == (96, 96)
    assert (photo.mask.getpixel((10, 50)), photo.mask.getpixel((90, 50))) == (255, 0)
    assert file == FileReport("a.jpg", "ok", ("subject mask from masks/a.png",), (96, 96), "JPEG")
    assert only(tmp_path, masks="off")[1].mask is None


@pytest.mark.parametrize("fault", ["wrong aspect", "black", "broken"])
def test_a_useless_mask_file_is_told_and_left_out(tmp_path: Path, fault: str) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    file = tmp_path / "masks" / "a.png"
    if fault == "broken":
        file.write_bytes(b"nothing")
    else:
        Image.new("L", (96, 48 if fault == "wrong aspect" else 96), 255 if fault == "wrong aspect" else 0).save(file)
    verdict, photo = only(tmp_path)
    assert photo.mask is None
    assert verdict.verdict == "warning"
    assert verdict.notes[0].startswith("masks/a.png is ignored: it ")


def test_a_cutout_as_mask_file_means_its_alpha(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "masks").mkdir()
    cutout = noise().convert("RGBA")
    cutout.paste((0, 0, 0, 0), (0, 0, 48, 96))
    cutout.save(tmp_path / "masks" / "a.png")
    mask = only(tmp_path)[1].mask
    assert mask is not None
    assert mask.getextrema() == (0, 255)


def test_masks_that_match_no_photo_are_never_silent(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(ord(name)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "masks").mkdir()
    Image.new("L", (96, 96), 255).save(tmp_path / "masks" / "mask_a.png")
    assert "none is named like a photo" in check(tmp_path).warnings[0]
    Image.new("L", (96, 96), 255).save(tmp_path / "masks" / "a.png")
    assert check(tmp_path).warnings == ("masks/mask_a.png belongs to no photo", "masks/ has no mask for b.jpg")
    assert check(tmp_path, masks="off").warnings == ()


def test_the_caption_is_the_first_line_with_text(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.b.jpg")
    (tmp_path / "a.b.txt").write_bytes("\ufeff\n  a brown dog  \nmore\n".encode())
    file, photo = only(tmp_path)
    assert photo.caption == "a brown dog"
    assert file.notes == ("only the first line of a.b.txt is the caption; 1 more with text not read",)
    assert only(tmp_path, captions=False)[1].caption is None


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\n \n", "it is empty"), (b"\xff\xfe\x00\xd8", "UTF-8"), (b"x" * 10_001, "too many")]
)
def test_a_useless_caption_file_is_told(tmp_path: Path, content: bytes, reason: str) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    file, photo = only(tmp_path)
    assert photo.caption is None
    assert file.verdict == "warning"
    assert reason in file.notes[0]


def test_a_caption_file_that_pretends_to_be_huge_is_not_read(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg")
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)  # a sparse file takes no room on the disk
    file_report, photo = only(tmp_path)
    assert photo.caption is None
    assert "cannot be read" in file_report.notes[0]


def test_files_come_in_natural_order_and_companions_are_left_out(tmp_path: Path) -> None:
    for index, name in enumerate(("IMG_10.png", "img_2.png", "img_1.png", "B.png")):
        noise(index).save(tmp_path / name)
    for name in (".hidden.jpg", "README.md", "meta.json", "img_1.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "more").mkdir()
    assert [file.name for file in check(tmp_path).files] == ["B.png", "img_1.png", "img_2.png", "IMG_10.png"]


def test_the_crop_centers_on_the_mask_and_stays_inside() -> None:
    image = noise(0, (200, 100))
    mask = Image.new("L", image.size)
    mask.paste(255, (120, 10, 160, 90))
    assert square_crop(image, mask) == (90, 0, 190, 100)
    mask.paste(255, (150, 10, 200, 90))
    mask.paste(0, (0, 0, 150, 100))
    assert square_crop(image, mask) == (100, 0, 200, 100)
    upright = Image.Transpose.TRANSPOSE
    assert square_crop(image.transpose(upright), mask.transpose(upright)) == (0, 100, 100, 200)


def test_the_crop_follows_the_detail_and_without_any_stays_in_the_middle() -> None:
    flat = Image.new("RGB", (200, 100), (90, 90, 90))
    assert abs(square_crop(flat, None)[0] - 50) <= 1
    flat.paste(noise(0, (80, 80)), (120, 10))
    left, top, right, bottom = square_crop(flat, None)
    assert (top, bottom, right - left) == (0, 100, 100)
    assert left >= 85
    assert right >= 185


def test_large_photos_are_kept_at_twice_the_resolution(tmp_path: Path) -> None:
    noise(0, (600, 400)).save(tmp_path / "a.png")
    file, photo = only(tmp_path)
    assert file.size == (600, 400)
    assert photo.image.size == (192, 128)
    assert photo.crop[2] - photo.crop[0] == 128


def test_the_json_report_is_plain_and_names_no_folder(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.jpg").touch()
    text = json.dumps(check(tmp_path).to_dict())
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert report["usable"] == 1
    assert report["files"][0] == {
        "name": "a.jpg",
        "verdict": "ok",
        "notes": [],
        "size": [96, 96],
        "format": "JPEG",
        "mask": False,
        "caption": "a dog",
        "crop": [0, 0, 96, 96],
    }
    assert report["files"][1]["verdict"] == "skipped"


def test_enough_photos_load(tmp_path: Path) -> None:
    for index in range(3):
        noise(index).save(tmp_path / f"{index}.jpg")
    report = load_photos(tmp_path, min_photos=3, resolution=64, masks="auto", captions=True)
    assert [photo.path.name for photo in report.photos] == ["0.jpg", "1.jpg", "2.jpg"]


def refusal(folder: Path) -> str:
    with pytest.raises(PhotoError) as caught:
        load_photos(folder, min_photos=3, resolution=64, masks="auto", captions=True)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.jpg")
    assert "does not exist" in refusal(tmp_path / "dgo")
    assert "is a file, not a folder" in refusal(tmp_path / "a.jpg")


def test_an_empty_folder_is_refused_and_a_subfolder_proposed(tmp_path: Path) -> None:
    assert "expected at least 3 usable photos of the subject, found no files" in refusal(tmp_path)
    (tmp_path / "dog").mkdir()
    assert f"did you mean {tmp_path / 'dog'}?" in refusal(tmp_path)


def test_too_few_photos_are_refused_with_the_reasons_of_the_first(tmp_path: Path) -> None:
    noise().save(tmp_path / "0.jpg")
    for index in range(1, 6):
        (tmp_path / f"{index}.jpg").touch()
    message = refusal(tmp_path)
    assert "expected at least 3 usable photos of the subject, found 1 among 6 files" in message
    assert "1.jpg (is empty (0 bytes))" in message
    assert "and 2 more" in message
    (tmp_path / "0.jpg").unlink()
    assert "found none among 5 files" in refusal(tmp_path)


def test_a_blocked_masks_folder_or_a_text_only_folder_is_no_surprise(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "masks").mkdir()
    assert "found no files" in refusal(tmp_path)


@pytest.mark.photos
@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="needs the folder of real photos beside the repository")
def test_real_photos_pass_without_a_warning_and_blurred_or_copied_ones_do_not(tmp_path: Path) -> None:
    subjects = [folder for folder in sorted(REAL_PHOTOS.iterdir()) if folder.is_dir()]
    reports = {folder.name: check(folder, resolution=512) for folder in subjects}
    notes = {
        f"{name}/{file.name}": file.notes for name, report in reports.items() for file in report.files if file.notes
    }
    assert notes == {}
    for name, report in reports.items():
        picture = report.photos[0].image
        folder = tmp_path / name
        folder.mkdir()
        picture.save(folder / "1.png")
        picture.save(folder / "2.jpg", quality=50)
        picture.filter(ImageFilter.GaussianBlur(4)).save(folder / "3.png")
        plain, copy, blurred = check(folder, resolution=512).files
        assert plain.verdict == "ok"
        assert copy.notes == ("looks like a copy of 1.png",)
        assert "looks blurred" in blurred.notes


def test_checking_photos_needs_no_torch() -> None:
    program = "import sys; from echodistill_cli.data import check_photos; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
