"""Behaviour of all worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection

__all__ = ["die_with_parent"]


def die_with_parent() -> None:
    """End this process at once when its parent ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
