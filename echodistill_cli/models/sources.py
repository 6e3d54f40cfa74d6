"""Find the files of a hub id, folder, single file or embedded model, or explain what is missing.

Only safetensors files are read, and no remote code is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import PRESETS
from echodistill_cli.config.families import first_line, read_json, reading
from echodistill_cli.config.schema import ModelConfig, nearest
from echodistill_cli.errors import ModelError
from echodistill_cli.files import expanded
from echodistill_cli.lora.frame import check_frame

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")


class UnreachableError(ModelError):
    """A model is not on this machine, and there is no network to download it over."""


def resolve(
    source: str,
    parts: Sequence[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> Path:
    """Return the local folder with parts of a model, or a single file's path; downloads if necessary.

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
    with reading(source, "Check the path and its permissions."):
        path = embedded_folder(source) if is_embedded(source) else expanded(source)
        if path.is_file():
            return _checked_file(path)
        source, revision = _split_revision(source, revision)
        folder = path if path.is_dir() else _from_hub(source, parts, variant, revision, offline)
        for part in parts:
            if missing := _missing_from(folder / part):
                place = f"{source}/{part}" if part else source
                if path.is_dir():
                    raise ModelError(f"{place}: {missing}.", "Point to a complete folder.")
                kind = UnreachableError if is_offline(offline) else ModelError
                raise kind(f"{place}: {missing}.", _fetch_command(source, parts, revision))
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
    """Return where a model is: "in the package", "on this disk", "in the cache" or "to be downloaded"."""
    if is_embedded(source):
        return "in the package"
    if expanded(source).exists():
        return "on this disk"
    return "in the cache" if is_cached(source) else "to be downloaded"


def vocabulary_of(model: ModelConfig) -> str | None:
    """Return the folder with a student's vocabulary, as settings or a folder say; None otherwise."""
    folder = expanded(model.student)
    is_there = holds_vocabulary(folder) or holds_vocabulary(folder / "tokenizer")
    return model.tokenizer or (model.student if folder.is_dir() and is_there else None)


def weight_variant(folder: Path, variant: str | None) -> str | None:
    """Return `variant` if this part's folder has weights of that variant, else None for its plain files."""
    names = [path.name for path in folder.glob("*.safetensors") if path.name.startswith(WEIGHT_NAMES)]
    return variant if any(is_variant(name, variant) for name in names) else None


def is_variant(name: str, variant: str | None) -> bool:
    """Return whether a file is of a variant; shards are `x.fp16-1.safetensors` or `x-1.fp16.…`."""
    return bool(variant) and (f".{variant}." in name or f".{variant}-" in name)


def _checked_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ModelError(f"{path.name}: only .safetensors files are read, never pickles.", "Convert it first.")
    check_frame(path)
    return path


def _missing_from(folder: Path) -> str | None:
    """Describe what a part's folder lacks; None if it is complete."""
    if not folder.is_dir():
        return "this part is missing"
    if folder.name.startswith("scheduler"):
        return None if (folder / "scheduler_config.json").is_file() else "scheduler_config.json is missing"
    if folder.name.startswith("tokenizer"):
        return None if holds_vocabulary(folder) else "vocab.json and merges.txt, or tokenizer.json, are missing"
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    weights = list(folder.glob("*.safetensors"))
    # In the hub's cache, files are links to blobs, which a person may have deleted.
    if broken := next((path.name for path in weights if not path.exists()), None):
        return f"{broken} is a link to a file that does not exist"
    if not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
        return "it has only pickled weights, which are never loaded" if pickled else "the .safetensors file is missing"
    return _missing_shard(folder)


def _missing_shard(folder: Path) -> str | None:
    """Describe the shards that an interrupted download lacks; None if it lacks none."""
    for index in folder.glob("*.safetensors.index*.json"):
        with reading(index):
            shards = {str(name) for name in read_json(index)["weight_map"].values()}
        present = [name for name in shards if (folder / name).is_file()]
        if present and len(present) < len(shards):
            return f"{len(shards) - len(present)} of its {len(shards)} weight files are missing"
    return None


