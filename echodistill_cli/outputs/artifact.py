"""Find a trained LoRA, its token and its models in a run folder or in any common LoRA file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from echodistill_cli import __version__
from echodistill_cli.config.build import build_config, config_hash, read_toml
from echodistill_cli.config.distilled import sampling_in_words, settings_in_header, student_sampler
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config, ModelConfig, check_section
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.files import expanded, last_part
from echodistill_cli.lora.header import LoraHeader, cover_of, header
from echodistill_cli.lora.keys import TEXT_ENCODER, TEXT_ENCODER_2
from echodistill_cli.lora.read import LoraFile, read_lora, read_token_file
from echodistill_cli.lora.safetensors_io import body_sha256, read_header
from echodistill_cli.lora.tensors import ADAPTER_METADATA_KEY, LoraWeights
from echodistill_cli.models.sources import is_embedded, vocabulary_of
from echodistill_cli.runs import CONFIG_FILE, Run, check_name, newest_run, open_run

# The family of each architecture that a LoRA file can name.
_FAMILIES: Mapping[str, str] = {name: family.name for family in FAMILIES.values() for name in family.architectures}
_LAST_SECOND = 2.0**37  # the year 6325
_TEXT_ENCODERS = (TEXT_ENCODER, TEXT_ENCODER_2)
# Header fields that are wrong for the same LoRA in another layout or precision.
_TRUE_OF_ONE_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", ADAPTER_METADATA_KEY)


def find(source: Path | None = None, *, step: int | None = None) -> Artifact:
    """Find what was trained by the path of a run folder or LoRA file.

    Args:
        source: run folder or LoRA file; None for the newest run.
        step: step of the run's checkpoint; None for the newest checkpoint.

    Raises:
        ConfigError: there is no such run or file, or a file was combined with a step.
        ModelError: the file is damaged.
    """
    if source is None or source.is_dir():
        return from_run(newest_run() if source is None else open_run(source), step=step)
    if not source.is_file():
        raise ConfigError(f"{source}: no such run folder or LoRA file.")
    if step is not None:
        raise ConfigError(f"{source} is a file, which has no --step.", "Name its run folder.")
    return Artifact(source.stem, source.parent, _run_around(source), read_lora(source))


def from_run(
    run: Run,
    *,
    step: int | None = None,
    state: Mapping[str, Any] | None = None,
    record: TrainingRecord | None = None,
) -> Artifact:
    """Return what a run trained.

    Args:
        run: its folder need not hold a LoRA file yet.
        step: step of the checkpoint; None for the newest checkpoint.
        state: the state of a training run that is in memory, instead of a checkpoint.
        record: times and cover image; None for those in the header of the run's finished LoRA file.

    Raises:
        ConfigError: the run's settings name files outside of its folder.
    """
    check_name(run.config)
    return Artifact(run.config.name, run.folder / "export", run, None, step, state, record)


@dataclass(frozen=True)
class TrainingRecord:
    """When a run was trained, in seconds since the epoch, and a PNG of its last preview."""

    started_at: float | None = None
    finished_at: float | None = None
    cover: bytes | None = None


@dataclass(frozen=True)
class Artifact:
    """A trained LoRA and its token: those of a run, in full precision, or those of a LoRA file.

    Attributes:
        name: stem of the files that are exported from it.
        folder: default folder of exports.
        run: the run, or the run that the LoRA file belongs to; None for a file outside of run folders.
        file: the LoRA file; None if a whole run was named.
        step: as in `from_run`.
        saved: `state` of `from_run`.
        record: as in `from_run`.
    """

    name: str
    folder: Path
    run: Run | None
    file: LoraFile | None
    step: int | None = None
    saved: Mapping[str, Any] | None = None
    record: TrainingRecord | None = None

    @property
    def config(self) -> Config | None:
        """The configuration of the run; None for a LoRA file outside of run folders."""
        return self.run.config if self.run else None

    @property
    def token(self) -> str | None:
        """The token that has a learned vector; None if none was learned."""
        if self._bundled:
            return self._bundled[0]
        return self.config.concept.token if self.config and self.config.text.form == "token" else None

    @property
    def token_file(self) -> Path | None:
        """The file of the learned token in the run folder; None if none was learned."""
        return self.run.folder / f"{self.token}.safetensors" if self.run and self.token and not self._bundled else None

    @property
    def is_finished(self) -> bool:
        """Whether there is a LoRA file of the student."""
        return self.lora_path("student").is_file()

    @cached_property
    def family(self) -> str:
        """The model family, such as "sd" or "sana". Reads the checkpoint of a run.

        Raises:
            ConfigError: the run has no such checkpoint.
            ModelError: neither the keys nor the header of the LoRA file show the family.
        """
        if self.file is None:
            return str(self._trained[1]["family"])
        version = self.file.metadata.get("ss_base_model_version", "")
        family = _FAMILIES.get(self.file.family) or (
            "sdxl" if version.startswith("sdxl") else version.partition("_")[0]
        )
        if family not in _FAMILIES.values():
            raise ModelError(f"{self.file.path}: neither its keys nor its header show whether it is for SD or SDXL.")
        return family

    def load(self) -> Artifact:
        """Read the checkpoint now, so that its errors come before anything is written.

        Raises:
            ConfigError: the run has no such checkpoint.
            EchoDistillError: the checkpoint is damaged.
            ModelError: neither the keys nor the header of the LoRA file show the family.
        """
        _ = self.family
        return self

    def lora_path(self, role: Role) -> Path:
        """Return the path of one role's LoRA file, which need not exist; a LoRA file serves both roles."""
        if self.file is not None:
            return self.file.path
        name = f"{self.name}.safetensors" if role == "student" else f"teacher/{self.name}-teacher.safetensors"
        return self._run.folder / name

    def lora(self, role: Role) -> Path:
        """Return the path of one role's LoRA file.

        Raises:
            ConfigError: the run is not finished.
        """
        path = self.lora_path(role)
        if not path.is_file():
            folder = self._run.folder
            raise ConfigError(
                f"{folder} has no finished LoRA yet.", f"Finish it: echodistill train --resume -o {folder}"
            )
        return path

    def metadata(self, role: Role) -> Mapping[str, str]:
        """Return the header of the LoRA file of one role.

        Raises:
            ConfigError: the run is not finished.
            ModelError: the file is damaged.
        """
        return read_header(self.lora(role))[0] if self.file is None else self.file.metadata

    def weights(self, role: Role) -> list[LoraWeights]:
        """Return the adapters of one role's UNet and of the text encoders; a LoRA file's serve both roles."""
        if self.file is not None:
            return self.file.to_peft()
        config, state = self._trained
        part = FAMILIES[self.family].denoiser
        weights = [LoraWeights(part, state["lora"][role], config.adapter.rank, _written_alpha(config, role))]
        for component in _TEXT_ENCODERS:
            if component in state["lora"]:
                tensors = state["lora"][component]
                weights.append(LoraWeights(component, tensors, config.text.rank, float(config.text.rank)))
        return weights

    def vectors(self) -> dict[str, Tensor]:
        """Return the learned token's vectors, [1, width] each, by text encoder; empty if none was learned."""
        if self.token is None:
            return {}
        if self.file is not None:
            return self.file_vectors()
        vectors = [vector.unsqueeze(0) for vector in self._trained[1]["token"].values()]
        return dict(zip(_TEXT_ENCODERS, vectors, strict=False))

    def file_vectors(self) -> dict[str, Tensor]:
        """Return the vectors of a token in a file: bundled into the LoRA file, or in the run's token file."""
        if self._bundled:
            return self._bundled[1]
        vectors = read_token_file(self.token_file) if self.token_file else []
        return dict(zip(_TEXT_ENCODERS, vectors, strict=False))

    @cached_property
    def _bundled(self) -> tuple[str, dict[str, Tensor]] | None:
        """The token that is bundled into the LoRA file, and its vectors."""
        return self.file.token_vectors() if self.file and self.file.bundled else None

    def header(self, role: Role, path: Path, tensors: Mapping[str, Tensor], *, minimal: bool) -> dict[str, str]:
        """Return the metadata of a new LoRA file.

        Args:
            role: the model whose adapters the file holds.
            path: of the new file.
            tensors: of the new file.
            minimal: whether to keep only the keys without which other tools fail.
        """
        if self.file is not None:
            return _copied_header(self.file, self.family, path, tensors, minimal=minimal)
        return header(self._lora_header(role, path), tensors, minimal=minimal)

    def models(
        self, model: str | None = None, changes: Mapping[str, Any] | None = None, size: int | None = None
    ) -> ModelConfig:
        """Return the models that the LoRA goes with.

        Args:
            model: preset, hub id, folder or file to use instead of the run's own.
            changes: keys of `[model]` to change.
            size: side of the images in pixels; None for the run's.

        Raises:
            ConfigError: a LoRA file outside of run folders needs a model, or a changed value is wrong.
        """
        if model is not None:
            # A single file has no vocabulary, so the run's is used.
            tokenizer = vocabulary_of(self.config.model) if self.config and expanded(model).is_file() else None
            kept = ({"tokenizer": tokenizer} if tokenizer else {}) | self._student_steps()
            return changed_models(build_config(model).model, kept | dict(changes or {}), size)
        if self.config is None:
            raise ConfigError(
                f"{self.lora_path('student')} lies in no run folder.",
                "Name the model it was made for with --model.",
            )
        return changed_models(self.config.model, changes or {}, size)

    def _student_steps(self) -> dict[str, Any]:
        """Return the steps that the student was trained for: as the run says, or the header of the LoRA file."""
        if self.config is None:
            return settings_in_header(self.file.metadata) if self.file else {}
        steps = {key: getattr(self.config.model, key) for key in ("student_timesteps", "student_sampler")}
        return steps if steps["student_timesteps"] else {}

    def teacher_guidance(self, model: str | None = None) -> float:
        """Return the guidance scale of the teacher: the run's, or the one that the preset of `model` has."""
        return (self.config or build_config(model)).train.guidance_scale

    @property
    def _run(self) -> Run:
        assert self.run is not None  # only a LoRA file may have no run, and `file` has all of its content
        return self.run

    @cached_property
    def _trained(self) -> tuple[Config, Mapping[str, Any]]:
        """The configuration and the state of the run."""
        return self._run.config, self._run.load_checkpoint(self.step) if self.saved is None else self.saved

    def _lora_header(self, role: Role, path: Path) -> LoraHeader:
        config, state = self._trained
        record, side = self.record or self._read_record(), config.model.resolution
        toy, lora = is_embedded(config.model.student), config.model.student_lora
        together = "in echodistill only, " if toy else f"together with {last_part(lora)}, " if lora else ""
        usage = {
            "student": f"{together}{sampling_in_words(config.model)}, {side}x{side}",
            "teacher": f"25 steps, guidance {config.train.guidance_scale:g}, {side}x{side}",
        }
        return LoraHeader(
            name=path.stem,
            family=self.family,
            base_model=config.model.student if role == "student" else config.model.teacher,
            token=config.concept.token,
            class_name=config.concept.class_name,
            trigger=config.subject,
            rank=config.adapter.rank,
            alpha=_written_alpha(config, role),
            resolution=side,
            steps=state["step"],
            seed=config.run.seed,
            photos=state["photo_count"],
            role=role,
            prediction_type=state["prediction_types"][role],
            usage=usage[role],
            config_sha256=config_hash(config),
            version=__version__,
            started_at=record.started_at,
            finished_at=record.finished_at,
            cover=record.cover,
            toy=toy,
            timesteps=config.model.student_timesteps,
            sampler=student_sampler(config.model),
            learned=config.text.form == "token",
        )

    def _read_record(self) -> TrainingRecord:
        """Read what the header of the finished LoRA file says of the training."""
        metadata = self.metadata("student") if self.is_finished else {}
        dates = [metadata.get(f"ss_training_{event}_at") for event in ("started", "finished")]
        started, finished = map(_seconds, dates)
        return TrainingRecord(started, finished, cover_of(metadata))


