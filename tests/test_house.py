"""The house rules that a machine can check: imports, sizes, docstrings, and what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "echodistill_cli"

# A package, or a module at the top, imports only from those before it.
PACKAGES = (
    *("errors", "files", "locks", "config", "lora", "diffusion", "models", "data", "runs", "training", "outputs"),
    *("many", "evaluation", "planning", "live", "pipeline", "cli"),
)
# These imports are never allowed, however useful they seem: (importer, imported).
NEVER = {
    ("training", "outputs"),  # training does not know the exporter
    ("outputs", "training"),  # the exporter reads the plain mapping of a checkpoint
    ("lora", "config"),  # a file format knows no run ...
    ("lora", "diffusion"),
    ("lora", "models"),  # ... and no loaded model
    ("diffusion", "config"),  # the maths takes numbers ...
    ("diffusion", "models"),  # ... and loads nothing
    ("data", "config"),
    ("data", "training"),
    ("models", "data"),
    ("models", "training"),
    ("config", "models"),
    ("evaluation", "pipeline"),  # the façade is on top
}
# The command line knows the façade, its configuration and the errors, and nothing else.
CLI_KNOWS = {"cli", "pipeline", "config", "errors"}
# Third-party libraries that only these places import; a folder stands for all of its modules.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "diffusers": ("models", "outputs.apply"),
    "peft": ("models.adapters",),
    "gradio": ("live.page", "live.generate", "live.train"),
    "typer": ("cli",),
    "rich": ("cli",),
    "ray": ("many.on_ray",),
    "fsspec": ("many.store",),
}
WITHOUT_TORCH = ("cli", "config", "errors", "files", "locks", "many", "pipeline", "runs")
OPENS_A_DEVICE = {"models.device"}
MOST_LINES, FEWEST_LINES, MOST_MODULES = 400, 60, 105


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
every_module = pytest.mark.parametrize("module", MODULES)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def source(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def tree(module: str) -> ast.Module:
    return ast.parse(source(module))


def package_of(module: str) -> str:
    return module.partition(".")[0]


def imports(code: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import, inside functions too; name is None for `import module`."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def without_annotations_only(code: ast.Module) -> ast.Module:
    """Return the code without its imports under `if TYPE_CHECKING`."""
    body = [node for node in code.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    return ast.Module(body, [])


def own_imports(code: ast.AST) -> set[str]:
    """Return the modules of the package that code imports. A name of a package's `__init__` counts as the package."""
    modules = set()
    for module, name in imports(code):
        if not module.startswith("echodistill_cli"):
            continue
        inner = module.removeprefix("echodistill_cli").lstrip(".")
        whole = ".".join(filter(None, (inner, name)))
        modules.add(whole if whole in MODULES else inner)
    return modules - {""}


def faults(module: str, code: ast.Module) -> list[str]:
    """Return a sentence for each import that a module must not have."""
    sentences, here = [], package_of(module)
    for other in sorted(own_imports(code)):
        there = package_of(other)
        if there == here:
            continue
        if PACKAGES.index(there) > PACKAGES.index(here):
            sentences.append(f"{module} imports {other}, which stands above it")
        if (here, there) in NEVER:
            sentences.append(f"{here} never imports {there}: {module} imports {other}")
    if here == "cli":
        beyond = {package_of(other) for other in own_imports(code)} - CLI_KNOWS
        sentences += [f"the command line knows the façade alone: {module} imports {name}" for name in sorted(beyond)]
    return sentences + library_faults(module, code)


def library_faults(module: str, code: ast.Module) -> list[str]:
    """Return a sentence for each third-party library that a module must not import."""
    used = {name.partition(".")[0] for name, _ in imports(code)}
    at_import = {name.partition(".")[0] for node in without_annotations_only(code).body for name, _ in shallow(node)}
    sentences = [f"{module} imports {name}" for name in used & {"torchvision", "timm", "lpips", "open_clip"}]
    for library, places in ONLY_IN.items():
        if library in used and not any(module == place or module.startswith(f"{place}.") for place in places):
            sentences.append(f"{module} imports {library}")
    if package_of(module) in WITHOUT_TORCH and at_import & {"torch", "diffusers", "transformers", "peft"}:
        sentences.append(f"{module} imports torch when it is imported")
    return sentences


def shallow(node: ast.stmt) -> Iterator[tuple[str, str | None]]:
    """Yield what a statement at the top of a module imports, without functions and classes."""
    return iter(()) if isinstance(node, ast.ClassDef | Function) else imports(node)


def functions(module: str) -> Iterator[Function]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, Function))


