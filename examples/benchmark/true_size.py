"""SD-Turbo and SDXL-Turbo pairs at their true size with random weights: real training steps, timed and weighed.

    python -m examples.benchmark.true_size                      # on a CPU: 256 pixels, few steps, bf16
    python -m examples.benchmark.true_size --device cuda        # on a GPU: 512 pixels, batch 1 and 2, both designs
    python -m examples.benchmark.true_size --single-file        # a true-size checkpoint in one file, written and read

No weight is downloaded: time and memory do not depend on what the weights are. Everything goes through the project's
own code; the *reference design* beside it is what the method's released research script does in a step: float32, the
full VAE's decoder, DINOv2 at 518 pixels, CLIP ViT-H, photos encoded anew, no feature of a critic used twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import echodistill_cli
from echodistill_cli.config.build import build_config
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config
from echodistill_cli.data.photos import load_photos
from echodistill_cli.diffusion.pair import Denoiser, Family, LatentCodec, ModelPair
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.diffusion.text import PromptEncoder
from echodistill_cli.models.device import DTYPES, VAE, estimate
from echodistill_cli.models.load import as_denoiser, load_pair, load_schedule
from echodistill_cli.models.vision import ImageBackbone
from echodistill_cli.training import batches, losses
from echodistill_cli.training.critics import frozen
from echodistill_cli.training.state import TrainingState, build_state
from echodistill_cli.training.steps import active_losses, teacher_step, training_step
from tests.helpers.random_models import small_tokenizer

CONFIGURATIONS = Path(echodistill_cli.__file__).parent / "models" / "configurations"
GIB = 2**30


# --- true architectures, random weights -------------------------------------------------------------------------------


@contextmanager
def born_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Inside, modules are made on this device in this precision at once, never in float32 first."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def frozen_module(module: Any) -> Any:
    """As the loader leaves a module."""
    return module.eval().requires_grad_(False)


def random_denoiser(family: Family, dtype: torch.dtype, device: torch.device, side: int) -> Denoiser:
    """A UNet of the family's true architecture."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    folder = CONFIGURATIONS / FAMILIES[family].configuration
    with born_as(dtype, device):
        unet = frozen_module(UNet2DConditionModel(**_settings(folder / "unet")))
    assert parameters(unet) == FAMILIES[family].size.unet
    sizes = (side, side, 0, 0, side, side) if family == "sdxl" else None
    return as_denoiser(unet, load_schedule(folder / "scheduler"), sizes)


def random_pair(
    family: Family, precision: str, device: torch.device, side: int, words: Path, *, decoder: str, teacher: bool = True
) -> ModelPair:
    """A student and a teacher of the true architectures; the vocabulary alone is small."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    dtype, folder = DTYPES[precision], CONFIGURATIONS / FAMILIES[family].configuration
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders, tokenizers = [], []
    with born_as(dtype, device):
        vae = frozen_module(AutoencoderKL(**_settings(folder / "vae")))
        tiny = frozen_module(AutoencoderTiny()) if decoder == "tiny" else vae
        for part, kind in list(kinds.items())[: 1 + (family == "sdxl")]:
            encoders.append(frozen_module(kind(CLIPTextConfig(**_settings(folder / part)))))
    assert parameters(vae) == VAE
    assert sum(map(parameters, encoders)) == FAMILIES[family].size.text
    for _ in encoders:
        tokenizers.append(small_tokenizer(words))
        tokenizers[-1].model_max_length = 77
    return ModelPair(
        family=family,
        encoder=PromptEncoder(tokenizers, encoders, zero_null=family == "sdxl"),
        codec=LatentCodec(vae, tiny),
        student=random_denoiser(family, dtype, device, side),
        loaded_teacher=random_denoiser(family, dtype, device, side) if teacher else None,
        device=device,
        dtype=dtype,
    )


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def parameters(module: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in module.parameters())


def write_backbones(folder: Path, device: torch.device) -> dict[str, Path]:
    """DINO ViT-S/16, DINOv2 ViT-L/14, CLIP ViT-L/14 and ViT-H/14 with random weights, once per machine."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTModel,
    )

    def clip(width: int, layers: int, projection: int) -> Any:
        size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        shape = {"num_attention_heads": 16, "patch_size": 14, "image_size": 224, "projection_dim": projection}
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**size, **shape))

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    makers: dict[str, Callable[[], Any]] = {
        "dino": lambda: ViTModel(ViTConfig(**small), add_pooling_layer=False),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**large, image_size=518)),
        "clip": lambda: clip(1024, 24, 768),
    }
    if device.type != "cpu":  # only the reference design wants it
        makers["clip-h"] = lambda: clip(1280, 32, 1024)
    for name, make in makers.items():
        with born_as(torch.bfloat16, device):
            make().save_pretrained(folder / name)
    return {name: folder / name for name in makers}


