"""Fixtures: headless pictures, one torch thread, data sets in a temporary folder, small agents."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

if TYPE_CHECKING:
    from mpd_gym import MPDiffuserAgent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no GPU here")


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


@pytest.fixture(scope="module")
def lqr() -> MPDiffuserAgent:
    from helpers import tiny_agent

    return tiny_agent("LQR-v0", conditions=("return",), reward_model=True)


@pytest.fixture(scope="module")
def pendulum() -> MPDiffuserAgent:
    from helpers import PENDULUM, tiny_agent

    models = {"reward_model": True, "cost_model": True, "termination_model": True}
    return tiny_agent(PENDULUM, conditions=("return", "cost"), **models)


@pytest.fixture(scope="module")
def car() -> MPDiffuserAgent:
    from helpers import tiny_agent

    return tiny_agent("CarUMaze-v0", conditions=("goal",))


@pytest.fixture(params=["lqr", "pendulum", "car"])
def agent(request: pytest.FixtureRequest) -> MPDiffuserAgent:
    """Each of the three small agents in turn."""
    found: MPDiffuserAgent = request.getfixturevalue(request.param)
    return found
