"""The notebook, executed from its first cell to its last on the toy pair, with only its first cell changed."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "echodistill.ipynb"
SHORT = {
    **{"train.steps": 1, "train.head_start": 1, "train.replays": 0, "train.first_targets": 0, "train.class_share": 0.0},
    **{"concept.views": 4, "echo.start": None, "echo.carry_back": 0},
}


def cells() -> list[dict[str, Any]]:
    """The cells of the notebook."""
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def test_the_notebook_is_clean_and_has_one_cell_to_change() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert [cell["metadata"] for cell in code if cell["metadata"]] == [{"tags": ["parameters"]}]
    headings = [line for cell in cells() for line in cell["source"] if line.startswith("#") and "## " in line]
    assert [line.split()[2] for line in headings] == ["Install", "Photos", "Train", "Generate", "Take"]


@pytest.mark.notebook
def test_the_notebook_trains_compares_and_packs_on_the_toy_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    first.source += f"\nMODEL, PHOTOS, SETTINGS = 'mini', {str(ROOT / 'examples' / 'photos')!r}, {SHORT!r}"
    nbclient.NotebookClient(notebook, timeout=220, resources={"metadata": {"path": str(tmp_path)}}).execute()

    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "ok       0.png" in printed
    assert "step 1/1: denoising" in printed
    assert "a photo of a sks dog on the beach, seed 1" in printed
    shown = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(shown) == 5 + 1 + 2 * 2 * 2  # photos, the preview, and pairs
    with zipfile.ZipFile(tmp_path / "sks-dog.zip") as archive:
        names = set(archive.namelist())
    assert {"sks-dog.safetensors", "README.md"} <= names
    assert not [name for name in names if "report" in name]
