"""Gather what a run and its evaluations left, and write it as one page, `report.html`.

The page contains the photos, which no other file of a run does. So nothing sends it: an export names its own files, a
store leaves it out, and a `.gitignore` beside it keeps it out of repositories and of `hf upload RUN`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from echodistill_cli import __version__
from echodistill_cli.data.grids import tile
from echodistill_cli.data.images import Notes, UnusableError, data_uri, read_image
from echodistill_cli.data.photos import Photo
from echodistill_cli.diffusion.pair import Role
from echodistill_cli.errors import EchoDistillError, counted
from echodistill_cli.evaluation.report_page import Report, ScoreRow, Tile, page
from echodistill_cli.files import public_name, read_small, sha256, write_text
from echodistill_cli.outputs.artifact import Artifact, from_run
from echodistill_cli.outputs.hub import public_settings
from echodistill_cli.runs import REPORT, Run

SCORES_FILE = "scores.json"  # of one model, beside its images; see `evaluate`
_PHOTO, _TILE = 480, 320  # pixels at most
_MOST_PHOTOS, _MOST_STEPS, _MOST_PROMPTS = 24, 8, 24
_COLUMNS: Mapping[str, str] = {"base": "base model", "student": "student", "teacher": "teacher"}
_NOT_LOSSES = re.compile(r"step|.*_step|lr_.*|grad_norm_.*|step_seconds|peak_memory_mib")
_SCORE_NOTE = (
    "Mean cosines: CLIP-I and DINO of images with photos, CLIP-T of images with prompts. The last row compares the "
    "photos with each other; it is no upper limit."
)


def write_report(
    folder: Path, artifact: Artifact, photos: Sequence[Photo], subject: str, evaluation: Path | None = None
) -> Path:
    """Write the page of a run or LoRA file, and return its path.

    Args:
        folder: of the page.
        artifact: what was trained.
        photos: of the subject.
        subject: token and class name.
        evaluation: folder of an evaluation that is not beside its LoRA file; None if there is none.

    Raises:
        EchoDistillError: the page cannot be written.
    """
    run = artifact.run
    metrics = run.read_metrics() if run else []
    scored = known_scores(artifact, evaluation)
    strips = _previews(run) if run else {}
    comparisons, note = _compared(scored), "Same prompt and seed. Training saw the photos, and none of these images."
    if not comparisons:
        comparisons, note = {prompt: _ends(tiles) for prompt, tiles in strips.items()}, "Same prompt and seed."
    report = Report(
        title=artifact.name,
        subject=subject,
        version=__version__,
        facts=_facts(run, metrics) if run else {"LoRA": artifact.lora("student").name},
        photos=[_photo(photo) for photo in photos[:_MOST_PHOTOS]],
        comparisons=comparisons,
        comparison_note=note,
        scores=_score_rows(scored),
        score_note=_SCORE_NOTE,
        strips=strips,
        curves=_curves(metrics),
        settings=public_settings(run.config) if run else "",
        commands=_commands(run, scored) if run else {},
    )
    write_text(folder / REPORT, page(report))
    _keep_private(folder)
    return folder / REPORT


def _keep_private(folder: Path) -> None:
    """Name the page in the folder's `.gitignore`, which git and the hub's own upload obey."""
    file, line = folder / ".gitignore", f"/{REPORT}"
    before = file.read_text("utf-8", "replace") if file.is_file() else ""
    if line not in before.splitlines():
        write_text(file, f"{before.rstrip()}\n# It contains photos.\n{line}\n".lstrip())


def known_scores(artifact: Artifact, evaluation: Path | None = None) -> dict[str, Mapping[str, Any]]:
    """Return the newest comparable scores of "base", "student" and "teacher", as far as they are known.

    Scores are comparable if photos, prompts, seeds and encoders are the same. Those of another training are ignored.

    Args:
        artifact: what was trained; evaluations beside its LoRA files are looked through.
        evaluation: folder of one more; None if there is none.

    Returns:
        the content of `scores.json`, with the images' folder as "folder".
    """
    found: dict[str, Mapping[str, Any]] = {}
    digests = dict(_digests(artifact))
    folders = {artifact.lora(role).parent / "evaluation" for role in digests} | ({evaluation} if evaluation else set())
    files = [file for folder in folders for file in folder.glob(f"pictures/*/{SCORES_FILE}")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        scores = _read_scores(file)
        name = _name_of(scores, digests) if scores else None
        if scores and name and name not in found and _same_question([*found.values(), scores]):
            found[name] = {**scores, "folder": file.parent}
    return {name: found[name] for name in _COLUMNS if name in found}


def _digests(artifact: Artifact) -> Iterator[tuple[Role, str]]:
    """Yield the SHA-256 of each role's LoRA file that exists."""
    roles: tuple[Role, ...] = ("student", "teacher")
    for role in roles:
        try:
            yield role, sha256(artifact.lora(role))
        except (EchoDistillError, OSError):
            continue