# --- the reference design's step --------------------------------------------------------------------------------------


def reference_step(state: TrainingState, photos: Tensor) -> None:
    """One step as the released script takes it: nothing is remembered, nothing shared.

    It is kinder to the script than it deserves: the identity encoder's weights are frozen here and its target detached.
    """
    state.pair.codec.encode(photos)
    teacher_step(state)
    with frozen(state.critics):
        generated = batches.student_pass(state)
        total = torch.zeros((), device=state.pair.device)
        for term in active_losses(state):
            values = term.function(state, generated) * (generated.alpha_bar if term.weighted_by_alpha_bar else 1)
            total = total + getattr(state.config.loss, term.name) * values.mean()
            generated.images.features.clear()  # the next loss runs its encoder again
        state.optimizers.step(total, ["student"])
    fakes = generated.images.image.detach()
    verdicts = []
    for critic in state.critics:
        assert isinstance(critic.backbone, ImageBackbone)
        with torch.no_grad():
            real, fake = critic.backbone.features(photos), critic.backbone.features(fakes)
        ones = torch.ones(len(photos), device=photos.device)
        verdicts.append(losses.adversarial_discriminator(critic.logits(real), critic.logits(fake), ones))
    state.optimizers.step(torch.stack(verdicts).sum(), ["discriminators"])
    state.step += 1


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a step costs.

    Args:
        seconds: median of a step. peak: GiB. flops: of one step, 2 per multiply-add, where counted.
        pictures: images per second of one-step sampling.
    """

    seconds: float
    peak: float
    flops: float | None
    pictures: float


def measure(state: TrainingState, step: Callable[[], Any], *, steps: int, warmup: int, count_flops: bool) -> Measured:
    """Take some steps and draw some pictures."""
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

    def draw() -> None:
        assert len(list(generate(state.pair, prompts, range(batch), settings))) == batch

    drawing = statistics.median(_timed(draw, state.pair.device) for _ in range(max(1, steps)))
    return Measured(statistics.median(seconds), peak, flops, batch / drawing)


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
    """The most memory in use so far: of the GPU by tensors, of the CPU by the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of one large matrix product, the most that a step could reach."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = min(_timed(lambda: a @ b, device) for _ in range(10))
    return 2.0 * size**3 / seconds


# --- the two designs --------------------------------------------------------------------------------------------------


def configuration(
    family: Family, design: str, backbones: dict[str, Path], side: int, batch: int, device: str
) -> Config:
    """The preset's settings with the backbones that are on this disk, for the lean design or the reference's."""
    lean = design == "lean"
    small_machine = device == "cpu" and family == "sdxl"
    names = ("dino", "dinov2", "clip" if lean else "clip-h")
    identity = str(backbones[names[2]])
    return build_config(
        f"{family}-turbo",
        overrides={
            "concept.class_name": "dog",
            "concept.views": 4,
            "model.resolution": side,
            "model.device": device,
            "model.precision": "bf16" if lean else "fp32",
            "model.decoder": "tiny" if lean else "full",
            # The SDXL pair takes 12 GiB in bf16 before anything is computed.
            "critic.discriminators": ("teacher",) if small_machine else tuple(str(backbones[name]) for name in names),
            "critic.identity": "none" if small_machine else identity,
            "train.gradient_checkpointing": small_machine,
            "train.batch_size": batch,
            "echo.start": None,
        },
    )


def prepared(config: Config, family: Family, folder: Path) -> TrainingState:
    """A run ready for its first step, over photos of noise."""
    report = load_photos(_photos(folder), min_photos=1, resolution=64, masks="auto", captions=False)
    device = torch.device(config.model.device)
    torch.manual_seed(0)
    pair = random_pair(
        family,
        config.model.precision,
        device,
        config.model.resolution,
        folder / "words",
        decoder=config.model.decoder,
    )
    return build_state(config, report.photos, pair=pair)


def _photos(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    place = folder / "photos"
    place.mkdir(exist_ok=True)
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 640), Image.Resampling.NEAREST).save(place / f"{index}.png")
    return place


