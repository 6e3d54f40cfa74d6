"""`echodistill evaluate --dreambench`: reading a checkout, every subject in turn, and going on where it stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from echodistill_cli.errors import ConfigError
from echodistill_cli.evaluation.dreambench import TABLE, read_classes, read_prompts, read_subjects
from tests.helpers.commands import Done, command, overriding, small_toml, without_a_network
from tests.helpers.random_models import build_score_encoders

Pair = tuple[Path, Path]
Backbones = dict[str, Path]

# The layout of google/dreambooth's file, with two prompts of our own in each list.
TEXT = """Classes

subject_name,class
teapot,teapot
dog2,dog
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on the beach'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in snow'.format(unique_token, class_token),
"a {0} {1} in the dog's basket".format(unique_token, class_token)
]
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    """A checkout of two subjects; not to be written to."""
    folder = tmp_path_factory.mktemp("dreambooth")
    for name in ("teapot", "dog2"):
        shutil.copytree(photo_folder, folder / "dataset" / name)
    (folder / "dataset" / TABLE).write_text(TEXT.replace("bear_plushie,stuffed animal\n", ""))
    return folder


# --- reading a checkout -----------------------------------------------------------------------------------------------


def test_classes_and_prompts_are_read_as_they_are_published() -> None:
    assert read_classes(TEXT) == {"teapot": "teapot", "dog2": "dog", "bear_plushie": "stuffed animal"}
    assert read_prompts(TEXT) == {
        "object": ("a {} on the beach", "a wet {}"),
        "live": ("a {} in snow", "a {} in the dog's basket"),
    }


@pytest.mark.parametrize("line", ["['a {0} {1} here', \"one {} {} there\"]", "  'a {} here',\n\t'one {0} there',"])
def test_other_ways_to_write_a_list_are_read_too(line: str) -> None:
    assert read_prompts(f"# Object prompts:\n{line}\n") == {}  # a comment is no heading
    assert read_prompts(f"OBJECT PROMPTS:\r\n{line}\n") == {"object": ("a {} here", "one {} there")}


def test_live_subjects_get_their_own_prompts(checkout: Path) -> None:
    for folder in (checkout, checkout / "dataset"):
        teapot, dog = read_subjects(folder)
        assert (teapot.name, teapot.class_name, teapot.templates[0]) == ("teapot", "teapot", "a {} on the beach")
        assert (dog.name, dog.class_name, dog.templates[0]) == ("dog2", "dog", "a {} in snow")
        assert dog.photos == checkout / "dataset" / "dog2"
    assert [one.name for one in read_subjects(checkout, ["dog2"])] == ["dog2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, f"has {TABLE}. Get it: git clone"),
        ("nothing of use", "no classes below a line subject_name,class"),
        (TEXT.partition("Prompts")[0], "no list below a heading"),
        (TEXT, "the photos of teapot, dog2, bear_plushie are missing"),
    ],
)
def test_what_a_checkout_lacks_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    if text:
        (tmp_path / TABLE).write_text(text)
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        read_subjects(tmp_path)


