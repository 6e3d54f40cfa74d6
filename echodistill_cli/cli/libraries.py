"""The manners of the libraries underneath: set before they are imported, by the command line only."""

from __future__ import annotations

import os
import sys


def prepare_libraries(*, offline: bool, quiet: bool) -> None:
    """Set the other libraries' environment before they are imported: no telemetry, no chatter, no socket if offline."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Threads that wait by spinning starve each other as soon as anything else wants a core: a step of the small pair
    # took 5 to 20 s beside one busy process, and 0.3 s with threads that sleep. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
