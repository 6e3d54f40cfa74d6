"""The `sample` command: generate images with a trained LoRA. Also declares the options it shares with `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from echodistill_cli import pipeline
from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.show import print_paths, say_to, stderr_console
from echodistill_cli.cli.train import MODELS
from echodistill_cli.errors import ConfigError

_PANEL = "Generation"

Seed = Annotated[
    int, value_option("N", "seed of each prompt's first image; the next images count up", panel=_PANEL, min=0)
]
LoraScale = Annotated[float, value_option("X", "scale of the LoRA: 1 as trained, 0 for the base model", panel=_PANEL)]
Role = Annotated[
    Literal["student", "teacher"],
    value_option("NAME", "model that generates: student (one step) or teacher", panel=_PANEL),
]
Steps = Annotated[
    int | None, value_option("N", "denoising steps [dim]\\[student 1, teacher 25][/dim]", panel=_PANEL, min=1)
]
Guidance = Annotated[
    float | None,
    value_option(
        "X",
        "classifier-free guidance scale [dim]\\[student 0, teacher as in training][/dim]",
        panel=_PANEL,
        min=0,
    ),
]
Size = Annotated[
    int | None, value_option("N", "side of the images in pixels; unset: as in training", panel=_PANEL, min=16)
]
BatchSize = Annotated[int, value_option("N", "images per forward pass; changes the speed only", panel=_PANEL, min=1)]
Model = Annotated[
    str | None, value_option("MODEL", f"base model of the student: {MODELS}; unset: the run's", panel=_PANEL)
]
Teacher = Annotated[
    str | None, value_option("MODEL", "base model of the teacher, for --role teacher; unset: the run's", panel=_PANEL)
]
Device = Annotated[str | None, value_option("NAME", "device: auto, cpu, cuda or mps; unset: the run's", panel=_PANEL)]
Precision = Annotated[
    str | None,
    value_option("NAME", "precision of the weights: auto, bf16, fp16 or fp32; unset: the run's", panel=_PANEL),
]


def sample(
    prompt: Annotated[
        list[str] | None, value_option("TEXT", "prompt; may be given several times", "--prompt", "-p")
    ] = None,
    prompt_file: Annotated[Path | None, value_option("FILE", "text file with one prompt per line")] = None,
    num: Annotated[int, value_option("N", "images per prompt", "--num", "-n", min=1)] = 1,
    lora: Annotated[Path | None, value_option("PATH", "LoRA file or run folder; unset: the newest run")] = None,
    output: Annotated[Path, value_option("FOLDER", "folder for the images", "--output", "-o")] = Path("samples"),
    compare: Annotated[
        bool, bool_option("--compare", "put the base model's image of the same seed beside each image")
    ] = False,
    backend: Annotated[
        Literal["torch", "onnx"],
        value_option("NAME", "torch, or onnx for the model that export --format onnx wrote of the run"),
    ] = "torch",
    offline: Annotated[bool, bool_option("--offline", "do not use the network")] = False,
    seed: Seed = 0,
    lora_scale: LoraScale = 1.0,
    role: Role = "student",
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    batch_size: BatchSize = 4,
    model: Model = None,
    teacher: Teacher = None,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate images with a LoRA: [bold]echodistill sample --prompt "a photo of a sks dog on the beach"[/bold]"""
    prompts = [*(prompt or []), *(read_prompts("--prompt-file", prompt_file) if prompt_file else [])]
    if not prompts:
        raise ConfigError("There is no prompt.", 'Add one: --prompt "a photo of a sks dog on the beach"')
    quiet_libraries(offline=offline, quiet=quiet)
    overrides = {"teacher": teacher, "device": device, "precision": precision, "offline": offline or None}
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
        model_overrides={key: value for key, value in overrides.items() if value is not None},
        backend=backend,
    )
    written = pipeline.write_samples(request, output, on_message=say_to(stderr_console(), quiet=quiet))
    print_paths(written.to_dict(), [*written.files, *filter(None, [written.grid])], as_json=as_json)


def read_prompts(flag: str, file: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Args:
        flag: that named the file, for the error.
        file: UTF-8 text.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {file}: it cannot be read ({error}).", "Name a UTF-8 text file.") from error
    return [line.strip() for line in lines if line.strip()]
