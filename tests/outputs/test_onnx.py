"""The one-step model as ONNX graphs draws torch's pictures, and says what is wrong with a folder that is not one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from echodistill_cli.cli.app import app
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.outputs.onnx import load_onnx
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.runs import Run, create_run
from echodistill_cli.training.state import build_state
from tests.helpers.commands import command
from tests.helpers.runs import export_files, small_config, small_photos, write_loras

pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

PROMPTS = ("a photo of a zwx dog", "a photo of a cat in the snow")


@pytest.fixture(scope="module")
def run(
    small_pair: tuple[Path, Path], small_backbones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A finished run with a strong LoRA and a learned new word, exported to ONNX."""
    plain = {"critic__discriminators": (), "critic__identity": "none", "loss__adversarial": 0.0, "loss__identity": 0.0}
    output = str(tmp_path_factory.mktemp("runs") / "dog")
    config: Config = small_config(
        small_pair, small_backbones, **plain, text__form="token", concept__token="zwx", run__output=output
    )
    state = build_state(config, small_photos())
    torch.manual_seed(0)
    for name, parameter in state.pair.student.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    assert state.token is not None
    state.token.vectors[0].data.add_(torch.randn(32))
    made = create_run(config, overwrite=False)
    made.save_checkpoint(1, state.state_dict())
    write_loras(made, state.state_dict(), dtype="fp32")  # the precision of the graphs
    export_files(made.folder, layouts=("onnx",))
    return made


def pixels(request: SampleRequest) -> np.ndarray:
    return stacked(*(one.image for one in sample(request)))


def stacked(*images: Image.Image | None) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_the_graphs_draw_torchs_pictures_from_the_same_seeds(run: Run) -> None:
    request = SampleRequest(PROMPTS, count=2, seed=5, lora=run.folder)
    drawn = list(sample(dataclasses.replace(request, compare=True)))
    torchs, bases = stacked(*(one.image for one in drawn)), stacked(*(one.base for one in drawn))
    graphs = pixels(SampleRequest(PROMPTS, count=2, seed=5, lora=run.folder, backend="onnx"))
    assert np.abs(torchs - graphs).max() <= 1
    assert np.abs(torchs - bases).mean() > 1


def test_a_folder_of_graphs_can_be_named_and_moved_away_from_its_run(run: Run, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run.folder / "export" / f"{run.config.name}-onnx", tmp_path / "elsewhere"))
    (drawn,) = sample(SampleRequest(PROMPTS[:1], seed=5, model=str(moved), backend="onnx"))
    (expected,) = sample(SampleRequest(PROMPTS[:1], seed=5, lora=run.folder, backend="onnx"))
    assert np.array_equal(np.asarray(drawn.image), np.asarray(expected.image))
    assert drawn.texts["model"] == "elsewhere"


def test_the_folder_says_what_it_is_and_nothing_of_this_machine(run: Run) -> None:
    folder = run.folder / "export" / f"{run.config.name}-onnx"
    settings = json.loads((folder / "echodistill.json").read_text())
    assert (settings["family"], settings["size"], settings["time_ids"]) == ("sd", 64, None)
    for file in folder.rglob("*.onnx"):
        assert str(Path.home()).encode() not in file.read_bytes()
    assert not list(folder.parent.glob(".*"))


@pytest.mark.parametrize("change", [{"role": "teacher"}, {"compare": True}, {"lora_scale": 0.5}, {"size": 128}])
def test_what_the_graphs_cannot_do_is_refused(run: Run, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        list(sample(SampleRequest(PROMPTS, lora=run.folder, backend="onnx", **change)))  # type: ignore[arg-type]


def test_a_folder_without_graphs_and_a_damaged_graph_are_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no ONNX model"):
        list(sample(SampleRequest(PROMPTS, model=str(tmp_path), backend="onnx")))
    broken = Path(shutil.copytree(run.folder / "export" / f"{run.config.name}-onnx", tmp_path / "broken"))
    (broken / "unet" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"unet/model.onnx is damaged"):
        list(sample(SampleRequest(PROMPTS, model=str(broken), backend="onnx")))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("echodistill.json", b"[]"),
        ("echodistill.json", b"{}"),
        ("echodistill.json", b"{" * 5000),
        ("tokenizer/tokenizer.json", b"{}"),
        ("tokenizer/tokenizer_config.json", b"null"),
        ("scheduler/scheduler_config.json", b"{}"),
        ("vae_decoder/model.onnx", b""),
    ],
)
def test_a_damaged_file_of_the_folder_is_one_line(run: Run, tmp_path: Path, file: str, content: bytes) -> None:
    broken = Path(shutil.copytree(run.folder / "export" / f"{run.config.name}-onnx", tmp_path / "broken"))
    (broken / file).write_bytes(content)
    done = command("sample", PROMPTS[0], "--backend", "onnx", "--model", broken, "-o", tmp_path / "images")
    assert (done.code, done.out) == (4, ""), done.err
    assert done.error.startswith(f"error: {broken}")


def test_a_graph_of_another_model_is_one_line(run: Run, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(run.folder / "export" / f"{run.config.name}-onnx", tmp_path / "broken"))
    shutil.copyfile(broken / "text_encoder" / "model.onnx", broken / "unet" / "model.onnx")
    done = command("sample", PROMPTS[0], "--backend", "onnx", "--model", broken, "-o", tmp_path / "images")
    assert (done.code, done.out) == (4, ""), done.err
    assert "unet/model.onnx cannot be read" in done.error


def test_the_teacher_has_no_graphs(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one-step student only"):
        export_files(run.folder, layouts=("onnx",), roles=("teacher",), output=tmp_path)


def test_the_command_draws_with_the_graphs(run: Run, tmp_path: Path) -> None:
    words = ["sample", "-p", PROMPTS[0], "--lora", str(run.folder), "--backend", "onnx", "-o", str(tmp_path), "--quiet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    (file,) = map(Path, result.stdout.split())
    assert file.parent == tmp_path
    assert Image.open(file).text["lora"].endswith("-onnx")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "timesteps", "sampler"),
    [
        ({"student_timesteps": [999, 499], "student_sampler": "lcm"}, (999, 499), "lcm"),
        ({"student_timestep": 399}, (399,), "ddim"),  # of older versions, as is the next one
        ({"student_timestep": None}, (), "euler"),
    ],
)
def test_the_students_steps_are_those_of_the_export(
    run: Run, tmp_path: Path, settings: dict[str, object], timesteps: tuple[int, ...], sampler: str
) -> None:
    folder = shutil.copytree(run.folder / "export" / f"{run.config.name}-onnx", tmp_path / "onnx")
    file = folder / "echodistill.json"
    plain = json.loads(file.read_text())
    assert (plain.pop("student_timesteps"), plain.pop("student_sampler")) == ([], "euler")
    file.write_text(json.dumps(plain | settings))
    student = load_onnx(folder).student
    assert (student.timesteps, student.sampler) == (timesteps, sampler)
