"""How much of the subject and of the prompt is in the pictures of a run or LoRA: CLIP-I, DINO and CLIP-T.

DreamBooth's protocol: every prompt is drawn with some seeds (`drawing.sample` does it), the pictures are compared with
the real photos and with the prompt. Pictures are kept, so that a second evaluation with the same settings reuses them.

FOLDER/
  evaluation.json             the scores, per prompt too, and what they hang on
  pictures/3f9a…/             one PNG per prompt and seed; a folder per LoRA and way of drawing
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
from echodistill_cli.data.images import Notes, UnusableError, read_picture, save_png
from echodistill_cli.data.photos import load_photos
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.files import make_folder, public_name, write_text
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.models.device import pick_device
from echodistill_cli.models.sources import is_embedded
from echodistill_cli.models.vision import CLIP, DINO, ClipScorer, DinoScorer, ScoreEncoders, find_score_encoders
from echodistill_cli.outputs.artifact import FoundLora, find_lora
from echodistill_cli.outputs.requests import AUTO, EvaluationRequest, SampleRequest
from echodistill_cli.outputs.sample import sample
from echodistill_cli.runs import OnMessage
from echodistill_cli.training.losses import photo_similarity

_LIBRARIES = ("torch", "diffusers", "transformers", "pillow")


@dataclass(frozen=True)
class Scores:
    """The three scores of some pictures, each a mean cosine."""

    clip_i: float
    dino: float
    clip_t: float


@dataclass(frozen=True)
class PromptScores:
    """One prompt: as it was drawn, as CLIP was asked (without the rare word), and its pictures' scores."""

    prompt: str
    text: str
    scores: Scores


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Args:
        file: `evaluation.json`. photos, pictures: how many. photos_clip_i, photos_dino: of the photos among
            themselves; None for a single one. settings, versions: what the scores hang on.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the place of the file."""
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
class _Drawn:
    """The pictures of an evaluation, prompt by prompt, and the settings that they depend on."""

    prompts: Sequence[str]
    texts: Sequence[str]
    files: Sequence[Path]
    count: int
    settings: Mapping[str, Any]


def evaluate(request: EvaluationRequest, on_message: OnMessage = lambda _line: None) -> Evaluation:
    """Draw what is not drawn yet, measure all, write `evaluation.json`.

    Raises:
        ConfigError: there is no LoRA, or its subject is not known. PhotoError: there is no usable photo. ModelError: a
            model or an encoder is missing, or of another kind.
    """
    found = find_lora(request.drawing)
    token, class_name = _subject(request, found)
    # Photos are not made smaller before the encoders' own preprocessing, as they are for training.
    photos = load_photos(request.photos, min_photos=1, resolution=2**20, masks="off", captions=False).photos
    students = (found.model.student, read_header(found.lora)[0].get("ss_sd_model_name", ""))
    judges = find_score_encoders(
        *score_encoder_names(request.clip, request.dino, students), offline=found.model.offline
    )
    folder = request.output or _beside(found.lora, request.drawing.lora)
    drawn = _draw(request.drawing, found, f"{token} {class_name}", class_name, folder, on_message)
    on_message(f"Measuring {len(drawn.files)} pictures against {len(photos)} photos")
    files = [photo.path for photo in photos]
    result = _measured(drawn, files, judges, pick_device(found.model.device), request.drawing.batch_size)
    evaluation = dataclasses.replace(result, file=folder / "evaluation.json", subject=f"{token} {class_name}")
    if evaluation.file.exists():
        on_message(f"Replacing the earlier {evaluation.file}")
    write_text(evaluation.file, json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return evaluation


def score_encoder_names(clip: str, dino: str, students: Sequence[str]) -> tuple[str, str]:
    """The encoders that are meant: "auto" is the package's own for a student of the package, else the paper's."""
    ours = any(map(is_embedded, students))
    return (
        ("mini:clip" if ours else CLIP) if clip == AUTO else clip,
        ("mini:vit" if ours else DINO) if dino == AUTO else dino,
    )


def fill(template: str, subject: str) -> str:
    """A prompt from its template: `{}` and `{subject}` become the subject's words."""
    return template.replace("{subject}", subject).replace("{}", subject)


def _subject(request: EvaluationRequest, found: FoundLora) -> tuple[str, str]:
    """The rare word and what the subject is."""
    header = read_header(found.lora)[0]
    token = request.token or header.get("echodistill.token")
    class_name = request.class_name or header.get("modelspec.tags")
    if token is None:
        raise ConfigError(f"{found.lora} does not say which word stands for its subject.", "Say it: --token sks")
    if class_name is None:
        raise ConfigError(f"{found.lora} does not say what its subject is.", "Say it: --class-name dog")
    return token, class_name


def _beside(lora: Path, named: Path | None) -> Path:
    """Where results go by themselves: `evaluation` in a run, else a folder that is named as the LoRA file."""
    in_run = named is None or named.is_dir()
    return lora.parent / ("evaluation" if in_run else f"{lora.stem}-evaluation")


