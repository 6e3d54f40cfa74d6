"""Drawing with what was trained: find a LoRA and its models, put it on, yield pictures that say how they were made."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from echodistill_cli import __version__
from echodistill_cli.data.images import grid, save_png, to_image
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.diffusion.text import LearnedToken
from echodistill_cli.files import make_folder, public_name
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import attach_lora, read_token_file
from echodistill_cli.outputs.artifact import FoundLora, find_lora
from echodistill_cli.outputs.onnx import load_onnx
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.runs import OnMessage

_WIDEST = 8  # pictures of one prompt that stand in one row of the grid


@dataclass(frozen=True)
class Sample:
    """One drawn picture, and the base model's of the same seed if that was asked for.

    `texts` says how it was made, for the file's metadata; `seconds` is the time since the one before.
    """

    image: Image.Image
    base: Image.Image | None
    prompt: str
    seed: int
    texts: Mapping[str, str]
    seconds: float


def sample(request: SampleRequest, on_message: OnMessage = lambda _line: None) -> Iterator[Sample]:
    """Draw pictures with a trained LoRA, in the order of prompts, then seeds.

    Raises:
        ConfigError: there is no run or file to draw with. ModelError: a model is missing, or the file does not fit.
    """
    found = find_lora(request)
    on_message(f"Loading {found.model.student if request.role == 'student' else found.model.teacher}")
    on_graphs = request.backend == "onnx"
    pair = load_onnx(found.lora) if on_graphs else load_pair(found.model, teacher=request.role == "teacher")
    settings = SamplingSettings(
        role=request.role,
        steps=request.steps or (1 if request.role == "student" else 25),
        guidance_scale=_guidance(request, found),
        size=found.model.resolution,
        batch_size=request.batch_size,
    )
    prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
    seeds = [request.seed + index for _ in request.prompts for index in range(request.count)]
    bases = list(generate(pair, prompts, seeds, settings)) if request.compare else [None] * len(prompts)
    if not on_graphs:  # whose weights hold the LoRA and the word
        made_for = read_header(found.lora)[0].get("echodistill.role", request.role)
        if made_for != request.role:
            on_message(f"{found.lora.name} was made for the {made_for}, which draws with --role {made_for}")
        attach_lora(pair, request.role, found.lora, request.lora_scale)
    if found.token_file and request.lora_scale:  # at 0 it is the base model that draws, word and all
        _attach_token(pair, found.token_file)
    started = time.perf_counter()
    for prompt, seed, base, pixels in zip(prompts, seeds, bases, generate(pair, prompts, seeds, settings), strict=True):
        seconds = time.perf_counter() - started
        yield Sample(
            image=to_image(pixels),
            base=None if base is None else to_image(base),
            prompt=prompt,
            seed=seed,
            texts=_texts(request, found, settings, prompt, seed),
            seconds=seconds,
        )
        started = time.perf_counter()


@dataclass(frozen=True)
class WrittenSamples:
    """The files of one `sample` call; the grid is None for a single picture."""

    files: tuple[Path, ...]
    grid: Path | None
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "files": [str(file) for file in self.files],
            "grid": str(self.grid) if self.grid else None,
            "images_per_second": round(self.images_per_second, 3),
        }


def write_samples(request: SampleRequest, folder: Path, on_message: OnMessage = lambda _line: None) -> WrittenSamples:
    """Draw, and write one PNG per picture (with its making in its metadata) and a grid of all; nothing is overwritten.

    Raises:
        as `sample`; EchoDistillError: a file cannot be written.
    """
    first = _next_number(folder)
    files: list[Path] = []
    shown: list[Image.Image] = []
    seconds = 0.0
    for one in sample(request, on_message):
        path = make_folder(folder) / f"{first + len(files):04d}_s{one.seed}.png"
        picture = one.image if one.base is None else grid([one.base, one.image], columns=2)
        save_png(path, picture, one.texts)
        files.append(path)
        shown.append(picture)
        seconds += one.seconds
    sheet = None
    if len(shown) > 1:
        sheet = folder / f"{first:04d}-{first + len(shown) - 1:04d}_grid.png"
        save_png(sheet, grid(shown, columns=request.count if 1 < request.count <= _WIDEST else None))
    rate = len(files) / max(seconds, 1e-9)
    on_message(f"{len(files)} {'picture' if len(files) == 1 else 'pictures'}, {rate:.2f} images/s")
    return WrittenSamples(tuple(files), sheet, rate)


def _next_number(folder: Path) -> int:
    """One above the highest number that a picture in the folder begins with."""
    found = [re.match(r"\d{4,}(?=_)", path.name) for path in folder.glob("*_*.png")]
    return max((int(number[0]) for number in found if number), default=-1) + 1


def _attach_token(pair: ModelPair, file: Path) -> None:
    LearnedToken(pair.encoder, file.stem, "a").to(pair.device).set_vectors(read_token_file(file))


def _guidance(request: SampleRequest, found: FoundLora) -> float:
    if request.guidance_scale is not None:
        return request.guidance_scale
    return 0.0 if request.role == "student" else found.teacher_guidance


def _texts(
    request: SampleRequest, found: FoundLora, settings: SamplingSettings, prompt: str, seed: int
) -> dict[str, str]:
    """What a picture's file says of its making; of paths only the last part."""
    source = found.model.student if settings.role == "student" else found.model.teacher
    return {
        "prompt": prompt,
        "seed": str(seed),
        "model": public_name(source),
        "lora": found.lora.name,
        "lora_scale": f"{request.lora_scale:g}",
        "steps": str(settings.steps),
        "guidance_scale": f"{settings.guidance_scale:g}",
        "software": f"echodistill {__version__}",
    }
