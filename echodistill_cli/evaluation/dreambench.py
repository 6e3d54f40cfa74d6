"""Run DreamBench: train and score every subject of google/dreambooth. A second call resumes it.

OUTPUT/
  results.json                scores of every finished subject, and their mean
  results.jsonl               an object per attempt, and the rest of what `many.subject` writes
  dog2/                       run of one subject, with its `evaluation/`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echodistill_cli.config.build import config_hash, with_absolute_paths
from echodistill_cli.config.schema import Config, nearest
from echodistill_cli.errors import ConfigError, DeviceMemoryError, EchoDistillError, ModelError, PhotoError
from echodistill_cli.evaluation.evaluate import Scores, evaluate, score_encoder_names
from echodistill_cli.files import make_folder, write_text
from echodistill_cli.many.batch import Train, check_all, subject_of
from echodistill_cli.many.manifest import Row
from echodistill_cli.many.schedule import OnEvent, look_up, run_all
from echodistill_cli.many.subject import Event, Outcome
from echodistill_cli.many.subject import Subject as Task
from echodistill_cli.models.vision import find_score_encoders
from echodistill_cli.outputs.requests import BenchmarkRequest, EvaluationRequest, SampleRequest
from echodistill_cli.runs import OnMessage

TABLE = "prompts_and_classes.txt"
# Reported by the paper (arXiv 2510.20512) for SD-Turbo in one step, mean of all 30 subjects. With which encoders is
# unclear: the authors' script reads CLIP ViT-L/14 at 336 pixels and DINOv2 ViT-L/14. To measure those too:
# --clip openai/clip-vit-large-patch14-336 --dino facebook/dinov2-large.
PAPER = {"clip_i": 0.783, "dino": 0.637}
_LIVE = {"cat", "dog"}  # README of google/dreambooth: "9 out of these subjects are live subjects (dogs and cats)"
_DOWNLOAD = "Get it: git clone https://github.com/google/dreambooth"


@dataclass(frozen=True)
class Subject:
    """One subject of DreamBench.

    Attributes:
        name: of its folder.
        class_name: what it is.
        photos: folder of its photos.
        templates: prompts with `{}` in place of the subject.
    """

    name: str
    class_name: str
    photos: Path
    templates: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """The scores of a benchmark.

    Attributes:
        file: `results.json`.
        subjects: counts and scores by the subject's name.
        mean: of each score over the subjects; None if no subject has it.
    """

    file: Path
    subjects: Mapping[str, Mapping[str, Any]]
    mean: Mapping[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"file": str(self.file), **_results(self.subjects)}


def run_benchmark(
    request: BenchmarkRequest,
    train: Train,
    on_message: OnMessage = lambda _line: None,
    on_event: OnEvent = lambda _event: None,
) -> Benchmark:
    """Train and score every subject that has no result yet.

    Args:
        request: subjects, settings, folders and engine.
        train: trains one run; a function of a module, because workers import it.
        on_message: receives lines about the progress.
        on_event: receives every event of every subject.

    Raises:
        ConfigError: the checkout lacks something, or a run was made with other settings.
        PhotoError: a subject has too few usable photos.
        ModelError: a model or an encoder is missing.
        Interrupted: a signal stopped the runs; the same call continues them.
        EchoDistillError: a subject failed; the others have their results.
    """
    subjects = read_subjects(request.folder, request.names)
    if request.sampling.prompts:
        subjects = tuple(dataclasses.replace(one, templates=tuple(request.sampling.prompts)) for one in subjects)
    model = request.config.model
    # Check this before hours of training:
    find_score_encoders(*score_encoder_names(request.clip, request.dino, [model.student]), offline=model.offline)
    tasks = [_task(request, subject, train) for subject in subjects]
    file = make_folder(request.output) / "results.json"
    results = _Results(file, tasks, on_message, on_event)
    waiting = [task for task in tasks if not results.has(task)]
    finished = look_up(waiting)
    check_all([task for task in waiting if task.name not in finished], on_message)
    outcomes = run_all(waiting, finished, request.engine, request.output, results.take)
    _raise_first(outcomes.values())
    scored = {subject.name: results.entries[subject.name] for subject in subjects}
    return Benchmark(file, scored, _mean(scored))


class _Results:
    """`results.json` while subjects end, and the lines about them.

    Args:
        file: results.json; read if it exists.
        tasks: of all subjects.
        on_message: receives lines.
        on_event: receives every event.
    """

    def __init__(self, file: Path, tasks: Sequence[Task], on_message: OnMessage, on_event: OnEvent) -> None:
        self.file, self.on_message, self.on_event = file, on_message, on_event
        self.entries = _read_results(file)
        self.labels = {task.name: f"{task.name} ({at} of {len(tasks)})" for at, task in enumerate(tasks, start=1)}

    def has(self, task: Task) -> bool:
        """Return whether there is a result of these settings already, and say so."""
        is_known = self.entries.get(task.name, {}).get("fingerprint") == task.fingerprint
        if is_known:
            self.on_message(f"{self.labels[task.name]}: has a result already")
        return is_known

    def take(self, event: Event) -> None:
        """Write the scores of a subject that ended, and pass every event on."""
        if event.kind == "message":
            self.on_message(f"{self.labels[event.name]}: {event.data}")
        if event.kind == "end" and event.data["values"]:
            self.entries[event.name] = {"fingerprint": event.data["config_hash"], **event.data["values"]}
            write_text(self.file, json.dumps(_results(self.entries), indent=2) + "\n")
        if event.kind == "end" and event.data["status"] == "was finished":
            self.on_message(f"{self.labels[event.name]}: has a result in its run folder")
        self.on_event(event)


def _task(request: BenchmarkRequest, subject: Subject, train: Train) -> Task:
    """Return a subject as the engines take it."""
    concept = dataclasses.replace(request.config.concept, photos=str(subject.photos), class_name=subject.class_name)
    run = dataclasses.replace(request.config.run, name=subject.name, output=str(request.output / subject.name))
    config = dataclasses.replace(request.config, concept=concept, run=run)
    sampling = dataclasses.replace(request.sampling, prompts=subject.templates, lora=None, more_loras=())
    return subject_of(
        Row(with_absolute_paths(config), str(subject.photos)),
        train,
        request.store,
        fingerprint=_fingerprint(request, subject, config),
        after=f"{__name__}:{score_run.__name__}",
        extra={"sampling": dataclasses.asdict(sampling), "clip": request.clip, "dino": request.dino},
    )


def _fingerprint(request: BenchmarkRequest, subject: Subject, config: Config) -> str:
    """Return a hash of all that decides a subject's scores. The device and batch sizes do not."""
    model = dataclasses.replace(config.model, device="auto", offline=False, offload=False)
    # The configuration includes the overrides of the model.
    sampling = dataclasses.replace(request.sampling, prompts=subject.templates, batch_size=1, model_overrides={})
    parts = [config_hash(dataclasses.replace(config, model=model)), repr(sampling), request.clip, request.dino]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def score_run(config: Config, extra: Mapping[str, Any], on_message: OnMessage) -> dict[str, Any]:
    """Generate and score the images of a finished run; the step of a worker after the training.

    Args:
        config: of the run.
        extra: fields of a `SampleRequest`, and the names of the encoders.
        on_message: receives lines about the progress.
    """
    on_message("generating and scoring images")
    sampling = SampleRequest(**{**extra["sampling"], "lora": config.output})
    photos = Path(config.concept.photos)
    request = EvaluationRequest(photos, sampling, clip=extra["clip"], dino=extra["dino"])
    result = evaluate(request, on_message)
    counts = {"class_name": config.concept.class_name, "photos": result.photos, "pictures": result.pictures}
    references = {"photos_clip_i": result.photos_clip_i, "photos_dino": result.photos_dino}
    return {**counts, **dataclasses.asdict(result.scores), **references}


