"""The latency budget, on machines whose clock stands still but for what the test says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from helpers import tiny_agent

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents import latency
from mpd_gym.agents.latency import LatencyProfile, StepTiming, choose, fewer_samples, measure
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.errors import ConfigError

K = 50


class Machine:
    """A clock, and plans that take `fixed` + `per_step` · steps seconds for each candidate."""

    def __init__(
        self, fixed: float = 0.001, per_step: float = 0.002, slow: tuple[float, ...] = (1.0,)
    ) -> None:
        self.now = 0.0
        self.plans: list[tuple[int, int]] = []
        self._fixed, self._per_step, self._slow = fixed, per_step, slow

    def prepare(self, num_candidates: int, steps: int) -> Callable[[], object]:
        def plan() -> None:
            factor = self._slow[len(self.plans) // 2 % len(self._slow)]  # both kinds alike
            self.now += factor * num_candidates * (self._fixed + self._per_step * steps)
            self.plans.append((num_candidates, steps))

        return plan

    def clock(self) -> float:
        return self.now

    def timing(self, num_candidates: int, limit: float = np.inf) -> StepTiming | None:
        return measure(self.prepare, num_candidates, K, limit, self.clock)


# --- measuring -----------------------------------------------------------------------------------


def test_a_timing_separates_the_steps_from_the_rest() -> None:
    timing = Machine(0.004, 0.002).timing(3)
    assert timing is not None
    assert timing.fixed == pytest.approx(0.012)
    assert timing.per_step == pytest.approx(0.006)
    np.testing.assert_allclose(timing.ratios, 1.0)
    profile = LatencyProfile({3: timing})
    assert profile.seconds(3, 7) == pytest.approx(1.1 * (0.012 + 7 * 0.006))
    assert profile.most_steps(3, 1.1 * 0.0541) == 7
    assert profile.most_steps(3, 1.1 * 0.0539) == 6
    assert profile.most_steps(3, 0.001) == 0
    assert profile.most_steps(4, 1.0) == 0  # not timed: too slow


def test_jitter_widens_what_is_promised() -> None:
    steady, shaky = (Machine(slow=slow).timing(1) for slow in ((1.0,), (1.0, 1.0, 1.0, 1.5)))
    assert steady is not None and shaky is not None
    profile = LatencyProfile({1: shaky})
    assert 1.4 < profile.jitter <= 1.5
    assert LatencyProfile({1: steady}).jitter == 1.1  # at least
    assert profile.seconds(1, 4) == pytest.approx(profile.jitter * 0.009)


def test_measuring_is_short_and_stops_above_the_limit() -> None:
    fast, slow, hopeless = Machine(per_step=1e-4), Machine(per_step=0.5), Machine(per_step=0.5)
    assert fast.timing(1) is not None and slow.timing(1) is not None
    assert len(fast.plans) <= 2 + 2 * latency.MAX_REPEATS
    assert len(slow.plans) == 2 + 2 * latency.MIN_REPEATS
    assert hopeless.timing(1, limit=0.1) is None
    assert hopeless.plans == [(1, 1)] * 2


def test_times_lost_in_noise_stay_on_the_safe_side() -> None:
    timing = Machine(fixed=0.01, per_step=0.0).timing(1)
    assert timing is not None
    assert LatencyProfile({1: timing}).seconds(1, 1) >= 0.01


@pytest.mark.fault("Machine", "a clock that stands still or goes backwards", "refused; says so")
@pytest.mark.parametrize("direction", [0.0, -1.0])
def test_a_clock_that_does_not_go_on_is_named(direction: float) -> None:
    machine = Machine()
    with pytest.raises(ConfigError, match="clock, which stands still or goes backwards"):
        measure(machine.prepare, 1, K, clock=lambda: direction * machine.now)


@pytest.mark.parametrize("num_levels", [1, 2])
def test_one_or_two_levels_are_enough_to_measure(num_levels: int) -> None:
    machine = Machine()
    timing = measure(machine.prepare, 1, num_levels, clock=machine.clock)
    assert timing is not None
    assert timing.fixed + timing.per_step == pytest.approx(0.003)
    assert max(steps for _, steps in machine.plans) == num_levels


# --- choosing ------------------------------------------------------------------------------------


def chosen(machine: Machine, budget: float, **options: Any) -> latency.LatencyChoice:
    """With the budget before the least margin for delays."""
    return choose(SamplingConfig(**options), K, 1.1 * budget, machine.timing)


def test_what_fits_is_left_as_it_is() -> None:
    found = chosen(Machine(), 1.0, num_candidates=4, num_steps=20)
    assert found.options == {"num_candidates": 4, "num_steps": 20}
    assert found.seconds == found.first_seconds == pytest.approx(1.1 * 4 * 0.041)
    assert chosen(Machine(), 1.0).options == {"num_candidates": 1, "num_steps": K}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (8 * 0.0211, (8, 10)),  # all candidates and steps
        (8 * 0.0171, (8, 8)),  # fewer steps
        (8 * 0.0111, (8, 5)),
        (8 * 0.0109, (4, 10)),  # then half the candidates, and as many steps as fit again
        (2 * 0.0111, (2, 5)),
        (0.0111, (1, 5)),
        (0.0051, (1, 2)),  # one candidate: the steps go too
        (0.0031, (1, 1)),
    ],
)
def test_steps_go_first_then_candidates_then_the_last_steps(
    budget: float, expected: tuple[int, int]
) -> None:
    found = chosen(Machine(), budget, num_candidates=8, num_steps=10)
    assert tuple(found.options.values()) == expected
    assert found.seconds <= 1.1 * budget


def test_warm_starts_are_cut_and_the_first_plan_keeps_its_steps() -> None:
    options = {"num_candidates": 8, "num_steps": 10, "warm_start_steps": 4}
    found = chosen(Machine(), 8 * 0.0091, **options)
    assert found.options == {"num_candidates": 8, "warm_start_steps": 4}
    assert found.seconds == pytest.approx(1.1 * 8 * 0.009)
    assert found.first_seconds == pytest.approx(1.1 * 8 * 0.021)
    fewer = chosen(Machine(), 8 * 0.0089, **options)  # four steps are asked for: they are enough
    assert fewer.options == {"num_candidates": 4, "warm_start_steps": 4}


def test_an_impossible_budget_names_the_least_time() -> None:
    machine = Machine(slow=(1.0, 1.0, 1.0, 2.0))
    with pytest.raises(ConfigError, match=r"1 sample with 1 step, takes 0\.006 s.*got 0\.002"):
        chosen(machine, 0.002 / 1.1, num_candidates=64)
    assert chosen(Machine(slow=(1.0, 1.0, 1.0, 2.0)), 0.0061, num_candidates=64).options == {
        "num_candidates": 1,
        "num_steps": 1,
    }


def test_hopeless_numbers_of_candidates_cost_two_calls() -> None:
    machine = Machine()
    chosen(machine, 0.012, num_candidates=64, num_steps=5)
    for count in (64, 32, 16, 8):
        assert [plan for plan in machine.plans if plan[0] == count] == [(count, 1)] * 2


@pytest.mark.parametrize("bad", [0, -0.1, float("nan"), float("inf"), "fast", True, None])
def test_bad_budgets_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="latency_budget: expected seconds > 0"):
        choose(SamplingConfig(), K, bad, Machine().timing)


def test_candidates_are_halved_before_the_samples_of_each() -> None:
    assert fewer_samples(SamplingConfig()) == [1]
    assert fewer_samples(SamplingConfig(num_candidates=12)) == [12, 6, 3, 1]
    options = SamplingConfig(num_candidates=3, samples_per_candidate=4)
    assert fewer_samples(options) == [12, 4, 2, 1]
    assert [tuple(latency.sampling(options, count).values()) for count in (12, 4, 2, 1)] == [
        (3, 4),
        (1, 4),
        (1, 2),
        (1, 1),
    ]


def test_averaged_samples_are_given_up_for_five_steps() -> None:
    found = chosen(Machine(), 4 * 0.0111, num_steps=10, samples_per_candidate=8)
    assert found.options == {"num_candidates": 1, "samples_per_candidate": 4, "num_steps": 5}


# --- the agent's ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts() -> Any:
    return tiny_agent("LQR-v0", conditions=("return",), reward_model=True).parts


@pytest.fixture
def trained(parts: Any) -> MPDiffuserAgent:
    return MPDiffuserAgent(parts)  # nothing of it is measured yet


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(latency, "replans", lambda agent: machine.prepare)
    monkeypatch.setattr(latency, "measure", functools.partial(measure, clock=machine.clock))
    return machine


def test_an_agent_takes_and_explains_its_choice(trained: MPDiffuserAgent, machine: Machine) -> None:
    agent = trained.with_options(num_candidates=8, temperature=0.1, latency_budget=1.1 * 8 * 0.0111)
    assert (agent.options.num_candidates, agent.options.num_steps) == (8, 5)
    assert agent.options.temperature == 0.1
    assert agent.latency is not None and agent.latency.options["num_steps"] == 5
    text = str(agent.latency)
    assert "num_candidates=8, num_steps=5: p99 of 96.8 ms within 97.7 ms" in text
    assert agent.with_options(num_steps=2).latency is None  # no longer what was chosen
    assert trained.latency is None


def test_a_machine_is_measured_once_for_all_copies(
    trained: MPDiffuserAgent, machine: Machine
) -> None:
    trained.with_options(latency_budget=1.0)
    count = len(machine.plans)
    other = trained.with_options(action_chunk=4, latency_budget=0.5, num_steps=3)
    assert len(machine.plans) == count
    other.with_options(guidance_scale=2.0, latency_budget=0.5)  # twice the rows: another time
    assert len(machine.plans) > count
    count = len(machine.plans)
    other.set_reward(lambda x, u, y: np.zeros(u.shape[:2]))
    other.with_options(latency_budget=0.5)
    assert len(machine.plans) > count


def test_a_profile_has_every_halving(trained: MPDiffuserAgent, machine: Machine) -> None:
    profile = trained.with_options(num_candidates=6).profile()
    assert set(profile.timings) == {6, 3, 1}
    assert str(profile).splitlines()[2].split() == ["1", "1.00", "2.00", "3.3,", "12.1,", "23.1"]


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("LQR-v0", {}),
        ("CarUMaze-v0", {"conditions": ("goal",)}),
        ("ConstrainedPendulum-v0", {"reward_model": True, "cost_model": True}),
    ],
)
def test_real_agents_are_timed_where_they_plan_anew(
    env_id: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = tiny_agent(env_id, **options)
    asked: list[tuple[int, Any]] = []
    sample = MPDiffuserAgent._sample

    def recorded(agent: MPDiffuserAgent, request: Any) -> Any:
        asked.append((agent.options.num_candidates, request.warm))
        return sample(agent, request)

    monkeypatch.setattr(MPDiffuserAgent, "_sample", recorded)
    budget = {"budget": 1.0} if "cost_model" in options else {}
    prepare = latency.replans(trained.with_options(action_chunk=4, **budget))
    plan = prepare(3, 2)
    assert asked == [(3, None)]
    plan()
    plan()
    assert len(asked) == 3 and asked[1][0] == 3
    assert all(warm is not None for _, warm in asked[1:])
    agent = trained.with_options(latency_budget=60.0, **budget)
    observation, _ = gym.make(env_id).reset(seed=0)
    assert np.isfinite(agent.predict(observation)[0]).all()


def test_measuring_leaves_the_agents_noise_alone(trained: MPDiffuserAgent) -> None:
    before = trained._generator.get_state()
    trained.with_options(latency_budget=60.0)
    assert (trained._generator.get_state() == before).all()
