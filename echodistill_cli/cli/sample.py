"""The `sample` command: generate images with a trained LoRA; also the options shared with `evaluate`."""

from __future__ import annotations

import codecs
import re
import secrets
from pathlib import Path
from typing import Annotated, Literal

import typer

from echodistill_cli import pipeline
from echodistill_cli.cli.options import Json, Quiet, bool_option, quiet_libraries, value_option
from echodistill_cli.cli.progress import ImageProgress
from echodistill_cli.cli.show import print_paths, stderr_console
from echodistill_cli.cli.train import MODELS
from echodistill_cli.config.families import read_small
from echodistill_cli.config.schema import LARGEST_SIDE
from echodistill_cli.errors import ConfigError
from echodistill_cli.pipeline import OnMessage

_PANEL = "Generation"
_SIDES = {"min": 16, "max": LARGEST_SIDE}

# Options that kohya's trainers read behind a prompt: --n negative, --w width, --h height, --d seed, --s steps, --l CFG.
_OPTION_IN_PROMPT = re.compile(r"(?:^|\s)(--(?:[A-Za-z]{1,2}(?=[\s=])|[A-Za-z]+(?=[\s=]+-?\d)))")
_OUR_OPTION = {"w": "--width", "h": "--height", "d": "--seed", "s": "--steps", "l": "--guidance"}
_LONGEST_PROMPT = 10_000  # characters; models read 77 tokens, and to count the tokens of a whole book takes minutes
_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

