"""What was learned, wherever it lies: in a run's checkpoint, or in a LoRA file of any common format.

Both give the same things to those who write them out again: adapters, a learned word, a header, and the models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from echodistill_cli import __version__
from echodistill_cli.config.build import build_config, config_hash
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config, ModelConfig, TrainConfig, check_section
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.lora.header import LoraHeader, cover_of, header
from echodistill_cli.lora.keys import TEXT_ENCODER, TEXT_ENCODER_2
from echodistill_cli.lora.read import read_lora
from echodistill_cli.lora.safetensors_io import body_sha256, read_header
from echodistill_cli.lora.tensors import ADAPTER_METADATA_KEY, LoraWeights
from echodistill_cli.outputs.apply import read_token_file
from echodistill_cli.outputs.onnx import read_settings
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.runs import CONFIG_FILE, Run, newest_run, open_run


@dataclass(frozen=True)
class ExportSettings:
    """How LoRA files are written.

    Args:
        layout: "kohya", which every tool reads, or "diffusers". dtype: fp16, bf16 or fp32.
        metadata: False writes only the keys without which other tools fail.
        started_at, finished_at: seconds since the epoch, for the header; None leaves them out.
        cover: a PNG for the header.
    """

    layout: str = "kohya"
    dtype: str = "fp16"
    metadata: bool = True
    started_at: float | None = None
    finished_at: float | None = None
    cover: bytes | None = None


def token_vectors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The learned word's vectors [1, width] by text encoder; empty if none was learned."""
    vectors = () if state["token"] is None else state["token"].values()
    return {
        name: vector.unsqueeze(0) for name, vector in zip(("text_encoder", "text_encoder_2"), vectors, strict=False)
    }


def lora_weights(config: Config, state: Mapping[str, Any], role: Role) -> list[LoraWeights]:
    """The trained adapters of one role: its UNet's, and those of the shared text encoders."""
    weights = [LoraWeights("unet", state["lora"][role], config.adapter.rank, written_alpha(config, role))]
    for component in ("text_encoder", "text_encoder_2"):
        if component in state["lora"]:
            tensors = state["lora"][component]
            weights.append(LoraWeights(component, tensors, config.text.rank, float(config.text.rank)))
    return weights


def written_alpha(config: Config, role: Role) -> float:
    """LoRA alpha of one role's UNet as its file has it: the student's says how strongly it is to draw."""
    return config.lora_alpha * (config.adapter.strength if role == "student" else 1.0)


def lora_card(config: Config, state: Mapping[str, Any], role: Role, path: Path, settings: ExportSettings) -> LoraHeader:
    """What the header of one role's LoRA file at `path` says."""
    side = config.model.resolution
    made_by = config.model.student_lora
    beside = f"together with {Path(made_by).name}, " if made_by else ""
    usage = {
        "student": f"{beside}1 step, guidance 0 (CFG 1), trailing timesteps, {side}x{side}",
        "teacher": f"25 steps, guidance {config.train.guidance_scale:g}, {side}x{side}",
    }
    return LoraHeader(
        name=path.stem,
        family=state["family"],
        base_model=config.model.student if role == "student" else config.model.teacher,
        token=config.concept.token,
        class_name=config.concept.class_name,
        trigger=config.subject,
        rank=config.adapter.rank,
        alpha=written_alpha(config, role),
        resolution=side,
        steps=state["step"],
        seed=config.run.seed,
        photos=state["photo_count"],
        role=role,
        prediction_type=state["prediction_types"][role],
        usage=usage[role],
        config_sha256=config_hash(config),
        version=__version__,
        started_at=settings.started_at,
        finished_at=settings.finished_at,
        cover=settings.cover,
    )


@dataclass(frozen=True)
class FoundLora:
    """A LoRA file with the models it goes with, the token file that it needs, if any, and the teacher's guidance."""

    lora: Path
    model: ModelConfig
    token_file: Path | None
    teacher_guidance: float = TrainConfig.guidance_scale


def find_lora(request: SampleRequest) -> FoundLora:
    """The LoRA that a request means: of a run (the newest by default), or a file, in a run folder or anywhere.

    Raises:
        ConfigError: there is none, or its models are not known.
    """
    if request.backend == "onnx":
        return _find_graphs(request)
    if request.lora is None or request.lora.is_dir():
        run = newest_run() if request.lora is None else open_run(request.lora)
        return _of_run(run, _lora_path(run, request.role), request)
    for folder in request.lora.resolve().parents[:2]:
        if (folder / CONFIG_FILE).is_file():
            return _of_run(open_run(folder), request.lora, request)
    if not request.lora.is_file():
        raise ConfigError(f"{request.lora}: no such LoRA file or run folder.")
    if request.model is None:
        raise ConfigError(f"{request.lora} lies in no run folder.", "Name the model it was made for with --model.")
    guidance = build_config(request.model).train.guidance_scale
    return FoundLora(request.lora, models_for(request, ModelConfig()), None, guidance)


def _find_graphs(request: SampleRequest) -> FoundLora:
    """The ONNX folder that a request means: the one it names as its model, or that of a run."""
    if request.role == "teacher" or request.compare or request.lora_scale != 1:
        raise ConfigError(
            "--backend onnx draws with the student as trained: without --role teacher, --compare and --lora-scale."
        )
    if request.model is not None:
        folder = Path(request.model)
        model = dataclasses.replace(ModelConfig(), student=request.model)
    else:
        run = newest_run() if request.lora is None else open_run(request.lora)
        folder, model = run.folder / "export" / f"{run.config.name}-onnx", run.config.model
    size = int(read_settings(folder)["size"])
    if request.size not in (None, size):
        raise ConfigError(f"{folder} draws pictures of {size} pixels, not {request.size}.", "Leave --size away.")
    return FoundLora(folder, dataclasses.replace(model, resolution=size), None)


def models_for(request: SampleRequest, model: ModelConfig) -> ModelConfig:
    """The models of a run, or those asked for, with what the request changes of them.

    A run may have been trained with the tiny decoder, to save memory; pictures are drawn with the one that other tools
    use. A revision is of one repository: another teacher has none.

    Raises:
        ConfigError: a changed value is wrong.
    """
    if request.model is not None:
        model = build_config(request.model).model
    changes = {"decoder": "full"} | dict(request.model_overrides)
    if changes.get("teacher", model.teacher) != model.teacher:
        changes.setdefault("teacher_revision", None)
    model = dataclasses.replace(model, **changes)
    if request.size is not None:
        model = dataclasses.replace(model, resolution=request.size)
    check_section("model", model)
    return model


def _lora_path(run: Run, role: Role) -> Path:
    name = run.config.name
    path = run.folder / (f"{name}.safetensors" if role == "student" else f"teacher/{name}-teacher.safetensors")
    if not path.is_file():
        raise ConfigError(
            f"{run.folder} has no finished LoRA yet.", f"Finish it: echodistill train --resume -o {run.folder}"
        )
    return path


def _of_run(run: Run, lora: Path, request: SampleRequest) -> FoundLora:
    config = run.config
    token_file = run.folder / f"{config.concept.token}.safetensors" if config.text.form == "token" else None
    return FoundLora(lora, models_for(request, config.model), token_file, config.train.guidance_scale)


_FAMILIES: Mapping[str, str] = {name: family.name for family in FAMILIES.values() for name in family.architectures}
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
