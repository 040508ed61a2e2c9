"""Rankers: choose one of N candidate plans. NumPy only, in the environment's units.

A candidate with a non-finite observation, action, return, cost or score never wins; without a
finite candidate there is no plan. Ties go to the lowest index. `highest_return`, `within_budget`
and `first` are rankers; `nearest_goal` and `custom` make one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, final

import numpy as np

from mpd_gym.boundary import as_numbers, copied, returned
from mpd_gym.errors import InputError, PlanningError, check_choice
from mpd_gym.types import Array, BoolArray, Ranker, Ranking

__all__ = [
    "RANKERS",
    "custom",
    "first",
    "highest_return",
    "nearest_goal",
    "ranked",
    "within_budget",
]


@final
@dataclass(frozen=True)
class _Candidates:
    """Arguments of a `Ranker`, validated."""

    observations: Array
    actions: Array
    returns: Array | None
    costs: Array | None
    goal: Array | None
    budget: float | None

    def __post_init__(self) -> None:
        shape = np.shape(self.actions)
        if len(shape) != 3 or shape[0] < 1:
            raise InputError(f"actions: expected shape [N, H, nu], N >= 1; got {list(shape)}")
        found = np.shape(self.observations)
        if len(found) != 3 or found[:2] != (shape[0], shape[1] + 1):
            raise InputError(
                f"observations: expected shape [{shape[0]}, {shape[1] + 1}, nx], x_0 … x_H; "
                f"got {list(found)}"
            )
        for name in ("returns", "costs"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape[:1]:
                raise InputError(
                    f"{name}: expected shape [{shape[0]}]; got {list(np.shape(value))}"
                )
        if self.budget is not None and np.isnan(self.budget):
            raise InputError("budget: expected a number or None; got NaN")

    def needed(self, name: str) -> Array:
        """Return an argument that this ranker needs."""
        value = getattr(self, name)
        if value is None:
            raise InputError(f"{name}: this ranker needs them; got None")
        array: Array = value
        return array

    def finite(self, scores: Array) -> BoolArray:
        """Whether everything known about a candidate is finite, ``[N]``."""
        finite = np.ones(len(scores), bool)
        for value in (self.observations, self.actions, self.returns, self.costs, scores):
            if value is not None:
                finite &= np.isfinite(value).reshape(len(scores), -1).all(axis=1)
        return finite

    def feasible(self) -> BoolArray:
        """Whether the cost keeps the budget, ``[N]``; all True without a budget or costs."""
        if self.budget is None or self.costs is None:
            return np.ones(len(self.actions), bool)
        return np.isfinite(self.costs) & (np.asarray(self.costs) <= self.budget)

    def choose(self, scores: Array, eligible: BoolArray | None = None) -> Ranking:
        """Rank by `scores` ``[N]``; only `eligible` candidates win, if given."""
        finite = self.finite(scores)
        if not finite.any():
            raise PlanningError(
                f"none of the {len(scores)} candidate plans is finite; check the observation, the "
                "weights, and the reward, cost or ranking function"
            )
        usable = finite if eligible is None else finite & eligible
        chosen = int(np.argmax(np.where(usable, scores, -np.inf)))
        return Ranking(np.where(finite, scores, -np.inf), self.feasible(), chosen)


def _ranker(rank: Callable[[_Candidates], Ranking]) -> Ranker:
    """Give a function of candidates the signature of a `Ranker`."""

    @functools.wraps(rank)
    def ranker(
        observations: Array,
        actions: Array,
        *,
        returns: Array | None = None,
        costs: Array | None = None,
        budget: float | None = None,
        goal: Array | None = None,
    ) -> Ranking:
        fields: list[Any] = [
            None if value is None else np.asarray(value)
            for value in (observations, actions, returns, costs, goal)
        ]
        fields.append(budget)
        return rank(_Candidates(*fields))

    return ranker


@_ranker
def highest_return(candidates: _Candidates) -> Ranking:
    """Choose the highest predicted return, at any cost. Scores are the returns.

    Raises:
        InputError: If a shape is wrong or `returns` missing.
        PlanningError: If no candidate is finite.
    """
    return candidates.choose(candidates.needed("returns"))


@_ranker
def within_budget(candidates: _Candidates) -> Ranking:
    """Choose the highest return within the budget, else the least cost (Algorithm 2).

    Scores are the returns, or the negative costs if no finite candidate keeps the budget. Without a
    budget every candidate is feasible.

    Raises:
        InputError: If a shape is wrong, `returns` missing, or `costs` with a budget.
        PlanningError: If no candidate is finite.
    """
    returns = candidates.needed("returns")
    if candidates.budget is None:
        return candidates.choose(returns)
    costs = candidates.needed("costs")
    feasible = candidates.feasible()
    if (feasible & candidates.finite(returns)).any():
        return candidates.choose(returns, feasible)
    return candidates.choose(-costs)


@_ranker
def first(candidates: _Candidates) -> Ranking:
    """Choose the first finite candidate, without ranking. Scores are 0.

    Raises:
        InputError: If a shape is wrong.
        PlanningError: If no candidate is finite.
    """
    return candidates.choose(np.zeros(len(candidates.actions)))


def nearest_goal(dims: Sequence[int] | None = None, when: str = "final") -> Ranker:
    """Make a ranker that chooses the plan that ends, or comes, nearest to the goal.

    Scores are the negative Euclidean distances between `dims` of the predicted observations and the
    goal. The ranker raises `InputError` if the goal is missing or has another size than `dims`.

    Args:
        dims: Columns of the observation that the goal describes; None for the first ones.
        when: ``"final"`` for the distance at x_H, ``"closest"`` for the least over x_1 … x_H.

    Raises:
        ConfigError: If `when` is unknown.
    """
    check_choice("when", when, ("closest", "final"))

    @_ranker
    def nearest(candidates: _Candidates) -> Ranking:
        goal = candidates.needed("goal")
        columns = list(range(goal.size)) if dims is None else list(dims)
        size = candidates.observations.shape[-1]
        if goal.shape != (len(columns),) or not all(-size <= dim < size for dim in columns):
            raise InputError(
                f"goal: expected one entry for each of the columns {columns} of {size}; "
                f"got shape {list(goal.shape)}"
            )
        if not np.isfinite(goal).all():
            raise InputError(f"goal: expected finite numbers; got {goal}")
        reached = candidates.observations[:, 1:, columns]
        with np.errstate(over="ignore"):  # absurd plans are at distance inf and lose
            distances = np.linalg.norm(reached - goal, axis=-1)  # [N, H]
        return candidates.choose(-(distances[:, -1] if when == "final" else distances.min(axis=1)))

    return nearest


def custom(score: Callable[[Array, Array], Array]) -> Ranker:
    """Make a ranker from a scoring function.

    Args:
        score: ``score(observations [N, H + 1, nx], actions [N, H, nu]) -> [N]``, higher is better.
            The ranker raises `InputError` if it returns another shape.
    """

    @_ranker
    def scored(candidates: _Candidates) -> Ranking:
        plans, size = (candidates.observations, candidates.actions), len(candidates.actions)
        return candidates.choose(returned("ranking function", score, *plans, shape=(size,)))

    return scored


def ranked(own: Ranker, observations: Array, actions: Array, **known: Any) -> Ranking:
    """Call a caller's ranker with copies, and check and copy its answer.

    Raises:
        InputError: If it is no `Ranking`, of another shape, holds NaN, or chooses what is no
            candidate or not finite.
    """
    found: Any = own(observations.copy(), actions.copy(), **copied(known))
    if not isinstance(found, Ranking):
        raise InputError(f"ranker: expected a mpd_gym.types.Ranking, got {type(found).__name__}")
    size, chosen = len(actions), found.chosen
    scores = as_numbers("ranker: scores", found.scores).astype(float)
    feasible = as_numbers("ranker: feasible", found.feasible).astype(bool)
    if scores.shape != (size,) or feasible.shape != (size,) or np.isnan(scores).any():
        raise InputError(
            f"ranker: expected scores, without NaN, and feasible of shape ({size},), got {found}"
        )
    whole = isinstance(chosen, Integral) and not isinstance(chosen, bool)
    if not whole or not 0 <= chosen < size:
        raise InputError(f"ranker: expected an integer from 0 to {size - 1} as chosen, got {found}")
    if not (np.isfinite(observations[chosen]).all() and np.isfinite(actions[chosen]).all()):
        raise InputError(f"ranker: chose plan {chosen}, which is not finite; choose another")
    return Ranking(scores, feasible, int(chosen))


RANKERS: dict[str, Ranker] = {
    "first": first,
    "highest_return": highest_return,
    "nearest_goal": nearest_goal(),
    "within_budget": within_budget,
}
