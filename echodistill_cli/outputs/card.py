"""Model cards: for a run with its LoRA and previews, and for a whole model with a LoRA folded in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echodistill_cli import __version__
from echodistill_cli.config.build import config_hash
from echodistill_cli.config.schema import Config
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.files import is_path, last_part, public_name

_CARD = """\
---
{base_model}instance_prompt: {quoted_subject}
library_name: diffusers
pipeline_tag: text-to-image
tags: [text-to-image, lora, one-step, echodistill]
---

# {name}

A LoRA that generates *{subject}* with {linked_student}{together} in **one step**, trained on {photos} photos with
echodistill {version}.

![previews: with the token, and without it]({preview})

## Use it

| tool | how |
|---|---|
| echodistill | `echodistill sample --lora {file} --prompt "a photo of a {subject} on the beach"` |
| ComfyUI, A1111, Forge | put `{file}` into `models/Lora` (`models/loras` in ComfyUI); 1 step, CFG 1, {side} x {side} |
{distilled_row}{token_row}| diffusers | see below |

```python
import torch
from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler

pipe = AutoPipelineForText2Image.from_pretrained("{student}", torch_dtype=torch.float16).to("cuda")
pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
{lora_lines}{token_lines}
settings = {{"num_inference_steps": 1, "guidance_scale": 0.0, "height": {side}, "width": {side}}}
image = pipe("a photo of a {trigger} on the beach", **settings).images[0]
```

`teacher/` holds the LoRA of the multi-step teacher, {linked_teacher}: 25 steps, guidance {guidance:g}.

## How it was trained

{steps} steps{head_start} at {side} pixels, batch {batch}, rank {rank}, text side: {text}, seed {seed}.
Losses by weight: {losses}. Critics: {critics}. Echo phase: {echo}.
Configuration `{digest}`: see `config.toml`. Metrics of every step: see `metrics.jsonl`.
"""
_TOKEN_ROW = """\
| the token in these | put `{token}.safetensors` into `embeddings`; ComfyUI: write `embedding:{token}` in the prompt |
"""
_LORA_LINES = """\
pipe.load_lora_weights(".", weight_name="{file}")
"""
# The distillation LoRA, which makes the base a one-step model, is not part of the student's LoRA. Without it, the same
# lines generate noise.
_DISTILLED_ROW = """\
| all of these | load `{distilled}` too, which makes the base a one-step model; scale 1 for both LoRAs \
(echodistill finds it through `config.toml`) |
"""
_DISTILLED_LINES = """\
# {distilled}, in the same folder, makes the base a one-step model.
pipe.load_lora_weights(".", weight_name="{distilled}", adapter_name="one-step")
pipe.load_lora_weights(".", weight_name="{file}", adapter_name="subject")
pipe.set_adapters(["one-step", "subject"])
"""
_TOKEN_LINES = """\
# The token has a learned vector. diffusers loads it under a name that its tokenizer does not know yet.
pipe.load_textual_inversion("{token}.safetensors", token="<{token}>")
"""
# load_textual_inversion cannot read files with two vectors. And where a configuration has the old eos_token_id 2, as
# SDXL's has, transformers takes the highest id in a prompt for its end. The id of a new token is higher.
_SDXL_TOKEN_LINES = """\
# The token has a learned vector for each text encoder. diffusers loads them under a name that is new to it.
from safetensors.torch import load_file

vectors, token = load_file("{token}.safetensors"), "<{token}>"
first, second = (pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)
for key, (encoder, tokenizer) in {{"clip_l": first, "clip_g": second}}.items():
    pipe.load_textual_inversion(vectors[key], token=token, text_encoder=encoder, tokenizer=tokenizer)
# The id of the token is above that of the end of a prompt. Tell the second encoder the id of the end.
pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
"""
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

pipe = AutoPipelineForText2Image.from_pretrained(".", torch_dtype=torch.float16).to("cuda")
image = pipe("a photo of a {trigger} on the beach"{settings}).images[0]
```
"""


