"""The engine of a Ray cluster: one task per subject, in a process of its own.

Tasks, not actors: with a pool of actors Ray 2.60 loses the subject of a node that dies.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from echodistill_cli.errors import ConfigError
from echodistill_cli.many.subject import Event, Subject
from echodistill_cli.many.worker import run_subject

_SCHEME = "ray://"
_NEWS = 1000  # events to take at once
# Ray's own retries would hide an attempt that died; `schedule` retries.
_TASK = {"max_calls": 1, "max_retries": 0, "num_cpus": 1}


class RayEngine:
    """Runs attempts as tasks of a Ray cluster.

    Every node needs this package, and the photos under the same path.

    Args:
        on: "ray" for the cluster that runs here, or else one of this machine; "ray://HOST:PORT" for that cluster.
        workers: tasks at once; None leaves it to Ray.
        gpus_per_subject: GPUs that a task takes, such as 0.5; None for one if the cluster has any.
        on_gpu: whether the subjects may use a GPU.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, on: str, workers: int | None, gpus_per_subject: float | None, *, on_gpu: bool) -> None:
        self.ray = _start(on.removeprefix(_SCHEME) if on.startswith(_SCHEME) else None)
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Events come through an actor on this node, which outlives every worker.
        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=False)
        self.news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        has_gpus = on_gpu and self.ray.cluster_resources().get("GPU", 0) > 0
        gpus = float(has_gpus) if gpus_per_subject is None else gpus_per_subject if on_gpu else 0.0
        self.task = self.ray.remote(num_gpus=gpus, **_TASK)(_attempt)
        self.workers, self.tasks = workers, dict[Any, Subject]()

    @property
    def has_room(self) -> bool:
        """Whether another attempt may be handed to Ray."""
        return self.workers is None or len(self.tasks) < self.workers

    def start(self, subject: Subject) -> None:
        """Hand an attempt to Ray, which starts it where there is room."""
        self.tasks[self.task.options(name=subject.name).remote(subject.to_dict(), self.news.actor)] = subject

    def events(self, seconds: float) -> Sequence[Event]:
        """Return what happened since the last call; waits for up to `seconds` if nothing did."""
        over, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=seconds) if self.tasks else ([], [])
        # A task's own events were sent before its end.
        found = [Event(*event) for event in self._news()]
        return [*found, *(self._end(task) for task in over)]

    def stop(self) -> None:
        """Interrupt every task, as Ctrl-C does; those that train save first."""
        for task in self.tasks:
            self.ray.cancel(task, force=False)

    def kill(self) -> None:
        """End every task at once."""
        for task in self.tasks:
            with contextlib.suppress(Exception):  # of a cluster that is gone
                self.ray.cancel(task, force=True)

    def close(self) -> None:
        """Leave the cluster; one of this machine ends."""
        self.ray.shutdown()

    def _news(self) -> Sequence[Sequence[Any]]:
        with contextlib.suppress(self.ray.exceptions.RayError):
            count = min(self.news.qsize(), _NEWS)
            news: Sequence[Sequence[Any]] = self.news.get_nowait_batch(count) if count else ()
            return news
        return ()

    def _end(self, task: Any) -> Event:
        """Return how a task ended, and forget it."""
        subject = self.tasks.pop(task)
        try:
            return Event(subject.name, "end", self.ray.get(task))
        except self.ray.exceptions.TaskCancelledError:
            return Event(subject.name, "died", "It was stopped before it started.")
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".")  # the rest is advice
            return Event(subject.name, "died", f"Its process ended early ({type(error).__name__}: {reason}).")


def _start(address: str | None) -> Any:
    """Join a cluster, or start one, and return the library."""
    # Ray gives workers the lowest priority, with which they starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--on ray needs the package ray.", "Install it: pip install '.[ray]'") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            del options["include_dashboard"]  # it was decided where the cluster started
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--on ray: there is no cluster at {address} ({reason}).", "Use what ray start printed."
        ) from error
    return ray


def _attempt(values: Mapping[str, Any], news: Any) -> dict[str, Any]:
    """Attempt a subject in a worker of Ray."""
    subject = Subject.from_dict(values)

    def emit(kind: str, data: Any) -> None:
        # Without waiting for the answer: a driver that is gone must not stop a training.
        news.put_nowait.remote((subject.name, kind, data))

    return run_subject(subject, emit).to_dict()
