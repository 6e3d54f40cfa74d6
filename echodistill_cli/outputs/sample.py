"""Generate images with a trained LoRA. Each image records how it was made."""

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
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import make_folder, public_name
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import attach_lora
from echodistill_cli.outputs.artifact import Artifact, find
from echodistill_cli.outputs.onnx import load_onnx, read_settings
from echodistill_cli.outputs.requests import SampleRequest
from echodistill_cli.runs import OnMessage, newest_run, open_run

_MOST_COLUMNS = 8  # a row of the grid shows the images of one prompt, up to this number


@dataclass(frozen=True)
class Sample:
    """One generated image.

    Attributes:
        image: with the LoRA.
        base: of the base model from the same seed; None unless requested.
        prompt: what it shows.
        seed: of its noise.
        texts: how it was made, for the metadata of its file.
        seconds: time since the image before it.
    """

    image: Image.Image
    base: Image.Image | None
    prompt: str
    seed: int
    texts: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class _Generator:
    """Models without their LoRA yet, and what is needed to put it on and to generate."""

    pair: ModelPair
    lora: Path
    source: str
    settings: SamplingSettings
    artifact: Artifact | None


def sample(request: SampleRequest, on_message: OnMessage = lambda _line: None) -> Iterator[Sample]:
    """Yield images generated with a trained LoRA, in the order of prompts, then seeds.

    Raises:
        ConfigError: there is no such run or file.
        ModelError: a model is missing, or the LoRA does not fit it.
    """
    generator = _load_graphs(request, on_message) if request.backend == "onnx" else _load_models(request, on_message)
    pair, settings = generator.pair, generator.settings
    prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
    seeds = [request.seed + index for _ in request.prompts for index in range(request.count)]
    bases = list(generate(pair, prompts, seeds, settings)) if request.compare else [None] * len(prompts)
    if generator.artifact:
        _attach(generator.artifact, pair, request, on_message)
    started = time.perf_counter()
    for prompt, seed, base, pixels in zip(prompts, seeds, bases, generate(pair, prompts, seeds, settings), strict=True):
        seconds = time.perf_counter() - started
        yield Sample(
            image=to_image(pixels),
            base=None if base is None else to_image(base),
            prompt=prompt,
            seed=seed,
            texts=_texts(generator, request.lora_scale, prompt, seed),
            seconds=seconds,
        )
        started = time.perf_counter()


def _load_models(request: SampleRequest, on_message: OnMessage) -> _Generator:
    """Load the models that a LoRA goes with."""
    artifact = find(request.lora)
    lora, models = artifact.lora(request.role), artifact.models(request.model, request.model_overrides, request.size)
    guidance = artifact.teacher_guidance(request.model)
    source = models.student if request.role == "student" else models.teacher
    on_message(f"Loading {source}")
    pair = load_pair(models, teacher=request.role == "teacher")
    return _Generator(pair, lora, source, _settings(request, models.resolution, guidance), artifact)


def _load_graphs(request: SampleRequest, on_message: OnMessage) -> _Generator:
    """Load an ONNX model, whose weights include the LoRA and the token: the named one, or that of a run."""
    if request.role == "teacher" or request.compare or request.lora_scale != 1:
        raise ConfigError(
            "An ONNX model is the student with the LoRA at scale 1.", "Omit --role, --compare and --lora-scale."
        )
    if request.model is not None:
        folder, source = Path(request.model), request.model
    else:
        run = newest_run() if request.lora is None else open_run(request.lora)
        folder, source = run.folder / "export" / f"{run.config.name}-onnx", run.config.model.student
    size = int(read_settings(folder)["size"])
    if request.size not in (None, size):
        raise ConfigError(f"{folder} generates {size}-pixel images, not {request.size}.", "Omit --size.")
    on_message(f"Loading {source}")
    return _Generator(load_onnx(folder), folder, source, _settings(request, size, 0.0), None)


def _settings(request: SampleRequest, size: int, teacher_guidance: float) -> SamplingSettings:
    """Return the sampler's settings; what a request leaves open depends on the role."""
    guidance = 0.0 if request.role == "student" else teacher_guidance
    return SamplingSettings(
        role=request.role,
        steps=request.steps or (1 if request.role == "student" else 25),
        guidance_scale=guidance if request.guidance_scale is None else request.guidance_scale,
        size=size,
        batch_size=request.batch_size,
    )


def _attach(artifact: Artifact, pair: ModelPair, request: SampleRequest, on_message: OnMessage) -> None:
    """Put the LoRA and the learned token on the models."""
    lora = artifact.lora(request.role)
    role = artifact.metadata(request.role).get("echodistill.role", request.role)
    if role != request.role:
        on_message(f"{lora.name} was trained for the {role}. Use it with --role {role}.")
    attach_lora(pair, request.role, lora, request.lora_scale)
    if artifact.token and request.lora_scale:  # scale 0 means the base model, which has not learned the token
        token = LearnedToken(pair.encoder, artifact.token, "a").to(pair.device)
        token.set_vectors(list(artifact.file_vectors().values()))


def _texts(generator: _Generator, lora_scale: float, prompt: str, seed: int) -> dict[str, str]:
    """Return the metadata of one image file; it holds only the last part of a path."""
    return {
        "prompt": prompt,
        "seed": str(seed),
        "model": public_name(generator.source),
        "lora": generator.lora.name,
        "lora_scale": f"{lora_scale:g}",
        "steps": str(generator.settings.steps),
        "guidance_scale": f"{generator.settings.guidance_scale:g}",
        "software": f"echodistill {__version__}",
    }


@dataclass(frozen=True)
class WrittenSamples:
    """The files that one call wrote; a single image has no grid."""

    files: tuple[Path, ...]
    grid: Path | None
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "files": [str(file) for file in self.files],
            "grid": str(self.grid) if self.grid else None,
            "images_per_second": round(self.images_per_second, 3),
        }


def write_samples(request: SampleRequest, folder: Path, on_message: OnMessage = lambda _line: None) -> WrittenSamples:
    """Generate images and write one PNG per image and a grid of all. Overwrites nothing.

    Raises:
        ConfigError: there is no such run or file.
        ModelError: a model is missing, or the LoRA does not fit it.
        EchoDistillError: a file cannot be written.
    """
    first = _next_number(folder)
    files: list[Path] = []
    images: list[Image.Image] = []
    seconds = 0.0
    for one in sample(request, on_message):
        path = make_folder(folder) / f"{first + len(files):04d}_s{one.seed}.png"
        image = one.image if one.base is None else grid([one.base, one.image], columns=2)
        save_png(path, image, one.texts)
        files.append(path)
        images.append(image)
        seconds += one.seconds
    sheet = None
    if len(images) > 1:
        sheet = folder / f"{first:04d}-{first + len(images) - 1:04d}_grid.png"
        save_png(sheet, grid(images, columns=request.count if 1 < request.count <= _MOST_COLUMNS else None))
    rate = len(files) / max(seconds, 1e-9)
    on_message(f"{len(files)} {'image' if len(files) == 1 else 'images'}, {rate:.2f} images/s")
    return WrittenSamples(tuple(files), sheet, rate)


def _next_number(folder: Path) -> int:
    """Return one more than the highest number that an image's file name in the folder starts with."""
    matches = [re.match(r"\d{4,}(?=_)", path.name) for path in folder.glob("*_*.png")]
    return max((int(match[0]) for match in matches if match), default=-1) + 1
