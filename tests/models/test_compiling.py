"""Compiling the models' blocks: whole graphs, equal numbers, no second compilation when LoRA is switched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from echodistill_cli.config.build import build_config
from echodistill_cli.config.transformers import TRANSFORMERS
from echodistill_cli.models import compiling
from echodistill_cli.models.adapters import UNET_LAYERS, add_lora, lora_layers, without_lora
from echodistill_cli.models.compiling import AUTO_STEPS, compile_blocks, decide, missing_compiler
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.vision import load_image_backbone
from tests.helpers.models import model_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks at it itself
def test_compiled_blocks_have_no_graph_break_equal_gradients_and_survive_switching_lora(
    small_pair: tuple[Path, Path],
) -> None:
    pair = load_pair(model_config(*small_pair))
    unet = pair.student.unet
    add_lora(unet, UNET_LAYERS["cross-kv"], 2, 2, seed=0)
    weights = [
        parameter
        for layer in lora_layers(unet)
        for parameter in (layer.lora_A.default.weight, layer.lora_B.default.weight)
    ]
    for weight in weights:
        weight.data.normal_(generator=torch.Generator().manual_seed(1))
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 10])
    with torch.no_grad():
        conditioning = pair.encoder.encode(["a dog", "a cat"])

    def outputs() -> list[torch.Tensor]:
        output = pair.student(noisy, timesteps, conditioning)
        gradients = torch.autograd.grad(output.square().mean(), weights)
        with torch.no_grad(), without_lora(unet):
            base = pair.student(noisy, timesteps, conditioning)
        return [output.detach(), base, *gradients]

    eager = outputs()
    assert compile_blocks([unet], backend="aot_eager") == 12
    compiled = outputs()  # a graph break would be an error, as the graphs are whole
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    again = outputs()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(again, compiled)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("family", "shape", "blocks"), [("sana", (4, 8, 8), 2), ("flux2", (16, 4, 4), 3)])
def test_blocks_of_transformers_compile_as_a_whole_with_equal_gradients(
    small_flow_pairs: dict[str, tuple[Path, Path]], family: str, shape: tuple[int, ...], blocks: int
) -> None:
    student, teacher = small_flow_pairs[family]
    config = build_config(str(student), overrides={"model.teacher": str(teacher), "model.offline": True}).model
    pair = load_pair(config)
    add_lora(pair.student.unet, TRANSFORMERS[family].layers["attention"], 2, 2, seed=0)
    weights = [layer.lora_B.default.weight for layer in lora_layers(pair.student.unet)]
    noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        conditioning = pair.encoder.encode(["a dog", "a cat"])

    def outputs() -> list[torch.Tensor]:
        output = pair.student(noisy, torch.tensor([999, 999]), conditioning)
        return [output.detach(), *torch.autograd.grad(output.square().mean(), weights)]

    eager = outputs()
    assert compile_blocks([pair.student.unet], backend="eager") == blocks
    torch.testing.assert_close(outputs(), eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "dinov2", "clip"])
def test_blocks_of_image_encoders_compile_as_a_whole(small_backbones: dict[str, Path], name: str) -> None:
    config = build_config("mini").model
    backbone = load_image_backbone(str(small_backbones[name]), config, CPU, torch.float32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eager = backbone.features(images)
    assert compile_blocks([backbone], backend="aot_eager") == 2
    torch.testing.assert_close(backbone.features(images), eager, rtol=1e-4, atol=1e-5)


def test_auto_compiles_long_runs_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "missing_compiler", lambda _device: None)
    assert decide("off", GPU, 10**6) == (False, "")
    assert decide("auto", CPU, 10**6) == (False, "")
    assert decide("auto", GPU, AUTO_STEPS - 1)[0] is False
    assert decide("auto", GPU, AUTO_STEPS)[0] is True
    assert decide("default", CPU, 1)[0] is True


def test_without_a_compiler_a_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler(CPU) == "no C++ compiler is installed"
    assert decide("max", CPU, 5) == (False, "Not compiling the models, as no C++ compiler is installed")
    assert "does not compile" in (missing_compiler(torch.device("mps")) or "")