def changed_models(model: ModelConfig, changes: Mapping[str, Any], size: int | None = None) -> ModelConfig:
    """Return a run's models with changes for generating images.

    The tiny decoder, which saves memory in training, is replaced: other tools decode with the full one. A revision
    belongs to one repository, so another teacher has none.

    Raises:
        ConfigError: a changed value is wrong.
    """
    changes = {"decoder": "full"} | dict(changes)
    if changes.get("teacher", model.teacher) != model.teacher:
        changes.setdefault("teacher_revision", None)
    if size is not None:
        changes["resolution"] = size
    model = dataclasses.replace(model, **changes)
    check_section("model", model)
    return model


def _written_alpha(config: Config, role: Role) -> float:
    """Return the LoRA alpha of one role's UNet; the student's includes the strength it is exported with."""
    return config.lora_alpha * (config.adapter.strength if role == "student" else 1.0)


def _seconds(text: str | None) -> float | None:
    """Return a header's training date in seconds since the epoch; None if it is missing or implausible."""
    try:
        seconds = float(text or "nan")
    except ValueError:
        return None
    return seconds if 0 <= seconds < _LAST_SECOND else None


def _copied_header(
    file: LoraFile, family: str, path: Path, tensors: Mapping[str, Tensor], *, minimal: bool
) -> dict[str, str]:
    """Return the header of a LoRA file, corrected for its copy at `path`, with the keys that readers need."""
    ranks = {module.rank for module in file.modules}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"
    metadata = {key: text for key, text in file.metadata.items() if key not in _TRUE_OF_ONE_FILE}
    version = "sdxl_base_v1-0" if family == "sdxl" else {"sd1": "sd_v1"}.get(file.family, "sd_v2")
    version = metadata.get("ss_base_model_version", version)
    required = {
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": metadata.get("ss_network_module", "networks.lora"),
        "ss_network_args": metadata.get("ss_network_args", "{}"),
        "ss_network_dim": rank,
        "ss_network_alpha": str(float(rank)) if len(ranks) == 1 else rank,  # the written tensors include alpha
    }
    if FAMILIES[family].is_flow:  # unknown to kohya's tools and A1111
        required = {key: metadata[key] for key in required if key in metadata}
    if minimal:
        return required
    digest = body_sha256(tensors)
    hashes = {"ss_output_name": path.stem, "sshs_model_hash": digest}
    if "modelspec.sai_model_spec" in metadata:
        hashes["modelspec.hash_sha256"] = f"0x{digest}"
    return metadata | required | hashes


def _run_around(file: Path) -> Run | None:
    """Return the run in whose folder, or in a folder of which, a LoRA file lies.

    Other programs have a config.toml, too. That of a run names a subject and a model.
    """
    for folder in file.resolve().parents[:2]:
        with contextlib.suppress(ConfigError):
            if (folder / CONFIG_FILE).is_file() and {"concept", "model"} <= read_toml(folder / CONFIG_FILE).keys():
                return open_run(folder)
    return None
