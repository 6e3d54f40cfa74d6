#!/usr/bin/env bash
# Train on every folder of photos in SUBJECTS, generate samples of each, and collect the LoRA files in OUT.
# Usage: ci_personalize.sh SUBJECTS OUT [flags for train...]
# Name each folder after the subject's class: subjects/dog/*.jpg. An interrupted run is resumed, a finished one stays as it
# is. A folder that cannot be trained on is skipped, such as one whose photos changed since its run (use a new OUT), and the
# script ends with the last such exit code. The token's file belongs to the LoRA.
set -euo pipefail

if (($# < 2)); then
  echo "Usage: ci_personalize.sh SUBJECTS OUT [flags for train...]" >&2
  exit 2
fi
subjects=$1 out=$2
shift 2
mkdir -p "$out"
result=0

# Copy a file so that nobody reads half of it.
publish() {
  cp "$1" "$2.partial"
  mv "$2.partial" "$2"
}

for photos in "$subjects"/*/; do
  class_name=$(basename "$photos")
  run="$out/$class_name"
  resume=()
  if [ -f "$run/config.toml" ]; then resume=(--resume); fi
  # Exit codes: 2 usage, 3 photos, 4 models, 5 memory, 130 and 143 stopped after saving.
  code=0
  echodistill check "$photos" --json > "$out/$class_name.photos.json" || code=$?
  if ((code == 3)); then
    echo "Skipped $photos: see $out/$class_name.photos.json" >&2
    result=3
    continue
  fi
  ((code == 0)) || exit "$code"
  lora=$(echodistill train "$photos" --token sks --class-name "$class_name" --output "$run" --quiet "${resume[@]}" "$@") || code=$?
  if ((code == 2)); then
    echo "Skipped $photos: see the line above" >&2
    result=2
    continue
  fi
  ((code == 0)) || exit "$code"
  rm -rf "$out/$class_name-samples" # `sample` never overwrites
  echodistill sample --lora "$run" --prompt "a photo of a sks $class_name on the beach" -n 4 --output "$out/$class_name-samples" --quiet
  publish "$lora" "$out/$class_name.safetensors"
  if [ -f "$run/sks.safetensors" ]; then publish "$run/sks.safetensors" "$out/$class_name-token.safetensors"; fi
done
exit "$result"
