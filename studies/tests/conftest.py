"""The package's fixtures, and made-up data for every study."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.tests.miniature import use_made_up_data
from tests.conftest import minari_root, one_torch_thread

__all__ = ["minari_root", "one_torch_thread"]

RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.fixture
def made_up_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies learn from a few random episodes."""
    use_made_up_data(monkeypatch)


@pytest.fixture
def results() -> Path:
    """The stored results of the repository."""
    return RESULTS
