"""Where model files and CLIP's vocabulary are found: folders, a fabricated hub cache; and what the errors say."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest
from httpx2 import InvalidURL
from transformers import CLIPTokenizer

from echodistill_cli.config.schema import ModelConfig
from echodistill_cli.diffusion.text import RARE_WORDS, check_token
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models.downloads import Source, downloads
from echodistill_cli.models.load import load_pair
from echodistill_cli.models.single_file import find_vocabulary, vocabulary_in
from echodistill_cli.models.sources import (
    hub_error,
    missing_parts,
    resolve,
    vocabulary_of,
    wanted_files,
    weight_variant,
)
from tests.helpers.commands import command, missing_flags
from tests.helpers.models import model_config
from tests.helpers.original_layout import build_sd2_pair, build_sdxl
from tests.helpers.random_models import byte_letters, small_tokenizer


def planned(source: str, parts: tuple[str, ...], revision: str | None = None, *, offline: bool = False) -> object:
    """What a dry run says of a model."""
    return downloads(Source(source, parts, revision), offline=offline)


PARTS = ("unet", "scheduler", "tokenizer", "text_encoder", "vae")
HUB_ID = "somebody/tiny-turbo"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Any attempt to open a socket fails the test."""

    def refuse(*_args: Any, **_options: Any) -> NoReturn:
        pytest.fail("a socket was opened")

    if "hub" in request.fixturenames:  # it answers on this machine
        return
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(small_pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A complete model folder that may be damaged."""
    return Path(shutil.copytree(small_pair[0], tmp_path / "model"))


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder as the only snapshot of HUB_ID in a hub cache."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    # The library notes what the repository holds. A model of which only some parts are needed is whole all the same.
    (repository / "trees").mkdir()
    listing = {"format_version": 1, "files": {"never-needed.safetensors": {"size": 1, "blob_id": "0" * 40}}}
    (repository / "trees" / f"{REVISION}.json").write_text(json.dumps(listing))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return snapshot


# --- folders and files ------------------------------------------------------------------------------------------------


def test_a_complete_folder_is_taken_as_it_is(folder: Path) -> None:
    assert resolve(str(folder), PARTS) == folder


def test_a_home_folder_may_be_written_with_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/model", PARTS) == folder


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("unet", "model/unet: this part is missing"),
        ("scheduler/scheduler_config.json", "model/scheduler: scheduler_config.json is missing"),
        ("unet/config.json", "model/unet: config.json is missing"),
        ("vae/diffusion_pytorch_model.safetensors", "model/vae: the .safetensors file is missing"),
        ("tokenizer/tokenizer.json", "model/tokenizer: vocab.json and merges.txt, or tokenizer.json, are missing"),
    ],
)
def test_a_missing_piece_is_named_with_its_part(folder: Path, removed: str, message: str) -> None:
    gone = folder / removed
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    with pytest.raises(ModelError, match=message) as caught:
        resolve(str(folder), PARTS)
    assert caught.value.hint == "Point to a complete folder."


def test_a_vocabulary_without_its_merges_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=r"merges\.txt"):
        resolve(str(folder), PARTS)
    (folder / "tokenizer" / "merges.txt").write_text("")
    resolve(str(folder), PARTS)


def test_only_the_parts_asked_for_are_looked_at(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    resolve(str(folder), ("vae", "tokenizer"))


def test_a_model_at_the_top_of_its_folder_is_part_nothing(small_backbones: dict[str, Path], tmp_path: Path) -> None:
    assert resolve(str(small_backbones["dino"]), ("",)) == small_backbones["dino"]
    with pytest.raises(ModelError, match=rf"^{tmp_path}: config.json is missing"):
        resolve(str(tmp_path), ("",))


@pytest.mark.parametrize("pickle_name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickled_weights_are_refused(folder: Path, pickle_name: str) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / pickle_name)
    with pytest.raises(ModelError, match="only pickled weights, which are never loaded"):
        resolve(str(folder), ("unet",))


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_a_single_pickled_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=f"{name}: only .safetensors files are read"):
        resolve(str(tmp_path / name), ())


def test_a_single_safetensors_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert resolve(str(tmp_path / "model.safetensors"), PARTS) == tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(b"<html>" * 9)
    with pytest.raises(ModelError, match="is a web page"):
        resolve(str(tmp_path / "model.safetensors"), PARTS)


def test_what_is_wrong_on_this_machine_comes_before_what_must_be_downloaded(folder: Path) -> None:
    with pytest.raises(ModelError, match="no model of this name"):
        missing_parts("mini:nothing", PARTS)
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelError, match="model/unet: this part is missing"):
        missing_parts(str(folder), PARTS)


def test_a_model_of_which_one_shard_is_missing_is_incomplete(folder: Path) -> None:
    shards = [f"diffusion_pytorch_model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(folder / "unet" / shards[0])
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model/unet: 1 of its 2 weight files are missing"):
        resolve(str(folder), PARTS)
    (folder / "unet" / shards[1]).touch()
    resolve(str(folder), PARTS)


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        *(
            "nowhere",
            "a/b/c",
            "./missing/x",
            "/no/such",
            "/no/such.safetensors",
            "~/none",
            "~no-such-user/none",
            "my models/sd turbo",
        ),
        *("a/../b", "a--b/c", "a/b.git"),  # the last two by rules of the hub's own
    ],
)
def test_what_is_neither_a_place_nor_a_hub_id_is_named_by_a_run_and_by_a_dry_run_alike(
    source: str, offline: bool
) -> None:
    for look in (resolve, planned):
        with pytest.raises(ModelError, match="no such folder or file, and not a hub id of the form owner/name") as told:
            look(source, PARTS, offline=offline)
        assert told.value.message.startswith(f"{source}: ")


def test_a_dry_run_with_a_mistyped_model_ends_with_one_line(photo_folder: Path) -> None:
    line = ("train", photo_folder, "--class-name", "dog", "--model", "./models/typo", "--offline", "--dry-run", "-q")
    done = command(*line)
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1), done.err
    assert "./models/typo: no such folder or file" in done.err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (("download", "sdturbo", "--dry-run"), "sd-turbo"),
        (("download", "SDXL_Turbo", "--dry-run"), "sdxl-turbo"),
        (("train", ".", "--class-name", "dog", "--model", "sana", "--dry-run"), "sana-sprint"),
    ],
)
def test_a_mistyped_name_of_a_model_is_answered_with_the_nearest(
    arguments: tuple[str, ...], near: str, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo_folder)
    done = command(*arguments, "-q")
    assert (done.code, done.out) == (4, "")
    assert done.error.endswith(f"Did you mean {near!r}?"), done.err


@pytest.mark.parametrize("source", ["my-own-model", "./sdturbo", "sdturbo.safetensors"])
def test_a_place_or_a_name_like_no_other_gets_no_guess(source: str) -> None:
    with pytest.raises(ModelError) as told:
        resolve(source, PARTS, offline=True)
    assert told.value.hint == "Check the spelling."


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
def test_what_is_whole_in_the_cache_is_taken_without_asking_the_network(cached: Path, offline: bool) -> None:
    assert resolve(HUB_ID, PARTS, offline=offline) == cached
    assert resolve(HUB_ID, PARTS, revision=REVISION, offline=offline) == cached


def test_offline_a_part_that_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(cached: Path) -> None:
    shutil.rmtree(cached / "unet")
    with pytest.raises(ModelError, match=f"{HUB_ID}/unet: this part is missing") as caught:
        resolve(HUB_ID, ("unet", "scheduler"), revision=REVISION, offline=True)
    command = shlex.split(str(caught.value.hint).split(": ", 1)[1])
    assert command[:5] == ["hf", "download", HUB_ID, "--revision", REVISION]
    # Each pattern behind an option of its own: a second one behind the same would be read as a file's name.
    assert command[5::2] == ["--include"] * 6
    assert set(command[6::2]) == {
        f"{part}/*.{kind}" for part in ("unet", "scheduler") for kind in ("json", "txt", "safetensors")
    }


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(("source", "revision"), [("somebody/else", None), (HUB_ID, "f" * 40)])
def test_offline_an_unknown_model_or_revision_opens_no_socket(source: str, revision: str | None) -> None:
    with pytest.raises(ModelError, match=f"{source} is not in the cache, and this is offline. .*hf download {source}"):
        resolve(source, PARTS, revision=revision, offline=True)


@pytest.mark.usefixtures("cached")
def test_the_hubs_own_offline_switch_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="this is offline"):
        resolve("somebody/else", PARTS)


@pytest.mark.usefixtures("cached")
def test_a_hub_that_cannot_be_reached_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: Any, **_options: Any) -> NoReturn:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # between the hub client's attempts
    with pytest.raises(ModelError, match=r"the hub cannot be reached \(.*hf download somebody/else"):
        resolve("somebody/else", PARTS)


class FakeHub(ThreadingHTTPServer):
    """A hub on this machine that gives every request the same answer."""

    status: int = 200
    headers: Mapping[str, str] = {}
    body: bytes = b"{}"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, FakeHub)
        self.send_response(self.server.status)
        for name, text in {**self.server.headers, "Content-Length": str(len(self.server.body))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    server = FakeHub(("127.0.0.1", 0), Answer)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (401, {"X-Error-Message": "Invalid credentials"}, b"{}", r"answered 401 \(Invalid credentials\)\. .*HF_TOKEN"),
        (401, {"X-Error-Code": "GatedRepo"}, b"{}", "access must be granted on its hub page"),
        (403, {"X-Error-Message": "Enable access"}, b"{}", r"answered 403 \(Enable access\)\. Give the token"),
        (404, {"X-Error-Code": "RepoNotFound"}, b"{}", "the hub has no such model, or it is private"),
        (404, {"X-Error-Code": "RevisionNotFound"}, b"{}", "the hub has no revision v9"),
        (429, {"Retry-After": "300"}, b"{}", "answered 429.*try again in 300 seconds"),
        (429, {}, b"{}", "answered 429.*try again later"),
        (503, {}, b"{}", "answered 503"),
        (200, {}, b"<html>Log in</html>", "did not answer as a model hub does.*HF_ENDPOINT"),
        (200, {}, b"[1]", "cannot be downloaded"),
    ],
)
def test_what_the_hub_answers_is_one_line_for_a_run_and_a_dry_run_without_waiting(
    hub: FakeHub, status: int, headers: dict[str, str], body: bytes, message: str
) -> None:
    hub.status, hub.headers, hub.body = status, headers, body

    for look in (resolve, planned):
        started = time.monotonic()
        with pytest.raises(ModelError, match=message) as caught:
            look(HUB_ID, ("unet",), revision="v9")
        assert "\n" not in str(caught.value)
        assert "cannot be reached" not in caught.value.message
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed"), "proxy in ALL_PROXY.*socksio"),
        (ValueError("Unknown scheme for proxy URL"), "the proxy in ALL_PROXY"),
        (InvalidURL("Invalid port: 'abc'"), "the proxy in ALL_PROXY"),
        (OSError(30, "Read-only file system", "/cache/x"), r"cannot be saved in the cache: /cache/x.*HF_HOME"),
        (OSError(28, "No space left on device", "/cache/x"), "No space left on device.*HF_HOME"),
        (OSError("Network is unreachable"), "the hub cannot be reached"),
    ],
)
def test_what_stands_between_this_machine_and_the_hub_is_named(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    assert re.search(message, str(hub_error(HUB_ID, error, "hf download")))


# --- which files ------------------------------------------------------------------------------------------------------

LISTING = [
    "README.md",
    "model_index.json",
    "big_checkpoint.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/model.onnx",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
]


def test_the_variant_is_wanted_where_there_is_one_and_the_plain_file_elsewhere() -> None:
    assert sorted(wanted_files(LISTING, ("unet", "vae", "tokenizer"), "fp16")) == [
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_without_a_variant_the_plain_files_are_wanted() -> None:
    assert sorted(wanted_files(LISTING, ("unet", "text_encoder"), None)) == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def test_of_a_model_at_the_top_nothing_in_folders_is_wanted() -> None:
    listing = ["config.json", "model.safetensors", "pytorch_model.bin", "preprocessor_config.json", "onnx/model.onnx"]
    wanted = wanted_files([*listing, "onnx/config.json"], ("",), None)
    assert sorted(wanted) == ["config.json", "model.safetensors", "preprocessor_config.json"]


SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"
NEW_SHARDS = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
OLD_SHARDS = [f"unet/diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
FP16_INDEX = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"


def test_all_shards_and_their_index_are_wanted() -> None:
    assert set(wanted_files([*SHARDS, INDEX], ("unet",), "fp16")) == {*SHARDS, INDEX}


@pytest.mark.parametrize("shards", [NEW_SHARDS, OLD_SHARDS])
def test_the_shards_of_a_variant_are_wanted_whole_and_loaded_as_that_variant(shards: list[str], tmp_path: Path) -> None:
    listing = [*SHARDS, INDEX, *shards, FP16_INDEX]
    assert set(wanted_files(listing, ("unet",), "fp16")) == {*shards, FP16_INDEX}
    assert {*SHARDS, INDEX} <= set(wanted_files(listing, ("unet",), None)) <= {*SHARDS, INDEX, FP16_INDEX}
    (tmp_path / "unet").mkdir()
    for path in (*shards, FP16_INDEX):
        (tmp_path / path).touch()
    assert weight_variant(tmp_path / "unet", "fp16") == "fp16"
    assert weight_variant(tmp_path / "unet", None) is None


def test_a_folder_without_the_variant_is_loaded_plain(folder: Path) -> None:
    assert weight_variant(folder / "unet", "fp16") is None
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert weight_variant(folder / "unet", "fp16") == "fp16"


# --- CLIP's vocabulary ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    small_tokenizer(folder)
    return folder


def in_cache(cache: Path, owner: str, vocabulary: Path, place: str) -> None:
    folder = cache / f"models--{owner.replace('/', '--')}" / "snapshots" / "0123abc" / place
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(vocabulary / name, folder)


@pytest.mark.parametrize(
    ("owner", "place"),
    [("stabilityai/sdxl-turbo", "tokenizer"), ("openai/clip-vit-large-patch14", "")],
)
def test_the_vocabulary_is_found_in_the_cache_of_any_model_that_has_it(
    cache: Path, small_vocabulary: Path, owner: str, place: str
) -> None:
    in_cache(cache, owner, small_vocabulary, place)
    found = find_vocabulary(offline=True)
    assert CLIPTokenizer.from_pretrained(found)("a dog").input_ids


@pytest.mark.usefixtures("cache")
def test_without_a_vocabulary_both_ways_to_get_one_are_named() -> None:
    both_ways = r"not in the cache.*hf download stabilityai/sd-turbo.*--set model\.tokenizer=DIR"
    with pytest.raises(ModelError, match=both_ways) as caught:
        find_vocabulary(offline=True)
    assert not missing_flags(str(caught.value.hint), "train", "sample", "evaluate", "export")


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.tokenizer: .*neither vocab\.json.*--set model\.tokenizer=DIR"):
        vocabulary_in(tmp_path)


def test_a_vocabulary_of_another_model_pads_as_the_family_does(tmp_path: Path, small_vocabulary: Path) -> None:
    folder = build_sdxl(tmp_path / "sdxl")
    pair = load_pair(model_config(folder, folder, tokenizer=str(small_vocabulary)), teacher=False)
    assert [tokenizer.pad_token for tokenizer in pair.encoder.tokenizers] == ["<|endoftext|>", "!"]
    assert [tokenizer.model_max_length for tokenizer in pair.encoder.tokenizers] == [32, 32]
    student = build_sd2_pair(tmp_path / "sd2")[0]
    pair = load_pair(model_config(student, student, tokenizer=str(small_vocabulary)), teacher=False)
    assert [tokenizer.pad_token for tokenizer in pair.encoder.tokenizers] == ["!"]


# --- CLIP's own -------------------------------------------------------------------------------------------------------


def published_vocabulary() -> Path | None:
    """CLIP's file as open_clip's wheel ships it; the package itself is never imported."""
    if named := os.environ.get("CLIP_BPE_FILE"):
        return Path(named)
    found = importlib.util.find_spec("open_clip")
    places = (found.submodule_search_locations or []) if found else []
    files = (Path(place) / "bpe_simple_vocab_16e6.txt.gz" for place in places)
    return next((file for file in files if file.is_file()), None)


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    file = published_vocabulary()
    if file is None:
        pytest.skip("CLIP's vocabulary is not here: set CLIP_BPE_FILE to open_clip's bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    # OpenAI lists the bytes that print first.
    letters = sorted(byte_letters(), key=lambda letter: ord(letter) > 255)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def test_the_true_vocabulary_gives_openais_ids(clip_tokenizer: CLIPTokenizer) -> None:
    assert len(clip_tokenizer) == 49408
    assert clip_tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_rare_words_we_suggest_are_single_tokens_of_it(clip_tokenizer: CLIPTokenizer) -> None:
    assert clip_tokenizer("sks", add_special_tokens=False).input_ids == [48136]
    assert clip_tokenizer("ohwx", add_special_tokens=False).input_ids == [47993]
    for word in RARE_WORDS:
        check_token(clip_tokenizer, word, "dog", learned=False)


def test_a_word_of_two_tokens_is_refused_with_a_suggestion(clip_tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"--token 'zwx' is 2 tokens.*such as 'sks'.*--text token"):
        check_token(clip_tokenizer, "zwx", "dog", learned=False)
    check_token(clip_tokenizer, "zwx", "dog", learned=True)
    with pytest.raises(ConfigError, match="already has a meaning"):
        check_token(clip_tokenizer, "backpack", "dog", learned=False)


def test_the_vocabulary_of_a_student_is_that_of_its_settings_or_its_folder(
    small_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    student = str(small_pair[0])
    assert vocabulary_of(ModelConfig(student=student)) == student
    assert vocabulary_of(ModelConfig(student=student, tokenizer="elsewhere")) == "elsewhere"
    assert vocabulary_of(ModelConfig(student=str(tmp_path))) is None
    assert vocabulary_of(ModelConfig(student="someone/model")) is None
