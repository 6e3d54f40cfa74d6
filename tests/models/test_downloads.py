"""What a command downloads, how it says so without a network, and the bundle for a machine that has none."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from echodistill_cli import pipeline
from echodistill_cli.config import families
from echodistill_cli.config.build import build_config
from echodistill_cli.config.schema import Config
from echodistill_cli.errors import ConfigError, ModelError
from echodistill_cli.models import downloads
from echodistill_cli.models.load import check_pair, load_pair
from tests.helpers.commands import command
from tests.helpers.hub import Hub, serving


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def request(model: str, **options: Any) -> downloads.DownloadRequest:
    overrides = options.pop("overrides", {})
    return downloads.DownloadRequest(build_config(model, overrides=overrides), **options)


def run_of(photos: Path, **settings: Any) -> Config:
    return build_config("sd-turbo", overrides={"concept.photos": str(photos), "concept.class_name": "dog"} | settings)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that are asked on a machine whose names cannot be resolved."""
    asked: list[str] = []

    def refuse(host: str, *_: Any, **__: Any) -> NoReturn:
        asked.append(host)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.create_connection", lambda address, *_, **__: refuse(address[0]))
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return asked


def test_without_a_network_a_run_names_all_that_is_missing_after_one_request(
    photo_folder: Path, requests: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        pipeline.train(run_of(photo_folder, **{"run.output": str(tmp_path / "run"), "model.teacher": "someone/base"}))
    for part in ("stabilityai/sd-turbo/unet", "stabilityai/sd-turbo/tokenizer", "someone/base/unet", "dinov2-large"):
        assert part in caught.value.message
    assert str(caught.value.hint).endswith(": echodistill download sd-turbo --teacher someone/base")
    assert len(requests) == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_without_a_network_asks_once_and_knows_no_sizes(photo_folder: Path, requests: list[str]) -> None:
    plan = pipeline.plan(run_of(photo_folder))
    assert set(plan.downloads.values()) == {None}
    assert "facebook/dinov2-large" in plan.downloads
    assert len(requests) == 1


def test_without_a_network_sizes_are_computed_from_parameters(requests: list[str]) -> None:
    lines = list(pipeline.download(request("sdxl-turbo", dry_run=True)).lines())
    assert "stabilityai/sdxl-turbo/unet  about 5.13 GB" in lines
    assert "stabilityai/sdxl-turbo/vae  about 0.17 GB" in lines
    assert "stabilityai/sdxl-turbo/tokenizer  small" in lines
    # 5.13 twice, 0.17, 0.25 and 1.39 of the text encoders; 1.71, 0.09 and 1.22 of the image encoders in float32.
    assert lines[-1].startswith("About 15.1")
    assert lines[-1].endswith("The hub did not answer: sizes follow from the parameters.")
    assert len(requests) == 1


def test_the_known_parts_of_the_text_encoders_are_all_of_them() -> None:
    parts = [families._PARAMETERS[f"stabilityai/sdxl-turbo/{part}"] for part in ("text_encoder", "text_encoder_2")]
    assert sum(parts) == families.FAMILIES["sdxl"].size.text


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_generating_names_all_missing_parts_with_the_same_command(role: str) -> None:
    config = build_config("sdxl-turbo", overrides={"model.offline": True}).model
    with pytest.raises(ModelError) as caught:
        load_pair(config, teacher=role == "teacher")
    assert "sdxl-turbo/text_encoder_2" in caught.value.message
    assert ("stable-diffusion-xl-base-1.0/unet" in caught.value.message) == (role == "teacher")
    assert "dino" not in caught.value.message
    assert str(caught.value.hint).endswith(": echodistill download sdxl-turbo --critic none")


def test_scores_add_their_encoders_to_the_command() -> None:
    config = build_config("sd-turbo", overrides={"model.offline": True}).model
    with pytest.raises(ModelError) as caught:
        downloads.fetch_pair(config, teacher=False, scores=(downloads.CLIP, downloads.DINO))
    assert "clip-vit-base-patch32" in caught.value.message
    assert str(caught.value.hint).endswith("--critic none --scores")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"model.decoder": "tiny"}, ["--set", "model.decoder=tiny"]),
        ({"critic.discriminators": ("teacher",), "critic.identity": "none", "echo.start": None}, ["--critic", "none"]),
        ({"critic.discriminators": ("dino",), "critic.identity": "dino"}, ["--critic", "dino"]),
        ({"model.vae": "someone/vae"}, ["--set", "model.vae=someone/vae"]),
    ],
)
def test_the_command_downloads_what_a_run_with_these_settings_loads(
    settings: dict[str, Any], options: list[str]
) -> None:
    config = build_config("sd-turbo", overrides={"model.offline": True} | settings)
    words = shlex.split(downloads.download_command(config))
    assert words == ["echodistill", "download", "sd-turbo", *options]
    done = command(*words[1:], "--dry-run", "--json", "--set", "model.offline=true")
    planned = downloads.planned_downloads(config.model, downloads.sources_of(config))
    assert set(done.result["files"]) == {file for file, _ in planned}


