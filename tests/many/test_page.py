"""docs/many.md: its calculation, its ratios and its example are what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from echodistill_cli.config.build import build_config
from echodistill_cli.many.manifest import read_manifest
from examples.benchmark.many import PAPER_HEAD, STEPS, WAYS, Paper, Report, Timing, measure, papers
from tests.many.helpers import ROOT

PAGE = (ROOT / "docs" / "many.md").read_text(encoding="utf-8")
BENCHMARK = (ROOT / "examples" / "benchmark" / "README.md").read_text(encoding="utf-8")


def measured(pair: str) -> tuple[float, float]:
    """Seconds of a step of batch 1 and 2 on the GPU, from the benchmark's page."""
    (row,) = re.findall(rf"^\| {re.escape(pair)} \| 1 \|.*\n\| \| 2 \|.*$", BENCHMARK, re.MULTILINE)
    first, second = (float(line.split("|")[3].split()[0]) for line in row.splitlines())
    return first, second


def test_the_tables_are_those_of_the_measured_run() -> None:
    report = Report.read()
    assert "\n".join([*PAPER_HEAD, *(paper.row() for paper in papers(report))]) in PAGE
    for text in (report.table(), report.note(), report.machine):
        assert text in PAGE
    for pair, step in STEPS.items():
        assert step == measured(pair)[1]


def test_many_subjects_cost_at_most_three_percent_more_than_train() -> None:
    report = Report.read()
    assert [timing.way for timing in report.timings] == list(WAYS)
    assert all(timing.subjects == 12 for timing in report.timings)
    assert all(report.overhead(way) <= 0.03 * report.whole_run for way in WAYS)


def test_the_calculation_is_right_by_hand() -> None:
    paper = Paper("SD-Turbo + SD 2.1", 0.54, 1.5)
    assert paper.seconds == pytest.approx(1000 * 0.54 + 8 + 5.5 + 1.5)
    assert paper.gpu_hours == pytest.approx(10_000 * 555 / 3600)
    assert paper.hours == pytest.approx(100 * 555 / 3600)
    assert paper.row().split(" | ")[1:6] == ["555 s", "1.4 %", "1.0 %", "0.3 %", "0.5 %"]


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


def test_a_report_compares_with_plain_training(tmp_path: Path) -> None:
    timings = (Timing("train", 2, 20, 10), Timing("local-2", 2, 10, 10.4), Timing("ray-2", 2, 30, 16))
    report = Report("a machine", "--steps 1", timings, whole_run=50, ray_start=4)
    report.write(tmp_path / "many.json")
    assert Report.read(tmp_path / "many.json") == report
    rows = [line.strip("| ").split(" | ") for line in report.table().splitlines()[2:]]
    assert rows[0] == ["train", "360", "10.0", "5.00"]
    assert rows[1] == ["local-2", "720", "5.0", "5.20", "+0.20 s (+0.4 %)"]
    assert rows[2] == ["ray-2", "240", "15.0", "8.00", "+1.00 s (+2.0 %)"]
    assert "4.0 CPU seconds" in report.note()


def test_cpu_time_is_that_of_a_whole_tree_of_processes() -> None:
    burn = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
    # The inner process is not waited for, as those of Ray's workers.
    tree = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {burn.format(1)!r}])\n"
    tree += burn.format(0.3) + "time.sleep(0.5)\nwhile open(f'/proc/{child.pid}/stat').read().split()[2] != 'Z':\n"
    tree += "    time.sleep(0.1)\nimport os\ntime.sleep(0.5)\nos._exit(0)\n"
    assert measured_cpu("ray-1", tree) >= 0.9
    assert 0.3 <= measured_cpu("train", burn.format(0.3)) < 1


def measured_cpu(way: str, code: str) -> float:
    """CPU seconds of a program as the benchmark measures a way."""
    return measure(way, 1, ("-c", code)).cpu
