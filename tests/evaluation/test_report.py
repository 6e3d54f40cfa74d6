"""`report.html`: what it shows and hides, that it is alone, and what a hostile run can do to it."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from echodistill_cli.data.images import data_uri, png_bytes
from echodistill_cli.data.photos import Photo, load_photos
from echodistill_cli.evaluation.report import known_scores, report_of_run
from echodistill_cli.evaluation.report_page import Report, ScoreRow, Tile, page
from echodistill_cli.many.store import Store
from echodistill_cli.outputs.artifact import find
from echodistill_cli.outputs.hub import run_files
from echodistill_cli.runs import REPORT, Run, open_run
from examples.live_browser import browser, chromium
from tests.helpers.commands import command, files_below, overriding, trained_run
from tests.helpers.random_models import build_score_encoders

Pair = tuple[Path, Path]
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>$title${body}"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[Image.Image]:
        """The embedded images; fails if one is elsewhere."""
        found = list[Image.Image]()
        for tag, attributes in self.elements:
            if tag == "img":
                kind, _, content = str(attributes["src"]).partition(",")
                assert kind == "data:image/jpeg;base64"
                found.append(Image.open(io.BytesIO(base64.b64decode(content))))
        return found


def assert_alone(html: str) -> None:
    """Check that a page loads nothing and runs nothing."""
    tags = {tag for tag, _ in Page(html).elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "a"}
    for _, attributes in Page(html).elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert all(str(attributes.get(name, "data:")).startswith("data:") for name in ("src", "href"))
    policy = dict(Page(html).elements[3][1])
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:;")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, small_pair: Pair, small_backbones: dict[str, Path], photo_folder: Path
) -> Path:
    """A finished run; not to be written to."""
    return trained_run(
        tmp_path_factory.mktemp("secret-place"), small_pair, small_backbones, photo_folder, run__sample_every=1
    )


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    """A copy of the finished run."""
    return open_run(Path(shutil.copytree(finished, tmp_path / "elsewhere" / "dog")))


@pytest.fixture
def photos(photo_folder: Path) -> tuple[Photo, ...]:
    """The photos of the run."""
    return load_photos(photo_folder, min_photos=1, resolution=64, masks="off", captions=True).photos


def test_training_ends_with_a_page_of_photos_previews_and_curves(finished: Path) -> None:
    html = (finished / REPORT).read_text(encoding="utf-8")
    assert_alone(html)
    shown = Page(html)
    for text in ("This page contains 4 photos", "sks dog", "photo-0.jpg", "before", "step 2", "denoising", "latent"):
        assert text in shown.text
    # Four photos; two prompts and their classes, twice before and after and three times by step.
    assert len(shown.images()) == 4 + 4 * 2 + 4 * 3
    assert len([tag for tag, _ in shown.elements if tag == "svg"]) >= 3
    assert "echodistill evaluate first --html" in shown.text
    assert str(finished.parent) not in html
    assert "secret-place" not in html


def test_each_image_shows_the_prompt_above_it(run: Run, photos: tuple[Photo, ...]) -> None:
    side, gap = 3 * run.config.model.resolution, 2  # with captions, small images are enlarged
    colors = ("red", "green", "blue", "yellow")
    for file in run.samples.glob("step-*.png"):
        with Image.open(file) as sheet:
            texts = {key: str(value) for key, value in sheet.info.items() if key in ("prompts", "step", "seeds")}
            step = (sheet.height + gap) // 2
            painted = Image.new("RGB", sheet.size, "white")
        for index, color in enumerate(colors):
            left = index % 2 * run.config.run.sample_seeds * (side + gap)
            painted.paste(color, (left, index // 2 * step, left + side, index // 2 * step + side))
        file.write_bytes(png_bytes(painted, texts))
    html = report_of_run(run, photos).read_text(encoding="utf-8")
    found = [
        (image.convert("RGB").getpixel((image.width // 2, image.height // 2)), attributes["alt"])
        for image, attributes in zip(Page(html).images(), images_of(html), strict=True)
        if "step 2" in str(attributes["alt"])
    ]
    expected = dict(
        zip(
            ("a photo of a sks dog,", "a photo of a dog,", "a photo of a sks dog on", "a photo of a dog on"),
            ((254, 0, 0), (0, 128, 0), (0, 0, 254), (255, 255, 0)),
            strict=True,
        )
    )
    assert len(found) == 8
    for middle, alt in found:
        (wanted,) = [value for prompt, value in expected.items() if str(alt).startswith(prompt)]
        assert isinstance(middle, tuple)
        assert all(abs(one - other) < 12 for one, other in zip(middle, wanted, strict=True)), alt


def images_of(html: str) -> list[dict[str, str | None]]:
    """The attributes of a page's images."""
    return [attributes for tag, attributes in Page(html).elements if tag == "img"]


