"""The subjects that the page offers: finished runs below a folder, and what a person named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.lora.inspect import inspect_file
from echodistill_cli.lora.safetensors_io import read_header
from echodistill_cli.outputs.artifact import find
from echodistill_cli.runs import CONFIG_FILE, open_run

# Where each tool looks for a LoRA, and what to do there; {} is the name of the file without its ending.
_PLACES: Mapping[str, str] = {
    "ComfyUI": "Put it into models/loras and choose it in Load LoRA.",
    "A1111": "Put it into models/Lora and write <lora:{}:1> in the prompt.",
    "Forge": "Put it into models/Lora and write <lora:{}:1> in the prompt.",
    "diffusers": 'Load it with pipeline.load_lora_weights("{}.safetensors").',
    "sd-scripts": "Name it with --network_weights.",
}


@dataclass(frozen=True)
class Subject:
    """Something that the page can draw.

    Attributes:
        name: unique on the page; all that a browser knows of it.
        path: run folder or LoRA file.
        phrase: what stands for it in a prompt, such as "sks dog"; "" if it is not known.
    """

    name: str
    path: Path
    phrase: str = ""

    @property
    def prompt(self) -> str:
        """A prompt to begin with."""
        return f"a photo of a {self.phrase or 'dog'} on the beach"


@dataclass(frozen=True)
class TakeAway:
    """Files of a subject to use in other tools.

    Attributes:
        files: the LoRA, and the learned token if there is one.
        lines: tool and what to do there.
    """

    files: Sequence[Path]
    lines: Sequence[tuple[str, str]]


def find_subjects(named: Sequence[Path], folder: Path) -> dict[str, Subject]:
    """Return the subjects by name, those that a person named first, then the newest.

    Args:
        named: run folders and LoRA files.
        folder: of the runs.
    """
    runs = [file.parent for file in folder.glob(f"[!.]*/{CONFIG_FILE}")]
    runs.sort(key=lambda run: (run / CONFIG_FILE).stat().st_mtime, reverse=True)
    subjects: dict[str, Subject] = {}
    known: set[Path] = set()
    for path in (*named, *runs):
        if path.resolve() in known or (phrase := _phrase(path)) is None:
            continue
        known.add(path.resolve())
        stem = path.stem if path.is_file() else path.resolve().name
        name, copy = stem, 2
        while name in subjects:
            name, copy = f"{stem} ({copy})", copy + 1
        subjects[name] = Subject(name, path, phrase)
    return subjects


def check_named(paths: Sequence[Path]) -> None:
    """Check the runs and files that a person named.

    Raises:
        ConfigError: there is no such run or file, or the run is not finished.
        ModelError: a file is damaged.
    """
    for path in paths:
        find(path).lora("student")


def _phrase(path: Path) -> str | None:
    """Return what stands for a subject in a prompt; None if the path holds no finished LoRA."""
    try:
        if path.is_dir():
            run = open_run(path)
            return run.config.subject if (path / f"{run.config.name}.safetensors").is_file() else None
        return " ".join(_words(read_header(path)[0]))
    except EchoDistillError:
        return None


def _words(header: Mapping[str, str]) -> Iterator[str]:
    """Yield the words that a LoRA file's header names."""
    if phrase := header.get("modelspec.trigger_phrase"):
        yield phrase
        return
    yield from filter(None, (header.get("echodistill.token"), header.get("echodistill.class_name")))


def take_away(subject: Subject) -> TakeAway:
    """Return the files of a subject with a line per tool that loads them.

    Raises:
        ConfigError: the run is not finished.
        ModelError: the file is damaged.
    """
    artifact = find(subject.path)
    files = [artifact.lora("student"), *filter(None, [artifact.token_file])]
    inspection = inspect_file(files[0])
    if artifact.metadata("student").get("echodistill.toy") or (
        artifact.config and _is_toy(artifact.config.model.student)
    ):
        return TakeAway(files, [("echodistill", "The toy model is no other tool's: use echodistill sample.")])
    lines = []
    for verdict in inspection.readers:
        place = _PLACES.get(verdict.reader, "").format(files[0].stem)
        lines.append((verdict.reader, verdict.text if verdict.loads == "no" else f"{place} {verdict.text}"))
    for token in files[1:]:
        lines.append(("learned token", f"{token.name} goes into models/embeddings (ComfyUI) or embeddings (A1111)."))
    return TakeAway(files, lines)


def _is_toy(model: str) -> bool:
    return model.startswith("mini:")


def chosen(subjects: Mapping[str, Subject], name: object) -> Subject | None:
    """Return a subject by its name; None for no subject.

    Args:
        subjects: by name.
        name: as a browser sent it.

    Raises:
        ConfigError: there is no such subject, or the name is a path.
    """
    if name in (None, "", []):
        return None
    if not isinstance(name, str) or name not in subjects:
        raise ConfigError(f"There is no subject {json.dumps(name)[:80]}.", "Choose one of the list.")
    return subjects[name]
