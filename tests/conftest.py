"""Fixtures for all tests: headless pictures, one torch thread, data sets in a temporary folder."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that Minari reads and writes in this test."""
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Two test workers share two cores; results do not depend on the thread count."""
    import torch

    torch.set_num_threads(1)
