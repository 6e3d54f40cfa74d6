"""A LoRA file's header: what each tool reads, and nothing about the machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from echodistill_cli.errors import ConfigError
from echodistill_cli.lora.header import LoraHeader, header, notes_on_use
from echodistill_cli.lora.safetensors_io import write_safetensors
from echodistill_cli.lora.tensors import kohya_tensors
from tests.helpers.lora_files import SMALL

LORA = LoraHeader(
    name="sks-dog",
    family="sd",
    base_model="/home/somebody/models/sd-turbo",
    token="sks",
    class_name="dog",
    trigger="sks dog",
    rank=4,
    alpha=8.0,
    resolution=512,
    steps=1000,
    seed=7,
    photos=5,
    role="student",
    prediction_type="epsilon",
    usage="1 step, guidance 0, 512x512, use with SD-Turbo.",
    config_sha256="ab" * 32,
    version="0.1.0",
    started_at=1.7e9,
    finished_at=1.7e9 + 60,
    cover=b"\x89PNG picture",
)


def test_the_header_is_all_text_and_says_nothing_about_the_machine() -> None:
    metadata = header(LORA, kohya_tensors([SMALL], "sd", torch.float16))
    assert all(isinstance(value, str) for value in metadata.values())
    assert not any("somebody" in value or "/home" in value for value in metadata.values())
    assert metadata["ss_v2"] == "True"
    assert metadata["ss_base_model_version"] == "sd_v2"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    assert metadata["ss_sd_model_name"] == "sd-turbo"
    # The files hold alpha folded, so their alpha is the rank; the trained one is kept under our own key.
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert metadata["echodistill.alpha"] == "8"
    assert json.loads(metadata["ss_tag_frequency"]) == {"dog": {"sks dog": 5}}
    assert metadata["modelspec.date"] == "2023-11-14T22:14:20+00:00"
    assert float(metadata["ss_training_started_at"]) == LORA.started_at
    assert len(json.loads(metadata["ssmd_cover_images"])) == 1


def test_a_lora_whose_token_was_learned_says_so_where_the_token_is_missing() -> None:
    learned = header(dataclasses.replace(LORA, learned=True), kohya_tensors([SMALL], "sd", torch.float16))
    assert learned["echodistill.token_file"] == "sks.safetensors"
    (line,) = notes_on_use(learned, "sks-dog.safetensors", "student", None)
    assert "learned token, which stands in another file" in line
    assert not [*notes_on_use(learned, "sks-dog.safetensors", "student", "sks")]
    plain = header(LORA, kohya_tensors([SMALL], "sd", torch.float16))
    assert not [*notes_on_use(plain, "sks-dog.safetensors", "student", None)]
    (line,) = notes_on_use(plain, "sks-dog.safetensors", "teacher", None)
    assert "trained for the student" in line


def test_the_header_names_the_sdxl_family_as_each_reader_wants_it() -> None:
    card = dataclasses.replace(LORA, family="sdxl", base_model="stabilityai/sdxl-turbo")
    metadata = header(card, kohya_tensors([SMALL], "sdxl", torch.float16))
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["ss_sd_model_name"] == "sdxl-turbo"


def test_a_teacher_that_predicts_v_is_labeled_so() -> None:
    card = dataclasses.replace(LORA, role="teacher", prediction_type="v_prediction")
    metadata = header(card, kohya_tensors([SMALL], "sd", torch.float16))
    assert metadata["ss_base_model_version"] == "sd_v2_v"
    assert metadata["modelspec.prediction_type"] == "v"


def test_no_metadata_keeps_the_six_keys_that_kohyas_tools_need() -> None:
    metadata = header(LORA, kohya_tensors([SMALL], "sd", torch.float16), minimal=True)
    assert set(metadata) == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }


def test_a_header_is_refused_for_an_unknown_family_a_reserved_name_and_a_huge_cover() -> None:
    tensors = kohya_tensors([SMALL], "sd", torch.float16)
    for change, message in (
        ({"family": "flux"}, "family 'flux'"),
        ({"name": "None"}, "A1111 cannot load"),
        ({"cover": bytes(2**21)}, "cover image"),
    ):
        with pytest.raises(ConfigError, match=message):
            header(dataclasses.replace(LORA, **change), tensors)


def test_the_hash_is_that_of_the_bytes_after_the_header(tmp_path: Path) -> None:
    tensors = kohya_tensors([SMALL], "sd", torch.float16)
    metadata = header(LORA, tensors)
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    content = (tmp_path / "a.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"
