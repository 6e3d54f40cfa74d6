"""Generate images with a trained LoRA. Each image records how it was made."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from echodistill_cli import __version__
from echodistill_cli.config.build import PRESETS, build_config
from echodistill_cli.config.distilled import student_steps
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.data.grids import grid, reduced
from echodistill_cli.data.images import a1111_text, save_new_png, save_png, to_image
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.diffusion.text import LearnedToken
from echodistill_cli.errors import ConfigError, ModelError, counted
from echodistill_cli.files import make_folder, public_name
from echodistill_cli.lora.header import notes_on_use
from echodistill_cli.lora.read import read_lora
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import attach_lora, fold_lora
from echodistill_cli.outputs.artifact import Artifact, find
from echodistill_cli.outputs.onnx import load_onnx, read_settings
from echodistill_cli.outputs.requests import SampleRequest, prompt_notes, setting_notes
from echodistill_cli.runs import OnMessage, newest_run, open_run

OnImage = Callable[[int, int], None]  # called with the number of finished images and of all

_MOST_COLUMNS = 8  # a row of the grid shows the images of one prompt, up to this number
_MOST_TILES = 100  # more images get no grid


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
        run: folder of the run that the LoRA belongs to; None for a LoRA file outside of run folders.
    """

    image: Image.Image
    base: Image.Image | None
    prompt: str
    seed: int
    texts: Mapping[str, str]
    seconds: float
    run: Path | None = None


@dataclass(frozen=True)
class Generator:
    """Models without their LoRA yet, and what is needed to put it on and to generate.

    Attributes:
        pair: the models.
        loras: the LoRA files with their scales.
        source: the base model.
        settings: of the sampler.
        artifacts: what was trained, with the scales; empty for an ONNX model, which includes it.
        run: folder of the run of the first LoRA; None if there is none.
        token: of the first LoRA; None if it is not known.
    """

    pair: ModelPair
    loras: Sequence[tuple[Path, float]]
    source: str
    settings: SamplingSettings
    artifacts: Sequence[tuple[Artifact, float]]
    run: Path | None
    token: str | None


def sample(request: SampleRequest, on_message: OnMessage = lambda _line: None) -> Iterator[Sample]:
    """Yield images generated with a trained LoRA, in the order of prompts, then seeds.

    Raises:
        ConfigError: there is no such run or file.
        ModelError: a model is missing, or the LoRA does not fit it.
    """
    generator = load_graphs(request, on_message) if request.backend == "onnx" else load_models(request, on_message)
    pair, settings = generator.pair, generator.settings
    prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
    seeds = [request.seed + index for _ in request.prompts for index in range(request.count)]
    with tempfile.TemporaryDirectory(prefix="echodistill-") as folder:
        if request.compare:
            # The LoRA and its token cannot be removed again, so all of these come first. On disk they take no memory.
            on_message(f"Generating {counted(len(prompts), 'image')} of the base model")
            for index, pixels in enumerate(generate(pair, prompts, seeds, settings)):
                save_png(Path(folder, f"{index}.png"), to_image(pixels))
        attach(generator, request, on_message)
        for line in prompt_notes(pair.encoder, request.prompts, generator.token if request.lora_scale else None):
            on_message(line)
        started = time.perf_counter()
        for index, pixels in enumerate(generate(pair, prompts, seeds, settings)):
            seconds = time.perf_counter() - started
            yield Sample(
                image=to_image(pixels),
                base=_take_image(Path(folder, f"{index}.png")) if request.compare else None,
                prompt=prompts[index],
                seed=seeds[index],
                texts=texts_of(generator, prompts[index], seeds[index]),
                seconds=seconds,
                run=generator.run,
            )
            started = time.perf_counter()


def _take_image(file: Path) -> Image.Image:
    """Read an image file and delete it."""
    with Image.open(file) as image:
        image.load()
    file.unlink()
    return image


def _load_pair(models: ModelConfig, role: Role) -> ModelPair:
    return load_pair(models, teacher=role == "teacher")


def load_models(
    request: SampleRequest, on_message: OnMessage, load: Callable[[ModelConfig, Role], ModelPair] = _load_pair
) -> Generator:
    """Load the models that a LoRA goes with; `load` returns models that nothing else changes.

    Raises:
        ConfigError: there is no such run or file.
        ModelError: a model is missing.
    """
    first = find(request.lora)
    if request.lora is None and first.run:
        on_message(f"Using the newest run, {first.run.folder}")
    artifacts = [(first, request.lora_scale), *((find(path), scale) for path, scale in request.more_loras)]
    loras = [(artifact.lora(request.role), scale) for artifact, scale in artifacts]
    models = first.models(request.model, request.model_overrides, request.size)
    source = models.student if request.role == "student" else models.teacher
    steps = student_steps(models)
    settings = _settings(request, models.resolution, first.teacher_guidance(request.model), steps)
    known = request.model is None or request.model in PRESETS
    trained = (first.config if request.model is None else build_config(request.model)) if known else None
    resolution = trained.model.resolution if trained else None
    for line in setting_notes(request, settings.steps, settings.guidance_scale, resolution, steps):
        on_message(line)
    on_message(f"Loading {source}")
    try:
        pair = load(models, request.role)
    except ConfigError as error:  # the loader knows the setting, a person typed the option
        hint = error.hint and error.hint.replace("--resolution", "--size")
        raise ConfigError(error.message.replace("--resolution", "--size"), hint) from error
    _set_sides(pair, settings)
    known_token = first.config.concept.token if first.config else None
    token = first.metadata(request.role).get("echodistill.token", known_token)
    return Generator(pair, loras, source, settings, artifacts, first.run.folder if first.run else None, token)


