"""What studies measure: functions of an agent and the seeds of its starts.

Each returns JSON values, one entry for every trial unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from mpd_gym.agents.base import Agent
from mpd_gym.envs.lqr import transition
from mpd_gym.envs.pendulum_model import reward
from mpd_gym.evaluation.returns import Evaluation, evaluate, execute_plans, stacked
from mpd_gym.types import Array

__all__ = [
    "Measure",
    "arrived",
    "calibration",
    "clocked",
    "episodes",
    "error_series",
    "free",
    "mean_error",
    "open_loop",
    "parked",
    "regulation",
    "state_error",
]

Measure = Callable[..., dict[str, Any]]
"""``measure(agent, env_id, starts, **arguments)``, a function at the top of a module."""

AT_ONCE = 50  # episodes that share a network call, where there are many candidates
POSITION = (0, 1)  # columns of a car's position
REACH = 1.0  # metres from the goal that count as there


def episodes(
    agent: Agent[Any],
    env_id: str,
    starts: Sequence[int],
    *,
    env_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Whole episodes in closed loop.

    Args:
        agent: The agent.
        env_id: Its environment.
        starts: Seeds of the starts.
        env_kwargs: Constants of the environment that differ from the usual ones.

    Returns:
        ``return``; ``success``, ``cost`` and ``collision`` where the environment tells them.
    """
    at_once = len(starts) if agent.options.num_candidates == 1 else AT_ONCE
    return _outcomes(evaluate(agent, env_id, seeds=starts, num_envs=at_once, env_kwargs=env_kwargs))


def clocked(agent: Agent[Any], env_id: str, starts: Sequence[int]) -> dict[str, Any]:
    """Episodes of one environment after the other, with the time that each action takes.

    Nothing else should run on the machine.

    Returns:
        As `episodes`, and ``milliseconds`` of each episode: mean over its actions.
    """
    agent.predict(agent.observation_space.sample())  # what is made once, is made before
    played = evaluate(agent, env_id, seeds=starts)
    each = np.split(1e3 * played.seconds, np.cumsum(played.lengths)[:-1])
    times = [round(float(part.mean()), 4) for part in each]
    return {**_outcomes(played), "milliseconds": times}


def regulation(agent: Agent[Any], env_id: str, starts: Sequence[int]) -> dict[str, Any]:
    """Costs of linear-quadratic control in closed loop, and errors of the first plans.

    Returns:
        ``costs`` and ``optimal_costs`` of each trial. For each step of the plan, mean distance over
        the trials: ``state_error`` between planned states and those that the planned actions lead
        to; ``planned_error`` and ``simulated_error`` of both to the states under the optimal gain
        (paper, Fig. 12).
    """
    env: Any = gym.make(env_id).unwrapped
    initial = np.stack([env.reset(seed=start)[0] for start in starts])
    played = evaluate(agent, env_id, seeds=starts, num_envs=len(starts))
    _, state = agent.predict(initial)
    planned, actions = agent.planned(state)
    simulated = _simulated(initial, actions, env.problem)
    optimal = _optimal(initial, planned.shape[1], env)
    pairs = {
        "state_error": (planned, simulated),
        "planned_error": (planned, optimal),
        "simulated_error": (simulated, optimal),
    }
    return {
        "costs": _rounded(-played.returns, 6),
        "optimal_costs": _rounded(env.optimal_cost(initial), 6),
        **{
            name: _rounded(np.linalg.norm(first - second, axis=-1).mean(axis=0), 6)
            for name, (first, second) in pairs.items()
        },
    }


