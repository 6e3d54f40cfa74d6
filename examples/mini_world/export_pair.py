"""`python -m examples.mini_world.export_pair OUTPUT`: what was trained, averaged weights in half precision.

The student's folder opens with `StableDiffusionPipeline.from_pretrained(OUTPUT, safety_checker=None)`. The teacher's
holds its UNet and its scheduler alone: text encoder, tokenizer and VAE are the student's. Weights are bfloat16, which
a wheel compresses further than float16. Precision is checked here: an image that the written weights generate must
agree with one of the training weights. With `--part student`, or `identity`, `backbone-clip`, `backbone-vit`,
`judge-0`, another network is written instead.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from examples.mini_world.encoders import ViTStage, build_clip, build_clip_vision
from examples.mini_world.judges import Judge, judge_labels, judge_world
from examples.mini_world.latents import load_vae
from examples.mini_world.models import build_scheduler, build_text_encoder, build_unet
from examples.mini_world.nouns import SOURCES, chosen_nouns, noun_words
from examples.mini_world.runner import load_average
from examples.mini_world.sprites import default_work_directory
from examples.mini_world.tokenizer import open_tokenizer
from examples.mini_world.world import SIDE, open_world

MAX_MEGABYTES = 25.0
# What the student's folder has for both.
SHARED = ("text_encoder", "tokenizer", "vae", "model_index.json")


def teacher_pipeline(work: Path) -> tuple[StableDiffusionPipeline, int]:
    """The trained teacher with averaged weights in float32, and the number of samples it has seen."""
    tokenizer = open_tokenizer(work)
    network = nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    samples = load_average(work / "teacher" / "checkpoint.pt", network)
    pipeline = StableDiffusionPipeline(
        vae=load_vae(work),
        text_encoder=network["text_encoder"].eval(),
        tokenizer=tokenizer,
        unet=network["unet"].eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, samples


def student_pipeline(work: Path) -> tuple[StableDiffusionPipeline, int]:
    """The trained student on the teacher's text encoder and VAE, in float32; and the samples it has seen."""
    pipeline, _ = teacher_pipeline(work)
    checkpoints = [work / stage / "checkpoint.pt" for stage in ("matched", "student")]
    last = next(path for path in checkpoints if path.exists())
    state = torch.load(last, map_location="cpu", weights_only=True)
    weights = {**state["network"], **state["average"]}
    own = {name.removeprefix("unet."): tensor for name, tensor in weights.items() if name.startswith("unet.")}
    pipeline.unet.load_state_dict(own)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(build_scheduler().config, timestep_spacing="trailing")
    return pipeline, int(state["samples"])


def _picture(pipeline: StableDiffusionPipeline, role: str) -> torch.Tensor:
    """One fixed image, (64, 64, 3) in 0..1: the teacher's in 15 steps, the student's in one."""
    generator = torch.Generator().manual_seed(0)
    steps, guidance = (15, 3.0) if role == "teacher" else (1, 0.0)
    drawn = pipeline("a photo of a frog on the beach", num_inference_steps=steps, guidance_scale=guidance,
                     generator=generator, output_type="np")  # fmt: skip
    return torch.from_numpy(drawn.images[0])


def export_role(work: Path, output: Path, nouns: int, role: str) -> dict[str, object]:
    """Write the folder under a temporary name, check it, rename it; returns its card."""
    if output.exists():
        raise FileExistsError(f"{output} exists; name another folder or delete it first")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline, samples = teacher_pipeline(work) if role == "teacher" else student_pipeline(work)
    expected = _picture(pipeline, role)
    pipeline.to(dtype=torch.bfloat16).save_pretrained(partial)
    # diffusers opens a folder in float32 unless told otherwise, transformers as its configuration says: let them agree.
    settings = partial / "text_encoder" / "config.json"
    settings.write_text(settings.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    reloaded = StableDiffusionPipeline.from_pretrained(partial, safety_checker=None, dtype=torch.float32)
    reloaded.set_progress_bar_config(disable=True)
    difference = float((_picture(reloaded, role) - expected).abs().mean())
    for name in SHARED if role == "teacher" else ():
        shutil.rmtree(partial / name) if (partial / name).is_dir() else (partial / name).unlink()
    megabytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) / 1e6
    if difference > 0.02 or megabytes > MAX_MEGABYTES:
        raise RuntimeError(f"not exported: mean difference {difference:.4f}, {megabytes:.1f} MB in {partial}")
    trained_on = [source for source in SOURCES if not source.held_out]
    card = {
        "role": role,
        "samples": samples,
        "nouns": [noun_words(noun) for noun in chosen_nouns(nouns)],
        "sources": [f"{source.package}@{source.version} ({source.license})" for source in trained_on],
        "mean_difference_bf16": round(difference, 5),
        "megabytes": round(megabytes, 2),
    }  # fmt: skip
    (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    partial.rename(output)
    return card


def _looking_network(work: Path, part: str, nouns: int) -> tuple[nn.Module, int, dict[str, object]]:
    """A trained encoder or judge in float32, the samples it has seen, and what its outputs mean."""
    if part.startswith("judge-"):
        labels = judge_labels(judge_world(work, nouns))
        judge = Judge(labels)
        return judge, load_average(work / part / "checkpoint.pt", judge), {"labels": labels}
    if part == "backbone-vit":
        stage = ViTStage(open_world(work, 0), "cpu")
        samples = load_average(work / part / "checkpoint.pt", stage.network)
        return stage.network.get_submodule("body"), samples, {"feature": "last_hidden_state[:, 0]"}
    if part == "backbone-clip":
        whole = build_clip(open_tokenizer(work))
        return whole, load_average(work / part / "checkpoint.pt", whole), {"feature": "image_embeds, text_embeds"}
    clip = build_clip_vision()
    return clip, load_average(work / part / "checkpoint.pt", clip), {"feature": "image_embeds"}


def export_looking_network(work: Path, output: Path, part: str, nouns: int) -> dict[str, object]:
    """Write an encoder (transformers folder) or a judge (`model.safetensors`, labels in `card.json`)."""
    if output.exists():
        raise FileExistsError(f"{output} exists; name another folder or delete it first")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    network, samples, meaning = _looking_network(work, part, nouns)
    network = network.eval().bfloat16()
    if isinstance(network, PreTrainedModel):
        network.save_pretrained(partial)
        kind = "ViTImageProcessor" if part == "backbone-vit" else "CLIPImageProcessor"
        normalization = {"image_processor_type": kind, "do_center_crop": False, "resample": 3,
                         "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "do_rescale": True,
                         "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
        (partial / "preprocessor_config.json").write_text(json.dumps(normalization, indent=2) + "\n")
        if part == "backbone-clip":
            open_tokenizer(work).save_pretrained(partial)
    else:
        save_file(network.state_dict(), partial / "model.safetensors")
    card = {"role": part, "samples": samples, "input": "(batch, 3, 64, 64) in -1..1", **meaning}
    (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    partial.rename(output)
    return card


def main(arguments: list[str] | None = None) -> None:
    """Export and print the card."""
    parser = argparse.ArgumentParser(prog="python -m examples.mini_world.export_pair", description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path, default=default_work_directory())
    parser.add_argument("--nouns", type=int, default=12)
    parser.add_argument(
        "--part", default="teacher", help="teacher, student, identity, backbone-clip, backbone-vit, judge-N"
    )
    options = parser.parse_args(arguments)
    if options.part in ("teacher", "student"):
        card = export_role(options.work, options.output, options.nouns, options.part)
    else:
        card = export_looking_network(options.work, options.output, options.part, options.nouns)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