def model_card(config: Config, state: Mapping[str, Any], lora: Path, preview: str) -> str:
    """Return the README.md of a run folder.

    Args:
        config: of the run.
        state: of the training run, as in a checkpoint.
        lora: the student's LoRA file.
        preview: path of the last preview, relative to the card.
    """
    student = public_name(config.model.student)
    weights = {"latent": config.loss.latent, "identity": config.loss.identity}
    weights |= {"sliced Wasserstein": config.loss.sliced_wasserstein, "adversarial": config.loss.adversarial}
    card = _CARD.format(
        base_model=f"base_model: {student}\n" if _is_hub_id(config.model.student) else "",
        student=student,
        linked_student=_linked(config.model.student),
        linked_teacher=_linked(config.model.teacher),
        subject=config.subject,
        quoted_subject=json.dumps(config.subject, ensure_ascii=False),
        **_token_parts(config, str(state["family"])),
        **_lora_parts(config, lora.name),
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
        critics=", ".join(public_name(name) for name in config.critic.discriminators) or "none",
        echo=_echo(config, state),
        digest=config_hash(config)[:16],
    )
    return card if config.model.student_timestep is None else _at_timestep(card, config.model.student_timestep)


def _at_timestep(card: str, timestep: int) -> str:
    """Adapt a card to a student that starts from unit noise before the last timestep, as LCM's scheduler does."""
    for before, after in (
        ("EulerDiscreteScheduler", "LCMScheduler"),
        (', timestep_spacing="trailing")', ")"),
        ('"num_inference_steps": 1', f'"timesteps": [{timestep}]'),
        ("; 1 step, CFG 1,", f"; 1 step of LCM from timestep {timestep}, CFG 1,"),
    ):
        card = card.replace(before, after)
    return card


def merged_card(name: str, role: Role, model: str, header: Mapping[str, str]) -> str:
    """Return the README.md of a diffusers folder with a LoRA folded in.

    Args:
        name: of the folder.
        role: of the model.
        model: hub id, folder or file that the LoRA was folded into.
        header: of the LoRA file; the card shows the trigger phrase and the usage hint if it has them.
    """
    labels = {"Subject": "modelspec.trigger_phrase", "Use with": "modelspec.usage_hint"}
    facts = [f"{label}: {header[key]}.  \n" for label, key in labels.items() if header.get(key)]
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


def _token_parts(config: Config, family: str) -> dict[str, str]:
    """Return the parts about the token: how to write it in diffusers' prompts, and where its file belongs."""
    token = config.concept.token
    if config.text.form != "token":
        return {"trigger": config.subject, "token_row": "", "token_lines": ""}
    lines = _SDXL_TOKEN_LINES if family == "sdxl" else _TOKEN_LINES
    return {
        "trigger": config.subject.replace(token, f"<{token}>", 1),
        "token_row": _TOKEN_ROW.format(token=token),
        "token_lines": lines.format(token=token),
    }


def _lora_parts(config: Config, file: str) -> dict[str, str]:
    """Return the parts about the student's LoRA and the distillation LoRA, if there is one."""
    if config.model.student_lora is None:
        return {"together": "", "distilled_row": "", "lora_lines": _LORA_LINES.format(file=file)}
    distilled = last_part(config.model.student_lora)
    return {
        "together": f" and `{distilled}`",
        "distilled_row": _DISTILLED_ROW.format(distilled=distilled),
        "lora_lines": _DISTILLED_LINES.format(file=file, distilled=distilled),
    }


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
    count = len(state["pool"]["prompts"]) if state["pool"] else 0
    carry_back = (
        f"; then {steps} steps of the teacher alone, starting from the student's LoRA" if steps and count else ""
    )
    return f"from step {start}, {count or 'no'} {'image' if count == 1 else 'images'} kept at the end{carry_back}"


def _linked(source: str) -> str:
    return f"[{source}](https://huggingface.co/{source})" if _is_hub_id(source) else public_name(source)


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not is_path(source)
