"""Attack echodistill: kills at random instants, wrong input, damaged and hostile files. `make campaign`.

    python -m tests.campaign [--seed 0] [--kills 40] [--inputs 80] [--files 80] [--attacks 23] [--offline 1]

Every command runs in a child that is forked after the libraries are imported, so a kill is a real SIGKILL. Another seed
gives other instants, values and damages. What must hold:

- a killed run continues to the same weights, bit for bit, loses nothing, and leaves no temporary files;
- whatever comes in, a command ends in time, with a documented exit code, one line, and without a traceback;
- a stranger's files run no code, write nothing elsewhere and pass on no secrets (`tests/attacks.py`);
- no command reaches the network.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import torch
from safetensors.torch import load_file

from echodistill_cli.cli.app import main
from echodistill_cli.cli.options import FLAGS
from echodistill_cli.config.build import config_to_dict
from echodistill_cli.config.schema import Config
from tests.attacks import ATTACKS, Stranger, offline
from tests.helpers.commands import small_toml
from tests.helpers.random_models import build_score_encoders, build_small_backbones, build_small_pair
from tests.helpers.runs import small_photos

SECONDS = 120  # a loaded machine is slow; a command that hangs never ends
FORK = multiprocessing.get_context("fork")
CODES = {0, 1, 2, 3, 4, 5, 130, 143}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, None after a kill or a hang, what it printed, and where it connected to."""

    code: int | None
    out: str
    err: str
    network: str
    seconds: float

    @property
    def fault(self) -> str | None:
        """What no input may cause; None if all is well."""
        if self.code is None:
            return "hangs"
        if self.network:
            return f"reaches the network: {self.network}"
        if "Traceback" in self.err + self.out:
            return f"traceback: {self.err.strip().splitlines()[-1]}"
        if self.code not in CODES:
            return f"exit code {self.code}"
        if self.code and not any(line.startswith("error: ") for line in self.err.splitlines()):
            return f"exit code {self.code} without an error: {self.err[-200:]}"
        return None


def run(*words: object, kill_after: float | None = None, signals: Sequence[tuple[float, int]] = ()) -> Ended:
    """Run a command in a child process; kill it after some seconds, or send it signals after such pauses."""
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("out", "err", "network")]
        child = FORK.Process(target=_in_child, args=([str(word) for word in words], *files))
        started = time.monotonic()
        child.start()
        for pause, number in signals:
            child.join(pause)
            if child.exitcode is None and child.pid:
                os.kill(child.pid, number)
        child.join(SECONDS if kill_after is None else kill_after)
        code = child.exitcode
        child.kill()
        child.join()
        seconds = time.monotonic() - started
        out, err, network = (file.read_text("utf-8", "replace") if file.exists() else "" for file in files)
        return Ended(code, out, err, network, seconds)


def _in_child(words: list[str], out: Path, err: Path, network: Path) -> None:
    code = 1
    try:
        sys.addaudithook(functools.partial(_note_network, network))
        for number, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # the library was imported before, and reads it then
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # nothing may depend on the global generator
        sys.argv = ["echodistill", *words]
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _note_network(file: Path, event: str, arguments: tuple[object, ...]) -> None:
    """Note each attempt to resolve a name or to connect; a socket's path is no network."""
    is_local = event == "socket.connect" and isinstance(arguments[1], (str, bytes))
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect") and not is_local:
        with file.open("a") as opened:
            opened.write(f"{event} {arguments[-5:]}\n")


