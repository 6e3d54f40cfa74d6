#!/usr/bin/env bash
# Generate every prompt with four seeds, with and without the LoRA side by side; prints one JSON object.
# Usage: compare_seeds.sh RUN PROMPTS.txt OUT
set -euo pipefail

if (($# != 3)); then
  echo "Usage: compare_seeds.sh RUN PROMPTS.txt OUT" >&2
  exit 2
fi
run=$1 prompts=$2 out=$3

echodistill sample --lora "$run" --prompt-file "$prompts" -n 4 --seed 100 --compare --output "$out" --json --quiet
