"""What a dry run plans, and what `doctor` reports about this machine."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli import pipeline, planning
from echodistill_cli.config.build import PRESETS, build_config
from echodistill_cli.errors import ConfigError, EchoDistillError, ModelError, counted
from echodistill_cli.models.device import pick_device


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_plan_says_what_training_would_do_and_writes_nothing(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"concept.photos": str(photo_folder), "concept.class_name": "dog", "model.offline": True}
    plan = pipeline.plan(build_config("sd-turbo", overrides=settings))
    values = plan.to_dict()
    assert list(values) == [
        *("subject", "photos", "warnings", "models", "assumptions", "downloads", "memory"),
        *("device", "precision", "steps", "echo_from_step", "output", "output_exists", "config"),
    ]
    assert (values["subject"], values["photos"], values["output"]) == ("sks dog", 4, "runs/sks-dog")
    assert (values["device"], values["precision"]) == (str(pick_device("auto")), plan.precision)
    assert "stabilityai/sd-turbo" in values["models"]
    assert plan.memory is not None
    assert values["memory"] == {"gib": pytest.approx(sum(plan.memory.parts.values())), "parts": plan.memory.parts}
    assert json.loads(json.dumps(values))["config"]["concept"]["class_name"] == "dog"
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_the_embedded_pair_assumes_a_toy_and_downloads_no_model(photo_folder: Path) -> None:
    plan = pipeline.plan(build_config("mini", overrides={"concept.photos": str(photo_folder)}))
    assert plan.memory is None
    assert plan.to_dict()["memory"] is None
    assert any(line.startswith("mini:student: ") for line in plan.assumptions)
    assert not any("mini" in file for file in plan.downloads)


def test_each_preset_fits_with_settings_or_does_not_fit() -> None:
    diagnosis = pipeline.doctor()
    assert len(diagnosis.advice) == len(PRESETS)
    for name, line in zip(PRESETS, diagnosis.advice, strict=True):
        assert line.startswith(name)
        verdicts = ("model.precision = ", "does not fit on this machine's")
        assert any(words in line for words in (verdicts if PRESETS[name].family else ("echodistill train",)))
    assert json.loads(json.dumps(diagnosis.to_dict()))["advice"]


def test_no_published_model_fits_into_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.models.device.memory_gib", lambda _device: 4.0)
    *published, mini = planning.diagnose().advice
    assert mini.startswith("mini: runs on any machine")
    assert "--model mini" in mini
    for line in published:
        assert "does not fit on this machine's" in line
        assert "does not fit into 4.0 GiB: the smallest plan needs about" in line


def test_the_whole_method_fits_into_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echodistill_cli.models.device.memory_gib", lambda _device: 80.0)
    settings = {line.partition(" ")[0]: line for line in planning.diagnose().advice[:-1]}
    assert list(settings) == ["sd-turbo", "sdxl-turbo", "sana-sprint", "flux2-klein"]
    for name, line in settings.items():
        batch = 1 if name == "flux2-klein" else 2  # at 1024 pixels an image of klein keeps 31 GiB
        assert f"model.decoder = full, train.batch_size = {batch}" in line
        side = PRESETS[name].settings["model"].get("resolution", 512)
        assert re.search(rf"machine's [A-Z]+ at {side} pixels(, slowly \(minutes per step\))?, in about", line), line


@pytest.mark.parametrize(
    ("number", "noun", "plural", "text"),
    [
        (0, "image", None, "0 images"),
        (1, "image", None, "1 image"),
        (1, "batch", "batches", "1 batch"),
        (4, "batch", "batches", "4 batches"),
    ],
)
def test_a_number_stands_with_its_noun(number: int, noun: str, plural: str | None, text: str) -> None:
    assert counted(number, noun, plural) == text


def test_one_core_and_one_thread_are_not_plural(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda **_: 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert planning.diagnose().devices["cpu"] == "1 core, 1 thread"


# --- before a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message", "code"),
    [
        ({"concept.token": "my dog"}, "--token 'my dog'", 2),
        ({"concept.token": "dog"}, "--token 'dog' is part of the class name", 2),
        ({"model.device": "nowhere"}, "--device nowhere does not exist", 2),
        ({"model.resolution": 100}, "--resolution 100 is not a multiple of", 2),
        (
            {"model.student_lora": "missing.safetensors", "model.teacher": "mini:student"},
            "missing.safetensors does not exist",
            4,
        ),
        ({"run.output": "/proc/nothing"}, "/proc/nothing cannot be written", 1),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses_before_it_loads_a_model(
    photo_folder: Path, settings: dict[str, Any], message: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echodistill_cli.training.state.build_state", lambda *_: pytest.fail("models were loaded"))
    subject = {"concept.photos": str(photo_folder), "concept.class_name": "dog", "run.output": "runs/none"}
    config = build_config("mini", overrides=subject | settings)
    for command in (pipeline.plan, pipeline.train):
        with pytest.raises(EchoDistillError, match=message) as caught:
            command(config)
        assert caught.value.exit_code == code


@pytest.mark.parametrize("target", ["loop", "nowhere"])
def test_a_link_that_leads_nowhere_is_refused_as_an_output_before_a_model_is_loaded(
    photo_folder: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echodistill_cli.training.state.build_state", lambda *_: pytest.fail("models were loaded"))
    (tmp_path / "loop").symlink_to(tmp_path / target)
    subject = {"concept.photos": str(photo_folder), "concept.class_name": "dog"}
    config = build_config("mini", overrides=subject | {"run.output": str(tmp_path / "loop")})
    for command in (pipeline.plan, pipeline.train):
        with pytest.raises(EchoDistillError, match=r"loop (is a link to nowhere|could not be written)"):
            command(config)


def test_a_token_and_a_file_are_checked_although_the_models_are_not_here_yet(photo_folder: Path) -> None:
    subject = {"concept.photos": str(photo_folder), "concept.class_name": "dog", "model.offline": True}
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    wrong = {"sd-turbo": {"concept.token": "dog"}, base: {"model.student_lora": "missing.safetensors"}}
    for (model, settings), message in zip(wrong.items(), ("part of the class name", "does not exist"), strict=True):
        with pytest.raises((ConfigError, ModelError), match=message):
            pipeline.plan(build_config(model, overrides=subject | settings))
