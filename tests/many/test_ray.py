"""`train-many --on ray`: killed workers and nodes, a subject that always dies, Ctrl-C. Needs the extra ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from echodistill_cli.runs import open_run
from tests.many.helpers import Batch, only_if_selected, pid_in

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A cluster of two nodes with one CPU each; the driver joins the first."""
    only_if_selected(request, "ray")
    pytest.importorskip("ray", reason="needs the extra ray")
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    Path("/tmp/ray").mkdir(exist_ok=True)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=1, num_gpus=0)
    yield nodes
    nodes.shutdown()


def on(cluster: Any) -> tuple[str, str]:
    """The flags that train on the cluster."""
    return "--on", f"ray://{cluster.address}"


def test_a_killed_worker_is_retried_and_a_subject_that_always_dies_fails_alone(cluster: Any, batch: Batch) -> None:
    batch.write("one", "two")
    with batch.process(*on(cluster), "--retries", 1) as watched:
        os.kill(pid_in(watched.until("two: started on")), signal.SIGKILL)
        watched.until("one: training 4/8")
        os.kill(pid_in(watched.until("one: started on")), signal.SIGKILL)
        os.kill(pid_in(watched.until("two: started on", times=2)), signal.SIGKILL)
        assert watched.end() == 1, watched.text
    assert [row["status"] for row in batch.attempts("two")] == ["died", "died"]
    assert "WorkerCrashedError" in batch.attempts("two")[1]["error"]
    first, second = batch.attempts("one")
    assert (first["status"], second["status"], second["attempt"]) == ("died", "done", 2)
    assert second["begun_from"] in (2, 4, 6)
    assert batch.steps("one") == list(range(1, 9))
    assert batch.result("two") is None


def test_ctrl_c_saves_every_running_subject_before_the_command_ends(cluster: Any, batch: Batch) -> None:
    with batch.process(*on(cluster), "--steps", 60) as watched:
        lines = [watched.until("started on"), watched.until("started on", times=2)]
        running = {line.partition(":")[0] for line in lines}
        for name in running:
            watched.until(f"{name}: training")
        watched.process.send_signal(signal.SIGINT)
        assert watched.end() == 130, watched.text
    assert "are saved. The same command continues." in watched.text
    for name in running:
        (row,) = batch.attempts(name)
        assert (row["status"], row["exit_code"]) == ("stopped", 130), row
        assert open_run(batch.output / name).list_checkpoints()[-1].name == f"step-{row['steps']:06d}"


def test_a_subject_whose_node_is_killed_goes_on_at_another(cluster: Any, batch: Batch) -> None:
    long = {"train.steps": 60}  # a node takes seconds to die
    batch.write("one", "two", one=long, two=long)
    (node,) = cluster.worker_nodes
    with batch.process(*on(cluster), "--json") as watched:
        parents = {}
        for line in (watched.until("started on"), watched.until("started on", times=2)):
            parents[line.partition(":")[0]] = psutil.Process(pid_in(line)).ppid()
        (lost,) = [name for name, parent in parents.items() if parent == _raylet(node)]
        watched.until(f"{lost}: training 15/60")
        cluster.remove_node(node, allow_graceful=False)
        assert watched.end() == 0, watched.text
    first, second = batch.attempts(lost)
    assert (first["status"], second["status"], second["attempt"]) == ("died", "done", 2)
    assert second["begun_from"] in range(2, 60, 2)
    assert batch.steps(lost) == list(range(1, 61))
    (other,) = {"one", "two"} - {lost}
    assert [row["status"] for row in batch.attempts(other)] == ["done"]


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
