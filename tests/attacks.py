"""Be a hostile stranger: 20 and more tries to run code, write elsewhere, read secrets or reach the network.

`python -m tests.campaign --attacks` runs them. Each function of `ATTACKS` prepares the files of a stranger and returns
the commands that a trusting person would run on them. After each, `harm` looks for what must never happen:

- code of the stranger ran;
- a file outside of the output folder and of the stranger's own folder was made, changed or deleted;
- a private file's content got into a file or onto the terminal;
- control characters reached the terminal; a connection was opened; a command hung or ended with a traceback.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from echodistill_cli.runs import REPORT

Lines = list[tuple[object, ...]]
SECRET = "private-7391-do-not-pass-on"
CONTROL = "\x1b]0;title\x07\x1b[2J"
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
# Runs a command with every attempt to reach the network noted, in a process of its own: --offline must work by itself.
_GUARD = """
import os, runpy, sys
log = open(sys.argv.pop(1), "a")
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"):
        print(event, arguments[:2], file=log, flush=True)
    if event == "socket.connect" and not isinstance(arguments[1], (str, bytes)):
        print(event, arguments[1], file=log, flush=True)
sys.addaudithook(hook)
runpy.run_module("echodistill_cli", run_name="__main__", alter_sys=True)
"""


class Stranger:
    """One attack's place: `theirs` comes from the stranger, `out` is the person's output, the rest is private.

    Args:
        home: new folder.
        reference: a finished run.
        models: folders of the student, the teacher, CLIP and the ViT.
        photos: a folder of usable photos.
        toml: settings of a short run.
    """

    def __init__(self, home: Path, reference: Path, models: Mapping[str, Path], photos: Path, toml: Path) -> None:
        self.home, self.models, self.photos, self.toml = home, models, photos, toml
        self.theirs, self.out, self.private = home / "theirs", home / "out", home / "private"
        self.mark, self.trainings = home / "code-was-run", 0
        for folder in (self.theirs, self.private):
            folder.mkdir(parents=True)
        (self.private / "diary.txt").write_text(SECRET)
        Image.new("RGB", (64, 64), "red").save(self.private / "photo.png", pnginfo=_png_text())
        self.run = Path(shutil.copytree(reference, self.theirs / "run"))

    def train(self, *more: object) -> tuple[object, ...]:
        """Return a training of one step on the person's own photos."""
        self.trainings += 1
        output = self.out / f"run-{self.trainings}"
        return ("train", self.photos, "--config", self.toml, "-o", output, "--steps", 1, *more)

    def model(self, name: str = "student") -> Path:
        """Return a copy of a model folder that the attack may change."""
        return Path(shutil.copytree(self.models[name], self.theirs / name))

    def set(self, **values: object) -> None:
        """Change settings in the run's config.toml."""
        text = (self.run / "config.toml").read_text()
        for key, value in values.items():
            assert re.search(rf"(?m)^{key} = .*$", text), key
            line = f"{key} = {json.dumps(value)}".replace("\\", r"\\")  # as a template
            text = re.sub(rf"(?m)^{key} = .*$", line, text)
        (self.run / "config.toml").write_text(text)

    def pickle(self, file: Path) -> Path:
        """Write a pickle that creates the mark when it is loaded."""
        file.write_bytes(pickle.dumps(_Evil(str(self.mark))))
        return file

    def code(self, folder: Path) -> None:
        """Put a module beside a model's files that creates the mark when it is imported."""
        text = f"open({str(self.mark)!r}, 'w')\nclass Evil:\n    from_pretrained = from_config = lambda *a, **k: None\n"
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            (place / "evil.py").write_text(text)

    def snapshot(self) -> dict[str, str]:
        """Return all that the person did not hand over: the path and the content of each file."""
        state = {}
        for path in sorted(self.home.rglob("*")):
            if not {self.theirs, self.out} & {path, *path.parents}:
                content = path.read_bytes() if path.is_file() else b""
                state[str(path.relative_to(self.home))] = hashlib.sha256(content).hexdigest()
        return state

    def harm(self, before: Mapping[str, str], printed: str) -> str | None:
        """Return what an attack achieved; None if nothing."""
        if self.mark.exists():
            return "code was run"
        after = self.snapshot()
        if changed := [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]:
            return f"wrote or deleted outside: {changed}"
        if _CONTROLS.search(printed):
            return f"control characters: {_CONTROLS.sub('#', printed)[-200:]}"
        files = [path for place in (self.theirs, self.out) for path in place.rglob("*")]
        # The report shows the photos and their captions by design, and is never sent.
        new = [path for path in files if path.is_file() and not path.is_symlink() and path.name != REPORT]
        if SECRET in printed or any(SECRET.encode() in path.read_bytes() for path in new):
            return "a private file's content was passed on"
        return None


