"""What a person can ask for, as frozen data: the arguments of the façade. Imports no torch.

Also what to tell a person whose request is valid, but may not do what it seems to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError
from echodistill_cli.files import check_folder
from echodistill_cli.lora.frame import check_frame
from echodistill_cli.runs import newest_run, open_run

if TYPE_CHECKING:
    from echodistill_cli.diffusion.pair import Role
    from echodistill_cli.diffusion.text import PromptEncoder

AUTO, LOCAL, RAY = "auto", "local", "ray"
_SEEDS, _MOST_IMAGES = 2**64, 100_000  # torch takes seeds below it; the list of all images is kept in memory
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # on the hub
_FAR_FROM_TRAINING = 1.5  # factor between the sizes above which images usually break
# Weights and tags that user interfaces read; here they are words.
_UI_SYNTAX = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>|[(\[][^()\[\]]+:\d*\.?\d+[)\]]")


@dataclass(frozen=True)
class SampleRequest:
    """What to generate.

    Args:
        prompts: at least one.
        count: images per prompt.
        seed: of the first image of each prompt; image i uses seed + i.
        lora: LoRA file or run folder; None for the newest run.
        lora_scale: scale of the LoRA; 1 as trained, 0 for the base model.
        role: which model generates.
        steps: denoising steps; None for those that the student was distilled for, or for 25 (teacher).
        guidance_scale: classifier-free guidance; None for 0 (student) or the run's (teacher).
        size: side of the images in pixels; None for the run's resolution.
        batch_size: images per forward pass; changes the speed, and images by rounding at most.
        compare: whether to generate the base model's images too.
        model: preset, hub id, folder or file to use instead of the run's. A LoRA file outside of run folders needs it.
        model_overrides: keys of `[model]` to change, such as `{"device": "cpu"}`.
        backend: "torch", or "onnx" for an ONNX model, which is the run's or the folder that `model` names.
        more_loras: further LoRA files or run folders, each with its scale, that are added to `lora`.
        width: of the images in pixels; None for `size`.
        height: of the images in pixels; None for `size`.

    Raises:
        ConfigError: a prompt is empty, or a scale is infinite or not a number.
        ConfigError: a seed is negative or too large, or there are too many images for one call.
    """

    prompts: Sequence[str]
    count: int = 1
    seed: int = 0
    lora: Path | None = None
    lora_scale: float = 1.0
    role: Role = "student"
    steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None
    batch_size: int = 4
    compare: bool = False
    model: str | None = None
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "torch"
    # Without `repr`: the fingerprint of a benchmark's results is taken from it, and a benchmark sets none of these.
    more_loras: Sequence[tuple[Path, float]] = field(default=(), repr=False)
    width: int | None = field(default=None, repr=False)
    height: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError("A prompt is empty.", 'Write one: --prompt "a photo of a sks dog on the beach"')
        numbers = [("--lora-scale", self.lora_scale), ("--guidance", self.guidance_scale)]
        for flag, number in (*numbers, *(("--lora", scale) for _, scale in self.more_loras)):
            if number is not None and not abs(number) < 1e38:  # in float32
                raise ConfigError(f"{flag} {number} is not a finite number.", f"Use a finite number for {flag}.")
        if not 0 <= self.seed <= _SEEDS - self.count:
            raise ConfigError(f"--seed {self.seed} is out of range.", "Use a --seed of 0 or more, below 2^64.")
        if (total := len(self.prompts) * self.count) > _MOST_IMAGES:
            raise ConfigError(f"{total} images are too many for one call.", f"Ask for at most {_MOST_IMAGES}.")

    def check_paths(self, folder: Path | None = None) -> None:
        """Check, without torch, that there are LoRA files, and that a folder to write to can be one.

        Args:
            folder: to write to; None for no check.

        Raises:
            ConfigError: there is no such run or file, or the folder is a file.
        """
        if self.backend == "onnx" and (
            self.role == "teacher" or self.compare or self.lora_scale != 1 or self.more_loras
        ):
            raise ConfigError(
                "An ONNX model is the student with the LoRA at scale 1.",
                "Omit --role, --compare, --lora-scale and a second --lora.",
            )
        if self.backend == "torch" or self.model is None:
            for lora in (self.lora, *(lora for lora, _ in self.more_loras)):
                check_paths(lora, folder)


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Args:
        source: run folder or LoRA file; None for the newest run.
        layouts: any of kohya, diffusers, pipeline, checkpoint and onnx, as `outputs.export` lists them.
        roles: whose LoRA; for a LoRA file, the models it is folded into.
        step: step of the run's checkpoint; None for the newest checkpoint.
        output: folder; None for `export/` in the run, or the folder of the LoRA file.
        overwrite: whether to replace existing files.
        dtype: precision of the tensors: fp16, bf16 or fp32.
        metadata: whether to write the full header, previews and cards; otherwise only what other tools need.
        bundle_embedding: whether the LoRA file includes the learned token, which A1111 alone reads.
        model: preset, hub id, folder or file to fold the LoRA into; None for the run's.
        model_overrides: keys of `[model]` to change, such as `{"teacher": "owner/name"}`.
        push_to: repository on the Hugging Face hub, OWNER/NAME; None sends nothing.
        private: whether a new repository is private; None for the account's default.
        dry_run: whether to return what would be written and sent, and do neither.
    """

    source: Path | None = None
    layouts: Sequence[str] = ("kohya",)
    roles: Sequence[Role] = ("student",)
    step: int | None = None
    output: Path | None = None
    overwrite: bool = False
    dtype: str = "fp16"
    metadata: bool = True
    bundle_embedding: bool = False
    model: str | None = None
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    push_to: str | None = None
    private: bool | None = None
    dry_run: bool = False

    def check_paths(self) -> None:
        """Check, without torch, all that can be wrong without a look into the source, and that there is one.

        Raises:
            ConfigError: there is no such run or file, `output` is a file, or the request contradicts itself.
            ModelError: the source is no safetensors file.
        """
        is_file = self.source is not None and self.source.is_file()
        if is_file and self.step is not None:
            raise ConfigError(f"{self.source} is a file, which has no --step.", "Name its run folder.")
        if is_file and len(self.roles) > 1 and {"kohya", "diffusers"} & set(self.layouts):
            raise ConfigError(f"{self.source} is one LoRA, and --role both asks for two.", "Omit --role.")
        if "onnx" in self.layouts and "teacher" in self.roles:
            raise ConfigError("--format onnx writes the one-step student only.", "Omit --role.")
        if self.push_to is not None and not _REPOSITORY.fullmatch(self.push_to):
            example = "Example: --push-to-hub me/sks-dog"
            raise ConfigError(f"--push-to-hub {self.push_to!r} is not of the form OWNER/NAME.", example)
        if self.push_to is not None and is_file:
            raise ConfigError("--push-to-hub sends a run with its card.", "Name a run folder instead of a file.")
        check_paths(self.source, self.output)