class Campaign:
    """The models, a finished run and the counts of one campaign."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.random = home, random.Random(seed)
        self.pair = build_small_pair(home / "pair")
        self.backbones = build_small_backbones(home / "backbones")
        self.clip, self.dino = build_score_encoders(home / "encoders", self.backbones)
        self.photos = home / "photos"
        self.photos.mkdir()
        for index, photo in enumerate(small_photos()):
            photo.image.resize((80, 80)).save(self.photos / f"{index}.png")
        changes = {"train__head_start": 4, "echo__carry_back": 4, "run__save_every": 1, "train__carry_over": True}
        self.toml = small_toml(home, self.pair, self.backbones, **changes)
        self.tried: dict[str, int] = {}
        self.faults: list[str] = []
        ended, self.reference = self.train("reference"), home / "reference"
        assert ended.code == 0, ended.err
        self.duration = ended.seconds

    def train(self, name: str, *more: object, kill_after: float | None = None) -> Ended:
        """Train, or continue, the run of a name."""
        line = ("train", self.photos, "--config", self.toml, "-o", self.home / name, *more)
        return run(*line, kill_after=kill_after)

    def note(self, kind: str, what: str, fault: str | None) -> None:
        """Count a try, and print a fault."""
        self.tried[kind] = self.tried.get(kind, 0) + 1
        if fault:
            self.faults.append(f"{kind}: {what}: {fault}")
            print(self.faults[-1][:400], flush=True)

    def difference(self, folder: Path) -> str | None:
        """What a finished run has that the unbroken one has not."""
        for name in ("sks-dog.safetensors", "teacher/sks-dog-teacher.safetensors"):
            if not (folder / name).is_file():
                return f"lacks {name}"
            ours, theirs = load_file(folder / name), load_file(self.reference / name)
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                return f"{name} differs"
        if litter := [path.name for path in folder.rglob("*.tmp")]:
            return f"litter {litter}"
        return None

    def kills(self, count: int) -> None:
        """Kill commands at random instants, do what a person would do next, and compare."""
        kinds = (self.kill_training, self.kill_overwrite, self.kill_from_step, self.kill_writing, self.signal_anything)
        for index in range(count):
            kinds[index % len(kinds)](f"run-{index}")

    def kill_training(self, name: str) -> None:
        """A run that is killed up to three times: in the head start, the joint steps, the carry back, or at the end."""
        folder = self.home / name
        for _ in range(self.random.randint(1, 3)):
            fresh = () if not (folder / "config.toml").exists() else ("--resume",)
            self.train(name, *fresh, kill_after=self.random.uniform(0.0, 1.05) * self.duration)
        self.finish(name, "kill training", "--resume" if (folder / "config.toml").exists() else "-q")

    def kill_overwrite(self, name: str) -> None:
        """A killed --overwrite: the old run is whole, or the new one goes on."""
        shutil.copytree(self.reference, self.home / name)
        self.train(name, "--overwrite", kill_after=self.random.uniform(0.2, 0.6) * self.duration)
        self.finish(name, "kill --overwrite", "--overwrite" if self.random.random() < 0.5 else "--resume")

    def kill_from_step(self, name: str) -> None:
        """A killed --from-step."""
        shutil.copytree(self.reference, self.home / name)
        steps = sorted((self.home / name / "checkpoints").iterdir())
        step = int(self.random.choice(steps).name.split("-")[1])
        kill_after = self.random.uniform(0.1, 0.7) * self.duration
        self.train(name, "--resume", "--from-step", step, kill_after=kill_after)
        self.finish(name, "kill --from-step", "--resume")

    def finish(self, name: str, kind: str, flag: str) -> None:
        """Train to the end and compare with the unbroken run."""
        ended = self.train(name, flag)
        lines = [json.loads(line) for line in (self.home / name / "metrics.jsonl").read_text().splitlines()]
        joint = [line["step"] for line in lines if "head_start_step" not in line and "carry_back_step" not in line]
        doubled = None if joint == sorted(set(joint)) else f"metrics of steps {joint}"
        fault = ended.fault or (ended.err if ended.code else self.difference(self.home / name) or doubled)
        self.note(kind, f"{name} {flag}", fault)
        if not fault:
            shutil.rmtree(self.home / name)

    def kill_writing(self, name: str) -> None:
        """A killed export, evaluate or sample, repeated: it ends well and leaves no temporary files."""
        shutil.copytree(self.reference, self.home / name)
        line = self.random.choice(list(self.writing(self.home / name)))
        run(*line, kill_after=self.random.uniform(0.05, 0.5) * self.duration)
        again = run(*line, *(["--overwrite"] if line[0] == "export" else []))
        litter = [str(path) for path in self.home.joinpath(name).rglob("*.tmp")]
        fault = again.fault or (again.err if again.code else f"litter {litter}" if litter else None)
        self.note("kill writing", str(line), fault)

    def signal_anything(self, name: str) -> None:
        """A command that gets one or two signals: it ends with the code of one of them, and leaves no litter."""
        folder = self.home / name
        shutil.copytree(self.reference, folder)
        train = ("train", self.photos, "--config", self.toml, "-o", folder)
        line = self.random.choice([(*train, "--overwrite"), (*train, "--resume"), *self.writing(folder)])
        first = (self.random.uniform(0.0, 1.0) * self.duration, self.random.choice(STOPS))
        again = [(self.random.choice((0.0, 0.01, 0.3)), self.random.choice(STOPS))] * self.random.randrange(2)
        ended = run(*line, signals=[first, *again])
        # After the command the program has no handlers, and ends as any other.
        expected = {0, *(code for _, number in (first, *again) for code in (128 + number, -number))}
        litter = [str(path) for path in folder.rglob("*.tmp")] if not again else []
        fault = ended.fault if ended.code not in expected or "Traceback" in ended.err else None
        self.note("signal", f"{line} {first} {again}", fault or (f"litter {litter}" if litter else None))
        shutil.rmtree(folder, ignore_errors=True)

    def writing(self, run_folder: Path) -> Iterator[tuple[object, ...]]:
        """Commands that write files from a finished run."""
        yield "export", run_folder, "--format", "both", "--role", "both"
        yield "export", run_folder, "--format", "pipeline"
        yield "sample", "a sks dog", "-n", 3, "--lora", run_folder, "-o", run_folder / "images"
        encoders = ("--clip", self.clip, "--dino", self.dino, "--seeds", 1)
        yield "evaluate", run_folder, "--photos", self.photos, *encoders

    def inputs(self, count: int) -> None:
        """Give commands values of the wrong kind, size or form."""
        keys = [f"{section}.{key}" for section, table in config_to_dict(Config()).items() for key in table]
        flags = [name for flag in FLAGS if not {"/", "-o"} & set(flag.names) for name in flag.names.split()[:1]]
        for index in range(count):
            word = self.random.choice(WORDS)
            flag = self.random.choice(flags)
            photos, text = self.home / f"photos-{index}", self.home / f"text-{index}"
            shutil.copytree(self.photos, photos)
            text.write_bytes(os.fsencode(word) + self.random.choice((b"", b"\xff", b"\0", b"\n# a\n")))
            base = ("--config", self.toml, "-o", self.home / f"in-{index}", "--dry-run")
            lines: list[tuple[object, ...]] = [
                ("train", self.photos, *base, flag, word),
                ("train", self.photos, *base, "--set", f"{self.random.choice(keys)}={word}"),
                ("train", self.photos, "--config", text, "--dry-run", "--model", "mini"),
                ("sample", word, "--lora", self.reference, "-o", self.home / f"in-{index}"),
                ("sample", "--prompt-file", text, "--lora", self.reference, "-o", self.home / f"in-{index}"),
                ("sample", "a", "--lora", self.reference, self.random.choice(SAMPLING), word),
                ("export", self.reference, self.random.choice(("--step", "--output", "--push-to-hub")), word),
                ("check", self.damage(photos)),
                ("inspect", text),
            ]
            line = self.random.choice(lines)
            self.note("input", str(line), run(*line).fault)

    def damage(self, folder: Path) -> Path:
        """Damage one file of a folder, and return the folder."""
        file = self.random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        content = file.read_bytes()
        place = self.random.randrange(max(len(content), 1))
        changed = {
            "cut": content[:place],
            "empty": b"",
            "flip": content[:place] + bytes([self.random.randrange(256)]) + content[place + 1 :],
            "noise": self.random.randbytes(200),
            "json": self.random.choice((b"[]", b"null", b'{"a": ' * 3000, b"{}", b'{"hidden_size": "x"}')),
            "numbers": re.sub(rb"\d+", lambda _: self.random.choice((b"0", b"-1", b"99999999999", b"1e999")), content),
        }
        others: dict[str, Callable[[Path], object]] = {"fifo": os.mkfifo, "folder": os.mkdir, "gone": str}
        others["loop"] = lambda path: path.symlink_to(path)
        kind = self.random.choice([*changed, *others])
        file.unlink()
        if kind in changed:
            file.write_bytes(changed[kind])
        else:
            others[kind](file)
        self.damaged = f"{kind} {file.relative_to(folder)}"
        return folder

    def files(self, count: int) -> None:
        """Give commands model folders, LoRA files, runs and checkpoints with a damaged file."""
        for index in range(count):
            copy, out = self.home / f"damaged-{index}", self.home / f"out-{index}"
            source = self.random.choice((self.pair[0], self.pair[1], self.reference, self.clip))
            self.damage(Path(shutil.copytree(source, copy)))
            train = ("train", self.photos, "--config", self.toml, "-o", out, "--steps", 1)
            lines: list[tuple[object, ...]] = [
                ("sample", "a", "--lora", copy, "-o", out),
                ("export", copy, "--overwrite"),
                ("inspect", copy),
                ("train", self.photos, "--config", self.toml, "-o", copy, "--resume", "--steps", 5),
                ("export", copy / "sks-dog.safetensors", "--format", "both", "-o", out),
            ]
            if source == self.clip:
                lines = [("evaluate", self.reference, "--photos", self.photos, "--clip", copy, "--dino", self.dino)]
            elif source != self.reference:
                role = "--model" if source == self.pair[0] else "--teacher"
                lines = [(*train, role, copy), ("sample", "a", "--lora", self.reference, "--model", copy)]
            line = self.random.choice(lines)
            self.note("file", f"{line[0]} {self.damaged}", run(*line).fault)

    def attacks(self, count: int) -> None:
        """Run what a person would run on a stranger's files, and look for harm."""
        models = {"student": self.pair[0], "teacher": self.pair[1], "clip": self.clip, "dino": self.dino}
        for index, attack in enumerate(ATTACKS[:count]):
            place = Stranger(self.home / f"attack-{index}", self.reference, models, self.photos, self.toml)
            lines = attack(place)
            before, fault = place.snapshot(), None
            for line in lines:
                ended = run(*line)
                if found := ended.fault or place.harm(before, ended.out + ended.err):
                    fault = f"{line}: {found}"
            self.note("attack", attack.__name__, fault)
            shutil.rmtree(place.home)

    def offline(self, count: int) -> None:
        """Run every command of the embedded pair with --offline in a process of its own."""
        for index in range(count):
            home = self.home / f"offline-{index}"
            home.mkdir()
            for name, fault in offline(home, self.photos):
                self.note("offline", name, fault)


_SHORT = """0 -1 1e999 nan 99999999999999999999 ключ a/b ../x {} [1] off none " ' true 1,2,,3 ~nobody/x /proc/self/mem
C:\\a <lora:a:1> 2024-01-01 0x10 auto cuda:99 meta @ owner/name@main 🐸 \u202eabc 1_000 1e-400 -0 .inf"""
STOPS = (signal.SIGINT, signal.SIGTERM)
WORDS = (*_SHORT.split(), "", "a\nb", "--w 3", "x" * 300, "{" * 2000, "sks " * 200)
SAMPLING = ("--size", "--steps", "--guidance", "--seed", "--lora-scale", "--role", "--model", "-n", "--width", "-o")


def begin() -> None:
    """Run the campaign of the command line; exit with 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    for name, count in {"kills": 40, "inputs": 80, "files": 80, "attacks": len(ATTACKS), "offline": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):  # some commands write where they run
        campaign = Campaign(Path(home), options.seed)
        for name in ("attacks", "offline", "inputs", "files", "kills"):
            getattr(campaign, name)(getattr(options, name))
    print(f"tried {campaign.tried}: {len(campaign.faults)} faults")
    sys.exit(1 if campaign.faults else 0)


if __name__ == "__main__":
    begin()
