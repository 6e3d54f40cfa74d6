"""The `export` command: write a trained LoRA in the form that another tool or person needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from echodistill_cli import pipeline
from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.show import print_paths, say_to, stderr_console
from echodistill_cli.errors import ConfigError

_LAYOUTS = (
    "kohya: LoRA file for every tool; diffusers: LoRA file for diffusers; both: these two; "
    "pipeline, checkpoint, onnx: whole model with the LoRA folded in"
)
_MODEL = "Base model of pipeline, checkpoint and onnx"
_HUB = "Hugging Face hub"


def export(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN|FILE", help="run folder or LoRA file; unset: the newest run")
    ] = None,
    layout: Annotated[
        Literal["kohya", "diffusers", "both", "pipeline", "checkpoint", "onnx"],
        value_option("FORMAT", _LAYOUTS, "--format"),
    ] = "kohya",
    role: Annotated[
        Literal["student", "teacher", "both"], value_option("NAME", "whose LoRA to export: student, teacher or both")
    ] = "student",
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"], value_option("NAME", "precision of the tensors: fp16, bf16 or fp32")
    ] = "fp16",
    metadata: Annotated[
        bool,
        bool_option("--metadata/--no-metadata", "record in the file how it was made; add a preview and A1111's card"),
    ] = True,
    bundle_embedding: Annotated[
        bool, bool_option("--bundle-embedding", "include the learned token in the LoRA file, for A1111 only")
    ] = False,
    step: Annotated[int | None, value_option("N", "step of the run's checkpoint; unset: the newest")] = None,
    output: Annotated[
        Path | None,
        value_option("FOLDER", "folder to write to; unset: export/ in the run, or that of FILE", "--output", "-o"),
    ] = None,
    overwrite: Annotated[bool, bool_option("--overwrite", "replace existing files")] = False,
    dry_run: Annotated[bool, bool_option("--dry-run", "list what would be written and sent, and do neither")] = False,
    merge: Annotated[bool, typer.Option("--merge", hidden=True)] = False,
    model: Annotated[
        str | None, value_option("MODEL", "base model of the student; unset: the run's", panel=_MODEL)
    ] = None,
    teacher: Annotated[
        str | None,
        value_option("MODEL", "base model of the teacher, for --role teacher; unset: the run's", panel=_MODEL),
    ] = None,
    offline: Annotated[bool, bool_option("--offline", "do not use the network", _MODEL)] = False,
    push_to_hub: Annotated[
        str | None, value_option("OWNER/NAME", "repository to send the run and its card to", panel=_HUB)
    ] = None,
    private: Annotated[
        bool,
        bool_option("--private", "make a new repository private; unset: your account's default, mostly public", _HUB),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained LoRA for other tools: [bold]echodistill export --format both[/bold]"""
    if merge:
        raise ConfigError("--merge was replaced.", "Use --format pipeline.")
    quiet_libraries(offline=offline, quiet=quiet)
    overrides = {"teacher": teacher, "offline": offline or None}
    request = pipeline.ExportRequest(
        source=source,
        layouts=("kohya", "diffusers") if layout == "both" else (layout,),
        roles=("student", "teacher") if role == "both" else (role,),
        step=step,
        output=output,
        overwrite=overwrite,
        dtype=dtype,
        metadata=metadata,
        bundle_embedding=bundle_embedding,
        model=model,
        model_overrides={key: value for key, value in overrides.items() if value is not None},
        push_to=push_to_hub,
        private=private or None,
        dry_run=dry_run,
    )
    on_message = say_to(stderr_console(), quiet=quiet)
    result = pipeline.export(request, on_message=on_message)
    print_paths(result.to_dict(), result.files, as_json=as_json)
    for name in result.sent if not as_json else ():
        on_message(f"{push_to_hub}: {name}")