def _draw(
    drawing: SampleRequest, found: FoundLora, subject: str, class_name: str, folder: Path, on_message: OnMessage
) -> _Drawn:
    """Draw the prompts of which a picture is missing; each picture is written at once, so that nothing is lost."""
    settings = _drawing_settings(drawing, found)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    home = make_folder(folder / "pictures" / digest[:16])
    prompts = [fill(template, subject) for template in drawing.prompts]
    seeds = [drawing.seed + index for index in range(drawing.count)]
    rows = {prompt: [home / _file_name(prompt, seed) for seed in seeds] for prompt in prompts}
    missing = [prompt for prompt, row in rows.items() if not all(file.is_file() for file in row)]
    total = len(missing) * drawing.count
    if len(missing) < len(rows):
        on_message(f"{(len(rows) - len(missing)) * drawing.count} pictures are there already, in {home}")
    if missing:
        on_message(f"Drawing {total} pictures into {home}")
        for number, one in enumerate(sample(dataclasses.replace(drawing, prompts=missing), on_message), start=1):
            save_png(home / _file_name(one.prompt, one.seed), one.image, one.texts)
            if number % max(1, total // 10) == 0:
                on_message(f"picture {number}/{total}")
    return _Drawn(
        prompts=prompts,
        texts=[fill(template, class_name) for template in drawing.prompts],
        files=[file for prompt in prompts for file in rows[prompt]],
        count=drawing.count,
        settings={**settings, **_told(rows[prompts[0]][0]), "seed": drawing.seed, "count": drawing.count},
    )


def _told(picture: Path) -> dict[str, str]:
    """The steps and the guidance that a picture was drawn with, which a request may leave open; it says so itself."""
    texts = _opened(picture).info
    return {key: str(texts[key]) for key in ("steps", "guidance_scale") if key in texts}


def _file_name(prompt: str, seed: int) -> str:
    words = re.sub(r"\W+", "-", prompt)[:60].strip("-")
    return f"{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}_s{seed}.png"


def _drawing_settings(drawing: SampleRequest, found: FoundLora) -> dict[str, Any]:
    """What a picture depends on beside its prompt and seed; of paths the last part, of files the content."""
    elsewhere = {"device", "offline", "offload"}
    model = {key: value for key, value in dataclasses.asdict(found.model).items() if key not in elsewhere}
    named = {key: public_name(value) if isinstance(value, str) else value for key, value in model.items()}
    return {
        "lora": found.lora.name,
        "lora_sha256": _sha256(found.lora),
        "token_sha256": _sha256(found.token_file) if found.token_file else None,
        "lora_scale": drawing.lora_scale,
        "role": drawing.role,
        "steps": drawing.steps,
        "guidance_scale": drawing.guidance_scale,
        "model": named,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _measured(
    drawn: _Drawn, photos: Sequence[Path], judges: ScoreEncoders, device: torch.device, batch: int
) -> Evaluation:
    """The scores of all pictures and of each prompt's; the file and the subject are left empty."""
    clip, dino = ClipScorer(judges.clip, device), DinoScorer(judges.dino, device)
    clip_photos, clip_drawn = (_embedded(clip.embed, files, batch) for files in (photos, drawn.files))
    dino_photos, dino_drawn = (_embedded(dino.embed, files, batch) for files in (photos, drawn.files))
    texts = clip.embed_texts(drawn.texts).repeat_interleave(drawn.count, dim=0)

    def scores(rows: slice) -> Scores:
        return Scores(
            clip_i=subject_fidelity(clip_drawn[rows], clip_photos),
            dino=subject_fidelity(dino_drawn[rows], dino_photos),
            clip_t=prompt_fidelity(clip_drawn[rows], texts[rows]),
        )

    rows = [slice(start, start + drawn.count) for start in range(0, len(drawn.files), drawn.count)]
    return Evaluation(
        file=Path(),
        subject="",
        photos=len(photos),
        pictures=len(drawn.files),
        scores=scores(slice(None)),
        photos_clip_i=own_similarity(clip_photos),
        photos_dino=own_similarity(dino_photos),
        per_prompt=tuple(map(PromptScores, drawn.prompts, drawn.texts, map(scores, rows))),
        settings={**drawn.settings, "clip": judges.clip_name, "dino": judges.dino_name},
        versions={"echodistill": __version__} | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    )


def _embedded(embed: Callable[[Sequence[Image.Image]], Tensor], files: Sequence[Path], batch: int) -> Tensor:
    """Embeddings [N, D] of picture files, opened a batch at a time."""
    starts = range(0, len(files), batch)
    return torch.cat([embed([_opened(file) for file in files[start : start + batch]]) for start in starts])


def _opened(file: Path) -> Image.Image:
    try:
        return read_picture(file, Notes())[0]
    except UnusableError as error:
        raise EchoDistillError(f"{file} {error}.", "Delete it, and evaluate again.") from error


def pairwise_cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of every row of [N, D] with every row of [M, D]: [N, M]."""
    return F.normalize(first.double(), dim=-1) @ F.normalize(second.double(), dim=-1).T


def subject_fidelity(drawn: Tensor, photos: Tensor) -> float:
    """CLIP-I or DINO, by whose embeddings they are: the mean cosine of all N x M pairs.

    Args:
        drawn: [N, D], of the drawn pictures. photos: [M, D], of the real ones.
    """
    return float(pairwise_cosine(drawn, photos).mean())


def prompt_fidelity(drawn: Tensor, prompts: Tensor) -> float:
    """CLIP-T: the mean cosine of each picture with its own prompt.

    Args:
        drawn: [N, D], CLIP's image embeddings. prompts: [N, D], its text embeddings; row i is what picture i shows.
    """
    return float(F.cosine_similarity(drawn.double(), prompts.double(), dim=-1).mean())


def own_similarity(photos: Tensor) -> float | None:
    """How alike the real pictures are: the mean cosine of the M (M - 1) / 2 pairs of different ones; None for M = 1.

    DreamBooth's table has it as "real images". Drawn pictures that keep the subject and change its surroundings cannot
    be expected above it.

    Args:
        photos: [M, D], of the real pictures.
    """
    return photo_similarity(photos.double()) if len(photos) > 1 else None
