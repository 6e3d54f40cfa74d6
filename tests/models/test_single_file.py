"""A single file in the original layout gives the very weights of the diffusers folder that it was made from."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.errors import ModelError
from echodistill_cli.models.load import load_pair
from tests.helpers.original_layout import build_sd2_pair, build_sdxl, sd2_state, sdxl_state, write

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return build_sd2_pair(tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def settings(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's folder without its weights."""
    return without_weights(folders[0], tmp_path_factory.mktemp("settings") / "student")


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> ModelPair:
    """The pair as the folders give it."""
    return load_pair(config(*folders))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def without_weights(folder: Path, copy: Path) -> Path:
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors")))


def config(student: Path, teacher: Path, settings: str | Path | None = None, **changes: Any) -> ModelConfig:
    plain = ModelConfig(
        student=str(student),
        teacher=str(teacher),
        resolution=64,
        device="cpu",
        precision="fp32",
        offline=True,
        single_file_config=None if settings is None else str(settings),
    )
    return replace(plain, **changes)


def weights(pair: ModelPair) -> State:
    """Every weight of a pair by role and name."""
    roles = {"student": pair.student.unet, "vae": pair.codec.encoder}
    roles |= {f"text {index}": encoder for index, encoder in enumerate(pair.encoder.encoders)}
    if pair.has_teacher:
        roles["teacher"] = pair.teacher.unet
    return {f"{role} {name}": value for role, module in roles.items() for name, value in module.state_dict().items()}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_student_and_teacher_from_single_files_are_those_of_the_folders(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = (write(tmp_path / f"{folder.name}.safetensors", sd2_state(folder)) for folder in folders)
    teacher_settings = str(without_weights(folders[1], tmp_path / "teacher-settings"))
    found = load_pair(config(student, teacher, settings, teacher_single_file_config=teacher_settings))
    assert not caplog.messages
    assert_equal(weights(found), weights(pair))
    assert found.student.schedule.prediction_type == "epsilon"
    assert found.teacher.schedule.prediction_type == "v_prediction"
    prompts = ["a photo of sks dog", ""]
    assert torch.equal(found.encoder.encode(prompts).hidden, pair.encoder.encode(prompts).hidden)
    modules = (found.student.unet, found.codec.encoder, *found.encoder.encoders)
    assert not any(module.training for module in modules)
    assert not any(weight.requires_grad for module in modules for weight in module.parameters())


def test_an_sd2_file_written_by_the_code_of_sdxl_is_read_too(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path
) -> None:
    state = sd2_state(folders[0], text_prefix="conditioner.embedders.0.model.")
    file = write(tmp_path / "student.safetensors", state)
    found = load_pair(config(file, file, settings), teacher=False)
    assert_equal(weights(found), weights(replace(pair, loaded_teacher=None)))


def test_a_folder_and_a_single_file_make_a_pair(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path
) -> None:
    student = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    found = load_pair(config(student, folders[1], settings))
    assert_equal(weights(found), weights(pair))
    assert found.teacher.schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_half_precision_file_gives_the_rounded_weights(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path, precision: str
) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]), torch.float16)
    found = weights(load_pair(config(file, file, settings, precision=precision), teacher=False))
    expected = weights(replace(pair, loaded_teacher=None))
    assert_equal(
        {name: value.float() for name, value in found.items()},
        {name: value.half().float() for name, value in expected.items()},
    )
    assert found["text 0 final_layer_norm.weight"].dtype is (torch.float16 if precision == "fp16" else torch.float32)


def test_sdxl_with_both_text_encoders_comes_from_a_single_file(tmp_path: Path) -> None:
    folder = build_sdxl(tmp_path / "sdxl")
    file = write(tmp_path / "student.safetensors", sdxl_state(folder))
    settings = without_weights(folder, tmp_path / "settings")
    expected = load_pair(config(folder, folder), teacher=False)
    found = load_pair(config(file, file, settings), teacher=False)
    assert found.family == "sdxl"
    assert_equal(weights(found), weights(expected))


