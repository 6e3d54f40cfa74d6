"""A workflow for ComfyUI beside a student's LoRA file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echodistill_cli.config.distilled import is_trailing, student_sampler, student_steps
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.files import last_part, write_text
from echodistill_cli.lora.header import sidecar_paths
from echodistill_cli.models.sources import is_embedded

# The files in which the published models are offered for user interfaces.
_CHECKPOINTS = {"sd-turbo": "sd_turbo", "sdxl-turbo": "sd_xl_turbo_1.0_fp16"}


def write_workflow(config: Config, lora: Path, header: Mapping[str, str]) -> None:
    """Write a workflow for ComfyUI beside a student's LoRA file, if ComfyUI can sample the student.

    Args:
        config: of the run.
        lora: path of the LoRA file.
        header: of the LoRA file.

    Raises:
        EchoDistillError: the file cannot be written.
    """
    if workflow := comfyui_workflow(config, lora.name, header.get("modelspec.prediction_type", "epsilon")):
        write_text(sidecar_paths(lora)[2], json.dumps(workflow, indent=2) + "\n")


def comfyui_workflow(config: Config, lora: str, prediction: str = "epsilon") -> dict[str, Any] | None:
    """Return a workflow for ComfyUI, in its API format, that generates one image with a student's LoRA.

    Args:
        config: of the run.
        lora: name of the LoRA file.
        prediction: what the student predicts, as the header of its LoRA says it: epsilon, v or sample.

    Returns:
        None for a student that these nodes do not sample: the toy, a transformer, or one with timesteps of its own.
    """
    if is_embedded(config.model.student) or not is_trailing(config.model) or prediction == "flow":
        return None
    name = last_part(config.model.student).removesuffix(".safetensors")
    token, subject = config.concept.token, config.subject
    if config.text.form == "token":
        subject = subject.replace(token, f"embedding:{token}", 1)
    nodes: dict[str, tuple[str, Mapping[str, Any]]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": f"{_CHECKPOINTS.get(name, name)}.safetensors"})
    }
    model: list[str | int] = ["1", 0]
    clip: list[str | int] = ["1", 1]
    for file in filter(None, (config.model.student_lora, lora)):
        inputs = {"model": model, "clip": clip, "lora_name": last_part(file)}
        number = str(len(nodes) + 1)
        nodes[number] = ("LoraLoader", inputs | {"strength_model": 1.0, "strength_clip": 1.0})
        model, clip = [number, 0], [number, 1]
    if sampling := {"v": "v_prediction", "sample": "x0"}.get(prediction):
        number = str(len(nodes) + 1)
        nodes[number] = ("ModelSamplingDiscrete", {"model": model, "sampling": sampling, "zsnr": False})
        model = [number, 0]
    nodes |= _sampling_nodes(model, clip, f"a photo of a {subject} on the beach", config.model, lora)
    return {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}


def _sampling_nodes(
    model: list[str | int], clip: list[str | int], prompt: str, settings: ModelConfig, lora: str
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return the nodes behind the loaders: prompts, the student's steps, and the image."""
    side, steps = settings.resolution, {"model": model, "steps": student_steps(settings), "denoise": 1.0}
    # SDTurboScheduler's second step would be at 899; "sgm_uniform" is trailing spacing.
    schedule = ("SDTurboScheduler", steps)
    if student_steps(settings) > 1:
        schedule = ("BasicScheduler", steps | {"scheduler": "sgm_uniform"})
    links = {"positive": ["10", 0], "negative": ["11", 0], "sampler": ["14", 0], "sigmas": ["13", 0]}
    sampler = {"model": model, "add_noise": True, "noise_seed": 0, "cfg": 1.0, "latent_image": ["12", 0], **links}
    return {
        "10": ("CLIPTextEncode", {"clip": clip, "text": prompt}),
        "11": ("CLIPTextEncode", {"clip": clip, "text": ""}),
        "12": ("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}),
        "13": schedule,
        "14": ("KSamplerSelect", {"sampler_name": "lcm" if student_sampler(settings) == "lcm" else "euler"}),
        "15": ("SamplerCustom", sampler),
        "16": ("VAEDecode", {"samples": ["15", 0], "vae": ["1", 2]}),
        "17": ("SaveImage", {"images": ["16", 0], "filename_prefix": Path(lora).stem}),
    }