class _Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.mark, "w")


def _png_text() -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", SECRET)
    return info


def _rewrite(folder: Path, pattern: str, changes: Mapping[str, Any]) -> None:
    for file in folder.rglob(pattern):
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def code_in_every_config(place: Stranger) -> Lines:
    """Settings of all parts of a model name the folder's own module."""
    model = place.model()
    auto = ("AutoModel", "AutoTokenizer", "AutoConfig", "AutoImageProcessor", "UNet2DConditionModel")
    _rewrite(model, "*config.json", {"auto_map": dict.fromkeys(auto, "evil.Evil"), "trust_remote_code": True})
    place.code(model)
    return [("sample", "a", "--lora", place.run, "--model", model, "-o", place.out), place.train("--model", model)]


def code_as_class(place: Stranger) -> Lines:
    """Class names of all parts are those of the folder's own module."""
    model = place.model()
    _rewrite(model, "*config.json", {"_class_name": "evil.Evil", "architectures": ["evil.Evil"]})
    _rewrite(model, "tokenizer_config.json", {"tokenizer_class": "evil.Evil", "chat_template": "{{ 1 / 0 }}"})
    place.code(model)
    return [place.train("--model", model), ("sample", "a", "--lora", place.run, "--model", model, "-o", place.out)]


def code_in_the_index(place: Stranger) -> Lines:
    """model_index.json names a module of the folder for each part and for the pipeline."""
    model = place.model()
    index = model / "model_index.json"
    entries = json.loads(index.read_text()) if index.is_file() else {}
    entries |= {part.name: ["evil", "Evil"] for part in model.iterdir() if part.is_dir()}
    index.write_text(json.dumps(entries | {"_class_name": ["pipeline", "Evil"]}))
    place.code(model)
    shutil.copyfile(model / "evil.py", model / "pipeline.py")
    return [
        ("sample", "a", "--lora", place.run, "--model", model, "-o", place.out),
        ("export", place.run, "--model", model, "--format", "pipeline", "-o", place.out),
    ]


def code_in_a_processor(place: Stranger) -> Lines:
    """The encoder of the scores has a processor and a model of its own; a yes waits on stdin."""
    clip = place.model("clip")
    auto = ("AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor", "AutoConfig")
    settings = {"auto_map": dict.fromkeys(auto, "evil.Evil"), "image_processor_type": "Evil", "processor_class": "Evil"}
    for name in ("preprocessor_config.json", "processor_config.json", "image_processor_config.json"):
        (clip / name).write_text(json.dumps(settings))
    _rewrite(clip, "config.json", settings)
    place.code(clip)
    scores = ("--clip", clip, "--dino", place.models["dino"], "--seeds", 1, "-o", place.out)
    return [("evaluate", place.run, "--photos", place.photos, *scores)]


def code_in_a_backbone(place: Stranger) -> Lines:
    """An image encoder of the losses has code of its own."""
    clip = place.model("clip")
    _rewrite(clip, "config.json", {"auto_map": {"AutoModel": "evil.Evil"}, "model_type": "evil"})
    place.code(clip)
    return [place.train("--discriminators", f"{clip}", "--identity", clip)]


