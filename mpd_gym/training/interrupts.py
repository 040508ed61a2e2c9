"""SIGINT and SIGTERM as a request that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

__all__ = ["StopRequest", "catch_interrupts"]


@final
class StopRequest:
    """Whether the user asked to stop.

    Attributes:
        signal: Name of the signal, or None.
    """

    def __init__(self) -> None:
        self.signal: str | None = None


@contextmanager
def catch_interrupts() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; the same signal again acts as before.

    A different second signal changes nothing, as tools that stop a group of processes may send
    both. The old handlers return at the end. Outside the main thread Python allows no handlers,
    and the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def answer(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number).name
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, answer)
    try:
        yield request
    finally:
        for number in numbers:  # None: set by C code, which Python cannot put back
            signal.signal(number, before[number] or signal.SIG_DFL)
