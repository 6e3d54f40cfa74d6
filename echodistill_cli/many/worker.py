"""`python -m echodistill_cli.many.worker`: one attempt in a process of its own, as `local` starts it.

The first line of stdin is the subject as JSON. Each line of stdout is an event as JSON: begin, message, step, end. What
libraries print goes to stderr. The end of stdin means that the parent is gone: the run is saved, and the process ends.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

from echodistill_cli.many.subject import Outcome, Subject, attempt

Emit = Callable[[str, Any], None]


def run_subject(subject: Subject, emit: Emit) -> Outcome:
    """Attempt a subject and report every event of it, but for the end, which is returned.

    Args:
        subject: to train.
        emit: called with the kind of an event and its data.
    """
    emit("begin", {"host": platform.node(), "pid": os.getpid()})
    return attempt(subject, lambda metrics: emit("step", dict(metrics)), lambda line: emit("message", line))


def emit_to(stream: TextIO) -> Emit:
    """Return a function that writes events as JSON lines, from any thread; a lost reader is no error."""
    one_line = threading.Lock()

    def emit(kind: str, data: Any) -> None:
        try:
            with one_line:
                stream.write(json.dumps([kind, data]) + "\n")
                stream.flush()
        except OSError:  # the parent is gone, which the end of stdin says too
            pass

    return emit


def main() -> None:
    """Attempt the subject on stdin, with its events on stdout."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _interrupt)
    subject = Subject.from_dict(json.loads(sys.stdin.readline()))
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    emit = emit_to(stream)
    emit("end", run_subject(subject, emit).to_dict())


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Outside of the training steps, which save first, SIGTERM ends the attempt as Ctrl-C does."""
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
