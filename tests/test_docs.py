"""What the README and the examples show exists: commands, flags, settings, links, files and the Python API."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from echodistill_cli.cli.app import app
from echodistill_cli.config.build import build_config, config_from_dict, config_to_dict
from echodistill_cli.config.schema import Config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.sh")),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "space/README.md")),
    *(ROOT / "examples" / "ci" / name for name in ("action.yml", ".pre-commit-config.yaml")),
]
README = ROOT / "README.md"
PACKAGE = ROOT / "echodistill_cli"
ENDS = frozenset("();<>|&") | {"&&", "||", ">>"}


def shell_lines(file: Path) -> Iterator[str]:
    """The lines of a script, or of a page's fenced shell blocks and `inline code`; continued lines are joined."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith("echodistill ")]
        text = "\n".join([*blocks, *inline])
    yield from text.replace("\\\n", " ").splitlines()


def commands(file: Path) -> Iterator[list[str]]:
    """The arguments of every `echodistill …` in a document."""
    for line in shell_lines(file):
        for found in re.finditer(r"(?<![\w./-])echodistill (?=[a-z-])(.*)", line if not line.startswith("#") else ""):
            words = shlex.shlex(found[1], posix=True, punctuation_chars=True)
            words.whitespace_split = True
            arguments = []
            for word in words:
                if word in ENDS or set(word) <= ENDS:
                    break
                # A shell's own arrays may stand for anything, or for nothing.
                if not re.fullmatch(r"\$(@|\{\w+\[@\]\})", word):
                    arguments.append(word)
            yield arguments


CASES = [
    pytest.param(arguments, id=f"{file.relative_to(ROOT)}: {' '.join(arguments)}")
    for file in DOCUMENTS
    for arguments in commands(file)
]


def test_the_readme_has_commands_to_check() -> None:
    found = {arguments[0] for arguments in commands(README)}
    assert {"train", "sample", "export", "check", "inspect"} <= found


@pytest.mark.parametrize("arguments", CASES)
def test_a_command_in_the_documents_parses(arguments: list[str]) -> None:
    group: Any = get_command(app)
    with group.make_context("echodistill", list(arguments), resilient_parsing=False) as parent:
        name = arguments[0]
        assert name in group.commands or name.startswith("-")
        if not name.startswith("-"):
            command = group.commands[name]
            # PHOTOS and other words in capitals stand for a person's own; they need not exist.
            command.make_context(name, arguments[1:], parent=parent)


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/**/*.toml")), ids=lambda file: file.name)
def test_an_example_configuration_is_valid_and_its_commented_keys_exist(file: Path) -> None:
    build_config(None, file)
    lines = [re.sub(r"^# (?=\w+ = )", "", line) for line in file.read_text(encoding="utf-8").splitlines()]
    tables = tomllib.loads("\n".join(lines))
    tables.get("model", {}).pop("student", None)
    config_from_dict(tables)


GUIDES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
guides = pytest.mark.parametrize("file", GUIDES, ids=lambda file: str(file.relative_to(ROOT)))


