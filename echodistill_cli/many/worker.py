"""`python -m echodistill_cli.many.worker`: one attempt in a process of its own, as `local` starts it.

The first line of stdin is the subject as JSON. Each line of stdout is an event as JSON: begin, message, step, end. What
libraries print goes to stderr. The end of stdin means that the parent is gone: the run is saved, and the process ends.
"""

from __future__ import annotations

import dataclasses
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
    """Return a function that writes events as lines of JSON, from any thread.

    A reader that is gone is no error.
    """
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
    stop = Stop()
    signal.signal(signal.SIGTERM, stop.record)
    try:
        subject = Subject.from_dict(json.loads(sys.stdin.readline()))
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        emit = emit_to(stream)
        outcome = run_subject(subject, stop.repeated(emit))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is over; only the report is left
    except KeyboardInterrupt:  # between any two lines of this function
        sys.exit(128 + signal.SIGTERM)
    emit("end", stop.explain(outcome).to_dict())


class Stop:
    """SIGTERM outside of the training steps, which save first: it ends the attempt as Ctrl-C does.

    A library may swallow the exception, as Python itself does in destructors, or turn it into one of its own.
    """

    def __init__(self) -> None:
        self.received = False

    def record(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the signal."""
        self.received = True
        raise KeyboardInterrupt

    def repeated(self, emit: Emit) -> Emit:
        """Return a function that emits, and sends the signal again if training goes on in spite of it."""

        def emit_and_stop(kind: str, data: Any) -> None:
            emit(kind, data)
            if kind == "step" and self.received:
                self.received = False
                os.kill(os.getpid(), signal.SIGTERM)

        return emit_and_stop

    def explain(self, outcome: Outcome) -> Outcome:
        """Return how an attempt ended, where an error after the signal was the signal."""
        if not (self.received and outcome.status == "failed"):
            return outcome
        error = f"Stopped outside of the training steps ({outcome.error})."
        return dataclasses.replace(outcome, status="stopped", exit_code=128 + signal.SIGTERM, error=error)


def _stop_with_parent() -> None:
    # Not sys.stdin, which this thread would hold while Python ends and wants to close it: a fatal error.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
