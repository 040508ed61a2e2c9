"""Studies in miniature: tiny networks, few steps, made-up data, everything in one process."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from mpd_gym.datasets.source import MemorySource
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig
from studies import STUDIES, networks, read_study, run_study
from studies.report import page
from studies.runner import Scope
from tests.helpers import source

CHANGES: dict[str, Any] = {
    "horizon": 16,
    "padding": "repeat",
    "unet": UnetConfig(width=8, multipliers=(1, 2), groups=4),
    "diffusion_steps": 10,
    "hidden": (8,),
    "inverse_hidden": (8,),
    "training": TrainingConfig(steps=3, batch_size=4, validation_batches=1, ema_every=1),
    "regressor_training": TrainingConfig(steps=3, batch_size=4, validation_batches=1, ema_every=1),
    "validation_fraction": 0.25,
}
ENVIRONMENTS = {
    "lqr": "LQR-v0",
    "car-umaze": "CarUMaze-v0",
    "constrained-pendulum": "ConstrainedPendulum-v0",
    "latent-pendulum": "LatentPendulum-v0",
}


def use_made_up_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies learn from a few random episodes not from data sets."""

    def made_up(dataset_id: str) -> Any:
        number = zlib.crc32(dataset_id.encode()) % 1_000  # data sets differ
        env_id = ENVIRONMENTS[dataset_id.split("/")[1]]
        episodes = source(env_id, steps=20 + number % 7, first_seed=number)
        return MemorySource(list(episodes), episodes.metadata, name=dataset_id)

    monkeypatch.setattr(networks, "collected", made_up)


def run_mini(
    name: str, folder: Path, seeds: tuple[int, ...] = (4,), trials: int = 2
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Run a study, check what every study promises, and return its page and measurements."""
    scope = Scope(folder, seeds, trials, processes=0, changes=CHANGES)
    report = run_study(name, scope)
    path = folder / f"{name}.json"
    stored = path.read_text()
    assert (folder / f"{name}.md").read_text() == report
    assert run_study(name, scope) == report  # everything is there
    assert path.read_text() == stored
    assert page(folder, name, STUDIES[name], *read_study(name, folder)) == report
    assert (folder / f"{name}.png").stat().st_size > 1000
    cells: dict[str, dict[str, Any]] = json.loads(stored)["cells"]
    assert all(cell["of"]["network"] for cell in cells.values())
    return report, cells
