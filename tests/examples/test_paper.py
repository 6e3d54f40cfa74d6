"""examples/paper.toml: complete, valid, the paper's numbers, and something that trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from echodistill_cli.config.build import PRESETS, build_config, read_toml
from echodistill_cli.config.schema import Config
from echodistill_cli.config.warnings import warnings
from tests.helpers.commands import command

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "paper.toml"
# The echo uses it, which is off.
IDLE = {"echo.every"}
# Reports and checkpoints; and what follows from the size of the models.
SIZE = {"model", "run"}


def settings(config: Config) -> dict[str, object]:
    sections = ((name, table) for name, table in dataclasses.asdict(config).items() if name not in SIZE)
    return {f"{name}.{key}": value for name, table in sections for key, value in table.items()}


def test_the_papers_file_leaves_no_part_of_the_method_to_the_preset() -> None:
    (first, *others) = (settings(build_config(name, FILE)) for name in PRESETS)
    for other in others:
        assert {key for key, value in first.items() if other[key] != value} <= IDLE


def test_the_papers_file_has_the_numbers_of_the_authors_code_and_no_idle_setting() -> None:
    config = build_config("sd-turbo", FILE, {"concept.class_name": "dog"})
    assert list(warnings(config)) == []
    assert (config.train.steps, config.train.batch_size, config.train.guidance_scale) == (1000, 2, 7.5)
    # Theirs are 1e-5 for matrices, times the batch size for the student; ten times as much for a LoRA.
    assert (config.train.lr, config.train.teacher_lr) == (10 * 2 * 1e-5, 10 * 1e-5)
    assert dataclasses.astuple(config.loss)[:4] == (1.0, 1.0, 1.0, 0.1)
    assert config.loss.adversarial == 1.0
    assert len(config.critic.discriminators) == 3


def test_every_setting_of_the_papers_file_stands_below_a_comment_or_speaks_for_itself() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert "echodistill train ./photos --class-name dog --config examples/paper.toml --model sd-turbo" in text
    assert text.count("\n#") >= 12
    assert max(map(len, text.splitlines())) <= 120
    assert set(read_toml(FILE)) == {"concept", "adapter", "text", "train", "loss", "critic", "echo"}


def test_a_run_with_the_papers_file_trains(tmp_path: Path) -> None:
    small = {"critic.identity": "mini:identity", "concept.views": 4, "critic.swd_projections": 4}
    critics = ("--discriminators", "mini:vit, mini:clip")
    options = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    photos = ROOT / "examples" / "photos"
    done = command(
        *("train", photos, "--class-name", "dog", "--config", FILE, "--model", "mini", "--steps", 1),
        *(*options, *critics, "-o", tmp_path / "run", "--offline", "--json"),
    )
    assert done.code == 0, done.err
    assert done.result["steps"] == 1
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    losses = ("denoising", "latent", "identity", "sliced_wasserstein", "adversarial", "discriminator_mini:vit")
    assert all(f'"{name}"' in metrics for name in losses), metrics
