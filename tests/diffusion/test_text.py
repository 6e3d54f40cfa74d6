"""Prompts, as diffusers encodes them; the concept's word, checked or learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from echodistill_cli.diffusion.text import Conditioning, LearnedToken, PromptEncoder, check_token
from echodistill_cli.errors import ConfigError, ModelError

PROMPTS = ("a photo of a sks dog", "", "a teapot")


@pytest.fixture
def tokenizer(small_pair: tuple[Path, Path]) -> Any:
    return CLIPTokenizer.from_pretrained(small_pair[0] / "tokenizer")


@pytest.fixture
def encoder(small_pair: tuple[Path, Path], tokenizer: Any) -> PromptEncoder:
    text_encoder = CLIPTextModel.from_pretrained(small_pair[0] / "text_encoder").eval().requires_grad_(False)
    return PromptEncoder([tokenizer], [text_encoder])


@pytest.fixture
def pair_encoder(small_pair: tuple[Path, Path]) -> PromptEncoder:
    """Two encoders as SDXL has them: the second wider, with a projection."""
    torch.manual_seed(3)
    tokenizers = [CLIPTokenizer.from_pretrained(small_pair[0] / "tokenizer") for _ in range(2)]
    common = {
        "vocab_size": len(tokenizers[0]),
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "eos_token_id": 2,
    }
    encoders = [
        CLIPTextModel(CLIPTextConfig(**common, hidden_size=32)),
        CLIPTextModelWithProjection(CLIPTextConfig(**common, hidden_size=40, projection_dim=20)),
    ]
    for text_encoder in encoders:
        text_encoder.eval().requires_grad_(False)
    return PromptEncoder(tokenizers, encoders, zero_null=True)


def sdxl_pipeline(encoder: PromptEncoder) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=encoder.encoders[0],
        text_encoder_2=encoder.encoders[1],
        tokenizer=encoder.tokenizers[0],
        tokenizer_2=encoder.tokenizers[1],
        force_zeros_for_empty_prompt=True,
    )


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_by_diffusers_sd_pipeline(encoder: PromptEncoder) -> None:
    pipeline = StableDiffusionPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=encoder.encoders[0],
        tokenizer=encoder.tokenizers[0],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    expected, null = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, True)
    encoded = encoder.encode(PROMPTS)
    assert torch.equal(encoded.hidden, expected)
    assert encoded.added(None) is None
    torch.testing.assert_close(encoder.encode_null().hidden, null[:1])


def test_the_empty_prompt_is_encoded_in_the_same_pass_or_once(encoder: PromptEncoder) -> None:
    passes: list[int] = []
    hook = encoder.encoders[0].register_forward_hook(lambda *_: passes.append(1))
    encoded, null = encoder.encode_with_null(PROMPTS)
    assert len(passes) == 1
    torch.testing.assert_close(encoded.hidden, encoder.encode(PROMPTS).hidden)
    torch.testing.assert_close(null.hidden, encoder.encode_null().hidden)
    encoder.keep_null = True
    passes.clear()
    for _ in range(2):
        torch.testing.assert_close(encoder.encode_with_null(PROMPTS)[1].hidden, null.hidden)
    assert len(passes) == 3  # twice the prompts, once the empty one
    hook.remove()


def test_prompts_are_encoded_as_by_diffusers_sdxl_pipeline(pair_encoder: PromptEncoder) -> None:
    hidden, _, pooled, _ = sdxl_pipeline(pair_encoder).encode_prompt(["a photo of a sks dog", "a teapot"], device="cpu")
    encoded = pair_encoder.encode(["a photo of a sks dog", "a teapot"])
    assert encoded.pooled is not None
    torch.testing.assert_close(encoded.hidden, hidden)
    torch.testing.assert_close(encoded.pooled, pooled)
    added = encoded.added((64, 64, 0, 0, 64, 64))
    assert added is not None
    assert added["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2


def test_the_empty_prompt_of_sdxl_is_all_zeros_as_diffusers_has_it(pair_encoder: PromptEncoder) -> None:
    _, null, _, null_pooled = sdxl_pipeline(pair_encoder).encode_prompt("a teapot", device="cpu")
    encoded = pair_encoder.encode_null()
    assert encoded.pooled is not None
    assert torch.equal(encoded.hidden, null)
    assert torch.equal(encoded.pooled, null_pooled)
    assert not encoded.hidden.any()
    mixed = pair_encoder.encode(["a teapot", ""])
    assert mixed.hidden[0].any()
    assert not mixed.hidden[1].any()


def test_a_token_added_behind_the_end_token_does_not_move_the_pooling(pair_encoder: PromptEncoder) -> None:
    for tokenizer, text_encoder in zip(pair_encoder.tokenizers, pair_encoder.encoders, strict=True):
        tokenizer.add_tokens(AddedToken("zwx", single_word=True, normalized=False))
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    second, prompt = pair_encoder.encoders[1], "a zwx dog"
    ids = pair_encoder.tokenizers[1](prompt, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert int(ids.max()) > pair_encoder.tokenizers[1].eos_token_id
    end = int((ids[0] == pair_encoder.tokenizers[1].eos_token_id).nonzero()[0])
    with torch.no_grad():
        states = second.text_model(ids).last_hidden_state
        encoded = pair_encoder.encode([prompt])
    assert encoded.pooled is not None
    torch.testing.assert_close(encoded.pooled, second.text_projection(states[:, end]))


def test_a_prompt_longer_than_the_context_is_cut(encoder: PromptEncoder) -> None:
    assert torch.equal(encoder.encode(["dog " * 31]).hidden, encoder.encode(["dog " * 90]).hidden)


def test_the_end_of_a_prompt_that_is_not_read_is_returned_as_it_was_typed(encoder: PromptEncoder) -> None:
    limit = encoder.tokenizers[0].model_max_length - 2
    start = " ".join(["dog"] * limit)
    assert encoder.cut_off(start) == ""
    assert encoder.cut_off(f"{start}  In the Snow, at night ") == "In the Snow, at night"
    assert encoder.cut_off("") == ""
    same = [encoder.encode([text]).hidden for text in (start, f"{start} in the snow")]
    assert torch.equal(*same)


def test_a_learned_word_counts_as_one_token_of_a_prompt(encoder: PromptEncoder) -> None:
    limit = encoder.tokenizers[0].model_max_length - 2
    prompt = " ".join(["Zwx"] * limit)
    assert encoder.cut_off(prompt)
    LearnedToken(encoder, "zwx", "dog")
    assert encoder.cut_off(prompt) == ""
    assert encoder.cut_off(f"{prompt} zwx dog") == "zwx dog"


def test_the_tokenizer_that_reads_less_of_a_prompt_decides(pair_encoder: PromptEncoder) -> None:
    pair_encoder.tokenizers[1].model_max_length = 5
    assert pair_encoder.cut_off("a dog in deep snow") == "deep snow"


def test_the_null_prompt_is_encoded_with_the_encoder_as_it_is_now(encoder: PromptEncoder) -> None:
    before = encoder.encode_null().hidden
    encoder.encoders[0].final_layer_norm.weight.mul_(2)
    assert not torch.allclose(encoder.encode_null().hidden, before)


# --- the value object -------------------------------------------------------------------------------------------------


def conditioning(batch: int, seed: int, *, added: bool = True) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    shapes: tuple[tuple[int, ...], ...] = ((batch, 4, 8), (batch, 5), (batch, 6))
    hidden, pooled, time_ids = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return Conditioning(hidden, pooled, time_ids) if added else Conditioning(hidden)


def values(item: Conditioning) -> list[Tensor]:
    return [value for value in (item.hidden, item.pooled, item.time_ids) if value is not None]


@pytest.mark.parametrize("added", [True, False])
def test_conditionings_are_detached_expanded_and_joined_in_every_part(added: bool) -> None:
    one, two = conditioning(1, 0, added=added), conditioning(2, 1, added=added)
    assert len(values(one)) == (3 if added else 1)
    assert not any(value.requires_grad for value in values(one.detach()))
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(one.detach()), strict=True))
    for joined, first, second in zip(values(one.expand(3).join(two)), values(one), values(two), strict=True):
        assert torch.equal(joined, torch.cat((first, first, first, second)))


# --- checking the word ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "class_name", "message"),
    [
        ("<new1>", "dog", "only letters, digits, - and _"),
        ("sks/x", None, "only letters, digits, - and _"),
        ("", None, "only letters, digits, - and _"),
        ("dog", "dog", "is part of the class name"),
        ("Toy", "toy dog", "is part of the class name"),
        ("zwx", "dog", r"is 3 tokens for this model\..*Or learn the token.s vector with --text token"),
    ],
)
def test_a_word_that_cannot_work_is_refused(tokenizer: Any, token: str, class_name: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_token(tokenizer, token, class_name, learned=False)
    assert "'sks'" in str(caught.value)


def test_a_common_word_is_refused_learned_or_not(small_pair: tuple[Path, Path], tokenizer: Any) -> None:
    check_token(tokenizer, "cat", "dog", learned=False)
    # Published vocabularies run from common to rare; the small one does so only once "cat" is moved to its front.
    vocabulary = tokenizer.get_vocab()
    front = next(token for token, index in vocabulary.items() if index == 20)
    vocabulary[front], vocabulary["cat</w>"] = vocabulary["cat</w>"], 20
    merges = json.loads((small_pair[0] / "tokenizer" / "tokenizer.json").read_text())["model"]["merges"]
    ordered = CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in merges])
    for learned in (True, False):
        check_token(ordered, "sks", "dog", learned=learned)
        with pytest.raises(ConfigError, match=r"'cat' is a common word that already has a meaning.*'ohwx'|'sks'"):
            check_token(ordered, "cat", "dog", learned=learned)


def test_a_rare_word_will_do_and_any_new_one_if_it_is_learned(tokenizer: Any) -> None:
    check_token(tokenizer, "sks", "dog", learned=False)
    check_token(tokenizer, "zwx", "dog", learned=True)


def test_the_remedy_never_names_the_word_that_was_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="'ohwx'"):
        check_token(tokenizer, "sks", "sks", learned=False)


# --- learning the word ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sks", "zwx"], ids=["existing word", "new word"])
def word(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_learned_word_starts_as_its_initializer(encoder: PromptEncoder, word: str) -> None:
    dog = encoder.encode(["a photo of a dog"]).hidden
    LearnedToken(encoder, word, "dog")
    torch.testing.assert_close(encoder.encode([f"a photo of a {word}"]).hidden, dog)


def test_an_initializer_of_several_tokens_gives_their_mean(encoder: PromptEncoder) -> None:
    ids = encoder.tokenizers[0]("toy dog", add_special_tokens=False).input_ids
    assert len(ids) == 2
    expected = encoder.encoders[0].get_input_embeddings().weight[ids].mean(dim=0)
    torch.testing.assert_close(LearnedToken(encoder, "sks", "toy dog").vectors[0].data, expected)


def test_training_a_learned_word_moves_its_vector_alone(encoder: PromptEncoder, word: str) -> None:
    others = "a photo of the dog in snow"
    before = encoder.encode([others]).hidden
    token = LearnedToken(encoder, word, "dog")
    weights = {name: value.clone() for name, value in encoder.encoders[0].state_dict().items()}
    optimizer = torch.optim.AdamW(token.parameters(), lr=0.1, weight_decay=0.5)
    start = encoder.encode([f"a {word}"]).hidden.detach()
    for _ in range(3):
        optimizer.zero_grad()
        encoder.encode([f"a {word}"]).hidden.square().sum().backward()
        optimizer.step()
    assert sum(parameter.numel() for parameter in token.parameters()) == 32
    assert not torch.allclose(encoder.encode([f"a {word}"]).hidden, start, atol=1e-2)
    assert torch.equal(encoder.encode([others]).hidden, before)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.encoders[0].state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.encoders[0].parameters())
    assert all(parameter.grad is None for parameter in encoder.encoders[0].parameters())


@pytest.mark.parametrize("words", [("sks", "ohwx"), ("zwx", "qvb"), ("sks", "zwx"), ("zwx", "sks")])
def test_each_of_two_learned_words_gets_its_own_gradient(encoder: PromptEncoder, words: tuple[str, str]) -> None:
    first, second = (LearnedToken(encoder, word, "dog") for word in words)
    encoder.encode([f"a {words[0]} on a {words[1]}"]).hidden.square().sum().backward()
    gradients = [token.vectors[0].grad for token in (first, second)]
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert not torch.equal(gradients[0], gradients[1])


def test_a_learned_word_stands_for_itself_alone(encoder: PromptEncoder) -> None:
    LearnedToken(encoder, "zwx", "dog")
    ids = [encoder.tokenizers[0](text, add_special_tokens=False).input_ids for text in ("zwx", "azwxdog", "zw")]
    assert len(ids[0]) == 1
    assert ids[0][0] not in ids[1] + ids[2]


@pytest.mark.parametrize("token", ["zwx", "ZwX", "sks", "SKS"])
def test_a_learned_word_is_found_in_any_case(encoder: PromptEncoder, token: str) -> None:
    plain = encoder.encode(["a dog"]).hidden
    LearnedToken(encoder, token, "dog")
    for written in (token.lower(), token.upper(), token.title()):
        torch.testing.assert_close(encoder.encode([f"A {written}"]).hidden, plain)


def test_both_encoders_of_sdxl_learn_the_word(pair_encoder: PromptEncoder) -> None:
    token = LearnedToken(pair_encoder, "zwx", "dog")
    assert [vector.shape[0] for vector in token.vectors] == [32, 40]
    encoded = pair_encoder.encode(["a zwx"])
    assert encoded.pooled is not None
    (encoded.hidden.square().sum() + encoded.pooled.square().sum()).backward()
    assert all(vector.grad is not None and vector.grad.norm() > 0 for vector in token.vectors)


def test_vectors_from_elsewhere_take_their_place_if_they_fit(pair_encoder: PromptEncoder) -> None:
    token = LearnedToken(pair_encoder, "zwx", "dog")
    before = pair_encoder.encode(["a zwx"]).hidden
    saved = [torch.randn(1, 32), torch.randn(1, 40)]
    token.set_vectors(saved)
    assert [torch.equal(own, one[0]) for own, one in zip(token.vectors, saved, strict=True)] == [True, True]
    assert not torch.allclose(pair_encoder.encode(["a zwx"]).hidden, before)
    for wrong in (saved[:1], saved[::-1], [torch.randn(2, 32), torch.randn(2, 40)]):
        with pytest.raises(ModelError, match=r"'zwx' has vectors of .* of width \[32, 40\]"):
            token.set_vectors(wrong)
    assert torch.equal(token.vectors[0], saved[0][0])  # a refused one changes nothing


@pytest.mark.parametrize("build", [lambda e: e.encoders[0].bfloat16(), lambda e: e.encoders[0].half()])
def test_the_vector_stays_in_single_precision_over_a_half_precision_encoder(
    encoder: PromptEncoder, build: Callable[[PromptEncoder], Any]
) -> None:
    build(encoder)
    token = LearnedToken(encoder, "zwx", "dog")
    encoder.encode(["a zwx"]).hidden.float().sum().backward()
    assert token.vectors[0].dtype == torch.float32
    assert token.vectors[0].grad is not None
    assert token.vectors[0].grad.dtype == torch.float32