def load_graphs(request: SampleRequest, on_message: OnMessage) -> Generator:
    """Load an ONNX model, whose weights include the LoRA and the token: the named one, or that of a run."""
    request.check_paths()
    run = None
    if request.model is not None:
        folder, source = Path(request.model), request.model
    else:
        run = newest_run() if request.lora is None else open_run(request.lora)
        if request.lora is None:
            on_message(f"Using the newest run, {run.folder}")
        folder, source = run.folder / "export" / f"{run.config.name}-onnx", run.config.model.student
    graphs = read_settings(folder)
    size = int(graphs["size"])
    for flag in ("size", "width", "height"):
        if getattr(request, flag) not in (None, size):
            raise ConfigError(
                f"{folder} generates {size}-pixel images, not {getattr(request, flag)}.", f"Omit --{flag}."
            )
    on_message(f"Loading {source}")
    token = run.config.concept.token if run else None
    settings = _settings(request, size, 0.0, len(graphs.get("student_timesteps") or [0]))
    return Generator(load_onnx(folder), [(folder, 1.0)], source, settings, [], run.folder if run else None, token)


def _settings(request: SampleRequest, size: int, teacher_guidance: float, distilled: int) -> SamplingSettings:
    """Return the sampler's settings; what a request leaves open depends on the role."""
    guidance = 0.0 if request.role == "student" else teacher_guidance
    return SamplingSettings(
        role=request.role,
        steps=request.steps or (distilled if request.role == "student" else 25),
        guidance_scale=guidance if request.guidance_scale is None else request.guidance_scale,
        size=size,
        batch_size=request.batch_size,
        width=request.width,
        height=request.height,
    )


