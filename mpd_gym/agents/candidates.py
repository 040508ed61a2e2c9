"""Sampled candidates, and which of them each environment executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from mpd_gym.rankers import RANKERS
from mpd_gym.types import Array, Ranker, Ranking

__all__ = ["Candidates", "rank"]


@final
@dataclass(frozen=True)
class Candidates:
    """N sampled candidates for each of E environments, in environment units unless stated.

    Attributes:
        trajectories: What was sampled, normalised, ``[E, N, L, D]``.
        observations: x_0 … x_H, ``[E, N, H + 1, nx]``.
        actions: u_0 … u_{H-1}, ``[E, N, H, nu]``.
        returns: Predicted returns, ``[E, N]``; None where none are predicted.
        costs: Predicted costs, ``[E, N]``; None where none are predicted.
        rankings: One for each environment.
        seconds: Wall-clock time of the parts.
    """

    trajectories: Array
    observations: Array
    actions: Array
    returns: Array | None
    costs: Array | None
    rankings: list[Ranking]
    seconds: dict[str, float]


def rank(
    found: Candidates, budgets: Array, goals: Array | None, name: str | None, own: Ranker | None
) -> list[Ranking]:
    """Rank the candidates of every environment.

    Args:
        found: Candidates, not ranked yet.
        budgets: Remaining budgets, ``[E]``; infinite without one.
        goals: Goals, ``[E, ng]``, or None.
        name: A key of `RANKERS`; None takes what suits what is known.
        own: The caller's ranker, which goes before `name`.

    Raises:
        PlanningError: If no candidate of an environment is finite.
    """
    rankings = []
    for row, budget in enumerate(budgets):
        returns, costs, goal = (
            None if values is None else values[row]
            for values in (found.returns, found.costs, goals)
        )
        limit = float(budget) if costs is not None and np.isfinite(budget) else None
        ranker = own or RANKERS[name or _usual_ranker(returns, limit, goal)]
        rankings.append(
            ranker(
                found.observations[row],
                found.actions[row],
                returns=returns,
                costs=costs,
                budget=limit,
                goal=goal,
            )
        )
    return rankings


def _usual_ranker(returns: Array | None, budget: float | None, goal: Array | None) -> str:
    """Ranker for what is known, where the options name none."""
    if returns is not None:
        return "highest_return" if budget is None else "within_budget"
    return "first" if goal is None else "nearest_goal"
