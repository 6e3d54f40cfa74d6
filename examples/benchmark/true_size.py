"""SD-Turbo and SDXL-Turbo pairs at their true size with random weights: time and memory of real training steps.

    python -m examples.benchmark.true_size                      # on a CPU: 256 pixels, few steps, bf16
    python -m examples.benchmark.true_size --device cuda        # on a GPU: 512 pixels, batch 1 and 2, both designs
    python -m examples.benchmark.true_size --plan               # only what each row is estimated to need
    python -m examples.benchmark.true_size --single-file        # write and read a true-size checkpoint in one file

No weight is downloaded, since time and memory do not depend on the weights. Every step is the project's own code. On a
GPU the *reference design* is measured too (see reference_design.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from echodistill_cli.config.build import build_config
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import load_photos
from echodistill_cli.diffusion.pair import Family
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.memory import estimate
from echodistill_cli.training.loop import compile_models
from echodistill_cli.training.state import TrainingState, build_state
from echodistill_cli.training.steps import training_step
from examples.benchmark.reference_design import prepare_reference, reference_step
from examples.benchmark.true_models import TOKENIZER, random_backbones, random_pair

GIB = 2**30

PAPER = Path(__file__).parents[1] / "paper.toml"


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a step costs.

    Args:
        seconds: median of a step.
        peak: memory in GiB.
        flops: of one step, 2 per multiply-add; None if not counted.
        images: images per second of one-step sampling.
    """

    seconds: float
    peak: float
    flops: float | None
    images: float


def measure(state: TrainingState, step: Callable[[], Any], *, steps: int, warmup: int, count_flops: bool) -> Measured:
    """Time training steps and one-step sampling.

    Args:
        state: the run to measure.
        step: takes one training step.
        steps: number of timed steps.
        warmup: steps before them.
        count_flops: count the operations of one more step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    for _ in range(warmup):
        step()
    flops = None
    if count_flops:
        with FlopCounterMode(display=False) as counter:
            step()
        flops = float(counter.get_total_flops())
    seconds = [_timed(step, state.pair.device) for _ in range(steps)]
    if state.bad_steps:
        raise SystemExit(f"{state.bad_steps} steps were not finite; the times would not be those of training")
    peak = peak_gib(state.pair.device)
    batch = state.config.train.batch_size
    settings = SamplingSettings(size=state.config.model.resolution, batch_size=batch)
    prompts = ["a photo of a sks dog"] * batch

    def sample() -> None:
        assert len(list(generate(state.pair, prompts, range(batch), settings))) == batch

    sampling = statistics.median(_timed(sample, state.pair.device) for _ in range(max(1, steps)))
    return Measured(statistics.median(seconds), peak, flops, batch / sampling)


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float:
    """Return the peak memory so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Return the FLOP/s of a large matrix product, an upper bound for a training step."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = min(_timed(lambda: a @ b, device) for _ in range(10))
    return 2.0 * size**3 / seconds


# --- the two designs --------------------------------------------------------------------------------------------------


def configuration(family: Family, design: str, side: int, batch: int, device: str, *, paper: bool = True) -> Config:
    """Return the settings for a design: lean, compiled (lean in compiled blocks) or reference.

    Args:
        family: sd or sdxl.
        design: its name.
        side: of the images, in pixels.
        batch: images per step.
        device: as in `model.device`.
        paper: the paper's settings; otherwise those of the preset, whose steps repeat the same parts more often.
    """
    lean = design != "reference"
    small_machine = device == "cpu" and family == "sdxl"
    names = ("dino", "dinov2", "clip" if lean else "clip-h")
    return build_config(
        f"{family}-turbo",
        PAPER if paper else None,
        overrides={
            "concept.class_name": "dog",
            "concept.views": 4,
            "model.resolution": side,
            "model.device": device,
            "model.precision": "bf16" if lean else "fp32",
            "model.decoder": "tiny" if lean else "full",
            # The SDXL pair needs 12 GiB in bf16 before anything is computed.
            "critic.discriminators": ("teacher",) if small_machine else names,
            "critic.identity": "none" if small_machine else names[2],
            "train.gradient_checkpointing": small_machine,
            "train.batch_size": batch,
            "train.compile": "default" if design == "compiled" else "off",
            "echo.start": None,
        },
    )


def prepared(config: Config, family: Family, folder: Path) -> TrainingState:
    """Return a run ready for its first step, on photos of noise."""
    report = load_photos(_photos(folder), min_photos=1, resolution=64, masks="auto", captions=False)
    device = torch.device(config.model.device)
    torch.manual_seed(0)
    pair = random_pair(
        family,
        config.model.precision,
        device,
        config.model.resolution,
        decoder=config.model.decoder,
    )
    names = sorted({*config.critic.discriminators, config.critic.identity} - {"teacher", "none"})
    backbones = random_backbones(names, pair.dtype, device)
    return build_state(config, report.photos, pair=pair, backbone=backbones.__getitem__)


def _photos(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    place = folder / "photos"
    place.mkdir(exist_ok=True)
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 640), Image.Resampling.NEAREST).save(place / f"{index}.png")
    return place


