"""Export a trained LoRA: as a LoRA file for other tools, or folded into a whole model.

layout       what                                                          name
kohya        LoRA file that every tool reads, with preview and A1111 card   NAME.safetensors
diffusers    LoRA file in diffusers' own layout                             NAME-diffusers.safetensors
pipeline     whole diffusers folder with the LoRA folded in                 NAME-merged/
checkpoint   whole model in one file, for ComfyUI, A1111 and Forge          NAME-merged.safetensors
onnx         one-step model for onnxruntime                                 NAME-onnx/
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from echodistill_cli.config.build import is_file_name
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config
from echodistill_cli.data.grids import tile
from echodistill_cli.data.images import png_bytes
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import SamplingSettings
from echodistill_cli.diffusion.text import has_token, insert_token
from echodistill_cli.errors import ConfigError, ModelError, counted
from echodistill_cli.files import made_folder, make_folder, same_content, scratch, write_text
from echodistill_cli.lora.header import sidecar_paths, write_sidecars
from echodistill_cli.lora.safetensors_io import read_header, write_safetensors
from echodistill_cli.lora.tensors import (
    adapter_metadata,
    bundled_tensors,
    diffusers_tensors,
    kohya_tensors,
    token_tensors,
)
from echodistill_cli.models.device import DTYPES
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import check_same_images, fold_lora, save_checkpoint, save_pipeline
from echodistill_cli.outputs.artifact import Artifact, TrainingRecord, find, from_run
from echodistill_cli.outputs.card import model_card
from echodistill_cli.outputs.hub import exported_files, push, run_files
from echodistill_cli.outputs.merged_card import merged_card
from echodistill_cli.outputs.onnx import check_onnx, save_onnx
from echodistill_cli.outputs.requests import ExportRequest
from echodistill_cli.outputs.workflow import write_workflow
from echodistill_cli.runs import OnMessage, Run

_LORA_LAYOUTS = ("kohya", "diffusers")
_ENDINGS = {
    "kohya": ".safetensors",
    "diffusers": "-diffusers.safetensors",
    "pipeline": "-merged",
    "checkpoint": "-merged.safetensors",
    "onnx": "-onnx",
}
# Layouts that carry their vocabulary, so that a new token becomes a row of it. A checkpoint's vocabulary is built into
# the tools that read it.
# Header fields that tell one training result from another.
_OF_ONE_RESULT = ("config_sha256", "steps", "role")
_WITH_VOCABULARY = {"pipeline", "onnx"}


@dataclass(frozen=True)
class ExportItem:
    """One file or folder to write, with its role and its layout."""

    role: Role
    layout: str
    path: Path


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote and sent. After a dry run: what it would write and send.

    Attributes:
        files: files and folders; the file of the learned token is the last.
        sent: names in the repository.
        address: of the repository; None if nothing was sent.
    """

    files: tuple[Path, ...]
    sent: tuple[str, ...] = ()
    address: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"files": [str(file) for file in self.files], "sent": list(self.sent), "address": self.address}


def export(request: ExportRequest, on_message: OnMessage = lambda _line: None) -> ExportResult:
    """Write what a request asks for, and send it to the hub if the request names a repository.

    Raises:
        ConfigError: there is no such run, or a file to write exists.
        ModelError: a model is missing, or the LoRA does not fit it.
        EchoDistillError: a file cannot be written, or the hub refuses.
    """
    request.check_paths()
    artifact = find(request.source, step=request.step).load()
    items, token_file = _plan(artifact, request)
    files = (*(item.path for item in items), *([token_file] if token_file else []))
    content = run_files(artifact.run) if request.push_to and artifact.run else {}
    if request.dry_run:
        names = {f"{path.name}{'' if path.suffix else '/'}" for path in files} if request.push_to else set()
        return ExportResult(files, tuple(sorted({*content, *names})))
    jobs = [
        (_paths_of(item, request), functools.partial(_write_item, artifact, item, request, on_message))
        for item in items
    ]
    if token_file:
        jobs.append(((token_file,), functools.partial(write_token, artifact)))
    # What exists comes first: if it differs, nothing has been written yet.
    for paths, write in sorted(jobs, key=lambda job: not any(path.exists() for path in job[0])):
        _write_once(paths, write, request, on_message)
    if request.push_to is None:
        return ExportResult(files)
    for path in files:
        content |= exported_files(path)
    on_message(f"Sending {counted(len(content), 'file')} to {request.push_to}")
    return ExportResult(files, tuple(sorted(content)), push(request.push_to, content, private=request.private))


