"""Kill −9 at random moments of save, train, collect and compare, see `kills.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def counts(kills: int, seed: int) -> dict[str, dict[str, int]]:
    """What the kills did, by kind of work; in a process that may fork, as it trains nothing."""
    found = subprocess.run(
        [sys.executable, HERE / "kills.py", "--kills", str(kills), "--seed", str(seed)],
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told: dict[str, dict[str, int]] = json.loads(found.stdout)["counts"]
    assert sum(kind["kills"] for kind in told.values()) == kills
    wrong = [kind[name] for kind in told.values() for name in ("lost", "left", "different")]
    assert wrong == [0] * 12, found.stderr
    return told


@pytest.mark.slow
@pytest.mark.fault(
    "Machine",
    "kill -9 at random moments of save, train, collect and compare",
    "nothing is lost or left; what is resumed ends bit-identical",
)
def test_kills_lose_nothing_leave_nothing_and_change_nothing() -> None:
    assert set(counts(8, seed=1)) == {"save", "train", "collect", "compare"}


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.fault(
    "Machine", "1,000 kills, as in docs/kills.json", "nothing is lost, left or different"
)
def test_a_thousand_kills() -> None:
    assert all(kind["kills"] == 250 for kind in counts(1_000, seed=0).values())
