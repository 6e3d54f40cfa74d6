"""Model cards: of a run with its LoRA and pictures, and of a whole model that a LoRA was folded into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echodistill_cli import __version__
from echodistill_cli.config import Config
from echodistill_cli.models import Role
from echodistill_cli.presets import config_hash

_CARD = """\
---
{base_model}instance_prompt: {quoted_subject}
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, lora, one-step, echodistill]
---

# {name}

A LoRA that draws *{subject}* with {linked_student} in **one step**, learned from {photos} photos with echodistill
{version}.

![previews: with the word, and without it]({preview})

## Use it

| tool | how |
|---|---|
| echodistill | `echodistill sample --lora {file} --prompt "a photo of a {subject} on the beach"` |
| ComfyUI, A1111, Forge | put `{file}` into `models/Lora` (`models/loras` in ComfyUI); 1 step, CFG 1, {side} x {side} |
{token_row}| diffusers | see below |

```python
import torch
from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler

pipe = AutoPipelineForText2Image.from_pretrained("{student}", torch_dtype=torch.float16).to("cuda")
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
pipe.load_lora_weights(".", weight_name="{file}")
{token_lines}image = pipe("a photo of a {trigger} on the beach", num_inference_steps=1, guidance_scale=0.0).images[0]
```

`teacher/` holds the LoRA of its multi-step teacher, {linked_teacher}: 25 steps, guidance {guidance:g}.

## How it was made

{steps} steps{head_start} at {side} pixels, batch {batch}, rank {rank}, text side: {text}, seed {seed}.
Losses by weight: {losses}. Critics: {critics}. Echo phase: {echo}.
Configuration `{digest}`; all of it is in `config.toml`, every step in `metrics.jsonl`.
"""

_TOKEN_ROW = """\
| the word in these | put `{token}.safetensors` into `embeddings`; ComfyUI wants `embedding:{token}` in the prompt |
"""

_TOKEN_LINES = """\
# The word has a learned vector. diffusers takes it under a word that its tokenizer does not know yet.
pipe.load_textual_inversion("{token}.safetensors", token="<{token}>")
"""

_MERGED = """\
---
{base_model}library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, {kind}, echodistill]
---

# {name}

{linked_model} with a LoRA folded in by echodistill {version}; nothing has to be attached.
{facts}
```python
import torch
from diffusers import AutoPipelineForText2Image

pipe = AutoPipelineForText2Image.from_pretrained(".", torch_dtype=torch.float16).to("cuda")
image = pipe("a photo of a {trigger} on the beach"{settings}).images[0]
```
"""


def model_card(config: Config, state: Mapping[str, Any], lora: Path, preview: str) -> str:
    """The run folder's README.md.

    Args:
        state: `TrainingState.state_dict()`. lora: the student's LoRA file. preview: its picture, relative to the card.
    """
    learned, token = config.text.form == "token", config.concept.token
    trigger = config.subject.replace(token, f"<{token}>", 1) if learned else config.subject
    student = _public_name(config.model.student)
    weights = {"latent": config.loss.latent, "identity": config.loss.identity}
    weights |= {"sliced Wasserstein": config.loss.sliced_wasserstein, "adversarial": config.loss.adversarial}
    return _CARD.format(
        base_model=f"base_model: {student}\n" if _is_hub_id(config.model.student) else "",
        student=student,
        linked_student=_linked(config.model.student),
        linked_teacher=_linked(config.model.teacher),
        subject=config.subject,
        quoted_subject=json.dumps(config.subject, ensure_ascii=False),
        trigger=trigger,
        token_row=_TOKEN_ROW.format(token=token) if learned else "",
        token_lines=_TOKEN_LINES.format(token=token) if learned else "",
        name=config.name,
        photos=state["photo_count"],
        version=__version__,
        preview=preview,
        file=lora.name,
        side=config.model.resolution,
        guidance=config.train.guidance_scale,
        steps=state["step"],
        head_start=f", after {alone} of the teacher alone," if (alone := state["head_start_step"]) else "",
        batch=config.train.batch_size,
        rank=config.adapter.rank,
        text=_text_side(config),
        seed=config.run.seed,
        losses=", ".join(f"{name} {weight:g}" for name, weight in weights.items()),
        critics=", ".join(_public_name(name) for name in config.critic.discriminators) or "none",
        echo=_echo(config, state),
        digest=config_hash(config)[:16],
    )


def merged_card(name: str, role: Role, model: str, header: Mapping[str, str]) -> str:
    """The README.md of a diffusers folder.

    Args:
        model: hub id, folder or file that the LoRA was folded into. header: of that LoRA; its words and how to draw
            with it are told where it has them.
    """
    said = {"Subject": "modelspec.trigger_phrase", "Draw with": "modelspec.usage_hint"}
    facts = [f"{what}: {header[key]}.  \n" for what, key in said.items() if header.get(key)]
    student = role == "student"
    return _MERGED.format(
        base_model=f"base_model: {model}\n" if _is_hub_id(model) else "",
        kind="one-step" if student else "multi-step",
        name=name,
        linked_model=_linked(model),
        version=__version__,
        facts="".join(["\n", *facts]) if facts else "",
        trigger=header.get("modelspec.trigger_phrase", "..."),
        settings=", num_inference_steps=1, guidance_scale=0.0" if student else ", num_inference_steps=25",
    )


def _text_side(config: Config) -> str:
    if config.text.form == "frozen":
        return "frozen"
    by = "teacher and student" if config.text.trained_by == "both" else "the teacher"
    return f"{config.text.form}, trained by {by}"


def _echo(config: Config, state: Mapping[str, Any]) -> str:
    start, steps = config.echo.start, config.echo.carry_back
    if start is None:
        return "off"
    if state["step"] < start:
        return f"not reached (it starts at step {start})"
    kept = len(state["pool"]["prompts"]) if state["pool"] else 0
    back = f"; then {steps} steps of the teacher alone, begun with the student's LoRA" if steps and kept else ""
    return f"from step {start}, {kept or 'no'} {'picture' if kept == 1 else 'pictures'} kept at the end{back}"


def _linked(source: str) -> str:
    return f"[{source}](https://huggingface.co/{source})" if _is_hub_id(source) else _public_name(source)


def _public_name(source: str) -> str:
    """A hub id as it is; of a path on this machine, only the last part."""
    return source if _is_hub_id(source) else Path(source).name


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).exists()
