"""Prompts → what a UNet is conditioned on; and the concept's word: checked, or learned as one vector.

Everything that is peculiar to CLIP text encoders and their tokenizers is handled here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli.errors import ConfigError, ModelError

# Single tokens of CLIP's vocabulary that mean next to nothing.
RARE_WORDS = ("sks", "ohwx", "olis", "bnha", "hta", "phol", "ucd", "pll")
# A byte-pair vocabulary lists its tokens from frequent to rare. In CLIP's, every everyday noun tried ("dog" 1,929,
# "backpack" 14,894) lies below this share of the 49,408 and every rare word in use ("shs" 16,184) above.
_COMMON_SHARE = 0.31


@dataclass(frozen=True)
class Conditioning:
    """What a UNet is conditioned on, for B prompts.

    Args:
        hidden: [B, L, D], hidden states of the text encoder(s).
        pooled: [B, P], SDXL's pooled embedding; None for SD.
        time_ids: [B, 6], SDXL's (original size, crop corner, target size) in pixels; None for the UNet's own.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def added(self, time_ids: Sequence[int] | None) -> dict[str, Tensor] | None:
        """diffusers' `added_cond_kwargs`; None for SD.

        Args:
            time_ids: the UNet's own six numbers, for samples that have none.
        """
        if self.pooled is None or time_ids is None:
            return None
        own = torch.tensor([time_ids] * len(self.pooled), device=self.pooled.device)
        return {"text_embeds": self.pooled, "time_ids": own if self.time_ids is None else self.time_ids}

    def detach(self) -> Conditioning:
        """The same values, cut off from the text side's gradient."""
        return self._each(Tensor.detach)

    def expand(self, batch: int) -> Conditioning:
        """One prompt's conditioning repeated for `batch` samples."""
        return self._each(lambda value: value.expand(batch, *value.shape[1:]))

    def take(self, rows: Sequence[int]) -> Conditioning:
        """The conditioning of some of the prompts, in the order of `rows`."""
        return self._each(lambda value: value[list(rows)])

    def join(self, other: Conditioning) -> Conditioning:
        """Both batches in one, this one first."""
        pairs = zip(self._values(), other._values(), strict=True)
        hidden, pooled, time_ids = (None if a is None or b is None else torch.cat((a, b)) for a, b in pairs)
        assert hidden is not None
        return Conditioning(hidden, pooled, time_ids)

    def _values(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (self.hidden, self.pooled, self.time_ids)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, time_ids = (None if value is None else function(value) for value in (self.pooled, self.time_ids))
        return Conditioning(function(self.hidden), pooled, time_ids)


class PromptEncoder:
    """Tokenizers and text encoders of one model family, shared by teacher and student.

    Args:
        tokenizers, encoders: one pair for SD, two for SDXL (in the order of its pipeline).
        zero_null: SDXL's rule that the empty prompt is all zeros (`force_zeros_for_empty_prompt`).
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        encoders: Sequence[Any],
        *,
        zero_null: bool = False,
    ) -> None:
        self.tokenizers = list(tokenizers)
        self.encoders = list(encoders)
        self.zero_null = zero_null
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            _pool_at_end_of_text(encoder, tokenizer)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with the encoders as they are now; gradients flow to whatever of them is trained."""
        device = next(self.encoders[0].parameters()).device
        ids = [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
            for tokenizer in self.tokenizers
        ]
        if len(self.encoders) == 1:
            return Conditioning(self.encoders[0](ids[0]).last_hidden_state)
        return self._encode_pair(prompts, ids)

    def encode_null(self) -> Conditioning:
        """The empty prompt, batch 1, encoded anew each time: training changes the encoder."""
        return self.encode([""])

    def _encode_pair(self, prompts: Sequence[str], ids: Sequence[Tensor]) -> Conditioning:
        """SDXL: the second-last hidden states side by side, the second encoder's projection as pooled."""
        outputs = [encoder(x, output_hidden_states=True) for encoder, x in zip(self.encoders, ids, strict=True)]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds
        if self.zero_null:
            keep = torch.tensor([prompt != "" for prompt in prompts], device=hidden.device)
            hidden, pooled = hidden * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)
        return Conditioning(hidden, pooled)


