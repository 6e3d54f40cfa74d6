"""Encode prompts as conditioning; check the subject's token or learn it as one vector.

What is specific to CLIP's text encoders and tokenizers is handled in this module only. Language models are in the
modules of their families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli.diffusion.schedule import send
from echodistill_cli.errors import ConfigError, ModelError

# Single tokens of CLIP's vocabulary with almost no meaning of their own.
RARE_WORDS = ("sks", "ohwx", "olis", "bnha", "hta", "phol", "ucd", "pll")
# A byte-pair vocabulary lists its tokens from frequent to rare. Common nouns ("dog" 1,929, "backpack" 14,894) have
# ids below this fraction of CLIP's 49,408; the rare tokens in use ("shs" 16,184) have ids above it.
_COMMON_FRACTION = 0.31
_MOST_KEPT = 32  # encodings of prompts; of FLUX.2 klein one takes 8 MB in half precision


@dataclass(frozen=True)
class Conditioning:
    """What a UNet or transformer is conditioned on, for B prompts.

    Attributes:
        hidden: [B, L, D], hidden states of the text encoder(s).
        pooled: [B, P], SDXL's pooled embedding; None for SD.
        time_ids: [B, 6], SDXL's (original size, crop corner, target size) in pixels; None for the denoiser's default.
        mask: [B, L], 1 for the states that SANA attends to and 0 for padding; None for all states.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None

    def added(self, time_ids: Sequence[int] | None) -> dict[str, Tensor] | None:
        """Return diffusers' `added_cond_kwargs`; None for SD.

        Args:
            time_ids: the denoiser's default six numbers, used if `self.time_ids` is None.
        """
        if self.pooled is None or time_ids is None:
            return None
        default = torch.tensor([time_ids] * len(self.pooled)) if self.time_ids is None else self.time_ids
        return {"text_embeds": self.pooled, "time_ids": send(default, self.pooled.device)}

    def detach(self) -> Conditioning:
        """Return the same values, detached from the autograd graph."""
        return self._each(Tensor.detach)

    def expand(self, batch: int) -> Conditioning:
        """Repeat a conditioning of batch 1 for `batch` samples."""
        return self._each(lambda value: value.expand(batch, *value.shape[1:]))

    def take(self, rows: Sequence[int]) -> Conditioning:
        """Select prompts by index, in the order of `rows`."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return self._each(lambda value: value[send(index, value.device)])

    def first(self, count: int) -> Conditioning:
        """Return the first `count` prompts."""
        return self._each(lambda value: value[:count])

    def join(self, other: Conditioning) -> Conditioning:
        """Concatenate two batches, this one first."""
        return Conditioning.joined([self, other])

    @staticmethod
    def joined(batches: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches."""
        columns = zip(*(batch._values() for batch in batches), strict=True)
        present = [[value for value in column if value is not None] for column in columns]
        hidden, *others = (torch.cat(column) if len(column) == len(batches) else None for column in present)
        assert hidden is not None
        return Conditioning(hidden, *others)

    def _values(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return (self.hidden, self.pooled, self.time_ids, self.mask)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        hidden, *others = self._values()
        return Conditioning(function(hidden), *(None if value is None else function(value) for value in others))


class PromptEncoder:
    """The tokenizers and text encoders of one model family, shared by teacher and student.

    Args:
        tokenizers: one for SD, two for SDXL in the order of its pipeline.
        encoders: one text encoder per tokenizer.
        zero_null: encode the empty prompt as zeros, as SDXL does (`force_zeros_for_empty_prompt`).

    Attributes:
        keep_null: the text encoders do not change from now on, so the empty prompt need not be encoded again.
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
        self.keep_null = False
        self._null: Conditioning | None = None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            _pool_at_end_of_text(encoder, tokenizer)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts with the encoders' current weights, differentiably."""
        device = next(self.encoders[0].parameters()).device
        ids = [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        ids = [send(rows, device) for rows in ids]
        if len(self.encoders) == 1:
            return Conditioning(self.encoders[0](ids[0]).last_hidden_state)
        return self._encode_pair(prompts, ids)

    def cut_off(self, prompt: str) -> str:
        """Return the part of a prompt beyond the token limit, which `encode` does not read; "" if none.

        Of two tokenizers, the one that reads less decides.

        Args:
            prompt: one prompt.
        """
        return max((unread(tokenizer, prompt) for tokenizer in self.tokenizers), key=len)

    def encode_null(self) -> Conditioning:
        """Encode the empty prompt, batch 1. It is cached only where training does not change it."""
        if self._null is not None:
            return self._null
        null = self._encode_empty()
        if self._null_stays:
            self._null = null.detach()
        return null

    def _encode_empty(self) -> Conditioning:
        return self.encode([""])

    @property
    def _null_stays(self) -> bool:
        return self.keep_null or (self.zero_null and len(self.encoders) == 2)

    @torch.no_grad()
    def encode_with_null(self, prompts: Sequence[str]) -> tuple[Conditioning, Conditioning]:
        """Encode B prompts and the empty prompt in one pass, without gradient; return both."""
        if self._null_stays:
            return self.encode(prompts), self.encode_null()
        both = self.encode([*prompts, ""])
        return both.first(len(prompts)), both.take([len(prompts)])

    def _encode_pair(self, prompts: Sequence[str], ids: Sequence[Tensor]) -> Conditioning:
        """Encode for SDXL: concatenated penultimate hidden states, pooled projection of the second encoder."""
        outputs = [encoder(x, output_hidden_states=True) for encoder, x in zip(self.encoders, ids, strict=True)]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = outputs[1].text_embeds
        if self.zero_null:
            keep = send(torch.tensor([prompt != "" for prompt in prompts]), hidden.device)
            hidden, pooled = hidden * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)
        return Conditioning(hidden, pooled)


class LanguagePrompts(PromptEncoder):
    """A frozen language model as text encoder. The encodings of the last prompts are kept.

    Runs repeat few prompts, and such a model may compute more per prompt than the transformer per image. Each prompt is
    encoded by itself: an encoding must not depend on the others in its batch, because after a resume none is kept.

    Args:
        tokenizer: of the model.
        encoder: the model, which no LoRA changes.
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        super().__init__([tokenizer], [encoder])
        self.keep_null = True
        self._kept: dict[str, Conditioning] = {}

    @property
    def room(self) -> int:
        """Most tokens of a prompt that the model reads."""
        raise NotImplementedError

    @property
    def token_count(self) -> int:
        """`room`, and the special tokens that the tokenizer adds."""
        return self.room + int(self.tokenizers[0].num_special_tokens_to_add())

    def cut_off(self, prompt: str) -> str:
        """Return the part of a prompt that `encode` does not read; "" if none."""
        return unread(self.tokenizers[0], prompt, self.room)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts, without gradient."""
        return Conditioning.joined([self._encode_kept(prompt) for prompt in prompts])

    def _encode_kept(self, prompt: str) -> Conditioning:
        if prompt not in self._kept:
            with torch.no_grad():
                self._kept[prompt] = self._encode_one(prompt)
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return self._kept[prompt]

    def _encode_one(self, prompt: str) -> Conditioning:
        raise NotImplementedError

    def _tokens(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask of a text, padded or cut to a length, [1, length] each."""
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizers[0]([text], **options)
        device = next(self.encoders[0].parameters()).device
        return send(tokens.input_ids, device), send(tokens.attention_mask, device)


def unread(tokenizer: Any, prompt: str, limit: int | None = None) -> str:
    """Return the part of a prompt after as many tokens as a text encoder reads.

    Args:
        tokenizer: of the text encoder.
        prompt: one prompt.
        limit: how many tokens; None for CLIP's.
    """
    offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    first = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add() if limit is None else limit
    return prompt[offsets[first][0] :].strip() if len(offsets) > first else ""


def _pool_at_end_of_text(encoder: Any, tokenizer: Any) -> None:
    """Make the encoder pool at the tokenizer's end token.

    CLIP's published text configurations say `eos_token_id: 2`, with which transformers pools at the largest token id.
    That is wrong once a token is added after the end token (transformers#24650).
    """
    inner = getattr(encoder, "text_model", encoder)
    if not hasattr(inner, "eos_token_id"):  # a language model, which does not pool
        return
    encoder.config.eos_token_id = tokenizer.eos_token_id
    inner.eos_token_id = tokenizer.eos_token_id


def check_token(tokenizer: Any | None, token: str, class_name: str | None, *, learned: bool) -> None:
    """Check that a token can name the subject with this tokenizer.

    Args:
        tokenizer: one of the student's; None if its vocabulary is unknown, or if a word may be several tokens.
        token: the word that stands for the subject.
        class_name: the subject's class; None if unknown.
        learned: the token gets a vector of its own, so it need not be in the vocabulary.

    Raises:
        ConfigError: the token has characters that file names cannot have.
        ConfigError: the token is a word of the class name, or a common word.
        ConfigError: the token is several tokens for this tokenizer and not learned.
    """
    others = () if tokenizer is None else RARE_WORDS
    rare = next((word for word in others if word != token and _single_id(tokenizer, word) is not None), None)
    remedy = f"Use a rare single token such as {rare!r}." if rare else "Use a rare single token."
    if not re.fullmatch(r"[A-Za-z0-9_-]+", token):
        raise ConfigError(f"--token {token!r} may have only letters, digits, - and _ (it also names files).", remedy)
    if class_name and token.lower() in class_name.lower().split():
        raise ConfigError(f"--token {token!r} is part of the class name.", remedy)
    if tokenizer is None:
        return
    token_id = _single_id(tokenizer, token)
    if token_id is None and not learned:
        pieces = len(tokenizer(token, add_special_tokens=False).input_ids)
        raise ConfigError(
            f"--token {token!r} is {pieces} tokens for this model.",
            f"{remedy} Or learn the token's vector with --text token.",
        )
    if token_id is not None and token_id < _COMMON_FRACTION * tokenizer.vocab_size:
        raise ConfigError(f"--token {token!r} is a common word that already has a meaning for the model.", remedy)


def _single_id(tokenizer: Any, word: str) -> int | None:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


class LearnedToken(nn.Module):
    """One trained vector per text encoder, which a hook on the token embedding returns for the token.

    The embedding matrices stay frozen, so neither gradients nor weight decay change any other token.

    Args:
        encoder: the token is added to its tokenizers where they lack it.
        token: the word that stands for the subject.
        initializer: a known word; the mean of its tokens' vectors is the initial value.
    """

    def __init__(self, encoder: PromptEncoder, token: str, initializer: str) -> None:
        super().__init__()
        self.token = token
        self.vectors = nn.ParameterList()
        for tokenizer, text_encoder in zip(encoder.tokenizers, encoder.encoders, strict=True):
            embedding: nn.Embedding = text_encoder.get_input_embeddings()
            initial = embedding.weight[tokenizer(initializer, add_special_tokens=False).input_ids].mean(dim=0)
            vector = nn.Parameter(initial.detach().float().clone())
            self.vectors.append(vector)
            token_id = _ensure_token(tokenizer, text_encoder, token)
            text_encoder.get_input_embeddings().register_forward_hook(_embedding_hook(vector, token_id))

    @torch.no_grad()
    def set_vectors(self, vectors: Sequence[Tensor]) -> None:
        """Load vectors that were learned in another run.

        Args:
            vectors: one [1, width] per text encoder.

        Raises:
            ModelError: the number of vectors or their shapes do not fit the text encoders.
        """
        widths, shapes = [len(parameter) for parameter in self.vectors], [tuple(vector.shape) for vector in vectors]
        if shapes != [(1, width) for width in widths]:
            raise ModelError(
                f"The token {self.token!r} has vectors of shape {shapes}; this model needs one of width {widths}.",
                "Use the model that the token was learned for.",
            )
        for parameter, vector in zip(self.vectors, vectors, strict=True):
            parameter.copy_(vector[0])


def _ensure_token(tokenizer: Any, text_encoder: Any, token: str) -> int:
    """Return the token's id; add the token to tokenizer and embedding if it is not a single token yet."""
    token_id = _single_id(tokenizer, token)
    if token_id is not None:
        return token_id
    from transformers import AddedToken

    # CLIP's tokenizers lower-case a prompt. A normalized token is found in any case then, as known words are.
    tokenizer.add_tokens(AddedToken(token, single_word=True, normalized=True))
    # mean_resizing would consume the global generator for the new row, which the hook replaces anyway.
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_encoder.get_input_embeddings().requires_grad_(False)
    return len(tokenizer) - 1


def _embedding_hook(vector: nn.Parameter, token_id: int) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        is_token = (inputs[0] == token_id).unsqueeze(-1)
        return torch.where(is_token, vector.to(output.device, output.dtype), output)

    return hook


def insert_token(encoder: PromptEncoder, token: str, vectors: Sequence[Tensor]) -> None:
    """Write a learned token's vectors into the embeddings: to the token's row, or to a new row.

    Args:
        encoder: its tokenizers get a new token if they need one.
        token: the word.
        vectors: [1, width], one per text encoder.

    Raises:
        ModelError: the vectors do not fit the text encoders.
    """
    # Adds a row for a new token.
    LearnedToken(encoder, token, "a").set_vectors(vectors)
    for tokenizer, model, vector in zip(encoder.tokenizers, encoder.encoders, vectors, strict=True):
        (row,) = tokenizer(token, add_special_tokens=False).input_ids
        embedding = model.get_input_embeddings()
        embedding.weight[row] = vector[0].to(embedding.weight)


def has_token(encoder: PromptEncoder, token: str) -> bool:
    """Return whether every tokenizer encodes the word as one token."""
    return all(len(tokenizer(token, add_special_tokens=False).input_ids) == 1 for tokenizer in encoder.tokenizers)
