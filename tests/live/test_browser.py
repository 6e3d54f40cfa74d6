"""The page in a real Chromium: typing, training, keeping, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echodistill_cli.live.studio import Studio, Wish
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.pipeline import sample
from examples.live_browser import SHORT, Visit, browser, chromium, served

ROOT = Path(__file__).parents[2]
PHOTOS = sorted((ROOT / "examples" / "photos").glob("*.png"))
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if chromium() else ["Chromium"]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: run make test-browser"),
]


@dataclass
class House:
    """The served page, its folder, and a browser."""

    address: str
    folder: Path
    browser: Any

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "sks-dog"

    def visit(self, **options: Any) -> Visit:
        return Visit(self.browser, self.address, **options)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A page with the embedded pair and no run yet, as on a bare machine."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "short.toml").write_text(SHORT, encoding="utf-8")
    with browser() as started, served(folder, "--model", "mini", "--config", "short.toml") as (address, _):
        yield House(address, folder, started)
    left = {path.name for path in folder.glob("runs/.live/*")}
    assert left <= {"photos", "sks-dog.log"}, "temporary files are gone when the page ends"


@pytest.fixture(scope="module")
def visit(house: House) -> Iterator[Visit]:
    """One page that the tests use in their order, as a person would."""
    here = house.visit()
    yield here
    here.page.close()


def pixels(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def files(folder: Path) -> set[str]:
    """Files that are no temporary ones."""
    paths = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return {path for path in paths if "/tmp-" not in path}


# --- a person types, trains, and sees the subject -----------------------------------------------------------------


def test_the_image_follows_the_keys_and_the_last_key_wins(visit: Visit) -> None:
    visit.type("a photo of a dog on the beach")
    first = visit.picture()
    visit.type("a photo of a dog in the snow", delay=5)  # faster than a CPU draws
    visit.page.wait_for_timeout(500)
    drawing = Studio("mini", on_message=lambda _line: None).draw(Wish(None, "a photo of a dog in the snow", 1.0, 7))
    assert visit.picture() != first
    assert np.array_equal(pixels(visit.picture()), np.asarray(drawing.images[0]))


def test_pasted_words_are_drawn_too(visit: Visit) -> None:
    visit.page.locator("#prompt textarea").focus()
    visit.page.keyboard.insert_text(" at night")  # as a clipboard, dictation or a phone's suggestions do
    visit.shows("a photo of a dog in the snow at night")
    visit.page.locator("#prompt textarea").fill("a photo of a dog in the snow")
    visit.shows("a photo of a dog in the snow")


def test_another_seed_shows_another_image(visit: Visit) -> None:
    before = visit.picture()
    visit.page.click("#dice")
    visit.page.wait_for_function("old => document.querySelector('#picture img').src !== old", arg=before)
    seed = visit.page.locator("#seed input")
    seed.fill("7")
    visit.page.wait_for_function("old => document.querySelector('#picture img').src === old", arg=before)


def test_photos_get_verdicts_before_anything_starts(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_text("no image", encoding="utf-8")
    visit.upload([*PHOTOS, tmp_path / "fake.png"])
    page = visit.page
    page.wait_for_function("document.querySelectorAll('#verdicts .ed-card').length === 6")
    assert page.locator("#verdicts .ed-skipped").count() == 1
    assert "is not an image" in page.locator("#verdicts").inner_text()
    assert page.locator("#verdicts .ed-note").inner_text().startswith("5 of 6 files are usable")


def test_a_training_shows_its_progress_and_stops_saved(house: House, visit: Visit) -> None:
    page = visit.page
    page.fill("#class-name input, #class-name textarea", "dog")
    page.fill("#train-steps input", "4")
    page.click("#train")
    page.wait_for_selector("#progress [data-state=training]")
    page.wait_for_selector("#preview img")
    page.click("#stop")
    page.wait_for_selector("#progress [data-state=stopped]")
    assert any((house.run / "checkpoints").iterdir())


def test_a_resumed_training_ends_and_the_image_is_of_the_new_subject(house: House, visit: Visit) -> None:
    page = visit.page
    page.click("#resume")
    page.wait_for_function(
        "document.querySelector('#picture img')?.dataset.prompt === 'a photo of a sks dog on the beach'",
        timeout=220_000,
    )
    page.wait_for_selector("#picture img:visible")  # the page went to the other tab
    assert page.locator("#subject input").input_value() == "sks-dog"
    (expected,) = sample(SampleRequest(["a photo of a sks dog on the beach"], seed=7, lora=house.run))
    assert np.array_equal(pixels(visit.picture()), np.asarray(expected.image))
    page.wait_for_function("document.querySelector('#base img')")
    assert visit.picture() != visit.picture("base")


def test_strength_0_is_the_base_model_without_loading_anything(house: House, visit: Visit) -> None:
    before, said = visit.picture(), (house.folder / "server.log").read_text(encoding="utf-8")
    visit.page.locator("#strength input[type=number]").fill("0")
    visit.page.wait_for_function("document.querySelector('#picture figcaption b').textContent === 'base model'")
    visit.page.wait_for_function(
        "document.querySelector('#picture img').src === document.querySelector('#base img').src"
    )
    assert visit.picture() != before
    visit.page.locator("#strength input[type=number]").fill("1")
    visit.page.wait_for_function("old => document.querySelector('#picture img').src === old", arg=before)
    assert (house.folder / "server.log").read_text(encoding="utf-8") == said


def test_a_kept_image_has_its_metadata_as_sample_writes_it(house: House, visit: Visit) -> None:
    visit.page.click("#keep")
    visit.page.wait_for_selector("#kept img")
    (file,) = (house.folder / "runs" / "kept").iterdir()
    (expected,) = sample(SampleRequest(["a photo of a sks dog on the beach"], seed=7, lora=house.run))
    with Image.open(file) as kept:
        assert dict(kept.text) == dict(expected.texts)  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(kept), np.asarray(expected.image))
    with Image.open(io.BytesIO(base64.b64decode(visit.picture().partition(",")[2]))) as shown:
        assert dict(shown.text) == dict(expected.texts)  # type: ignore[attr-defined]


def test_four_seeds_are_shown_and_one_of_them_can_be_chosen(visit: Visit) -> None:
    before = visit.picture()
    visit.page.click("#four")
    visit.page.wait_for_function("document.querySelectorAll('#grid img').length === 4")
    visit.page.locator("#grid button:has(img)").nth(2).click()
    visit.page.wait_for_function("document.querySelector('#picture img').dataset.seed === '9'")
    assert visit.picture() != before


def test_the_files_to_take_away_can_be_downloaded(house: House, visit: Visit) -> None:
    visit.page.get_by_text("Files to take away").click()
    visit.page.wait_for_selector("#away a[href*='sks-dog.safetensors']")
    with visit.page.expect_download() as download:
        visit.page.locator("#away a[href*='sks-dog.safetensors']").first.click()
    assert download.value.path().read_bytes() == (house.run / "sks-dog.safetensors").read_bytes()
    assert "echodistill" in visit.page.locator("#away .ed-table").inner_text()


def test_a_run_from_a_terminal_shows_up(house: House, visit: Visit) -> None:
    shutil.copytree(house.run, house.folder / "runs" / "from-a-terminal")
    visit.page.reload()
    visit.page.wait_for_selector("#picture img")
    visit.page.click("#subject input")
    offered = " ".join(visit.page.locator("[role=option]").all_inner_texts())
    assert "sks-dog" in offered
    assert "from-a-terminal" in offered
    shutil.rmtree(house.folder / "runs" / "from-a-terminal")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_everything_in_its_width_and_every_field_has_a_name(house: House, dark: bool) -> None:
    visit = house.visit(width=390, height=844, dark=dark)
    visit.page.wait_for_selector("#picture img")
    for tab in ("Generate", "Train"):
        visit.page.get_by_role("tab", name=tab).click()
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        nameless = visit.page.evaluate("""() => [...document.querySelectorAll('input, textarea, button')]
            .filter(e => e.offsetParent && !e.labels?.length && !e.getAttribute('aria-label')
                && !e.getAttribute('aria-labelledby') && !e.title && !e.textContent.trim())
            .map(e => e.outerHTML.slice(0, 200))""")
        assert nameless == []
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") is not None
    visit.page.close()


def test_nothing_was_asked_of_another_machine_and_nothing_failed_on_the_page(visit: Visit) -> None:
    assert visit.hosts == {"127.0.0.1"}
    assert visit.complaints == []


# --- somebody who reaches the port ------------------------------------------------------------------------------------


def answer(address: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(address, body, {name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", ""])
def test_a_foreign_host_header_is_refused(house: House, host: str) -> None:
    assert answer(house.address, Host=host)[0] == 403
    assert answer(f"{house.address}/gradio_api/queue/join", b"{}", Host=host, Content_Type="application/json")[0] == 403


def test_a_page_from_elsewhere_cannot_send_requests(house: House) -> None:
    assert answer(f"{house.address}/config", Origin="http://evil.example")[0] == 403
    assert answer(f"{house.address}/config", Origin=house.address)[0] == 200


def test_a_password_is_asked_for(tmp_path: Path) -> None:
    with served(tmp_path, "--model", "mini", "--no-train", "--auth", "me:secret") as (address, _):
        assert answer(f"{address}/config")[0] == 401
        login = {"Content_Type": "application/x-www-form-urlencoded"}
        assert answer(f"{address}/login", b"username=me&password=wrong", **login)[0] == 400
        assert answer(f"{address}/login", b"username=me&password=secret", **login)[0] == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "runs/sks-dog/config.toml", "runs/.live/sks-dog.log", "short.toml"])
def test_a_file_of_the_machine_cannot_be_read(house: House, path: str) -> None:
    for name in (path, str(house.folder / path)):
        assert answer(f"{house.address}/gradio_api/file={name}")[0] in (403, 404)


def test_a_huge_upload_is_refused_and_leaves_nothing(house: House) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = head + bytes(200 * 2**20) + b"\r\n--x--\r\n"
    upload = f"{house.address}/gradio_api/upload"
    with contextlib.suppress(urllib.error.URLError):  # the server may close the connection before it has read all
        assert answer(upload, body, Content_Type="multipart/form-data; boundary=x")[0] == 413
    sizes = [file.stat().st_size for file in house.folder.rglob("*") if file.is_file()]
    assert max(sizes) < 100 * 2**20


def call(house: House, name: str, data: list[Any]) -> dict[str, Any]:
    """Call a handler as the page does, without the page, and return its last message."""
    config = json.loads(answer(f"{house.address}/config")[1])
    (number,) = {one["id"] for one in config["dependencies"] if one["api_name"] == name and one["targets"]} or {0}
    call = {"data": data, "fn_index": number, "session_hash": "stranger", "event_data": None}
    status, text = answer(
        f"{house.address}/gradio_api/queue/join", json.dumps(call).encode(), Content_Type="application/json"
    )
    if status != 200:
        return {"success": False, "output": text}
    stream = answer(f"{house.address}/gradio_api/queue/data?session_hash=stranger")[1]
    messages = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    return next(one for one in reversed(messages) if one["msg"] == "process_completed")


PROMPT = "a photo of a sks dog"


@pytest.mark.parametrize(
    ("handler", "data"),
    [
        ("keep_image", ["../../../etc", PROMPT, 1, 7, 1]),
        ("keep_image", ["/etc/passwd", PROMPT, 1, 7, 1]),
        ("keep_image", ["sks-dog", PROMPT, 99, 7, 1]),
        ("keep_image", ["sks-dog", PROMPT, 1, -1, 1]),
        ("keep_image", ["sks-dog", PROMPT, 1, 7, 1000]),
        ("keep_image", ["sks-dog", "x" * 5000, 1, 7, 1]),
        ("keep_image", ["sks-dog", {"path": "/etc/passwd"}, 1, 7, 1]),
        ("begin", [None, "../../x", "dog", "mini", 2]),
        ("begin", ["/etc", "sks", "dog", "mini", 2]),
        ("begin", [None, "sks", "dog", "/some/model", 2]),
        ("go_on", ["../..", None]),
        ("end", ["/"]),
        ("check", [[{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "mini", None]),
        ("check", [[{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "mini", "/etc"]),
    ],
)
def test_a_handler_called_without_the_page_refuses_in_one_line_and_writes_nothing(
    house: House, handler: str, data: list[Any]
) -> None:
    before = files(house.folder)
    done = call(house, handler, data)
    assert not done["success"]
    assert "Traceback" not in json.dumps(done)
    assert "root:" not in json.dumps(done)
    assert files(house.folder) - {"server.log"} == before - {"server.log"}
