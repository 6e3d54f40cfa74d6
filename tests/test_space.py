"""The Space: loads without ZeroGPU and without gradio, and generates what its LoRA and strength say."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from tests.helpers.commands import trained_run

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "space"


def load_app() -> Any:
    """The Space's program, as Python imports it."""
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_space_says_what_the_hub_needs_to_know_and_its_versions_are_the_projects() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "apache-2.0")
    assert len(front["short_description"]) <= 60
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"gradio>={front['sdk_version'].rpartition('.')[0]},<7" in project["optional-dependencies"]["live"]
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert set(wanted) <= set(project["dependencies"])


def test_a_gpu_is_borrowed_where_there_are_any_to_borrow(monkeypatch: pytest.MonkeyPatch) -> None:
    app = load_app()
    assert app.on_gpu(len) is len
    lender, durations = ModuleType("spaces"), list[int]()

    def borrow(duration: int) -> Callable[[Any], Any]:
        durations.append(duration)
        return lambda function: ("borrowed", function)

    monkeypatch.setattr(lender, "GPU", borrow, raising=False)
    monkeypatch.setitem(sys.modules, "spaces", lender)
    assert app.on_gpu(len) == ("borrowed", len)
    assert durations == [15]


def test_a_lora_is_a_repository_or_a_file() -> None:
    source = load_app().lora_source
    assert source("me/sks-dog") == ("me/sks-dog", {})
    assert source("files/dog.safetensors") == ("files", {"weight_name": "dog.safetensors"})


def test_an_image_depends_on_prompt_seed_and_strength_alone(
    small_pair: tuple[Path, Path],
    small_backbones: dict[str, Path],
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained_run(tmp_path, small_pair, small_backbones, photo_folder, text__form="frozen")
    monkeypatch.setenv("BASE", str(small_pair[0]))
    monkeypatch.setenv("LORA", str(run / "sks-dog.safetensors"))
    app = load_app()
    prompt = "a sks dog"
    images = [np.asarray(app.generate(prompt, *numbers)) for numbers in ((0, 1.0), (0, 0.0), (1, 1.0), (0, 1.0))]
    assert np.array_equal(images[0], images[3])
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_the_page_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setenv("LORA", "me/sks-dog")

    async def build() -> Any:
        return load_app().build_page()

    # Gradio leaves an event loop open where it finds none.
    assert asyncio.run(build())
