"""The model card of a base model with a LoRA folded in."""

from __future__ import annotations

import re
from collections.abc import Mapping

from echodistill_cli import __version__
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.outputs.card import FLOW_SETTINGS, hub_id, linked, python_prompt

# In a usage hint such as "25 steps, guidance 4.5, 512x512".
_GUIDANCE, _SQUARE = re.compile(r"\bguidance (\d+(?:\.\d+)?)\b"), re.compile(r"\b(\d+)x\1\b")
_MERGED = """\
---
{base_model}library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, {kind}, echodistill]
---

# {name}

{linked_model} with a LoRA folded in by echodistill {version}. Load nothing else.
{facts}
```python
import torch
from diffusers import AutoPipelineForText2Image

# On a CPU: torch_dtype=torch.float32, and without .to("cuda").
pipe = AutoPipelineForText2Image.from_pretrained(".", torch_dtype=torch.float16).to("cuda")
image = pipe({prompt}{settings}).images[0]
```
"""


def merged_card(name: str, role: Role, model: str, header: Mapping[str, str]) -> str:
    """Return the README.md of a diffusers folder with a LoRA folded in.

    Args:
        name: of the folder.
        role: of the model.
        model: hub id, folder or file that the LoRA was folded into.
        header: of the LoRA file; the card shows the trigger phrase and the usage hint if it has them.
    """
    labels = (("Subject", "modelspec.trigger_phrase"), ("Use with", "modelspec.usage_hint"))
    facts = [f"{label}: {header[key]}.  \n" for label, key in labels if header.get(key)]
    few = "," in header.get("echodistill.student_timesteps", "")
    flow = {"sana": "sana", "flux-2-klein": "flux2"}.get(header.get("ss_base_model_version", ""))
    card = _MERGED.replace("AutoPipelineForText2Image", "DiffusionPipeline") if flow else _MERGED
    return card.format(
        base_model=f"base_model: {base}\n" if (base := hub_id(model)) else "",
        kind="multi-step" if role == "teacher" else "few-step" if few else "one-step",
        name=name,
        linked_model=linked(model),
        version=__version__,
        facts="".join(["\n", *facts]) if facts else "",
        prompt=python_prompt(header.get("modelspec.trigger_phrase", "...")),
        settings=_merged_settings(role, header, flow),
    )


def _merged_settings(role: Role, header: Mapping[str, str], flow: str | None) -> str:
    """Return the arguments of a merged model's pipeline, with which it generates what `sample` does."""
    hint = header.get("modelspec.usage_hint", "")
    # Unless they are said, diffusers takes guidance 7.5 and the size of the base model.
    size = "".join(f", height={side}, width={side}" for side in _SQUARE.findall(hint)[:1])
    if role == "teacher":
        guidance = "".join(f", guidance_scale={scale}" for scale in _GUIDANCE.findall(hint)[:1])
        return f", num_inference_steps=25{guidance}{size}"
    timesteps = header.get("echodistill.student_timesteps", "").split(",")
    if flow:
        return f", num_inference_steps={len(timesteps)}, {FLOW_SETTINGS[flow].replace(': ', '=').replace(chr(34), '')}"
    # diffusers' DDIM takes no timesteps; the folder's own scheduler has them.
    exact = len(timesteps) > 1 and header.get("echodistill.student_sampler") != "ddim"
    steps = f"timesteps=[{', '.join(timesteps)}]" if exact else f"num_inference_steps={len(timesteps)}"
    return f", {steps}, guidance_scale=0.0{size}"
