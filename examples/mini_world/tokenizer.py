"""A CLIPTokenizer for the mini world: each word of the world is one token, the rest falls back to bytes.

The real class and format (lower-casing, byte-level BPE, `</w>` word ends), only with a small vocabulary.
"""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from examples.mini_world.nouns import NOUNS, noun_words
from examples.mini_world.places import PLACES
from examples.mini_world.world import (
    CLOSE_TEMPLATES,
    COLORS,
    FAR_TEMPLATES,
    FILLER_WORDS,
    NEUTRAL_TEMPLATES,
    RARE_WORDS,
    TEMPLATES,
)

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_EXTRA_WORDS = """
    an the my this that one two three it its and with without of in on at to from over under behind
    near next by for photo detailed picture image rendering rendition painting drawing depiction illustration
    icon sticker emoji toy cartoon close up far away very small large big little tiny huge zoomed
    cropped bright dark clean dirty cool nice weird good bad old new shiny wet dry cute beautiful
    flat soft round square orange black white brown grey gray gold silver background foreground
    floor street road forest field tree trees leaves autumn sky sun moon star night day sea
    cobblestone dirt carpet table city town village room garden park river lake sand snowy sunny
    rainy shaped cube wearing scarf outfit santa wizard chef police firefighter rainbow seen top
    side view front back left right animal plant food fruit vehicle machine object thing subject
    style class person man woman child pet xxy xyz abc hta shs ktn
    noon meadow wheat sunset among beside morning mist foot waterfall rock clear cherry blossoms flowers
    bench stone staircase wall door marble kitchen counter bookshelf sofa window straw mat metal workbench
    asphalt rain subway station museum hall market stall campfire dusk above studio light dramatic evening
    snapshot tablecloth full
"""


def world_words() -> list[str]:
    """Every word of captions, names and the usual prompt templates; short ones first, each once."""
    sentences = chain(
        (noun_words(noun) for noun in NOUNS),
        COLORS,
        RARE_WORDS,
        FILLER_WORDS,
        (phrase for _, phrases in PLACES.values() for phrase in phrases),
        (template.format(a="a", x="") for template in TEMPLATES + NEUTRAL_TEMPLATES + CLOSE_TEMPLATES + FAR_TEMPLATES),
        [_EXTRA_WORDS],
    )
    words = {word for sentence in sentences for word in sentence.replace("-", " ").split()}
    return sorted(words, key=lambda word: (len(word), word))


def _byte_symbols() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes: printable ones stand for themselves, the rest move up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(moved))]


def _pieces(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """What byte-pair encoding makes of `word` with the merges so far."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        where = pairs.index(best)
        pieces[where : where + 2] = ["".join(best)]
    return pieces


def build_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token. New merges rank last, so they never break an earlier word."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = _pieces(word, ranks)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            ranks.setdefault(pair, len(ranks))
            pieces[:2] = ["".join(pair)]
        if len(_pieces(word, ranks)) != 1:
            raise AssertionError(f"{word!r} does not merge into one token")
    return list(ranks)


def build_tokenizer() -> CLIPTokenizer:
    """The world's tokenizer, as its words are now."""
    merges = build_merges(world_words())
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in merges),
        BOS,
        EOS,
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def open_tokenizer(work: Path) -> CLIPTokenizer:
    """The tokenizer the teacher of this work directory was begun with: new words must not move its ids."""
    directory = work / "tokenizer"
    if not directory.exists():
        build_tokenizer().save_pretrained(directory)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(directory)
    return tokenizer
