"""Studies run, go on where they were, and report every seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_agent

from mpd_gym.experiments import car_umaze, pendulum_ranking
from mpd_gym.experiments.tables import markdown_table, pooled_share, seed_mean


def test_tables_show_every_seed_and_the_interval() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "|---|---|", "| 1 | 2 |"]
    # t interval of 1, 2, 3: 2 ± 4.303 / sqrt(3)
    assert seed_mean([1.0, 2.0, 3.0], 2) == "**2.00** [-0.48, 4.48] (1.00, 2.00, 3.00)"
    assert seed_mean([0.5], 1, scale=100) == "**50.0** (one seed)"
    # Wilson interval of 5 in 10: centre 0.5, half width 0.2634
    shown = pooled_share([np.array([True] * 4 + [False]), [True] + [False] * 4])
    assert shown == "**50.0** [23.7, 76.3] (80.0, 20.0)"


@pytest.mark.slow
def test_car_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(car_umaze, "TEMPERATURES", (1.0,))
    for seed in (4, 5):
        agent = tiny_agent("CarUMaze-v0", conditions=("goal",), seed=seed)
        path = tmp_path / f"agents/car-seed{seed}.safetensors"
        path.parent.mkdir(exist_ok=True)
        agent.with_options(num_steps=2, action_chunk=8).save(path)
    monkeypatch.setattr(car_umaze, "STEPS", (2, None))
    report = car_umaze.run(tmp_path, (4, 5), 3)
    cells = json.loads((tmp_path / "car-umaze.json").read_text())["cells"]
    opened = {key: cell for key, cell in cells.items() if not key.startswith("closed")}
    assert len(opened) == len(car_umaze.COMPOSITIONS) * 2 * 2
    for cell in opened.values():
        assert len(cell["final_error"]) == len(cell["collision"]) == 3
        assert len(cell["state_error"]) == 8
    assert "All reverse steps" in report and "2 reverse steps" in report
    assert (tmp_path / "car-umaze.png").stat().st_size > 1000
    key = next(iter(opened))
    content = json.loads((tmp_path / "car-umaze.json").read_text())
    content["cells"][key]["final_error"] = [0.25] * 3
    (tmp_path / "car-umaze.json").write_text(json.dumps(content))
    assert car_umaze.run(tmp_path, (4, 5), 3) != report  # keeps what is there


@pytest.mark.slow
def test_pendulum_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pendulum_ranking, "CANDIDATES", (1, 4))
    for seed in (4, 5):
        models = {"reward_model": True, "cost_model": True}
        agent = tiny_agent("ConstrainedPendulum-v0", conditions=("return",), seed=seed, **models)
        path = tmp_path / f"agents/pendulum-seed{seed}.safetensors"
        path.parent.mkdir(exist_ok=True)
        agent.with_options(num_steps=1, action_chunk=8, budget=0.0).save(path)
    report = pendulum_ranking.run(tmp_path, (4, 5), 3)
    cells = json.loads((tmp_path / "pendulum-ranking.json").read_text())["cells"]
    assert len(cells) == 2 * 2 * 2
    for key, cell in cells.items():  # three starts in all, spread over the seeds
        assert len(cell["success"]) == (2 if key.endswith("seed=4") else 1)
    assert report.count("| 4 |") == 2
    assert (tmp_path / "pendulum-ranking.png").stat().st_size > 1000