Seed = Annotated[
    str, value_option("N", "seed of each prompt's first image; the next images count up; or random", panel=_PANEL)
]
LoraScale = Annotated[float, value_option("X", "scale of the LoRA: 1 as trained, 0 for the base model", panel=_PANEL)]
Role = Annotated[
    Literal["student", "teacher"],
    value_option("NAME", "model that generates: student (one step) or teacher", panel=_PANEL),
]
Steps = Annotated[
    int | None,
    value_option("N", "denoising steps [dim]\\[student's own, teacher 25][/dim]", panel=_PANEL, min=1),
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
    int | None,
    value_option("N", "side of the images in pixels; unset: as in training", panel=_PANEL, **_SIDES),
]
BatchSize = Annotated[
    int, value_option("N", "images per forward pass; changes images by rounding alone", panel=_PANEL, min=1)
]
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
    text: Annotated[str | None, typer.Argument(metavar="PROMPT", help="prompt, in quotes")] = None,
    prompt: Annotated[
        list[str] | None, value_option("TEXT", "prompt; may be given several times", "--prompt", "-p")
    ] = None,
    prompt_file: Annotated[
        Path | None, value_option("FILE", "text file with one prompt per line; lines with # are comments")
    ] = None,
    num: Annotated[int, value_option("N", "images per prompt", "--num", "-n", min=1)] = 1,
    lora: Annotated[
        list[str] | None,
        value_option("PATH[:SCALE]", "LoRA file or run folder; several are combined; unset: the newest run"),
    ] = None,
    output: Annotated[Path, value_option("FOLDER", "folder for the images", "--output", "-o")] = Path("samples"),
    compare: Annotated[
        bool, bool_option("--compare", "put the base model's image of the same seed beside each image")
    ] = False,
    backend: Annotated[
        Literal["torch", "onnx"],
        value_option("NAME", "torch, or onnx for the model that export --format onnx wrote of the run"),
    ] = "torch",
    offline: Annotated[bool, bool_option("--offline", "do not use the network")] = False,
    seed: Seed = "0",
    lora_scale: LoraScale = 1.0,
    role: Role = "student",
    steps: Steps = None,
    guidance: Guidance = None,
    size: Size = None,
    width: Annotated[int | None, value_option("N", "width of the images in pixels", panel=_PANEL, **_SIDES)] = None,
    height: Annotated[int | None, value_option("N", "height of the images in pixels", panel=_PANEL, **_SIDES)] = None,
    batch_size: BatchSize = 4,
    model: Model = None,
    teacher: Teacher = None,
    device: Device = None,
    precision: Precision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate images with a LoRA: [bold]echodistill sample "a photo of a sks dog on the beach"[/bold]"""
    prompts = [*([] if text is None else [text]), *(prompt or [])]
    for one in prompts:
        check_prompt("The prompt", one)
    prompts += read_prompts("--prompt-file", prompt_file) if prompt_file else []
    if not prompts:
        raise ConfigError("There is no prompt.", 'Add one: --prompt "a photo of a sks dog on the beach"')
    loras = [_parse_lora(one, lora_scale) for one in lora or ()]
    progress = ImageProgress(stderr_console(), quiet=quiet)
    quiet_libraries(offline=offline, quiet=quiet)
    overrides = {"teacher": teacher, "device": device, "precision": precision, "offline": offline or None}
    request = pipeline.SampleRequest(
        prompts=prompts,
        count=num,
        seed=parse_seed(seed, progress.on_message),
        lora=loras[0][0] if loras else None,
        lora_scale=loras[0][1] if loras else lora_scale,
        more_loras=loras[1:],
        role=role,
        steps=steps,
        guidance_scale=guidance,
        size=size,
        width=width,
        height=height,
        batch_size=batch_size,
        compare=compare,
        model=model,
        model_overrides={key: value for key, value in overrides.items() if value is not None},
        backend=backend,
    )
    with progress:
        written = pipeline.write_samples(request, output, on_message=progress.on_message, on_image=progress.on_image)
    print_paths(written.to_dict(), [*written.files, *filter(None, [written.grid])], as_json=as_json)


def _parse_lora(text: str, scale: float) -> tuple[Path, float]:
    """Return the path and the scale of PATH or PATH:SCALE."""
    path, colon, number = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            return Path(path), float(number)
        except ValueError:
            pass  # a colon of the path, such as that of C:/lora.safetensors
    return Path(text), scale


def parse_seed(text: str, on_message: OnMessage) -> int:
    """Return a seed; for "random" draw one and report it.

    Raises:
        ConfigError: the text is neither an integer nor "random".
    """
    if text == "random":
        seed = secrets.randbelow(2**32)
        on_message(f"--seed {seed}")
        return seed
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"--seed {text!r} is not an integer.", "Use an integer, or --seed random.") from error


def check_prompt(name: str, prompt: str) -> None:
    """Check that a prompt holds text, and no options of other programs.

    Args:
        name: of the prompt, for the error.
        prompt: to check.

    Raises:
        ConfigError: it is empty or endless, or holds an option such as "--w 512".
    """
    if not prompt.strip():
        raise ConfigError(f"{name} is empty.", 'Write one: --prompt "a photo of a sks dog on the beach"')
    if len(prompt) > _LONGEST_PROMPT:
        raise ConfigError(f"{name} has {len(prompt)} characters, more than any model reads.", "Shorten it.")
    if found := _OPTION_IN_PROMPT.search(prompt):
        own = _OUR_OPTION.get(found[1].lstrip("-"))
        instead = f" and use {own} for all prompts" if own else ""
        raise ConfigError(f"{name} holds the option {found[1]}, which is not read there.", f"Remove it{instead}.")


def read_prompts(flag: str, file: Path) -> list[str]:
    """Return the prompts of a text file: its lines, without comments (#) and empty lines.

    Args:
        flag: that named the file, for the error.
        file: UTF-8 text, or UTF-16 with a byte order mark.

    Raises:
        ConfigError: the file cannot be read, or a prompt holds an option such as "--w 512".
    """
    try:
        content = read_small(file)
        encoding = next((name for mark, name in _ENCODINGS.items() if content.startswith(mark)), "utf-8")
        lines = [line.strip() for line in content.decode(encoding).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {file}: it cannot be read ({error}).", "Name a UTF-8 text file.") from error
    prompts = {number: line for number, line in enumerate(lines, start=1) if line and not line.startswith("#")}
    for number, prompt in prompts.items():
        check_prompt(f"{flag} {file}: line {number}", prompt)
    return list(prompts.values())