def test_the_configuration_may_be_a_hub_id_of_which_only_the_small_files_are_cached(
    folders: tuple[Path, Path], settings: Path, pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--someone--student"
    without_weights(settings, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    found = load_pair(config(file, file, "someone/student"), teacher=False)
    assert_equal(weights(found), weights(replace(pair, loaded_teacher=None)))
    (repository / "snapshots" / "0123abc" / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"vae/config.json is not in the cache.* hf download someone/student"):
        load_pair(config(file, file, "someone/student"), teacher=False)
    with pytest.raises(ModelError, match="someone/else is not in the cache"):
        load_pair(config(file, file, "someone/else"), teacher=False)


def test_without_a_configuration_its_setting_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    with pytest.raises(ModelError, match=r"student\.safetensors.* --set model\.single_file_config=NAME") as caught:
        load_pair(config(file, folders[1]))
    assert caught.value.exit_code == 4


def test_a_wrong_configuration_of_the_teachers_file_is_refused_and_its_setting_is_named(
    folders: tuple[Path, Path], small_pair: tuple[Path, Path], settings: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "teacher.safetensors", sd2_state(folders[1]))
    incomplete = without_weights(settings, tmp_path / "incomplete")
    (incomplete / "unet" / "config.json").unlink()
    cases = {
        str(small_pair[0]): r"teacher\.safetensors: its unet does not fit the configuration in",
        str(incomplete): r"incomplete/unet/config\.json is missing\.",
        str(file): r"teacher\.safetensors is a file, not a model's configuration\.",
    }
    for configuration, message in cases.items():
        with pytest.raises(ModelError, match=rf"{message}.* model\.teacher_single_file_config for the teacher"):
            load_pair(config(folders[0], file, teacher_single_file_config=configuration))


def lacking(state: State, start: str) -> State:
    """The state without the first weight whose name starts so."""
    gone = next(name for name in state if name.startswith(start))
    return {name: value for name, value in state.items() if name != gone}


@pytest.mark.parametrize(
    ("start", "part"),
    [
        ("model.diffusion_model.input_blocks.4.0", "unet"),
        ("first_stage_model.decoder.up.2", "vae"),
        ("cond_stage_model.model.transformer.resblocks.1", "text_encoder"),
        ("cond_stage_model.model.positional_embedding", "text_encoder"),
    ],
)
def test_a_file_that_lacks_a_weight_is_refused_by_part(
    folders: tuple[Path, Path], settings: Path, tmp_path: Path, start: str, part: str
) -> None:
    file = write(tmp_path / "student.safetensors", lacking(sd2_state(folders[0]), start))
    with pytest.raises(ModelError, match=rf"student\.safetensors: its {part} does not fit the configuration"):
        load_pair(config(file, file, settings), teacher=False)


@pytest.mark.parametrize(
    ("prefix", "part"),
    [("model.", "unet"), ("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")],
)
def test_a_file_that_lacks_a_part_is_refused_by_name(
    folders: tuple[Path, Path], settings: Path, tmp_path: Path, prefix: str, part: str
) -> None:
    state = {name: value for name, value in sd2_state(folders[0]).items() if not name.startswith(prefix)}
    file = write(tmp_path / "student.safetensors", state)
    with pytest.raises(ModelError, match=rf"student\.safetensors has no {part} in the original"):
        load_pair(config(file, file, settings), teacher=False)


def test_the_configuration_of_another_model_is_refused(
    folders: tuple[Path, Path], small_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    with pytest.raises(ModelError, match="its unet does not fit the configuration in"):
        load_pair(config(file, file, small_pair[0]), teacher=False)


def test_an_incomplete_configuration_is_refused(folders: tuple[Path, Path], settings: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    for lost in ("unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        copy = without_weights(settings, tmp_path / Path(lost).parent.name)
        (copy / lost).unlink()
        with pytest.raises(ModelError, match=Path(lost).name):
            load_pair(config(file, file, copy), teacher=False)
    with pytest.raises(ModelError, match="is a file, not a model's configuration"):
        load_pair(config(file, file, file), teacher=False)


def test_a_tiny_decoder_is_not_read_from_a_single_file(
    folders: tuple[Path, Path], settings: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "student.safetensors", sd2_state(folders[0]))
    with pytest.raises(ModelError, match="AutoencoderTiny cannot be read from a single file"):
        load_pair(config(file, file, settings, decoder="tiny", tiny_decoder=str(file)), teacher=False)