def test_no_export_upload_or_store_takes_the_page(run: Run, tmp_path: Path) -> None:
    assert (run.folder / REPORT).is_file()
    assert not [name for name in run_files(run) if "report" in name]
    sent = command("export", run.folder, "--push-to-hub", "me/dog", "--dry-run", "--json").result["sent"]
    assert "config.toml" in sent
    assert REPORT not in sent
    Store(str(tmp_path / "store"), run.folder).push()
    assert "config.toml" in files_below(tmp_path / "store")
    assert not [name for name in files_below(tmp_path / "store") if "report" in name]
    assert f"/{REPORT}" in (run.folder / ".gitignore").read_text().splitlines()


def test_no_other_file_of_a_run_has_a_photo(run: Run, photos: tuple[Photo, ...]) -> None:
    contents = [photo.path.read_bytes()[200:600] for photo in photos]
    contents += [data_uri(photo.image, 480)[600:900].encode() for photo in photos]
    holders = {
        file.relative_to(run.folder).as_posix()
        for file in run.folder.rglob("*")
        if file.is_file() and any(content in file.read_bytes() for content in contents)
    }
    assert holders == {REPORT}


def test_a_gitignore_that_is_there_already_keeps_its_lines(run: Run, photos: tuple[Photo, ...]) -> None:
    (run.folder / ".gitignore").write_text("*.pt\n")
    for _ in range(2):
        report_of_run(run, photos)
    assert (run.folder / ".gitignore").read_text() == f"*.pt\n# It contains photos.\n/{REPORT}\n"


def test_hostile_texts_stay_texts(photos: tuple[Photo, ...]) -> None:
    report = Report(
        title=HOSTILE,
        subject=HOSTILE,
        version="1",
        facts={HOSTILE: HOSTILE},
        photos=[Tile(data_uri(photos[0].image, 32), HOSTILE, HOSTILE)],
        comparisons={HOSTILE: [Tile(data_uri(photos[0].image, 32), HOSTILE)]},
        comparison_note=HOSTILE,
        scores=[ScoreRow(HOSTILE, HOSTILE, [0.5, None, 0.25])],
        score_note=HOSTILE,
        strips={HOSTILE: [Tile(data_uri(photos[0].image, 32), HOSTILE)]},
        curves={HOSTILE: [(1, 0.5), (2, 0.25)]},
        settings=HOSTILE,
        commands={HOSTILE: HOSTILE},
    )
    html = page(report)
    assert_alone(html)
    assert Page(html).text.count(HOSTILE) == 18


