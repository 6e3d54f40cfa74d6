"""Write the one-step model as ONNX graphs, which are fast on a CPU, and generate with them.

    NAME-onnx/
      echodistill.json                  family, size, scaling factor and SDXL's six time ids
      model_index.json                  and a config.json per graph, in diffusers' format
      tokenizer/ scheduler/             in diffusers' format; tokenizer_2/ for SDXL
      text_encoder/model.onnx           input_ids -> last_hidden_state; text_encoder_2/ also text_embeds
      unet/model.onnx                   sample, timestep, encoder_hidden_states (text_embeds, time_ids) -> out_sample
      vae_decoder/model.onnx            latent_sample (unscaled) -> sample, an image in [-1, 1]

Folders, inputs and outputs of SD's graphs are named as Hugging Face's optimum names them. SDXL's text encoders differ:
they return the second to last hidden state, which optimum expects beside all others. optimum's own pipelines were not
tried on this folder: they need transformers 4. A graph takes one image of one size, in float32, which CPUs compute
fastest. torch's own exporter writes it and needs the packages onnx and onnxscript.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from echodistill_cli import __version__
from echodistill_cli.config.families import read_json, reading
from echodistill_cli.diffusion.pair import Denoiser, LatentCodec, ModelPair
from echodistill_cli.diffusion.text import Conditioning, PromptEncoder
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.files import atomically
from echodistill_cli.models.parts import load_schedule
from echodistill_cli.outputs.apply import plain_pipeline
from echodistill_cli.outputs.hub import make_portable

SETTINGS_FILE = "echodistill.json"
GRAPH = "model.onnx"
_FIELDS: dict[str, Any] = {  # of the settings, that must be there
    "family": str, "size": int, "scaling_factor": float, "latent_channels": int, "pixels_per_latent": int,
    "token_count": int, "zero_null": bool, "time_ids": list | None,
}  # fmt: skip
_AGAIN = "Export it again: echodistill export RUN --format onnx --overwrite"
_OUTPUTS = {
    "text_encoder": ("last_hidden_state",),
    "text_encoder_2": ("last_hidden_state", "text_embeds"),
    "unet": ("out_sample",),
    "vae_decoder": ("sample",),
}


def check_onnx(*packages: str) -> None:
    """Check that packages of the extra `onnx` are installed.

    Raises:
        ConfigError: a package is missing.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"ONNX needs the package {name}.", "Install the extra: pip install '.[onnx]'")


def save_onnx(pair: ModelPair, folder: Path, size: int) -> None:
    """Write the student as ONNX graphs for images of one size, atomically.

    Args:
        pair: models in float32, with everything folded in.
        folder: to write; an existing one is replaced.
        size: side of the images in pixels.

    Raises:
        ConfigError: a package is missing.
        EchoDistillError: the folder cannot be written.
    """
    check_onnx("onnx", "onnxscript")
    with atomically(folder) as temporary:
        for name, (module, inputs) in _graphs(pair, size).items():
            (temporary / name).mkdir(parents=True)
            _export(module, inputs, _OUTPUTS[name], temporary / name / GRAPH)
        for name, tokenizer in zip(("tokenizer", "tokenizer_2"), pair.encoder.tokenizers, strict=False):
            tokenizer.save_pretrained(temporary / name)
        _save_configs(pair, temporary)
        make_portable(temporary)
        (temporary / SETTINGS_FILE).write_text(
            json.dumps(_graph_settings(pair, size), indent=2) + "\n", encoding="utf-8"
        )


def _save_configs(pair: ModelPair, folder: Path) -> None:
    """Write the configuration of the pipeline and of each graph."""
    pipeline = plain_pipeline(pair, "student")
    pipeline.save_config(folder)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.unet.save_config(folder / "unet")
    pair.codec.decoder.save_config(folder / "vae_decoder")
    for name, encoder in zip(("text_encoder", "text_encoder_2"), pair.encoder.encoders, strict=False):
        encoder.config.save_pretrained(folder / name)


def _graph_settings(pair: ModelPair, size: int) -> dict[str, Any]:
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
        "student_timesteps": pair.student.timesteps,
        "student_sampler": pair.student.sampler,
    }


def _graphs(pair: ModelPair, size: int) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Return the module and example inputs of each graph by the name of its folder."""
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
        "timestep": torch.tensor([pair.student.first_timestep]),
        "encoder_hidden_states": conditioning.hidden.detach(),
    }
    added = conditioning.added(pair.student.time_ids) or {}
    inputs |= {name: value.detach().float() for name, value in added.items()}
    graphs["unet"] = (_Unet(pair.student.unet), inputs)
    graphs["vae_decoder"] = (_Decoder(pair.codec.decoder), {"latent_sample": latents})
    return graphs


class _Text(nn.Module):
    """Module that returns a text encoder's hidden states (SDXL: penultimate) and pooled state, if any."""

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


