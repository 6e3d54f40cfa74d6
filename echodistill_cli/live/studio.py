"""One set of base weights in memory and any number of subjects over it, drawn as `sample` does.

Each subject is a fork: modules of its own over the base model's tensors, with its LoRA. Its strength is a number in
each LoRA layer, so that moving the slider loads nothing.
"""

from __future__ import annotations

import copy
import gc
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.data.images import to_image
from echodistill_cli.diffusion.pair import ModelPair, Role
from echodistill_cli.diffusion.sampling import SamplingSettings, generate
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.models.adapters import ADAPTER, lora_layers
from echodistill_cli.models.device import free_gib
from echodistill_cli.models.load import load_pair
from echodistill_cli.outputs.artifact import changed_models
from echodistill_cli.outputs.onnx import SETTINGS_FILE
from echodistill_cli.outputs.requests import SampleRequest, prompt_notes
from echodistill_cli.outputs.sample import Generator, attach, load_graphs, load_models, texts_of
from echodistill_cli.runs import OnMessage

_MOST_FORKS = 4  # a fork has modules of its own; the oldest goes first
# Settings of a model pair that the student's images do not depend on.
_OF_THE_TEACHER = {
    "teacher": "",
    "teacher_revision": None,
    "teacher_single_file_config": None,
    "teacher_prediction": "auto",
    "teacher_original_size": None,
    "offload": False,
}


@dataclass(frozen=True)
class Wish:
    """An image that a person wants to see.

    Attributes:
        lora: run folder or LoRA file; None for the base model.
        prompt: what it shows.
        strength: scale of the LoRA, 0 to 2; 0 is the base model.
        seed: of the noise.
        steps: denoising steps; 0 for those that the student was distilled for.
    """

    lora: Path | None
    prompt: str
    strength: float = 1.0
    seed: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Drawing:
    """Images of a wish, one per seed.

    Attributes:
        images: RGB.
        texts: the metadata of each file, as `sample` writes it.
        seconds: that the models took.
        notes: about the prompt, such as a missing token.
    """

    images: Sequence[Image.Image]
    texts: Sequence[Mapping[str, str]]
    seconds: float
    notes: Sequence[str] = ()


@dataclass
class _Fork:
    """A subject, ready to draw.

    Attributes:
        generator: with the LoRA attached.
        scale: at which the LoRA is at present.
        modules: that have the LoRA.
    """

    generator: Generator
    scale: float = 1.0
    modules: Sequence[nn.Module] = ()

    def at(self, strength: float) -> Generator:
        """Return the generator with its LoRA at a strength."""
        if strength != self.scale:
            for module in self.modules:
                for layer in lora_layers(module):
                    layer.set_scale(ADAPTER, strength)
            self.scale = strength
        generator = self.generator
        return replace(generator, loras=[(lora, strength) for lora, _ in generator.loras])