def kernels_from_the_hub(place: Stranger) -> Lines:
    """Attention is set to a kernel of a repository, at the top and nested."""
    model, clip = place.model(), place.model("clip")
    name = "owner/evil-attention"
    _rewrite(model / "text_encoder", "config.json", {"attn_implementation": name})
    nested = {"text_config": {"_attn_implementation": name}, "_attn_implementation_internal": name}
    _rewrite(clip, "config.json", nested | {"use_kernels": True})
    encoders = ("--clip", clip, "--dino", place.models["dino"], "--seeds", 1, "-o", place.out)
    return [
        ("sample", "a", "--lora", place.run, "--model", model, "-o", place.out),
        ("evaluate", place.run, "--photos", place.photos, *encoders),
    ]


def pickled_model_weights(place: Stranger) -> Lines:
    """A model folder has pickles instead of safetensors, under every usual name."""
    model = place.model()
    for weights in list(model.rglob("*.safetensors")):
        weights.unlink()
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "model.pt"):
            place.pickle(weights.with_name(name))
    return [
        ("sample", "a", "--lora", place.run, "--model", model, "-o", place.out),
        place.train("--model", model),
        place.train("--teacher", model),
    ]


def pickle_under_another_name(place: Stranger) -> Lines:
    """A LoRA, a model and a VAE are pickles, some of them named .safetensors."""
    files = [place.pickle(place.theirs / f"evil.{end}") for end in ("safetensors", "ckpt", "pt", "bin", "pth")]
    lines = Lines()
    for file in files:
        lines += [("inspect", file), ("sample", "a", "--lora", file, "-o", place.out)]
    lines += [place.train("--model", files[0]), place.train("--model", files[1]), place.train("--vae", files[0])]
    return [*lines, place.train("--student-lora", files[2])]


