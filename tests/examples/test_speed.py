"""What a step asks of a device, sampling against diffusers, and the script for a machine with a GPU, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from echodistill_cli.config.families import FAMILIES
from echodistill_cli.diffusion.text import Conditioning
from echodistill_cli.models.adapters import UNET_LAYERS, add_lora
from echodistill_cli.models.lean import make_lean
from echodistill_cli.models.memory import estimate
from examples.benchmark import gpu, sampling_speed
from examples.benchmark.step_cost import Recipe, StepCounter, count, counting, lines, prepare, record
from examples.benchmark.true_models import random_denoiser

META = torch.device("meta")


@pytest.mark.parametrize(("recipe", "kernels", "operations"), [("paper", 5_680, 15_450), ("preset", 33_300, 86_700)])
def test_an_sd_step_at_true_size_never_waits_for_the_device_and_stays_below_its_bound(
    tmp_path: Path, recipe: Recipe, kernels: int, operations: int
) -> None:
    state = prepare("sd", tmp_path, side=64, batch=1, recipe=recipe)
    counter = count(state)
    total = counter.total
    expected = estimate(state.config, FAMILIES["sd"], half=True)
    assert counter.peak / 2**30 == pytest.approx(expected.total - expected.parts["libraries"], rel=0.02)
    assert (total.fetches, total.blocking_copies) == (0, 0)
    assert total.kernels <= kernels
    assert total.operations <= operations
    assert {"teacher", "student", "target", "critics", "optimizers"} <= set(counter.parts)
    assert ({"replays", "paired critic"} <= set(counter.parts)) is (recipe == "preset")
    assert record(counter)["step"]["kernels"] == total.kernels
    assert len(list(lines(counter))) == len(counter.parts) + 3


def test_a_fetch_a_blocking_copy_and_a_view_are_told_apart() -> None:
    with StepCounter(META) as counter:
        on_device = torch.ones(2, 2, device=META)
        on_device.view(4).t()
        float(on_device.sum())
        torch.zeros(3).to(META)
        torch.zeros(3).to(META, non_blocking=True)
        on_device.mm(on_device)
    total = counter.total
    assert (total.fetches, total.blocking_copies) == (1, 1)
    assert total.kernels == 5  # ones, sum, two copies, product
    assert total.flops == 2 * 2**3
    assert counter.peak >= 16


def test_sampling_is_compared_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    speed = sampling_speed.compare(lambda: calls.append("ours"), lambda: calls.append("theirs"), turns=2, images=4)
    assert calls == ["ours", "theirs"] * 3
    assert speed.ratio > 0
    sampling_speed.main(["--turns", "1", "--cold-turns", "0", "--json"])
    assert json.loads(capsys.readouterr().out)["warm"]["ours"] > 0


def test_the_script_for_a_gpu_runs_in_small_and_writes_json_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(["--dry-run", "--only", "steps sd", "--output", str(tmp_path)])
    (stage,) = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stage["code"] == 0, stage["said"]
    assert [row["batch"] for row in stage["rows"]] == [1, 2]
    assert capsys.readouterr().out == (tmp_path / "gpu.md").read_text()


def test_the_table_for_a_gpu_has_a_row_per_design_and_names_what_failed() -> None:
    row = {"family": "sd", "design": "lean", "batch": 1, "seconds": 0.1, "peak": 7.0, "images": 9.0, "planned": 8.0}
    steps = {"name": "steps sd", "code": 0, "seconds": 1.0, "rows": [row]}
    sampling = {"name": "sampling sd", "code": 1, "seconds": 2.0, "rows": [{"warm": {"ratio": 1.01}}]}
    text = "\n".join(gpu.table([steps, sampling]))
    assert "| sd | lean | 1 | 0.100 s | 7.0 GiB (8.0) | 9.0 images/s |" in text
    assert "sampling sd: 1.010 times the seconds of diffusers" in text
    assert "sampling sd: ended with 1 after 2.0 s" in text
    assert sum(stage.seconds for stage in gpu.STAGES) <= gpu.SECONDS


def test_a_true_unet_keeps_for_its_gradient_what_the_plan_expects() -> None:
    denoiser = random_denoiser("sd", torch.bfloat16, META, 512)
    add_lora(denoiser.unet, UNET_LAYERS["attention"], 16, 16, seed=0)
    make_lean(denoiser.unet)
    text = Conditioning(torch.zeros(1, 77, 1024, dtype=torch.bfloat16, device=META))
    noisy, timesteps = torch.zeros(1, 4, 64, 64, device=META), torch.zeros(1, dtype=torch.long, device=META)
    with counting(META) as counter:
        for tensor in (*denoiser.unet.parameters(), *denoiser.unet.buffers()):
            counter.watch(tensor)
        before = counter.live
        denoiser(noisy, timesteps, text).sum().backward()
    expected = FAMILIES["sd"].size.activations["attention"]
    assert (counter.peak - before) / 2**30 == pytest.approx(expected, rel=0.1)
