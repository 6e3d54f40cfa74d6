"""The house rules of DESIGN that a machine can check: what imports what, how long things are, what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "echodistill_cli"

# A module imports only from modules that stand before it.
ORDER = (
    *(
        "errors",
        "paths",
        "embedded",
        "settings",
        "config",
        "randomness",
        "catalogue",
        "presets",
        "memory",
        "files",
        "diffusion",
        "losses",
        "images",
        "photos",
    ),
    *("dataset", "conditioning", "adapters", "sources", "vocabulary", "safetensors_files", "single_file", "pair"),
    "sharing",
    *(
        "models",
        "discriminators",
        "planning",
        "sampling",
        "prior",
        "colour_models",
        "subject_masks",
        "recolour",
        "training_set",
        "replay",
        "averaging",
        "echo",
    ),
    *(
        "state",
        "targets",
        "batches",
        "optimizing",
        "teaching",
        "training",
        "runs",
        "pictures",
        "signals",
        "trackers",
        "loop",
        "lora_keys",
        "lora_formats",
    ),
    *("lora_header", "lora_files", "lora_readers", "inspection", "sidecars", "attach", "export", "card"),
    *("original_layout", "merge", "onnx_export", "onnx_backend", "drawing", "learned", "hub", "exporting"),
    *("metrics", "encoders", "evaluation", "pipeline", "dreambench"),
    *("doctor", "report", "progress", "libraries", "flags", "options", "cli_export", "cli_evaluate", "cli"),
)
OPENS_A_DEVICE = {"models", "loop"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))
every_module = pytest.mark.parametrize("module", MODULES)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def own_imports(module: str) -> set[str]:
    """Modules of the package that a module imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("echodistill_cli.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if node.module == "echodistill_cli":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("echodistill_cli."):
                found.add(node.module.split(".")[1])
    return found & set(MODULES)


def functions(module: str) -> Iterator[Function]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, Function))


def depth(node: ast.AST) -> int:
    """How deep loops and ifs stand in each other; elif stands beside its if, an inner function for itself."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, Function | ast.Lambda):
                continue
            is_elif = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If) and len(value) == 1
            step = isinstance(child, ast.For | ast.While | ast.If) and not is_elif
            deepest = max(deepest, step + depth(child))
    return deepest


@every_module
def test_a_module_imports_only_from_modules_before_it(module: str) -> None:
    assert module in ORDER, f"place {module} in ORDER of tests/test_house.py"
    later = {name for name in own_imports(module) if ORDER.index(name) >= ORDER.index(module)}
    assert not later


@every_module
def test_a_module_has_at_most_300_lines(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= 300


@every_module
def test_a_function_has_at_most_40_lines(module: str) -> None:
    # From the docstring on: a command's options are a declaration, not something to follow.
    long = [node.name for node in functions(module) if (node.end_lineno or 0) - node.body[0].lineno + 1 > 40]
    assert not long


@every_module
def test_loops_and_ifs_stand_at_most_three_deep(module: str) -> None:
    deep = [node.name for node in functions(module) if depth(node) > 3]
    assert not deep


@every_module
def test_whatever_is_public_has_a_docstring(module: str) -> None:
    def silent(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    yield prefix + node.name
                if isinstance(node, ast.ClassDef):
                    yield from silent(node.body, f"{node.name}.")

    assert ast.get_docstring(tree(module)) is not None
    assert not list(silent(tree(module).body, ""))


@every_module
def test_nothing_imports_torchvision_timm_or_lpips(module: str) -> None:
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert not names & {"torchvision", "timm", "lpips", "open_clip"}


@every_module
def test_only_what_picks_a_device_names_cuda(module: str) -> None:
    literals = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Constant)]
    named = [node.lineno for node in literals if re.fullmatch(r"cuda(:\d+)?", str(node.value))]
    calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    moved = [node.lineno for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"]
    assert not moved
    assert module in OPENS_A_DEVICE or not named


@every_module
def test_nothing_unpickles_objects(module: str) -> None:
    for node in ast.walk(tree(module)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called = ast.unparse(node.func)
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), node.lineno
        if called == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("weights_only") == "True", node.lineno


def test_the_command_line_answers_without_importing_torch() -> None:
    if "cli" not in MODULES:
        pytest.skip("cli.py is not written yet")
    program = "import sys, echodistill_cli.cli; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "set()"