def _read_scores(file: Path) -> dict[str, Any] | None:
    """Return the content of a file of scores; None if it is damaged or not of this form."""
    try:
        content = json.loads(read_small(file))
        numbers = [content[name] for name in ("clip_i", "dino", "clip_t")]
        numbers += [value for value in content["photos_own"].values() if value is not None]
        texts = [content["images"], [one["prompt"] for one in content["per_prompt"]]]
        settings = content["settings"]
        valid = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        valid = valid and all(isinstance(text, str) for text in (*texts[0], *texts[1])) and isinstance(settings, dict)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return dict(content) if valid else None


def _name_of(scores: Mapping[str, Any], digests: Mapping[Role, str]) -> str | None:
    """Return whose scores these are; None for another LoRA, or a scale between 0 and 1."""
    settings = scores["settings"]
    role, scale = settings.get("role"), settings.get("lora_scale")
    if digests.get(role) != settings.get("lora_sha256"):
        return None
    return {("student", 0): "base", ("student", 1): "student", ("teacher", 1): "teacher"}.get((role, scale))


def _same_question(scores: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether scores are of the same photos, prompts, seeds and encoders."""
    settings = ("seed", "count", "clip", "dino")
    questions = [
        [one.get("photos_sha256"), [row["prompt"] for row in one["per_prompt"]], *map(one["settings"].get, settings)]
        for one in scores
    ]
    return all(question == questions[0] for question in questions)


def _score_rows(scored: Mapping[str, Mapping[str, Any]]) -> list[ScoreRow]:
    rows = [
        ScoreRow(name, _how(one["settings"]), [float(one[key]) for key in ("clip_i", "dino", "clip_t")])
        for name, one in scored.items()
    ]
    if scored:
        own = next(iter(scored.values()))["photos_own"]
        rows.append(ScoreRow("photos", "with each other", [own.get("clip_i"), own.get("dino"), None]))
    return rows


def _how(settings: Mapping[str, Any]) -> str:
    steps, guidance = settings.get("steps"), settings.get("guidance_scale")
    return f"{steps} step{'s' * (steps != '1')}, guidance {guidance}"


def _compared(scored: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Tile]]:
    """Return, by prompt, the first image of each model; nothing for a single model."""
    rows: dict[str, list[Tile]] = {}
    for name, one in scored.items() if len(scored) > 1 else ():
        for entry, file in list(zip(one["per_prompt"], one["images"], strict=False))[:_MOST_PROMPTS]:
            if image := _inside(one["folder"], file):
                source = data_uri(image, _TILE)
                rows.setdefault(entry["prompt"], []).append(
                    Tile(source, _COLUMNS[name], f"{entry['prompt']} ({_COLUMNS[name]})")
                )
    return rows


def _previews(run: Run) -> dict[str, list[Tile]]:
    """Return, by prompt, the first seed's image of some previews, the first and the last among them."""
    files = [file for file in sorted(run.samples.glob("step-*.png")) if re.fullmatch(r"step-\d+", file.stem)]
    strips: dict[str, list[Tile]] = {}
    for file in _spread(files):
        step = int(file.stem.partition("-")[2])
        for prompt, image in _tiles(run, file):
            caption = f"step {step}" if step else "before"
            strips.setdefault(prompt, []).append(Tile(data_uri(image, _TILE), caption, f"{prompt}, {caption}"))
    return strips


def _spread(files: Sequence[Path]) -> list[Path]:
    """Return at most `_MOST_STEPS` files, evenly spread, with both ends."""
    last = len(files) - 1
    places = {round(index * last / (_MOST_STEPS - 1)) for index in range(_MOST_STEPS)} if last > 0 else {0}
    return [files[place] for place in sorted(places) if place <= last]


def _tiles(run: Run, file: Path) -> Iterator[tuple[str, Image.Image]]:
    """Yield each prompt of a preview, with the image of its first seed, cut out of the sheet.

    A row of the sheet has a prompt's seeds, and then those of the same prompt without the token.
    """
    sheet = _inside(run.samples, file.name)
    prompts = [text for text in str(sheet.info.get("prompts", "")).split(" | ") if text] if sheet else []
    seeds, rows = run.config.run.sample_seeds, math.ceil(len(prompts) / 2)
    for index, prompt in enumerate(prompts if sheet else ()):
        if sheet and (image := tile(sheet, index * seeds, 2 * seeds, rows, run.config.model.resolution)):
            yield prompt, image


def _inside(folder: Path, name: str) -> Image.Image | None:
    """Return an image of a folder; None if it is damaged, or not a file of this folder, such as a link."""
    file = folder / name
    if Path(name).name != name or "\0" in name or file.resolve().parent != folder.resolve():
        return None
    try:
        image = read_image(file, Notes())[0]
        with Image.open(file) as opened:  # `read_image` keeps no texts
            image.info["prompts"] = opened.info.get("prompts", "")
    except (UnusableError, OSError, ValueError, Image.DecompressionBombError):
        return None
    return image


def _ends(tiles: Sequence[Tile]) -> list[Tile]:
    return [tiles[0], tiles[-1]] if len(tiles) > 1 else list(tiles)


def _photo(photo: Photo) -> Tile:
    return Tile(data_uri(photo.image, _PHOTO), photo.caption or photo.path.name)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each loss that has at least two."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in metrics:
        for name, value in entry.items():
            if not _NOT_LOSSES.fullmatch(name) and type(value) in (int, float) and math.isfinite(value):
                curves.setdefault(name.replace("_", " "), []).append((entry["step"], float(value)))
    return {name: points for name, points in curves.items() if len(points) > 1}


def _facts(run: Run, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return names and values for the head of the page."""
    config = run.config
    seconds = [entry["step_seconds"] for entry in metrics if type(entry.get("step_seconds")) in (int, float)]
    memory = [entry["peak_memory_mib"] for entry in metrics if type(entry.get("peak_memory_mib")) in (int, float)]
    facts = {
        "Student": public_name(config.model.student),
        "Teacher": public_name(config.model.teacher),
        "Training": f"{counted(len(metrics), 'step')} of batch {config.train.batch_size} "
        f"at {config.model.resolution} pixels, rank {config.adapter.rank}, seed {config.run.seed}",
    }
    if seconds and memory:
        facts["Cost"] = f"{sum(seconds) / len(seconds):.2g} s per step, {max(memory) / 1024:.1f} GiB at most"
    return facts


def _commands(run: Run, scored: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what to do next, with its command; of an absolute path it has the last part alone."""
    is_private = run.folder.is_absolute() or ".." in run.folder.parts
    folder = shlex.quote(run.folder.name if is_private else str(run.folder))
    prompt = shlex.quote(f"a photo of a {run.config.subject} on the beach")
    commands = {
        "Generate images": f"echodistill sample --lora {folder} --prompt {prompt}",
        "Files for other tools": f"echodistill export {folder}",
    }
    if "student" not in scored:
        commands["Scores, beside the base model's"] = f"echodistill evaluate {folder} --html"
    elif "teacher" not in scored:
        commands["The teacher's scores too"] = f"echodistill evaluate {folder} --html --role teacher"
    return commands


def report_of_run(run: Run, photos: Sequence[Photo]) -> Path:
    """Write the page of a finished run into its folder; see `write_report`."""
    return write_report(run.folder, from_run(run), photos, run.config.subject)
