"""A manifest in its three forms, and what is said of a wrong one: file, line, and nothing is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from echodistill_cli import pipeline
from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError
from echodistill_cli.many.batch import read_subjects
from echodistill_cli.many.manifest import read_manifest
from echodistill_cli.outputs.requests import ManyRequest
from tests.helpers.commands import command, missing_flags
from tests.many.helpers import ROOT, Batch

CSV = """photos,class_name,token,train.steps,name,concept.scenes
dog,dog,007,12,,
"a, b/cat",cat,sks,,tom,"[""a {}"", ""the {}""]"

"""
JSONL = """{"photos": "dog", "class_name": "dog", "token": "007", "train.steps": 12}

{"photos": "a, b/cat", "class_name": "cat", "name": "tom", "concept": {"scenes": ["a {}", "the {}"]}}
"""
TOML = """# subjects
[[subject]]
photos = "dog"
class_name = "dog"
token = "007"
train.steps = 12

[[subject]]
photos = "a, b/cat"
class_name = "cat"
name = "tom"
concept.scenes = ["a {}", "the {}"]
"""


def build(values: Mapping[str, Any]) -> Config:
    return build_config("mini", None, {"train.steps": 7, **values})


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("subjects.csv", CSV, (2, 3)),
        ("excel.csv", CSV.replace(",", ";").replace("a; b", "a, b").replace('""; ', '"", '), (2, 3)),
        ("subjects.jsonl", JSONL, (1, 3)),
        ("subjects.toml", TOML, (2, 8)),
    ],
)
def test_the_three_forms_say_the_same(tmp_path: Path, name: str, text: str, lines: tuple[int, int]) -> None:
    file = written(tmp_path, name, text)
    dog, cat = read_manifest(file, tmp_path / "out", build)
    assert [row.place for row in (dog, cat)] == [f"{file}, line {line}" for line in lines]
    concept = dog.config.concept
    assert (concept.photos, concept.class_name, concept.token) == (str(tmp_path / "dog"), "dog", "007")
    assert (dog.config.name, dog.config.train.steps) == ("dog", 12)
    assert dog.config.output == tmp_path / "out" / "dog"
    concept = cat.config.concept
    assert (concept.photos, concept.token, concept.scenes) == (
        str(tmp_path / "a, b" / "cat"),
        "sks",
        ("a {}", "the {}"),
    )
    assert (cat.config.name, cat.config.train.steps) == ("tom", 7)  # the flag's, as its cell is empty
    assert cat.config.output == tmp_path / "out" / "tom"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "m.csv",
            "photos,train.stepz\ndog,5\n",
            r"m\.csv, line 2: 'train\.stepz' .* Did you mean train\.steps",
        ),
        ("m.csv", "photos,class\ndog,5\n", r"m\.csv, line 2: 'class' is neither .* Did you mean class_name"),
        ("m.csv", "photos,train.steps\ndog,5\ncat,many\n", r"m\.csv, line 3: train\.steps = 'many' is not an integer"),
        ("m.csv", "photos,name\ndog,x\n\ncat,X\n", r"m\.csv, line 4: the name 'X' is also that of .*m\.csv, line 2"),
        ("m.csv", "photos,class_name\n,dog\n", r"m\.csv, line 2: the row has no photos"),
        ("m.csv", "photos,class_name\ndog,dog,cat\n", r"m\.csv, line 2: it has 3 cells for 2 columns"),
        ("m.csv", 'photos,class_name\n"dog,dog\n', r"m\.csv, line 2: it is not valid CSV"),
        ("m.csv", "photos,photos\na,b\n", r"m\.csv, line 1: the column 'photos' is there twice"),
        ("m.csv", "photos,run.output\ndog,x\n", r"m\.csv, line 2: run\.output cannot be set for one subject"),
        ("m.csv", "photos\nx/logs\n", r"m\.csv, line 2: 'logs' is a name that the output uses itself"),
        ("m.csv", "photos\n", r"m\.csv has no subject"),
        ("m.jsonl", '{"photos": "dog"}\n{"photos" "cat"}\n', r"m\.jsonl, line 2: it is not valid JSON"),
        ("m.jsonl", '{"photos": "dog"}\n["cat"]\n', r"m\.jsonl, line 2: it is not an object"),
        ("m.jsonl", '{"photos": ["dog"]}\n', r"m\.jsonl, line 1: the row has no photos"),
        ("m.toml", '[[subject]]\nphotos = "dog"\n[[subject]]\nphotos = cat\n', r"m\.toml is not valid TOML: .*line 4"),
        (
            "m.toml",
            '[[subject]]\nphotos="dog"\n[[subject]]\nphotos="b"\ntrain.lr=-1\n',
            r"m\.toml, line 3: train\.lr",
        ),
        ("m.toml", '[[photo]]\nphotos = "dog"\n', r"m\.toml: 'photo' is not a table \[\[subject\]\]"),
        ("m.txt", "dog\n", r"m\.txt is no manifest: its name ends in none of \.csv, \.jsonl, \.toml"),
    ],
)
def test_a_wrong_manifest_is_refused_with_file_and_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        read_manifest(written(tmp_path, name, text), tmp_path, build)
    assert missing_flags(refused.value.hint or "", "train-many") == set()


def test_a_model_of_a_row_brings_its_preset(tmp_path: Path) -> None:
    file = written(tmp_path, "m.csv", "photos,model\ndog,sdxl-turbo\n")
    manifest = command("train-many", file, "--dry-run", "-o", tmp_path / "out")
    assert manifest.code == 3  # its photos are missing; the row is right
    assert f"{file}, line 2:" in manifest.error


def test_photos_and_earlier_runs_are_checked_before_anything_starts(batch: Batch) -> None:
    for photo in list((batch.folder / "photos" / "two").iterdir())[1:]:
        photo.unlink()
    batch.write("one", "two", "three", three={"photos": "photos/nowhere", "name": "three"})
    done = batch()
    assert (done.code, done.out) == (3, "")
    assert f"{batch.manifest}, line 2: " in done.error
    assert "expected at least 3 usable photos" in done.error
    assert f"1 more rows are wrong, the next is {batch.manifest}, line 3" in done.error
    assert not batch.output.exists()


def test_a_plan_is_a_row_per_subject_and_writes_nothing(batch: Batch) -> None:
    batch.write("one", "two", "three", two={"train.steps": 3})
    planned = batch("--dry-run", "--json", "--steps", 5).result["subjects"]
    assert [(one["name"], one["photos"], one["steps"], one["state"]) for one in planned] == [
        ("one", 4, 5, "new"),
        ("two", 4, 3, "new"),
        ("three", 4, 5, "new"),
    ]
    assert "Nothing was loaded or written." in batch("--dry-run").out
    assert not batch.output.exists()


def test_shards_are_every_nth_row_and_together_all(batch: Batch) -> None:
    shards = [batch("--dry-run", "--json", "--shard", f"{index}/2").result["subjects"] for index in (0, 1)]
    assert [[one["name"] for one in shard] for shard in shards] == [["one", "three"], ["two"]]
    for wrong in ("2/2", "0/0", "1", "-1/2", "a/b"):
        done = batch("--dry-run", "--shard", wrong)
        assert (done.code, done.out) == (2, "")
        assert "--shard" in done.error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--name", "x"), "run.name differs between subjects"),
        (("--steps", "0"), "--steps 0 is below 1"),
        (("--on", "dask"), "--on dask is unknown. Use local, ray or ray://HOST:PORT."),
        (("--gpus-per-subject", "-1"), "--gpus-per-subject -1 is out of range"),
        (("--store", "gopher://x/y"), "--store gopher://x/y is not the URL of a storage"),
        (("--vram", "lots", "--model", "sd-turbo"), "line 1: --vram lots is not an amount of memory"),
        (("--vram", "auto", "--on", "ray"), "--vram auto measures a whole device of this machine"),
        (("--vram", "auto", "--gpus-per-subject", "0.5"), "--vram auto measures a whole device of this machine"),
    ],
)
def test_wrong_flags_are_named(batch: Batch, flags: tuple[str, ...], words: str) -> None:
    done = batch(*flags)
    assert (done.code, done.out) == (2, "")
    assert words in done.error
    assert not batch.output.exists()


def test_vram_fits_each_row_as_train_does_and_a_row_wins(batch: Batch) -> None:
    batch.write("one", "two", "three", two={"model": "sdxl-turbo"}, three={"train.batch_size": 3})
    request = ManyRequest(batch.manifest, model="sd-turbo", vram="12")
    lines: list[str] = []
    one, two, three = (subject.config for subject in read_subjects(request, pipeline.train, lines.append))
    for config, model in ((one, "sd-turbo"), (two, "sdxl-turbo")):
        expected = pipeline.fit_to_memory(partial(build_config, model, None, {}), "12")
        assert (config.train, config.model) == (expected.train, expected.model)
        assert (config.train, config.model) != (build_config(model).train, build_config(model).model)
    assert (three.train.batch_size, three.model.precision) == (3, one.model.precision)
    assert lines[0].startswith("Plan for 12.0 GiB: ")
    assert len(set(lines)) == len(lines)


PLAN = """
import sys
from echodistill_cli.cli.app import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_vram_leaves_torch_and_the_gpu_to_the_subjects(batch: Batch) -> None:
    words = batch.arguments("--dry-run", "--vram", "12", "--model", "sd-turbo")
    words.remove("--config")
    words.remove(str(batch.toml))
    done = subprocess.run([sys.executable, "-c", PLAN, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Plan for 12.0 GiB" in done.stderr
    assert done.stderr.splitlines()[-1] == "False"


def test_the_json_of_a_plan_is_one_object(batch: Batch) -> None:
    assert json.loads(batch("--dry-run", "--json").out).keys() == {"subjects"}