@dataclass(frozen=True)
class EvaluationRequest:
    """What to score.

    Args:
        photos: folder of real photos of the subject; None for those that the run was trained on.
        sampling: which images to generate; `{}` or `{subject}` in its prompts becomes the subject. Without prompts,
            those of `data.prompts.EVALUATION_TEMPLATES` are used.
        token: the subject's token; None for the one in the LoRA file's header.
        class_name: what the subject is; None for the class in the LoRA file's header.
        clip: hub id or folder of the CLIP model; "auto" for the paper's, or the embedded one for an embedded student.
        dino: hub id or folder of the ViT; "auto" for the paper's, or the embedded one for an embedded student.
        output: folder of the results; None for one beside the LoRA file.
        html: whether to score the base model too, and to write the page `report.html`.
    """

    photos: Path | None
    sampling: SampleRequest
    token: str | None = None
    class_name: str | None = None
    clip: str = AUTO
    dino: str = AUTO
    output: Path | None = None
    html: bool = False


@dataclass(frozen=True)
class EngineRequest:
    """Where attempts run.

    Args:
        on: "local", "ray" (a cluster that is running here, or else one of this machine) or "ray://HOST:PORT".
        workers: attempts at once; None for as many as there is room for.
        gpus_per_subject: GPUs that a subject takes, such as 0.5; None for one where there are GPUs.
        retries: how often a subject is tried again whose process was killed.

    Raises:
        ConfigError: the engine is unknown, or a number is out of range.
    """

    on: str = LOCAL
    workers: int | None = None
    gpus_per_subject: float | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        if self.on not in (LOCAL, RAY) and not self.on.startswith(f"{RAY}://"):
            raise ConfigError(f"--on {self.on} is unknown.", "Use local, ray or ray://HOST:PORT.")
        if self.gpus_per_subject is not None and not 0 <= self.gpus_per_subject < 1e6:
            raise ConfigError(f"--gpus-per-subject {self.gpus_per_subject:g} is out of range.", "Use 1, 0.5 or 0.")


