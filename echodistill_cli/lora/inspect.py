"""Explain a LoRA or token file: what it is, how to use it, and which tools can load it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echodistill_cli.errors import ConfigError
from echodistill_cli.lora.header import TOY
from echodistill_cli.lora.keys import locate, split_key
from echodistill_cli.lora.read import LoraFile, read_lora
from echodistill_cli.lora.readers import Verdict, compatibility
from echodistill_cli.lora.tensors import ADAPTER_METADATA_KEY

_CHECKPOINT_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
MOST_TRIGGERS = 5


@dataclass(frozen=True)
class Inspection:
    """What a file's header says and what its keys imply.

    Attributes:
        file: the file's name, without its folder.
        size: size in bytes.
        kind: "lora", "token", "checkpoint" (a whole model) or "unknown".
        format: as in `LoraFile`.
        family: "sd1", "sd2", "sdxl", "sana", "flux2" or "unknown".
        dtypes: dtypes of the tensors as safetensors names them, such as "F16".
        ranks: all ranks in the file.
        alphas: all α in the file; a module without α has α = rank.
        scales: all α / rank in the file, the strength at LoRA weight 1.
        modules: number of adapted modules by component.
        tensors: number of tensors.
        triggers: words for the prompt.
        base_model: the model it was trained on; None if the header does not say.
        resolution: such as "512x512"; None if the header does not say.
        usage: how to generate with it; None if the header does not say.
        made_by: "echodistill" and its version; None for files of other tools.
        role: "student" or "teacher"; None for files of other tools.
        readers: one verdict per reader.
        notes: warnings for a person.
    """

    file: str
    size: int
    kind: str
    format: str
    family: str
    dtypes: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    scales: tuple[float, ...]
    modules: Mapping[str, int]
    tensors: int
    triggers: tuple[str, ...]
    base_model: str | None
    resolution: str | None
    usage: str | None
    made_by: str | None
    role: str | None
    readers: tuple[Verdict, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def inspect_file(path: Path) -> Inspection:
    """Explain a .safetensors file of any origin.

    Raises:
        ConfigError: the file does not exist.
        ModelError: the file is damaged or not a safetensors file.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist.")
    file = read_lora(path)
    file = dataclasses.replace(file, metadata={key: printable(text) for key, text in file.metadata.items()})
    kind = _kind(file)
    from_header = file.metadata.get
    version = from_header("echodistill.version")
    alphas = [float(module.rank) if module.alpha is None else module.alpha for module in file.modules]
    return Inspection(
        file=printable(path.name),
        size=path.stat().st_size,
        kind=kind,
        format=file.format,
        family=file.family,
        dtypes=tuple(sorted({dtype for key, (dtype, _) in file.table.items() if not key.endswith(".alpha")})),
        ranks=tuple(sorted({module.rank for module in file.modules})),
        alphas=tuple(sorted(set(alphas))),
        scales=tuple(sorted({module.scale for module in file.modules})),
        modules=_modules(file),
        tensors=len(file.table),
        triggers=_triggers(file),
        base_model=from_header("ss_sd_model_name"),
        resolution=from_header("modelspec.resolution"),
        usage=from_header("modelspec.usage_hint"),
        made_by=f"echodistill {version}" if version else None,
        role=from_header("echodistill.role"),
        readers=_of_the_toy(
            file, {"lora": compatibility, "token": _token_compatibility}.get(kind, _no_compatibility)(file)
        ),
        notes=tuple(_notes(file, kind)),
    )


def printable(text: str) -> str:
    """Replace control characters, which could change what a terminal shows; line breaks become spaces."""
    return "".join(
        sign if sign.isprintable() else " " if sign in "\n\r\t" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )


def _kind(file: LoraFile) -> str:
    if file.format == "token":
        return "token"
    if file.modules or file.format == "lycoris":
        return "lora"
    return "checkpoint" if any(key.startswith(_CHECKPOINT_PREFIXES) for key in file.table) else "unknown"


def _modules(file: LoraFile) -> dict[str, int]:
    parsed = [split_key(key) for key in file.table]
    places = {locate(key.module) for key in parsed if key.part}
    return dict(sorted(Counter(place[0] for place in places if place).items()))


