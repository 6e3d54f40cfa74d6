"""What a file is, and what each reader makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from echodistill_cli.errors import ModelError
from echodistill_cli.lora import keys as lora_keys
from echodistill_cli.lora.header import LoraHeader, header
from echodistill_cli.lora.inspect import Inspection, inspect_file
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.readers import Verdict
from echodistill_cli.lora.safetensors_io import write_safetensors
from echodistill_cli.lora.tensors import LoraWeights, adapter_metadata, diffusers_tensors, kohya_tensors, token_tensors

READERS = ("diffusers", "ComfyUI", "A1111", "Forge", "sd-scripts")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_WIDTHS = {"sd2": {"text_encoder": 1024}, "sdxl": {"text_encoder": 768, "text_encoder_2": 1280}}


def card(family: str) -> LoraHeader:
    return LoraHeader(
        name="sks-dog",
        family="sdxl" if family == "sdxl" else "sd",
        base_model="stabilityai/sdxl-turbo" if family == "sdxl" else "stabilityai/sd-turbo",
        token="sks",
        class_name="dog",
        trigger="sks dog",
        rank=1,
        alpha=2.0,
        resolution=512,
        steps=1000,
        seed=0,
        photos=5,
        role="student",
        prediction_type="epsilon",
        usage="1 step, guidance 0, 512x512.",
        config_sha256="0" * 64,
        version="0.1.0",
    )


def adapter(paths: list[str], context: int, component: str = "unet") -> LoraWeights:
    """LoRA of rank 1 on these modules; all widths but the cross-attention's context are short."""
    tensors = {}
    for path in paths:
        width = context if component != "unet" or path.endswith(("attn2.to_k", "attn2.to_v")) else 4
        tensors[f"{path}.lora_A.weight"] = torch.ones(1, width)
        tensors[f"{path}.lora_B.weight"] = torch.ones(4, 1)
    return LoraWeights(component, tensors, rank=1, alpha=2.0)


def attention_and_text(family: str, also: tuple[str, ...] = ()) -> list[LoraWeights]:
    """What `--targets attention --text lora` trains, and modules with other endings, at the true architecture."""
    unet = [path for path in lora_keys.unet_paths(family) if ".attn" in path or path.endswith(also)]
    weights = [adapter(unet, lora_keys.ARCHITECTURES[family].context)]
    for component, layers in lora_keys.ARCHITECTURES[family].text_layers.items():
        text = [path for path in lora_keys.text_paths(layers) if path.endswith(TEXT_LAYERS)]
        weights.append(adapter(text, TEXT_WIDTHS[family][component], component))
    return weights


