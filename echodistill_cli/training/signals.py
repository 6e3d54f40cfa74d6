"""Ctrl-C and SIGTERM: everywhere an orderly end; in a training run, a request to stop after the step at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM came; as an exception, so that what stands half-written is cleaned up on the way out."""


@contextmanager
def terminating() -> Iterator[None]:
    """A context in which SIGTERM raises `Terminated`, as SIGINT raises `KeyboardInterrupt`."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Terminated(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """A context in which SIGINT and SIGTERM are remembered instead of raised; a second SIGINT interrupts at once.

    `received` is the signal's number, or None. Outside the main thread, where Python allows no handlers, it only stays
    None.

    Args:
        announce: called when the first signal comes.
    """

    def __init__(self, announce: Callable[[], None] = lambda: None) -> None:
        self.announce = announce
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.announce()
        self.received = number
