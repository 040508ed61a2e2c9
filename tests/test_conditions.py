"""Conditions: values along an episode against brute force, scaling, encoding, restoring."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from mpd_gym.datasets import (
    ConditionSpec,
    FittedConditions,
    WindowConfig,
    discounted_sums,
    fit_conditions,
    fit_normalizers,
    load_episodes,
)
from mpd_gym.errors import CheckpointError, ConfigError, DataError, InputError
from mpd_gym.types import Array, Episode

DISCOUNT = 0.9


def episode(rewards: Array, *, seed: int = 0, terminated: bool = False, **changed: Any) -> Episode:
    """Random episode with these rewards, Dict observations and goals, and costs 0 or 1."""
    rng, steps = np.random.default_rng(seed), len(rewards)
    ends = np.arange(steps) == steps - 1
    whole = Episode(
        observations={
            "observation": rng.normal(size=(steps + 1, 3)),
            "achieved_goal": rng.normal(size=(steps + 1, 2)),
            "desired_goal": rng.uniform(2, 6, (steps + 1, 2)),
        },
        actions=rng.normal(size=(steps, 2)),
        rewards=np.asarray(rewards, dtype=np.float64),
        terminations=ends & terminated,
        truncations=ends & (not terminated),
        costs=rng.integers(0, 2, steps).astype(np.float64),
    )
    return replace(whole, **changed)


def episodes() -> list[Episode]:
    rng = np.random.default_rng(1)
    return [episode(rng.normal(size=steps), seed=steps) for steps in (12, 5, 30)]


def fitted(found: list[Episode], *specs: ConditionSpec, **config: Any) -> FittedConditions:
    source = load_episodes(found)
    settings = WindowConfig(**{"horizon": 4, "discount": DISCOUNT, "conditions": specs, **config})
    functions = {s.name: lambda e: e.actions[:, :1] for s in specs if s.kind == "custom"}
    return fit_conditions(source, settings, fit_normalizers(source, "minmax"), functions)


def brute_force(series: Array, horizon: int | None) -> Array:
    stop = len(series) if horizon is None else horizon
    return np.array(
        [
            sum(DISCOUNT**i * value for i, value in enumerate(series[t : t + stop]))
            for t in range(len(series))
        ]
    )


@settings(deadline=None)
@given(
    series=arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e3, 1e3)),
    horizon=st.none() | st.integers(1, 60),
)
def test_discounted_sums_equal_brute_force(series: Array, horizon: int | None) -> None:
    sums = discounted_sums(series, DISCOUNT, horizon)
    assert sums.shape == series.shape
    assert_allclose(sums, brute_force(series, horizon), atol=1e-9)


def test_a_finite_sum_of_zeros_is_zero_whatever_comes_later() -> None:
    series = np.array([0.0, 0, 0, 0, 1e9])
    assert discounted_sums(series, 0.997, 3)[:2].tolist() == [0, 0]


@pytest.mark.parametrize(("horizon", "steps"), [("to_go", None), ("window", 4), (7, 7)])
def test_return_runs_from_zero_to_one_also_below_zero(
    horizon: str | int, steps: int | None
) -> None:
    found = [replace(e, rewards=e.rewards - 50) for e in episodes()]
    conditions = fitted(found, ConditionSpec("return", horizon=horizon))
    raw = [brute_force(e.rewards, steps) for e in found]
    low, high = min(map(np.min, raw)), max(map(np.max, raw))
    assert high < 0
    scaled = [conditions.values(e)["return"] for e in found]
    for value, expected in zip(scaled, raw, strict=True):
        assert value.shape == (len(expected), 1)
        assert_allclose(value[:, 0], (expected - low) / (high - low), atol=1e-12)
    assert min(map(np.min, scaled)) == 0
    assert max(map(np.max, scaled)) == 1
    scaling = conditions.scalings["return"]
    assert_allclose([scaling.minimum, scaling.maximum], [low, high])


def test_the_authors_divide_by_the_largest_return_of_a_whole_episode() -> None:
    found = [replace(e, rewards=np.linspace(0, 1, len(e))) for e in episodes()]
    conditions = fitted(found, ConditionSpec("return", scaling="authors"))
    raw = [brute_force(e.rewards, None) for e in found]
    largest = max(value[0] for value in raw)
    assert max(map(np.max, raw)) > largest  # later steps may have more to go
    for e, expected in zip(found, raw, strict=True):
        assert_allclose(conditions.values(e)["return"][:, 0], expected / largest)
    with pytest.raises(ConfigError, match=r"largest return at t = 0, here -[0-9.]+"):
        worse = [replace(e, rewards=e.rewards - 2) for e in found]
        fitted(worse, ConditionSpec("return", scaling="authors"))


@pytest.mark.parametrize("successes", [None, False, True])
def test_terminal_penalty_falls_on_failures_alone(successes: bool | None) -> None:
    def ending(terminated: bool) -> Episode:
        flags = None if successes is None else np.array([False, False, successes])
        return episode(np.array([1.0, 2, 3]), terminated=terminated, successes=flags)

    found = [ending(True), ending(False)]
    penalty = ConditionSpec("return", scaling="authors", terminal_penalty=-100.0)
    conditions = fitted(found, penalty)
    values = [conditions.values(e)["return"][:, 0] for e in found]
    largest = conditions.scalings["return"].high
    assert_allclose(largest, brute_force(np.array([1.0, 2, 3]), None)[0])
    assert_allclose(values[1] * largest, brute_force(np.array([1.0, 2, 3]), None))
    last = 3.0 if successes else -97.0
    assert_allclose(values[0] * largest, brute_force(np.array([1.0, 2, last]), None))


@pytest.mark.parametrize("horizon", ["to_go", "window"])
def test_cost_is_summed_over_the_window_and_budgets_follow(horizon: str) -> None:
    found = episodes()
    conditions = fitted(found, ConditionSpec("cost", horizon=horizon))
    assert ConditionSpec("cost").horizon == "window"
    assert all(e.costs is not None for e in found)
    raw = [brute_force(e.costs, 4 if horizon == "window" else None) for e in found]  # type: ignore[arg-type]
    low, high = min(map(np.min, raw)), max(map(np.max, raw))
    for e, expected in zip(found, raw, strict=True):
        assert_allclose(
            conditions.values(e)["cost"][:, 0], (expected - low) / (high - low), atol=1e-12
        )
    budgets = np.array([[0.0], [1.5], [40.0]])
    assert_allclose(conditions.encode("cost", budgets), (budgets - low) / (high - low), rtol=1e-6)


def test_raw_cost_is_multiplied_by_its_scale() -> None:
    found = episodes()
    conditions = fitted(found, ConditionSpec("cost", scaling="raw", scale=0.25))
    expected = brute_force(found[0].costs, 4) / 4  # type: ignore[arg-type]
    assert_allclose(conditions.values(found[0])["cost"][:, 0], expected)
    assert conditions.encode("cost", 3.0).tolist() == [0.75]


def test_goal_and_final_state_are_normalised_each_by_its_own() -> None:
    found = episodes()
    conditions = fitted(found, ConditionSpec("goal"), ConditionSpec("final_state", name="target"))
    normalizers = conditions.normalizers
    assert conditions.sizes == {"goal": 2, "target": 3}
    assert normalizers.goal is not None
    for e in found:
        assert isinstance(e.observations, dict)
        values = conditions.values(e)
        goals, last = e.observations["desired_goal"], e.observations["observation"][-1]
        assert_allclose(values["goal"], normalizers.goal.normalize(goals[:-1]))
        target = np.tile(normalizers.observation.normalize(last), (len(e), 1))
        assert_allclose(values["target"], target)
        assert_allclose(conditions.encode("goal", goals[0]), values["goal"][0], rtol=1e-6)
        assert_allclose(conditions.encode("target", last), target[0], rtol=1e-5, atol=1e-6)


def test_custom_values_are_taken_as_they_are() -> None:
    found = episodes()
    conditions = fitted(found, ConditionSpec("custom", name="push", size=1))
    assert_array_equal(conditions.values(found[0])["push"], found[0].actions[:, :1])
    assert conditions.encode("push", 0.3).tolist() == [np.float32(0.3)]


@pytest.mark.fault(
    "Callers' functions", "a condition function that returns NaN or another shape", "refused"
)
@pytest.mark.parametrize(
    "output", [np.zeros((12, 2)), np.zeros(12), np.full((12, 1), np.nan), np.zeros((13, 1))]
)
def test_custom_values_are_checked(output: Array) -> None:
    spec = ConditionSpec("custom", name="push", size=1)
    found = episodes()[:1]
    conditions = replace(fitted(found, spec), functions={"push": lambda _: output})
    with pytest.raises(InputError, match=r"'push': expected finite numbers of shape \(12, 1\)"):
        conditions.values(found[0])


def test_values_asked_for_are_encoded_in_their_units() -> None:
    conditions = fitted(episodes(), ConditionSpec("return"), ConditionSpec("goal"))
    assert conditions.encode("return", 1.05).tolist() == [np.float32(1.05)]
    assert conditions.encode("return", np.ones((6, 1))).shape == (6, 1)
    assert conditions.encode("goal", np.ones((6, 4, 2))).shape == (6, 4, 2)
    assert conditions.encode("goal", [3, 4]).dtype == np.float32


@pytest.mark.fault(
    "Callers' functions",
    "condition values that are NaN, of another shape or unknown",
    "refused by name",
)
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("retrun", 1.0, ConfigError, r"condition: .*Did you mean 'return'\?"),
        ("return", [1.0, 2.0], InputError, r"'return': expected shape \[\.\.\., 1\], got \(2,\)"),
        ("goal", 1.0, InputError, r"'goal': expected shape \[\.\.\., 2\], got \(\)"),
        ("goal", [1.0, np.nan], InputError, "'goal': expected finite numbers"),
        ("goal", ["a", "b"], InputError, "'goal': expected numbers"),
        ("goal", None, InputError, "'goal': expected"),
    ],
)
def test_bad_values_are_refused(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    conditions = fitted(episodes(), ConditionSpec("return"), ConditionSpec("goal"))
    with pytest.raises(error, match=message):
        conditions.encode(name, value)


def test_restored_conditions_give_equal_values() -> None:
    specs = (
        ConditionSpec("return", terminal_penalty=-5),
        ConditionSpec("cost", scaling="raw", scale=0.5),
        ConditionSpec("goal"),
        ConditionSpec("custom", name="push", size=1),
    )
    found = episodes()
    before = fitted(found, *specs)
    config = WindowConfig(**json.loads(json.dumps(asdict(before.config))))
    assert config == before.config
    after = FittedConditions.from_arrays(config, before.normalizers, before.arrays())
    for name, value in (("return", 1.1), ("cost", 2.0), ("goal", [3.0, 5.0]), ("push", 0.1)):
        assert_array_equal(after.encode(name, value), before.encode(name, value))
    with pytest.raises(ConfigError, match=r"functions are not saved: pass functions=\{'push'"):
        after.values(found[0])
    after = FittedConditions.from_arrays(
        config, before.normalizers, before.arrays(), before.functions
    )
    for name, values in before.values(found[2]).items():
        assert_array_equal(after.values(found[2])[name], values)


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"return": np.zeros(3)},
        {"return": np.array([0.0, 0, 0, 1])},
        {"return": np.array([0.0, np.nan, 0, 1])},
        {"return": np.arange(4.0), "cost": np.arange(4.0)},
    ],
)
def test_damaged_scalings_are_refused(damaged: dict[str, Array]) -> None:
    conditions = fitted(episodes(), ConditionSpec("return"))
    with pytest.raises(CheckpointError, match="condition"):
        FittedConditions.from_arrays(conditions.config, conditions.normalizers, damaged)


def test_what_the_data_lacks_is_named() -> None:
    found = episodes()
    without = [found[0], replace(found[1], costs=None)]
    with pytest.raises(DataError, match="episode 1: condition 'cost' needs costs"):
        fitted(without, ConditionSpec("cost"))
    flat = [replace(e, observations=e.observations["observation"]) for e in found]
    with pytest.raises(ConfigError, match="'goal' needs Dict observations with 'desired_goal'"):
        fitted(flat, ConditionSpec("goal"))
    goals = fitted(found, ConditionSpec("goal"))
    with pytest.raises(InputError, match="'goal' needs Dict observations"):
        goals.values(flat[0])


@pytest.mark.fault("Data", "a condition that never varies", "refused")
def test_a_condition_without_variation_is_refused() -> None:
    equal = [replace(e, rewards=np.zeros(len(e))) for e in episodes()]
    with pytest.raises(ConfigError, match="'return': its value is 0 everywhere"):
        fitted(equal, ConditionSpec("return"))


def test_functions_must_match_the_declared_conditions() -> None:
    source = load_episodes(episodes())
    normalizers = fit_normalizers(source, "minmax")
    custom = WindowConfig(conditions=(ConditionSpec("custom", name="push", size=1),))
    with pytest.raises(ConfigError, match="'push' is 'custom' and needs a function"):
        fit_conditions(source, custom, normalizers)
    with pytest.raises(ConfigError, match="'pull' is not the name of a 'custom' condition"):
        functions = dict.fromkeys(("push", "pull"), lambda e: e.actions)
        fit_conditions(source, custom, normalizers, functions)
    with pytest.raises(ConfigError, match="scalings: expected \\['return'\\], got \\[\\]"):
        FittedConditions(WindowConfig(conditions=(ConditionSpec("return"),)), normalizers, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "retrun"}, r"condition kind: .*Did you mean 'return'\?"),
        ({"kind": "return", "name": "my return"}, "expected an identifier, got 'my return'"),
        ({"kind": "custom"}, "'custom' needs size >= 1, got None"),
        ({"kind": "custom", "size": 0}, "needs size >= 1, got 0"),
        ({"kind": "return", "size": 2}, "size of kind 'return' is known; leave out size, got 2"),
        ({"kind": "goal", "size": 2}, "size of kind 'goal' is known"),
        ({"kind": "goal", "horizon": "window"}, "horizon and scaling are for kinds"),
        ({"kind": "goal", "scaling": "range"}, "horizon and scaling are for kinds"),
        ({"kind": "return", "horizon": "windw"}, r"horizon: .*Did you mean 'window'\?"),
        (
            {"kind": "return", "horizon": 0},
            "horizon: expected one of .* auto, or a whole",
        ),
        ({"kind": "return", "horizon": 7.5}, r"number of steps >= 1, got 7\.5"),
        ({"kind": "return", "scaling": "raw"}, "scaling: expected one of authors, range"),
        ({"kind": "cost", "scaling": "authors"}, "scaling: expected one of range, raw"),
        ({"kind": "cost", "scale": 2.0}, "scale is a positive factor of scaling='raw'"),
        (
            {"kind": "cost", "scaling": "raw", "scale": 0.0},
            "scale: expected a finite number > 0, got 0.0",
        ),
        (
            {"kind": "cost", "scaling": "raw", "scale": float("nan")},
            "scale: expected a finite number > 0, got nan",
        ),
        ({"kind": "return", "terminal_penalty": 100.0}, r"at most 0 \(such as -100\), got 100"),
        (
            {"kind": "return", "terminal_penalty": float("nan")},
            "terminal_penalty: expected a finite number, got nan",
        ),
        ({"kind": "cost", "terminal_penalty": -1.0}, "terminal_penalty is for kind 'return'"),
        ({"kind": "goal", "when": "goal"}, "when: .*Did you mean 'goals'"),
    ],
)
def test_bad_specs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConditionSpec(**fields)


def test_specs_fill_in_what_is_left_out() -> None:
    spec = ConditionSpec("return")
    assert (spec.name, spec.size, spec.horizon, spec.scaling) == ("return", 1, "to_go", "range")
    assert ConditionSpec("cost").scaling == "range"
    assert ConditionSpec(**asdict(spec)) == spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"horizon": 0}, "horizon: expected an integer from 1"),
        ({"horizon": 4.0}, "horizon: expected an integer"),
        ({"discount": 0.0}, r"discount: expected a finite number in \(0, 1\], got 0.0"),
        ({"discount": 1.01}, "discount: expected"),
        ({"padding": "repeet"}, r"padding: .*Did you mean 'repeat'\?"),
        ({"conditions": ("return",)}, "conditions: expected ConditionSpec objects"),
        ({"conditions": (ConditionSpec("goal"),) * 2}, r"names must differ, got \['goal', 'goal"),
        (
            {"conditions": [{"kind": "cost", "scal": 2}]},
            r"ConditionSpec option: .*Did you mean 'scale'\?",
        ),
        ({"conditions": [{"name": "cost"}]}, "ConditionSpec: .*'kind'"),
    ],
)
def test_bad_window_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WindowConfig(**fields)