def _write_item(
    artifact: Artifact, item: ExportItem, request: ExportRequest, on_message: OnMessage, path: Path
) -> None:
    """Write one item at a path."""
    if path == item.path:  # and not a copy that is only compared with what exists
        on_message(f"Writing {path}")
    writer = write_lora if item.layout in _LORA_LAYOUTS else _write_model
    with made_folder(path.parent):
        writer(artifact, dataclasses.replace(item, path=path), request, on_message)


def _plan(artifact: Artifact, request: ExportRequest) -> tuple[list[ExportItem], Path | None]:
    """Run all checks that need no model; return what to write and the token file's path. Writes nothing."""
    _check_request(artifact, request)
    folder = request.output or artifact.folder
    items = [
        ExportItem(role, layout, folder / _file_name(artifact, role, layout, request))
        for role in request.roles
        for layout in request.layouts
    ]
    writes_token = _writes_token(artifact, request)
    if writes_token and not is_file_name(str(artifact.token)):  # a stranger's file must not choose the folder
        raise ModelError(f"The LoRA's token {artifact.token!r} cannot be used as a file name.", "Use another LoRA.")
    token_file = folder / f"{artifact.token}.safetensors" if writes_token else None
    return items, token_file


def _write_once(
    paths: Sequence[Path], write: Callable[[Path], None], request: ExportRequest, on_message: OnMessage
) -> None:
    """Write a file or folder with its sidecars, unless the same content is there already.

    Args:
        paths: the path to write, then those of its sidecars.
        write: writes the first path and its sidecars.
        request: its `overwrite` and `push_to` apply.
        on_message: receives that nothing was written.

    Raises:
        ConfigError: there is other content, and the request does not replace it.
    """
    first = paths[0]
    if request.overwrite or not any(path.exists() for path in paths):
        write(first)
        return
    with scratch(first) as folder:
        write(folder / first.name)
        pairs = [(folder / path.name, path) for path in paths if (folder / path.name).exists()]
        for new, old in pairs:
            if old.exists() and not same_content(old, new) and not (request.push_to and _same_lora(old, new)):
                raise ConfigError(f"{old} exists already.", "Replace it with --overwrite, or name another --output.")
        for new, old in pairs:
            if not old.exists():
                shutil.move(new, old)
    on_message(f"{first} exists already and is kept")


def _same_lora(left: Path, right: Path) -> bool:
    """Return whether two LoRA files hold the same training result, be it in another precision."""
    if not (left.is_file() and right.is_file() and left.suffix == right.suffix == ".safetensors"):
        return False
    fields = [{key: read_header(path)[0].get(f"echodistill.{key}") for key in _OF_ONE_RESULT} for path in (left, right)]
    return fields[0] == fields[1] and fields[0]["config_sha256"] is not None


def _check_request(artifact: Artifact, request: ExportRequest) -> None:
    """Check that an artifact can be exported as requested."""
    layouts = set(request.layouts)
    if request.bundle_embedding and (artifact.token is None or layouts != {"kohya"}):
        raise ConfigError(
            "--bundle-embedding needs a learned token and the kohya layout.",
            "Use it for a run with --text token, with --format kohya.",
        )
    family = FAMILIES[artifact.family]
    unknown = sorted(layouts - {"diffusers", "pipeline", "kohya" if family.name == "flux2" else "diffusers"})
    if unknown and family.is_flow:
        remedy = "Use --format diffusers, or --format pipeline for a whole model."
        raise ConfigError(f"There is no {unknown[0]} layout for {artifact.family}.", remedy)
    if "onnx" in layouts:
        check_onnx("onnx", "onnxscript")


