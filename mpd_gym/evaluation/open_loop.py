"""How far what happens is from what was planned, when whole plans are executed without looking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from mpd_gym.errors import InputError
from mpd_gym.evaluation.returns import execute_plans, stacked
from mpd_gym.types import Array

__all__ = ["PlanErrors", "error_rows", "open_loop_error"]


@dataclass(frozen=True)
class PlanErrors:
    """Planned minus executed states of one agent's plans.

    Attributes:
        seeds: ``[E]``, of the reset that each plan begins with.
        gaps: ``[E, H, nx]``, x̂_1 − x_1 … x̂_H − x_H in the environment's units; NaN after an
            episode ended.
        scale: ``[nx]``, standard deviation of each state dimension over all executed steps.
    """

    seeds: Array
    gaps: Array
    scale: Array

    @property
    def relative(self) -> Array:
        """Root mean square over the dimensions of the gaps in units of `scale`, ``[E, H]``."""
        root: Array = np.sqrt(np.mean((self.gaps / self.scale) ** 2, axis=-1))
        return root

    def good_for(self, tolerance: float = 0.1, share: float = 0.95) -> int:
        """Steps for which plans can be trusted: a bound for `action_chunk`.

        Args:
            tolerance: Largest `relative` error that counts as good.
            share: Of the plans that must be good at every step so far.
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
) -> dict[str, PlanErrors]:
    """Plan once from each start, execute all actions of the plan, and compare (paper, Fig. 2).

    Args:
        agents: By label; anything with `predict` and `planned`.
        env_id: Registered id, whose state is what the agents plan.
        seeds: One for each plan, of the environment's reset.
        env_kwargs: Keyword arguments of the environment.
        deterministic: Passed to `predict`.

    Returns:
        What was found for each agent, all in units of one `scale`.

    Raises:
        InputError: If there is no seed, or an agent makes no plans of what the environment shows.
    """
    if not len(seeds):
        raise InputError("seeds: expected at least one, got none")
    for label, agent in agents.items():
        if not hasattr(agent, "planned"):
            raise InputError(f"{label}: makes no plans; give an agent of this package")
    env = gym.make(env_id, **(env_kwargs or {}))
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
                f"{executed[0].shape[-1]}: take the environment that shows what is planned; for "
                "agents of ImagePendulum-v0 that is LatentPendulum-v0"
            )
        visited += executed
        gaps[label] = np.full(planned.shape, np.nan)
        for row, plan, states in zip(gaps[label], planned, executed, strict=True):
            row[: len(states) - 1] = plan[: len(states) - 1] - states[1:]
    spread = np.concatenate(visited).std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    return {label: PlanErrors(np.asarray(seeds), gap, scale) for label, gap in gaps.items()}


def error_rows(found: Mapping[str, PlanErrors]) -> list[dict[str, Any]]:
    """Mean, median and 95th percentile of the absolute gaps, in the environment's units.

    Args:
        found: Of `open_loop_error`.

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
