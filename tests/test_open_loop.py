"""Plans against what happens when they are executed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import mpd_gym  # noqa: F401 - registers the environments
from mpd_gym.envs.lqr import transition
from mpd_gym.errors import InputError
from mpd_gym.evaluation.figures import open_loop_table
from mpd_gym.evaluation.open_loop import OpenLoopErrors, error_rows, open_loop_error
from mpd_gym.types import Array

HORIZON = 8
SEEDS = range(5)


class Foresight:
    """Drives LQR-v0 by its optimal gain and knows what comes, but for an error that is put in."""

    def __init__(self, error: Array | float = 0.0) -> None:
        self.error = error
        self.env: Any = gym.make("LQR-v0").unwrapped

    def predict(self, observation: Array, **_: Any) -> tuple[Array, Any]:
        problem = self.env.problem
        states, actions = [np.asarray(observation, float)], []
        for _ in range(HORIZON):
            actions.append(states[-1] @ self.env.optimal_gain.T)
            states.append(transition(states[-1], actions[-1], problem.A, problem.B))
        plan = np.stack(states[1:], axis=1) + self.error, np.stack(actions, axis=1)
        return plan[1][:, 0], SimpleNamespace(plan=plan)

    def planned(self, state: Any) -> tuple[Array, Array]:
        return state.plan


def test_what_is_known_is_executed_as_planned_and_an_error_is_found() -> None:
    error = np.zeros((HORIZON, 2))
    error[5:, 1] = 0.25
    agents = {"exact": Foresight(), "off": Foresight(error)}
    found = open_loop_error(agents, "LQR-v0", seeds=SEEDS)
    np.testing.assert_allclose(found["exact"].gaps, 0, atol=1e-6)
    np.testing.assert_allclose(found["off"].gaps, np.tile(error, (len(SEEDS), 1, 1)), atol=1e-6)
    np.testing.assert_array_equal(found["exact"].scale, found["off"].scale)
    relative = found["off"].relative
    assert relative[:, 5:] == pytest.approx(0.25 / found["off"].scale[1] / np.sqrt(2), rel=1e-3)
    assert (found["exact"].good_for(), found["off"].good_for(1e-4)) == (HORIZON, 5)
    rows = error_rows(found)
    assert len(rows) == 2 * HORIZON * 2
    (row,) = (r for r in rows if (r["policy"], r["step"], r["dimension"]) == ("off", 6, 1))
    assert (row["mean"], row["p95"], row["plans"]) == pytest.approx((0.25, 0.25, 5), abs=1e-6)
    table = open_loop_table("LQR-v0", found)
    assert [column.header for column in table.columns][1:] == [
        "step 1", "step 2", "step 4", "step 8", "good for",
    ]  # fmt: skip


def test_plans_count_as_long_as_they_are_executed_and_most_must_be_good() -> None:
    gaps = np.zeros((20, 3, 1))
    gaps[0, 1] = 9.0  # one of twenty
    gaps[1:3, 2] = 9.0  # with the first, three of twenty
    gaps[3, 1:] = np.nan
    errors = OpenLoopErrors(np.arange(20), gaps, np.ones(1))
    assert errors.good_for() == 2
    assert errors.good_for(share=0.8) == 3
    assert errors.good_for(share=1.0) == 1
    assert [row["plans"] for row in error_rows({"one": errors})] == [20, 19, 19]


def test_an_episode_that_ends_leaves_the_rest_unknown() -> None:
    class IntoTheWall:
        def predict(self, observation: Any, **_: Any) -> tuple[Any, Any]:
            return None, None

        def planned(self, state: Any) -> tuple[Array, Array]:
            return np.zeros((2, 40, 5)), np.tile([3.0, 0.0], (2, 40, 1)).astype(np.float32)

    found = open_loop_error({"blind": IntoTheWall()}, "CarUMaze-v0", seeds=(0, 1))["blind"]
    known = np.isfinite(found.gaps).all(axis=-1)
    assert known[:, 0].all() and not known[:, -1].any()
    assert (np.diff(known.astype(int), axis=1) <= 0).all()


def test_what_makes_no_plans_of_these_states_is_refused() -> None:
    with pytest.raises(InputError, match="sac: makes no plans"):
        open_loop_error({"sac": SimpleNamespace()}, "LQR-v0", seeds=SEEDS)
    with pytest.raises(InputError, match="seeds"):
        open_loop_error({"one": Foresight()}, "LQR-v0", seeds=())

    class Latents(Foresight):
        def planned(self, state: Any) -> tuple[Array, Array]:
            return np.zeros((len(SEEDS), HORIZON, 3)), state.plan[1]

    with pytest.raises(InputError, match="plans states of 3 numbers, LQR-v0 shows 2"):
        open_loop_error({"latents": Latents()}, "LQR-v0", seeds=SEEDS)
