"""Studies run, go on where they were, and report every seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from miniature import CHANGES, run_mini, use_made_up_data

from mpd_gym import load_agent
from mpd_gym.envs.pendulum_model import observation, transition
from studies import (
    car_compositions,
    car_umaze,
    lqr_noise,
    pendulum_promises,
    pendulum_ranking,
)
from studies.measures import episodes, open_loop, parked, promises

PENDULUM = "ConstrainedPendulum-v0"


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch: pytest.MonkeyPatch) -> None:
    use_made_up_data(monkeypatch)


@pytest.mark.slow
def test_car_umaze(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(car_umaze, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(car_umaze, "CLOSED", {"action_chunk": 15, "num_steps": 2})
    report, cells = run_mini("car-umaze", tmp_path, (4, 5), trials=3)
    peers = len(car_umaze.METHODS)
    tuned = (peers - 2) * len(car_umaze.GUIDANCES)  # Diffuser's one choice is not measured
    assert len(cells) == 2 * (tuned + 2 * (peers - 1)) + 2 * peers
    for key, cell in cells.items():
        if cell["of"]["measure"] == "open_loop":
            assert len(cell["final_error"]) == len(cell["collision"]) == 3, key
    assert "MPDiffuser above Decision Diffuser" in report and "95.3 : 42.2" in report
    assert "MPDiffuser above behaviour cloning, closed loop" in report
    assert (tmp_path / "car-umaze.png").stat().st_size > 1000


def test_measures_of_another_car() -> None:
    """What is played is the changed environment, with and without looking."""
    agent = load_agent("CarUMaze-v0", "cpu")
    longer = {"wheelbase": 1.15}
    usual, changed = (
        open_loop(agent, "CarUMaze-v0", [0, 1], env_kwargs=one) for one in ({}, longer)
    )
    assert max(usual["final_error"]) < 1 < min(changed["final_error"])
    usual, changed = (
        episodes(agent, "CarUMaze-v0", [0, 1], env_kwargs=one) for one in ({}, longer)
    )
    assert parked(usual).all() and changed["return"] != usual["return"]


@pytest.mark.slow
def test_car_compositions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(car_compositions, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(car_compositions, "STEPS", (2,))
    monkeypatch.setattr(car_compositions, "CHUNKS", (15,))
    options = {**car_compositions.OPTIONS, "num_steps": 2}
    monkeypatch.setattr(car_compositions, "OPTIONS", options)
    report, cells = run_mini("car-compositions", tmp_path, (4, 5), trials=3)
    assert len(cells) == 2 * (len(car_compositions.COMPOSITIONS) + 2)
    assert "MPDiffuser above its planner, closed loop, 15 actions of each plan" in report
    assert (tmp_path / "car-compositions.png").stat().st_size > 1000


@pytest.mark.slow
def test_pendulum_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pendulum_ranking, "CANDIDATES", (1, 4))
    monkeypatch.setattr(pendulum_ranking, "OPTIONS", {"num_steps": 1, "action_chunk": 16})
    monkeypatch.setattr(pendulum_ranking, "TUNED_AT", 1)
    monkeypatch.setattr(pendulum_ranking, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(pendulum_ranking, "OFTEN", {1: pendulum_ranking.OFTEN[1]})
    report, cells = run_mini("pendulum-ranking", tmp_path, (4, 5), trials=3)
    spread = {tuple(cell["of"]["starts"]) for key, cell in cells.items() if "N=" in key}
    assert spread == {(0, 2), (2, 3), (0, 12)}  # three in all, spread over the seeds; or 4 x 3
    assert "MPDiffuser, Algorithm 1 above planner at N = 1, 12 starts with each training" in report
    assert any(cell["of"].get("method") == "safediffuser" for cell in cells.values())
    assert report.count("| 4 | ") == 3
    assert "| behaviour cloning, safe episodes | " in report


@pytest.mark.slow
def test_pendulum_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pendulum_promises, "CANDIDATES", (1, 2))
    monkeypatch.setattr(pendulum_promises, "CLOSED_CANDIDATES", (2,))
    monkeypatch.setattr(pendulum_promises, "OPTIONS", {"num_steps": 1})
    report, cells = run_mini("pendulum-promises", tmp_path, (4, 5), trials=3)
    assert len(cells) == 2 * 2 * 2 * 2 + 2
    assert report.count("| 1 | planner | ") == 2
    for key, cell in cells.items():
        if cell["of"]["measure"] == "promises":
            assert all(0 <= peak <= 8 for peak in cell["executed_peak"]), key


@pytest.mark.slow
def test_lqr_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lqr_noise, "PERCENTS", (40, 80))
    monkeypatch.setattr(lqr_noise, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(lqr_noise, "OPTIONS", {"num_steps": 1, "action_chunk": 15})
    monkeypatch.setattr(lqr_noise, "GUIDANCES", (1.0,))
    monkeypatch.setattr(lqr_noise, "ALL_SEEDS_AT", 80)
    report, cells = run_mini("lqr-noise", tmp_path, (4, 5))
    assert len(cells) == len(lqr_noise.PEERS) * 3  # one seed at 0.4, two at 0.8
    assert "one seed" in report and "State error at p = 0.8" in report


@pytest.mark.slow
def test_networks_are_trained_once_and_cells_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted study keeps its cells; another one takes its networks."""
    from studies import lqr_compositions, lqr_steps

    monkeypatch.setattr(lqr_compositions, "TEMPERATURES", (1.0,))
    options = {"num_steps": 2, "action_chunk": 16, "guidance_scale": 1.0}
    monkeypatch.setattr(lqr_compositions, "OPTIONS", options)
    monkeypatch.setattr(lqr_steps, "STEPS", (2,))
    monkeypatch.setattr(lqr_steps, "SAMPLERS", ("ddpm",))
    _, cells = run_mini("lqr-compositions", tmp_path)
    agents = sorted(path.name for path in (tmp_path / "agents").glob("*.safetensors"))
    assert len(agents) == 2
    run_mini("lqr-steps", tmp_path)
    assert agents == sorted(path.name for path in (tmp_path / "agents").glob("*.safetensors"))

    path = tmp_path / "lqr-compositions.json"
    content = json.loads(path.read_text())
    kept, lost, stale = list(content["cells"])[:3]
    content["cells"][kept]["costs"] = [7.0, 7.0]
    content["cells"][stale]["of"]["options"] = {}
    del content["cells"][lost]
    path.write_text(json.dumps(content))
    _, again = run_mini("lqr-compositions", tmp_path)
    assert again[kept]["costs"] == [7.0, 7.0]
    assert set(again) == set(cells)
    assert again[stale]["of"] == cells[stale]["of"]
    assert CHANGES["diffusion_steps"] == 10


