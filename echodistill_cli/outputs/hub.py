"""Send a finished run to the Hugging Face hub: its card, LoRA, previews and settings in one commit.

A dry run lists what would be sent, file by file. Photos, captions and paths of this machine are never sent.
"""

from __future__ import annotations

import dataclasses
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
from echodistill_cli.runs import CONFIG_FILE, Run

_IMAGE_LINK = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
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
    images = [folder / link for link in _IMAGE_LINK.findall(card.read_text(encoding="utf-8"))]
    token = [artifact.token_file] if artifact.token_file else []
    files = [card, lora, *sidecar_paths(lora), *token, artifact.lora_path("teacher"), *images, run.metrics_file]
    content: dict[str, Content] = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return content | {CONFIG_FILE: public_settings(run.config).encode()}


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
    """Return an exported file with its sidecars, or every file of an exported folder, by name in the repository."""
    if path.is_dir():
        return {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in path.rglob("*") if file.is_file()}
    sidecars = sidecar_paths(path) if path.suffix == ".safetensors" else ()
    return {file.name: file for file in (path, *sidecars) if file.is_file()}


def check_repository(repository: str) -> None:
    """Check the form of a repository's id.

    Raises:
        ConfigError: it is not OWNER/NAME.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(
            f"--push-to-hub {repository!r} is not of the form OWNER/NAME.", "Example: --push-to-hub me/sks-dog"
        )


def push(repository: str, files: Mapping[str, Content], *, private: bool | None = None) -> str:
    """Create the repository if it does not exist, and send all files in one commit. Returns its address.

    Args:
        repository: OWNER/NAME.
        files: content by name in the repository.
        private: whether a new repository is private; None for the account's default.

    Raises:
        EchoDistillError: the hub cannot be reached, or refuses.
    """
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise EchoDistillError(
            f"{repository} was not sent: this machine is set to offline.", "Omit --offline and unset HF_HUB_OFFLINE."
        )
    api = HfApi(library_name="echodistill", library_version=__version__)
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"Upload with echodistill {__version__}")
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EchoDistillError(f"{repository} was not sent ({reason}).", "Log in with: hf auth login") from error
    return str(address)


def _public(value: Any) -> Any:
    """Return a setting with each path replaced by its last part."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value