def _export(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    with torch.no_grad(), _silence():
        program = torch.onnx.export(
            module.eval(), (), kwargs=dict(inputs), output_names=outputs, dynamo=True, verbose=False
        )
        assert program is not None
        _remove_traces(program.model)
        program.save(path, external_data=True)


def _remove_traces(model: Any) -> None:
    """Remove the exporter's notes from a graph: they hold stack traces with paths of this machine."""
    functions = list(model.functions.values())
    for graph in (model.graph, *functions):
        nodes = list(graph.all_nodes())
        values = [value for node in nodes for value in node.outputs]
        for part in (graph, *nodes, *values, *graph.inputs, *getattr(graph, "initializers", {}).values()):
            part.metadata_props.clear()
            part.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Context that hides the exporter's warnings about torchvision and about deprecated parts of torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def load_onnx(folder: Path, *, threads: int | None = None) -> ModelPair:
    """Load a folder that `save_onnx` wrote, as the student of a pair for `diffusion.sampling.generate`.

    Args:
        folder: of the graphs.
        threads: number for onnxruntime; None for its default.

    Raises:
        ConfigError: onnxruntime is missing.
        ModelError: the folder is not an ONNX model of echodistill, or is damaged.
    """
    check_onnx("onnxruntime")
    settings = read_settings(folder)
    time_ids, old = settings["time_ids"], settings.get("student_timestep")  # of older versions: None or one timestep
    with reading(folder, _AGAIN):
        return ModelPair(
            family=settings["family"],
            encoder=_Encoder(folder, settings, threads),
            codec=_Codec(_Graph(folder / "vae_decoder", threads), settings),
            student=_Student(
                _Graph(folder / "unet", threads),
                load_schedule(folder / "scheduler"),
                None if time_ids is None else tuple(time_ids),
                tuple(settings.get("student_timesteps", [old] if old else [])),
                settings.get("student_sampler", "ddim" if old else "euler"),
            ),
            loaded_teacher=None,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's echodistill.json.

    Raises:
        ModelError: the folder is not an ONNX model of echodistill, or is damaged.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise ModelError(f"{folder} holds no ONNX model.", "Write one: echodistill export RUN --format onnx")
    settings = read_json(file)
    if wrong := next((name for name, kind in _FIELDS.items() if not isinstance(settings.get(name), kind)), None):
        raise ModelError(f"{file}: {wrong} is missing, or of a wrong type.", _AGAIN)
    return settings


class _Graph:
    """An ONNX graph: takes tensors by name and returns tensors. Runs the rows of a batch one by one."""

    def __init__(self, folder: Path, threads: int | None) -> None:
        import onnxruntime

        if not (folder / GRAPH).is_file():
            raise ModelError(f"{folder / GRAPH} is missing.", _AGAIN)
        self.file = folder / GRAPH
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / GRAPH), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the classes of onnxruntime's errors have no other common base
            raise ModelError(f"{folder / GRAPH} is damaged ({str(error).splitlines()[0]}).", _AGAIN) from error

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        with reading(self.file, _AGAIN):  # a graph of another model takes other inputs
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
        """Encode prompts; see `PromptEncoder.encode`."""
        options = {"padding": "max_length", "max_length": self.token_count, "truncation": True, "return_tensors": "pt"}
        ids = [tokenizer(list(prompts), **options).input_ids for tokenizer in self.tokenizers]
        outputs = [graph(input_ids=tokens) for graph, tokens in zip(self.graphs, ids, strict=True)]
        hidden = torch.cat([output[0] for output in outputs], dim=-1)
        if len(outputs) == 1:
            return Conditioning(hidden)
        keep = torch.tensor([float(prompt != "" or not self.zero_null) for prompt in prompts])
        return Conditioning(hidden * keep.view(-1, 1, 1), outputs[1][1] * keep.view(-1, 1))


class _Student(Denoiser):
    @property
    def input_dtype(self) -> torch.dtype:
        """The graphs read float32."""
        return torch.float32

    def __call__(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict; see `Denoiser.__call__`."""
        added = {name: value.float() for name, value in (conditioning.added(self.time_ids) or {}).items()}
        hidden = conditioning.hidden
        return self.unet(sample=noisy, timestep=timesteps, encoder_hidden_states=hidden, **added)[0]  # type: ignore[no-any-return]


class _Codec(LatentCodec):
    def __init__(self, graph: _Graph, settings: dict[str, Any]) -> None:
        super().__init__(None, graph)
        self.settings = settings

    @property
    def factor(self) -> int:
        """Pixels per latent; see `LatentCodec.factor`."""
        return int(self.settings["pixels_per_latent"])

    @property
    def channels(self) -> int:
        """Channels of a latent; see `LatentCodec.channels`."""
        return int(self.settings["latent_channels"])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents; see `LatentCodec.decode`."""
        return self.decoder(latent_sample=latents / self.settings["scaling_factor"])[0]  # type: ignore[no-any-return]
