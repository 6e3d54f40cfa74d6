"""What was learned, wherever it lies: in a run's checkpoint, or in a LoRA file of any common format.

Both give the same things to those who write them out again: adapters, a learned word, a header, and the models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.keys import TEXT_ENCODER, TEXT_ENCODER_2
from echodistill_cli.lora.read import LoraWeights, header, read_lora
from echodistill_cli.lora.safetensors_io import body_sha256, read_header
from echodistill_cli.lora.sidecars import cover_of
from echodistill_cli.lora.tensors import ADAPTER_METADATA_KEY
from echodistill_cli.models.load import Role
from echodistill_cli.outputs.attach import read_token_file
from echodistill_cli.outputs.lora_export import ExportSettings, lora_card, lora_weights, token_vectors
from echodistill_cli.outputs.sample import SampleRequest, find_lora, models_for
from echodistill_cli.runs import CONFIG_FILE, Run, newest_run, open_run

_FAMILIES = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl"}
# What another layout or precision makes untrue.
_OF_THE_OLD_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", ADAPTER_METADATA_KEY)


class Learned(Protocol):
    """What was learned. `name` is the stem of its files, `family` "sd" or "sdxl", `folder` where exports go."""

    name: str
    family: str
    folder: Path
    token: str | None

    def weights(self, role: Role) -> list[LoraWeights]:
        """The adapters of one role and of the text encoders."""

    def vectors(self) -> dict[str, Tensor]:
        """The learned word's vectors [1, width] by text encoder; empty if none was learned."""

    def header(self, role: Role, path: Path, tensors: Mapping[str, Tensor], *, minimal: bool) -> dict[str, str]:
        """The header of a LoRA file at `path` with these tensors."""

    def models(self, role: Role) -> ModelConfig:
        """The models it was made with, or those asked for."""


def find_learned(
    source: Path | None, *, step: int | None, model: str | None, model_overrides: Mapping[str, Any]
) -> Learned:
    """What a path means: a run folder, a LoRA file, or None for the newest run.

    Args:
        step: of a run's checkpoint; None for the newest. model, model_overrides: as in `SampleRequest`.

    Raises:
        ConfigError: there is no such run or checkpoint. ModelError: the file is damaged, or no plain LoRA.
    """
    wanted = SampleRequest(prompts=(), model=model, model_overrides=model_overrides)
    if source is None or source.is_dir():
        return LearnedRun(newest_run() if source is None else open_run(source), step, wanted)
    if not source.exists():
        raise ConfigError(f"{source}: no such run folder or LoRA file.")
    if step is not None:
        raise ConfigError(f"{source} is a file, which has no --step.", "Name its run folder.")
    return LearnedFile(source, wanted)


class LearnedRun:
    """A run's checkpoint: full precision, whatever its files have."""

    def __init__(self, run: Run, step: int | None, wanted: SampleRequest) -> None:
        self.run, self.wanted = run, wanted
        self.state = run.load_checkpoint(step)
        self.name, self.family = run.config.name, str(self.state["family"])
        self.folder = run.folder / "export"
        self.token = run.config.concept.token if self.state["token"] else None

    def weights(self, role: Role) -> list[LoraWeights]:
        """As `Learned.weights`."""
        return lora_weights(self.run.config, self.state, role)

    def vectors(self) -> dict[str, Tensor]:
        """As `Learned.vectors`."""
        return token_vectors(self.state)

    def header(self, role: Role, path: Path, tensors: Mapping[str, Tensor], *, minimal: bool) -> dict[str, str]:
        """As `Learned.header`; dates and cover are those of the run's own file, if it was finished."""
        file = self.run.folder / f"{self.name}.safetensors"
        said = read_header(file)[0] if file.is_file() else {}
        dates = [said.get(f"ss_training_{what}_at") for what in ("started", "finished")]
        started, finished = (None if date is None else float(date) for date in dates)
        settings = ExportSettings(started_at=started, finished_at=finished, cover=cover_of(said))
        return header(lora_card(self.run.config, self.state, role, path, settings), tensors, minimal=minimal)

    def models(self, role: Role) -> ModelConfig:  # noqa: ARG002 (both roles are in it)
        """As `Learned.models`."""
        request = dataclasses.replace(self.wanted, lora=self.run.folder)
        return models_for(request, self.run.config.model)


class LearnedFile:
    """A LoRA file, ours or anybody's."""

    def __init__(self, path: Path, wanted: SampleRequest) -> None:
        self.file, self.wanted = read_lora(path), dataclasses.replace(wanted, lora=path)
        self.name, self.folder = path.stem, path.parent
        claim = self.file.metadata.get("ss_base_model_version", "")
        family = _FAMILIES.get(self.file.family) or ("sdxl" if claim.startswith("sdxl") else claim.partition("_")[0])
        if family not in _FAMILIES.values():
            raise ModelError(f"{path}: neither its keys nor its header tell whether it is for SD or SDXL.")
        self.family = family
        self._token_file = _token_file_beside(path)
        self.token = self._token_file.stem if self._token_file else None

    def weights(self, role: Role) -> list[LoraWeights]:  # noqa: ARG002 (a file is of one role)
        """As `Learned.weights`."""
        return self.file.to_peft()

    def vectors(self) -> dict[str, Tensor]:
        """As `Learned.vectors`."""
        found = read_token_file(self._token_file) if self._token_file else []
        return dict(zip((TEXT_ENCODER, TEXT_ENCODER_2), found, strict=False))

    def header(
        self,
        role: Role,  # noqa: ARG002
        path: Path,
        tensors: Mapping[str, Tensor],
        *,
        minimal: bool,
    ) -> dict[str, str]:
        """As `Learned.header`: what the file says, made true for the new one, with what readers need added."""
        ranks = {module.rank for module in self.file.modules}
        rank = str(*ranks) if len(ranks) == 1 else "Dynamic"
        version = {"sd1": "sd_v1", "sd2": "sd_v2"}.get(self.file.family, "sd_v2")
        claim = "sdxl_base_v1-0" if self.family == "sdxl" else version
        said = {key: text for key, text in self.file.metadata.items() if key not in _OF_THE_OLD_FILE}
        claim = said.get("ss_base_model_version", claim)
        needed = {
            "ss_v2": str(claim.startswith("sd_v2")),
            "ss_base_model_version": claim,
            "ss_network_module": said.get("ss_network_module", "networks.lora"),
            "ss_network_args": said.get("ss_network_args", "{}"),
            "ss_network_dim": rank,
            "ss_network_alpha": str(float(rank)) if len(ranks) == 1 else rank,  # folded into B, see `lora_formats`
        }
        if minimal:
            return needed
        digest = body_sha256(tensors)
        return said | needed | {"ss_output_name": path.stem, "sshs_model_hash": digest} | _restated(said, digest)

    def models(self, role: Role) -> ModelConfig:
        """As `Learned.models`; of a file in no run folder, they must be named."""
        return find_lora(dataclasses.replace(self.wanted, role=role)).model


def _restated(said: Mapping[str, str], digest: str) -> dict[str, str]:
    if "modelspec.sai_model_spec" not in said:
        return {}
    return {"modelspec.hash_sha256": f"0x{digest}"}


def _token_file_beside(path: Path) -> Path | None:
    """The token file of the run in whose folder a LoRA lies."""
    for folder in path.resolve().parents[:2]:
        if (folder / CONFIG_FILE).is_file():
            config = open_run(folder).config
            file = folder / f"{config.concept.token}.safetensors"
            return file if config.text.form == "token" and file.is_file() else None
    return None