@dataclass(frozen=True)
class ManyRequest:
    """Which subjects to train, and where.

    Args:
        manifest: .csv, .jsonl or .toml with a row per subject.
        output: folder of the run folders and results.jsonl.
        model: preset, hub id, folder or file of the student, for rows without one.
        config_file: settings of all subjects as TOML.
        overrides: settings of all subjects by dotted key; they win over the file, and a row over them.
        engine: where attempts run.
        shard: (index, count): every count-th row, from row `index`, counted from 0.
        store: URL below which every run is stored too, such as s3://bucket/runs; "" for none.
        vram: GiB of device memory to fit settings to, or "auto" for this machine's; "" for as they are.

    Raises:
        ConfigError: the shard does not exist, or "auto" would measure the wrong memory.
    """

    manifest: Path
    output: Path = Path("runs")
    model: str | None = None
    config_file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineRequest = field(default_factory=EngineRequest)
    shard: tuple[int, int] = (0, 1)
    store: str = ""
    vram: str = ""

    def __post_init__(self) -> None:
        if self.vram == "auto" and (self.engine.on != LOCAL or self.engine.gpus_per_subject not in (None, 1)):
            raise ConfigError(
                "--vram auto measures a whole device of this machine.", "Say what a subject may take, as in --vram 12."
            )
        index, count = self.shard
        if not 0 <= index < count:
            raise ConfigError(f"--shard {index}/{count} does not exist.", "Count from 0: 0/4, 1/4, 2/4, 3/4.")


@dataclass(frozen=True)
class BenchmarkRequest:
    """Which subjects of DreamBench to train and score.

    Args:
        folder: a checkout of google/dreambooth, or its `dataset` folder.
        output: folder of the runs and of `results.json`.
        config: settings of every run, but for its photos, class name, run name and output.
        sampling: which images to generate; `lora` and `model` are ignored. Without prompts, DreamBench's are used.
        names: of subjects; empty for all.
        clip: hub id or folder of the CLIP model, or "auto"; see `EvaluationRequest`.
        dino: hub id or folder of the ViT, or "auto"; see `EvaluationRequest`.
        engine: where subjects are trained and scored.
        store: URL below which every run is stored too; "" for none.
    """

    folder: Path
    output: Path
    config: Config
    sampling: SampleRequest
    names: Sequence[str] = ()
    clip: str = AUTO
    dino: str = AUTO
    engine: EngineRequest = field(default_factory=EngineRequest)
    store: str = ""


def check_paths(source: Path | None, folder: Path | None = None) -> None:
    """Check, without torch, that there is a run or LoRA file, and that a folder to write to can be one.

    Args:
        source: run folder or LoRA file; None for the newest run.
        folder: to write to; None for no check.

    Raises:
        ConfigError: there is no such run or file, or the folder is a file.
        ModelError: the source is no safetensors file.
    """
    if folder is not None:
        check_folder(folder)
    if source is None:
        newest_run()
    elif source.is_dir():
        open_run(source)
    elif not source.is_file():
        raise ConfigError(f"{source}: no such run folder or LoRA file.", "Name one, or train one first.")
    else:
        check_frame(source)


