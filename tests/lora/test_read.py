"""Reading LoRA files back, and what is said about a bad one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echodistill_cli.errors import ModelError
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.lora.read import read_lora, read_token_file
from echodistill_cli.lora.safetensors_io import serialize, write_safetensors
from echodistill_cli.lora.tensors import diffusers_tensors, kohya_tensors
from tests.helpers.lora_files import SMALL, random_adapters, random_weights, tiny_sd, tiny_sdxl


def whole_file() -> bytes:
    return serialize(kohya_tensors([SMALL], "sd", torch.float16), {})


BAD_FILES = {
    "empty": (b"", "is empty"),
    "a few bytes": (b"\x10\x00", "truncated in its header"),
    "header cut off": (whole_file()[:60], "truncated in its header"),
    "body cut off": (whole_file()[:-8], "truncated or damaged"),
    "header no JSON": ((16).to_bytes(8, "little") + b"{not json at all" + bytes(8), "truncated or damaged"),
    "absurd length": (b"\xff" * 7 + b"\x7f" + b"{}" + bytes(100), "claims a header of"),
    "pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00state" + bytes(100), "is a Python pickle"),
    "zip": (b"PK\x03\x04\x14\x00\x08\x08" + bytes(100), "is a zip archive"),
    "web page": (b"<!DOCTYPE html><html><body>Sign in to download</body></html>" + bytes(100), "is a web page"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "no tensors": ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
}


@pytest.mark.parametrize(("build", "family"), [(tiny_sd, "sd"), (tiny_sdxl, "sdxl")])
def test_reading_our_files_back_gives_the_adapters_with_alpha_folded(build: Any, family: str, tmp_path: Path) -> None:
    pipe = build()
    names = {
        component: [name for name, _ in getattr(pipe, component).named_modules()]
        for component in ("unet", "text_encoder", "text_encoder_2")
        if hasattr(pipe, component)
    }
    weights = random_adapters(pipe)
    for tensors in (kohya_tensors(weights, family, torch.float32), diffusers_tensors(weights, torch.float32)):
        write_safetensors(tmp_path / "lora.safetensors", tensors, {})
        found = {part.component: part for part in read_lora(tmp_path / "lora.safetensors").to_peft(names)}
        assert found.keys() == {part.component for part in weights}
        for part in weights:
            other = found[part.component]
            assert (other.rank, other.alpha) == (part.rank, float(part.rank))
            assert other.tensors.keys() == part.tensors.keys()
            for key, tensor in part.tensors.items():
                scale = 2.5 if "lora_B" in key else 1.0
                torch.testing.assert_close(other.tensors[key], tensor * scale)


@pytest.mark.parametrize(("content", "reason"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused_by_name_and_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        read_lora(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 4


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="is a folder"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora_down.weight": torch.full((2, 8), float("nan"))}, r"lora_down\.weight holds NaN"),
        ({"lora_down.weight": torch.ones(3, 8)}, "differ in rank"),
        ({"lora_down.weight": torch.ones(2)}, "differ in rank"),
        ({"lora_down.weight": torch.ones(0, 8), "lora_up.weight": torch.ones(8, 0)}, "differ in rank"),
        ({"lora_down.weight": None}, "has no matching down weight"),
        ({"lora_up.weight": None}, "has no matching up weight"),
    ],
)
def test_a_broken_pair_is_refused_by_its_key(changes: dict[str, Tensor | None], reason: str, tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_proj_in"
    whole = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2), "alpha": torch.tensor(2.0)}
    parts = {**whole, **changes}
    save_file({f"{module}.{part}": tensor for part, tensor in parts.items() if tensor is not None}, tmp_path / "x")
    with pytest.raises(ModelError, match=reason):
        read_lora(tmp_path / "x")


def test_keys_that_match_no_module_of_the_model_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, kohya_tensors([SMALL], "sd", torch.float16), {})
    with pytest.raises(ModelError, match=r"lora_unet_mid_block_\S+ matches no module.*family .sd2"):
        read_lora(path).to_peft({"unet": ["conv_in"]})
    write_safetensors(
        path, kohya_tensors([SMALL], "sd", torch.float16) | {"lora_unet_strange.weight": torch.ones(2)}, {}
    )
    with pytest.raises(ModelError, match=r"1 of its keys are unknown, such as lora_unet_strange\.weight"):
        read_lora(path).to_peft()


def test_a_file_of_several_ranks_comes_back_in_several_parts(tmp_path: Path) -> None:
    other = random_weights("unet", {"mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (1024, 8)}, rank=3)
    write_safetensors(tmp_path / "a", kohya_tensors([SMALL, other], "sd", torch.float16), {})
    file = read_lora(tmp_path / "a")
    assert (file.format, file.family) == ("kohya", "sd2")
    assert [(part.rank, part.alpha, len(part.tensors)) for part in file.to_peft()] == [(2, 2.0, 2), (3, 3.0, 2)]


MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def peft_file(path: Path, **fields: Any) -> Path:
    """A LoRA of rank 4 whose header has these fields of peft's configuration."""
    tensors = {f"unet.{MODULE}.lora_A.weight": torch.ones(4, 1024), f"unet.{MODULE}.lora_B.weight": torch.ones(8, 4)}
    header = {f"unet.{key}": value for key, value in {"r": 4, "lora_alpha": 4, **fields}.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"alpha_pattern": {MODULE: 16}}, 4.0),
        ({"alpha_pattern": {"attn2.to_k": 16}}, 4.0),
        ({"alpha_pattern": {"^" + MODULE: 16, "to_k": 32}}, 4.0),
        ({"alpha_pattern": {".*attn2.*": 16}, "use_rslora": True}, 8.0),
        ({"alpha_pattern": {"attn1.to_k": 16}}, 1.0),
        ({"rank_pattern": {MODULE: 4}, "r": 32, "lora_alpha": 4}, 1.0),
    ],
)
def test_the_header_of_peft_gives_each_module_its_strength(
    fields: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    file = read_lora(peft_file(tmp_path / "a.safetensors", **fields))
    assert file.modules[0].scale == scale
    (part,) = file.to_peft()
    assert part.alpha / part.rank == scale
    assert inspect_file(file.path).scales == (scale,)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": "strong"},
        {"lora_alpha": float("inf")},
        {"use_dora": True},
        {"alpha_pattern": {"(a+)+": 8}},
        {"alpha_pattern": {"(": 8}},
        {"alpha_pattern": [1]},
    ],
)
def test_a_header_that_leaves_the_strength_open_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    file = read_lora(peft_file(tmp_path / "a.safetensors", **fields))
    with pytest.raises(ModelError, match="its header"):
        file.to_peft()
    assert any("strength is not known" in note for note in inspect_file(file.path).notes)