def inspect(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Inspection:
    path = folder / "some.safetensors"
    write_safetensors(path, tensors, metadata or {})
    return inspect_file(path)


def by_reader(inspection: Inspection) -> dict[str, Verdict]:
    return {verdict.reader: verdict for verdict in inspection.readers}


def kohya_pair(module: str, width: int = 1024, rank: int = 2) -> dict[str, Tensor]:
    return {f"{module}.lora_down.weight": torch.ones(rank, width), f"{module}.lora_up.weight": torch.ones(4, rank)}


@pytest.mark.parametrize(("family", "attention", "text"), [("sd2", 128, 23 * 4), ("sdxl", 560, 12 * 4)])
def test_every_reader_loads_our_kohya_file_completely(family: str, attention: int, text: int, tmp_path: Path) -> None:
    weights = attention_and_text(family)
    tensors = kohya_tensors(weights, card(family).family, torch.float16)
    found = inspect(tmp_path, tensors, header(card(family), tensors))
    assert (found.kind, found.format, found.family) == ("lora", "kohya", family)
    assert (found.modules["unet"], found.modules["text_encoder"]) == (attention, text)
    assert (found.ranks, found.alphas, found.scales) == ((1,), (1.0,), (1.0,))
    assert [verdict.reader for verdict in found.readers] == list(READERS)
    for verdict in found.readers:
        assert (verdict.loads, verdict.matched, verdict.unmatched) == ("fully", len(tensors), 0), verdict


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_reader_loads_the_convolutions_too(family: str, tmp_path: Path) -> None:
    tensors = kohya_tensors(attention_and_text(family, ("conv1", "conv2")), card(family).family, torch.float16)
    assert sum("in_layers" in key or "conv1" in key for key in tensors) == {"sd2": 22, "sdxl": 17}[family] * 3
    found = inspect(tmp_path, tensors, header(card(family), tensors))
    for verdict in found.readers:
        assert (verdict.loads, verdict.matched, verdict.unmatched) == ("fully", len(tensors), 0), verdict


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_diffusers_format_reaches_nothing_but_text_encoders_outside_diffusers(family: str, tmp_path: Path) -> None:
    weights = attention_and_text(family)
    tensors = diffusers_tensors(weights, torch.float16)
    found = inspect(tmp_path, tensors, adapter_metadata(weights))
    assert (found.format, found.family, found.notes) == ("diffusers", family, ())
    verdicts = by_reader(found)
    assert verdicts["diffusers"].loads == "fully"
    # ComfyUI matches none of the UNet's attention (diffusers#10860), which is far more than Forge tolerates.
    unet_keys = 2 * found.modules["unet"]
    assert (verdicts["ComfyUI"].loads, verdicts["ComfyUI"].unmatched) == ("partly", unet_keys)
    assert (verdicts["Forge"].loads, verdicts["A1111"].loads, verdicts["sd-scripts"].loads) == ("no", "no", "no")


def test_the_card_of_our_file_is_told_in_full(tmp_path: Path) -> None:
    weights = [adapter(["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 1024)]
    tensors = kohya_tensors(weights, "sd", torch.bfloat16)
    found = inspect(tmp_path, tensors, header(card("sd2"), tensors))
    assert found.triggers == ("sks dog",)
    assert found.base_model == "sd-turbo"
    assert found.resolution == "512x512"
    assert found.usage == "1 step, guidance 0, 512x512."
    assert found.made_by == "echodistill 0.1.0"
    assert found.role == "student"
    assert found.dtypes == ("BF16",)
    assert found.size == (tmp_path / "some.safetensors").stat().st_size
    assert json.loads(json.dumps(found.to_dict()))["readers"][0]["reader"] == "diffusers"
    assert str(tmp_path) not in json.dumps(found.to_dict())


def test_the_web_uis_hide_a_file_whose_header_does_not_name_its_family(tmp_path: Path) -> None:
    for family, said in (("sd2", "ss_v2 = True"), ("sdxl", "ss_base_model_version = sdxl_base_v1-0")):
        context = lora_keys.ARCHITECTURES[family].context
        weights = [adapter(["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], context)]
        tensors = kohya_tensors(weights, card(family).family, torch.float16)
        verdicts = by_reader(inspect(tmp_path, tensors, {"format": "pt"}))
        assert all(said in verdicts[reader].text for reader in ("A1111", "Forge"))
        assert verdicts["A1111"].loads == "hidden"
        assert verdicts["ComfyUI"].loads == "fully"
        minimal = header(card(family), tensors, minimal=True)
        assert by_reader(inspect(tmp_path, tensors, minimal))["A1111"].loads == "fully"


def test_the_web_uis_hide_a_file_of_sd1_whose_header_says_sd2(tmp_path: Path) -> None:
    tensors = kohya_pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768)
    verdicts = by_reader(inspect(tmp_path, tensors, {"ss_v2": "True", "ss_base_model_version": "sd_v2"}))
    for reader in ("A1111", "Forge"):
        assert verdicts[reader].loads == "hidden"
        assert "hidden beside SD 1 models: the header says ss_v2 = True" in verdicts[reader].text
    assert verdicts["ComfyUI"].loads == "fully"
    verdicts = by_reader(inspect(tmp_path, tensors, {"ss_v2": "False", "ss_base_model_version": "sd_v1"}))
    assert [verdicts[reader].loads for reader in ("A1111", "Forge")] == ["fully", "fully"]


def test_forge_gives_up_above_twelve_unknown_keys_and_not_before(tmp_path: Path) -> None:
    good = kohya_tensors(
        [adapter(["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 1024)], "sd", torch.float16
    )
    for unknown, loads in ((12, "partly"), (13, "no")):
        extra = {f"bundle_emb.sks.{index}": torch.ones(1) for index in range(unknown)}
        found = inspect(tmp_path, {**good, **extra}, {"ss_v2": "True"})
        assert by_reader(found)["Forge"].loads == loads
        assert by_reader(found)["Forge"].unmatched == unknown
        assert "Refuses the file because of" in by_reader(found)["diffusers"].text
        assert any("token is bundled" in note for note in found.notes)


def test_a1111_needs_all_four_projections_of_an_openclip_layer(tmp_path: Path) -> None:
    layer = "lora_te_text_model_encoder_layers_0_self_attn"
    half = kohya_pair(f"{layer}_q_proj") | kohya_pair(f"{layer}_k_proj")
    verdict = by_reader(inspect(tmp_path, half, {"ss_v2": "True"}))["A1111"]
    assert "Leaves out 1 text-encoder layers" in verdict.text
    whole = half | kohya_pair(f"{layer}_v_proj") | kohya_pair(f"{layer}_out_proj")
    assert by_reader(inspect(tmp_path, whole, {"ss_v2": "True"}))["A1111"].loads == "fully"


def test_the_spelling_te1_on_sd2_reaches_comfyui_but_not_a1111(tmp_path: Path) -> None:
    keys = [f"lora_te1_text_model_encoder_layers_0_self_attn_{name}" for name in TEXT_LAYERS]
    tensors = {key: tensor for module in keys for key, tensor in kohya_pair(module).items()}
    verdicts = by_reader(inspect(tmp_path, tensors, {"ss_v2": "True"}))
    assert (verdicts["ComfyUI"].loads, verdicts["diffusers"].loads) == ("fully", "fully")
    assert (verdicts["A1111"].loads, verdicts["sd-scripts"].loads) == ("no", "no")


@pytest.mark.parametrize("spelling", ["sgm", "diffusers"])
def test_all_readers_know_both_spellings_of_sdxl_attention(spelling: str, tmp_path: Path) -> None:
    paths = [path for path in lora_keys.unet_paths("sdxl") if ".attentions." in path]
    assert len(paths) == 722
    names = [lora_keys.to_sgm(path) if spelling == "sgm" else path for path in paths]
    tensors = {
        key: tensor
        for path, name in zip(paths, names, strict=True)
        for key, tensor in kohya_pair(
            f"lora_unet_{name.replace('.', '_')}", 2048 if path.endswith(("attn2.to_k", "attn2.to_v")) else 4, 1
        ).items()
    }
    found = inspect(tmp_path, tensors, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert [verdict.loads for verdict in found.readers] == ["fully"] * len(READERS)


def test_a_kohya_file_for_sd1_is_known_by_its_width_and_missing_alpha_means_rank(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tags = {"10_dog": {"sks dog": 12, " grass": 3}, "5_reg": {"dog": 1}}
    found = inspect(tmp_path, kohya_pair(module, 768), {"ss_tag_frequency": json.dumps(tags)})
    assert (found.format, found.family, found.scales) == ("kohya", "sd1", (1.0,))
    assert found.triggers == ("sks dog", "grass", "dog")
    scaled = kohya_pair(module, 768) | {f"{module}.alpha": torch.tensor(1.0)}
    assert inspect(tmp_path, scaled).scales == (0.5,)


def test_alpha_that_stands_only_in_diffusers_header_is_pointed_out(tmp_path: Path) -> None:
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{module}.lora.down.weight": torch.ones(4, 1024), f"{module}.lora.up.weight": torch.ones(8, 4)}
    said = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    found = inspect(tmp_path, tensors, said)
    assert (found.ranks, found.alphas, found.scales) == ((4,), (8.0,), (2.0,))
    assert any("others apply it at strength 1" in note for note in found.notes)
    (part,) = read_lora(tmp_path / "some.safetensors").to_peft()
    assert (part.rank, part.alpha) == (4, 8.0)


@pytest.mark.parametrize(
    ("key_format", "expected"),
    [
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight", "peft"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.default.weight", "peft"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight", "diffusers"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.{}.weight", "diffusers"),
    ],
)
def test_other_spellings_of_plain_lora_are_named_and_can_be_taken_apart(
    key_format: str, expected: str, tmp_path: Path
) -> None:
    down, up = ("down", "up") if "_lora." in key_format else ("A", "B")
    found = inspect(tmp_path, {key_format.format(down): torch.ones(2, 1024), key_format.format(up): torch.ones(4, 2)})
    assert (found.kind, found.format, found.family) == ("lora", expected, "sd2")
    (part,) = read_lora(tmp_path / "some.safetensors").to_peft()
    assert next(iter(part.tensors)) == "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    # A pipeline looks for the component's name in front, which peft alone does not write.
    assert by_reader(found)["diffusers"].loads == ("no" if expected == "peft" else "fully")


def test_a_lycoris_file_is_named_as_such(tmp_path: Path) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    parts = {name: torch.ones(4, 4) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    tensors = {f"{module}.{name}": tensor for name, tensor in parts.items()} | {f"{module}.alpha": torch.tensor(1.0)}
    found = inspect(tmp_path, tensors)
    assert (found.kind, found.format, found.family, found.modules) == ("lora", "lycoris", "sdxl", {"unet": 1})
    assert any("LyCORIS" in note for note in found.notes)
    assert by_reader(found)["ComfyUI"].loads == "fully"
    assert by_reader(found)["diffusers"].loads == "no"
    with pytest.raises(ModelError, match=r"is not a plain LoRA \(format: lycoris\)"):
        read_lora(tmp_path / "some.safetensors").to_peft()


def test_a_dora_is_pointed_out(tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    found = inspect(tmp_path, kohya_pair(module) | {f"{module}.dora_scale": torch.ones(4, 1)}, {"ss_v2": "True"})
    assert any("DoRA" in note for note in found.notes)


def test_a_lora_for_another_model_is_not_judged_by_names_it_cannot_have(tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    found = inspect(tmp_path, kohya_pair(module, 32))
    assert found.family == "unknown"
    assert by_reader(found)["diffusers"].loads == "fully"
    assert "Cannot be judged" in by_reader(found)["ComfyUI"].text


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "checkpoint"),
        ("some.other.weight", "unknown"),
        ("number", "unknown"),
    ],
)
def test_what_is_no_lora_is_not_called_one(key: str, kind: str, tmp_path: Path) -> None:
    found = inspect(tmp_path, {key: torch.tensor(1.0)})
    assert (found.kind, found.format) == (kind, "unknown")
    assert {verdict.loads for verdict in found.readers} == {"no"}


@pytest.mark.parametrize(
    ("vectors", "family", "expected", "diffusers"),
    [
        ({"text_encoder": torch.ones(2, 1024)}, "sd", "sd2", "fully"),
        ({"text_encoder": torch.ones(1, 768), "text_encoder_2": torch.ones(1, 1280)}, "sdxl", "sdxl", "partly"),
    ],
)
def test_a_token_file_says_which_word_calls_it(
    vectors: dict[str, Tensor], family: str, expected: str, diffusers: str, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "sks.safetensors", token_tensors("sks", vectors, family), {})
    found = inspect_file(tmp_path / "sks.safetensors")
    assert (found.kind, found.format, found.family, found.triggers) == ("token", "token", expected, ("sks",))
    assert [verdict.reader for verdict in found.readers] == list(READERS)
    assert by_reader(found)["diffusers"].loads == diffusers
    assert "embedding:sks" in by_reader(found)["ComfyUI"].text


@pytest.mark.parametrize("metadata", [{"ss_tag_frequency": "no json"}, {"lora_adapter_metadata": "[1]"}, {}])
def test_damaged_or_missing_metadata_is_no_error(metadata: dict[str, Any], tmp_path: Path) -> None:
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(kohya_pair(module), tmp_path / "some.safetensors", metadata)
    assert inspect_file(tmp_path / "some.safetensors").triggers == ()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"<html>" + bytes(100))
    with pytest.raises(ModelError, match="is a web page"):
        inspect_file(tmp_path / "x.safetensors")
