"""What `export` writes: LoRA files for other tools, or a model with what was learned folded in.

layout       what                                                          name
kohya        LoRA file that every tool reads, with preview and card         NAME.safetensors
diffusers    LoRA file in diffusers' own layout                             NAME-diffusers.safetensors
pipeline     whole diffusers folder, nothing to attach                      NAME-merged/
checkpoint   whole model in one file, for ComfyUI, A1111 and Forge          NAME-merged.safetensors
onnx         the one-step model for onnxruntime                             NAME-onnx/
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from echodistill_cli.config.schema import Config
from echodistill_cli.data.images import png_bytes
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import SamplingSettings
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import make_folder, write_text
from echodistill_cli.lora.header import RESERVED_NAMES, header, sidecar_paths, write_sidecars
from echodistill_cli.lora.safetensors_io import write_safetensors
from echodistill_cli.lora.tensors import (
    adapter_metadata,
    bundled_tensors,
    diffusers_tensors,
    kohya_tensors,
    token_tensors,
)
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import (
    check_same_pictures,
    fold_lora,
    knows_word,
    place_token,
    save_checkpoint,
    save_pipeline,
)
from echodistill_cli.outputs.artifact import (
    ExportSettings,
    Learned,
    LearnedFile,
    LearnedRun,
    find_learned,
    lora_card,
    lora_weights,
    token_vectors,
)
from echodistill_cli.outputs.card import merged_card, model_card
from echodistill_cli.outputs.hub import check_repository, in_repository, push, run_files
from echodistill_cli.outputs.onnx import check_onnx, save_onnx
from echodistill_cli.outputs.requests import ExportRequest
from echodistill_cli.runs import OnMessage, Run

LORA_LAYOUTS = ("kohya", "diffusers")
MODEL_LAYOUTS = ("pipeline", "checkpoint", "onnx")
_ENDINGS = {
    "kohya": ".safetensors",
    "diffusers": "-diffusers.safetensors",
    "pipeline": "-merged",
    "checkpoint": "-merged.safetensors",
    "onnx": "-onnx",
}
# Their vocabularies take a new word; the other models' are what their readers have built in.
_TAKE_ANY_WORD = {"pipeline", "onnx"}


@dataclass(frozen=True)
class ExportItem:
    """One thing to write: its role, its layout and its file or folder."""

    role: Role
    layout: str
    path: Path


@dataclass(frozen=True)
class ExportResult:
    """What was written (the learned word's file last), the names of what was sent, and where that is now.

    After a dry run these are what would be; `address` is then None.
    """

    files: tuple[Path, ...]
    sent: tuple[str, ...] = ()
    address: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"files": [str(file) for file in self.files], "sent": list(self.sent), "address": self.address}


def export(request: ExportRequest, on_message: OnMessage = lambda _line: None) -> ExportResult:
    """Write what a request asks for, and send it if that is asked too.

    Raises:
        ConfigError: there is no such run, or something is there already. ModelError: a model is missing, or the LoRA
            is not for it. EchoDistillError: something cannot be written, or not be sent.
    """
    learned, targets = plan_export(request)
    token = _token_path(learned, request)
    files = (*(target.path for target in targets), *([token] if token else []))
    own = run_files(learned.run) if request.push_to and isinstance(learned, LearnedRun) else {}
    if request.dry_run:
        names = {f"{path.name}{'' if path.suffix else '/'}" for path in files} if request.push_to else set()
        return ExportResult(files, tuple(sorted({*own, *names})))
    for target in targets:
        make_folder(target.path.parent)
        write = _write_lora if target.layout in LORA_LAYOUTS else _write_model
        write(learned, target, request, on_message)
    if token:
        write_safetensors(token, token_tensors(token.stem, learned.vectors(), learned.family), {"format": "pt"})
    if request.push_to is None:
        return ExportResult(files)
    for path in files:
        beside = [other for other in sidecar_paths(path) if path.suffix == ".safetensors" and other.is_file()]
        for one in (path, *beside):
            own |= in_repository(one)
    on_message(f"Sending {len(own)} files to {request.push_to}")
    return ExportResult(files, tuple(sorted(own)), push(request.push_to, own, private=request.private))


def plan_export(request: ExportRequest) -> tuple[Learned, list[ExportItem]]:
    """What was learned, and what a request would write of it; writes nothing.

    Raises:
        ConfigError: as `export`. ModelError: a LoRA file is damaged.
    """
    learned = find_learned(
        request.source, step=request.step, model=request.model, model_overrides=request.model_overrides
    )
    folder = request.output or learned.folder
    targets = [
        ExportItem(role, layout, folder / _name(learned, role, layout, request))
        for role in request.roles
        for layout in request.layouts
    ]
    if request.bundle_embedding and (learned.token is None or tuple(request.layouts) != ("kohya",)):
        raise ConfigError(
            "--bundle-embedding puts a learned word into a kohya file, and there is none.",
            "Use it for a run with --text token, with --format kohya.",
        )
    if len(request.roles) > 1 and isinstance(learned, LearnedFile) and set(request.layouts) & set(LORA_LAYOUTS):
        raise ConfigError(f"{request.source} is one LoRA, and --role both asks for two.", "Leave --role away.")
    if "onnx" in request.layouts:
        check_onnx("onnx", "onnxscript")
        if "teacher" in request.roles:
            raise ConfigError("--format onnx writes the one-step student only.", "Leave --role away.")
    if request.push_to is not None:
        check_repository(request.push_to)
        if not isinstance(learned, LearnedRun):
            raise ConfigError("--push-to-hub sends a run with its card.", "Name a run folder instead of a file.")
    for target in targets:
        _check_free(target, request)
    token = _token_path(learned, request)
    if token and token.exists() and not request.overwrite:
        raise _taken(token)
    return learned, targets


def _name(learned: Learned, role: Role, layout: str, request: ExportRequest) -> str:
    """The name of one thing to write; no two of a request have the same."""
    # A file's own name tells its role already; only where it is folded into both models must theirs differ.
    told = isinstance(learned, LearnedFile) and len(request.roles) == 1
    stem = learned.name if role == "student" or told else f"{learned.name}-teacher"
    ending = "-kohya.safetensors" if isinstance(learned, LearnedFile) and layout == "kohya" else _ENDINGS[layout]
    return stem + ("-a1111.safetensors" if request.bundle_embedding else ending)


def _check_free(target: ExportItem, request: ExportRequest) -> None:
    if request.overwrite:
        return
    beside = sidecar_paths(target.path) if target.layout == "kohya" and request.metadata else ()
    for path in (target.path, *beside):
        if path.exists():
            raise _taken(path)


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists already.", "Replace it with --overwrite, or name another --output.")


def _token_path(learned: Learned, request: ExportRequest) -> Path | None:
    """Where the learned word's file goes; None if there is none, or the models hold it, or it is there already."""
    if learned.token is None or not set(request.layouts) - _TAKE_ANY_WORD:
        return None
    if isinstance(learned, LearnedFile) and request.output in (None, learned.folder):
        return None
    return (request.output or learned.folder) / f"{learned.token}.safetensors"


def _write_lora(learned: Learned, target: ExportItem, request: ExportRequest, on_message: OnMessage) -> None:
    weights, dtype = learned.weights(target.role), DTYPES[request.dtype]
    extra: dict[str, str] = {}
    if target.layout == "kohya":
        tensors = kohya_tensors(weights, learned.family, dtype)
    else:
        tensors = diffusers_tensors(weights, dtype)
        one_rank_each = len({part.component for part in weights}) == len(weights)
        extra = adapter_metadata(weights) if one_rank_each else {}
    if request.bundle_embedding:
        tensors |= bundled_tensors(str(learned.token), learned.vectors(), learned.family)
        on_message(
            f"{target.path.name} holds the word too: A1111 and SD.Next read that; diffusers refuses the file, ComfyUI "
            "warns and leaves the word out, Forge leaves it out. Give others the two separate files."
        )
    metadata = learned.header(target.role, target.path, tensors, minimal=not request.metadata)
    write_safetensors(target.path, tensors, metadata | extra)
    if target.layout == "kohya" and request.metadata:
        write_sidecars(target.path, metadata)


def _write_model(learned: Learned, target: ExportItem, request: ExportRequest, on_message: OnMessage) -> None:
    if target.layout == "onnx":
        request = dataclasses.replace(request, dtype="fp32")
    pair = merged_pair(learned, target.role, request, new_word=target.layout in _TAKE_ANY_WORD, on_message=on_message)
    dtype = DTYPES[request.dtype]
    on_message(f"Writing {target.path}")
    if target.layout == "onnx":
        save_onnx(pair, target.path, learned.models(target.role).resolution)
    elif target.layout == "pipeline":
        card = _merged_card(learned, target, request) if request.metadata else None
        save_pipeline(pair, target.role, target.path, dtype, card)
    else:
        save_checkpoint(pair, target.role, target.path, dtype, _lora_header(learned, target, request))


def merged_pair(
    learned: Learned, role: Role, request: ExportRequest, *, new_word: bool, on_message: OnMessage
) -> ModelPair:
    """The models of what was learned, with it folded into one role and the text encoders.

    Args:
        new_word: whether the vocabularies may get a new row.

    Raises:
        ModelError: a model is missing, or the LoRA is not for it.
    """
    # Full precision would need twice the memory; the sum is made in float32 either way.
    config = dataclasses.replace(
        learned.models(role), device="cpu", precision=request.dtype, decoder="full", offload=False
    )
    on_message(f"Loading {config.student if role == 'student' else config.teacher}")
    pair = load_pair(config, teacher=role == "teacher")
    if pair.family != learned.family:
        raise ConfigError(f"What was learned is for {learned.family}, and the model is {pair.family}.")
    fold_lora(pair, role, learned.weights(role))
    if learned.token and (new_word or knows_word(pair, learned.token)):
        place_token(pair, learned.token, list(learned.vectors().values()))
    elif learned.token:
        on_message(
            f"{learned.token} is no word of the vocabulary, so it needs {learned.token}.safetensors beside the model."
        )
    return pair


def _merged_card(learned: Learned, target: ExportItem, request: ExportRequest) -> str:
    models = learned.models(target.role)
    model = models.student if target.role == "student" else models.teacher
    return merged_card(target.path.name, target.role, model, _lora_header(learned, target, request))


def _lora_header(learned: Learned, target: ExportItem, request: ExportRequest) -> dict[str, str]:
    if not request.metadata:
        return {}
    # Hashes of them are not a merged model's, and are left out there; so a LoRA that kohya's keys refuse will do.
    tensors = diffusers_tensors(learned.weights(target.role), DTYPES[request.dtype])
    return learned.header(target.role, target.path, tensors, minimal=False)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left: its folder, the student's and the teacher's LoRA, the token's file if there is one."""

    run: Path
    lora: Path
    teacher_lora: Path
    token: Path | None
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def write_results(
    pair: ModelPair, saved: Mapping[str, Any], run: Run, started: float, on_message: OnMessage
) -> TrainResult:
    """Write what a person takes away, and read each file back with diffusers.

    Args:
        pair: as trained. saved: the run's last state, as a checkpoint has it. started: seconds since the epoch.
    """
    config, step = run.config, int(saved["step"])
    finished = time.time()
    preview = run.samples / f"step-{step:06d}.png"
    settings = ExportSettings(started_at=started, finished_at=finished, cover=_cover(preview, config.model.resolution))
    lora = export_lora(config, saved, "student", run.folder / f"{config.name}.safetensors", settings)
    teacher_path = run.folder / "teacher" / f"{config.name}-teacher.safetensors"
    teacher_lora = export_lora(config, saved, "teacher", teacher_path, settings)
    token = export_token(config, saved, run.folder)
    write_text(run.folder / "README.md", model_card(config, saved, lora, f"samples/{preview.name}"))
    on_message("Reading the files back")
    strength = config.adapter.strength
    written: tuple[tuple[Role, Path, float], ...] = (("student", lora, strength), ("teacher", teacher_lora, 1.0))
    for role, file, times in written:
        # One step without guidance for both: more would only magnify rounding.
        sampling = SamplingSettings(role=role, size=config.model.resolution)
        check_same_pictures(pair, role, file, [f"a photo of a {config.subject}"], sampling, times)
    return TrainResult(run.folder, lora, teacher_lora, token, step, finished - started)


def _cover(preview: Path, side: int) -> bytes:
    """The first picture of the last preview, small enough for a header."""
    with Image.open(preview) as sheet:
        return png_bytes(sheet.convert("RGB").crop((0, 0, side, side)).resize((256, 256), Image.Resampling.LANCZOS))


_NOT_IN_NAMES = {*'\\/:*?"<>|', *map(chr, range(32))}  # on any system
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def check_name(config: Config) -> None:
    """See that a run's files can have their names, before it is trained.

    Raises:
        ConfigError: the name, the token or the class name has a character that no file name may have, or is reserved.
    """
    given = {"--name": config.run.name, "--token": config.concept.token, "--class-name": config.concept.class_name}
    for flag, text in given.items():
        if text is not None and (not text.strip(" .") or set(text) & _NOT_IN_NAMES):
            raise ConfigError(
                f"{flag} {text!r} names files, and this is no name that a file may have.",
                "Use letters, digits, - and _.",
            )
    if config.name.lower() in RESERVED_NAMES:
        raise ConfigError(f"A1111 cannot load a LoRA named {config.name!r}.", "Choose another --name.")
    if config.text.form == "token" and config.name == config.concept.token:
        raise ConfigError(
            f"The LoRA and the learned word would both be {config.name}.safetensors.",
            "Choose another --name.",
        )


def export_lora(config: Config, state: Mapping[str, Any], role: Role, path: Path, settings: ExportSettings) -> Path:
    """Write one role's LoRA, with the text side's if that was trained, and its sidecars; returns `path`.

    Args:
        state: `TrainingState.state_dict()` of the run.

    Raises:
        EchoDistillError: a tensor is not finite, or the file cannot be written.
    """
    make_folder(path.parent)
    weights = lora_weights(config, state, role)
    dtype = DTYPES[settings.dtype]
    if settings.layout == "kohya":
        tensors, metadata = kohya_tensors(weights, state["family"], dtype), {}
    else:
        tensors, metadata = diffusers_tensors(weights, dtype), adapter_metadata(weights)
    metadata |= header(lora_card(config, state, role, path, settings), tensors, minimal=not settings.metadata)
    write_safetensors(path, tensors, metadata)
    if settings.layout == "kohya" and settings.metadata:
        write_sidecars(path, metadata)
    return path


def export_token(config: Config, state: Mapping[str, Any], folder: Path) -> Path | None:
    """Write the learned token's file, named after it as most tools want; None if no token was learned."""
    if state["token"] is None:
        return None
    vectors = token_vectors(state)
    path = make_folder(folder) / f"{config.concept.token}.safetensors"
    write_safetensors(path, token_tensors(config.concept.token, vectors, state["family"]), {"format": "pt"})
    return path