def run_design(family: Family, design: str, folder: Path, options: argparse.Namespace, batch: int) -> Measured:
    """Build one design's run, measure it and print one line."""
    on_gpu = options.device != "cpu"
    config = configuration(family, design, options.side, batch, options.device)
    state = prepared(config, family, folder)
    if design == "reference":
        prepare_reference(state)
    compile_models(state)
    photos = torch.rand(batch, 3, options.side, options.side, device=state.pair.device) * 2 - 1

    def step() -> None:
        if design == "reference":
            reference_step(state, photos)
        else:
            state.settle(training_step(state))

    measured = measure(
        state, step, steps=options.steps, warmup=3 if on_gpu else 0, count_flops=design == "lean" and on_gpu
    )
    if options.json:
        row = {"family": family, "design": design, "batch": batch, **dataclasses.asdict(measured)}
        print(json.dumps(row | {"planned": planned(config, family)}), flush=True)
        return measured
    line = f"{family:5} {design:10} batch {batch}  {measured.seconds:8.3f} s/step"
    line += f"  {batch / measured.seconds:7.2f} images/s  peak {measured.peak:5.1f} GiB"
    if design == "lean":
        line += f" (estimate {planned(config, family):4.1f})"
    line += f"  samples {measured.images:6.2f} images/s"
    if measured.flops is not None:
        rate = matmul_rate(state.pair.device, state.pair.dtype)
        share = measured.flops / measured.seconds / rate
        line += f"  {measured.flops / 1e12:5.1f} TFLOP/step, {share:.0%} of {rate / 1e12:.0f} TFLOP/s"
    print(line, flush=True)
    return measured


def planned(config: Config, family: Family) -> float | None:
    """Return the GiB that the memory plan expects in all; None for the reference design, which it does not know."""
    if config.model.precision == "fp32":
        return None
    return estimate(config, FAMILIES[family], half=True).total


def plan(options: argparse.Namespace) -> None:
    """Print what every row is estimated to need, without measuring anything."""
    for family in options.family:
        for batch in options.batch or (1, 2):
            config = configuration(family, "lean", options.side, batch, options.device)
            print(json.dumps({"family": family, "batch": batch, "planned": planned(config, family)}))


def compare_designs(options: argparse.Namespace, folder: Path) -> None:
    """Measure every family, batch size and design of the options."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    for family in options.family:
        for batch in options.batch or ((1, 2) if on_gpu else (1,)):
            seconds = {}
            for design in options.design or (("lean", "reference") if on_gpu else ("lean",)):
                if on_gpu:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                try:
                    seconds[design] = run_design(family, design, folder, options, batch).seconds
                except torch.OutOfMemoryError:
                    print(
                        f"{family:5} {design:10} batch {batch}  does not fit into this device's memory", file=sys.stderr
                    )
            if {"reference", "lean"} <= seconds.keys() and not options.json:
                ratio = seconds["reference"] / seconds["lean"]
                print(f"{family:5} the reference design takes {ratio:.1f} times as long", flush=True)


# --- a true-size single file ------------------------------------------------------------------------------------------


def single_file(folder: Path) -> None:
    """Write an SD student as one file in the original layout, load it offline and compare every tensor."""
    from safetensors.torch import save_file

    from echodistill_cli.models.single_file import sd_checkpoint

    torch.manual_seed(0)
    device = torch.device("cpu")
    pair = random_pair("sd", "bf16", device, 512, decoder="full", teacher=False)
    parts = {"unet": pair.student.unet, "vae": pair.codec.encoder, "text_encoder": pair.encoder.encoders[0]}
    states = {name: module.state_dict() for name, module in parts.items()}
    states["unet"] = {name: value.to(pair.dtype) for name, value in states["unet"].items()}
    path = folder / "sd_turbo.safetensors"
    save_file({name: value.contiguous() for name, value in sd_checkpoint(**states).items()}, path)
    print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    config = build_config(str(path), overrides=_for_single_file()).model
    read = load_pair(config, teacher=False)
    modules = {"unet": read.student.unet, "vae": read.codec.encoder, "text_encoder": read.encoder.encoders[0]}
    for name, module in modules.items():
        tensors = module.state_dict()
        assert tensors.keys() == states[name].keys(), name
        differing = [key for key, value in states[name].items() if not torch.equal(tensors[key].to(pair.dtype), value)]
        print(f"{name}: {len(tensors) - len(differing)} of {len(tensors)} tensors are equal", flush=True)
        if differing:
            raise SystemExit(f"{differing[0]} differs")


def _for_single_file() -> dict[str, Any]:
    return {
        "model.tokenizer": str(TOKENIZER),
        "model.precision": "bf16",
        "model.device": "cpu",
        "model.offline": True,
    }


def main() -> None:
    """Parse the options, print the machine and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--family", nargs="+", choices=("sd", "sdxl"), default=["sd", "sdxl"])
    parser.add_argument("--design", nargs="+", choices=("lean", "compiled", "reference"))
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--side", type=int, help="pixels (default: 256 on a CPU, 512 on a GPU)")
    parser.add_argument("--steps", type=int, help="timed steps (default: 2 on a CPU, 10 on a GPU)")
    parser.add_argument("--single-file", action="store_true")
    parser.add_argument("--plan", action="store_true", help="measure nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.side = options.side or (512 if on_gpu else 256)
    options.steps = options.steps or (10 if on_gpu else 2)
    if options.plan:
        plan(options)
        return
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if not options.json:
        print(f"{datetime.now(UTC):%Y-%m-%d}  {name}  torch {torch.__version__}, {options.side} px", flush=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if options.single_file:
            single_file(Path(folder))
        else:
            compare_designs(options, Path(folder))


if __name__ == "__main__":
    main()
