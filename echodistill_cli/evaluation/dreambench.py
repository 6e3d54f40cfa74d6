"""The whole of DreamBench: train, draw and measure every subject of google/dreambooth, and go on where it stopped.

OUTPUT/
  results.json                every finished subject's scores, and their mean
  dog2/                       the subject's run, with its `evaluation/`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from echodistill_cli.config.build import config_hash
from echodistill_cli.config.schema import Config, nearest
from echodistill_cli.errors import ConfigError, EchoDistillError, Interrupted
from echodistill_cli.evaluation.evaluate import Scores, evaluate, score_encoder_names
from echodistill_cli.files import make_folder, write_text
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.vision import find_score_encoders
from echodistill_cli.outputs.requests import BenchmarkRequest, EvaluationRequest
from echodistill_cli.runs import CONFIG_FILE, OnMessage, OnStep, resume_run

TABLE = "prompts_and_classes.txt"
# What the paper (arXiv 2510.20512) reports for SD-Turbo over all 30 subjects, one step.
PAPER = {"clip_i": 0.783, "dino": 0.637}
_LIVE = {"cat", "dog"}  # "9 out of these subjects are live subjects (dogs and cats)", says its README
_FETCH = "Get it: git clone https://github.com/google/dreambooth"


@dataclass(frozen=True)
class Subject:
    """One subject: its name and class, its folder of photos, its prompts with `{}` for the subject."""

    name: str
    class_name: str
    photos: Path
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """Scores of the benchmark.

    Args:
        file: `results.json`.
        subjects: scores and counts by subject.
        mean: of each score over the subjects; None if no subject has it.
    """

    file: Path
    subjects: Mapping[str, Mapping[str, Any]]
    mean: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"file": str(self.file), **_tables(self.subjects, self.mean)}


class Train(Protocol):
    """What trains a run: `pipeline.train`."""

    def __call__(self, config: Config, *, resume: bool, on_step: OnStep, on_message: OnMessage) -> object: ...


def read_subjects(folder: Path, names: Sequence[str] = ()) -> tuple[Subject, ...]:
    """The subjects of a checkout, in its order.

    Raises:
        ConfigError: naming what is missing: the table, its classes or prompts, a subject or its photos.
    """
    home = next((place for place in (folder, folder / "dataset") if (place / TABLE).is_file()), None)
    if home is None:
        raise ConfigError(f"{folder}: neither it nor its dataset/ has {TABLE}.", _FETCH)
    file = home / TABLE
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: it cannot be read ({error}).", _FETCH) from error
    classes, prompts = read_classes(text), read_prompts(text)
    if not classes:
        raise ConfigError(f"{file}: it has no classes below a line subject_name,class.", _FETCH)
    if not prompts:
        raise ConfigError(f"{file}: it has no list below a heading such as Object Prompts.", _FETCH)
    for name in names:
        if name not in classes:
            near = nearest(name, list(classes))
            raise ConfigError(f"{file} has no subject {name!r}.", f"Did you mean {near}?" if near else None)
    chosen = {name: classes[name] for name in classes if name in names or not names}
    absent = [name for name in chosen if not (home / name).is_dir()]
    if absent:
        raise ConfigError(f"{home}: the photos of {', '.join(absent)} are missing.", "Name others with --subject.")
    spare = next(iter(prompts.values()))
    return tuple(
        Subject(name, kind, home / name, prompts.get("live" if kind in _LIVE else "object", spare))
        for name, kind in chosen.items()
    )


def read_classes(text: str) -> dict[str, str]:
    """Class by subject: the lines `name,class` below `subject_name,class`, up to the next that is neither."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((at for at, line in enumerate(lines) if re.fullmatch(r"subject_name\s*,\s*class", line)), len(lines))
    classes: dict[str, str] = {}
    for line in lines[start + 1 :]:
        name, comma, kind = (part.strip() for part in line.partition(","))
        if not comma or not re.fullmatch(r"[\w.-]+", name) or not kind:
            break
        classes[name] = kind
    return classes


def read_prompts(text: str) -> dict[str, tuple[str, ...]]:
    """Templates by kind, "object" and "live": the quoted texts below each heading, `{0} {1}` as one `{}`."""
    kind, found = "", dict[str, list[str]]()
    for line in text.splitlines():
        if re.fullmatch(r"[A-Za-z ]*prompts\W*", line.strip(), re.IGNORECASE):
            kind = "live" if "live" in line.lower() else "object"
            continue
        for _, quoted in re.findall(r"""(['"])(.*?)\1""", line) if kind else ():
            template = re.sub(r"\{0?\} \{1?\}|\{0?\}", "{}", quoted)
            if "{}" in template:
                found.setdefault(kind, []).append(template)
    return {kind: tuple(templates) for kind, templates in found.items()}