@guides
def test_every_flag_that_the_documents_name_exists(file: Path) -> None:
    group: Any = get_command(app)
    known = {"--index-url", "--user"}  # of pip and docker
    known |= {"--network-dim", "--learning-rate", "--max-train-steps"}  # said to be understood
    for command in group.commands.values():
        known |= {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    known |= {name for option in group.params for name in option.opts} | {"--help"}
    text = file.read_text(encoding="utf-8")
    ours = re.findall(r"`(--[a-z][\w-]*)", text)
    assert {flag.replace("_", "-") for flag in ours} <= known


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1500
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("file", sorted(ROOT.glob("docs/**/*.md")), ids=lambda file: file.name)
def test_a_page_of_the_documentation_fits_on_a_few_screens(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_code_map_names_every_folder_and_module_at_the_top_of_the_package() -> None:
    named = re.findall(r"^[├└]── (\S+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = [path.name for path in PACKAGE.glob("*.py")]
    folders = [f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")]
    assert sorted(named) == sorted(modules + folders)


def test_every_command_has_a_row_in_the_readme() -> None:
    group: Any = get_command(app)
    rows = re.findall(r"^\| `echodistill ([a-z-]+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(rows) >= set(group.commands)


LOG = ROOT / "examples" / "benchmark" / "LOG.md"


def test_the_log_is_dated_newest_first_and_each_entry_says_what_was_tried_found_and_decided() -> None:
    _, *days = re.split(r"^## ", LOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    dates = [date.fromisoformat(day.splitlines()[0]) for day in days]
    assert dates == sorted(set(dates), reverse=True)
    for entry in (entry for day in days for entry in day.split("\n### ")[1:]):
        assert re.findall(r"^- (Tried|Found|Verdict)", entry, re.MULTILINE) == ["Tried", "Found", "Verdict"], entry[:60]


PAGES = [file for file in DOCUMENTS if file.suffix == ".md"]


def anchors(file: Path) -> set[str]:
    """What a link may name after `#`: headings as GitHub has them, lower case, `-` for spaces, no other punctuation."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(file: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", file.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = file.parent / name if name else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_no_demo_prompt_was_trained_with() -> None:
    config = build_config("mini", overrides={"concept.class_name": "dog"})
    prompts = (ROOT / "examples" / "demo-prompts.txt").read_text(encoding="utf-8").splitlines()
    templates = {*config.concept.scenes, *config.concept.class_prompts}
    # Without the subject: neither the wording of a place nor a color at a place is one of the training's.
    trained = {template.replace("{}", "…") for template in templates}
    assert len(set(prompts)) == 8
    assert all(config.subject in prompt for prompt in prompts)
    assert not {prompt.replace(config.subject, "…") for prompt in prompts} & trained


def setup_lines(*settings: str) -> str:
    """What `make setup` would run in a fresh clone, with settings such as TORCH_INDEX=URL."""
    words = ["make", "--dry-run", "--always-make", "--no-print-directory", "setup", "PYTHON=python3", *settings]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_asks_before_it_downloads_cuda_for_a_machine_without_a_gpu() -> None:
    plain = setup_lines("CUDA=", "TORCH_INDEX=")
    assert plain.index("--dry-run --no-deps --report") < plain.index("exit 1") < plain.index("--group dev")
    assert "--dry-run" not in setup_lines("CUDA=1")
    small = setup_lines("CUDA=", "TORCH_INDEX=URL")
    assert "--dry-run" not in small
    assert "pip install --quiet --index-url URL torch==" in small


@pytest.mark.parametrize(
    "file",
    [ROOT / "Makefile", ROOT / "pyproject.toml", *DOCUMENTS, *sorted(PACKAGE.rglob("*.py"))],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_nobody_is_told_to_install_a_package_of_this_name_from_an_index(file: Path) -> None:
    # No index has it: whoever takes the name would be installed.
    assert not re.search(r"pip install [^\n`]*echodistill", file.read_text(encoding="utf-8"))


@guides
def test_every_setting_that_a_page_names_exists(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    settings = re.findall(r"--set ([a-z_.]+)=([\d.]+)", text)
    assert settings or file != README
    build_config("mini", overrides={key: tomllib.loads(f"value = {value}")["value"] for key, value in settings})
    tables = config_to_dict(build_config("mini"))
    sections = "|".join(tables)
    known = {f"{section}.{key}" for section, table in tables.items() for key in table}
    assert set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", text)) <= known


def test_the_memory_of_each_card_is_what_the_plan_says() -> None:
    from echodistill_cli.models.device import fit_to_memory

    words = {
        ("model.decoder", "tiny"): "tiny decoder",
        ("model.decoder", "full"): "full decoder",
        ("critic.discriminators", ("dino", "clip")): "without DINOv2",
        ("train.gradient_checkpointing", True): "checkpointing",
        ("model.offload", True): "one UNet at a time on the card",
    }
    rows = [row for row in table_rows(ROOT / "docs" / "memory.md") if len(row) == 4 and row[0].endswith(" GB")]
    assert len(rows) == 7
    for card, model, settings, memory in rows:
        build = functools.partial(_build, model)
        plan = fit_to_memory(build, card.removesuffix(" GB"))
        saved = [words[one] for one in plan.settings.items() if one in words]
        batch = f"batch {plan.settings['train.batch_size']}"
        assert set(settings.split(", ")) == {*saved, batch}
        assert memory == f"{plan.estimate.total:.1f} GiB"


def _build(model: str, settings: Mapping[str, Any]) -> Config:
    return build_config(model, overrides={**settings, "concept.class_name": "dog"})


def test_the_python_page_runs_and_names_the_public_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(example, "python.md", "exec"), names)
    assert "nowhere does not exist" in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "runs" / "api").iterdir()}
    assert {"0.png", "1.png", "sks-dog.safetensors", "export", "evaluation"} <= made
    functions = set(re.findall(r"`([a-z_]+)\(", text)) - {"to_dict"}
    assert {"train", "sample", "export", "evaluate"} <= functions <= set(names["ed"].__all__)


def test_the_python_of_every_page_compiles() -> None:
    for file in GUIDES:
        for example in re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            compile(example, str(file), "exec")


def table_rows(file: Path) -> list[list[str]]:
    """The cells of every table row of a page."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]


@pytest.mark.parametrize(
    ("name", "contestant"),
    [
        ("echodistill", "ours"),
        ("same losses, teacher trained first and then fixed", "sequential"),
        ("teacher's LoRA loaded into the student (common practice)", "teacher-lora"),
        ("base student", "untouched"),
    ],
)
def test_the_readmes_scores_are_those_of_the_benchmark(name: str, contestant: str) -> None:
    rows = table_rows(ROOT / "examples" / "benchmark" / "README.md")
    (row,) = [row for row in rows if row[0] == contestant and len(row) > 8]
    recognition, _, prompt, _, _, sharpness, drift = (float(cell.split()[0]) for cell in row[2:9])
    (written,) = [row[1:] for row in table_rows(README) if row[0] == name]
    shown = [float(cell.split()[0]) for cell in written]
    assert shown == pytest.approx([recognition, prompt, drift, sharpness], abs=0.0051)
    assert shown[:2] == [recognition, prompt]


def test_the_readmes_costs_are_those_that_the_benchmark_measured() -> None:
    readme = README.read_text(encoding="utf-8")
    lines = (ROOT / "examples" / "benchmark" / "README.md").read_text(encoding="utf-8").splitlines()
    for pair in ("SD-Turbo + SD 2.1 | 1", "SDXL-Turbo + SDXL base | 1"):
        (line,) = [line for line in lines if line.startswith(f"| {pair} |")]
        _, _, step, _, peak, _, speed = (cell.strip() for cell in line.strip("| ").split("|"))
        student, teacher = pair.removesuffix(" | 1").split(" + ")
        minutes = round(float(step.split()[0]) * 1000 / 60)
        (sentence,) = re.findall(rf"{student} with {teacher} takes ([^;]*?)[;.]\s", readme.replace("\n", " "))
        for words in (step, f"({minutes} minutes", peak.partition(" (")[0], speed):
            assert words in sentence


def test_the_comfyui_workflow_is_wired_and_generates_in_one_step() -> None:
    nodes = json.loads((ROOT / "examples" / "comfyui-workflow.json").read_text(encoding="utf-8"))
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    # The outputs of ComfyUI's nodes, by their published definitions.
    outputs = {
        "CheckpointLoaderSimple": 3, "LoraLoader": 2, "CLIPTextEncode": 1, "EmptyLatentImage": 1, "KSamplerSelect": 1,
        "SDTurboScheduler": 1, "SamplerCustom": 2, "VAEDecode": 1, "SaveImage": 0,
    }  # fmt: skip
    assert all(index < outputs[nodes[number]["class_type"]] for number, index in links)
    kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert set(kinds) == set(outputs)
    assert kinds["SDTurboScheduler"] == {"model": ["2", 0], "steps": 1, "denoise": 1.0}
    assert kinds["SamplerCustom"]["cfg"] == kinds["LoraLoader"]["strength_model"] == 1.0
    assert (kinds["EmptyLatentImage"]["width"], kinds["EmptyLatentImage"]["height"]) == (512, 512)
    # Every path from the checkpoint to the sampler goes through the LoRA.
    assert [node for node in nodes.values() if ["1", 0] in node["inputs"].values()] == [nodes["2"]]


@pytest.mark.parametrize("name", ["ci_personalize.sh", "compare_seeds.sh"])
def test_a_script_without_arguments_says_how_it_is_used(name: str) -> None:
    done = subprocess.run(["bash", ROOT / "examples" / name], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"Usage: {name} ")


def test_the_batch_script_skips_a_subject_whose_photos_cannot_be_used_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "subjects" / "cat").mkdir(parents=True)
    (tmp_path / "subjects" / "cat" / "0.png").write_bytes((ROOT / "examples" / "photos" / "0.png").read_bytes())
    script = ["bash", *map(str, (ROOT / "examples" / "ci_personalize.sh", tmp_path / "subjects", tmp_path / "out"))]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 3
    assert "Skipped" in done.stderr
    assert (tmp_path / "out" / "cat.photos.json").stat().st_size


@pytest.mark.parametrize(
    "pattern", ["*.md", "docs/*.md", "examples/**/*.md", "examples/**/*NOTICE", "echodistill_cli/**/*.py"]
)
def test_words_are_spelled_the_american_way(pattern: str) -> None:
    british = re.compile(r"(?<!-)\b(licences?|behaviours?|centred?|neighbours?|labelled|colours?)\b")
    texts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob(pattern)}
    assert not {name: found for name, text in texts.items() if (found := british.findall(text))}
