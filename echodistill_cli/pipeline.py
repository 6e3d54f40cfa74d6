"""The façade: one function per thing a person asks for. It wires objects together and holds no maths.

`train`, `sample`, `export`, `check` and `inspect` are what the command line calls, and what a program may call as well.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from echodistill_cli.attach import check_same_pictures
from echodistill_cli.card import model_card
from echodistill_cli.config import Config
from echodistill_cli.discriminators import IMAGE_BACKBONES
from echodistill_cli.drawing import Sample, SampleRequest, Say, WrittenSamples, sample, sample_to_folder
from echodistill_cli.errors import ConfigError
from echodistill_cli.export import ExportSettings, export_lora, export_token
from echodistill_cli.files import write_text
from echodistill_cli.inspection import Inspection, inspect_file
from echodistill_cli.loop import Observer, train_to_end
from echodistill_cli.models import Role
from echodistill_cli.photos import PhotoReport, check_photos, load_photos
from echodistill_cli.pictures import png_bytes
from echodistill_cli.presets import config_to_dict
from echodistill_cli.runs import Run, check_output, create_run, newest_run, open_run, resume_run
from echodistill_cli.sampling import SamplingSettings
from echodistill_cli.sources import where
from echodistill_cli.state import TrainingState, build_state

__all__ = [
    "Sample",
    "SampleRequest",
    "TrainResult",
    "WrittenSamples",
    "check",
    "export",
    "inspect",
    "plan",
    "sample",
    "sample_to_folder",
    "train",
]


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


def train(
    config: Config,
    *,
    overwrite: bool = False,
    resume: bool = False,
    from_step: int | None = None,
    observe: Observer = lambda _metrics: None,
    say: Say = lambda _line: None,
) -> TrainResult:
    """Learn a subject: photos in, LoRA files out.

    Args:
        overwrite: replace the run that is in the way. resume: go on with it, from its newest checkpoint or `from_step`.
        observe: called after each step with its metrics. say: called with lines on what is being done.

    Raises:
        EchoDistillError: any of its children; see there.
    """
    started = time.time()
    report = _load_photos(config)
    for warning in _warnings(report):
        say(warning)
    if not resume:
        check_output(config, overwrite=overwrite)
    run = resume_run(config) if resume else None
    saved = run.load_checkpoint(from_step) if run else None
    say(f"Loading {config.model.student} and {config.model.teacher}")
    state = build_state(config, report.photos)
    run = run or create_run(config, overwrite=overwrite)
    if saved is not None:
        state.load_state_dict(saved)
        run.rewind_metrics(state.step)
        say(f"Resuming at step {state.step}")
    train_to_end(state, run, observe)
    return _write_results(state, run, started, say)


def plan(config: Config) -> dict[str, Any]:
    """What `train` would do with a configuration: photos, models and where they are, steps; writes nothing.

    Raises:
        PhotoError: the photos will not do. ConfigError: the output is taken.
    """
    report = _load_photos(config)
    critics = (*config.critic.discriminators, config.critic.identity)
    images = [IMAGE_BACKBONES.get(name, name) for name in critics if name not in ("teacher", "none")]
    sources = dict.fromkeys([config.model.student, config.model.teacher, *images])
    return {
        "photos": len(report.photos),
        "warnings": list(_warnings(report)),
        "models": {source: where(source) for source in sources},
        "steps": config.train.steps,
        "echo_from_step": config.echo.start,
        "output": str(config.output),
        "output_exists": config.output.exists(),
        "config": config_to_dict(config),
    }


def _load_photos(config: Config) -> PhotoReport:
    return load_photos(
        Path(config.concept.photos),
        min_photos=config.concept.min_photos,
        resolution=config.model.resolution,
        masks=config.concept.masks,
        captions=config.concept.captions,
    )


def _write_results(state: TrainingState, run: Run, started: float, say: Say) -> TrainResult:
    """Write what a person takes away, and read each file back with diffusers."""
    config, saved = state.config, state.state_dict()
    finished = time.time()
    preview = run.samples / f"step-{state.step:06d}.png"
    settings = ExportSettings(started_at=started, finished_at=finished, cover=_cover(preview))
    lora = export_lora(config, saved, "student", run.folder / f"{config.name}.safetensors", settings)
    teacher_path = run.folder / "teacher" / f"{config.name}-teacher.safetensors"
    teacher_lora = export_lora(config, saved, "teacher", teacher_path, settings)
    token = export_token(config, saved, run.folder)
    write_text(run.folder / "README.md", model_card(config, saved, lora, f"samples/{preview.name}"))
    say("Reading the files back")
    written: tuple[tuple[Role, Path], ...] = (("student", lora), ("teacher", teacher_lora))
    for role, file in written:
        # One step without guidance for both: more would only magnify rounding.
        sampling = SamplingSettings(role=role, size=config.model.resolution)
        check_same_pictures(state.pair, role, file, [f"a photo of a {config.subject}"], sampling)
    return TrainResult(run.folder, lora, teacher_lora, token, state.step, finished - started)


def _cover(preview: Path) -> bytes:
    """The first picture of the last preview, small enough for a header."""
    with Image.open(preview) as sheet:
        side = min(sheet.size)
        return png_bytes(sheet.convert("RGB").crop((0, 0, side, side)).resize((256, 256), Image.Resampling.LANCZOS))


def _warnings(report: PhotoReport) -> Iterator[str]:
    for file in report.files:
        if file.verdict != "ok":
            yield f"{file.name}: {file.verdict}: {'; '.join(file.notes)}"
    yield from report.warnings


def export(
    run_folder: Path | None = None,
    *,
    roles: Sequence[Role] = ("student",),
    layouts: Sequence[str] = ("kohya",),
    output: Path | None = None,
    step: int | None = None,
    overwrite: bool = False,
    settings: ExportSettings | None = None,
) -> list[Path]:
    """Write LoRA files from a run's checkpoint, and the learned token's if there is one.

    Args:
        run_folder: None for the newest run. roles, layouts: a file is written for each pair.
        output: folder; None for `export/` in the run. step: of the checkpoint; None for the newest.
        overwrite: replace files that are there. settings: dtype and metadata; their layout is that of `layouts`.

    Returns:
        the files written.

    Raises:
        ConfigError: there is no such run or checkpoint, or a file is there already.
    """
    run = newest_run() if run_folder is None else open_run(run_folder)
    state = run.load_checkpoint(step)
    folder = output or run.folder / "export"
    settings = settings or ExportSettings()
    files = []
    for role in roles:
        for layout in layouts:
            suffix = ("" if role == "student" else "-teacher") + ("" if layout == "kohya" else "-diffusers")
            path = folder / f"{run.config.name}{suffix}.safetensors"
            if path.exists() and not overwrite:
                raise ConfigError(f"{path} exists already.", "Replace it with --overwrite, or name another --output.")
            files.append(export_lora(run.config, state, role, path, dataclasses.replace(settings, layout=layout)))
    token = export_token(run.config, state, folder)
    return [*files, token] if token else files


def check(folder: Path, *, resolution: int = 512, masks: str = "auto", captions: bool = True) -> PhotoReport:
    """A verdict on every file of a folder of photos; no model is loaded.

    Raises:
        PhotoError: the folder is missing, or has no picture.
    """
    return check_photos(folder, resolution=resolution, masks=masks, captions=captions)


def inspect(file: Path) -> Inspection:
    """What a LoRA or token file is, and which tools load it.

    Raises:
        ModelError: the file is missing, damaged or no safetensors file.
    """
    return inspect_file(file)
