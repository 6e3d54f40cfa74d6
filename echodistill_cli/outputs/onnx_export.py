"""The one-step model as ONNX graphs, for people who draw on a CPU: text encoders, UNet and decoder.

    NAME-onnx/
      echodistill.json                  family, size, scaling and SDXL's six numbers
      tokenizer/ scheduler/             as diffusers has them; tokenizer_2/ for SDXL
      text_encoder/model.onnx           input_ids -> hidden states; text_encoder_2/ also the pooled ones
      unet/model.onnx                   sample, timestep, encoder_hidden_states (text_embeds, time_ids) -> out_sample
      vae_decoder/model.onnx            latent_sample (unscaled) -> picture in [-1, 1]

The names of folders and inputs are those of Hugging Face's optimum. A graph draws one picture of one size; it is
float32, which is what CPUs are fast in. Through torch's own exporter, which needs the packages onnx and onnxscript.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli import __version__
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import atomically
from echodistill_cli.models.load import ModelPair
from echodistill_cli.outputs.merge import trailing_scheduler

SETTINGS_FILE = "echodistill.json"
GRAPH = "model.onnx"


def check_onnx(*packages: str) -> None:
    """See that packages of the extra `onnx` are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"ONNX needs the package {name}.", "pip install 'echodistill[onnx]'")


def save_onnx(pair: ModelPair, folder: Path, size: int) -> None:
    """Write the student as ONNX graphs for pictures of one size.

    Args:
        pair: float32, with everything folded in. size: side in pixels.

    Raises:
        EchoDistillError: it cannot be written; an existing folder is replaced only when all is written.
    """
    check_onnx("onnx", "onnxscript")
    with atomically(folder) as temporary:
        for name, (module, inputs) in _graphs(pair, size).items():
            (temporary / name).mkdir(parents=True)
            _export(module, inputs, temporary / name / GRAPH)
        for name, tokenizer in zip(("tokenizer", "tokenizer_2"), pair.encoder.tokenizers, strict=False):
            tokenizer.save_pretrained(temporary / name)
        trailing_scheduler(pair, "student").save_pretrained(temporary / "scheduler")
        (temporary / SETTINGS_FILE).write_text(json.dumps(_settings(pair, size), indent=2) + "\n", encoding="utf-8")


def _settings(pair: ModelPair, size: int) -> dict[str, Any]:
    return {
        "version": __version__,
        "family": pair.family,
        "size": size,
        "scaling_factor": float(pair.codec.decoder.config.scaling_factor),
        "latent_channels": pair.codec.channels,
        "pixels_per_latent": pair.codec.factor,
        "token_count": pair.encoder.tokenizers[0].model_max_length,
        "zero_null": pair.encoder.zero_null,
        "time_ids": pair.student.time_ids,
    }


def _graphs(pair: ModelPair, size: int) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Each graph's module with an example of its inputs."""
    ids = [torch.zeros(1, tokenizer.model_max_length, dtype=torch.long) for tokenizer in pair.encoder.tokenizers]
    names = ("text_encoder", "text_encoder_2")
    graphs: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        name: (_Text(encoder, xl=pair.family == "sdxl"), {"input_ids": tokens})
        for name, encoder, tokens in zip(names, pair.encoder.encoders, ids, strict=False)
    }
    conditioning = pair.encoder.encode([""])
    side = size // pair.codec.factor
    latents = torch.zeros(1, pair.codec.channels, side, side)
    inputs = {
        "sample": latents,
        "timestep": torch.tensor([pair.student.schedule.last_timestep]),
        "encoder_hidden_states": conditioning.hidden.detach(),
    }
    added = conditioning.added(pair.student.time_ids) or {}
    inputs |= {name: value.detach().float() for name, value in added.items()}
    graphs["unet"] = (_Unet(pair.student.unet), inputs)
    graphs["vae_decoder"] = (_Decoder(pair.codec.decoder), {"latent_sample": latents})
    return graphs


class _Text(nn.Module):
    """A text encoder's hidden states, SDXL's second-last ones, and the pooled state where there is one."""

    def __init__(self, encoder: Any, *, xl: bool) -> None:
        super().__init__()
        self.encoder, self.xl = encoder, xl

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.encoder(input_ids, output_hidden_states=self.xl)
        if not self.xl:
            return (output.last_hidden_state,)
        pooled = getattr(output, "text_embeds", None)
        return (output.hidden_states[-2],) if pooled is None else (output.hidden_states[-2], pooled)


class _Unet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Any:
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Any:
        return self.vae.decode(latent_sample).sample


def _export(module: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    with torch.no_grad(), _silence():
        program = torch.onnx.export(module.eval(), (), kwargs=dict(inputs), dynamo=True, verbose=False)
        assert program is not None
        program.save(path, external_data=True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter tells of torchvision, which is not there, and of what it uses itself that torch is to drop."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
