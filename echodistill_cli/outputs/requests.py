"""What a person can ask for, as frozen data: the arguments of the façade. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echodistill_cli.config.schema import Config

if TYPE_CHECKING:
    from echodistill_cli.diffusion.pair import Role

AUTO = "auto"


@dataclass(frozen=True)
class SampleRequest:
    """What to generate.

    Args:
        prompts: at least one.
        count: images per prompt.
        seed: of the first image of each prompt; image i uses seed + i.
        lora: LoRA file or run folder; None for the newest run.
        lora_scale: scale of the LoRA; 1 as trained, 0 for the base model.
        role: which model generates.
        steps: denoising steps; None for 1 (student) or 25 (teacher).
        guidance_scale: classifier-free guidance; None for 0 (student) or the run's (teacher).
        size: side of the images in pixels; None for the run's resolution.
        batch_size: images per forward pass; changes the speed only.
        compare: whether to generate the base model's images too.
        model: preset, hub id, folder or file to use instead of the run's. A LoRA file outside of run folders needs it.
        model_overrides: keys of `[model]` to change, such as `{"device": "cpu"}`.
        backend: "torch", or "onnx" for an ONNX model, which is the run's or the folder that `model` names.
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
    """What to export.

    Args:
        source: run folder or LoRA file; None for the newest run.
        layouts: any of kohya, diffusers, pipeline, checkpoint and onnx, as `outputs.export` lists them.
        roles: whose LoRA; for a LoRA file, the models it is folded into.
        step: step of the run's checkpoint; None for the newest checkpoint.
        output: folder; None for `export/` in the run, or the folder of the LoRA file.
        overwrite: whether to replace existing files.
        dtype: precision of the tensors: fp16, bf16 or fp32.
        metadata: whether to write the full header, previews and cards; otherwise only what other tools need.
        bundle_embedding: whether the LoRA file includes the learned token, which A1111 alone reads.
        model: preset, hub id, folder or file to fold the LoRA into; None for the run's.
        model_overrides: keys of `[model]` to change, such as `{"teacher": "owner/name"}`.
        push_to: repository on the Hugging Face hub, OWNER/NAME; None sends nothing.
        private: whether a new repository is private; None for the account's default.
        dry_run: whether to return what would be written and sent, and do neither.
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


@dataclass(frozen=True)
class EvaluationRequest:
    """What to score.

    Args:
        photos: folder of real photos of the subject.
        sampling: which images to generate; `{}` or `{subject}` in its prompts becomes the subject. Without prompts,
            those of `data.prompts.EVALUATION_TEMPLATES` are used.
        token: the subject's token; None for the one in the LoRA file's header.
        class_name: what the subject is; None for the class in the LoRA file's header.
        clip: hub id or folder of the CLIP model; "auto" for the paper's, or the embedded one for an embedded student.
        dino: hub id or folder of the ViT; "auto" for the paper's, or the embedded one for an embedded student.
        output: folder of the results; None for one beside the LoRA file.
    """

    photos: Path
    sampling: SampleRequest
    token: str | None = None
    class_name: str | None = None
    clip: str = AUTO
    dino: str = AUTO
    output: Path | None = None


@dataclass(frozen=True)
class BenchmarkRequest:
    """Which subjects of DreamBench to train and score.

    Args:
        folder: a checkout of google/dreambooth, or its `dataset` folder.
        output: folder of the runs and of `results.json`.
        config: settings of every run, but for its photos, class name, run name and output.
        sampling: which images to generate; `lora` and `model` are ignored. Without prompts, DreamBench's are used.
        names: of subjects; empty for all.
        clip: hub id or folder of the CLIP model, or "auto"; see `EvaluationRequest`.
        dino: hub id or folder of the ViT, or "auto"; see `EvaluationRequest`.
    """

    folder: Path
    output: Path
    config: Config
    sampling: SampleRequest
    names: Sequence[str] = ()
    clip: str = AUTO
    dino: str = AUTO