class Clairvoyant:
    """Plans random torques whose states it knows, but promises less speed than there is."""

    def __init__(self, starts: list[int], optimism: float) -> None:
        env = gym.make(PENDULUM)
        rng = np.random.default_rng(0)
        self._actions = rng.uniform(-2, 2, (len(starts), 8, 1))
        rows = [env.reset(seed=start)[0] for start in starts]
        states = np.array([[np.arctan2(row[1], row[0]), row[2]] for row in rows], float)
        planned = []
        for step in range(8):
            states = transition(states, self._actions[:, step])
            planned.append(observation(states))
        self._planned = np.stack(planned, axis=1) * [1, 1, optimism]

    def predict(self, observations: Any) -> tuple[Any, None]:
        return self._actions[:, 0], None

    def planned(self, state: None) -> tuple[Any, Any]:
        return self._planned, self._actions


@pytest.mark.parametrize("optimism", [1.0, 0.5])
def test_promises_are_kept_by_plans_whose_states_are_right(optimism: float) -> None:
    starts = [0, 1, 2]
    agent: Any = Clairvoyant(starts, optimism)
    found = promises(agent, PENDULUM, starts)
    promised, executed = (np.array(found[f"{name}_peak"]) for name in ("promised", "executed"))
    np.testing.assert_allclose(promised, optimism * executed, atol=2e-4)
    gap = np.array(found["promised_return"]) - np.array(found["executed_return"])
    assert (np.abs(gap) < 1e-3).all() if optimism == 1 else (gap > 0).all()