def _from_hub(source: str, parts: Sequence[str], variant: str | None, revision: str | None, offline: bool) -> Path:
    """Return the snapshot folder: from the cache, without a request, if complete there; else downloaded."""
    _check_id(source)
    cached = _cached(source, revision)
    if cached is not None and not any(_missing_from(cached / part) for part in parts):
        return cached
    if not is_offline(offline):
        return _download(source, parts, variant, revision)
    if cached is None:
        command = _fetch_command(source, parts, revision)
        raise UnreachableError(f"{source} is not in the cache, and this is offline.", command)
    return cached


def is_offline(offline: bool) -> bool:
    """Return whether the network may not be used, by this setting or by that of the hub's library."""
    from huggingface_hub import constants

    return offline or bool(constants.HF_HUB_OFFLINE)


def _check_id(source: str) -> None:
    """Check that a name has the form of a hub id.

    Raises:
        ModelError: it does not.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) or source.endswith(".safetensors"):
        raise _neither(source)


def _neither(source: str) -> ModelError:
    is_name = "/" not in source and not source.endswith(".safetensors")
    near = nearest(source.lower(), list(PRESETS)) if is_name else None
    return ModelError(
        f"{source}: no such folder or file, and not a hub id of the form owner/name.",
        f"Did you mean {near!r}?" if near else "Check the spelling.",
    )


def _cached(source: str, revision: str | None) -> Path | None:
    """Return a snapshot folder of the cache, complete or not; `_missing_from` tells what it lacks."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # Without a pattern, the library takes a snapshot of some parts of a model for incomplete. This matches nothing.
        return Path(snapshot_download(source, revision=revision, local_files_only=True, allow_patterns=["/"]))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    except HFValidationError as error:  # the hub has more rules than the form, such as no -- in a name
        raise _neither(source) from error


def _download(source: str, parts: Sequence[str], variant: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # Without retries, so that a missing network or a refused token is reported at once.
    files = [*wanted_files(hub_listing(source, parts, revision), parts, variant), "model_index.json"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=files))
    except Exception as error:
        raise hub_error(source, error, _fetch_command(source, parts, revision), revision) from error


def download_files(source: str, revision: str, files: Sequence[str], *, offline: bool) -> Path:
    """Return the snapshot folder of a hub model after downloading some files of it.

    Raises:
        ModelError: this run is offline, the hub cannot be reached, or it lacks a file.
    """
    from huggingface_hub import snapshot_download

    remedy = f"Download it on a machine with a network: hf download {source} {' '.join(files)} --revision {revision}"
    if is_offline(offline):
        raise UnreachableError(f"{source}: {files[0]} is not in the cache, and this run is offline.", remedy)
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
    except Exception as error:
        raise hub_error(source, error, remedy, revision) from error
    if all((folder / file).is_file() for file in files):
        return folder
    raise ModelError(f"{source} lacks one of {', '.join(files)}.", "Name the hub id of a complete diffusers model.")


