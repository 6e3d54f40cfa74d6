"""What is released, and what stands around it: versions, workflows, image, action, citation, the site."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from echodistill_cli import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def load(file: Path) -> Any:
    """The content of a YAML file, in which GitHub's key `on` is read as True."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place_and_the_others_agree() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "echodistill_cli/__init__.py"
    assert load(ROOT / "CITATION.cff")["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)[0][0] == __version__


def test_the_citation_has_what_its_format_requires() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["project"]["license"]
    assert "2510.20512" in citation["references"][0]["url"]


def test_the_sdist_names_what_exists_and_the_wheel_has_both_packages_and_the_notices() -> None:
    build = PROJECT["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["packages"] == ["echodistill_cli", "echodistill"]
    assert all((ROOT / name).exists() for name in (*build["sdist"]["include"], *PROJECT["project"]["license-files"]))
    assert all((ROOT / package / "py.typed").is_file() for package in build["wheel"]["packages"])


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_runs_what_exists_with_few_rights(file: Path) -> None:
    workflow = load(file)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow[True]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for step in job["steps"]:
            assert len({"run", "uses"} & set(step)) == 1
            assert re.fullmatch(r"[\w./-]+@\S+", step.get("uses", "a@b"))
            line = step.get("run", "")
            assert "${{" not in line, "a text of somebody else would become part of the script"
            words = shlex.split(line)
            if words[:1] == ["make"]:
                assert {word for word in words[1:] if "=" not in word} <= set(targets)
            assert all((ROOT / word).is_file() for word in words if word.startswith(".ci/"))
            groups = [after for word, after in itertools.pairwise(words) if word == "--group"]
            assert set(groups) <= set(PROJECT["dependency-groups"])


def test_a_release_is_tried_before_it_is_published_and_its_tag_names_its_version(tmp_path: Path) -> None:
    jobs = load(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert any("release_check.sh" in step.get("run", "") for step in jobs["build"]["steps"])
    (check,) = [step["run"] for step in jobs["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    for tag, code in ((f"v{__version__}", 0), ("v9.9.9", 1)):
        environment = {"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
        assert subprocess.run(["bash", "-c", check], cwd=ROOT, env=environment).returncode == code
    done = subprocess.run(["bash", ROOT / ".ci" / "release_check.sh"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: release_check.sh ")


def test_a_wheel_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    for name in ("echodistill_cli/a.py", "echodistill/py.typed"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    folder = "echodistill-1.dist-info"
    names = [f"{folder}/{name}" for name in ("entry_points.txt", "licenses/LICENSE")]
    names += [f"{folder}/licenses/echodistill_cli/models/embedded/NOTICE", "echodistill_cli/a.py"]

    def verdict(*more: str) -> tuple[int, str]:
        with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
            wheel.writestr(f"{folder}/METADATA", "Name: echodistill\nVersion: 1\n")
            for name in (*names, *more):
                wheel.writestr(name, "")
        script = [sys.executable, str(ROOT / ".ci" / "look_at_wheel.py"), str(tmp_path / "x.whl"), str(tmp_path)]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout + done.stderr).strip()

    assert verdict() == (1, "x.whl lacks echodistill/py.typed")
    code, line = verdict("echodistill/py.typed")
    assert (code, line.split(":")[0]) == (0, "echodistill 1")
    assert verdict("echodistill/py.typed", "runs/x")[1] == "x.whl has what git does not: runs/x"


# --- the container ----------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, without comments and with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_image_runs_as_nobody_special_and_keeps_models_in_a_volume() -> None:
    steps = instructions()
    kinds = [kind for kind, _ in steps]
    found = dict(steps)
    assert set(kinds) <= {
        "FROM",
        "RUN",
        "ENV",
        "ARG",
        "COPY",
        "USER",
        "WORKDIR",
        "VOLUME",
        "STOPSIGNAL",
        "ENTRYPOINT",
        "CMD",
    }
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d\d\.\d\d", found["FROM"])
    assert found["USER"] == "1000:1000"
    assert kinds.index("USER") > max(index for index, kind in enumerate(kinds) if kind in ("RUN", "COPY"))
    assert found["ENTRYPOINT"] == '["echodistill"]'
    assert found["VOLUME"] == '["/cache"]'
    environment = dict(word.split("=", 1) for _, rest in steps if _ == "ENV" for word in shlex.split(rest))
    assert environment["HF_HOME"].startswith("/cache/")
    for kind, rest in steps:
        if kind == "RUN":
            assert "sudo" not in rest
            assert "apt-get install" not in rest or "rm -rf /var/lib/apt/lists/*" in rest
            assert "pip install" not in rest or "--no-cache-dir" in rest


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    copied = [word for kind, rest in instructions() if kind == "COPY" for word in rest.split()[:-1]]
    assert {"pyproject.toml", "echodistill", "echodistill_cli"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
    # The build reads these.
    assert {PROJECT["project"]["readme"], "LICENSE"} <= set(copied)


# --- CI of users ------------------------------------------------------------------------------------------------------


def test_the_action_keeps_texts_of_others_out_of_its_scripts_and_its_example_fits_it() -> None:
    action = load(ROOT / "examples" / "ci" / "action.yml")
    assert action["runs"]["using"] == "composite"
    used = set(re.findall(r"inputs\.([\w-]+)", str(action["runs"])))
    assert used == set(action["inputs"])
    assert all("${{" not in step["run"] and step["shell"] == "bash" for step in action["runs"]["steps"])
    (job,) = load(ROOT / "examples" / "ci" / "workflow.yml")["jobs"].values()
    (given,) = [step["with"] for step in job["steps"] if step.get("id") == "subject"]
    required = {name for name, about in action["inputs"].items() if about.get("required")}
    assert required <= set(given) <= set(action["inputs"])
    (upload,) = [step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    outputs = [f"${{{{ steps.subject.outputs.{name} }}}}" for name in action["outputs"]]
    assert upload.split("\n")[:-1] == outputs, "a run folder has a report with photos"


def test_the_pre_commit_hooks_look_at_photos_settings_and_reports() -> None:
    repositories = load(ROOT / "examples" / "ci" / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook for repository in repositories for hook in repository["hooks"]}
    assert re.search(hooks["echodistill-photos"]["files"], "photos/rex/1.jpg")
    assert re.search(hooks["echodistill-settings"]["files"], "settings/rex.toml")
    assert re.search(hooks["no-reports"]["files"], "runs/rex/report.html")
    assert not re.search(hooks["no-reports"]["files"], "my-report.html")
    for hook in hooks.values():
        assert "entry" in hook or hook["id"].startswith("check-")
        if hook.get("language") == "system":
            _, _, script, *_ = shlex.split(hook["entry"])
            assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0


# --- the site ---------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    pages = {file.name for file in (ROOT / "docs").glob("*.md")}
    navigation = [name for entry in load(ROOT / "mkdocs.yml")["nav"] for name in entry.values()]
    assert sorted(navigation) == sorted(pages)
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+\.md)\)", index)) == pages - {"index.md"}


def test_links_out_of_the_pages_lead_to_the_repository_or_become_text(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("mkdocs_hook", ROOT / ".ci" / "mkdocs_hook.py")
    assert spec
    assert spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = "See [the log](../examples/LOG.md#a) and [photos](photos.md), ![x](images/x.png)."
    assert hook.on_page_markdown(page) == page.replace(
        "[the log](../examples/LOG.md#a)", "the log (`examples/LOG.md#a`)"
    )
    monkeypatch.setattr(hook, "REPOSITORY", "https://host/o/e/blob/main")
    assert "[the log](https://host/o/e/blob/main/examples/LOG.md#a)" in hook.on_page_markdown(page)
