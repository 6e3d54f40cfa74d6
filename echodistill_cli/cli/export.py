"""The `export` command: what was learned, in the form that another tool or another person needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.show import print_paths, say_to, stderr_console
from echodistill_cli.errors import ConfigError

Layout = Literal["kohya", "diffusers", "both", "pipeline", "checkpoint", "onnx"]
_LAYOUTS = "kohya: a LoRA for every tool; diffusers, or both; pipeline, checkpoint, onnx: a model with it folded in"
_MERGED = "A whole model"
_HUB = "Hugging Face hub"


def export(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN|FILE", help="run folder or LoRA file; unset: the newest run")
    ] = None,
    layout: Annotated[Layout | None, value_option("FORMAT", f"{_LAYOUTS} [dim]\\[kohya][/dim]", "--format")] = None,
    role: Annotated[Literal["student", "teacher", "both"], value_option("student|teacher|both", "whose")] = "student",
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option(help="of the tensors")] = "fp16",
    metadata: Annotated[
        bool,
        bool_option("--metadata/--no-metadata", "say in the file how it was made; preview and A1111's card beside it"),
    ] = True,
    bundle_embedding: Annotated[
        bool, bool_option("--bundle-embedding", "the learned word inside, for A1111 alone")
    ] = False,
    step: Annotated[int | None, value_option("N", "of the run's checkpoint; unset: the newest")] = None,
    output: Annotated[Path | None, value_option("FOLDER", "unset: export/ in the run", "--output", "-o")] = None,
    overwrite: Annotated[bool, bool_option("--overwrite", "replace what is there")] = False,
    dry_run: Annotated[bool, bool_option("--dry-run", "name what would be written and sent; do neither")] = False,
    merge: Annotated[bool, bool_option("--merge", "fold it into the model: --format pipeline", _MERGED)] = False,
    model: Annotated[str | None, value_option("MODEL", "to fold it into; unset: the run's", panel=_MERGED)] = None,
    teacher: Annotated[
        str | None, value_option("MODEL", "with --role teacher; unset: the run's", panel=_MERGED)
    ] = None,
    offline: Annotated[bool, bool_option("--offline", "open no socket", _MERGED)] = False,
    push_to_hub: Annotated[str | None, value_option("OWNER/NAME", "send it, with the run's card", panel=_HUB)] = None,
    private: Annotated[
        bool, bool_option("--private", "if the repository is new; unset: as your account has it, mostly public", _HUB)
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write what was learned for other tools: [bold]echodistill export --format both[/bold]"""
    layouts = _layouts(layout, merge)
    quiet_libraries(offline=offline, quiet=quiet)
    from echodistill_cli import pipeline

    given = {"teacher": teacher, "offline": offline or None}
    request = pipeline.ExportRequest(
        source=source,
        layouts=layouts,
        roles=("student", "teacher") if role == "both" else (role,),
        step=step,
        output=output,
        overwrite=overwrite,
        dtype=dtype,
        metadata=metadata,
        bundle_embedding=bundle_embedding,
        model=model,
        model_overrides={key: value for key, value in given.items() if value is not None},
        push_to=push_to_hub,
        private=private or None,
        dry_run=dry_run,
    )
    on_message = say_to(stderr_console(), quiet=quiet)
    result = pipeline.export(request, on_message=on_message)
    print_paths(result.to_dict(), result.files, as_json=as_json)
    for line in result.sent if not as_json else ():
        on_message(f"{push_to_hub}: {line}")


def _layouts(layout: Layout | None, merge: bool) -> tuple[str, ...]:
    if merge and layout in ("kohya", "diffusers", "both"):
        raise ConfigError(f"--merge folds the LoRA in, and --format {layout} keeps it apart.", "Use one of them.")
    if layout is None:
        return ("pipeline",) if merge else ("kohya",)
    return ("kohya", "diffusers") if layout == "both" else (layout,)
