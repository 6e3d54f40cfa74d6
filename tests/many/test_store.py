"""Shared storage: pushed after checkpoints, the result last; fetched before a resume; nothing is sent twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from echodistill_cli import pipeline
from echodistill_cli.config.build import build_config
from echodistill_cli.errors import EchoDistillError
from echodistill_cli.files import same_content
from echodistill_cli.many.batch import subject_of
from echodistill_cli.many.manifest import Row
from echodistill_cli.many.schedule import look_up
from echodistill_cli.many.store import Store
from echodistill_cli.many.subject import Subject, attempt
from echodistill_cli.runs import open_run
from tests.helpers.commands import files_below
from tests.many.helpers import Batch, only_if_selected


@pytest.fixture
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a server of this machine."""
    only_if_selected(request, "s3")
    pytest.importorskip("s3fs", reason="needs the extra s3")
    pytest.importorskip("moto", reason="needs moto[server]")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    variables = {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
    variables |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket/runs"
    server.stop()


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage: a folder, or a bucket."""
    return str(request.getfixturevalue("s3")) if request.param == "s3" else str(tmp_path / "store")


def subject(batch: Batch, url: str, output: str) -> Subject:
    """The first subject, with its run in a folder as on another machine."""
    places = {"run.name": "one", "run.output": str(batch.folder / output / "one")}
    places["concept.photos"] = str(batch.folder / "photos" / "one")
    config = build_config(None, batch.toml, places)
    return subject_of(Row(config, "here"), pipeline.train, url)


def ignore(_: object) -> None:
    """What nobody reads."""


@pytest.mark.filterwarnings("ignore")  # of botocore
def test_a_killed_subject_goes_on_elsewhere_from_the_storage_and_is_then_finished_everywhere(
    batch: Batch, url: str
) -> None:
    def ended_at_once(metrics: Mapping[str, float]) -> None:
        if metrics["step"] == 4:
            raise KeyboardInterrupt  # saves and sends nothing, as a kill

    cut = attempt(subject(batch, url, "first"), ended_at_once, ignore)
    assert (cut.status, cut.steps) == ("stopped", 4)
    stored = Store(f"{url}/one", batch.folder / "copy")
    assert stored.read_result() is None
    stored.fetch()
    assert open_run(batch.folder / "copy").list_checkpoints()[-1].name == "step-000002"

    elsewhere = subject(batch, url, "second")
    messages: list[str] = []
    done = attempt(elsewhere, ignore, messages.append)
    assert (done.status, done.begun_from, done.steps) == ("done", 2, 8), done.error
    assert "continuing its training" in messages
    assert [entry["step"] for entry in open_run(elsewhere.config.output).read_metrics()] == list(range(1, 9))

    again = Store(f"{url}/one", elsewhere.config.output)
    before = {name: str(again.system.info(again._at(name))) for name in again._index()}
    assert {"one.safetensors", "teacher/one-teacher.safetensors", "metrics.jsonl", "config.toml"} <= set(before)
    assert not any("step-000002" in name for name in before)  # only the newest checkpoints are kept, there too
    again.push()
    assert {name: str(again.system.info(again._at(name))) for name in again._index()} == before

    third = subject(batch, url, "third")
    found = look_up([third])["one"]
    assert (found.status, found.steps, found.attempt) == ("was finished", 8, 1)
    assert not third.config.output.exists()
    assert attempt(third, ignore, ignore).status == "was finished"
    # The report contains photos, so no storage gets it.
    assert files_below(third.config.output) == files_below(elsewhere.config.output) - {"report.html", ".gitignore"}
    assert same_content(third.config.output / "one.safetensors", elsewhere.config.output / "one.safetensors")


def test_a_storage_that_cannot_be_used_fails_the_subject_with_one_line(batch: Batch) -> None:
    (batch.folder / "file").write_text("")
    failed = attempt(subject(batch, str(batch.folder / "file"), "out"), ignore, ignore)
    assert (failed.status, failed.exit_code) == ("failed", 1)
    assert f"--store {batch.folder / 'file'}/one cannot be used (" in failed.error


def run_with(folder: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_only_a_listed_file_counts_and_a_later_run_here_is_kept(tmp_path: Path) -> None:
    here = run_with(tmp_path / "here", "config.toml", "checkpoints/step-000004/state.pt", ".lock")
    Store(str(tmp_path / "store"), here).push()
    assert files_below(tmp_path / "store") == {".files.json", "config.toml", "checkpoints/step-000004/state.pt"}
    run_with(tmp_path / "store", "checkpoints/step-000006/state.pt")  # of a push that was cut off
    there = run_with(tmp_path / "there", "checkpoints/step-000002/state.pt", "config.toml", text="old")
    Store(str(tmp_path / "store"), there).fetch()
    assert files_below(there) == {"config.toml", "checkpoints/step-000004/state.pt"}
    assert (there / "config.toml").read_text() == "x"
    later = run_with(tmp_path / "later", "checkpoints/step-000008/state.pt", "config.toml", text="later")
    Store(str(tmp_path / "store"), later).fetch()
    assert (later / "config.toml").read_text() == "later"
    shutil.rmtree(here / "checkpoints")
    store = Store(str(tmp_path / "store"), here)
    store.push()
    assert not (tmp_path / "store" / "checkpoints" / "step-000004" / "state.pt").exists()


def test_a_list_that_leads_out_of_the_run_is_refused(tmp_path: Path) -> None:
    run_with(tmp_path / "store", "evil")
    for name in ("../evil", "/tmp/evil", "a/../../evil"):
        (tmp_path / "store" / ".files.json").write_text(json.dumps({name: "0"}))
        with pytest.raises(EchoDistillError, match="outside of the run"):
            Store(str(tmp_path / "store"), tmp_path / "here").fetch()
    (tmp_path / "store" / ".files.json").write_text("[")
    with pytest.raises(EchoDistillError, match="is damaged"):
        Store(str(tmp_path / "store"), tmp_path / "here").fetch()
