"""Predict which tools load a LoRA file: the module names that each tool knows, and a one-line verdict.

The rules come from the tools' sources: ComfyUI `comfy/lora.py` and `comfy/utils.py`, A1111
`extensions-builtin/Lora/networks.py`, Forge `extensions-builtin/sd_forge_lora/networks.py` (it vendors ComfyUI's
names), kohya-ss/sd-scripts `networks/lora.py`, diffusers 0.42.1 `loaders/lora_pipeline.py`. A reader applies a
key if it knows both the name of its module and its part. Of InvokeAI, SD.Next and stable-diffusion.cpp it is known what
they do with plain LoRAs in kohya's and diffusers' layouts, so they get a verdict on such files alone.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from echodistill_cli.errors import counted
from echodistill_cli.lora.keys import (
    ARCHITECTURES,
    OTHER_PARTS,
    TEXT_ATTENTION,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    ParsedKey,
    locate,
    split_key,
    text_paths,
    to_sgm,
    unet_paths,
)
from echodistill_cli.lora.read import LoraFile
from echodistill_cli.lora.transformer_keys import ARCHITECTURES as TRANSFORMERS
from echodistill_cli.lora.transformer_keys import knows

FORGE_TOLERATES = 12
_OFT = frozenset({"oft_blocks", "oft_diag"})
_OLD_SUFFIX = re.compile(r"_lora\.(?:down|up)\.weight$")
_SAME_SCALE = 1e-6
_PLAIN = frozenset({"down", "up", "alpha"})
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PIPELINE_PREFIXES = (*_KOHYA, "unet.", "text_encoder.", "text_encoder_2.")
_OUTSIDE_BLOCKS = ("conv_in", "conv_out", "time_embedding", "add_embedding")


@dataclass(frozen=True)
class Verdict:
    """What one reader does with one file.

    Attributes:
        reader: the tool's name.
        loads: "fully", "partly", "hidden" (loadable, but the user interface does not list it) or "no".
        matched: number of keys it applies.
        unmatched: number of keys it ignores.
        text: one line for a person.
    """

    reader: str
    loads: str
    matched: int
    unmatched: int
    text: str


def compatibility(file: LoraFile) -> tuple[Verdict, ...]:
    """Return each reader's verdict on loading a LoRA file onto a model of the file's family."""
    if file.family in TRANSFORMERS:
        return _transformer_verdicts(file)
    known = _READERS if _is_common(file) else [reader for reader in _READERS if not reader.common_files_only]
    return tuple(_verdict(file, reader) for reader in known)


def _transformer_verdicts(file: LoraFile) -> tuple[Verdict, ...]:
    """Return the verdicts on a transformer's LoRA; ComfyUI reads the names of FLUX.2's own code."""
    places = [locate(split_key(key).module) for key in file.table]
    matched = sum(place is not None and knows(file.family, place[1]) for place in places)
    count, rest = len(file.table), len(file.table) - matched
    pipeline = TRANSFORMERS[file.family].pipeline
    text = f"Loads completely with {pipeline}.load_lora_weights."
    others = f"{rest} of its {count} keys are not of attention layers, which is all that is known here."
    verdict = Verdict("diffusers", "partly" if rest else "fully", matched, rest, others if rest else text)
    if file.format != "kohya":
        return (verdict,)
    return (verdict, replace(verdict, reader="ComfyUI", text=others if rest else "Loads completely."))


def _is_common(file: LoraFile) -> bool:
    """Return whether a file is a plain LoRA in kohya's or diffusers' layout; it may have a bundled token."""
    keys = [key for key in file.table if not key.startswith("bundle_emb.")]
    kohya = all(key.startswith(_KOHYA) and not _OLD_SUFFIX.search(key) for key in keys)
    diffusers = all(key.startswith((UNET, TEXT_ENCODER)) and ".processor." not in key for key in keys)
    return (kohya or diffusers) and all(split_key(key).part in _PLAIN for key in keys)


@dataclass(frozen=True)
class _Reader:
    """The rules of one reader.

    Attributes:
        name: the tool's name.
        names: module names that it knows, by family.
        parts: parts of a module that it knows.
        any_model: it also loads LoRAs of models other than SD and SDXL.
        verdict: from the file and its matched and unmatched keys to `loads` and `text`.
        bundles: it reads a learned token that is bundled into a LoRA file.
        old_suffixes: it reads `_lora.down.weight` after kohya's names of modules.
        common_files_only: its rules are known for plain LoRAs in kohya's and diffusers' layouts alone.
    """

    name: str
    names: Callable[[str], frozenset[str]]
    parts: frozenset[str]
    any_model: bool
    verdict: Callable[[LoraFile, int, int], tuple[str, str]]
    bundles: bool = False
    old_suffixes: bool = False
    common_files_only: bool = False


def _verdict(file: LoraFile, reader: _Reader) -> Verdict:
    total = len(file.table)
    if file.family == "unknown" and not reader.any_model:
        text = "Unknown: the file fits no SD 1, SD 2 or SDXL model."
        return Verdict(reader.name, "no", 0, total, text)
    parsed = [split_key(key) for key in file.table]
    full = {key.module for key in parsed if key.part in reader.parts - {"alpha"}}
    if file.family == "unknown":
        matched = sum(key.part in reader.parts and key.module.startswith(_PIPELINE_PREFIXES) for key in parsed)
    else:
        names = reader.names(file.family)
        matched = sum(_applies(reader, names, text, key, full) for text, key in zip(file.table, parsed, strict=True))
    matched += sum(key.module.startswith("bundle_emb.") for key in parsed) if reader.bundles else 0
    loads, text = reader.verdict(file, matched, total - matched)
    return Verdict(reader.name, loads, matched, total - matched, text)


def _applies(reader: _Reader, names: frozenset[str], text: str, key: ParsedKey, full: Collection[str]) -> bool:
    """Return whether a reader applies one key; α alone does nothing."""
    if key.part not in reader.parts or (key.part == "alpha" and key.module not in full):
        return False
    # Written by some training scripts of diffusers: `lora_unet_…_to_k_lora.down.weight`.
    if not reader.old_suffixes and key.module.startswith(_KOHYA) and _OLD_SUFFIX.search(text):
        return False
    is_norm = key.part in ("w_norm", "b_norm") and locate(key.module) is not None
    return key.module in names or is_norm


def _comfy_verdict(_file: LoraFile, matched: int, unmatched: int) -> tuple[str, str]:
    if matched == 0:
        return "no", "Applies nothing: it knows none of the keys."
    if unmatched:
        return "partly", f'Applies {counted(matched, "key")} and logs "lora key not loaded" for {unmatched}.'
    return "fully", "Loads completely."


def _forge_verdict(file: LoraFile, matched: int, unmatched: int) -> tuple[str, str]:
    if unmatched > FORGE_TOLERATES:
        return (
            "no",
            f"Applies nothing: {counted(unmatched, 'key is', 'keys are')} unknown, and it "
            f"rejects a file with more than {FORGE_TOLERATES}.",
        )
    return _comfy_verdict(file, matched, unmatched)


def _a1111_verdict(file: LoraFile, matched: int, unmatched: int) -> tuple[str, str]:
    if matched == 0:
        return "no", "Applies nothing, without a warning: it knows none of the keys."
    if unmatched:
        return "partly", f"Applies {counted(matched, 'key')} and ignores {unmatched} without a warning."
    if incomplete := _incomplete_attention(file):
        return "partly", f"Ignores {counted(incomplete, 'text-encoder layer')} lacking one of q, k, v and out."
    if hidden := _hidden(file):
        return "hidden", hidden
    return "fully", "Loads completely."


def _scripts_verdict(file: LoraFile, matched: int, unmatched: int) -> tuple[str, str]:
    if any(split_key(key).part == "lora_mid" for key in file.table):
        return "no", "Stops with an error at its Tucker convolutions."
    if matched == 0:
        return "no", "Applies nothing: it knows none of the keys."
    if unmatched:
        return "partly", f"Applies {counted(matched, 'key')} and ignores {unmatched}."
    return "fully", "Loads completely."


def _invoke_verdict(_file: LoraFile, _matched: int, unmatched: int) -> tuple[str, str]:
    if unmatched:
        return "no", "Rejects the file: it knows kohya's layout. Convert it: echodistill export FILE"
    return "fully", "Loads completely. For a merged SD-Turbo checkpoint, set its prediction type to epsilon by hand."


def _cpp_verdict(file: LoraFile, matched: int, unmatched: int) -> tuple[str, str]:
    if matched and unmatched and file.family == "sd2":
        return (
            "partly",
            f"Leaves {counted(unmatched, 'key')} of the text encoder unused: it cannot change query, key and value.",
        )
    return _scripts_verdict(file, matched, unmatched)


def _diffusers_verdict(file: LoraFile, matched: int, unmatched: int) -> tuple[str, str]:
    kohya = all(key.startswith(_KOHYA) for key in file.table)
    # It must know every kohya key (it drops dora_scale first). Its own keys only need to contain "lora".
    known = _PLAIN | {"dora_scale"}
    unknown = [
        key
        for key in file.table
        if (split_key(key).part not in known or _OLD_SUFFIX.search(key) if kohya else "lora" not in key)
    ]
    if unknown:
        return "no", f"Rejects the file because of {counted(len(unknown), 'key')} such as {unknown[0]}."
    if matched == 0:
        return "no", "Applies nothing: no key names a module of a pipeline."
    if ignored := _of_another_scheme(file):
        return "partly", f"Ignores {ignored} of {len(file.table)} keys without a warning: they mix two naming schemes."
    if unmatched:
        return "partly", f"Applies {counted(matched, 'key')} and ignores {unmatched}."
    if changed := _at_another_strength(file):
        return (
            "partly",
            f"Loads {changed} of {len(file.modules)} modules at another strength: it has one alpha for all.",
        )
    return "fully", "Loads completely with load_lora_weights."


def _of_another_scheme(file: LoraFile) -> int:
    """Return the number of keys that diffusers loses in a file that mixes `lora_A` with `lora.down`."""
    lost = 0
    for component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2):
        keys = [key for key in file.table if key.startswith(f"{component}.")]
        if keys and "lora_A" in keys[0] + keys[0].replace("lora_B", "lora_A"):
            lost += sum(".lora_A." not in key and ".lora_B." not in key for key in keys)
    return lost


def _at_another_strength(file: LoraFile) -> int:
    """Return the number of modules to which diffusers gives another strength than the file.

    It takes the most common alpha of a model for all its modules; the exceptions do not match their names.
    """
    changed = 0
    for component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2):
        modules = [module for module in file.modules if module.component == component and module.alpha is not None]
        if any(key.endswith(".alpha") for key in file.table) and len({module.alpha for module in modules}) > 1:
            alpha = Counter(module.alpha for module in modules).most_common(1)[0][0] or 0.0
            changed += sum(abs(module.scale - alpha / module.rank) > _SAME_SCALE for module in modules)
    return changed


def _hidden(file: LoraFile) -> str:
    """Return why A1111 does not list the file with models of its own family; "" if they do."""
    # A file without a header is always listed.
    if not file.metadata:
        return ""
    if file.family == "sd1":
        header_says_sd2 = file.metadata.get("ss_v2") == "True"
        return "Hidden with SD 1 models: the header says ss_v2 = True, which is SD 2." if header_says_sd2 else ""
    sdxl = file.metadata.get("ss_base_model_version", "").startswith("sdxl_")
    if file.family == "sdxl" and not sdxl:
        return "Hidden with SDXL models: the header lacks ss_base_model_version = sdxl_base_v1-0."
    if file.family == "sd2" and file.metadata.get("ss_v2") != "True":
        return "Hidden with SD 2 models: the header lacks ss_v2 = True."
    return ""


def _incomplete_attention(file: LoraFile) -> int:
    # Only OpenCLIP, SD 2's encoder and SDXL's second, has q, k and v in one weight.
    component = {"sd2": TEXT_ENCODER, "sdxl": TEXT_ENCODER_2}.get(file.family)
    paths = {module.path for module in file.modules if module.component == component}
    blocks = {path.rpartition(".")[0] for path in paths if path.endswith(TEXT_ATTENTION)}
    return sum(any(f"{block}.{name}" not in paths for name in TEXT_ATTENTION) for block in blocks)


def _text(family: str) -> Iterator[tuple[str, str]]:
    for component, layers in ARCHITECTURES[family].text_layers.items():
        yield from ((component, path) for path in text_paths(layers))


def _sgm(family: str, path: str) -> str:
    return to_sgm(path, first_upsampler=2 if family == "sdxl" else 1)


def _processor(path: str) -> str:
    """Return a path as diffusers named it while LoRA was part of attention processors."""
    old = path.replace(".to_", ".processor.to_")
    return old.removesuffix(".0") if old.endswith(".to_out.0") else old


def _flat(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


@functools.cache
def _comfy_names(family: str) -> frozenset[str]:
    names: set[str] = set()
    for path in unet_paths(family):
        sgm, old = _sgm(family, path), _processor(path)
        names |= {_flat("lora_unet_", path), _flat("lora_unet_", sgm), _flat("lycoris_", path)}
        names |= {f"diffusion_model.{sgm}", old, f"unet.{old}"}
    prefixes = {TEXT_ENCODER: ("lora_te_", "lora_te1_"), TEXT_ENCODER_2: ("lora_te2_",)}
    for component, path in _text(family):
        names |= {_flat(prefix, path) for prefix in prefixes[component]} | {f"{component}.{path}"}
        clips = ("clip_l", "clip_h") if component == TEXT_ENCODER else ("clip_g",)
        names |= {f"text_encoders.{clip}.transformer.{path}" for clip in clips}
    return frozenset(names)


@functools.cache
def _a1111_names(family: str) -> frozenset[str]:
    names: set[str] = set()
    for path in unet_paths(family):
        names.add(_flat("lora_unet_", _sgm(family, path)))
        # Its rules for diffusers' names are SD 1's: they lack add_embedding and misplace SDXL's first upsampler.
        misplaced = family == "sdxl" and path.startswith(("add_embedding", "up_blocks.0.upsamplers"))
        names |= set() if misplaced else {_flat("lora_unet_", path)}
    first = {"sd1": ("lora_te_", "lora_te1_"), "sd2": ("lora_te_",), "sdxl": ("lora_te1_",)}[family]
    prefixes = {TEXT_ENCODER: first, TEXT_ENCODER_2: ("lora_te2_",)}
    return frozenset(
        names | {_flat(prefix, path) for component, path in _text(family) for prefix in prefixes[component]}
    )


@functools.cache
def _scripts_names(family: str) -> frozenset[str]:
    paths = [path for path in unet_paths(family) if not path.startswith(_OUTSIDE_BLOCKS)]
    names = {_flat("lora_unet_", path) for path in paths}
    names |= {_flat("lora_unet_", to_sgm(path)) for path in paths if family == "sdxl"}
    prefix = {TEXT_ENCODER: "lora_te1_" if family == "sdxl" else "lora_te_", TEXT_ENCODER_2: "lora_te2_"}
    return frozenset(names | {_flat(prefix[component], path) for component, path in _text(family)})


@functools.cache
def _diffusers_names(family: str) -> frozenset[str]:
    names: set[str] = set()
    for path in unet_paths(family):
        names |= {_flat("lora_unet_", path), f"unet.{path}", f"unet.{_processor(path)}"}
        names |= {_flat("lora_unet_", to_sgm(path))} if family == "sdxl" else set()
    prefixes = {TEXT_ENCODER: ("lora_te_", "lora_te1_"), TEXT_ENCODER_2: ("lora_te2_",)}
    for component, path in _text(family):
        names |= {_flat(prefix, path) for prefix in prefixes[component]}
        names |= {f"{component}.{path}", f"{component}.{path.removeprefix('text_model.')}"}
    return frozenset(names)


@functools.cache
def _cpp_names(family: str) -> frozenset[str]:
    # It keeps query, key and value of SD 2's text encoder in one matrix, onto which it puts no LoRA.
    fused = tuple(f"self_attn_{name}" for name in TEXT_ATTENTION[:3]) if family == "sd2" else ()
    names = {name for name in _scripts_names(family) if not (fused and name.endswith(fused))}
    return frozenset(names | {f"unet.{path}" for path in unet_paths(family)})


_READERS = (
    _Reader("diffusers", _diffusers_names, _PLAIN | {"lora_magnitude_vector"}, True, _diffusers_verdict),
    _Reader("ComfyUI", _comfy_names, _PLAIN | OTHER_PARTS, False, _comfy_verdict, old_suffixes=True),
    _Reader("A1111", _a1111_names, _PLAIN | OTHER_PARTS, False, _a1111_verdict, bundles=True),
    _Reader("Forge", _comfy_names, _PLAIN | OTHER_PARTS - _OFT, False, _forge_verdict, old_suffixes=True),
    _Reader("sd-scripts", _scripts_names, _PLAIN, False, _scripts_verdict),
    _Reader("InvokeAI", _scripts_names, _PLAIN, False, _invoke_verdict, common_files_only=True),
    _Reader("SD.Next", _scripts_names, _PLAIN, False, _a1111_verdict, bundles=True, common_files_only=True),
    _Reader("stable-diffusion.cpp", _cpp_names, _PLAIN, False, _cpp_verdict, common_files_only=True),
)
