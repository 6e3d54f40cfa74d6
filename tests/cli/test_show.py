"""What reaches a terminal: names without control codes or markup, and the progress of training and sampling."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from echodistill_cli.cli.progress import ImageProgress, TrainingProgress
from echodistill_cli.cli.show import SafeConsole, plan_table, print_paths, say_to
from echodistill_cli.config.schema import ConceptConfig, Config, EchoConfig, LossConfig, TrainConfig
from echodistill_cli.planning import Plan
from tests.helpers.commands import command

ATTACK = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"


def console(*, terminal: bool = False) -> tuple[SafeConsole, io.StringIO]:
    text = io.StringIO()
    return SafeConsole(file=text, width=200, force_terminal=terminal, no_color=True), text


def test_control_characters_never_reach_the_terminal_and_colors_do() -> None:
    safe, text = console(terminal=True)
    safe.print(Text(f"a{ATTACK}b\tc\nd", "bold"))
    say_to(safe, quiet=False)(f"[bold]x :smile:{ATTACK}.jpg")
    plain = re.sub(r"\x1b\[\d*m", "", text.getvalue())  # what rich itself writes
    assert "[bold]x :smile:" in plain
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", plain)
    assert "\x1b[1m" in text.getvalue()


def test_names_of_photos_are_shown_as_they_are_without_control_characters(photo_folder: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(photo_folder, tmp_path / "photos")
    photo = next(photos.glob("*.jpg"))
    for name in ("[bold]x.jpg", ":smile:.jpg", "clear\x1b[2Jscreen.jpg"):
        shutil.copy(photo, photos / name)
    (photos / "broken\x1b]0;title\x07.jpg").write_bytes(b"no photo")
    done = command("check", photos)
    assert {"[bold]x.jpg", ":smile:.jpg", "clear[2Jscreen.jpg"} <= set(re.findall(r"^\S+", done.out, re.MULTILINE))
    missing = command("check", tmp_path / "none\x1b[2J\x07")
    assert missing.code == 3
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.out + done.err + missing.err)


def training(config: Config, *steps: dict[str, Any]) -> list[str]:
    """Return the plain lines of a training run."""
    safe, text = console()
    with TrainingProgress(safe, config, quiet=False) as progress:
        for step in steps:
            progress.on_step(step)
        progress.show_end(Path("runs/my dog"))
    return text.getvalue().splitlines()


def test_carry_back_shows_no_losses_of_the_joint_steps() -> None:
    config = Config(train=TrainConfig(steps=1), echo=EchoConfig(start=None, carry_back=1))
    lines = training(
        config, {"step": 1, "denoising": 0.5, "latent": 2.0}, {"step": 1, "carry_back_step": 1, "denoising": 0.25}
    )
    assert lines[0].endswith("denoising 0.5  latent 2")
    assert lines[1].endswith("denoising 0.25")


def test_the_first_estimate_leaves_the_first_targets_out() -> None:
    train = TrainConfig(steps=4, target_steps=2, replays=1, first_targets=20, head_start=1)
    config = Config(train=train, loss=LossConfig(latent=1.0))
    step = {"denoising": 0.5, "step_seconds": 600.0}
    lines = training(config, {"step": 0, "head_start_step": 1, **step}, {"step": 1, **step}, {"step": 2, **step})
    assert lines[1] == "Generating the first targets (20 batches)"
    assert lines[2] == "step 1/4  denoising 0.5"
    assert lines[3] == "step 2/4  0 s left  denoising 0.5"


def test_the_time_of_all_phases_is_told_once_after_a_few_steps_of_the_first() -> None:
    config = Config(concept=ConceptConfig(class_name="dog"))
    first, others = {"step": 0, "step_seconds": 50.0}, {"step": 0, "step_seconds": 1.0}
    lines = training(config, *({**(others if n > 1 else first), "head_start_step": n} for n in range(1, 12)))
    # 295 steps of 4 passes of the UNet; 20 batches of targets of 20; 200 steps of 79.92; 60 steps of 4.
    assert [line for line in lines if "whole" in line] == ["The whole training takes about 74 min more"]
    quick = [{"step": n, "step_seconds": 0.01} for n in range(1, 12)]
    assert not [line for line in training(Config(train=TrainConfig(steps=20)), *quick) if "whole" in line]


def test_training_ends_with_its_duration_and_the_next_command() -> None:
    (line,) = training(Config(concept=ConceptConfig(token="sks", class_name="dog")))
    following = """echodistill sample --lora 'runs/my dog' --prompt "a photo of a sks dog on the beach\""""
    assert line == f"Done in 0 s. Next: {following}"


@pytest.mark.parametrize("total", [3, 40])
def test_sampling_counts_its_images_on_plain_lines(total: int) -> None:
    safe, text = console()
    with ImageProgress(safe, quiet=False) as progress:
        for done in range(1, total + 1):
            progress.on_image(done, total)
    lines = text.getvalue().splitlines()
    assert lines[-1] == f"image {total}/{total}"
    assert len(lines) <= 10


def test_sampling_shows_a_bar_on_a_terminal_and_nothing_if_quiet() -> None:
    for quiet, words in ((False, r"images ━+ 2/2"), (True, r"^$")):
        safe, text = console(terminal=True)
        with ImageProgress(safe, quiet=quiet) as progress:
            progress.on_image(1, 2)
            progress.on_image(2, 2)
        assert re.search(words, re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text.getvalue()))


def test_a_name_that_stdout_cannot_encode_is_printed_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, name, expected in (
        ("cp1252", "s犬.png", b"s\\u72ac.png"),
        ("utf-8", "s\udcff.png", b"s\xff.png"),
    ):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", out)
        print_paths({}, [Path(name)], as_json=False)
        out.flush()
        assert out.buffer.getvalue().strip() == expected
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "runs/sks-lora (exists: needs --resume or --overwrite)"),
        ({"resume": True}, "runs/sks-lora (continued)"),
        ({"overwrite": True}, "runs/sks-lora (replaced)"),
    ],
)
def test_a_plan_says_what_becomes_of_a_run_that_exists(options: dict[str, bool], words: str) -> None:
    plan = Plan(Config(), 4, (), {}, (), {}, None, "cpu", "fp32", output_exists=True)
    out, text = console()
    out.print(plan_table(plan, **options))
    assert words in text.getvalue()
