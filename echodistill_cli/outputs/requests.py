"""What a person can ask for, as frozen data: the arguments of the façade. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echodistill_cli.config.schema import Config

if TYPE_CHECKING:
    from echodistill_cli.diffusion.pair import Role


@dataclass(frozen=True)
class SampleRequest:
    """What to draw.

    Args:
        prompts: one or more. count: pictures per prompt. seed: of a prompt's first picture; the next have the next.
        lora: a LoRA file or a run folder; None for the newest run. lora_scale: its strength, 1 as trained.
        role: who draws. steps, guidance_scale: None for the role's own (1 and 0; 25 and the run's guidance).
        size: side in pixels; None for the resolution of the run. compare: also draw what the base model would.
        model: a preset, hub id, folder or file to draw with instead of the run's own student; a LoRA file that lies in
            no run folder needs it. model_overrides: keys of `[model]` to change, such as `{"device": "cpu"}`.
        backend: "torch", or "onnx" for the graphs that `export --format onnx` wrote of a run; `model` may name them.
    """

    prompts: Sequence[str]
    count: int = 1
    seed: int = 0
    lora: Path | None = None
    lora_scale: float = 1.0
    role: Role = "student"
    steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None
    batch_size: int = 4
    compare: bool = False
    model: str | None = None
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "torch"


@dataclass(frozen=True)
class ExportRequest:
    """What to write.

    Args:
        source: run folder or LoRA file; None for the newest run. layouts: see the module.
        roles: whose; of a LoRA file, which models it is folded into. step: of a run's checkpoint; None for the newest.
        output: folder; None for `export/` in the run, or the file's own. overwrite: replace what is there.
        dtype: fp16, bf16 or fp32. metadata: False writes only what other tools need, and no sidecars.
        bundle_embedding: put the learned word into the LoRA file, as A1111 alone reads it.
        model, model_overrides: as in `SampleRequest`; for the layouts that hold a model.
        push_to: repository on the Hugging Face hub to send a run with its card to; None sends nothing.
        private: of a new repository; None for the account's own default. dry_run: only say what would be done.
    """

    source: Path | None = None
    layouts: Sequence[str] = ("kohya",)
    roles: Sequence[Role] = ("student",)
    step: int | None = None
    output: Path | None = None
    overwrite: bool = False
    dtype: str = "fp16"
    metadata: bool = True
    bundle_embedding: bool = False
    model: str | None = None
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    push_to: str | None = None
    private: bool | None = None
    dry_run: bool = False


AUTO = "auto"


@dataclass(frozen=True)
class EvaluationRequest:
    """What to measure.

    Args:
        photos: folder of real pictures of the subject.
        drawing: whose pictures, and how they are drawn. Its prompts are templates: `{}` or `{subject}` stands for the
            subject's words. Its count is the pictures per prompt.
        token, class_name: the subject's words; None for those in the LoRA file's header.
        clip, dino: see `encoders.find_judges`; "auto" for the paper's, or the package's own where the student is.
        output: folder for the results; None for one beside the LoRA file.
    """

    photos: Path
    drawing: SampleRequest
    token: str | None = None
    class_name: str | None = None
    clip: str = AUTO
    dino: str = AUTO
    output: Path | None = None


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to run.

    Args:
        folder: a checkout of google/dreambooth, or its `dataset`. output: where runs and results go.
        build: the configuration of a run with these overrides by dotted key.
        drawing: how pictures are drawn; its LoRA and model are left to the subjects, and its prompts too if empty.
        names: of subjects; empty for all.
        clip, dino: the encoders, as in `EvaluationRequest`.
    """

    folder: Path
    output: Path
    build: Callable[[Mapping[str, Any]], Config]
    drawing: SampleRequest
    names: Sequence[str] = ()
    clip: str = AUTO
    dino: str = AUTO