@dataclass
class Studio:
    """Draws wishes, one at a time; the caller sees to it that no two threads draw at once.

    Attributes:
        model: preset, hub id, folder or file to use instead of each subject's own; None for that one.
        changes: keys of `[model]` to change, such as `{"offline": True}`.
        on_message: called with lines about loading.
    """

    model: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    on_message: OnMessage = print
    _base: tuple[ModelConfig, ModelPair] | None = None
    _forks: OrderedDict[tuple[Path, float], _Fork] = field(default_factory=OrderedDict)
    _graphs: OrderedDict[tuple[Path, float], _Fork] = field(default_factory=OrderedDict)

    def draw(self, wish: Wish, count: int = 1) -> Drawing:
        """Return the images of a wish at its seed and the next ones.

        Raises:
            ConfigError: there is no such run or file, or no base model either.
            ModelError: a model is missing, or the LoRA does not fit it.
            EchoDistillError: an image is not finite.
        """
        generator = self._generator(wish)
        started = time.perf_counter()
        seeds = [wish.seed + index for index in range(count)]
        settings = replace(generator.settings, steps=wish.steps or generator.pair.student.steps)
        pixels = list(generate(generator.pair, [wish.prompt] * count, seeds, settings))
        seconds = time.perf_counter() - started
        texts = [texts_of(replace(generator, settings=settings), wish.prompt, seed) for seed in seeds]
        notes = tuple(prompt_notes(generator.pair.encoder, [wish.prompt], generator.token if wish.strength else None))
        return Drawing([to_image(image) for image in pixels], texts, seconds, notes)

    def draw_base(self, wish: Wish) -> Drawing:
        """Return the base model's image of a wish; raises the errors of `draw`."""
        return self.draw(replace(wish, strength=0.0))

    def release(self) -> None:
        """Forget all models, so that a training has the device's memory for itself."""
        self._base = None
        self._forks.clear()
        self._graphs.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def free_gib(self) -> float | None:
        """Return the free memory of the GPU that draws; None on other devices, or while nothing is loaded."""
        return free_gib(self._base[1].device) if self._base else None

    def _generator(self, wish: Wish) -> Generator:
        """Return what draws a wish: the base model at strength 0, else a subject."""
        if wish.lora is None:
            return self._plain()
        fork = self._subject(wish.lora)
        if wish.strength:
            graphs = self._onnx(wish.lora) if wish.strength == 1 else None
            return graphs.generator if graphs else fork.at(wish.strength)
        assert self._base is not None
        source = fork.generator  # the base model has not learned the token, as with `sample --lora-scale 0`
        return replace(source, pair=self._base[1], loras=[(lora, 0.0) for lora, _ in source.loras])

    def _plain(self) -> Generator:
        """Return the base model alone."""
        if self.model is None and self._base is None:
            raise ConfigError("There is no subject yet.", "Train one, or start the page with --model mini.")
        if self.model is not None:
            config = changed_models(build_config(self.model).model, self.changes)
            pair = self._shared(config)
        else:
            assert self._base is not None
            config, pair = self._base
        return Generator(pair, [], config.student, SamplingSettings(size=config.resolution), [], None, None)

    def _subject(self, lora: Path) -> _Fork:
        """Return a subject's fork; loads its models and LoRA the first time, or when its file has changed."""
        key = lora, _changed_at(lora)
        if key in self._forks:
            self._forks.move_to_end(key)
            fork = self._forks[key]
            if self._base is not None and fork.generator.pair.codec is self._base[1].codec:
                return fork
        request = SampleRequest([], lora=lora, model=self.model, model_overrides=self.changes)
        generator = load_models(request, self.on_message, self._forked)
        attach(generator, request, self.on_message)
        pair = generator.pair
        fork = _Fork(generator, modules=(pair.student.unet, *pair.encoder.encoders))
        _remember(self._forks, key, fork)
        return fork

    def _forked(self, config: ModelConfig, _role: Role) -> ModelPair:
        return fork(self._shared(config))

    def _shared(self, config: ModelConfig) -> ModelPair:
        """Return the base model of a configuration; another one in memory makes room first."""
        wanted = replace(config, **_OF_THE_TEACHER)  # type: ignore[arg-type]
        if self._base is None or self._base[0] != wanted:
            self.release()
            self._base = wanted, load_pair(wanted, teacher=False)
        return self._base[1]

    def _onnx(self, lora: Path) -> _Fork | None:
        """Return a run's ONNX graphs, which a CPU runs faster; None unless they are newer than its LoRA."""
        folder = _graphs_of(lora)
        if folder is None or self.model is not None or self._base is None or self._base[1].device.type != "cpu":
            return None
        key = lora, _changed_at(lora)
        if key not in self._graphs:
            try:
                generator = load_graphs(SampleRequest([], lora=lora, backend="onnx"), self.on_message)
            except EchoDistillError as error:  # onnxruntime is missing, or the export is damaged
                self.on_message(f"{folder} is not used. {error}")
                return None
            _remember(self._graphs, key, _Fork(replace(generator, loras=self._subject(lora).generator.loras)))
        return self._graphs[key]


def _remember(forks: OrderedDict[tuple[Path, float], _Fork], key: tuple[Path, float], fork: _Fork) -> None:
    for old in [other for other in forks if other[0] == key[0]] + list(forks)[: max(0, len(forks) - _MOST_FORKS + 1)]:
        forks.pop(old, None)
    forks[key] = fork


def _changed_at(lora: Path) -> float:
    """Return when a run's or a file's LoRA was written; 0 if there is none."""
    files = [lora] if lora.is_file() else sorted(lora.glob("*.safetensors"))
    return max((file.stat().st_mtime for file in files), default=0.0)


def _graphs_of(lora: Path) -> Path | None:
    """Return the folder of a run's ONNX graphs, if they were exported after its LoRA was written."""
    if not lora.is_dir():
        return None
    newest = max(lora.glob(f"export/*-onnx/{SETTINGS_FILE}"), key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent if newest and newest.stat().st_mtime >= _changed_at(lora) else None


def fork(pair: ModelPair) -> ModelPair:
    """Return a pair over the same tensors whose UNet, text encoders and tokenizers can be changed alone.

    Args:
        pair: without a trained LoRA; it stays as it is.
    """
    modules = (pair.student.unet, *pair.encoder.encoders)
    shared = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    unet, encoder = copy.deepcopy((pair.student.unet, pair.encoder), shared)
    return replace(pair, student=replace(pair.student, unet=unet), encoder=encoder)
