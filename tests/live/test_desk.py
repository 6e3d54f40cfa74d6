"""What people ask of the page without the page: wishes, the line for the device, kept images, subjects."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from echodistill_cli.errors import ConfigError
from echodistill_cli.live.desk import Desk, Line, Waiting
from echodistill_cli.live.studio import Drawing, Studio, Wish
from echodistill_cli.live.subjects import Subject, chosen, find_subjects, take_away
from tests.helpers.commands import trained_run


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    small_pair: tuple[Path, Path],
    small_backbones: dict[str, Path],
    photo_folder: Path,
) -> Path:
    return trained_run(tmp_path_factory.mktemp("desk"), small_pair, small_backbones, photo_folder, text__form="token")


def desk(folder: Path, *named: Path, model: str | None = None) -> Desk:
    return Desk(Studio(model, on_message=lambda _line: None), folder, named)


def test_subjects_are_the_finished_runs_and_what_was_named_once_each(run: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(run / "sks-dog.safetensors", tmp_path / "first.safetensors"))
    unfinished = Path(shutil.copytree(run, run.parent / "unfinished"))
    (unfinished / "sks-dog.safetensors").unlink()
    subjects = find_subjects([file, run], run.parent)
    assert list(subjects) == ["first", "first (2)"]
    assert [subject.phrase for subject in subjects.values()] == ["sks dog", "sks dog"]
    assert subjects["first (2)"].prompt == "a photo of a sks dog on the beach"
    shutil.rmtree(unfinished)


@pytest.mark.parametrize("name", ["../first", "/etc/passwd", "nothing", 5, ["first"], {"path": "/etc"}])
def test_a_subject_is_chosen_by_its_name_alone(run: Path, name: object) -> None:
    with pytest.raises(ConfigError, match=r"There is no subject .* Choose one of the list"):
        chosen(find_subjects([], run.parent), name)


@pytest.mark.parametrize(
    "values",
    [("first", "x", 3.0, 0, 1), ("first", "x", 1.0, -1, 1), ("first", "x", 1.0, 0, 3), ("first", "x" * 1001, 1.0, 0, 1),
     ("first", None, 1.0, 0, 1), ("nobody", "x", 1.0, 0, 1), ("first", "x", 1.0, 2**32, 1)],
)  # fmt: skip
def test_a_wish_with_a_wrong_value_is_refused(run: Path, values: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        desk(run.parent).wish(*values)


def test_a_kept_image_overwrites_none_and_is_listed_newest_first(run: Path, tmp_path: Path) -> None:
    here = desk(tmp_path, run)
    wish = here.wish("first", "a sks dog", 1, 3, 1)
    first, second = here.keep(wish), here.keep(wish)
    assert here.kept() == [second, first]
    with Image.open(first) as image:
        assert image.text["lora_scale"] == "1"  # type: ignore[attr-defined]
        assert image.text["prompt"] == "a sks dog"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="Type a prompt first"):
        here.keep(here.wish("first", " ", 1, 3, 1))


def test_files_to_take_away_come_with_a_line_per_tool(run: Path, tmp_path: Path) -> None:
    (subject,) = find_subjects([run], run.parent).values()
    away = take_away(subject)
    assert [file.name for file in away.files] == ["sks-dog.safetensors", "sks.safetensors"]
    assert away.lines[-1][0] == "learned token"
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 1024), f"{layer}.lora_up.weight": torch.ones(320, 2)}
    save_file(tensors, tmp_path / "my-cat.safetensors")
    lines = dict(take_away(Subject("my-cat", tmp_path / "my-cat.safetensors")).lines)
    others = {"InvokeAI", "SD.Next", "stable-diffusion.cpp"}
    assert set(lines) == {"ComfyUI", "A1111", "Forge", "diffusers", "sd-scripts"} | others
    assert lines["ComfyUI"].startswith("Put it into models/loras")
    assert "<lora:my-cat:1>" in lines["A1111"]


class Slow(Studio):
    """A studio that takes a while, and never draws two images at once."""

    drawn: list[str]
    busy = False

    def draw(self, wish: Wish, count: int = 1) -> Drawing:
        assert count == 1
        assert not self.busy
        self.busy = True
        time.sleep(0.4)
        self.busy = False
        self.drawn.append(wish.prompt)
        return Drawing([], [], 0.4)


def test_people_are_served_in_their_order_and_see_how_many_are_before_them(tmp_path: Path) -> None:
    studio = Slow("mini")
    studio.drawn = []
    here, told = Desk(studio, tmp_path), dict[str, list[int]]()

    def ask(name: str) -> None:
        told[name] = [one.before for one in here.draw(Wish(None, name)) if isinstance(one, Waiting)]

    people = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "c")]
    for person in people:
        person.start()
        time.sleep(0.05)
    for person in people:
        person.join()
    assert studio.drawn == ["a", "b", "c"]
    assert told["a"] == []
    assert told["c"][0] == 2
    assert told["c"] == sorted(told["c"], reverse=True)


def test_somebody_who_closes_the_page_while_waiting_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.live.desk._GONE", 0.3)
    line = Line()
    line.join()  # and never asks again
    ticket = line.join()
    assert next(line.wait(ticket)) == 1
    assert list(line.wait(ticket)) == []
    line.leave(ticket)


def test_a_training_gets_the_memory_of_the_models_that_draw_only_if_there_is_too_little(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, trains = desk(tmp_path, run), [True]
    wish = here.wish("first", "a sks dog", 1, 3, 1)
    before = here.draw_now(wish)
    here.make_room(1000.0, lambda: trains[0])  # a CPU shares its memory with everything
    here.draw_now(wish)
    monkeypatch.setattr(here.studio, "free_gib", lambda: 5.0)
    here.make_room(4.0, lambda: trains[0])
    here.make_room(None, lambda: trains[0])
    here.draw_now(wish)
    here.make_room(9.0, lambda: trains[0])
    assert here.studio._base is None
    with pytest.raises(ConfigError, match=r"The training needs the device's memory\. Images come back when it ends"):
        here.draw_now(wish)
    trains[0] = False
    assert here.draw_now(wish).images[0].tobytes() == before.images[0].tobytes()


def test_an_error_of_one_wish_lets_the_next_in(tmp_path: Path) -> None:
    here = desk(tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match="There is no subject yet"):
            here.draw_now(Wish(None, "a dog"))
