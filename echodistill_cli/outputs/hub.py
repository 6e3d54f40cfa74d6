"""A finished run on the Hugging Face hub: its card, LoRA, preview and settings in one commit, only when asked.

What is sent is named beforehand, file by file; no photo, no caption and no path is among it.
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
from echodistill_cli.runs import CONFIG_FILE, Run

_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
Content = Path | bytes


def run_files(run: Run) -> dict[str, Content]:
    """A finished run's own files by their name in the repository; paths, or bytes made for it.

    Raises:
        ConfigError: the run is not finished.
    """
    folder, name, token = run.folder, run.config.name, run.config.concept.token
    card, lora = folder / "README.md", folder / f"{name}.safetensors"
    if not (card.is_file() and lora.is_file()):
        raise ConfigError(f"{folder} has no finished LoRA yet.", "Finish it: echodistill train --resume")
    pictures = [folder / link for link in _PICTURE.findall(card.read_text(encoding="utf-8"))]
    word = [folder / f"{token}.safetensors"] if run.config.text.form == "token" else []
    teacher = folder / "teacher" / f"{name}-teacher.safetensors"
    files = [card, lora, *sidecar_paths(lora), *word, teacher, *pictures, run.metrics_file]
    named: dict[str, Content] = {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}
    return named | {CONFIG_FILE: public_settings(run.config).encode()}


def public_settings(config: Config) -> str:
    """A run's settings as TOML without what would tell where on a machine its photos and models lie."""
    config = dataclasses.replace(
        config,
        concept=dataclasses.replace(config.concept, photos=""),
        run=dataclasses.replace(config.run, output=None),
    )
    tables = config_to_dict(config)
    kept = {section: {key: _public(value) for key, value in table.items()} for section, table in tables.items()}
    return config_to_toml(config_from_dict(kept))


def in_repository(path: Path) -> dict[str, Content]:
    """An exported file, or every file of an exported folder, by its name in the repository."""
    if not path.is_dir():
        return {path.name: path}
    return {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in path.rglob("*") if file.is_file()}


def check_repository(repository: str) -> None:
    """See that a repository's id can be one.

    Raises:
        ConfigError: it is not of the form owner/name.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push-to-hub {repository!r}: it takes OWNER/NAME.", "Such as --push-to-hub me/sks-dog.")


def push(repository: str, files: Mapping[str, Content], *, private: bool | None = None) -> str:
    """Make the repository if it is not there, and send all files in one commit; returns its address.

    Args:
        private: of a new repository; None for the account's own default, which is public unless it says otherwise.

    Raises:
        EchoDistillError: the hub cannot be reached, or refuses.
    """
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise EchoDistillError(
            f"{repository} was not sent: this is offline.", "Leave --offline and HF_HUB_OFFLINE away."
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
    """A path as its last part."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value
