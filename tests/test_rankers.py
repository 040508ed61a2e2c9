from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpd_gym.errors import ConfigError, InputError, PlanningError
from mpd_gym.rankers import (
    RANKERS,
    custom,
    first,
    highest_return,
    nearest_goal,
    within_budget,
)
from mpd_gym.types import Array, Ranker

H, NX, NU = 3, 2, 1
# few different values, so that ties are common
VALUES = st.one_of(
    st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.sampled_from([np.nan, np.inf, -np.inf])
)


@st.composite
def candidates(draw: st.DrawFn) -> dict[str, Any]:
    """Plans, returns and costs, any of which may be non-finite."""
    size = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    observations = rng.integers(-2, 3, (size, H + 1, NX)).astype(float)
    actions = rng.integers(-2, 3, (size, H, NU)).astype(float)
    for array in (observations, actions):
        for _ in range(draw(st.integers(0, 1))):
            index = tuple(draw(st.integers(0, length - 1)) for length in array.shape)
            array[index] = draw(VALUES)
    row = st.lists(VALUES, min_size=size, max_size=size).map(np.array)
    return {
        "observations": observations,
        "actions": actions,
        "returns": draw(row),
        "costs": draw(st.one_of(st.none(), row)),
        "budget": draw(st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 1.0]))),
        "goal": np.array([1.0, 0.0]),
    }


def score(ranker: str, case: dict[str, Any], index: int) -> float:
    if ranker in ("highest_return", "within_budget"):
        return float(case["returns"][index])
    if ranker == "first":
        return 0.0
    if ranker == "custom":
        return float(case["actions"][index].sum())
    steps = case["observations"][index, 1:]
    distances = [float(np.hypot(x - 1, y - 0)) for x, y in steps]
    return -(distances[-1] if ranker == "final" else min(distances))


def brute_force(ranker: str, case: dict[str, Any]) -> int | None:
    """Index of the winner, by going through the candidates one by one."""
    best: tuple[bool, float, int] | None = None
    for index in range(len(case["actions"])):
        known = [case["observations"][index], case["actions"][index], case["returns"][index]]
        cost = np.nan if case["costs"] is None else case["costs"][index]
        value = score(ranker, case, index)
        if not all(np.isfinite(entry).all() for entry in (*known, value)):
            continue
        if case["costs"] is not None and not np.isfinite(cost):
            continue
        feasible = True
        if ranker == "within_budget" and case["budget"] is not None:
            feasible = cost <= case["budget"]
            value = value if feasible else -float(cost)
        if best is None or (feasible, value) > best[:2]:
            best = (feasible, value, index)
    return None if best is None else best[2]


