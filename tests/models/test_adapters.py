"""LoRA on the real small models: what it changes, what it leaves alone, and its way out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from echodistill_cli.diffusion.sampling import student_x0
from echodistill_cli.errors import EchoDistillError
from echodistill_cli.models.adapters import (
    TEXT_LAYERS,
    UNET_LAYERS,
    add_lora,
    add_trained_lora,
    at_strength,
    folded,
    load_lora_tensors,
    lora_layers,
    lora_tensors,
    trainable_parameters,
    without_lora,
)
from echodistill_cli.models.load import load_pair
from tests.helpers.models import model_config
from tests.helpers.passes import passes, with_random_lora

Part = tuple[Any, tuple[str, ...]]


def load_unet(pair: tuple[Path, Path], dtype: torch.dtype = torch.float32) -> Any:
    return UNet2DConditionModel.from_pretrained(pair[0] / "unet", dtype=dtype)


@pytest.fixture(params=["cross-kv", "attention", "attention-conv", "text"])
def part(request: pytest.FixtureRequest, small_pair: tuple[Path, Path]) -> Part:
    """A module and its targets, before it has LoRA."""
    if request.param == "text":
        return CLIPTextModel.from_pretrained(small_pair[0] / "text_encoder").eval(), TEXT_LAYERS
    return load_unet(small_pair), UNET_LAYERS[request.param]


def output(module: Any) -> Tensor:
    if isinstance(module, CLIPTextModel):
        return module(torch.arange(20).view(2, 10)).last_hidden_state
    generator = torch.Generator().manual_seed(0)
    dtype = module.conv_in.weight.dtype
    noisy = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    hidden = torch.randn(2, 32, 32, generator=generator).to(dtype)
    return module(noisy, torch.tensor([3, 700]), encoder_hidden_states=hidden, return_dict=False)[0]


def disturb(module: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(module):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_lora_at_its_start_leaves_every_bit_of_the_output(part: Part) -> None:
    module, targets = part
    before = output(module)
    add_lora(module, targets, 4, 8.0, seed=0)
    assert torch.equal(output(module), before)
    disturb(module)
    assert not torch.allclose(output(module), before, atol=1e-3)


def test_only_the_adapter_is_trainable_and_it_sits_on_every_target(part: Part) -> None:
    module, targets = part
    layers = [name for name, _ in module.named_modules() if name.endswith(targets)]
    add_lora(module, targets, 4, 4.0, seed=0)
    assert len(trainable_parameters(module)) == 2 * len(layers) > 0
    assert all("lora_" in name for name, value in module.named_parameters() if value.requires_grad)
    assert set(lora_tensors(module)) == {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}


def test_cross_kv_touches_the_cross_attention_alone(small_pair: tuple[Path, Path]) -> None:
    unet = load_unet(small_pair)
    add_lora(unet, UNET_LAYERS["cross-kv"], 2, 2.0, seed=0)
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in lora_tensors(unet))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_single_precision_over_a_half_precision_base(
    small_pair: tuple[Path, Path], dtype: torch.dtype
) -> None:
    unet = load_unet(small_pair, dtype)
    add_lora(unet, UNET_LAYERS["cross-kv"], 2, 2.0, seed=0)
    disturb(unet)
    output(unet).float().square().sum().backward()
    for parameter in trainable_parameters(unet):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    frozen = [parameter for parameter in unet.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {dtype}
    assert all(parameter.grad is None for parameter in frozen)


def test_alpha_over_rank_is_the_scale(small_pair: tuple[Path, Path]) -> None:
    once, twice = (load_unet(small_pair) for _ in range(2))
    for unet, alpha in ((once, 2.0), (twice, 4.0)):
        add_lora(unet, UNET_LAYERS["cross-kv"], 2, alpha, seed=0)
        disturb(unet)
    tensors = {k: v * 2 if "lora_B" in k else v for k, v in lora_tensors(once).items()}
    load_lora_tensors(once, tensors)
    torch.testing.assert_close(output(once), output(twice))


def test_the_tensors_go_out_as_copies_and_come_back_the_same(part: Part) -> None:
    module, targets = part
    add_lora(module, targets, 4, 4.0, seed=0)
    disturb(module)
    tensors, expected = lora_tensors(module), output(module).detach()
    disturb(module)
    assert not torch.allclose(output(module), expected, atol=1e-3)
    parameters = trainable_parameters(module)
    load_lora_tensors(module, tensors)
    assert torch.equal(output(module), expected)
    # An optimizer made before goes on with the same parameters.
    assert all(a is b for a, b in zip(parameters, trainable_parameters(module), strict=True))


def test_an_adapter_of_other_layers_is_refused(small_pair: tuple[Path, Path]) -> None:
    cross, all_attention = (load_unet(small_pair) for _ in range(2))
    add_lora(cross, UNET_LAYERS["cross-kv"], 2, 2.0, seed=0)
    add_lora(all_attention, UNET_LAYERS["attention"], 2, 2.0, seed=0)
    with pytest.raises(EchoDistillError, match=r"does not fit this model: \d+ names or shapes differ, such as .*lora_"):
        load_lora_tensors(cross, lora_tensors(all_attention))
    with pytest.raises(EchoDistillError, match="does not fit"):
        load_lora_tensors(all_attention, lora_tensors(cross))


def test_an_adapter_of_another_rank_is_refused(small_pair: tuple[Path, Path]) -> None:
    two, four = (load_unet(small_pair) for _ in range(2))
    add_lora(two, UNET_LAYERS["cross-kv"], 2, 2.0, seed=0)
    add_lora(four, UNET_LAYERS["cross-kv"], 4, 4.0, seed=0)
    with pytest.raises(EchoDistillError, match="does not fit"):
        load_lora_tensors(two, lora_tensors(four))


def test_without_lora_shows_the_base_and_puts_everything_back(part: Part) -> None:
    module, targets = part
    base = output(module).detach()
    add_lora(module, targets, 4, 4.0, seed=0)
    disturb(module)
    trained, trainable = output(module).detach(), len(trainable_parameters(module))
    with without_lora(module):
        assert torch.equal(output(module), base)
    assert torch.equal(output(module), trained)
    assert len(trainable_parameters(module)) == trainable


def test_without_lora_puts_everything_back_after_an_error(small_pair: tuple[Path, Path]) -> None:
    unet = load_unet(small_pair)
    add_lora(unet, UNET_LAYERS["cross-kv"], 2, 2.0, seed=0)
    disturb(unet)
    trained = output(unet).detach()
    with pytest.raises(KeyError), without_lora(unet):
        raise KeyError
    assert torch.equal(output(unet), trained)


def test_the_start_depends_on_the_seed_alone_and_no_other_randomness_is_touched(small_pair: tuple[Path, Path]) -> None:
    started = []
    for global_seed, seed in ((0, 5), (1, 5), (1, 6)):
        unet = load_unet(small_pair)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        add_lora(unet, UNET_LAYERS["cross-kv"], 2, 2.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        started.append(torch.cat([value.flatten() for value in lora_tensors(unet).values()]))
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])
    assert all("lora_A" in name or not value.any() for name, value in lora_tensors(unet).items())


def test_at_strength_the_trained_lora_counts_as_many_times_and_then_as_before(part: Part) -> None:
    module, targets = part
    add_lora(module, targets, 4, 8.0, seed=0)
    disturb(module)
    trained, tensors = output(module).detach(), lora_tensors(module)
    with at_strength(module, 1.5):
        stronger = output(module).detach()
    assert torch.equal(output(module), trained)
    load_lora_tensors(module, {k: v * 1.5 if "lora_B" in k else v for k, v in tensors.items()})
    torch.testing.assert_close(output(module), stronger, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(stronger, trained, atol=1e-2)


# --- fewer operations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["cross-kv", "attention-conv"])
def test_lean_layers_compute_what_those_of_peft_compute(
    small_pair: tuple[Path, Path], targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = passes(with_random_lora(small_pair, targets))
    monkeypatch.setattr("echodistill_cli.models.adapters._run_lean", lambda _module: None)
    torch.testing.assert_close(lean, passes(with_random_lora(small_pair, targets)), rtol=1e-4, atol=1e-6)


def test_layers_of_different_ranks_compute_what_those_of_peft_compute(
    small_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = lora_tensors(with_random_lora(small_pair, "cross-kv").student.unet)
    narrow = {name.rpartition(".lora_")[0] for name in trained if "to_k" in name}
    mixed = {
        name: (value[:1] if "lora_A" in name else value[:, :1]) if name.rpartition(".lora_")[0] in narrow else value
        for name, value in trained.items()
    }

    def output() -> Tensor:
        pair = load_pair(model_config(*small_pair))
        add_trained_lora(pair.student.unet, mixed, 0.5)
        return passes(pair)[0]

    lean = output()
    monkeypatch.setattr("echodistill_cli.models.adapters._run_lean", lambda _module: None)
    torch.testing.assert_close(lean, output(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_folded_weights_give_the_same_images_and_are_forgotten(small_pair: tuple[Path, Path]) -> None:
    pair = with_random_lora(small_pair, "attention-conv")
    noise, conditioning = torch.randn(1, 4, 8, 8), pair.encoder.encode(["a dog"])
    plain = student_x0(pair.student, noise, conditioning)
    with folded(pair.student.unet):
        assert all(layer.folded is not None for layer in lora_layers(pair.student.unet))
        torch.testing.assert_close(student_x0(pair.student, noise, conditioning), plain, rtol=1e-3, atol=1e-3)
        with without_lora(pair.student.unet):
            base = student_x0(pair.student, noise, conditioning)
    assert not torch.allclose(base, plain, rtol=1e-3, atol=1e-3)
    assert all(layer.folded is None for layer in lora_layers(pair.student.unet))
