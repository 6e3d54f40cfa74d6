"""The benchmark. Imported before torch, so that waiting threads sleep: two runs side by side starved each other."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