def run_design(
    family: Family, design: str, backbones: dict[str, Path], folder: Path, options: argparse.Namespace, batch: int
) -> Measured:
    """Build one design's run and measure it; prints a line."""
    on_gpu = options.device != "cpu"
    config = configuration(family, design, backbones, options.side, batch, options.device)
    state = prepared(config, family, folder)
    if design == "reference":
        for critic in state.critics:
            if critic.name == "dinov2":
                assert isinstance(critic.backbone, ImageBackbone)
                critic.backbone.side = 518
    photos = torch.rand(batch, 3, options.side, options.side, device=state.pair.device) * 2 - 1

    def step() -> None:
        if design == "reference":
            reference_step(state, photos)
        else:
            training_step(state)

    found = measure(state, step, steps=options.steps, warmup=2 if on_gpu else 0, count_flops=on_gpu)
    line = f"{family:5} {design:10} batch {batch}  {found.seconds:8.3f} s/step  {batch / found.seconds:7.2f} images/s"
    line += f"  peak {found.peak:5.1f} GiB"
    if design == "lean":  # the one that the memory plan knows
        line += f" (estimate {estimate(_by_name(config), FAMILIES[family], half=True).total:4.1f})"
    line += f"  draws {found.pictures:6.2f} images/s"
    if found.flops is not None:
        rate = matmul_rate(state.pair.device, state.pair.dtype)
        share = found.flops / found.seconds / rate
        line += f"  {found.flops / 1e12:5.1f} TFLOP/step, {share:.0%} of {rate / 1e12:.0f} TFLOP/s"
    print(line, flush=True)
    return found


def _by_name(config: Config) -> Config:
    """The configuration with the backbones' names in place of their folders, by which their sizes are known."""
    names = tuple(Path(name).name for name in config.critic.discriminators)
    critic = dataclasses.replace(config.critic, discriminators=names, identity=Path(config.critic.identity).name)
    return dataclasses.replace(config, critic=critic)


def compare_designs(options: argparse.Namespace, folder: Path) -> None:
    """Every family, batch and design that was asked for; a GPU's memory is emptied in between."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    backbones = write_backbones(folder, device)
    for family in options.family:
        for batch in options.batch or ((1, 2) if on_gpu else (1,)):
            seconds = {}
            for design in options.design or (("lean", "reference") if on_gpu else ("lean",)):
                if on_gpu:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                try:
                    seconds[design] = run_design(family, design, backbones, folder, options, batch).seconds
                except torch.OutOfMemoryError:
                    print(f"{family:5} {design:10} batch {batch}  does not fit into this device's memory", flush=True)
            if len(seconds) == 2:
                ratio = seconds["reference"] / seconds["lean"]
                print(f"{family:5} the reference design takes {ratio:.1f} times as long", flush=True)


# --- a true-size single file ------------------------------------------------------------------------------------------


def single_file(folder: Path) -> None:
    """Write an SD student as one file in the original layout, load it with what this package ships, and compare."""
    from safetensors.torch import save_file

    from echodistill_cli.models.single_file import sd_checkpoint

    torch.manual_seed(0)
    device = torch.device("cpu")
    pair = random_pair("sd", "bf16", device, 512, folder / "words", decoder="full", teacher=False)
    parts = {"unet": pair.student.unet, "vae": pair.codec.encoder, "text_encoder": pair.encoder.encoders[0]}
    states = {name: module.state_dict() for name, module in parts.items()}
    states["unet"] = {name: value.to(pair.dtype) for name, value in states["unet"].items()}
    path = folder / "sd_turbo.safetensors"
    save_file({name: value.contiguous() for name, value in sd_checkpoint(**states).items()}, path)
    print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    config = build_config(str(path), overrides=_for_single_file(folder)).model
    found = load_pair(config, teacher=False)
    loaded = {"unet": found.student.unet, "vae": found.codec.encoder, "text_encoder": found.encoder.encoders[0]}
    for name, module in loaded.items():
        theirs = module.state_dict()
        assert theirs.keys() == states[name].keys(), name
        differing = [key for key, value in states[name].items() if not torch.equal(theirs[key].to(pair.dtype), value)]
        print(f"{name}: {len(theirs) - len(differing)} of {len(theirs)} tensors are the same", flush=True)
        if differing:
            raise SystemExit(f"{differing[0]} differs")


def _for_single_file(folder: Path) -> dict[str, Any]:
    return {
        "model.tokenizer": str(folder / "words"),
        "model.precision": "bf16",
        "model.device": "cpu",
        "model.offline": True,
    }


def main() -> None:
    """Read the options, name the machine, run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--family", nargs="+", choices=("sd", "sdxl"), default=["sd", "sdxl"])
    parser.add_argument("--design", nargs="+", choices=("lean", "reference"))
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--side", type=int, help="pixels; 256 on a CPU, 512 on a GPU")
    parser.add_argument("--steps", type=int, help="timed ones; 2 on a CPU, 10 on a GPU")
    parser.add_argument("--single-file", action="store_true")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.side = options.side or (512 if on_gpu else 256)
    options.steps = options.steps or (10 if on_gpu else 2)
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
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