def _pool_at_end_of_text(encoder: Any, tokenizer: Any) -> None:
    """Make the encoder pool at the tokenizer's end token.

    Published CLIP text configurations say `eos_token_id: 2`, which makes transformers pool at the largest token id:
    wrong as soon as a token is added behind the end token (transformers#24650).
    """
    inner = getattr(encoder, "text_model", encoder)
    encoder.config.eos_token_id = tokenizer.eos_token_id
    inner.eos_token_id = tokenizer.eos_token_id


def check_token(tokenizer: Any, token: str, class_name: str | None, *, learned: bool) -> None:
    """Refuse a concept word that cannot work with this tokenizer.

    Args:
        learned: the word gets a vector of its own, so that any new word will do.

    Raises:
        ConfigError: it has characters no file name may have, is several tokens, or is a word with a meaning.
    """
    other = next((word for word in RARE_WORDS if word != token and _single_id(tokenizer, word) is not None), None)
    instead = f"Use a rare single token such as {other!r}." if other else "Use a rare single token."
    if not re.fullmatch(r"[A-Za-z0-9_-]+", token):
        raise ConfigError(f"--token {token!r}: only letters, digits, - and _ (it names files too).", instead)
    if class_name and token.lower() in class_name.lower().split():
        raise ConfigError(f"--token {token!r} is the class name itself.", instead)
    token_id = _single_id(tokenizer, token)
    if token_id is None and not learned:
        pieces = len(tokenizer(token, add_special_tokens=False).input_ids)
        raise ConfigError(
            f"--token {token!r} is {pieces} tokens for this model.",
            f"{instead} Or learn the word itself: --text token.",
        )
    if token_id is not None and token_id < _COMMON_SHARE * tokenizer.vocab_size:
        raise ConfigError(f"--token {token!r} is a word that already means something to the model.", instead)


def _single_id(tokenizer: Any, word: str) -> int | None:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


class LearnedToken(nn.Module):
    """One trained vector per text encoder, put in the place of a word by a hook on the token embedding.

    The embedding matrices themselves stay frozen, so neither gradients nor weight decay reach any other word.

    Args:
        encoder: its tokenizers learn the word if it is new to them.
        token: the word.
        initializer: a known word whose vector is the start; of several tokens, their mean.
    """

    def __init__(self, encoder: PromptEncoder, token: str, initializer: str) -> None:
        super().__init__()
        self.token = token
        self.vectors = nn.ParameterList()
        for tokenizer, text_encoder in zip(encoder.tokenizers, encoder.encoders, strict=True):
            embedding: nn.Embedding = text_encoder.get_input_embeddings()
            start = embedding.weight[tokenizer(initializer, add_special_tokens=False).input_ids].mean(dim=0)
            vector = nn.Parameter(start.detach().float().clone())
            self.vectors.append(vector)
            token_id = _known_id(tokenizer, text_encoder, token)
            text_encoder.get_input_embeddings().register_forward_hook(_placing(vector, token_id))

    @torch.no_grad()
    def set_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Put vectors that were learned elsewhere, [1, width] and one per text encoder, in the place of its own.

        Raises:
            ModelError: of another number of text encoders, of several vectors, or of another width.
        """
        widths, shapes = [len(own) for own in self.vectors], [tuple(vector.shape) for vector in vectors]
        if shapes != [(1, width) for width in widths]:
            raise ModelError(
                f"The word {self.token!r} has vectors of {shapes}, and this model takes one of width {widths}.",
                "Name the model that the word was learned for.",
            )
        for own, vector in zip(self.vectors, vectors, strict=True):
            own.copy_(vector[0])


def _known_id(tokenizer: Any, text_encoder: Any, token: str) -> int:
    """The word's id; a word that is not one token yet is added to tokenizer and embedding."""
    token_id = _single_id(tokenizer, token)
    if token_id is not None:
        return token_id
    from transformers import AddedToken

    tokenizer.add_tokens(AddedToken(token, single_word=True, normalized=False))
    # mean_resizing would draw the new row from the global generator; the hook replaces it anyway.
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_encoder.get_input_embeddings().requires_grad_(False)
    return len(tokenizer) - 1


def _placing(vector: nn.Parameter, token_id: int) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        is_token = (inputs[0] == token_id).unsqueeze(-1)
        return torch.where(is_token, vector.to(output.device, output.dtype), output)

    return hook