def _triggers(file: LoraFile) -> tuple[str, ...]:
    if file.format == "token":
        return (printable(file.path.stem),)
    phrase = file.metadata.get("modelspec.trigger_phrase") or file.metadata.get("ss_trigger_words")
    if phrase:
        return (phrase,)
    try:
        counts: Counter[str] = Counter()
        for tags in json.loads(file.metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({printable(tag.strip()): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return ()
    return tuple(tag for tag, _ in counts.most_common(MOST_TRIGGERS))


def _notes(file: LoraFile, kind: str) -> list[str]:
    notes = []
    if kind == "checkpoint":
        notes.append("This is a whole model, not a LoRA. Use it with --model.")
    parts = {split_key(key).part for key in file.table}
    if parts & {"dora_scale", "lora_magnitude_vector"}:
        notes.append("This is a DoRA. Tools that support only plain LoRA generate different images with it.")
    elif file.format == "lycoris" and (file.unmatched or not file.modules):
        notes.append("This is a LyCORIS file, not a plain LoRA. echodistill cannot load it.")
    if any(key.startswith("bundle_emb.") for key in file.table):
        notes.append(
            "A learned token is bundled into the file. A1111 and SD.Next read it; ComfyUI does as an embedding."
        )
    elif token := file.metadata.get("echodistill.token_file"):
        notes.append(f"Its token was learned. Load {token} as an embedding, too.")
    if file.unclear:
        notes.append(f"The strength is not known: {file.unclear}. echodistill does not load it.")
    if file.strength_source and any(module.scale != 1 for module in file.modules):
        in_header = ADAPTER_METADATA_KEY in file.strength_source
        place, reader = ("the header", "diffusers") if in_header else (file.strength_source, "peft")
        notes.append(f"Its alpha is in {place}, which only {reader} reads. Other tools apply the LoRA at strength 1.")
    return notes


def _no_compatibility(file: LoraFile) -> tuple[Verdict, ...]:
    names = [verdict.reader for verdict in compatibility(file)]
    return tuple(Verdict(name, "no", 0, len(file.table), "Not a LoRA or token file.") for name in names)


def _of_the_toy(file: LoraFile, verdicts: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
    """Return the verdicts, with the reason if the file was made for the embedded pair."""
    if not file.metadata.get("modelspec.architecture", "").startswith(TOY):
        return verdicts
    text = "Made for mini, a toy that only echodistill has."
    loaded = f"{text} diffusers loads the file, but has no model for it."
    return tuple(dataclasses.replace(one, text=text if one.loads == "no" else loaded) for one in verdicts)


def _token_compatibility(file: LoraFile) -> tuple[Verdict, ...]:
    token, count = printable(file.path.stem), len(file.table)
    if count > 1:
        diffusers = "partly", "Pass clip_l and clip_g to load_textual_inversion separately, each with its text encoder."
    else:
        diffusers = "fully", "Loads completely with load_textual_inversion."
    by_name = f"Loads from the embeddings folder; write {token}, the file's name, in the prompt."
    in_brackets = f"Import it in the model manager; write <{token}> in the prompt."
    one_row = all(len(shape) == 1 for _, shape in file.table.values())
    invoke = (
        ("fully", in_brackets)
        if count > 1 or one_row
        else ("no", "Does not identify a token file with rows: it knows [n].")
    )
    texts = {
        "diffusers": diffusers,
        "ComfyUI": ("fully", f"Loads from models/embeddings; write embedding:{token} in the prompt."),
        "A1111": ("fully", by_name),
        "Forge": ("fully", by_name),
        "sd-scripts": ("fully", "Loads with --textual_inversion_embeddings of its image generators."),
        "InvokeAI": invoke,
    }
    if file.family == "unknown":  # vectors of another width, such as the toy's
        widths = " and ".join(str(shape[-1]) for _, shape in file.table.values() if shape)
        texts = dict.fromkeys(texts, ("no", f"Vectors of {widths} numbers fit no SD 1, SD 2 or SDXL model."))
        texts["diffusers"] = diffusers[0], f"{diffusers[1]} The text encoder must have vectors of {widths} numbers."
    return tuple(
        Verdict(reader, loads, *((0, count) if loads == "no" else (count, 0)), text)
        for reader, (loads, text) in texts.items()
    )
