"""The recipes in examples/cluster: each is parsed, and its command is run as it stands, with --dry-run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from echodistill_cli.errors import ConfigError, DeviceMemoryError, EchoDistillError, ModelError, PhotoError
from tests.helpers.commands import Done
from tests.many.helpers import ROOT, Batch

CLUSTER = ROOT / "examples" / "cluster"


def shell(batch: Batch, words: list[str], **environment: str) -> Done:
    """Run a script where `echodistill` and stand-ins for SLURM's commands are on the path."""
    bin_folder = batch.folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, script in {
        "echodistill": f'exec {sys.executable} -m echodistill_cli "$@"',
        "srun": 'exec "$@"',
        "scontrol": 'echo "$@" >> "$(dirname "$0")/scontrol.txt"',
    }.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    variables = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables, cwd=batch.folder)
    return Done(done.returncode, done.stdout, done.stderr)


def planned(done: Done) -> list[str]:
    assert done.code == 0, done.err
    return [one["name"] for one in json.loads(done.out)["subjects"]]


def slurm(batch: Batch, task: int, *more: str) -> Done:
    script = ["bash", str(CLUSTER / "slurm_array.sh"), str(batch.manifest), "out", "--config", str(batch.toml), *more]
    task_variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_ID": "77"}
    return shell(batch, script, **task_variables)


def test_a_slurm_task_takes_its_shard_and_is_queued_again_after_a_stop(batch: Batch) -> None:
    assert planned(slurm(batch, 0, "--dry-run", "--json")) == ["one", "three"]
    assert slurm(batch, 0, "--dry-run", "--steps", "0").code == 2
    requeued = batch.folder / "bin" / "scontrol.txt"
    assert not requeued.exists()
    # srun ends with what the step ended with: here, a step that was told to stop and saved.
    copy = batch.folder / "array.sh"
    copy.write_text((CLUSTER / "slurm_array.sh").read_text().replace("srun echodistill", "sh -c 'exit 143'"))
    variables = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_ID": "77"}
    assert shell(batch, ["bash", str(copy), "m.csv", "out"], **variables).code == 143
    assert requeued.read_text() == "requeue 77\n"


def test_slurm_is_asked_for_a_signal_early_enough_to_save() -> None:
    lines = (CLUSTER / "slurm_array.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--signal=TERM@120", "--requeue", "--gpus=1"} <= set(options)


def test_an_indexed_job_never_retries_what_would_fail_again(batch: Batch) -> None:
    job: Any = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # Kubernetes demands it beside a podFailurePolicy
    assert spec["backoffLimitPerIndex"] >= 1  # and this beside FailIndex
    (container,) = pod["containers"]
    fail, ignore = spec["podFailurePolicy"]["rules"]
    final = sorted(kind.exit_code for kind in (ConfigError, PhotoError, ModelError, DeviceMemoryError))
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailIndex", final)
    assert fail["onExitCodes"]["containerName"] == container["name"]
    assert EchoDistillError.exit_code not in final
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    count = spec["completions"]
    words = [*container["command"], *container["args"], "--config", str(batch.toml), "--dry-run", "--json"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1").replace(f"/{count}", "/3") for word in words]
    words = [str(batch.manifest) if word == "/data/subjects.csv" else word for word in words]
    assert planned(shell(batch, words)) == ["two"]


def test_a_skypilot_job_takes_its_shard(batch: Batch) -> None:
    task: Any = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert {"name", "resources", "envs", "setup", "run"} <= set(task)
    assert task["resources"]["use_spot"] is True
    script = task["run"].replace("/photos/subjects.csv", str(batch.manifest)).strip()
    script += f" --config {batch.toml} --dry-run --json"
    variables = {name: str(value) for name, value in task["envs"].items()} | {"STORE": str(batch.folder / "store")}
    assert planned(shell(batch, ["bash", "-euc", script], **variables | {"SHARD": "1", "SHARDS": "3"})) == ["two"]
    launch = (CLUSTER / "skypilot.yaml").read_text().splitlines()[1]
    assert launch.count("0 1 2 3") == 1
    assert task["envs"]["SHARDS"] == 4


def test_submitit_runs_every_shard_and_submits_a_stopped_one_again(batch: Batch) -> None:
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    from examples.cluster.submit import Shard

    script = [sys.executable, str(CLUSTER / "submit.py"), str(batch.manifest), str(batch.output), "--shards", "2"]
    done = shell(batch, [*script, "--cluster", "debug", "--config", str(batch.toml), "--dry-run", "--json"])
    assert done.code == 0, done.err
    plans = [json.loads(line)["subjects"] for line in done.out.splitlines() if line.startswith("{")]
    assert [[one["name"] for one in plan] for plan in plans] == [["one", "three"], ["two"]]
    assert isinstance(Shard(["m.csv"], 1, 2).checkpoint(), submitit.helpers.DelayedSubmission)
