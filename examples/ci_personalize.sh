#!/usr/bin/env bash
# Train on every folder of photos in SUBJECTS, generate samples of each, and collect the LoRA files in OUT.
# Usage: ci_personalize.sh SUBJECTS OUT [flags for train...]
# Name each folder after the subject's class: subjects/dog/*.jpg. An interrupted run is resumed.
set -euo pipefail

subjects=$1 out=$2
shift 2
mkdir -p "$out"

for photos in "$subjects"/*/; do
  class_name=$(basename "$photos")
  run="$out/$class_name"
  resume=()
  if compgen -G "$run/checkpoints/step-*" > /dev/null; then resume=(--resume); fi
  # Exit codes: 2 usage, 3 photos, 4 models, 5 memory, 130 and 143 stopped after saving.
  echodistill check "$photos" --json > "$out/$class_name.photos.json"
  lora=$(echodistill train "$photos" --token sks --class-name "$class_name" --output "$run" --quiet "${resume[@]}" "$@")
  echodistill sample --lora "$run" --prompt "a photo of a sks $class_name on the beach" -n 4 --output "$out/$class_name-samples"
  cp "$lora" "$out/$class_name.safetensors"
done
