"""`python examples/cluster/submit.py MANIFEST OUTPUT --shards 16`: a SLURM array through submitit, with retries.

`pip install submitit` first. A shard that reaches its time limit, or is preempted, saves and is submitted again by
submitit. Other flags go to `train-many`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import submitit


class Shard:
    """One shard of a manifest, as submitit calls it in a job.

    Args:
        arguments: of `train-many`.
        index: of the shard, from 0.
        count: of all shards.
    """

    def __init__(self, arguments: list[str], index: int, count: int) -> None:
        self.command = ["train-many", *arguments, "--shard", f"{index}/{count}", "--quiet"]

    def __call__(self) -> int:
        """Run the command and return its exit code."""
        return subprocess.run([sys.executable, "-m", "echodistill_cli", *self.command], check=False).returncode

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """Return what to submit after a time limit or a preemption: the same, as finished subjects are skipped."""
        return submitit.helpers.DelayedSubmission(self)


def main(arguments: list[str] | None = None) -> int:
    """Submit the shards, wait for them, and return the largest exit code."""
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("output")
    parser.add_argument("--shards", type=int, default=16, help="jobs of the array")
    parser.add_argument("--at-once", type=int, default=16, help="jobs that run at the same time")
    parser.add_argument("--minutes", type=int, default=60, help="time limit of a job")
    parser.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help="where to run")
    parser.add_argument("--logs", default="submitit", help="folder of submitit's own files")
    options, flags = parser.parse_known_args(arguments)
    executor = submitit.AutoExecutor(folder=options.logs, cluster=options.cluster)
    executor.update_parameters(
        name="echodistill", timeout_min=options.minutes, gpus_per_node=1, cpus_per_task=4, mem_gb=16
    )
    if options.cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=options.at_once)
    words = [options.manifest, "--output", options.output, *flags]
    shards = [Shard(words, index, options.shards) for index in range(options.shards)]
    with executor.batch():
        jobs = [executor.submit(shard) for shard in shards]
    return max(job.result() for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
