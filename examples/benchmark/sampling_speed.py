"""One-step sampling against bare diffusers: seconds per image in turns, in one process, and a cold start each.

    python -m examples.benchmark.sampling_speed                        # the embedded student
    python -m examples.benchmark.sampling_speed --family sd --device cuda    # SD-Turbo's size, random weights

Both sides run the same modules on the same noise: ours is `generate`, theirs a StableDiffusionPipeline of diffusers
with its Euler scheduler. They take turns, so that other load on the machine affects both alike. The cold start is a
fresh process from its first line to the first image of the embedded pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from echodistill_cli.config.build import build_config
from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate, seeded_noise
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.apply import plain_pipeline

PROMPT = "a photo of a dog on the beach"
_OURS = """
import torch
from echodistill_cli.config.build import build_config
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.models.load import load_pair
pair = load_pair(build_config("mini").model, teacher=False)
list(generate(pair, ["a dog"], [0], SamplingSettings(size=64)))
"""
_DIFFUSERS = """
import torch
from diffusers import StableDiffusionPipeline
from echodistill_cli.models.sources import embedded_folder
pipe = StableDiffusionPipeline.from_pretrained(embedded_folder("mini:student"), safety_checker=None)
pipe("a dog", num_inference_steps=1, guidance_scale=0.0, height=64, width=64)
"""


@dataclass(frozen=True)
class Speed:
    """Medians of both sides.

    Attributes:
        ours: seconds per image.
        diffusers: seconds per image.
        ratio: median of ours over diffusers, turn by turn.
    """

    ours: float
    diffusers: float
    ratio: float


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int, images: int = 1) -> Speed:
    """Run two functions in turns, after one turn that is not counted.

    Args:
        ours: generates `images` images and waits for the device.
        theirs: the same with diffusers.
        turns: how often each runs.
        images: per call.
    """
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(turns + 1)][1:]
    first, second = (statistics.median(side) / images for side in zip(*pairs, strict=True))
    return Speed(first, second, statistics.median(a / b for a, b in pairs))


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def warm(pair: ModelPair, size: int, batch: int, turns: int) -> Speed:
    """Compare sampling with models that are loaded.

    Args:
        pair: with a student.
        size: side of the images, in pixels.
        batch: images per call.
        turns: as in `compare`.
    """
    pipe = plain_pipeline(pair, "student")
    pipe.set_progress_bar_config(disable=True)
    noise = seeded_noise(range(batch), (pair.codec.channels, size // pair.codec.factor, size // pair.codec.factor))
    noise = noise.to(pair.device, pair.dtype)
    settings = SamplingSettings(size=size, batch_size=batch)

    def ours() -> None:
        assert len(list(generate(pair, [PROMPT] * batch, range(batch), settings))) == batch

    def theirs() -> None:
        images = pipe(
            [PROMPT] * batch, num_inference_steps=1, guidance_scale=0.0, height=size, width=size, latents=noise
        ).images
        assert len(images) == batch

    return compare(ours, theirs, turns, batch)


def cold(turns: int) -> Speed:
    """Compare fresh processes, from the first import to the first image of the embedded pair."""

    def process(program: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)

    return compare(process(_OURS), process(_DIFFUSERS), turns)


def main(arguments: list[str] | None = None) -> None:
    """Print a row for warm and one for cold sampling, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmark.sampling_speed")
    parser.add_argument("--family", choices=("mini", "sd", "sdxl"), default="mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--cold-turns", type=int, default=3, help="0 leaves the cold start out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    size, device = (64 if options.family == "mini" else 512), torch.device(options.device)
    if options.family == "mini":
        pair = load_pair(build_config("mini", overrides={"model.device": options.device}).model, teacher=False)
    else:
        from examples.benchmark.true_models import random_pair

        precision = "fp32" if device.type == "cpu" else "bf16"
        pair = random_pair(options.family, precision, device, size, decoder="full", teacher=False)
    rows = {"warm": warm(pair, size, options.batch, options.turns)}
    if options.cold_turns:
        rows["cold start"] = cold(options.cold_turns)
    if options.json:
        print(json.dumps({name: asdict(speed) for name, speed in rows.items()}))
        return
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}, {options.family}, {device}")
    for name, speed in rows.items():
        print(f"{name:10}  ours {speed.ours:.3f} s  diffusers {speed.diffusers:.3f} s  ratio {speed.ratio:.3f}")


if __name__ == "__main__":
    main()
