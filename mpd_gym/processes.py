"""Behaviour of all worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from contextlib import suppress
from multiprocessing import connection

__all__ = ["die_with_parent", "is_stopped"]


def die_with_parent() -> None:
    """End this process at once when its parent ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_stopped(pid: int) -> bool:
    """Whether a child process is stopped, as by SIGSTOP; False where the system does not tell."""
    if hasattr(os, "waitid"):
        with suppress(ChildProcessError):  # it has ended
            return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    return False