def _file_name(artifact: Artifact, role: Role, layout: str, request: ExportRequest) -> str:
    """Return the name of one file or folder; no two of a request have the same name."""
    # The name of a LoRA file shows its role already. Only a file that is folded into both models gives two names.
    one_role = artifact.file is not None and len(request.roles) == 1
    stem = artifact.name if role == "student" or one_role else f"{artifact.name}-teacher"
    if request.bundle_embedding:
        return f"{stem}-a1111.safetensors"
    return stem + ("-kohya.safetensors" if artifact.file is not None and layout == "kohya" else _ENDINGS[layout])


def _paths_of(item: ExportItem, request: ExportRequest) -> tuple[Path, ...]:
    """Return an item's path and those of its sidecars."""
    return (item.path, *(sidecar_paths(item.path) if item.layout == "kohya" and request.metadata else ()))


def _writes_token(artifact: Artifact, request: ExportRequest) -> bool:
    """Whether a file of the learned token is needed and not beside the LoRA file already."""
    bundled = artifact.file is not None and bool(artifact.file.bundled)
    beside_file = artifact.file is not None and not bundled and request.output in (None, artifact.folder)
    return artifact.token is not None and bool(set(request.layouts) - _WITH_VOCABULARY) and not beside_file


def write_lora(
    artifact: Artifact, item: ExportItem, request: ExportRequest, on_message: OnMessage = lambda _line: None
) -> None:
    """Write one role's LoRA, with that of the text encoders if there is one, and its sidecars.

    Args:
        artifact: what was trained.
        item: role, layout and path; the folder must exist.
        request: its precision, metadata and bundled token apply.
        on_message: receives what a person should know about the file.

    Raises:
        EchoDistillError: a tensor is not finite, or the file cannot be written.
    """
    weights, dtype = artifact.weights(item.role), DTYPES[request.dtype]
    extra: dict[str, str] = {}
    if item.layout == "kohya":
        tensors = kohya_tensors(weights, artifact.family, dtype)
    else:
        tensors = diffusers_tensors(weights, dtype)
        one_rank_each = len({part.component for part in weights}) == len(weights)
        extra = adapter_metadata(weights) if one_rank_each else {}
    if request.bundle_embedding:
        tensors |= bundled_tensors(str(artifact.token), artifact.vectors(), artifact.family)
        on_message(
            f"{item.path.name} includes the learned token. A1111 and SD.Next read it; diffusers refuses the file, "
            "ComfyUI warns and ignores the token, Forge ignores it. For other tools, use the two separate files."
        )
    metadata = artifact.header(item.role, item.path, tensors, minimal=not request.metadata)
    write_safetensors(item.path, tensors, metadata | extra)
    if item.layout == "kohya" and request.metadata:
        write_sidecars(item.path, metadata)
        if artifact.config and metadata.get("echodistill.role") == "student":
            write_workflow(artifact.config, item.path, metadata)


def write_token(artifact: Artifact, path: Path) -> None:
    """Write the learned token's file. Most tools take its name as the token.

    Raises:
        EchoDistillError: the file cannot be written.
    """
    write_safetensors(path, token_tensors(path.stem, artifact.vectors(), artifact.family), {"format": "pt"})


def _write_model(artifact: Artifact, item: ExportItem, request: ExportRequest, on_message: OnMessage) -> None:
    """Write a whole model with the LoRA folded in."""
    precision = "fp32" if item.layout == "onnx" else request.dtype
    pair = _merged_pair(artifact, item, precision, request, on_message)
    models, dtype = artifact.models(request.model, request.model_overrides), DTYPES[precision]
    if item.layout == "onnx":
        save_onnx(pair, item.path, models.resolution)
        return
    metadata: dict[str, str] = {}
    if request.metadata:
        # Their hashes do not hold for the model and are left out there, so diffusers' layout, which takes every LoRA,
        # will do.
        tensors = diffusers_tensors(artifact.weights(item.role), dtype)
        metadata = artifact.header(item.role, item.path, tensors, minimal=False)
    if item.layout == "pipeline":
        base = models.student if item.role == "student" else models.teacher
        card = merged_card(item.path.name, item.role, base, metadata) if request.metadata else None
        save_pipeline(pair, item.role, item.path, dtype, card)
    else:
        save_checkpoint(pair, item.role, item.path, dtype, metadata)