def _set_sides(pair: ModelPair, settings: SamplingSettings) -> None:
    """Check width and height, and condition SDXL on them.

    Raises:
        ConfigError: the UNet cannot halve a side often enough.
    """
    denoiser = pair.role(settings.role)
    multiple = pair.codec.factor * denoiser.multiple
    for flag, side in (("--width", settings.width), ("--height", settings.height)):
        if side is not None and side % multiple:
            near = max(side // multiple, 1) * multiple
            raise ConfigError(
                f"{flag} {side} is not a multiple of {multiple}, which this model needs.", f"Try {flag} {near}."
            )
    if settings.width or settings.height:
        sides = [(side or settings.size) // pair.codec.factor for side in (settings.height, settings.width)]
        denoiser.set_tokens(sides[0] * sides[1])
    if denoiser.time_ids is not None and (settings.width or settings.height):
        target = (settings.height or settings.size, settings.width or settings.size)
        original = target if denoiser.time_ids[:2] == (settings.size, settings.size) else denoiser.time_ids[:2]
        denoiser.time_ids = (*original, 0, 0, *target)


def attach(generator: Generator, request: SampleRequest, on_message: OnMessage) -> None:
    """Attach LoRAs and learned tokens: the first LoRA as an adapter, the others folded into the weights.

    Raises:
        ConfigError: two of them learned the same token.
        ModelError: one does not fit the models.
    """
    pair, tokens = generator.pair, list[str]()
    for index, (artifact, scale) in enumerate(generator.artifacts):
        lora = artifact.lora(request.role)
        for line in notes_on_use(artifact.metadata(request.role), lora.name, request.role, artifact.token):
            on_message(line)
        if index:
            _fold(pair, request, lora, scale)
        else:
            attach_lora(pair, request.role, lora, scale)
        if not artifact.token or not scale:  # scale 0 means the base model, which has not learned the token
            continue
        if artifact.token in tokens:
            raise ConfigError(f"Two LoRAs learned the token {artifact.token!r}.", "Name only one of them with --lora.")
        tokens.append(artifact.token)
        token = LearnedToken(pair.encoder, artifact.token, "a").to(pair.device)
        token.set_vectors(list(artifact.file_vectors().values()))


def _fold(pair: ModelPair, request: SampleRequest, lora: Path, scale: float) -> None:
    """Add a LoRA file to the weights at a scale."""
    parts = [dataclasses.replace(part, alpha=part.alpha * scale) for part in read_lora(lora).to_peft()]
    try:
        fold_lora(pair, request.role, parts, str(lora))
    except ModelError as error:
        raise ModelError(error.message, "Omit this --lora.") from error


def texts_of(generator: Generator, prompt: str, seed: int) -> dict[str, str]:
    """Return the metadata of one image file; it holds only the last part of a path."""
    settings, unread = generator.settings, generator.pair.encoder.cut_off(prompt)
    return {
        "prompt": prompt,
        **({"cut_off": unread} if unread else {}),
        "seed": str(seed),
        "model": public_name(generator.source),
        "lora": ", ".join(lora.name for lora, _ in generator.loras),
        "lora_scale": ", ".join(f"{scale:g}" for _, scale in generator.loras),
        "steps": str(settings.steps),
        "guidance_scale": f"{settings.guidance_scale:g}",
        "software": f"echodistill {__version__}",
        "parameters": _parameters(generator, prompt, seed),
    }


def _parameters(generator: Generator, prompt: str, seed: int) -> str:
    """Return what A1111 and Forge read from an image: prompt, LoRA tags, and settings."""
    settings = generator.settings
    fields = {
        "Steps": settings.steps,
        "Sampler": {"euler": "Euler", "ddim": "DDIM", "lcm": "LCM"}[generator.pair.role(settings.role).sampler],
        "Schedule type": "SGM Uniform",  # trailing timesteps
        "CFG scale": f"{max(settings.guidance_scale, 1.0):g}",
        "Seed": seed,
        "Size": f"{settings.width or settings.size}x{settings.height or settings.size}",
        "Model": public_name(generator.source),
        "Version": f"echodistill {__version__}",
    }
    tags = "".join(f" <lora:{lora.stem}:{scale:g}>" for lora, scale in generator.loras if lora.suffix)
    return a1111_text(f"{prompt}{tags}", fields)


@dataclass(frozen=True)
class WrittenSamples:
    """The files that one call wrote.

    Attributes:
        files: one per image; with the base model's image beside it if that was requested.
        grid: of all images; None for a single image and for very many.
        images_per_second: without the time to load models.
        images: what each file shows: file, prompt, seed, run, model, and "alone", the LoRA's image without the base's.
    """

    files: tuple[Path, ...]
    grid: Path | None
    images_per_second: float
    images: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "files": [str(file) for file in self.files],
            "grid": str(self.grid) if self.grid else None,
            "images_per_second": round(self.images_per_second, 3),
            "images": [dict(image) for image in self.images],
        }


def write_samples(
    request: SampleRequest,
    folder: Path,
    on_message: OnMessage = lambda _line: None,
    on_image: OnImage = lambda _done, _total: None,
) -> WrittenSamples:
    """Generate images and write one PNG per image and a grid of all. Overwrites nothing.

    Args:
        request: what to generate.
        folder: of the images.
        on_message: receives lines about the progress.
        on_image: receives the number of finished images and of all.

    Raises:
        ConfigError: there is no such run or file.
        ModelError: a model is missing, or the LoRA does not fit it.
        EchoDistillError: a file cannot be written.
    """
    total, number = len(request.prompts) * request.count, _next_number(folder)
    images, files, tiles = list[Mapping[str, Any]](), list[Path](), list[Image.Image]()
    seconds = 0.0
    for one in sample(request, on_message):
        make_folder(folder)
        image = one.image if one.base is None else grid([one.base, one.image], 2, ["base model", "yours"])
        while not save_new_png(file := folder / f"{number:04d}_s{one.seed}.png", image, one.texts):
            number += 1  # another process took it
        number += 1
        images.append(_entry(file, one))
        if 1 < total <= _MOST_TILES:
            tiles.append(reduced(image, total))
        files.append(file)
        seconds += one.seconds
        on_image(len(files), total)
    sheet = _write_grid(folder, files, tiles, request) if tiles else None
    if total > _MOST_TILES:
        on_message(f"There is no grid of more than {_MOST_TILES} images.")
    rate = len(files) / max(seconds, 1e-9)
    on_message(f"{counted(len(files), 'image')}, {rate:.2f} images/s")
    return WrittenSamples(tuple(files), sheet, rate, tuple(images))


def _entry(file: Path, one: Sample) -> dict[str, Any]:
    """Return what a file shows; beside a comparison, write the LoRA's image alone."""
    entry = {"file": str(file), "prompt": one.prompt, "seed": one.seed}
    entry |= {"run": str(one.run) if one.run else None, "model": one.texts["model"], "lora": one.texts["lora"]}
    if one.base is not None:
        alone = file.with_name(f"{file.stem}_lora.png")
        save_png(alone, one.image, one.texts)
        entry["alone"] = str(alone)
    return entry


def _write_grid(folder: Path, files: Sequence[Path], tiles: Sequence[Image.Image], request: SampleRequest) -> Path:
    """Write the grid of all images with their prompts, and return its path."""
    first, last = (file.name.partition("_")[0] for file in (files[0], files[-1]))
    prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
    sheet = grid(tiles, request.count if 1 < request.count <= _MOST_COLUMNS else None, prompts)
    path, copy = folder / f"{first}-{last}_grid.png", 2
    while not save_new_png(path, sheet):
        path, copy = folder / f"{first}-{last}_grid-{copy}.png", copy + 1
    return path


def _next_number(folder: Path) -> int:
    """Return one more than the highest number that an image's file name in the folder starts with."""
    matches = [re.match(r"\d{4,}(?=_)", path.name) for path in folder.glob("*_*.png")]
    return max((int(match[0]) for match in matches if match), default=-1) + 1