def _raise_first(outcomes: Iterable[Outcome]) -> None:
    """Raise the error of the first subject that failed, with its exit code."""
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    if failed:
        kinds = {kind.exit_code: kind for kind in (ConfigError, PhotoError, ModelError, DeviceMemoryError)}
        more = f" {len(failed) - 1} more subjects failed." if len(failed) > 1 else ""
        raise kinds.get(failed[0].exit_code, EchoDistillError)(f"{failed[0].name}: {failed[0].error}{more}")


def _read_results(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["subjects"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EchoDistillError(
            f"{file} is damaged ({error}).", "Delete it; trained runs will only be scored again."
        ) from error


def _results(subjects: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `results.json`: the subjects with their scores, their mean, and the paper's."""
    return {"subjects": dict(subjects), "mean": _mean(subjects), "paper_sd_turbo": PAPER}


def _mean(subjects: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each score over the subjects that have it."""
    names = [*(field.name for field in dataclasses.fields(Scores)), "photos_clip_i", "photos_dino"]
    scores = {name: [entry[name] for entry in subjects.values() if entry[name] is not None] for name in names}
    return {name: statistics.fmean(values) if values else None for name, values in scores.items()}


def read_subjects(folder: Path, names: Sequence[str] = ()) -> tuple[Subject, ...]:
    """Return the subjects of a checkout of google/dreambooth, in its order.

    Args:
        folder: the checkout, or its `dataset` folder.
        names: of the subjects to return; empty for all.

    Raises:
        ConfigError: the table, its classes, its prompts, a subject or its photos are missing.
    """
    table = _find_table(folder)
    try:
        text = table.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{table}: it cannot be read ({error}).", _DOWNLOAD) from error
    classes, prompts = read_classes(text), read_prompts(text)
    if not classes:
        raise ConfigError(f"{table} has no classes below a line subject_name,class.", _DOWNLOAD)
    if not prompts:
        raise ConfigError(f"{table} has no list below a heading such as Object Prompts.", _DOWNLOAD)
    for name in names:
        if name not in classes:
            guess = nearest(name, list(classes))
            raise ConfigError(f"{table} has no subject {name!r}.", f"Did you mean {guess}?" if guess else None)
    selected = {name: classes[name] for name in classes if name in names or not names}
    missing = [name for name in selected if not (table.parent / name).is_dir()]
    if missing:
        raise ConfigError(
            f"{table.parent}: the photos of {', '.join(missing)} are missing.", "Select other subjects with --subject."
        )
    fallback = next(iter(prompts.values()))
    return tuple(
        Subject(name, kind, table.parent / name, prompts.get("live" if kind in _LIVE else "object", fallback))
        for name, kind in selected.items()
    )


def _find_table(folder: Path) -> Path:
    """Return the file with the classes and prompts."""
    for table in (folder / TABLE, folder / "dataset" / TABLE):
        if table.is_file():
            return table
    raise ConfigError(f"Neither {folder} nor its dataset/ has {TABLE}.", _DOWNLOAD)


def read_classes(text: str) -> dict[str, str]:
    """Return the class of each subject from lines of the form `name,class`.

    The lines start below `subject_name,class` and end before the first line of another form.
    """
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
    """Return the prompt templates by kind, "object" and "live".

    The templates are the quoted texts below each heading, with `{0} {1}` as one `{}`.
    """
    kind, templates = "", dict[str, list[str]]()
    for line in text.splitlines():
        if re.fullmatch(r"[A-Za-z ]*prompts\W*", line.strip(), re.IGNORECASE):
            kind = "live" if "live" in line.lower() else "object"
            continue
        for _, quoted in re.findall(r"""(['"])(.*?)\1""", line) if kind else ():
            template = re.sub(r"\{0?\} \{1?\}|\{0?\}", "{}", quoted)
            if "{}" in template:
                templates.setdefault(kind, []).append(template)
    return {kind: tuple(texts) for kind, texts in templates.items()}
