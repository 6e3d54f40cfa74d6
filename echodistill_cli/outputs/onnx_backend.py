"""Drawing with ONNX graphs on the CPU: the same sampler, with onnxruntime under each of its three parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from echodistill_cli.diffusion.pair import Denoiser, LatentCodec, ModelPair
from echodistill_cli.diffusion.schedule import NoiseSchedule
from echodistill_cli.diffusion.text import Conditioning, PromptEncoder
from echodistill_cli.errors import ModelError
from echodistill_cli.models.load import load_schedule
from echodistill_cli.outputs.onnx_export import GRAPH, SETTINGS_FILE, check_onnx


def load_onnx(folder: Path, *, threads: int | None = None) -> ModelPair:
    """A folder written by `onnx_export.save_onnx`, ready for `sampling.generate` as the student of a pair.

    Args:
        threads: of onnxruntime; None for its own choice.

    Raises:
        ConfigError: onnxruntime is missing. ModelError: it is no such folder, or it is damaged.
    """
    check_onnx("onnxruntime")
    settings = read_settings(folder)
    time_ids = settings["time_ids"]
    return ModelPair(
        family=settings["family"],
        encoder=_Encoder(folder, settings, threads),
        codec=_Codec(_Graph(folder / "vae_decoder", threads), settings),
        student=_Student(
            _Graph(folder / "unet", threads),
            load_schedule(folder / "scheduler"),
            None if time_ids is None else tuple(time_ids),
        ),
        teacher=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder of graphs says of itself.

    Raises:
        ModelError: it is no such folder, or it is damaged.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} holds no ONNX model.", "Write one of a run: echodistill export --format onnx"
        ) from error
    return settings


class _Graph:
    """One graph: tensors by name in, tensors out; a batch goes through it one by one."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import onnxruntime

        if not (folder / GRAPH).is_file():
            raise ModelError(f"{folder / GRAPH} is missing.", "Export the model again.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / GRAPH), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own classes share no other base
            raise ModelError(
                f"{folder / GRAPH} is damaged ({str(error).splitlines()[0]}).", "Export it again."
            ) from error

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        rows = [
            self.session.run(None, {name: value[index : index + 1].numpy() for name, value in inputs.items()})
            for index in range(len(next(iter(inputs.values()))))
        ]
        return [torch.cat([torch.from_numpy(output) for output in outputs]) for outputs in zip(*rows, strict=True)]


class _Encoder(PromptEncoder):
    def __init__(self, folder: Path, settings: dict[str, Any], threads: int | None) -> None:
        from transformers import CLIPTokenizer

        names = ("", "_2") if settings["family"] == "sdxl" else ("",)
        super().__init__([], [], zero_null=settings["zero_null"])
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / f"tokenizer{name}") for name in names]
        self.graphs = [_Graph(folder / f"text_encoder{name}", threads) for name in names]
        self.token_count = settings["token_count"]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """As `PromptEncoder.encode`."""
        wanted = {"padding": "max_length", "max_length": self.token_count, "truncation": True, "return_tensors": "pt"}
        ids = [tokenizer(list(prompts), **wanted).input_ids for tokenizer in self.tokenizers]
        outputs = [graph(input_ids=tokens) for graph, tokens in zip(self.graphs, ids, strict=True)]
        hidden = torch.cat([output[0] for output in outputs], dim=-1)
        if len(outputs) == 1:
            return Conditioning(hidden)
        keep = torch.tensor([float(prompt != "" or not self.zero_null) for prompt in prompts])
        return Conditioning(hidden * keep.view(-1, 1, 1), outputs[1][1] * keep.view(-1, 1))


class _Student(Denoiser):
    def __init__(self, graph: _Graph, schedule: NoiseSchedule, time_ids: tuple[int, ...] | None) -> None:
        super().__init__(graph, schedule, time_ids)

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Denoiser.__call__`."""
        added = {name: value.float() for name, value in (conditioning.added(self.time_ids) or {}).items()}
        hidden = conditioning.hidden
        return self.unet(sample=noisy, timestep=timesteps, encoder_hidden_states=hidden, **added)[0]  # type: ignore[no-any-return]


class _Codec(LatentCodec):
    def __init__(self, graph: _Graph, settings: dict[str, Any]) -> None:
        super().__init__(None, graph)
        self.settings = settings

    @property
    def factor(self) -> int:
        """As `LatentCodec.factor`."""
        return int(self.settings["pixels_per_latent"])

    @property
    def channels(self) -> int:
        """As `LatentCodec.channels`."""
        return int(self.settings["latent_channels"])

    def decode(self, latents: Tensor) -> Tensor:
        """As `LatentCodec.decode`."""
        return self.decoder(latent_sample=latents / self.settings["scaling_factor"])[0]  # type: ignore[no-any-return]