def hub_error(source: str, error: Exception, remedy: str, revision: str | None = None) -> ModelError:
    """Return one line about a failed download: what the hub answered, or why it was not reached.

    Args:
        source: hub id.
        error: from huggingface_hub or a library underneath.
        remedy: what helps on a machine without a network.
        revision: git revision on the hub.
    """
    from httpx2 import InvalidURL
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError):
        return _refused(source, error, revision)
    if isinstance(error, (ImportError, InvalidURL)) or "proxy" in str(error).lower():
        names = [name for name in os.environ if name.lower() in ("all_proxy", "https_proxy", "http_proxy")]
        return ModelError(
            f"{source}: the proxy in {' or '.join(names) or 'the environment'} cannot be used ({first_line(error)}).",
            "Correct the variable or unset it; a SOCKS proxy needs: pip install socksio",
        )
    if isinstance(error, ValueError):
        return ModelError(
            f"{source}: {constants.ENDPOINT} did not answer as a model hub does ({first_line(error)}).",
            "Check HF_ENDPOINT, and whether the network shows a login page.",
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return ModelError(
            f"{source} cannot be saved in the cache: {error.filename} ({error.strerror}).",
            "Set HF_HOME to a folder that is writable and has enough space.",
        )
    if type(error).__module__.startswith(("httpx", "httpcore", "huggingface_hub")) or isinstance(error, OSError):
        problem = f"{source} is not in the cache, and the hub cannot be reached ({type(error).__name__})."
        return UnreachableError(problem, remedy)
    return ModelError(f"{source} cannot be downloaded ({first_line(error)}).", remedy)


def _refused(source: str, error: Any, revision: str | None) -> ModelError:
    """Return one line about an answer of the hub that is an error, with the hub's own sentence."""
    from huggingface_hub import errors

    status, sentence = error.response.status_code, " ".join(str(error.server_message or "").split())[:200]
    answer = f"the hub answered {status}" + (f" ({sentence.rstrip('.')})" if sentence else "")
    if isinstance(error, errors.GatedRepoError) and status == 401:
        return ModelError(
            f"{source}: access must be granted on its hub page.", "Request access there, then run: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{source}: the hub has no revision {revision}.", "Check the revision.")
    if status == 404:
        return ModelError(
            f"{source}: the hub has no such model, or it is private.", "Check the name, or run: hf auth login"
        )
    remedies = {
        401: "The token is not accepted, or the model does not exist. Run hf auth login, or unset HF_TOKEN.",
        403: "Give the token access to this model on the hub, or run: hf auth login",
        429: f"Too many requests: try again {_waiting(error.response.headers)}, or run: hf auth login",
    }
    return ModelError(f"{source}: {answer}.", remedies.get(status, "Try again later."))


def _waiting(headers: Any) -> str:
    seconds = str(headers.get("Retry-After", ""))
    return f"in {seconds} seconds" if seconds.isdigit() else "later"


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
        preferred = [path for path in weights if is_variant(Path(path).name, variant)]
        plain = [path for path in weights if len(Path(path).name.split(".")) == 2 or "index" in path]
        files += preferred or plain or weights
        files += [path for path in inside if path.endswith((".json", ".txt")) and ".safetensors" not in path]
    return files


def missing_parts(source: str, parts: Sequence[str], revision: str | None = None) -> list[str]:
    """Return the parts of a model that are neither on this machine nor in the cache. Opens no connection.

    Args:
        source: hub id, folder, single file or embedded model.
        parts: subfolders such as "unet".
        revision: git revision on the hub.

    Raises:
        ModelError: the source is neither a folder, nor a file, nor a hub id; or one on this machine is incomplete.
    """
    if is_embedded(source) or expanded(source).exists():
        resolve(source, parts)
        return []
    source, revision = _split_revision(source, revision)
    _check_id(source)
    cached = _cached(source, revision)
    return [part for part in parts if cached is None or _missing_from(cached / part)]


def hub_listing(
    source: str, parts: Sequence[str], revision: str | None = None, *, offline: bool = False
) -> dict[str, int | None]:
    """Return the bytes of each file of a hub model, by its path. One request without retries.

    Args:
        source: hub id.
        parts: subfolders that the caller needs, for the error.
        revision: git revision on the hub.
        offline: whether to fail at once.

    Raises:
        UnreachableError: this is offline, or the hub cannot be reached.
        ModelError: the hub refuses the model, or the proxy cannot be used.
    """
    from huggingface_hub import HfApi

    source, revision = _split_revision(source, revision)
    remedy = _fetch_command(source, parts, revision)
    if is_offline(offline):
        raise UnreachableError(f"{source} is not in the cache, and this is offline.", remedy)
    try:
        info = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=10)
    except Exception as error:
        raise hub_error(source, error, remedy, revision) from error
    return {file.rfilename: file.size for file in info.siblings or []}


def _fetch_command(source: str, parts: Sequence[str], revision: str | None) -> str:
    pinned = f" --revision {revision}" if revision else ""
    kinds = ("json", "txt", "safetensors")
    include = "".join(f' --include "{part}/*.{kind}"' for part in parts if part for kind in kinds)
    return f"Download it on a machine with a network: hf download {source}{pinned}{include}"


def holds_vocabulary(folder: Path) -> bool:
    """Return whether a folder has the files of a CLIP tokenizer."""
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return pair or (folder / "tokenizer.json").is_file()


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