def run_benchmark(
    request: BenchmarkRequest,
    train: Train,
    on_message: OnMessage = lambda _line: None,
    on_step: OnStep = lambda _metrics: None,
) -> Benchmark:
    """Train, generate and score every subject that has no result yet.

    Args:
        request: what to run.
        train: `pipeline.train`.
        on_message: called with lines about progress.
        on_step: called with the metrics of each training step.

    Raises:
        as `read_subjects`, `train` and `evaluate`. Interrupted: the same call goes on from there.
    """
    subjects = read_subjects(request.folder, request.names)
    if request.drawing.prompts:
        subjects = tuple(dataclasses.replace(one, templates=tuple(request.drawing.prompts)) for one in subjects)
    configs = [_config(request, subject) for subject in subjects]
    model = configs[0].model
    # Before hours of training:
    find_score_encoders(*score_encoder_names(request.clip, request.dino, [model.student]), offline=model.offline)
    file = make_folder(request.output) / "results.json"
    done = _read_results(file)
    for at, (subject, config) in enumerate(zip(subjects, configs, strict=True), start=1):
        place, key = f"{subject.name} ({at} of {len(subjects)})", _fingerprint(request, subject, config)
        if done.get(subject.name, {}).get("fingerprint") == key:
            on_message(f"{place}: has its result")
            continue
        _train(subject, config, place, train, on_message, on_step)
        on_message(f"{place}: drawing and measuring")
        done[subject.name] = {"fingerprint": key, **_measure(request, subject, config, on_message)}
        _write_results(file, done)
    chosen = {subject.name: done[subject.name] for subject in subjects}
    return Benchmark(file, chosen, _mean(chosen))


def _config(request: BenchmarkRequest, subject: Subject) -> Config:
    """The configuration of a subject's run."""
    own = {"concept.photos": str(subject.photos), "concept.class_name": subject.class_name, "run.name": subject.name}
    return request.build({**own, "run.output": str(request.output / subject.name)})


def _fingerprint(request: BenchmarkRequest, subject: Subject, config: Config) -> str:
    """Of all that decides a subject's result; not where it is computed, nor how many pictures at once."""
    anywhere = dataclasses.replace(config.model, device="auto", offline=False, offload=False)
    # What it overrides of the model is in the configuration too.
    drawing = dataclasses.replace(request.drawing, prompts=subject.templates, batch_size=1, model_overrides={})
    parts = [config_hash(dataclasses.replace(config, model=anywhere)), repr(drawing), request.clip, request.dino]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _train(
    subject: Subject,
    config: Config,
    place: str,
    train: Train,
    on_message: OnMessage,
    on_step: OnStep,
) -> None:
    """Train a subject's run to its end, from where it stands."""
    begun = (config.output / CONFIG_FILE).is_file()
    if begun and _is_trained(config):
        on_message(f"{place}: is trained already")
        return
    on_message(f"{place}: {'going on with its training' if begun else 'training'}")
    try:
        train(config, resume=begun, on_step=on_step, on_message=on_message)
    except Interrupted as stopped:
        again = f"{subject.name} was stopped and saved. The same command goes on with it."
        raise Interrupted(again, stopped.signal_number) from stopped


def _is_trained(config: Config) -> bool:
    """Whether a run's LoRA is that of its last step. The LoRA is written last, and says of which step it is."""
    lora = config.output / f"{config.name}.safetensors"
    if not lora.is_file():
        return False
    resume_run(config)  # made with the same settings, or an error that says which differs
    return read_header(lora)[0].get("echodistill.steps") == str(config.train.steps)


def _measure(request: BenchmarkRequest, subject: Subject, config: Config, on_message: OnMessage) -> dict[str, Any]:
    drawing = dataclasses.replace(request.drawing, prompts=subject.templates, lora=config.output)
    found = evaluate(EvaluationRequest(subject.photos, drawing, clip=request.clip, dino=request.dino), on_message)
    own = {"photos_clip_i": found.photos_clip_i, "photos_dino": found.photos_dino}
    counts = {"class_name": subject.class_name, "photos": found.photos, "pictures": found.pictures}
    return {**counts, **dataclasses.asdict(found.scores), **own}


def _read_results(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["subjects"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoDistillError(
            f"{file} is damaged ({error}).", "Delete it: finished runs are only measured."
        ) from error


def _write_results(file: Path, done: Mapping[str, Mapping[str, Any]]) -> None:
    write_text(file, json.dumps(_tables(done, _mean(done)), indent=2) + "\n")


def _mean(done: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each score over the subjects."""
    columns = [*(field.name for field in dataclasses.fields(Scores)), "photos_clip_i", "photos_dino"]
    known = {name: [entry[name] for entry in done.values() if entry[name] is not None] for name in columns}
    return {name: statistics.fmean(values) if values else None for name, values in known.items()}


def _tables(subjects: Mapping[str, Mapping[str, Any]], mean: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the content of `results.json`: subjects with their scores, their mean, and the paper's mean."""
    return {"subjects": dict(subjects), "mean": dict(mean), "paper_sd_turbo": PAPER}