def pickle_as_weights_with_an_index(place: Stranger) -> Lines:
    """The list of a model's shards names a pickle and a file outside."""
    model = place.model()
    weights = next((model / "unet").glob("*.safetensors"))
    names = dict.fromkeys(load_file(weights), "shard.bin") | {"conv_in.weight": "../../../private/diary.txt"}
    weights.unlink()
    place.pickle(weights.with_name("shard.bin"))
    weights.with_suffix(".safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return [("sample", "a", "--lora", place.run, "--model", model, "-o", place.out)]


def code_in_a_checkpoint(place: Stranger) -> Lines:
    """A run's checkpoints are pickles that run code, with the right checksum."""
    for folder in (place.run / "checkpoints").iterdir():
        state = place.pickle(folder / "state.pt")
        manifest = {"step": 4, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    torch.save({"step": 4, "x": _Evil(str(place.mark))}, state)
    manifest = {"step": 4, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    (state.parent / "manifest.json").write_text(json.dumps(manifest))
    resume = ("train", place.photos, "--config", place.toml, "-o", place.run, "--resume", "--steps", 5)
    return [resume, ("export", place.run, "--step", 4, "-o", place.out)]


def output_of_a_run_elsewhere(place: Stranger) -> Lines:
    """A run's settings name the private folder as its output, its photos and its masks."""
    place.set(output=str(place.private / "run"), photos=str(place.private), masks="auto", name="sks-dog")
    return [
        ("export", place.run, "--format", "both", "--overwrite"),
        ("export", place.run, "--push-to-hub", "owner/name", "--dry-run"),
        ("sample", "a", "--lora", place.run, "-o", place.out),
        ("inspect", place.run),
    ]


def names_that_climb(place: Stranger) -> Lines:
    """Name, token and class of a run lead out of it."""
    lines = Lines()
    original = (place.run / "config.toml").read_text()
    for index, name in enumerate(("../escaped", str(place.private / "escaped"), "..", "a/../../../x", "C:\\x", "\0")):
        run = Path(shutil.copytree(place.run, place.theirs / f"run-{index}"))
        for key in ("name", "token", "class_name"):
            line = f"{key} = {json.dumps(name)}".replace("\\", r"\\")  # as a template
            changed = re.sub(rf'(?m)^{key} = ".*"$', line, original)
            (run / "config.toml").write_text(changed)
            (place.theirs / f"{key}-{index}").mkdir()
            shutil.copytree(run, place.theirs / f"{key}-{index}" / "run")
            lines.append(("export", place.theirs / f"{key}-{index}" / "run", "--overwrite", "--role", "both"))
    return lines


def names_in_a_header(place: Stranger) -> Lines:
    """A LoRA's header and its bundled token have names that lead elsewhere."""
    names = ("ss_output_name", "modelspec.title", "echodistill.token", "echodistill.name", "modelspec.trigger_phrase")
    fields = dict.fromkeys(names, "../private/escaped") | {"modelspec.architecture": "stable-diffusion-v2-512"}
    module, lines = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", Lines()
    lora = {f"{module}.lora_down.weight": torch.ones(2, 1024), f"{module}.lora_up.weight": torch.ones(320, 2)}
    (place.out / "private").mkdir(parents=True)
    for index, word in enumerate((str(place.private / "escaped"), "../private/escaped", "a/../../private/escaped")):
        file = place.theirs / f"dog-{index}.safetensors"
        save_file(lora | {f"bundle_emb.{word}.string_to_param.*": torch.ones(1, 1024)}, file, fields)
        lines += [
            ("inspect", file),
            ("export", file, "--format", "both", "-o", place.out),
            ("export", file, "--format", "pipeline", "-o", place.out, "--model", place.models["student"]),
            ("sample", "a", "--lora", file, "--model", place.models["student"], "-o", place.out),
        ]
    return lines


def links_as_targets(place: Stranger) -> Lines:
    """Where an export writes files, the run has links to a private file."""
    (place.run / "export" / "teacher").mkdir(parents=True)
    names = ("sks-dog.safetensors", "sks-dog-diffusers.safetensors", "sks-dog-merged.safetensors", "sks.safetensors")
    for name in (*names, "sks-dog.png", "sks-dog.preview.png", "sks-dog.json", "sks-dog-workflow.json"):
        (place.run / "export" / name).symlink_to(place.private / "diary.txt")
    return [
        ("export", place.run, "--format", "both"),
        ("export", place.run, "--format", "both", "--overwrite"),
        ("export", place.run, "--format", "checkpoint", "--overwrite"),
        ("export", place.run / "sks-dog.safetensors", "--format", "both", "--overwrite"),
    ]


def links_as_target_folders(place: Stranger) -> Lines:
    """The folders that an export writes are links to private ones."""
    (place.run / "export").symlink_to(place.private)
    other = Path(shutil.copytree(place.run, place.theirs / "other", symlinks=True))
    (other / "export").unlink()
    (other / "export").mkdir()
    (other / "export" / "sks-dog-merged").symlink_to(place.private)
    return [
        *(("export", place.run, "--format", layout, "--overwrite") for layout in ("kohya", "pipeline", "checkpoint")),
        *(("export", other, "--format", layout, "--overwrite") for layout in ("kohya", "pipeline")),
    ]


def links_as_folders(place: Stranger) -> Lines:
    """Folders of a run are links to private ones, and it is continued and exported."""
    for name in ("samples", "checkpoints", "teacher", "logs", "photos"):
        old = place.run / name
        if old.is_dir():
            shutil.move(old, place.private / name)
        else:
            (place.private / name).mkdir()
        old.symlink_to(place.private / name)
    resume = ("train", place.photos, "--config", place.toml, "-o", place.run, "--resume", "--steps", 6)
    return [resume, (*resume, "--from-step", 2), ("export", place.run, "--role", "both", "--overwrite")]


def links_before_cleaning(place: Stranger) -> Lines:
    """A run and what a killed process left in it are links; it is overwritten, and the links must not be followed."""
    (place.run / ".sks-dog-merged.999999.tmp").symlink_to(place.private)
    (place.run / "checkpoints" / "step-000001").symlink_to(place.private)
    (place.run / "samples" / "all").symlink_to(place.private)
    (place.run / "metrics.jsonl").unlink()
    (place.run / "metrics.jsonl").symlink_to(place.private / "diary.txt")
    train = ("train", place.photos, "--config", place.toml, "-o", place.run)
    return [(*train, "--resume", "--steps", 5), (*train, "--overwrite", "--steps", 1)]


def names_in_a_manifest(place: Stranger) -> Lines:
    """Subjects of train-many are called as paths that lead out of the output."""
    lines = Lines()
    for index, name in enumerate(("../../private/escaped", str(place.private / "escaped"), "..", "", ".", "a/b")):
        file = place.theirs / f"subjects-{index}.jsonl"
        file.write_text(json.dumps({"photos": str(place.photos), "name": name, "token": "sks", "class_name": "dog"}))
        train = ("train-many", file, "--config", place.toml, "--set", "train.steps=1")
        lines.append((*train, "-o", place.out, "--dry-run"))
        output = json.dumps({"photos": str(place.photos), "name": "dog", "run.output": str(place.private / "run")})
        (place.theirs / f"output-{index}.jsonl").write_text(output)
    return [*lines, ("train-many", place.theirs / "output-0.jsonl", "--config", place.toml, "-o", place.out)]


def control_in_a_header(place: Stranger) -> Lines:
    """Control sequences in a LoRA's header alone, then in its keys and its token too."""
    names = ("modelspec.trigger_phrase", "ss_sd_model_name", "modelspec.title", "echodistill.role", "echodistill.token")
    fields = dict.fromkeys(names, CONTROL) | {"modelspec.architecture": "stable-diffusion-v2-512"}
    extra = {f"{CONTROL}key": torch.ones(1), f"bundle_emb.{CONTROL}.string_to_param.*": torch.ones(1, 32)}
    lines, student = Lines(), place.models["student"]
    for name, more in {"header": {}, "keys": extra}.items():
        file = place.theirs / f"{name}.safetensors"
        save_file(load_file(place.run / "sks-dog.safetensors") | more, file, fields)
        lines += [
            ("inspect", file),
            ("export", file, "--format", "both", "-o", place.out / name),
            ("sample", "a", "--lora", file, "--model", student, "-o", place.out),
        ]
    return lines


def control_in_settings(place: Stranger) -> Lines:
    """Control sequences in settings, prompts, names of photos and of a model's files."""
    place.set(class_name=f"dog{CONTROL}", student=f"x/{CONTROL}")
    photos = Path(shutil.copytree(place.photos, place.theirs / "photos"))
    (photos / f"{CONTROL}.png").write_bytes(b"no image")
    (photos / f"{CONTROL}.txt").write_text(CONTROL)
    prompts, wrong = place.theirs / "prompts.txt", place.theirs / "wrong.toml"
    prompts.write_text(f"a dog {CONTROL}\n--w 3 {CONTROL}\n")
    wrong.write_text('["\\u001b]0;x\\u0007"]\na = 1\n[model]\nstudent = "\\u001b[2J"\n')
    return [
        ("inspect", place.run),
        ("sample", "a", "--lora", place.run, "-o", place.out),
        ("check", photos),
        ("train", photos, "--config", place.toml, "-o", place.out, "--dry-run"),
        ("sample", "--prompt-file", prompts, "--lora", place.run, "-o", place.out),
        ("train", place.photos, "--config", wrong, "-o", place.out, "--dry-run"),
    ]


def links_in_a_card(place: Stranger) -> Lines:
    """A card shows private files, some through links in samples/, and the run is sent to the hub as a trial."""
    (place.run / "samples" / "nice.png").symlink_to(place.private / "photo.png")
    (place.run / "sks-dog.preview.png").unlink(missing_ok=True)
    (place.run / "sks-dog.preview.png").symlink_to(place.private / "photo.png")
    (place.run / "metrics.jsonl").unlink()
    (place.run / "metrics.jsonl").symlink_to(place.private / "diary.txt")
    links = ("samples/nice.png", "../../private/photo.png", str(place.private / "photo.png"), "samples/../../x.png")
    with (place.run / "README.md").open("a") as card:
        card.write("".join(f"\n![image]({link})" for link in links))
    return [("export", place.run, "--push-to-hub", "owner/name", "--dry-run", "--json")]


def trackers_of_a_setting(place: Stranger) -> Lines:
    """Settings send the metrics to trackers with a network, and name models of the hub."""
    text, lines = place.toml.read_text(), Lines()
    for index, tracker in enumerate(("wandb", "mlflow", "comet_ml", "trackio", "tensorboard", "clearml", "aim")):
        changed = re.sub(r"(?m)^report_to = .*$", f'report_to = ["{tracker}"]', text)
        toml = place.theirs / f"settings-{index}.toml"
        toml.write_text(changed)
        train = ("train", place.photos, "--config", toml, "-o", place.out, "--steps", 1)
        lines.append((*train, "--overwrite", "--offline"))
    return lines


def models_of_a_setting(place: Stranger) -> Lines:
    """A run's settings name models of the hub, with --offline."""
    place.set(student="owner/evil", teacher="owner/evil", tiny_decoder="owner/evil", decoder="tiny")
    sample = ("sample", "a", "--lora", place.run, "-o", place.out, "--offline")
    return [sample, ("export", place.run, "--format", "pipeline", "-o", place.out)]


def photos_that_are_links(place: Stranger) -> Lines:
    """A folder of photos has links to private images; the LoRA and its card pass nothing on."""
    photos = Path(shutil.copytree(place.photos, place.theirs / "photos"))
    (photos / "link.png").symlink_to(place.private / "photo.png")
    (photos / "link.txt").symlink_to(place.private / "diary.txt")
    (photos / "masks").symlink_to(place.private)
    train = ("train", photos, "--config", place.toml, "-o", place.out, "--steps", 1)
    return [("check", photos), train, ("export", place.out, "--push-to-hub", "owner/name", "--dry-run")]


ATTACKS: tuple[Callable[[Stranger], Lines], ...] = (
    *(code_in_every_config, code_as_class, code_in_the_index, code_in_a_processor, code_in_a_backbone),
    *(kernels_from_the_hub, pickled_model_weights, pickle_under_another_name, pickle_as_weights_with_an_index),
    *(code_in_a_checkpoint, output_of_a_run_elsewhere, names_that_climb, names_in_a_header, links_as_targets),
    *(
        links_as_target_folders,
        links_as_folders,
        links_before_cleaning,
        names_in_a_manifest,
        control_in_a_header,
        control_in_settings,
    ),
    *(links_in_a_card, trackers_of_a_setting, models_of_a_setting, photos_that_are_links),
)


def offline(home: Path, photos: Path) -> Iterator[tuple[str, str | None]]:
    """Run each command of `mini` with --offline in a process of its own; yield its name and its connections."""
    run, guard, log = home / "run", home / "guard.py", home / "connections"
    guard.write_text(_GUARD)
    short = [f"train.{key}=0" for key in ("head_start", "first_targets", "class_share", "replays")]
    settings = [word for one in (*short, "echo.carry_back=0") for word in ("--set", one)]
    train = ("train", photos, "--class-name", "dog", "--offline")
    lines: dict[tuple[object, ...], int] = {
        (*train, "--model", "mini", "--steps", 1, "-o", run, "--no-echo", *settings): 0,
        (*train, "--model", "sd-turbo", "-o", home / "none"): 4,
        ("sample", "a sks dog", "--lora", run, "-o", home / "images", "--offline"): 0,
        ("export", run, "--format", "both", "--offline"): 0,
        ("evaluate", run, "--photos", photos, "--seeds", 1, "--offline"): 0,
        ("inspect", run): 0,
        ("doctor",): 0,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    for line, code in lines.items():
        log.write_text("")
        words = [sys.executable, str(guard), str(log), *map(str, line)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400, check=False)
        yield str(line[0]), log.read_text() or (done.stderr[-300:] if done.returncode != code else None)
