"""Studies in miniature: they train, measure, go on where they were, and share what they train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from mpd_gym import load_agent
from mpd_gym.envs.pendulum_model import observation, transition
from studies import (
    car_off_data,
    combined_score,
    lqr_compositions,
    lqr_steps,
    mismatch,
    pendulum_ranking,
    variants,
)
from studies.measures import calibration, episodes, open_loop, parked, state_error
from studies.peers import ALONE, BC, OURS
from studies.tests.miniature import run_mini

PENDULUM = "ConstrainedPendulum-v0"
LQR = replace(
    variants.LQR_NOISY, options={"num_steps": 1, "action_chunk": 15, "guidance_scale": 1.0}
)

pytestmark = [
    pytest.mark.usefixtures("made_up_data"),
    pytest.mark.filterwarnings("ignore:.*is padding:UserWarning"),  # made-up episodes are short
]


def test_the_state_error_is_a_distance_for_each_step() -> None:
    executed = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(state_error(executed, executed), np.zeros(10))
    short = state_error(executed + np.array([0.3, 0.4]), executed[:4])
    np.testing.assert_allclose(short[:4], 0.5)
    assert np.isnan(short[4:]).all()
    np.testing.assert_allclose(state_error(executed + np.array([0.3, 0.4]), executed, [1]), 0.4)


def networks(cells: dict[str, dict[str, Any]]) -> set[str]:
    return {cell["of"]["network"] for cell in cells.values()}


def weights(folder: Path, cells: dict[str, dict[str, Any]], key: str, role: str) -> Any:
    name = next(cell["of"]["network"] for one, cell in cells.items() if one.startswith(key))
    agent = load_agent(folder / "agents" / f"{name}.safetensors", "cpu")
    return next(agent.models[role].parameters())


def test_an_interrupted_study_keeps_what_it_measured_and_another_takes_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lqr_compositions, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(lqr_compositions, "PERCENTS", (10,))
    options = {"num_steps": 1, "action_chunk": 16, "guidance_scale": 1.0}
    monkeypatch.setattr(lqr_compositions, "OPTIONS", options)
    monkeypatch.setattr(lqr_steps, "STEPS", (2,))
    monkeypatch.setattr(lqr_steps, "SAMPLERS", ("ddpm",))
    _, cells = run_mini("lqr-compositions", tmp_path)
    agents = sorted(path.name for path in (tmp_path / "agents").glob("*.safetensors"))
    assert len(agents) == 1
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


def test_options_are_searched_on_validation_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(combined_score, "WEIGHTS", (0.25, 1.0))
    monkeypatch.setattr(combined_score, "TESTBEDS", (LQR,))
    page, cells = run_mini("combined-score", tmp_path)
    searched = [cell for key, cell in cells.items() if key.startswith("validation")]
    assert [cell["of"]["starts"][0] for cell in searched] == [100_000] * 2
    assert len(cells) == 2 + 3 and len(networks(cells)) == 1
    assert "dynamics_weight" in page


def test_a_new_dynamics_model_stands_beside_the_same_planner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(mismatch, "LQR", replace(LQR, title="LQR-v0", data=()))
    car = replace(variants.FEW_DRIVES, options={"num_steps": 1, "num_candidates": 1})
    monkeypatch.setattr(mismatch, "FEW_DRIVES", car)
    _, cells = run_mini("mismatch", tmp_path)
    assert len(networks(cells)) == 4 + 3
    planner, dynamics = (
        [
            weights(tmp_path, cells, f"LQR-v0, {name}", role)
            for name in (mismatch.GOOD, mismatch.MIXED)
        ]
        for role in ("planner", "dynamics")
    )
    assert planner[0].equal(planner[1]) and not dynamics[0].equal(dynamics[1])


def test_changed_environments_and_actions_read_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"num_steps": 1, "action_chunk": 15, "warm_start_steps": 0}
    series = tuple(
        one._replace(
            values=(0.4, 0.55) if "aslant" in one.title else (0.85, 1.15),
            options=short if one.options else {"num_steps": 1},
        )
        for one in car_off_data.SERIES
    )
    monkeypatch.setattr(car_off_data, "SERIES", series)
    names = (ALONE, OURS, BC)
    kept = {name: car_off_data.ENTRANTS[name] for name in names}
    monkeypatch.setattr(car_off_data, "ENTRANTS", kept)
    monkeypatch.setattr(car_off_data, "DRAWN", names)
    monkeypatch.setattr(car_off_data, "PAIRS", (names[1::-1],))
    _, cells = run_mini("car-off-data", tmp_path)
    assert len(networks(cells)) == 2
    assert len(cells) == 2 * (3 * 2 * 2 + 2)
    kinds = {json.dumps(cell["of"]["env_kwargs"]) for cell in cells.values()}
    assert kinds == {
        json.dumps({key: value})
        for key, values in (("heading_noise", (0.4, 0.55)), ("wheelbase", (0.85, 1.15)))
        for value in values
    }


def test_episodes_are_spread_over_the_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pendulum_ranking, "CANDIDATES", (1,))
    monkeypatch.setattr(pendulum_ranking, "OPTIONS", {"num_steps": 1, "action_chunk": 16})
    monkeypatch.setattr(pendulum_ranking, "TUNED_AT", 1)
    monkeypatch.setattr(pendulum_ranking, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(pendulum_ranking, "GUIDANCES", (1.0,))
    monkeypatch.setattr(pendulum_ranking, "OFTEN", {1: pendulum_ranking.OFTEN[1][:2]})
    monkeypatch.setattr(pendulum_ranking, "TIMES", 2)
    _, cells = run_mini("pendulum-ranking", tmp_path, (4, 5), trials=3)
    spread = {tuple(cell["of"]["starts"]) for key, cell in cells.items() if "N=" in key}
    assert spread == {(0, 2), (2, 3), (0, 6)}  # three in all, spread over the seeds; or twice each
    assert any(cell["of"].get("method") == "safediffuser" for cell in cells.values())


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
def test_plans_whose_states_are_right_keep_their_promises(optimism: float) -> None:
    starts = [0, 1, 2]
    agent: Any = Clairvoyant(starts, optimism)
    found = calibration(agent, PENDULUM, starts)
    promised, executed = (np.array(found[f"{name}_peak"]) for name in ("promised", "executed"))
    np.testing.assert_allclose(promised, optimism * executed, atol=2e-4)
    gap = np.array(found["promised_return"]) - np.array(found["executed_return"])
    assert (np.abs(gap) < 1e-3).all() if optimism == 1 else (gap > 0).all()
