#!/usr/bin/env bash
# The whole method on the embedded 64-pixel pair: five images of a dog in, a LoRA out. Needs no GPU and no model download.
# Usage: demo.sh [OUT]; `make demo` installs everything first.
set -euo pipefail
cd "$(dirname "$0")/.."

# Networks this small are faster on one thread: two threads spend a third of their time waiting for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The last command is a script, which does not silence other libraries as the command line does.
export TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error
run=${1:-runs/demo}
echodistill train examples/photos --token sks --class-name dog --model mini --output "$run" --overwrite
echodistill sample --lora "$run" --prompt-file examples/demo-prompts.txt --output "$run/pictures" --offline
echodistill export "$run" --format both --overwrite
python -m examples.contact_sheet "$run" --prompt-file examples/demo-prompts.txt