def test_a_subject_that_is_misspelt_is_guessed(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean teapot"):
        read_subjects(checkout, ["teepot"])


# --- the whole of it --------------------------------------------------------------------------------------------------


class Bench:
    """The command with a small configuration, into one output."""

    def __init__(self, folder: Path, checkout: Path, pair: Pair, backbones: Backbones) -> None:
        self.output = folder / "out"
        self.toml = small_toml(folder, pair, backbones, echo__start="off", run__save_every=1)
        self.clip, self.dino = build_score_encoders(folder, backbones)
        self.checkout = checkout

    def __call__(self, *more: object) -> Done:
        where = ["--dreambench", self.checkout, "-o", self.output, "--config", self.toml]
        line = [*where, "--clip", self.clip, "--dino", self.dino, "--seeds", 1]
        return command("evaluate", *overriding(line, *more))

    def trained_steps(self, subject: str) -> list[int]:
        """The steps of a subject's run, as it logged them."""
        lines = (self.output / subject / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def times(self) -> dict[str, int]:
        """When each file was written."""
        return {str(file): file.stat().st_mtime_ns for file in self.output.rglob("*") if file.is_file()}


@pytest.fixture
def bench(tmp_path: Path, checkout: Path, small_pair: Pair, small_backbones: Backbones) -> Bench:
    """See `Bench`."""
    return Bench(tmp_path, checkout, small_pair, small_backbones)


def test_every_subject_is_trained_and_measured_and_a_second_call_does_nothing_twice(bench: Bench) -> None:
    first = bench("--train-steps", 1, "--json")
    assert first.code == 0, first.err
    found = first.result
    assert list(found["subjects"]) == ["teapot", "dog2"]
    for name, entry in found["subjects"].items():
        assert (entry["photos"], entry["pictures"]) == (4, 2)
        assert bench.trained_steps(name) == [1]
        assert (bench.output / name / f"{name}.safetensors").is_file()
        one = json.loads((bench.output / name / "evaluation" / "evaluation.json").read_text())
        assert one["clip_i"] == entry["clip_i"]
    dog = json.loads((bench.output / "dog2" / "evaluation" / "evaluation.json").read_text())
    assert dog["per_prompt"][1]["prompt"] == "a sks dog in the dog's basket"
    assert found["mean"]["dino"] == pytest.approx(sum(one["dino"] for one in found["subjects"].values()) / 2)
    assert found["paper_sd_turbo"] == {"clip_i": 0.783, "dino": 0.637}
    assert json.loads((bench.output / "results.json").read_text())["mean"] == found["mean"]
    assert "dog2 (2 of 2): training" in first.err

    before = bench.times()
    again = bench("--train-steps", 1)
    assert again.code == 0
    assert bench.times() == before
    assert "teapot (1 of 2): has a result already" in again.err
    for words in ("teapot", "dog2", "mean of 2", "paper: SD-Turbo, all 30, encoders unclear", "0.783"):
        assert words in again.out

    # A result that is lost is found in the run, or else measured again, from the run and the pictures that are there.
    (bench.output / "results.json").unlink()
    (bench.output / "dog2" / "result.json").unlink()
    lost = bench("--train-steps", 1, "--json")
    assert lost.result == found
    assert "teapot (1 of 2): has a result in its run folder" in lost.err
    assert "dog2 (2 of 2): is trained already" in lost.err
    assert "Generating" not in lost.err


def test_a_run_that_is_not_finished_goes_on_and_other_settings_are_refused(bench: Bench) -> None:
    assert bench("--subject", "dog2", "--train-steps", 1).code == 0
    lora = (bench.output / "dog2" / "dog2.safetensors").read_bytes()
    more = bench("--subject", "dog2", "--train-steps", 2, "--json")
    assert "dog2 (1 of 1): continuing its training" in more.err
    assert "continuing after step 1" in more.err
    assert bench.trained_steps("dog2") == [1, 2]
    assert (bench.output / "dog2" / "dog2.safetensors").read_bytes() != lora
    assert list(more.result["subjects"]) == ["dog2"]
    assert not (bench.output / "teapot").exists()

    bench.toml.write_text(bench.toml.read_text().replace("rank = 2", "rank = 3"))
    other = bench("--subject", "dog2", "--train-steps", 2)
    assert (other.code, other.out) == (2, "")
    assert "was made with adapter.rank = 2, not 3" in other.error


def test_own_prompts_take_the_place_of_dreambenchs(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {} on the moon\n")
    done = bench("--subject", "teapot", "--train-steps", 1, "--prompts", tmp_path / "prompts.txt", "--token", "ohwx")
    assert done.code == 0, done.err
    found = json.loads((bench.output / "teapot" / "evaluation" / "evaluation.json").read_text())
    assert [one["prompt"] for one in found["per_prompt"]] == ["a ohwx teapot on the moon"]


def test_what_is_missing_is_said_before_anything_is_trained(bench: Bench, tmp_path: Path) -> None:
    done = bench("--clip", tmp_path)
    assert (done.code, done.out) == (4, "")
    assert "config.json is missing" in done.error
    (bench.output.parent / "empty").mkdir()
    done = command("evaluate", "--dreambench", bench.output.parent / "empty", "-o", bench.output)
    assert (done.code, done.out) == (2, "")
    assert "git clone https://github.com/google/dreambooth" in done.error
    assert not bench.output.exists()


def test_a_configuration_that_is_offline_is_not_so_where_no_offline_is_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_a_network(monkeypatch)
    for how, words in (((), "this is offline"), (("--no-offline",), "the hub cannot be reached")):
        done = bench("--clip", "nobody/has-this", *how)
        assert (done.code, words in done.error) == (4, True), done.err


def test_a_damaged_list_of_results_is_named(bench: Bench) -> None:
    bench.output.mkdir()
    (bench.output / "results.json").write_text("{")
    done = bench()
    assert (done.code, done.out) == (1, "")
    assert "results.json is damaged" in done.error
