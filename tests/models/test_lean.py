"""UNets with fewer operations compute what diffusers' and peft's own code computes, with its gradients."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.models.adapters import folded, trainable_parameters, without_lora
from echodistill_cli.models.joined import fold_factors, joined, separate_inputs, share_inputs
from echodistill_cli.models.lean import make_lean, run_plain
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.vision import load_image_backbone
from tests.helpers.models import model_config
from tests.helpers.passes import passes, with_random_lora

FAMILIES = ["small_pair", "small_sdxl_pair"]


class Products(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def images(pair: ModelPair, prompts: list[str]) -> Tensor:
    noise = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return student_x0(pair.student, noise, pair.encoder.encode(prompts))


@pytest.mark.parametrize("targets", ["cross-kv", "attention", "attention-conv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lean_unet_gives_the_same_output_and_gradients_in_fewer_operations(
    family: str, targets: str, request: pytest.FixtureRequest
) -> None:
    pair = with_random_lora(request.getfixturevalue(family), targets)
    with Products() as plain_products:
        plain = passes(pair)
    make_lean(pair.student.unet)
    with Products() as lean_products:
        lean = passes(pair)
    torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-6)
    assert lean_products.names.total() < (0.9 if targets == "cross-kv" else 0.8) * plain_products.names.total()
    run_plain(pair.student.unet)
    torch.testing.assert_close(passes(pair), plain, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2])  # a single image takes the time shifts as biases
@pytest.mark.parametrize("targets", ["attention", "attention-conv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_text_and_the_latents_as_without_it(
    family: str, targets: str, count: int, request: pytest.FixtureRequest
) -> None:
    pair = with_random_lora(request.getfixturevalue(family), targets)
    noisy = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with torch.no_grad():
        conditioning = pair.encoder.encode(["a dog", "a cat"][:count])
    inputs = [noisy, conditioning.hidden.requires_grad_()]
    inputs += [] if conditioning.pooled is None else [conditioning.pooled.requires_grad_()]

    def gradients() -> list[Tensor]:
        output = pair.student(noisy, torch.tensor([999, 10][:count]), conditioning)
        return [output, *torch.autograd.grad(output.square().mean(), inputs)]

    plain = gradients()
    make_lean(pair.student.unet)
    with Products() as products:
        torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-6)
    assert products.names["exp"] > 0  # of the frequencies
    with Products() as products:
        gradients()
    assert products.names["exp"] == 0


@torch.no_grad()
def test_a_lean_unet_folds_its_lora_switches_it_off_and_forgets_every_pass(small_pair: tuple[Path, Path]) -> None:
    pair = with_random_lora(small_pair, "attention-conv")
    with without_lora(pair.student.unet):
        base = images(pair, ["a dog"])
    trained = images(pair, ["a dog"])
    make_lean(pair.student.unet)
    with folded(pair.student.unet):
        with Products() as products:
            torch.testing.assert_close(images(pair, ["a dog"]), trained, rtol=1e-3, atol=1e-3)
        assert products.names["baddbmm"] == 0  # no LoRA product is left
        with without_lora(pair.student.unet):
            torch.testing.assert_close(images(pair, ["a dog"]), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images(pair, ["a dog"]), trained, rtol=1e-4, atol=1e-5)
    lean = pair.student.unet.lean
    assert not lean.is_active
    assert not lean.text.outputs
    assert all(each.lora is None and each.folded is None for each in lean.projections)


@torch.no_grad()
def distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The mean error of tensors, relative to their size."""
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]).mean())


def test_in_half_precision_it_is_as_exact_as_without_and_the_lora_stays_in_single(
    small_pair: tuple[Path, Path],
) -> None:
    exact = passes(with_random_lora(small_pair, "attention"))
    for precision, most in (("bf16", 0.03), ("fp16", 0.006)):
        pair = with_random_lora(small_pair, "attention", precision=precision)
        plain = passes(pair)
        make_lean(pair.student.unet)
        lean = passes(pair)
        assert distance(lean, exact) <= min(most, 1.5 * distance(plain, exact))
        assert all(parameter.dtype is torch.float32 for parameter in trainable_parameters(pair.student.unet))


def test_with_gradient_checkpointing_the_libraries_code_runs(small_pair: tuple[Path, Path]) -> None:
    pair = with_random_lora(small_pair, "attention")
    plain = passes(pair)
    make_lean(pair.student.unet)
    pair.student.unet.enable_gradient_checkpointing()
    pair.student.unet.train()
    torch.testing.assert_close(passes(pair), plain, rtol=1e-5, atol=1e-7)


def test_joined_weights_are_views_of_one_tensor() -> None:
    layers = [nn.Linear(3, 2), nn.Linear(3, 4)]
    before = [layer.weight.detach().clone() for layer in layers]
    whole = joined([layer.weight for layer in layers])
    assert whole.shape == (6, 3)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    torch.testing.assert_close([layer.weight.detach() for layer in layers], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dino", "dinov2", "clip"])
def test_an_image_encoder_with_joined_attentions_gives_the_same_features_and_gradients(
    small_backbones: dict[str, Path], name: str
) -> None:
    config = model_config(Path(), Path())
    backbone = load_image_backbone(str(small_backbones[name]), config, torch.device("cpu"), torch.float32)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    for module in backbone.modules():  # published scales are not 1
        if isinstance(scale := getattr(module, "lambda1", None), Tensor):
            torch.nn.init.uniform_(scale, 0.5, 1.5)

    def passes() -> list[Tensor]:
        (features,) = backbone.features(image)
        return [features, *torch.autograd.grad(features.square().mean(), image)]

    with Products() as plain_products:
        plain = passes()
    share_inputs(backbone)
    with Products() as joined_products:
        torch.testing.assert_close(passes(), plain, rtol=1e-4, atol=1e-6)
    assert joined_products.names["addmm"] < plain_products.names["addmm"]
    separate_inputs(backbone)
    torch.testing.assert_close(passes(), plain, rtol=0, atol=0)
    for _ in range(2):  # the second time nothing is left to fold
        fold_factors(backbone)
        with Products() as folded_products:
            folded_values = passes()
        torch.testing.assert_close(folded_values, plain, rtol=1e-4, atol=1e-6)
    assert (folded_products.names.total() < plain_products.names.total()) is (name != "dino")


@torch.no_grad()
def test_a_text_encoder_with_joined_attentions_gives_the_same_features(small_sdxl_pair: tuple[Path, Path]) -> None:
    encoder = load_pair(model_config(*small_sdxl_pair), teacher=False).encoder
    plain = encoder.encode(["a dog", "a cat on the beach"])
    for each in encoder.encoders:
        share_inputs(each)
    joined_features = encoder.encode(["a dog", "a cat on the beach"])
    torch.testing.assert_close(joined_features.hidden, plain.hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joined_features.pooled, plain.pooled, rtol=1e-4, atol=1e-5)
