#!/usr/bin/env bash
# Draw the same prompts and seeds with the base model beside, one JSON line per prompt, for a look at what was learned.
# Usage: compare_seeds.sh RUN PROMPTS.txt OUT
set -euo pipefail

run=$1 prompts=$2 out=$3

while IFS= read -r prompt; do
  echodistill sample --lora "$run" --prompt "$prompt" -n 4 --seed 100 --compare --output "$out" --json --quiet
done < "$prompts"