TESTED: dict[str, Ranker] = {
    "highest_return": highest_return,
    "within_budget": within_budget,
    "first": first,
    "final": nearest_goal(),
    "closest": nearest_goal(when="closest"),
    "custom": custom(lambda observations, actions: actions.sum(axis=(1, 2))),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # the caller's function meets inf - inf
@pytest.mark.parametrize("name", sorted(TESTED))
@given(case=candidates())
def test_rankers_equal_brute_force(name: str, case: dict[str, Any]) -> None:
    if name == "within_budget" and case["costs"] is None:
        case["budget"] = None
    expected = brute_force(name, case)
    ranker = partial(TESTED[name], **case)
    if expected is None:
        with pytest.raises(PlanningError, match="none of the"):
            ranker()
        return
    ranking = ranker()
    assert ranking.chosen == expected
    assert np.isfinite(ranking.scores[expected])
    assert not np.isnan(ranking.scores).any() and not np.isposinf(ranking.scores).any()
    for index in range(len(case["actions"])):
        cost = 0.0 if case["costs"] is None else case["costs"][index]
        kept = case["budget"] is None or case["costs"] is None
        assert ranking.feasible[index] == (kept or (np.isfinite(cost) and cost <= case["budget"]))


def plans(size: int = 3) -> tuple[Array, Array]:
    return np.zeros((size, H + 1, NX)), np.zeros((size, H, NU))


def test_within_budget_reports_returns_or_else_negative_costs() -> None:
    values: Any = {"returns": np.array([1.0, 5.0, 3.0]), "costs": np.array([2.0, 4.0, 3.0])}
    ranking = within_budget(*plans(), **values, budget=3.0)
    assert ranking.chosen == 2
    assert ranking.feasible.tolist() == [True, False, True]
    assert ranking.scores.tolist() == [1, 5, 3]
    ranking = within_budget(*plans(), **values, budget=1.0)
    assert ranking.chosen == 0
    assert not ranking.feasible.any()
    assert ranking.scores.tolist() == [-2, -4, -3]
    assert within_budget(*plans(), **values).chosen == 1


@pytest.mark.fault("Callers' functions", "a plan that is not finite", "does not count as feasible")
def test_a_feasible_plan_that_is_not_finite_does_not_count_as_feasible() -> None:
    observations, actions = plans(2)
    observations[0, 1, 0] = np.nan
    values: Any = {"returns": np.array([9.0, 1.0]), "costs": np.array([0.0, 5.0])}
    ranking = within_budget(observations, actions, **values, budget=1.0)
    assert ranking.chosen == 1
    assert ranking.scores.tolist() == [-np.inf, -5.0]


def test_the_goal_is_compared_with_the_chosen_columns() -> None:
    observations, actions = plans(2)
    observations[0, :, 1] = [0, 1, 1, 3]
    observations[1, :, 1] = [9, 4, 2, 2]
    goal = np.array([1.0])
    near = nearest_goal(dims=[1])(observations, actions, goal=goal)
    assert near.chosen == 1 and near.scores.tolist() == [-2, -1]
    near = nearest_goal(dims=[-1], when="closest")(observations, actions, goal=goal)
    assert near.chosen == 0 and near.scores.tolist() == [0, -1]
    observations[1, 0, 1] = 1  # where a plan starts is not where it goes
    assert nearest_goal(dims=[1], when="closest")(observations, actions, goal=goal).chosen == 0


def test_absurd_distances_lose_without_a_warning() -> None:
    observations, actions = plans(2)
    observations[0] = 1e300
    assert nearest_goal()(observations, actions, goal=np.zeros(2)).chosen == 1


def test_the_callers_function_sees_all_states() -> None:
    seen: list[tuple[int, ...]] = []

    def rank(observations: Array, actions: Array) -> Array:
        seen.extend((observations.shape, actions.shape))
        return np.array([0, 2, 2])  # integers are fine

    assert custom(rank)(*plans()).chosen == 1
    assert seen == [(3, H + 1, NX), (3, H, NU)]
    with pytest.raises(InputError, match=r"ranking function: expected .*\(3,\), got \(3, 1\)"):
        custom(lambda observations, actions: np.zeros((3, 1)))(*plans())


@pytest.mark.fault("Callers' functions", "rankers without what they need", "refused by name")
@pytest.mark.parametrize(
    ("ranker", "arguments", "message"),
    [
        (highest_return, {}, "returns: this ranker needs them; got None"),
        (within_budget, {"returns": np.zeros(3), "budget": 1.0}, "costs: this ranker needs"),
        (highest_return, {"returns": np.zeros(2)}, r"returns: expected shape \[3\]; got \[2\]"),
        (first, {"costs": np.zeros((3, 1))}, r"costs: expected shape \[3\]; got \[3, 1\]"),
        (first, {"budget": np.nan}, "budget: expected a number or None; got NaN"),
        (nearest_goal(), {}, "goal: this ranker needs"),
        (nearest_goal([0]), {"goal": np.zeros(2)}, r"columns \[0\] of 2; got shape \[2\]"),
        (nearest_goal(), {"goal": np.zeros(3)}, r"columns \[0, 1, 2\] of 2"),
        (nearest_goal([-3]), {"goal": np.zeros(1)}, r"columns \[-3\] of 2"),
        (nearest_goal(), {"goal": np.array([0, np.nan])}, "goal: expected finite numbers"),
    ],
)
def test_ranker_mistakes_are_named(ranker: Ranker, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ranker(*plans(), **arguments)


def test_wrong_shapes_are_named() -> None:
    observations, actions = plans()
    with pytest.raises(InputError, match=r"observations: expected shape \[3, 4, nx\]"):
        first(observations[:, 1:], actions)
    with pytest.raises(InputError, match=r"actions: expected shape \[N, H, nu\], N >= 1"):
        first(observations[:0], actions[:0])
    with pytest.raises(InputError, match="actions: expected shape"):
        first(observations, actions[0])


def test_rankers_have_names() -> None:
    assert set(RANKERS) == {"first", "highest_return", "nearest_goal", "within_budget"}
    assert RANKERS["within_budget"] is within_budget
    with pytest.raises(ConfigError, match="when: expected one of closest, final; got 'last'"):
        nearest_goal(when="last")
