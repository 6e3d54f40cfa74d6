"""ONNX against torch on this machine's CPU: the same pictures, one by one and in turn, in one process.

    python -m examples.benchmark.onnx_speed                    # the mini world's sizes, random weights
    python -m examples.benchmark.onnx_speed --true-size        # SD-Turbo's sizes (about 16 GB of memory, minutes)

Random weights take as long as trained ones. Both sides get the same number of threads and float32; each picture is
drawn by torch and then by onnxruntime, so that whatever else the machine does meanwhile hits both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.outputs.onnx import load_onnx, save_onnx

PROMPT = "a photo of a sks dog on the beach"


def mini_pair(folder: Path) -> ModelPair:
    """A student of the mini world's sizes with random weights."""
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    from echodistill_cli.diffusion.pair import Denoiser, LatentCodec
    from echodistill_cli.diffusion.schedule import NoiseSchedule
    from echodistill_cli.diffusion.text import PromptEncoder
    from examples.mini_world.models import build_text_encoder, build_unet, build_vae
    from tests.helpers.random_models import small_tokenizer

    tokenizer = small_tokenizer(folder / "words")
    models = [build_unet(), build_vae(), build_text_encoder(tokenizer)]
    unet, vae, text = (model.eval().requires_grad_(False) for model in models)
    schedule = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return ModelPair(
        family="sd",
        encoder=PromptEncoder([tokenizer], [text]),
        codec=LatentCodec(vae, vae),
        student=Denoiser(unet, NoiseSchedule(schedule.alphas_cumprod.float(), "epsilon")),
        loaded_teacher=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def true_pair(folder: Path, size: int) -> ModelPair:
    """A student of SD-Turbo's sizes with random weights."""
    from examples.benchmark.true_size import random_pair

    return random_pair("sd", "fp32", torch.device("cpu"), size, folder / "words", decoder="full", teacher=False)


def draw(pair: ModelPair, seed: int, size: int) -> tuple[Tensor, float]:
    """A picture, and the seconds it took from prompt to pixels."""
    started = time.perf_counter()
    (pixels,) = generate(pair, [PROMPT], [seed], SamplingSettings(size=size))
    return pixels, time.perf_counter() - started


def main() -> None:
    """Export, draw in turn, print both medians and how far apart the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--true-size", action="store_true", help="SD-Turbo's sizes instead of the mini world's")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (mini 64, true size 512)")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = options.size or (512 if options.true_size else 64)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = true_pair(folder, size) if options.true_size else mini_pair(folder)
        started = time.perf_counter()
        save_onnx(pair, folder / "onnx", size)
        written = time.perf_counter() - started
        gigabytes = sum(file.stat().st_size for file in (folder / "onnx").rglob("*")) / 1e9
        graphs = load_onnx(folder / "onnx", threads=options.threads)
        rows = [(draw(pair, seed, size), draw(graphs, seed, size)) for seed in range(options.pictures + 1)]
    times = [statistics.median(row[side][1] for row in rows[1:]) for side in (0, 1)]  # the first one warms up
    apart = max(float((left[0].int() - right[0].int()).abs().max()) for left, right in rows)
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.machine()}  torch {torch.__version__}, {options.threads} thread(s)")
    print(f"export       {written:.1f} s, {gigabytes:.2f} GB on disk")
    print(f"torch        {times[0]:.3f} s per picture of {size} x {size} (median of {options.pictures})")
    print(f"onnxruntime  {times[1]:.3f} s per picture: {times[0] / times[1]:.2f} times as fast")
    print(f"difference   at most {apart:.0f} of 255 levels in any pixel")


if __name__ == "__main__":
    main()
