#!/usr/bin/env bash
# Train on every folder of photos in SUBJECTS, generate samples of each, and collect the LoRA files in OUT.
# Usage: ci_personalize.sh SUBJECTS OUT [flags for train...]
# Name each folder after the subject's class: subjects/dog/*.jpg. An interrupted run is resumed. A folder whose photos
# cannot be used is skipped, and the script ends with 3. The token's file belongs to the LoRA.
set -euo pipefail

if (($# < 2)); then
  echo "Usage: ci_personalize.sh SUBJECTS OUT [flags for train...]" >&2
  exit 2
fi
subjects=$1 out=$2
shift 2
mkdir -p "$out"
result=0

for photos in "$subjects"/*/; do
  class_name=$(basename "$photos")
  run="$out/$class_name"
  resume=()
  if compgen -G "$run/checkpoints/step-*" > /dev/null; then resume=(--resume); fi
  # Exit codes: 2 usage, 3 photos, 4 models, 5 memory, 130 and 143 stopped after saving.
  code=0
  echodistill check "$photos" --json > "$out/$class_name.photos.json" || code=$?
  if ((code == 3)); then
    echo "Skipped $photos: see $out/$class_name.photos.json" >&2
    result=3
    continue
  fi
  ((code == 0)) || exit "$code"
  lora=$(echodistill train "$photos" --token sks --class-name "$class_name" --output "$run" --quiet "${resume[@]}" "$@")
  echodistill sample --lora "$run" --prompt "a photo of a sks $class_name on the beach" -n 4 --output "$out/$class_name-samples"
  cp "$lora" "$out/$class_name.safetensors"
  if [ -f "$run/sks.safetensors" ]; then cp "$run/sks.safetensors" "$out/$class_name-token.safetensors"; fi
done
exit "$result"
