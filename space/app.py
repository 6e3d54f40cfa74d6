"""A Space on ZeroGPU: type a prompt and see the subject of a LoRA, in one step.

Variables of the Space: LORA (hub repository or file; empty for the base model), BASE, PHRASE.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

LORA = os.environ.get("LORA", "")
BASE = os.environ.get("BASE", "stabilityai/sd-turbo")
PHRASE = os.environ.get("PHRASE", "sks dog")
PLACES = ("on the beach", "in the snow", "in the jungle", "on a purple rug")


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Borrow a GPU for each call on ZeroGPU; elsewhere change nothing."""
    try:
        import spaces
    except ImportError:
        return function
    borrowed: Callable[..., Any] = spaces.GPU(duration=15)(function)
    return borrowed


def lora_source(text: str) -> tuple[str, dict[str, str]]:
    """Return what diffusers loads: the hub repository, or the folder and the name of a file."""
    if text.endswith(".safetensors"):
        return str(Path(text).parent), {"weight_name": Path(text).name}
    return text, {}


@cache
def pipeline() -> Any:
    """Load the base model with the LoRA, once."""
    import torch
    from diffusers import AutoPipelineForText2Image, EulerDiscreteScheduler

    device = "cuda" if torch.cuda.is_available() or "SPACES_ZERO_GPU" in os.environ else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = AutoPipelineForText2Image.from_pretrained(BASE, dtype=dtype, use_safetensors=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if LORA:
        folder, options = lora_source(LORA)
        pipe.load_lora_weights(folder, **options)
    return pipe.to(device)


@on_gpu
def generate(prompt: str, seed: float, strength: float) -> Any:
    """Return one image; the same prompt, seed and strength give the same image."""
    import torch

    pipe = pipeline()
    if LORA:
        pipe.set_adapters(pipe.get_active_adapters(), strength)
    noise = torch.Generator("cpu").manual_seed(int(seed))
    return pipe(prompt, num_inference_steps=1, guidance_scale=0.0, generator=noise).images[0]


def build_page() -> Any:
    """Return the page."""
    import gradio as gr

    with gr.Blocks(title="echodistill") as page:
        gr.Markdown(f"# {PHRASE}\nOne step of `{BASE}`" + (f" with `{Path(LORA).name}`" if LORA else ""))
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(f"a photo of a {PHRASE} {PLACES[0]}", label="Prompt", autofocus=True)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                strength = gr.Slider(0, 1.5, 1, label="Strength", visible=bool(LORA))
                button = gr.Button("Generate", variant="primary")
                gr.Examples([f"a photo of a {PHRASE} {place}" for place in PLACES], prompt)
            image = gr.Image(label="Image", format="png")
        for event in (button.click, prompt.submit):
            event(generate, [prompt, seed, strength], image)
    return page


if __name__ == "__main__":
    if "SPACES_ZERO_GPU" in os.environ:
        pipeline()  # ZeroGPU wants weights loaded before the first GPU is borrowed
    build_page().launch()
