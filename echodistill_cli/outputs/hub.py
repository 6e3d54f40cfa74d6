"""Send a finished run to the Hugging Face hub: its card, LoRA, previews and settings in one commit.

Only files that an export writes, the card, and images in `samples/` are sent; links out of the run are not followed. A
dry run lists what would be sent, file by file. Photos, captions and paths of this machine are never sent.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echodistill_cli import __version__
from echodistill_cli.config.build import config_from_dict, config_to_dict, config_to_toml
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import public_name
from echodistill_cli.lora.header import sidecar_paths
from echodistill_cli.outputs.artifact import from_run
from echodistill_cli.runs import CONFIG_FILE, SAMPLES, Run

_IMAGE_LINK = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
Content = Path | bytes


def run_files(run: Run) -> dict[str, Content]:
    """Return the files of a finished run by name in the repository: paths, or bytes made for it.

    Raises:
        ConfigError: the run is not finished.
    """
    artifact, folder = from_run(run), run.folder
    lora, card = artifact.lora("student"), folder / "README.md"
    if not card.is_file():
        raise ConfigError(f"{card} is missing.", f"Finish the run: echodistill train --resume -o {folder}")
    images = [image for link in _IMAGE_LINK.findall(card.read_text(encoding="utf-8")) if (image := _sample(run, link))]
    token = [artifact.token_file] if artifact.token_file else []
    files = [card, lora, *sidecar_paths(lora), *token, artifact.lora_path("teacher"), *images, run.metrics_file]
    inside = [file for file in files if file.is_file() and file.resolve().is_relative_to(folder.resolve())]
    content: dict[str, Content] = {file.relative_to(folder).as_posix(): file for file in inside}
    return content | {CONFIG_FILE: public_settings(run.config).encode()}


def _sample(run: Run, link: str) -> Path | None:
    """Return the image that a card shows if it is one of the run's samples; None for any other link."""
    name = link.removeprefix(f"{SAMPLES}/")
    is_plain = link.startswith(f"{SAMPLES}/") and name.endswith(".png") and not set(name) & {"/", "\\", "\0"}
    path = run.samples / name
    return path if is_plain and path.resolve().parent == run.samples.resolve() else None


def public_settings(config: Config) -> str:
    """Return a run's settings as TOML, without the places of photos and models on this machine."""
    config = dataclasses.replace(
        config,
        concept=dataclasses.replace(config.concept, photos=""),
        run=dataclasses.replace(config.run, output=None),
    )
    tables = config_to_dict(config)
    public = {section: {key: _public(value) for key, value in table.items()} for section, table in tables.items()}
    return config_to_toml(config_from_dict(public))


def exported_files(path: Path) -> dict[str, Content]:
    """Return an exported file and its sidecars, or all files of an exported folder, by repository name."""
    if path.is_dir():
        return {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in _inside(path)}
    sidecars = sidecar_paths(path) if path.suffix == ".safetensors" else ()
    return {file.name: file for file in (path, *sidecars) if file.is_file()}


def _inside(folder: Path) -> list[Path]:
    """Return the files of a folder, without links that lead out of it."""
    return [f for f in folder.rglob("*") if f.is_file() and f.resolve().is_relative_to(folder.resolve())]


def push(repository: str, files: Mapping[str, Content], *, private: bool | None = None) -> str:
    """Create the repository if it does not exist, and send all files in one commit. Returns its address.

    Args:
        repository: OWNER/NAME.
        files: content by name in the repository.
        private: whether a new repository is private; None for the account's default.

    Raises:
        EchoDistillError: the hub cannot be reached, or refuses.
    """
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise EchoDistillError(
            f"{repository} was not sent: this machine is set to offline.", "Omit --offline and unset HF_HUB_OFFLINE."
        )
    api = HfApi(library_name="echodistill", library_version=__version__)
    try:
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Upload with echodistill {__version__}")
    except (HTTPError, InvalidURL, ImportError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EchoDistillError(f"{repository} was not sent ({reason}).", _remedy(error)) from error
    return str(address)


def _remedy(error: Exception) -> str:
    """Return what to do after a failed push."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 429 or (status is not None and status >= 500):
        return "The hub is busy or out of order: try again later."
    name = type(error).__name__
    if isinstance(error, ImportError) or name == "InvalidURL" or "proxy" in str(error).lower():
        return "Check the proxy settings: HTTPS_PROXY, HTTP_PROXY and ALL_PROXY."
    if status is None and "Token" not in name and name != "LocalProtocolError" and not isinstance(error, ValueError):
        return "Check the network, then run the same command again."
    return "Log in with: hf auth login"


def make_portable(folder: Path) -> None:
    """Remove local paths from a model folder's settings; add the tokenizer files for transformers 4.

    transformers 5 writes a tokenizer as tokenizer.json only, and CLIPTokenizer of transformers 4 reads vocab.json and
    merges.txt only.
    """
    for file in folder.rglob("*config.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        public = {key: value for key, value in settings.items() if not key.endswith("name_or_path")}
        if public != settings:
            file.write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("tokenizer.json"):
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        if model.get("type") != "BPE":
            continue
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        file.with_name("vocab.json").write_text(vocabulary, encoding="utf-8")
        file.with_name("merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")


def _public(value: Any) -> Any:
    """Return a setting with each path replaced by its last part."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value
