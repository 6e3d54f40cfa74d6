"""docs/many.md: its calculation, its ratios and its example are what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from echodistill_cli.config.build import build_config
from echodistill_cli.many.manifest import read_manifest
from examples.benchmark.many import PAPER_HEAD, PAPERS, Timing, report
from tests.many.helpers import ROOT

PAGE = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
BENCHMARK = (ROOT / "examples" / "benchmark" / "README.md").read_text(encoding="utf-8")


def measured(pair: str) -> tuple[float, float]:
    """Seconds of a step of batch 1 and 2 on the GPU, from the benchmark's page."""
    (row,) = re.findall(rf"^\| {re.escape(pair)} \| 1 \|.*\n\| \| 2 \|.*$", BENCHMARK, re.MULTILINE)
    first, second = (float(line.split("|")[3].split()[0]) for line in row.splitlines())
    return first, second


def test_the_table_is_the_calculation_from_measured_steps() -> None:
    assert "\n".join([*PAPER_HEAD, *(paper.row() for paper in PAPERS)]) in PAGE
    for paper in PAPERS:
        assert paper.step == measured(paper.pair)[1]


def test_the_calculation_is_right_by_hand() -> None:
    paper = PAPERS[0]
    assert paper.seconds == pytest.approx(1000 * 0.54 + 8 + 5.5)
    assert paper.gpu_hours == pytest.approx(10_000 * 553.5 / 3600)
    assert paper.hours == pytest.approx(100 * 553.5 / 3600)
    assert paper.row().split(" | ")[1:5] == ["554 s", "1.4 %", "1.0 %", "0.5 %"]


def test_what_several_gpus_would_give_one_subject_follows_from_the_steps() -> None:
    for pair, ratio in (("SD-Turbo + SD 2.1", "1.17"), ("SDXL-Turbo + SDXL base", "1.07")):
        one, two = measured(pair)
        assert f"{two / one:.2f}" == ratio
        assert ratio in PAGE
        assert f"{one:.2f} s" in PAGE
        assert f"{two:.2f} s" in PAGE


def test_the_pages_manifest_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```\n(photos,.*?)```", PAGE, re.DOTALL)
    (tmp_path / "m.csv").write_text(example)
    rows = read_manifest(tmp_path / "m.csv", tmp_path / "runs", lambda values: build_config("mini", None, values))
    assert [row.config.name for row in rows] == ["rex", "tomcat"]
    assert rows[1].config.train.steps == 2000


def test_a_report_compares_with_plain_training() -> None:
    text = report([Timing("train", 2, 20, 10), Timing("local-2", 2, 10, 10.4), Timing("ray-2", 2, 30, None)])
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    assert rows[1] == ["local-2", "720", "5.0", "5.2", "+0.20 s CPU (+4.0 %)"]
    assert rows[2] == ["ray-2", "240", "15.0", "", "+5.0 s wall"]
