"""Every family's record agrees with the module names of its LoRA files and with its published configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import echodistill_cli
from echodistill_cli.config.build import PRESETS
from echodistill_cli.config.families import FAMILIES, family_of_source, family_of_unet, family_of_width
from echodistill_cli.lora.keys import ARCHITECTURES, KOHYA_PREFIXES

CONFIGURATIONS = Path(echodistill_cli.__file__).parent / "models" / "configurations"


UNETS = [name for name, family in FAMILIES.items() if not family.is_flow]


@pytest.mark.parametrize("name", UNETS)
def test_a_record_agrees_with_the_architecture_and_the_published_configuration(name: str) -> None:
    family = FAMILIES[name]
    folder = CONFIGURATIONS / family.configuration
    unet = json.loads((folder / "unet" / "config.json").read_text())
    assert family.name == name
    assert PRESETS[family.preset].family == name
    assert set(family.architectures) <= ARCHITECTURES.keys()
    assert family.text_width == unet["cross_attention_dim"] == ARCHITECTURES[family.configuration].context
    assert {path.name for path in folder.glob("text_encoder*")} == set(family.text_encoders)
    assert set(family.text_encoders) == set(KOHYA_PREFIXES[name]) - {"unet"}
    assert family_of_unet(unet) is family_of_width(family.text_width) is family_of_source(folder) is family


def test_teacher_and_student_share_the_vae_and_the_text_side() -> None:
    assert FAMILIES["sd"].parts == ("vae", "text_encoder", "tokenizer")
    assert FAMILIES["sdxl"].parts == ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def test_a_small_unet_is_recognized_by_its_size_conditioning() -> None:
    assert family_of_unet({"cross_attention_dim": 32, "addition_embed_type": None}) is FAMILIES["sd"]
    assert family_of_unet({"cross_attention_dim": 80, "addition_embed_type": "text_time"}) is FAMILIES["sdxl"]
    assert family_of_width(32) is None


@pytest.mark.parametrize(("prefix", "name"), [("cond_stage_model.", "sd"), ("conditioner.embedders.1.", "sdxl")])
def test_the_family_of_a_checkpoint_is_read_from_its_tensor_names(tmp_path: Path, prefix: str, name: str) -> None:
    header = json.dumps({f"{prefix}model.ln_final.bias": {}}).encode()
    file = tmp_path / "mine.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert family_of_source(file) is FAMILIES[name]


def test_a_hub_id_and_a_damaged_file_have_no_known_family(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 64)
    assert family_of_source("someone/something") is None
    assert family_of_source(damaged) is None
