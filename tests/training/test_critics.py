"""Backbones equal the models that they wrap, the teacher's LoRA is disabled, and heads start from a seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, Dinov2Model, ViTModel

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec
from echodistill_cli.diffusion.schedule import add_noise
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.errors import ModelError
from echodistill_cli.models.adapters import UNET_LAYERS, add_lora, lora_tensors, trainable_parameters
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.vision import ImageBackbone, load_image_backbone
from echodistill_cli.training.critics import (
    Discriminator,
    ImageBatch,
    TeacherBackbone,
    build_discriminators,
    features_of,
    run_together,
)
from tests.helpers.models import model_config

CPU = torch.device("cpu")
KINDS = ("dino", "dinov2", "clip")
NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def load(source: Path | str, dtype: torch.dtype = torch.float32) -> ImageBackbone:
    return load_image_backbone(str(source), ModelConfig(offline=True), CPU, dtype)


def images(side: int = 32) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain_features(kind: str, folder: Path, pixels: Tensor) -> Tensor:
    """What the transformers model itself returns for normalized pixels."""
    with torch.no_grad():
        if kind == "clip":
            return CLIPVisionModelWithProjection.from_pretrained(folder)(pixels).image_embeds
        if kind == "dinov2":
            return Dinov2Model.from_pretrained(folder)(pixels).last_hidden_state[:, 0]
        return ViTModel.from_pretrained(folder, add_pooling_layer=False)(pixels).last_hidden_state[:, 0]


# --- image backbones --------------------------------------------------------------------------------------------------


@each_kind
def test_features_are_those_of_the_plain_model_on_normalized_pixels(
    small_backbones: dict[str, Path], kind: str
) -> None:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALIZATION["clip" if kind == "clip" else "imagenet"])
    expected = plain_features(kind, small_backbones[kind], ((images() + 1) / 2 - mean) / std)
    features = load(small_backbones[kind]).features(images())
    assert len(features) == 1
    assert features[0].shape == (2, 1, {"clip": 24}.get(kind, 32))
    torch.testing.assert_close(features[0][:, 0], expected, rtol=1e-4, atol=1e-5)
    assert load(small_backbones[kind]).widths == [features[0].shape[-1]]


def test_the_models_own_normalization_is_used_where_its_folder_has_one(
    small_backbones: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_backbones["dino"], tmp_path / "half"))
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    features = load(folder).features(images())[0][:, 0]
    torch.testing.assert_close(features, plain_features("dino", folder, images()), rtol=1e-4, atol=1e-5)


@each_kind
def test_larger_images_are_shrunk_without_aliasing(small_backbones: dict[str, Path], kind: str) -> None:
    backbone = load(small_backbones[kind])
    assert backbone.side == 32
    small = F.interpolate(images(64), (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(backbone.features(images(64))[0], backbone.features(small)[0], rtol=1e-4, atol=1e-5)


@each_kind
def test_a_backbone_is_frozen_and_passes_gradients_to_the_image(small_backbones: dict[str, Path], kind: str) -> None:
    backbone = load(small_backbones[kind])
    assert not backbone.training
    seen = (0.9 * images(48)).requires_grad_()
    backbone.features(seen)[0].square().sum().backward()
    assert seen.grad is not None
    assert seen.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())


@each_kind
def test_a_half_precision_backbone_answers_in_single_precision(small_backbones: dict[str, Path], kind: str) -> None:
    half, single = load(small_backbones[kind], torch.bfloat16), load(small_backbones[kind])
    features = half.features(images())[0]
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, single.features(images())[0], dim=-1).min() > 0.99


def test_a_folder_that_is_no_vision_model_is_named(small_pair: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="'clip_text_model' is not a ViT, DINOv2 or CLIP vision model"):
        load(small_pair[0] / "text_encoder")


def test_a_missing_backbone_names_the_flags_that_do_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="facebook/dino-vits16 is not in the cache, and this is offline") as caught:
        load("dino")
    hint = str(caught.value.hint)
    assert "hf download facebook/dino-vits16" in hint
    assert all(flag in hint for flag in ("--discriminators teacher", "--identity none", "--no-echo"))


# --- the teacher's features -------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(small_pair: tuple[Path, Path]) -> Denoiser:
    student, folder = map(str, small_pair)
    config = ModelConfig(student=student, teacher=folder, resolution=64, device="cpu", offline=True)
    return load_pair(config).teacher


def with_trained_lora(denoiser: Denoiser) -> Denoiser:
    add_lora(denoiser.unet, UNET_LAYERS["attention"], 4, 4.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(denoiser.unet):
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def image_batch() -> ImageBatch:
    def draw(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    codec = LatentCodec(None, None)  # the teacher's features need no decoder
    conditioning = Conditioning(draw(2, 2, 32, 32))
    return ImageBatch(draw(0, 2, 4, 8, 8), codec, draw(1, 2, 4, 8, 8), torch.tensor([200, 700]), conditioning)


def plain_taps(denoiser: Denoiser, seen: ImageBatch | None = None) -> list[Tensor]:
    """Outputs of all down blocks and the middle block in a whole plain pass."""
    taps: list[Tensor] = []
    unet, seen = denoiser.unet, seen or image_batch()
    blocks: tuple[torch.nn.Module, ...] = (*unet.down_blocks, unet.mid_block)
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, output: taps.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in blocks
    ]
    noisy = add_noise(denoiser.schedule, seen.latents, seen.noise, seen.timesteps)
    denoiser(noisy, seen.timesteps, seen.conditioning)
    for hook in hooks:
        hook.remove()
    return [tap.flatten(2).transpose(1, 2) for tap in taps]


def test_the_teachers_features_are_those_of_the_base_teacher(teacher: Denoiser) -> None:
    base = plain_taps(teacher)
    with_trained_lora(teacher)
    assert not torch.allclose(plain_taps(teacher)[1], base[1], atol=1e-2)
    taps = TeacherBackbone(teacher).features(image_batch())
    assert [tap.shape[-1] for tap in taps] == TeacherBackbone(teacher).widths
    assert all(torch.equal(tap, expected) for tap, expected in zip(taps, base, strict=True))


def test_computing_features_leaves_the_teacher_as_it_was(teacher: Denoiser) -> None:
    with_trained_lora(teacher)
    before, trainable = plain_taps(teacher), trainable_parameters(teacher.unet)
    tensors = lora_tensors(teacher.unet)
    TeacherBackbone(teacher).features(image_batch())
    assert all(torch.equal(a, b) for a, b in zip(plain_taps(teacher), before, strict=True))
    assert all(a is b for a, b in zip(trainable_parameters(teacher.unet), trainable, strict=True))
    assert all(torch.equal(value, tensors[name]) for name, value in lora_tensors(teacher.unet).items())
    assert not any(module._forward_hooks for module in (teacher.unet.down_blocks[-1], teacher.unet.mid_block))


def test_an_error_leaves_no_hook_and_the_lora_enabled(teacher: Denoiser) -> None:
    with_trained_lora(teacher)
    before = plain_taps(teacher)
    wrong = replace(image_batch(), conditioning=Conditioning(torch.zeros(2, 32, 5)))
    with pytest.raises(RuntimeError):
        TeacherBackbone(teacher).features(wrong)
    assert all(torch.equal(a, b) for a, b in zip(plain_taps(teacher), before, strict=True))
    assert not any(module._forward_hooks for module in (teacher.unet.down_blocks[-1], teacher.unet.mid_block))


def latent_gradient(look: Callable[[ImageBatch], list[Tensor]]) -> Tensor:
    latents = image_batch().latents.requires_grad_()
    # The backward pass comes later, with the adapter on again, as in a training step.
    sum(tap.square().sum() for tap in look(replace(image_batch(), latents=latents))).backward()  # type: ignore[union-attr]
    assert latents.grad is not None
    return latents.grad


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "gradient checkpointing"])
def test_the_gradient_is_the_bases_and_reaches_no_adapter(teacher: Denoiser, checkpointing: bool) -> None:
    expected = latent_gradient(lambda seen: plain_taps(teacher, seen))
    assert expected.abs().sum() > 0
    with_trained_lora(teacher)
    if checkpointing:
        teacher.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(latent_gradient(TeacherBackbone(teacher).features), expected)
    assert teacher.unet.is_gradient_checkpointing == checkpointing
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())


def test_the_critic_does_not_own_the_teachers_weights(teacher: Denoiser) -> None:
    critic = Discriminator("teacher", TeacherBackbone(teacher), 16)
    assert set(critic.state_dict()) == {
        f"heads.{i}.{j}.{kind}" for i in (0, 1, 2) for j in (1, 3) for kind in ("weight", "bias")
    }


# --- a batch of images ------------------------------------------------------------------------------------------------


def test_the_first_rows_of_a_batch_are_decoded_with_the_whole_batch(small_pair: tuple[Path, Path]) -> None:
    student, folder = map(str, small_pair)
    config = ModelConfig(student=student, teacher=folder, resolution=64, device="cpu", offline=True)
    batch = replace(image_batch(), codec=load_pair(config).codec)
    part = batch.rows(1)
    assert batch.rows(2) is batch
    assert torch.equal(part.image, batch.image[:1])
    assert part.image.data_ptr() == batch.image.data_ptr()
    assert torch.equal(part.latents, batch.latents[:1])
    assert part.timesteps.tolist() == [200]


def test_a_backbone_runs_on_a_batch_once(teacher: Denoiser) -> None:
    batch, backbone = image_batch(), TeacherBackbone(teacher)
    assert features_of(batch, backbone) is features_of(batch, backbone)
    assert features_of(replace(batch), backbone) is not features_of(batch, backbone)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_two_batches_run_together_as_apart_and_only_the_first_has_a_gradient(
    small_backbones: dict[str, Path], small_pair: tuple[Path, Path], kind: str
) -> None:
    codec, backbone = load_pair(model_config(*small_pair), teacher=False).codec, load(small_backbones[kind])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rest = (torch.zeros(3, 4, 8, 8), torch.zeros(3, dtype=torch.long), Conditioning(torch.zeros(3, 1, 1)))

    def distance(*, together: bool) -> list[Tensor]:
        first = ImageBatch(latents, codec, *rest)
        second = ImageBatch(latents.detach().flip(0), codec, *rest)
        if together:
            run_together(first, second, backbone)
        ours, theirs = features_of(first, backbone)[0], features_of(second, backbone)[0]
        assert not theirs.requires_grad
        value = (ours - theirs).square().sum()
        return [value.detach(), *torch.autograd.grad(value, latents)]

    torch.testing.assert_close(distance(together=True), distance(together=False), rtol=1e-4, atol=1e-6)


# --- heads ------------------------------------------------------------------------------------------------------------


def head_weights(critics: list[Discriminator]) -> list[Tensor]:
    return [parameter.detach() for critic in critics for parameter in critic.heads.parameters()]


def test_heads_start_from_the_seed_alone(teacher: Denoiser, small_backbones: dict[str, Path]) -> None:
    names = (str(small_backbones["dino"]), "teacher", str(small_backbones["clip"]))
    loaded = {name: load(name) for name in names if name != "teacher"}

    def load_noisily(name: str) -> ImageBackbone:
        torch.rand(3)
        return load(name)

    built = []
    for global_seed, loader, seed in ((0, loaded.__getitem__, 5), (1, load_noisily, 5), (1, loaded.__getitem__, 6)):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        built.append(head_weights(build_discriminators(names, loader, teacher, 16, seed)))
        assert loader is load_noisily or torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(built[0], built[1], strict=True))
    assert not torch.equal(built[0][0], built[2][0])


def test_an_added_discriminator_leaves_the_start_of_those_before_it(
    teacher: Denoiser, small_backbones: dict[str, Path]
) -> None:
    names = [str(small_backbones["dino"]), "teacher"]
    one, two = (head_weights(build_discriminators(names[:n], load, teacher, 16, 5)) for n in (1, 2))
    assert len(two) > len(one)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=False))


def test_a_folder_gives_its_name_to_its_critic(teacher: Denoiser, small_backbones: dict[str, Path]) -> None:
    critics = build_discriminators([str(small_backbones["dinov2"]), "teacher"], load, teacher, 16, 0)
    assert [critic.name for critic in critics] == ["dinov2", "teacher"]


def test_there_is_one_logit_per_token_and_tap(teacher: Denoiser, small_backbones: dict[str, Path]) -> None:
    image, latent = build_discriminators([str(small_backbones["dino"]), "teacher"], load, teacher, 16, 0)
    assert [x.shape for x in image.logits(load(small_backbones["dino"]).features(images()))] == [(2, 1)]
    taps = TeacherBackbone(with_trained_lora(teacher)).features(image_batch())
    assert [x.shape for x in latent.logits(taps)] == [(2, tap.shape[1]) for tap in taps]


def test_the_scale_of_features_does_not_change_the_logits(small_backbones: dict[str, Path]) -> None:
    backbone = load(small_backbones["dino"])
    critic = Discriminator("dino", backbone, 16)
    features = backbone.features(images())
    torch.testing.assert_close(critic.logits([features[0] * 50])[0], critic.logits(features)[0], rtol=1e-3, atol=1e-4)


@each_kind
def test_pixels_beyond_the_range_are_seen_and_pulled_at(small_backbones: dict[str, Path], kind: str) -> None:
    backbone, pixels = load(small_backbones[kind]), images()
    saturated = (3 * pixels).requires_grad_()
    features = backbone.features(saturated)[0]
    assert not torch.allclose(features, backbone.features((3 * pixels).clamp(-1, 1))[0], atol=1e-3)
    features.square().sum().backward()
    assert saturated.grad is not None
    assert (saturated.grad[saturated.detach().abs() > 1] != 0).float().mean() > 0.99


def test_real_and_fake_images_judged_at_once_get_the_logits_of_each(small_backbones: dict[str, Path]) -> None:
    critic = Discriminator("dino", load(small_backbones["dino"]), head_width=8)
    reals, fakes = ([torch.randn(count, 1, width) for width in critic.backbone.widths] for count in (3, 2))
    torch.testing.assert_close(critic.judge(reals, fakes), (critic.logits(reals), critic.logits(fakes)))
