"""Open-loop error: the gap between a plan and its execution without new observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpd_gym.boundary import check_spaces
from mpd_gym.envs.checks import make_env
from mpd_gym.errors import InputError
from mpd_gym.evaluation.returns import execute_plans, stacked
from mpd_gym.types import Array

__all__ = ["OpenLoopErrors", "error_rows", "open_loop_error"]


@dataclass(frozen=True)
class OpenLoopErrors:
    """Planned minus executed states of one agent's plans.

    Attributes:
        seeds: ``[E]``, seed of the reset before each plan.
        gaps: ``[E, H, nx]``, x̂_1 − x_1 … x̂_H − x_H in the environment's units; NaN after the end
            of an episode.
        scale: ``[nx]``, standard deviation of each state dimension over all executed steps.
    """

    seeds: Array
    gaps: Array
    scale: Array

    @property
    def relative(self) -> Array:
        """Root mean square of the gaps over dimensions, in units of `scale`, ``[E, H]``."""
        root: Array = np.sqrt(np.mean((self.gaps / self.scale) ** 2, axis=-1))
        return root

    def good_for(self, tolerance: float = 0.1, share: float = 0.95) -> int:
        """Return the number of steps for which plans hold, a bound for `action_chunk`.

        Args:
            tolerance: Largest good `relative` error.
            share: Share of the plans that must be good at every step so far.
        """
        good = (self.relative <= tolerance) | np.isnan(self.relative)
        enough = np.logical_and.accumulate(good, axis=1).mean(axis=0) >= share
        return int(np.logical_and.accumulate(enough).sum())


def open_loop_error(
    agents: Mapping[str, Any],
    env_id: str,
    *,
    seeds: Sequence[int],
    env_kwargs: Mapping[str, Any] | None = None,
    deterministic: bool = False,
) -> dict[str, OpenLoopErrors]:
    """Plan once from each start, execute all actions of the plan, and compare (paper, Fig. 2).

    Args:
        agents: Agents by label, with `predict` and `planned`.
        env_id: Registered id; the agents plan its observations.
        seeds: Seed of the reset before each plan.
        env_kwargs: Keyword arguments of the environment.
        deterministic: Passed to `predict`.

    Returns:
        Errors of each agent, with one common `scale`.

    Raises:
        ConfigError: If an agent's spaces differ from the environment's.
        InputError: If there is no seed, or an agent does not plan the environment's observations.
    """
    if not len(seeds):
        raise InputError("seeds: expected at least one, got none")
    for label, agent in agents.items():
        if not hasattr(agent, "planned"):
            raise InputError(f"{label}: makes no plans; give an agent of this package")
    env = make_env(env_id, env_kwargs)
    for label, agent in agents.items():
        check_spaces(agent, env, label)
    starts = stacked([env.reset(seed=int(seed))[0] for seed in seeds])
    env.close()
    gaps: dict[str, Array] = {}
    visited: list[Array] = []
    for label, agent in agents.items():
        _, state = agent.predict(starts, deterministic=deterministic)
        planned, actions = agent.planned(state)
        rollouts = execute_plans(list(actions), env_id, seeds=seeds, env_kwargs=env_kwargs)
        executed = [rollout.observations for rollout in rollouts]
        if executed[0].shape[-1] != planned.shape[-1]:
            raise InputError(
                f"{label}: plans states of {planned.shape[-1]} numbers, {env_id} shows "
                f"{executed[0].shape[-1]}: use the environment whose observations it plans; for "
                "agents of ImagePendulum-v0 this is LatentPendulum-v0"
            )
        visited += executed
        gaps[label] = np.full(planned.shape, np.nan)
        for row, plan, states in zip(gaps[label], planned, executed, strict=True):
            row[: len(states) - 1] = plan[: len(states) - 1] - states[1:]
    spread = np.concatenate(visited).std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    return {label: OpenLoopErrors(np.asarray(seeds), gap, scale) for label, gap in gaps.items()}


def error_rows(found: Mapping[str, OpenLoopErrors]) -> list[dict[str, Any]]:
    """Mean, median and 95th percentile of the absolute gaps, in the environment's units.

    Args:
        found: Result of `open_loop_error`.

    Returns:
        One row for each agent, step and state dimension.
    """
    rows = []
    for label, errors in found.items():
        for step, gaps in enumerate(np.abs(errors.gaps).swapaxes(0, 1), 1):
            known = gaps[np.isfinite(gaps).all(axis=-1)]
            for dimension, values in enumerate(known.T if len(known) else ()):
                middle, high = np.percentile(values, (50, 95))
                place = {"policy": label, "step": step, "dimension": dimension}
                sizes = {"mean": values.mean(), "median": middle, "p95": high}
                rows.append({**place, "plans": len(values), **sizes})
    return rows