@dataclass(frozen=True)
class LiveRequest:
    """What the page of `echodistill live` shows, and where it listens.

    Args:
        runs: run folders and LoRA files to show first; every finished run below `output` is shown too.
        output: folder of the runs, the kept images and the temporary files.
        model: preset, hub id, folder or file to use instead of each run's.
        host: address to listen at.
        port: to listen at; 0 for any free one.
        names: further names under which people reach the page, such as that of a proxy.
        auth: user and password; needed if `host` is no loopback address.
        training: whether the page can train.
        config: TOML file with further settings of every training; None for the model's own.
        device: auto, cpu, cuda or mps; None for the run's.
        precision: auto, bf16, fp16 or fp32; None for the run's.
        offline: do not use the network.
    """

    runs: Sequence[Path] = ()
    output: Path = Path("runs")
    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    names: Sequence[str] = ()
    auth: tuple[str, str] | None = None
    training: bool = True
    config: Path | None = None
    device: str | None = None
    precision: str | None = None
    offline: bool = False


def setting_notes(
    request: SampleRequest, steps: int, guidance: float, trained: int | None, student_steps: int
) -> Iterator[str]:
    """Yield a line for each setting that usually makes the images worse.

    Args:
        request: what to generate.
        steps: denoising steps, resolved for the role.
        guidance: guidance scale, resolved for the role.
        trained: side in pixels of the images in training; None if it is not known.
        student_steps: that the student was distilled for.
    """
    if request.role == "student" and (steps != student_steps or guidance > 1):
        yield (
            f"The student was trained for {student_steps} step{'s' * (student_steps > 1)} without guidance. "
            f"--steps {steps} and --guidance {guidance:g} may make the images worse."
        )
    for flag, side in {"--size": request.size, "--width": request.width, "--height": request.height}.items():
        if side and trained and not trained / _FAR_FROM_TRAINING <= side <= trained * _FAR_FROM_TRAINING:
            yield f"{flag} {side} is far from the {trained} pixels in training. The images may break."


def prompt_notes(encoder: PromptEncoder, prompts: Sequence[str], token: str | None) -> Iterator[str]:
    """Yield a line for each kind of text that has no effect, or lacks the subject.

    Args:
        encoder: with the learned token, if there is one.
        prompts: of the images.
        token: of the subject; None if it is not known.
    """
    tokenizer = encoder.tokenizers[0]
    limit = getattr(encoder, "token_count", tokenizer.model_max_length)
    room = limit - tokenizer.num_special_tokens_to_add()
    # Without `verbose`, the library does not warn of long texts itself.
    ids = {text: list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) for text in prompts}
    if long := [text for text in ids if len(ids[text]) > room]:
        cut = _short(tokenizer.decode(ids[long[0]][room:]))
        yield f"{_subject_of(long)} too long: the model reads {limit} tokens. It does not read {cut!r}."
    words = [tokenizer(word, add_special_tokens=False).input_ids for word in (token, f" {token}") if token]
    if lacking := [text for text in ids if words and not any(_contains(ids[text][:room], word) for word in words)]:
        yield f"{_subject_of(lacking)} without the token {token!r}. The subject may be missing from the image."
    if marked := [text for text in ids if _UI_SYNTAX.search(text)]:
        yield f"{_subject_of(marked)} read as plain words: weights and <lora:...> tags have no effect."


def _contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(ids[start : start + len(part)] == part for start in range(len(ids) - len(part) + 1))


def _subject_of(prompts: Sequence[str]) -> str:
    """Return the beginning of a sentence on one or more prompts, with its verb."""
    first = f"The prompt {_short(prompts[0])!r}"
    return f"{first} is" if len(prompts) == 1 else f"{first} and {len(prompts) - 1} more are"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-35:]}"