def open_loop(
    agent: Agent[Any],
    env_id: str,
    starts: Sequence[int],
    *,
    env_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One plan from each start, all of whose actions are executed without looking, in the car.

    Arguments are those of `episodes`.

    Returns:
        ``final_error``: distance to the goal at the end in m; ``collision``: whether a wall was
        touched; ``planned_error``: distance of the planned end to the goal; and ``state_error``,
        per step the distance in m between planned and executed position, mean over the trials that
        got so far, None where none did.
    """
    env = gym.make(env_id, **(env_kwargs or {}))
    batch = stacked([env.reset(seed=start)[0] for start in starts])
    _, state = agent.predict(batch)
    planned, actions = agent.planned(state)
    rollouts = execute_plans(list(actions), env_id, seeds=starts, env_kwargs=env_kwargs)
    errors = [
        state_error(plan, rollout.observations[1:], POSITION)
        for plan, rollout in zip(planned, rollouts, strict=True)
    ]
    ends = np.stack([rollout.observations[-1, list(POSITION)] for rollout in rollouts])
    goals = batch["desired_goal"]
    return {
        "final_error": _rounded(np.linalg.norm(ends - goals, axis=-1)),
        "collision": [
            any(bool(info["collision"]) for info in rollout.infos) for rollout in rollouts
        ],
        "planned_error": _rounded(np.linalg.norm(planned[:, -1, list(POSITION)] - goals, axis=-1)),
        "state_error": _known_means(np.stack(errors)),
    }


def calibration(agent: Agent[Any], env_id: str, starts: Sequence[int]) -> dict[str, Any]:
    """What one plan from each start of the pendulum promises, and what its actions lead to.

    Returns:
        ``promised_peak`` and ``executed_peak``: the highest speed in rad/s; ``promised_return`` and
        ``executed_return``: of the plan's steps, by the environment's own reward.
    """
    env = gym.make(env_id)
    initial = np.stack([env.reset(seed=start)[0] for start in starts])
    _, state = agent.predict(initial)
    planned, actions = agent.planned(state)
    rollouts = execute_plans(list(actions), env_id, seeds=starts)
    before = np.concatenate([initial[:, None], planned[:, :-1]], axis=1)
    angles = np.arctan2(before[..., 1], before[..., 0])
    rewards = reward(np.stack([angles, before[..., 2]], axis=-1), actions)
    return {
        "promised_peak": _rounded(np.abs(planned[..., 2]).max(axis=1)),
        "executed_peak": _rounded(
            np.array([np.abs(one.observations[1:, 2]).max() for one in rollouts])
        ),
        "promised_return": _rounded(rewards.sum(axis=1)),
        "executed_return": _rounded(np.array([one.rewards.sum() for one in rollouts])),
    }


def state_error(planned: Array, executed: Array, dims: Sequence[int] | None = None) -> Array:
    """Euclidean distance between planned and executed states, step by step (paper, Fig. 2 and 4).

    Args:
        planned: x_1 … x_H, ``[H, nx]``.
        executed: x_1 … x_t, ``[t, nx]``, t <= H.
        dims: State dimensions to compare; all by default.

    Returns:
        ``[H]``, NaN after the executed part.
    """
    error = np.full(len(planned), np.nan)
    gap = planned[: len(executed)] - executed
    error[: len(gap)] = np.linalg.norm(gap if dims is None else gap[:, list(dims)], axis=-1)
    return error


def arrived(cell: Mapping[str, Any]) -> Array:
    """Whether the car of each trial of `open_loop` ended at the goal (paper, appendix C)."""
    near: Array = np.array(cell["final_error"]) < REACH
    return near


def free(cell: Mapping[str, Any]) -> Array:
    """Whether each trial ended at the goal and touched no wall."""
    untouched: Array = ~np.array(cell["collision"])
    return arrived(cell) & untouched


def parked(cell: Mapping[str, Any]) -> Array:
    """Whether the car of each of `episodes` ended at the goal and touched no wall."""
    untouched: Array = ~np.array(cell["collision"])
    return np.array(cell["success"]) & untouched


def mean_error(cell: Mapping[str, Any]) -> float:
    """Distance between planned and executed position in m, mean over the steps."""
    return float(np.nanmean(np.array(cell["state_error"], float)))


def error_series(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    """Distance between plan and execution for each step in m, mean over cells of `open_loop`.

    NaN where no car got so far.
    """
    values = np.array([cell["state_error"] for cell in cells], float)
    return [np.nan if row is None else row for row in _known_means(values)]


def _outcomes(played: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {"return": _rounded(played.returns)}
    if played.successes is not None:
        found["success"] = played.successes.tolist()
    if played.costs is not None:
        found["cost"] = played.costs.tolist()
    if played.collisions is not None:
        found["collision"] = played.collisions.tolist()
    return found


def _simulated(states: Array, actions: Array, problem: Any) -> Array:
    """States x_1 … x_H ``[E, H, nx]`` that actions ``[E, H, nu]`` really lead to."""
    rows = []
    for step in range(actions.shape[1]):
        states = transition(states, actions[:, step], problem.A, problem.B)
        rows.append(states)
    return np.stack(rows, axis=1)


def _optimal(states: Array, horizon: int, env: Any) -> Array:
    """States x_1 … x_H under the optimal gain."""
    rows = []
    for _ in range(horizon):
        actions = states @ env.optimal_gain.T
        states = transition(states, actions, env.problem.A, env.problem.B)
        rows.append(states)
    return np.stack(rows, axis=1)


def _known_means(values: Array) -> list[float | None]:
    """Means of columns over the rows that are finite there."""
    columns = (column[np.isfinite(column)] for column in values.T)
    return [round(float(column.mean()), 4) if len(column) else None for column in columns]


def _rounded(values: Array, digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]
