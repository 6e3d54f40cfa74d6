"""Score generated images as in DreamBooth: CLIP-I and DINO for the subject, CLIP-T for the prompt.

Every prompt is generated from several seeds and compared with the real photos and with the prompt. Images are kept, so
that a second evaluation with the same settings reuses them.

FOLDER/
  evaluation.json             scores, in total and per prompt, and the settings that they depend on
  pictures/3f9a…/             one PNG per prompt and seed; one folder per LoRA and sampling settings
  pictures/3f9a…/scores.json  the last scores of these images, from which a report compares models
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from echodistill_cli import __version__
from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.data.images import Notes, UnusableError, read_image, save_png
from echodistill_cli.data.photos import Photo, load_photos
from echodistill_cli.data.prompts import EVALUATION_TEMPLATES, fill
from echodistill_cli.errors import ConfigError, EchoDistillError, counted
from echodistill_cli.evaluation.report import SCORES_FILE, write_report
from echodistill_cli.files import make_folder, public_name, sha256, write_text
from echodistill_cli.models.device import pick_device
from echodistill_cli.models.downloads import CLIP, DINO, fetch_pair
from echodistill_cli.models.sources import is_embedded
from echodistill_cli.models.vision import ClipScorer, DinoScorer, ScoreEncoders, find_score_encoders
from echodistill_cli.outputs.artifact import Artifact, find
from echodistill_cli.outputs.requests import AUTO, EvaluationRequest, SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.runs import OnMessage
from echodistill_cli.training.losses import photo_similarity

_LIBRARIES = ("torch", "diffusers", "transformers", "pillow")


@dataclass(frozen=True)
class Scores:
    """The three scores of a set of images, each a mean cosine similarity."""

    clip_i: float
    dino: float
    clip_t: float


@dataclass(frozen=True)
class PromptScores:
    """The scores of one prompt.

    Attributes:
        prompt: that the images were generated from.
        text: that CLIP-T compares them with: the prompt without the token.
        scores: of its images.
    """

    prompt: str
    text: str
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        file: `evaluation.json`.
        subject: token and class name.
        photos: number of real photos.
        pictures: number of generated images.
        scores: of all generated images.
        photos_clip_i: CLIP-I of the photos among themselves; None for a single photo.
        photos_dino: DINO of the photos among themselves; None for a single photo.
        per_prompt: scores of each prompt.
        settings: that the scores depend on.
        versions: of the libraries.
        report: the page `report.html`; None unless the request asks for it.
    """

    file: Path
    subject: str
    photos: int
    pictures: int
    scores: Scores
    photos_clip_i: float | None
    photos_dino: float | None
    per_prompt: tuple[PromptScores, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    report: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the paths of the files."""
        return {
            "subject": self.subject,
            "photos": self.photos,
            "pictures": self.pictures,
            **dataclasses.asdict(self.scores),
            "photos_own": {"clip_i": self.photos_clip_i, "dino": self.photos_dino},
            "per_prompt": [
                {"prompt": one.prompt, "text": one.text, **dataclasses.asdict(one.scores)} for one in self.per_prompt
            ],
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class _Images:
    """Generated images of an evaluation.

    Attributes:
        prompts: that they were generated from.
        texts: the prompts without the token.
        files: `count` files for each prompt, in the order of the prompts.
        count: images per prompt.
        settings: that they depend on.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    files: Sequence[Path]
    count: int
    settings: Mapping[str, Any]


def evaluate(request: EvaluationRequest, on_message: OnMessage = lambda _line: None) -> Evaluation:
    """Generate the images that are missing, score all of them and write `evaluation.json`.

    Raises:
        ConfigError: there is no LoRA, or its subject is not known.
        PhotoError: there is no usable photo.
        ModelError: a model or an encoder is missing, or is of another kind.
    """
    sampling = request.sampling
    if not sampling.prompts:
        sampling = dataclasses.replace(sampling, prompts=EVALUATION_TEMPLATES)
    artifact = find(sampling.lora)
    if sampling.lora is None and artifact.run:
        on_message(f"Using the newest run, {artifact.run.folder}")
        sampling = dataclasses.replace(sampling, lora=artifact.run.folder)
    lora = artifact.lora(sampling.role)
    models = artifact.models(sampling.model, sampling.model_overrides, sampling.size)
    token, class_name = _subject(request, artifact)
    # Unlike for training, photos keep their size: the encoders' own preprocessing resizes them.
    photos = load_photos(
        _photo_folder(request, artifact), min_photos=1, resolution=2**20, masks="off", captions=False
    ).photos
    students = (models.student, artifact.metadata(sampling.role).get("ss_sd_model_name", ""))
    names = score_encoder_names(request.clip, request.dino, students)
    fetch_pair(models, teacher=sampling.role == "teacher", scores=names)
    encoders = find_score_encoders(*names, offline=models.offline)
    folder = request.output or lora.parent / (f"{lora.stem}-evaluation" if artifact.file else "evaluation")
    job = _Job(artifact, models, photos, encoders, f"{token} {class_name}", class_name, folder, on_message)
    if request.html and sampling.role == "student" and sampling.lora_scale:
        job.score(dataclasses.replace(sampling, lora_scale=0.0))
    evaluation = job.score(sampling)
    if evaluation.file.exists():
        on_message(f"Replacing the earlier {evaluation.file}")
    write_text(evaluation.file, _json(evaluation.to_dict()))
    if not request.html:
        return evaluation
    home = artifact.run.folder if artifact.run and not artifact.file else folder
    report = write_report(request.output or home, artifact, photos, evaluation.subject, folder)
    return dataclasses.replace(evaluation, report=report)


@dataclass(frozen=True)
class _Job:
    """What the images of one evaluation share, whatever the model is that generates them."""

    artifact: Artifact
    models: ModelConfig
    photos: Sequence[Photo]
    encoders: ScoreEncoders
    subject: str
    class_name: str
    folder: Path
    on_message: OnMessage

    def score(self, sampling: SampleRequest) -> Evaluation:
        """Generate the images that are missing, score all of them, and write the scores beside them."""
        settings = _image_settings(sampling, self.artifact, self.models)
        images = _generate(sampling, settings, self.subject, self.class_name, self.folder, self.on_message)
        self.on_message(f"Scoring {counted(len(images.files), 'image')} against {counted(len(self.photos), 'photo')}")
        files, device = [photo.path for photo in self.photos], pick_device(self.models.device)
        scores = _score(images, files, self.encoders, device, sampling.batch_size)
        scores = dataclasses.replace(scores, file=self.folder / "evaluation.json", subject=self.subject)
        beside = {
            "photos_sha256": sorted(map(sha256, files)),
            "images": [file.name for file in images.files[:: images.count]],
        }
        write_text(images.files[0].parent / SCORES_FILE, _json(scores.to_dict() | beside))
        return scores


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def score_encoder_names(clip: str, dino: str, students: Sequence[str]) -> tuple[str, str]:
    """Replace "auto" with the embedded encoders if any student is embedded, else with the paper's."""
    embedded = any(map(is_embedded, students))
    return (
        ("mini:clip" if embedded else CLIP) if clip == AUTO else clip,
        ("mini:vit" if embedded else DINO) if dino == AUTO else dino,
    )


def _photo_folder(request: EvaluationRequest, artifact: Artifact) -> Path:
    """Return the folder of photos that a request names, or else that the run was trained on."""
    folder = request.photos or (Path(artifact.config.concept.photos) if artifact.config else None)
    if folder is None:
        raise ConfigError("No photos to compare with.", "Name their folder: echodistill evaluate FILE --photos DIR")
    return folder


def _subject(request: EvaluationRequest, artifact: Artifact) -> tuple[str, str]:
    """Return the token and the class name."""
    lora, metadata = artifact.lora(request.sampling.role), artifact.metadata(request.sampling.role)
    token = request.token or metadata.get("echodistill.token")
    class_name = request.class_name or metadata.get("modelspec.tags")
    if token is None:
        raise ConfigError(f"The header of {lora} has no token.", "Name it, such as --token sks.")
    if class_name is None:
        raise ConfigError(f"The header of {lora} has no class name.", "Name it, such as --class-name dog.")
    return token, class_name


def _generate(
    sampling: SampleRequest,
    settings: Mapping[str, Any],
    subject: str,
    class_name: str,
    folder: Path,
    on_message: OnMessage,
) -> _Images:
    """Generate the prompts' missing images; write each one at once, so that an interrupt loses none."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    home = make_folder(folder / "pictures" / digest[:16])
    prompts = [fill(template, subject) for template in sampling.prompts]
    seeds = [sampling.seed + index for index in range(sampling.count)]
    rows = {prompt: [home / _file_name(prompt, seed) for seed in seeds] for prompt in prompts}
    missing = [prompt for prompt, row in rows.items() if not all(file.is_file() for file in row)]
    total = len(missing) * sampling.count
    if len(missing) < len(rows):
        made = (len(rows) - len(missing)) * sampling.count
        on_message(f"{counted(made, 'image exists', 'images exist')} already in {home}")
    if missing:
        on_message(f"Generating {counted(total, 'image')} into {home}")
        for number, one in enumerate(sample(dataclasses.replace(sampling, prompts=missing), on_message), start=1):
            save_png(home / _file_name(one.prompt, one.seed), one.image, one.texts)
            if number % max(1, total // 10) == 0:
                on_message(f"image {number}/{total}")
    for prompt, row in rows.items():
        if prompt not in missing and (unread := _open(row[0]).info.get("cut_off")):  # `sample` reports the missing ones
            on_message(f"The prompt {prompt!r} is too long. The model did not read {unread!r}.")
    # A request may leave steps and guidance open; the image's metadata has them.
    texts = _open(rows[prompts[0]][0]).info
    recorded: dict[str, Any] = {key: str(texts[key]) for key in ("steps", "guidance_scale") if key in texts}
    return _Images(
        prompts=prompts,
        texts=[fill(template, class_name) for template in sampling.prompts],
        files=[file for prompt in prompts for file in rows[prompt]],
        count=sampling.count,
        settings={**settings, **recorded, "seed": sampling.seed, "count": sampling.count},
    )


def _file_name(prompt: str, seed: int) -> str:
    words = re.sub(r"\W+", "-", prompt)[:60].strip("-")
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}_s{seed}.png"


def _image_settings(sampling: SampleRequest, artifact: Artifact, models: ModelConfig) -> dict[str, Any]:
    """Return what an image depends on besides prompt and seed: last parts of paths, and contents of files."""
    without_effect = {"device", "offline", "offload"}
    model = {key: value for key, value in dataclasses.asdict(models).items() if key not in without_effect}
    lora = artifact.lora(sampling.role)
    return {
        "lora": lora.name,
        "lora_sha256": sha256(lora),
        "token_sha256": sha256(artifact.token_file) if artifact.token_file else None,
        "lora_scale": sampling.lora_scale,
        "role": sampling.role,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "model": {key: public_name(value) if isinstance(value, str) else value for key, value in model.items()},
    }


def _score(
    images: _Images, photos: Sequence[Path], encoders: ScoreEncoders, device: torch.device, batch: int
) -> Evaluation:
    """Return the scores in total and per prompt; `file` and `subject` stay empty."""
    clip, dino = ClipScorer(encoders.clip, device), DinoScorer(encoders.dino, device)
    clip_photos, clip_images = (_embed(clip.embed, files, batch) for files in (photos, images.files))
    dino_photos, dino_images = (_embed(dino.embed, files, batch) for files in (photos, images.files))
    texts = clip.embed_texts(images.texts).repeat_interleave(images.count, dim=0)

    def scores(rows: slice) -> Scores:
        return Scores(
            clip_i=subject_fidelity(clip_images[rows], clip_photos),
            dino=subject_fidelity(dino_images[rows], dino_photos),
            clip_t=prompt_fidelity(clip_images[rows], texts[rows]),
        )

    rows = [slice(start, start + images.count) for start in range(0, len(images.files), images.count)]
    return Evaluation(
        file=Path(),
        subject="",
        photos=len(photos),
        pictures=len(images.files),
        scores=scores(slice(None)),
        photos_clip_i=own_similarity(clip_photos),
        photos_dino=own_similarity(dino_photos),
        per_prompt=tuple(map(PromptScores, images.prompts, images.texts, map(scores, rows))),
        settings={**images.settings, "clip": encoders.clip_name, "dino": encoders.dino_name},
        versions={"echodistill": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    )


def _embed(embed: Callable[[Sequence[Image.Image]], Tensor], files: Sequence[Path], batch: int) -> Tensor:
    """Return the embeddings of image files, [N, D]. Opens one batch at a time."""
    starts = range(0, len(files), batch)
    return torch.cat([embed([_open(file) for file in files[start : start + batch]]) for start in starts])


def _open(file: Path) -> Image.Image:
    try:
        return read_image(file, Notes())[0]
    except UnusableError as error:
        raise EchoDistillError(f"{file} {error}.", "Delete it and evaluate again.") from error


def pairwise_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine similarity of every row of [N, D] with every row of [M, D]: [N, M]."""
    return F.normalize(first.double(), dim=-1) @ F.normalize(second.double(), dim=-1).T


def subject_fidelity(images: Tensor, photos: Tensor) -> float:
    """Return CLIP-I or DINO, depending on the encoder: the mean cosine similarity of all N x M pairs.

    Args:
        images: [N, D], embeddings of generated images.
        photos: [M, D], embeddings of real photos.
    """
    return float(pairwise_cosine(images, photos).mean())


def prompt_fidelity(images: Tensor, prompts: Tensor) -> float:
    """Return CLIP-T: the mean cosine similarity of each image with its own prompt.

    Args:
        images: [N, D], CLIP's image embeddings.
        prompts: [N, D], CLIP's text embeddings; row i is the prompt of image i.
    """
    return float(F.cosine_similarity(images.double(), prompts.double(), dim=-1).mean())


def own_similarity(photos: Tensor) -> float | None:
    """Return the mean cosine similarity of the M (M - 1) / 2 pairs of different photos; None for M = 1.

    DreamBooth's table calls it "real images". It is no upper limit: photos with different backgrounds may be less
    alike than generated images are like them.

    Args:
        photos: [M, D], embeddings of real photos.
    """
    return photo_similarity(photos.double()) if len(photos) > 1 else None