def _merged_pair(
    artifact: Artifact, item: ExportItem, precision: str, request: ExportRequest, on_message: OnMessage
) -> ModelPair:
    """Load the models and fold the LoRA into one role's UNet and the text encoders.

    Raises:
        ConfigError: the LoRA is for another family.
        ModelError: a model is missing, or the LoRA does not fit it.
    """
    models = artifact.models(request.model, request.model_overrides)
    # Full precision would take twice the memory; the sum is computed in float32 either way.
    models = dataclasses.replace(models, device="cpu", precision=precision, decoder="full", offload=False)
    on_message(f"Loading {models.student if item.role == 'student' else models.teacher}")
    pair = load_pair(models, teacher=item.role == "teacher")
    if pair.family != artifact.family:
        raise ConfigError(
            f"The LoRA is for {artifact.family}, and the model is {pair.family}.",
            "Name the model that the LoRA was made for with --model.",
        )
    fold_lora(pair, item.role, artifact.weights(item.role), str(artifact.file.path if artifact.file else artifact.name))
    token = artifact.token
    if token and (item.layout in _WITH_VOCABULARY or has_token(pair.encoder, token)):
        insert_token(pair.encoder, token, list(artifact.vectors().values()))
    elif token:
        on_message(f"{token} is not in the model's vocabulary, so the model needs {token}.safetensors beside it.")
    return pair


@dataclass(frozen=True)
class TrainResult:
    """What a finished run wrote.

    Attributes:
        run: its folder.
        lora: the student's LoRA file.
        teacher_lora: the teacher's LoRA file.
        token: the learned token's file; None if none was learned.
        steps: training steps done.
        seconds: duration of the last session.
        report: the page with photos, previews and curves.
    """

    run: Path
    lora: Path
    teacher_lora: Path
    token: Path | None
    steps: int
    seconds: float
    report: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def write_results(
    pair: ModelPair, saved: Mapping[str, Any], run: Run, started: float, on_message: OnMessage
) -> TrainResult:
    """Write the files of a finished run, read each LoRA back with diffusers and compare the images.

    Args:
        pair: the trained models.
        saved: the run's last state, as in a checkpoint.
        run: its folder gets the files.
        started: seconds since the epoch.
        on_message: receives a line before the files are read back.

    Raises:
        EchoDistillError: a file cannot be written, or gives other images.
    """
    config, step = run.config, int(saved["step"])
    finished = time.time()
    preview = run.samples / f"step-{step:06d}.png"
    record = TrainingRecord(started, finished, _cover(preview, config))
    artifact = from_run(run, state=saved, record=record)
    lora, teacher_lora = artifact.lora_path("student"), artifact.lora_path("teacher")
    make_folder(teacher_lora.parent)
    files: tuple[tuple[Role, Path, float], ...] = (
        ("student", lora, config.adapter.strength),
        ("teacher", teacher_lora, 1.0),
    )
    for role, file, _ in files:
        write_lora(artifact, ExportItem(role, FAMILIES[artifact.family].layout, file), ExportRequest())
    if artifact.token_file:
        write_token(artifact, artifact.token_file)
    write_text(run.folder / "README.md", model_card(config, saved, lora, f"samples/{preview.name}"))
    on_message("Reading the files back")
    for role, file, strength in files:
        # One step without guidance for both roles: more steps would only amplify rounding.
        sampling = SamplingSettings(role=role, size=config.model.resolution)
        check_same_images(pair, role, file, [f"a photo of a {config.subject}"], sampling, strength)
    return TrainResult(run.folder, lora, teacher_lora, artifact.token_file, step, finished - started)


def _cover(preview: Path, config: Config) -> bytes:
    """Return the first image of the last preview as a PNG small enough for a header."""
    with Image.open(preview) as sheet:
        first = tile(sheet.convert("RGB"), 0, 2 * config.run.sample_seeds, 1, config.model.resolution) or sheet
        return png_bytes(first.convert("RGB").resize((256, 256), Image.Resampling.LANCZOS))
