#!/usr/bin/env bash
# Train the subjects of a manifest as a SLURM array, every task its own shard.
# Usage: sbatch --array=0-99%16 slurm_array.sh MANIFEST OUTPUT [flags for train-many...]
# The array counts from 0. A task that reaches its time limit saves, ends with 143, and is queued again.
#SBATCH --job-name=echodistill
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if (($# < 2)); then
  echo "Usage: slurm_array.sh MANIFEST OUTPUT [flags for train-many...]" >&2
  exit 2
fi
manifest=$1 output=$2
shift 2
shard=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
code=0
srun echodistill train-many "$manifest" --output "$output" --shard "$shard" --quiet "$@" || code=$?
if ((code == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
