"""Module names are those of the published architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from echodistill_cli.lora import keys as lora_keys
from tests.helpers.lora_files import SD2_UNET, SDXL_UNET


@pytest.mark.parametrize(("family", "config"), [("sd2", SD2_UNET), ("sdxl", SDXL_UNET)])
def test_our_module_lists_are_the_modules_of_the_true_unets(family: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    true = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(lora_keys.unet_paths(family)) == true


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_unet_module_survives_the_way_into_sgm_names_and_back(family: str) -> None:
    paths = lora_keys.unet_paths(family)
    there = [lora_keys.to_sgm(path, first_upsampler=2 if family == "sdxl" else 1) for path in paths]
    assert len(set(there)) == len(paths)
    assert [lora_keys.from_sgm(path) for path in there] == list(paths)
    flat = [f"lora_unet_{path.replace('.', '_')}" for path in there]
    assert [lora_keys.locate(name) for name in flat] == [("unet", path) for path in paths]