def test_a_dry_run_says_what_is_here_already() -> None:
    planned = pipeline.download(request("mini", dry_run=True))
    assert planned.files == {}
    assert planned.present["mini:student"] == "in the package"
    assert "All files are here." in list(planned.lines())


def test_a_bundle_is_what_a_run_without_a_network_reads(tmp_path: Path) -> None:
    downloaded = pipeline.download(request("mini", to=tmp_path / "bundle"))
    assert downloaded.files == {}
    words = shlex.split(str(downloaded.command))
    student, teacher = (words[words.index(flag) + 1] for flag in ("--model", "--teacher"))
    assert (student, teacher) == (str(tmp_path / "bundle" / "student"), str(tmp_path / "bundle" / "teacher"))
    check_pair(build_config(student, overrides={"model.teacher": teacher, "model.resolution": 64}).model)
    with pytest.raises(ConfigError, match="exists already"):
        pipeline.download(request("mini", to=tmp_path / "bundle"))


@pytest.fixture
def hub(small_pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The small pair as me/student and me/teacher, each with files that nobody needs."""
    for name, folder in zip(("student", "teacher"), small_pair, strict=True):
        copy = Path(shutil.copytree(folder, tmp_path / "repositories" / "me" / name))
        (copy / "whole-model.safetensors").write_bytes(b"never needed")
    with serving(tmp_path / "repositories") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def of_the_hub(**options: Any) -> downloads.DownloadRequest:
    return request("me/student", critic="none", overrides={"model.teacher": "me/teacher"}, **options)


def test_a_dry_run_lists_files_with_their_sizes_and_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    planned = pipeline.download(of_the_hub(dry_run=True))
    weights = hub.root / "me/student/unet/diffusion_pytorch_model.safetensors"
    assert planned.files["me/student/unet/diffusion_pytorch_model.safetensors"] == weights.stat().st_size
    assert not any("whole-model" in file or "teacher/vae" in file for file in planned.files)
    assert not any("/resolve/" in line for line in hub.requests)
    assert not (tmp_path / "hub").exists()


def test_what_was_downloaded_is_here_for_a_run_without_a_network(hub: Hub, tmp_path: Path) -> None:
    downloaded = pipeline.download(of_the_hub(to=tmp_path / "bundle"))
    assert not any("whole-model" in line or ("teacher/resolve" in line and "/vae/" in line) for line in hub.requests)
    hub.requests.clear()
    again = pipeline.download(of_the_hub())
    assert (again.files, again.present) == ({}, {"me/student": "in the cache", "me/teacher": "in the cache"})
    words = shlex.split(str(downloaded.command))
    for student, teacher in (("me/student", "me/teacher"), (words[4], words[6])):
        settings = {"model.teacher": teacher, "model.offline": True, "model.resolution": 64}
        assert load_pair(build_config(student, overrides=settings).model).has_teacher
    assert hub.requests == []


def test_a_transfer_that_breaks_off_is_continued(hub: Hub) -> None:
    hub.breaks_off.add("me/student/unet/diffusion_pytorch_model.safetensors")
    pipeline.download(of_the_hub())
    # Of so small a file the library may have written nothing yet; then it begins again.
    student = [
        line for line in hub.requests if line.startswith("GET /me/student/") and "/unet/diffusion_pytorch" in line
    ]
    assert len(student) == 2
    assert hub.breaks_off == set()
    settings = {"model.offline": True, "model.resolution": 64}
    assert load_pair(build_config("me/student", overrides=settings).model, teacher=False)
