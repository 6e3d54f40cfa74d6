"""The public API: its names, what importing it costs, and the example of a notebook."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import echodistill_cli as ed
from echodistill_cli import pipeline
from tests.helpers.commands import small_toml
from tests.helpers.random_models import build_score_encoders

ROOT = Path(__file__).parents[1]
VERBS = (
    *("train", "train_many", "plan_many", "sample", "write_samples", "export", "evaluate", "benchmark"),
    *("check", "inspect", "plan", "doctor"),
)
CONFIGURATION = ("Config", "build_config", "config_from_dict", "config_to_toml")
REQUESTS = ("SampleRequest", "ExportRequest", "EvaluationRequest", "BenchmarkRequest", "ManyRequest", "EngineRequest")
RESULTS = ("TrainResult", "Sample", "ExportResult", "Evaluation", "Many")
ERRORS = ("EchoDistillError", "ConfigError", "PhotoError", "ModelError", "DeviceMemoryError", "Interrupted")


def test_the_package_promises_these_names_and_no_others() -> None:
    assert set(ed.__all__) == {*VERBS, *CONFIGURATION, *REQUESTS, *RESULTS, *ERRORS, "__version__"}
    assert len(set(ed.__all__)) == len(ed.__all__)
    assert dir(ed) == sorted(ed.__all__)


def test_every_promised_name_exists_and_type_checkers_see_it() -> None:
    tree = ast.parse((ROOT / "echodistill_cli" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    visible = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert visible == set(ed.__all__) - {"__version__"}
    assert all(getattr(ed, name) is not None for name in ed.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = ed.trian


def test_the_verbs_are_the_facades_and_its_types_can_be_named() -> None:
    assert all(getattr(ed, name) is getattr(pipeline, name) for name in (*VERBS, *REQUESTS, *RESULTS))
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trained'"):
        _ = pipeline.Trained


def test_importing_the_package_imports_no_torch() -> None:
    light = (*VERBS, *CONFIGURATION, *REQUESTS, *ERRORS, "__version__")
    program = (
        "import sys, echodistill_cli as ed\n"
        f"names = [getattr(ed, name) for name in {light!r}]\n"
        "ed.build_config('mini', overrides={'concept.photos': 'photos'})\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'typer'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_the_projects_own_name_gives_the_same_names_without_torch() -> None:
    import echodistill

    assert getattr(echodistill, "__all__") == ed.__all__  # noqa: B009
    assert dir(echodistill) == dir(ed)
    assert all(getattr(echodistill, name) is getattr(ed, name) for name in ed.__all__)
    with pytest.raises(AttributeError, match="'echodistill' has no attribute 'trian'"):
        _ = echodistill.trian
    program = (
        "import sys, echodistill as ed; ed.build_config, ed.__version__; print({'torch', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_the_example_of_a_notebook_runs(
    small_pair: tuple[Path, Path],
    small_backbones: dict[str, Path],
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = small_toml(tmp_path, small_pair, small_backbones, train__steps=2, echo__start="off")
    config = ed.build_config(None, file, {"concept.photos": str(photo_folder), "concept.class_name": "dog"})
    planned = ed.plan(config)
    assert (planned.photos, planned.output_exists, planned.to_dict()["steps"]) == (4, False, 2)

    steps: list[float] = []
    result = ed.train(config, on_step=lambda metrics: steps.append(metrics["step"]))
    run = result.run
    assert (steps, run, result.lora) == ([1, 2], Path("runs/sks-dog"), run / "sks-dog.safetensors")

    samples = list(ed.sample(ed.SampleRequest(["a sks dog in the snow"], lora=run, count=2)))
    assert [one.seed for one in samples] == [0, 1]
    assert {one.prompt for one in samples} == {"a sks dog in the snow"}
    assert np.asarray(samples[0].image).shape == (64, 64, 3)
    assert samples[0].texts["lora"] == "sks-dog.safetensors"
    written = ed.write_samples(ed.SampleRequest(["a sks dog in the snow"], lora=run), tmp_path / "images")
    assert [path.name for path in written.files] == ["0000_s0.png"]

    (exported,) = ed.export(ed.ExportRequest(run, layouts=("diffusers",))).files
    assert exported.is_file()
    assert ed.inspect(result.lora).readers

    clip, dino = build_score_encoders(tmp_path / "encoders", small_backbones)
    drawing = ed.SampleRequest([], lora=run)
    evaluation = ed.evaluate(ed.EvaluationRequest(photo_folder, drawing, clip=str(clip), dino=str(dino)))
    assert evaluation.file == run / "evaluation" / "evaluation.json"
    assert len(evaluation.per_prompt) == evaluation.pictures == 16
    assert -1 <= evaluation.scores.dino <= 1


def test_errors_say_what_to_do_next(tmp_path: Path) -> None:
    with pytest.raises(ed.PhotoError, match="expected at least 3 usable photos") as caught:
        ed.train(ed.build_config("mini", overrides={"concept.photos": str(tmp_path)}))
    assert isinstance(caught.value, ed.EchoDistillError)
    assert caught.value.hint == "Copy 3 to 6 photos into it."
    with pytest.raises(ed.PhotoError, match="does not exist"):
        ed.check(tmp_path / "nowhere")