def test_deep_brackets_in_a_header_end_in_one_line(tmp_path: Path) -> None:
    deep = {"lora_adapter_metadata": "[" * 100_000, "ss_tag_frequency": '{"a": {"b": 1e999}}'}
    tensors = {f"unet.{MODULE}.lora_A.weight": torch.ones(4, 1024), f"unet.{MODULE}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "a.safetensors", deep)
    assert inspect_file(tmp_path / "a.safetensors").triggers == ()
    with pytest.raises(ModelError, match="cannot be read"):
        read_lora(tmp_path / "a.safetensors").to_peft()


def test_a_pipe_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelError, match="is not a regular file"):
        read_lora(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelError, match="is not a regular file"):
        read_lora(Path("/dev/zero"))


def test_control_characters_of_a_header_are_not_shown(tmp_path: Path) -> None:
    file = peft_file(tmp_path / "a.safetensors")
    save_file(load_file(file), file, {"ss_sd_model_name": "\x1b]0;owned\x07", "modelspec.trigger_phrase": "\x1b[2Jdog"})
    inspection = inspect_file(file)
    assert "\x1b" not in f"{inspection.base_model}{inspection.triggers}"
    save_file({"\x1b[2J": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="control characters"):
        read_lora(file)


def test_integers_are_no_weights_of_a_lora(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 8, dtype=torch.int8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="has dtype I8"):
        read_lora(tmp_path / "a.safetensors")


def test_a_token_of_one_dimension_and_a_bundled_one_are_read(tmp_path: Path) -> None:
    vector = torch.randn(1024)
    save_file({"sks": vector}, tmp_path / "sks.safetensors")
    assert torch.equal(read_token_file(tmp_path / "sks.safetensors")[0], vector[None])
    bundle = {"bundle_emb.sks.string_to_param.*": vector[None]}
    write_safetensors(tmp_path / "a.safetensors", kohya_tensors([SMALL], "sd", torch.float16) | bundle, {})
    file = read_lora(tmp_path / "a.safetensors")
    assert not file.unmatched
    token, vectors = file.token_vectors() or ("", {})
    assert (token, list(vectors)) == ("sks", ["text_encoder"])
    assert len(file.to_peft()) == 1
