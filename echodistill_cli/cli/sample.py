"""`sample`: generate images with a trained LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.show import print_paths, say_to, stderr_console
from echodistill_cli.cli.train import MODELS
from echodistill_cli.errors import ConfigError

_CFG = "classifier-free guidance"


def sample(
    prompt: Annotated[
        list[str] | None, value_option("TEXT", "what to draw; may come many times", "--prompt", "-p")
    ] = None,
    prompt_file: Annotated[Path | None, value_option("FILE", "a text file, one prompt per line")] = None,
    num: Annotated[int, value_option("N", "pictures per prompt", "--num", "-n", min=1)] = 1,
    seed: Annotated[int, value_option("N", "of a prompt's first picture; the next count up", min=0)] = 0,
    lora: Annotated[Path | None, value_option("PATH", "LoRA file or run folder; unset: the newest run")] = None,
    lora_scale: Annotated[float, value_option("X", "strength; 1 is as trained, 0 the base model")] = 1.0,
    role: Annotated[Literal["student", "teacher"], typer.Option(help="who draws")] = "student",
    steps: Annotated[
        int | None, value_option("N", "denoising steps [dim]\\[student 1, teacher 25][/dim]", min=1)
    ] = None,
    guidance: Annotated[
        float | None, value_option("X", f"{_CFG} [dim]\\[student 0, teacher the run's][/dim]", min=0)
    ] = None,
    size: Annotated[int | None, value_option("N", "side in pixels; unset: as in training", min=16)] = None,
    batch_size: Annotated[int, value_option("N", "pictures at once; changes speed only", min=1)] = 4,
    compare: Annotated[bool, bool_option("--compare", "draw the base model's pictures beside")] = False,
    model: Annotated[str | None, value_option("MODEL", f"{MODELS}; unset: the run's")] = None,
    teacher: Annotated[str | None, value_option("MODEL", "with --model and --role teacher")] = None,
    device: Annotated[str | None, value_option("NAME", "auto, cpu, cuda or mps; unset: the run's")] = None,
    precision: Annotated[str | None, value_option("NAME", "auto, bf16, fp16 or fp32; unset: the run's")] = None,
    backend: Annotated[Literal["torch", "onnx"], typer.Option(help="onnx: the run's, see export --format")] = "torch",
    offline: Annotated[bool, bool_option("--offline", "open no socket")] = False,
    output: Annotated[Path, value_option("FOLDER", "where the pictures go", "--output", "-o")] = Path("samples"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw with a trained LoRA: [bold]echodistill sample --prompt "a photo of a sks dog on the beach"[/bold]"""
    prompts = [*(prompt or []), *_read_prompts(prompt_file)]
    if not prompts:
        raise ConfigError("Nothing to draw.", 'Say what: --prompt "a photo of a sks dog on the beach"')
    quiet_libraries(offline=offline, quiet=quiet)
    from echodistill_cli import pipeline

    changed = {"teacher": teacher, "device": device, "precision": precision, "offline": offline or None}
    request = pipeline.SampleRequest(
        prompts=prompts,
        count=num,
        seed=seed,
        lora=lora,
        lora_scale=lora_scale,
        role=role,
        steps=steps,
        guidance_scale=guidance,
        size=size,
        batch_size=batch_size,
        compare=compare,
        model=model,
        model_overrides={key: value for key, value in changed.items() if value is not None},
        backend=backend,
    )
    written = pipeline.write_samples(request, output, on_message=say_to(stderr_console(), quiet=quiet))
    print_paths(written.to_dict(), [*written.files, *filter(None, [written.grid])], as_json=as_json)


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {file}: it cannot be read ({error}).") from error
    return [line.strip() for line in lines if line.strip()]
