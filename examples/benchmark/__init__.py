"""The benchmark. Sets OpenMP before torch is imported: busy-waiting threads of parallel runs slow each other."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
