"""Training from the page without the page: the command line's own process, and what its folder tells."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echodistill_cli.errors import ConfigError
from echodistill_cli.live import markup
from echodistill_cli.live.trainer import Order, Trainer, gather, look_at
from tests.helpers.commands import trained_run


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    small_pair: tuple[Path, Path],
    small_backbones: dict[str, Path],
    photo_folder: Path,
) -> Path:
    return trained_run(tmp_path_factory.mktemp("trainer"), small_pair, small_backbones, photo_folder)


def order(photos: Path, token: str = "sks") -> Order:
    return Order(photos, token, "dog", "mini", 2)


def wait_until_it_ends(trainer: Trainer, name: str) -> None:
    deadline = time.monotonic() + 200
    while trainer.progress(name).is_running:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_finished_run_and_a_stopped_one_are_told_by_their_folders(finished: Path) -> None:
    trainer = Trainer(finished.parent)
    now = trainer.progress("first")
    assert (now.state, now.step, now.steps) == ("done", now.steps, now.steps)
    assert [one["step"] for one in now.losses] == [1, 2]
    assert set(now.losses[0]) == {"step", "denoising", "latent", "identity", "adversarial"}
    assert now.preview is not None
    stopped = Path(shutil.copytree(finished, finished.parent / "stopped"))
    (stopped / "sks-dog.safetensors").unlink()
    assert trainer.progress("stopped").state == "stopped"
    assert trainer.running() is None
    shutil.rmtree(stopped)


def test_a_run_that_a_terminal_trains_shows_up_and_can_be_stopped(finished: Path) -> None:
    # Its lock holds the ID of a process of the command line, and the name of this machine.
    program = "import time; time.sleep(600)  # echodistill train"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        (finished / ".lock").write_text(f"{process.pid} {platform.node()}", encoding="utf-8")
        trainer = Trainer(finished.parent)
        assert (trainer.running(), trainer.progress("first").state) == ("first", "training")
        (finished / ".lock").write_text(f"{process.pid} elsewhere", encoding="utf-8")
        assert trainer.running() is None  # a process of another machine, by chance with an ID of this one
        (finished / ".lock").write_text(f"{process.pid} {platform.node()}", encoding="utf-8")
        with pytest.raises(ConfigError, match=r"first is being trained\. Wait until it ends, or stop it"):
            trainer.start(order(finished, "other"))
        trainer.stop("first")
        assert process.wait(timeout=60) == -15
    assert trainer.running() is None
    (finished / ".lock").unlink()


@pytest.mark.parametrize("holder", ["1", str(2**31 - 1), "", "nonsense", "-5", "9" * 30])
def test_a_forged_lock_makes_the_page_stop_no_other_process(finished: Path, holder: str) -> None:
    (finished / ".lock").write_text(holder, encoding="ascii")
    trainer = Trainer(finished.parent)
    assert trainer.running() is None
    with pytest.raises(ConfigError, match="first is not being trained"):
        trainer.stop("first")
    (finished / ".lock").unlink()


def test_a_strangers_run_neither_stops_the_page_nor_reaches_out_of_its_folder(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "runs" / "evil"))
    preview = max((run / "samples").glob("step-*.png"))
    (tmp_path / "private.txt").write_text("private")
    shutil.copyfile(preview, tmp_path / "private.png")
    shutil.copyfile(preview, run / "samples" / "step-zzz.png")
    (run / "samples" / "step-999999.png").symlink_to(tmp_path / "private.png")
    os.mkfifo(run / "samples" / "step-999998.png")
    os.mkfifo(run / ".lock")
    (tmp_path / "runs" / ".live" / "photos").mkdir(parents=True)
    (tmp_path / "runs" / ".live" / "evil.log").symlink_to(tmp_path / "private.txt")
    (tmp_path / "runs" / ".live" / "photos" / "sks-dog").symlink_to(tmp_path)
    trainer = Trainer(tmp_path / "runs")
    now = trainer.progress("evil")
    assert (now.state, now.line, now.preview) == ("done", "", preview)
    assert markup.preview(preview)
    assert markup.preview(tmp_path / "private.txt") == ""
    trainer._launch("evil", ["--help"])
    trainer.close()
    assert (tmp_path / "private.txt").read_text() == "private"
    (photos := tmp_path / "photos").mkdir()
    trainer.start(order(photos))
    trainer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "private.png", "private.txt", "runs"]


def test_a_class_of_many_wide_letters_makes_no_name_that_no_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"too long for a file\. Choose a shorter class"):
        Trainer(tmp_path).order(tmp_path, "s" * 64, "犬" * 64, "mini", 1)


@pytest.mark.parametrize("name", ["..", "/", "../first", "", None, 3, ["first"]])
def test_a_run_is_known_by_its_name_alone(finished: Path, name: object) -> None:
    trainer = Trainer(finished.parent)
    for act in (trainer.stop, trainer.resume, trainer.progress):
        with pytest.raises(ConfigError, match="There is no run"):
            act(name)


def test_an_order_names_only_what_the_page_offers(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, "some/model")
    assert trainer.models[0] == "some/model"
    assert trainer.order(tmp_path, "sks", "alarm clock", "mini", 0).steps is None
    assert trainer.order(tmp_path, "sks", "alarm clock", "mini", 5).name == "sks-alarm-clock"
    wrong = [
        (None, "sks", "dog", "mini", 0), (tmp_path, "../x", "dog", "mini", 0), (tmp_path, "sks", "a/b", "mini", 0),
        (tmp_path, "sks", "dog", "/etc", 0), (tmp_path, "sks", "dog", "mini", -1),
        (tmp_path, "sks", "dog", "mini", 10**9),
    ]  # fmt: skip
    for values in wrong:
        with pytest.raises(ConfigError):
            trainer.order(*values)


def test_a_training_that_fails_says_why_in_one_line_and_can_be_tried_again(tmp_path: Path) -> None:
    photos = gather([], tmp_path / "photos")
    trainer = Trainer(tmp_path / "runs", offline=True)
    name = trainer.start(order(photos))
    wait_until_it_ends(trainer, name)
    now = trainer.progress(name)
    assert now.state == "failed"
    assert now.line.startswith("error: ")
    assert "expected at least 3 usable photos" in now.line
    trainer.start(order(photos))
    assert trainer.close() == [name]
    assert not (tmp_path / "runs" / name).exists()


def test_photos_are_copied_under_their_names_and_judged_as_check_does(photo_folder: Path, tmp_path: Path) -> None:
    files = [*sorted(photo_folder.iterdir()), Path(shutil.copy(photo_folder / "photo-0.jpg", tmp_path / "photo-1.jpg"))]
    folder = gather([str(file) for file in files], tmp_path / "new")
    assert len(list(folder.iterdir())) == 5
    report = look_at(folder, "mini")
    assert len(report.files) == len(report.photos) == 5


def test_too_many_or_too_large_files_are_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 2000)
    with pytest.raises(ConfigError, match="There are 31 files"):
        gather([str(tmp_path / "a.jpg")] * 31, tmp_path / "new")
    monkeypatch.setattr("echodistill_cli.live.trainer.MOST_UPLOAD", 1000)
    with pytest.raises(ConfigError, match=r"a\.jpg is larger than"):
        gather([str(tmp_path / "a.jpg")], tmp_path / "new")
    assert not (tmp_path / "new").exists()
