#!/usr/bin/env bash
# Build the wheel and the sdist, install the wheel by pip and by uv into fresh environments, and try it there.
# Usage: release_check.sh PYTHON [DIST]
# PYTHON is an environment with the libraries and the group `release`. Without FULL=1, the fresh environments see its
# libraries and get the wheel alone, so that torch is not downloaded again. DIST, a folder, receives the two files.
set -euo pipefail
if (($# < 1)); then
  echo "Usage: release_check.sh PYTHON [DIST]" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dist=${2:-$work/dist}

# The wheel is built from the sdist, so that this one is known to be whole.
"$python" -m build --outdir "$dist" "$root" > "$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
wheel=$(echo "$dist"/*.whl)
"$python" "$root/.ci/look_at_wheel.py" "$wheel" "$root"

cp -r "$root/examples/photos" "$work/photos"
short=(--set train.steps=1 --set train.head_start=1 --set train.replays=0 --set train.first_targets=0
  --set train.class_share=0 --set concept.views=4 --set echo.start=off --set echo.carry_back=0 --no-echo)

# Try a fresh environment from a folder that has nothing of the checkout.
smoke_test() {
  local bin=$1
  mkdir "$bin/../tried" && cd "$bin/../tried"
  unset PYTHONPATH
  export OMP_NUM_THREADS=1
  "$bin/python" - "$root" << 'PYTHON'
import sys
import echodistill, echodistill_cli
for package in (echodistill, echodistill_cli):
    assert not package.__file__.startswith(sys.argv[1]), package.__file__
assert echodistill.train is echodistill_cli.train
print(f"echodistill {echodistill.__version__} in {sys.prefix}")
PYTHON
  "$bin/echodistill" --version
  "$bin/echodistill" check "$work/photos" --resolution 64 > /dev/null
  "$bin/echodistill" train "$work/photos" --class-name dog --model mini --output run --quiet --offline "${short[@]}"
  "$bin/echodistill" sample --lora run --prompt "a sks dog in the snow" --quiet --offline --output images
  "$bin/echodistill" export run --format diffusers > /dev/null
  "$bin/echodistill" inspect run > /dev/null
  cd "$root"
}

# Let an environment see the libraries of PYTHON's.
borrow() {
  local libraries='import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")'
  "$python" -c "$libraries" > "$("$1/python" -c "import site; print(site.getsitepackages()[0])")/borrowed.pth"
}

"$python" -m venv "$work/pip"
if [ "${FULL:-}" = 1 ]; then
  "$work/pip/bin/python" -m pip install --quiet "$wheel"
else
  "$work/pip/bin/python" -m pip install --quiet --no-deps "$wheel"
  borrow "$work/pip/bin"
fi
smoke_test "$work/pip/bin"
echo "pip: works"

uv=$(dirname "$python")/uv
[ -x "$uv" ] || uv=$(command -v uv || true)
if [ -z "$uv" ]; then
  echo "uv: not installed, not tried" >&2
  exit 0
fi
"$uv" venv --quiet --python "$python" "$work/uv"
if [ "${FULL:-}" = 1 ]; then
  "$uv" pip install --quiet --python "$work/uv/bin/python" "$wheel"
else
  "$uv" pip install --quiet --offline --no-deps --python "$work/uv/bin/python" "$wheel"
  borrow "$work/uv/bin"
fi
smoke_test "$work/uv/bin"
echo "uv: works"