def depth(node: ast.AST) -> int:
    """Return how deep loops and ifs are nested. An elif is as deep as its if; an inner function counts by itself."""
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
def test_a_module_imports_only_what_it_may(module: str) -> None:
    assert package_of(module) in PACKAGES, f"place {package_of(module)} in PACKAGES of tests/test_house.py"
    assert not faults(module, tree(module))


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("lora.keys", "from echodistill_cli.models.load import load_pair", "which stands above it"),
        (
            "outputs.export",
            "from echodistill_cli.training.state import TrainingState",
            "outputs never imports training",
        ),
        ("diffusion.schedule", "def f():\n    from echodistill_cli.config.schema import Config", "diffusion never"),
        ("evaluation.dreambench", "from echodistill_cli import pipeline", "which stands above it"),
        ("cli.sample", "from echodistill_cli.data import photos", "knows the façade alone"),
        ("training.steps", "import diffusers", "imports diffusers"),
        ("training.steps", "from peft.tuners import lora", "imports peft"),
        ("pipeline", "import rich.table", "imports rich"),
        ("files", "import torch", "imports torch when it is imported"),
        ("pipeline", "import torch", "imports torch when it is imported"),
        ("runs", "from torch import Tensor", "imports torch when it is imported"),
        ("data.images", "import torchvision", "imports torchvision"),
        ("models.load", "from echodistill_cli.data import photos", "which stands above it"),
        ("lora.read", "from echodistill_cli.config.schema import Config", "lora never imports config"),
    ],
)
def test_a_forbidden_import_would_be_found(module: str, line: str, fault: str) -> None:
    before = faults(module, tree(module))
    after = faults(module, ast.parse(f"{line}\n{source(module).replace('from __future__ import annotations', '')}"))
    assert any(fault in sentence for sentence in set(after) - set(before))


def test_modules_do_not_import_each_other_in_circles() -> None:
    waiting = {module: own_imports(tree(module)) & set(MODULES) for module in MODULES}
    while ready := [module for module, needed in waiting.items() if not needed & set(waiting)]:
        for module in ready:
            del waiting[module]
    assert not waiting, f"a circle among {sorted(waiting)}"


def test_the_package_shows_few_names_at_its_top() -> None:
    top = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    folders = {name for name in PACKAGES if (PACKAGE / name).is_dir()}
    files = {f"{name}.py" for name in set(PACKAGES) - folders}
    assert top == folders | files | {"__init__.py", "__main__.py", "py.typed"}
    assert len(folders) == 11
    assert len(MODULES) <= MOST_MODULES


def test_the_rules_for_contributors_are_these() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"| a module | {FEWEST_LINES} to {MOST_LINES} lines |" in text
    assert f"a package imports only from those before it: {', '.join(PACKAGES)} |" in text


@every_module
def test_a_module_is_neither_a_splinter_nor_a_hall(module: str) -> None:
    lines = len(source(module).splitlines())
    assert FEWEST_LINES <= lines <= MOST_LINES


@every_module
def test_a_function_has_at_most_40_lines(module: str) -> None:
    # Counted from the docstring: the options of a command are a declaration, not something to follow.
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


def docstring_faults(docstring: str) -> list[str]:
    """Return a sentence for each line of a docstring that breaks the house's form."""
    first, *rest = docstring.splitlines()
    sentences = [f"over 100 characters: {first}"] if len(first) > 100 else []
    inside = False
    for line in rest:
        inside = bool(line.strip()) and (inside or line.strip() in ("Args:", "Attributes:", "Raises:"))
        if inside and re.search(r"[.;] `?\w+`?(, `?\w+`?)*: |^ +\w+(, \w+)+: |^ +as `", line):
            sentences.append(f"one per line: {line.strip()}")
    return sentences


@every_module
def test_a_docstring_has_one_argument_per_line_and_a_short_first_line(module: str) -> None:
    documented = (node for node in ast.walk(tree(module)) if isinstance(node, ast.Module | ast.ClassDef | Function))
    faulty = [sentence for node in documented for sentence in docstring_faults(ast.get_docstring(node) or "-")]
    assert not faulty


@pytest.mark.parametrize(
    "block",
    [
        "Args:\n    first: the one. second: the other.",
        "Args:\n    first, second: both.",
        "Attributes:\n    first: the one; second: the other.",
        "Raises:\n    ConfigError: a setting is wrong. ModelError: a model is missing.",
        "Raises:\n    as `sample`; ModelError: a model is missing.",
    ],
)
def test_a_line_of_two_arguments_would_be_found(block: str) -> None:
    assert docstring_faults(f"Return something.\n\n{block}")
    assert not docstring_faults("Return something.\n\nArgs:\n    first: the one.\n    second: for example: none.")


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


@pytest.mark.parametrize(
    "program",
    [
        "import echodistill_cli.cli",
        "import echodistill_cli.pipeline",
        "import echodistill_cli; echodistill_cli.check(photos)",
        "from echodistill_cli.cli import main\ntry: main(['check', str(photos)])\nexcept SystemExit: pass",
        "from echodistill_cli.cli import main\ntry: main(['train', 'nowhere'])\nexcept SystemExit: pass",
    ],
)
def test_what_needs_no_model_does_not_import_torch(program: str, photo_folder: Path) -> None:
    report = "import sys; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; photos = Path({str(photo_folder)!r})\n{program}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.splitlines()[-1] == "set()"