def test_a_strangers_run_puts_nothing_into_the_page_that_is_not_its_own(
    run: Run, photos: tuple[Photo, ...], tmp_path: Path
) -> None:
    Image.new("RGB", (4 * 66 - 2, 100), "red").save(tmp_path / "private.png")
    (run.samples / "step-000001.png").unlink()
    (run.samples / "step-000001.png").symlink_to(tmp_path / "private.png")
    (run.samples / "step-000002.png").write_bytes(b"no image")
    lines = [{"step": 1, HOSTILE: 1, "latent": True}, {"step": 2, HOSTILE: 2}, {"step": 2, "latent": "x"}]
    text = "\n".join(map(json.dumps, lines)) + f'\n{{"step": 3, "latent": NaN, {json.dumps(HOSTILE)}: Infinity}}\n'
    run.metrics_file.write_text(text)
    caption = dataclasses.replace(photos[0], caption=HOSTILE)
    html = report_of_run(run, [caption]).read_text(encoding="utf-8")
    assert_alone(html)
    assert not [one for one in images_of(html) if "step 1" in str(one["alt"]) or "step 2" in str(one["alt"])]
    points = [str(attributes["points"]) for tag, attributes in Page(html).elements if tag == "polyline"]
    assert len(points) == 2
    assert not [values for values in points if "nan" in values or "inf" in values]
    assert Page(html).text.count(HOSTILE) == 2


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, small_backbones: dict[str, Path]) -> Pair:
    """See `build_score_encoders`; not to be written to."""
    return build_score_encoders(tmp_path_factory.mktemp("encoders"), small_backbones)


def test_an_evaluation_sets_base_student_and_teacher_side_by_side(
    run: Run, encoders: Pair, photo_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a {} on the beach\na {} <b>in snow</b>\n", encoding="utf-8")
    flags = [run.folder, "--photos", photo_folder, "--prompts", tmp_path / "prompts.txt", "--seeds", 1, "--html"]
    flags += ["--clip", encoders[0], "--dino", encoders[1], "--json"]
    done = command("evaluate", *flags)
    assert done.code == 0, done.err
    assert done.result["report"] == str(run.folder / REPORT)
    html = (run.folder / REPORT).read_text(encoding="utf-8")
    assert_alone(html)
    rows = dict(re.findall(r'<th scope="row">(\w+) .*?</th>((?:<td>[^<]*</td>)+)', html))
    assert list(rows) == ["base", "student", "photos"]
    for name in ("clip_i", "dino", "clip_t"):
        assert f"<td>{done.result[name]:.3f}</td>" in rows["student"]
    assert rows["base"] != rows["student"]
    assert [str(one["alt"]) for one in images_of(html)][:2] == [
        "a sks dog on the beach (base model)",
        "a sks dog on the beach (student)",
    ]
    assert "a sks dog <b>in snow</b>" in Page(html).text
    assert str(tmp_path) not in html

    assert command("evaluate", *flags, "--role", "teacher", "--steps", 2).code == 0
    html = (run.folder / REPORT).read_text(encoding="utf-8")
    rows = dict(re.findall(r'<th scope="row">(\w+) .*?</th>((?:<td>[^<]*</td>)+)', html))
    assert list(rows) == ["base", "student", "teacher", "photos"]
    assert "2 steps" in html

    # Other photos, prompts or seeds are another question, and another LoRA has other scores.
    assert command("evaluate", *overriding(flags, "--seed", 7)).code == 0
    assert list(known_scores(find(run.folder))) == ["base", "student"]
    shutil.copy(run.folder / "teacher" / "sks-dog-teacher.safetensors", run.folder / "sks-dog.safetensors")
    assert list(known_scores(find(run.folder))) == ["teacher"]


def test_the_page_is_for_one_evaluation_only() -> None:
    done = command("evaluate", "--dreambench", "DIR", "--html")
    assert done.code == 2
    assert "--html cannot be combined with --dreambench" in done.error


MISSING = [] if importlib.util.find_spec("playwright") else ["playwright"]
MISSING += [] if chromium() else ["Chromium"]


@pytest.mark.browser
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: run make test-browser")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_all_of_the_page_and_asks_for_nothing(finished: Path, width: int, scheme: str) -> None:
    with browser() as started:
        view = started.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
        requests, complaints = list[str](), list[str]()
        view.on("request", lambda request: requests.append(request.url))
        view.on("console", lambda line: complaints.append(line.text))
        view.goto((finished / REPORT).as_uri())
        asked = [url for url in requests if not url.startswith("data:")]
        assert asked == [(finished / REPORT).as_uri()]
        assert complaints == []
        assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert view.evaluate("document.documentElement.scrollWidth") == width
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if scheme == "light" else "rgb(19, 20, 24)"
        )
