"""Measures and their intervals; open-loop execution."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box
from scipy import stats

from mpd_gym.boundary import succeeded
from mpd_gym.collect.lqr import NoisyLQR
from mpd_gym.collect.scripted import PendulumSwingUp, SmoothRandom
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.evaluation.returns import (
    Stopwatch,
    evaluate,
    execute_plans,
    mean_interval,
    proportion_interval,
)


def optimal() -> tuple[Any, NoisyLQR]:
    env: Any = gym.make("LQR-v0").unwrapped
    return env, NoisyLQR(env.optimal_gain, 0.0, action_space=env.action_space)


def test_the_optimal_gain_reaches_the_optimal_cost() -> None:
    env, policy = optimal()
    found = evaluate(policy, "LQR-v0", seeds=range(5), num_envs=2)
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(5)])
    np.testing.assert_allclose(-found.returns, env.optimal_cost(starts), rtol=1e-5)
    np.testing.assert_array_equal(found.lengths, 200)
    assert found.costs is None and found.successes is None


def test_the_number_of_copies_does_not_matter() -> None:
    swing = PendulumSwingUp(6.5)
    one, three = (
        evaluate(swing, "ConstrainedPendulum-v0", seeds=range(7), num_envs=count)
        for count in (1, 3)
    )
    np.testing.assert_allclose(one.returns, three.returns)
    assert one.costs is not None and one.successes is not None
    np.testing.assert_array_equal(one.costs, three.costs)
    assert one.costs.sum() == 0 and one.successes.all()


class SaysSuccess(gym.Wrapper[Any, Any, Any, Any]):
    """Names success as PointMaze and Adroit do."""

    def __init__(self) -> None:
        super().__init__(gym.make("ConstrainedPendulum-v0"))

    def step(self, action: Any) -> Any:
        *outcome, info = super().step(action)
        info["success"] = info.pop("is_success")
        return *outcome, info


gym.register("MpdTests/SaysSuccess-v0", SaysSuccess)


def test_success_is_found_under_both_of_its_names() -> None:
    ours, theirs = (
        evaluate(PendulumSwingUp(6.5), env_id, seeds=range(3)).successes
        for env_id in ("ConstrainedPendulum-v0", "MpdTests/SaysSuccess-v0")
    )
    assert ours is not None and theirs is not None and ours.any()
    np.testing.assert_array_equal(ours, theirs)
    assert succeeded({"success": np.False_}) is False and succeeded({"other": 1.0}) is None


class Rarely(gym.Env[Any, Any]):
    """Twelve steps; infos hold success and cost only at the steps where they occur."""

    observation_space = Box(0.0, 12.0, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, cost: float = 2.0) -> None:
        self.cost = cost

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.odd = 0, seed is not None and seed % 2
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        info: dict[str, Any] = {"is_success": True} if self.t == 5 and action[0] > 0 else {}
        info |= {"cost": self.cost} if self.t in (7, 9) and self.odd else {}
        return np.full(1, self.t, np.float32), 1.0, False, self.t == 12, info


gym.register("MpdTests/Rarely-v0", Rarely)


class Says:
    """A policy that gives one answer for each observation."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.stack([self.action] * len(observation)), state


@pytest.mark.fault(
    "Evaluation",
    "success and cost that infos hold only where they occur",
    "success at the end and ever, sums of costs; the other steps count as none",
)
def test_what_occurs_once_is_counted() -> None:
    found = evaluate(Says([0.5]), "MpdTests/Rarely-v0", seeds=[0, 1, 2, 3], num_envs=2)
    assert found.successes is not None and not found.successes.any()
    assert found.successes_ever is not None and found.successes_ever.all()
    np.testing.assert_array_equal(found.costs, [0.0, 4.0, 0.0, 4.0])
    summary = found.summary()
    assert (summary["success"].mean, summary["success ever"].mean) == (0.0, 1.0)
    assert (summary["cost"].mean, summary["violation"].mean) == (2.0, 0.5)
    never = evaluate(Says([-0.5]), "MpdTests/Rarely-v0", seeds=[0])
    assert never.successes is None and never.successes_ever is None and never.costs is None


@pytest.mark.fault(
    "Evaluation",
    "PointMaze, whose goal moves on when it is reached",
    "success ever, though at the end there is none",
)
def test_goals_of_point_maze_that_are_reached_on_the_way_count() -> None:
    gym.register_envs(pytest.importorskip("gymnasium_robotics"))

    class Steers:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            ahead = observation["desired_goal"] - observation["achieved_goal"]
            return np.clip(3 * ahead - observation["observation"][..., 2:] / 2, -1, 1), None

    corridor = [[1] * 5, [1, "r", "g", "g", 1], [1] * 5]
    kwargs = {"maze_map": corridor, "max_episode_steps": 120, "reset_target": True}
    found = evaluate(Steers(), "PointMaze_UMaze-v3", seeds=4, env_kwargs=kwargs)
    assert found.successes is not None and not found.successes.any()
    assert found.successes_ever is not None and found.successes_ever.all()


@pytest.mark.fault(
    "Policies", "a recurrent policy, such as RecurrentPPO", "state and episode_start go through"
)
@pytest.mark.parametrize("num_envs", [1, 2])
def test_states_of_policies_go_through(num_envs: int) -> None:
    seen = []

    class Counts:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            state = np.zeros(len(observation)) if state is None else state
            state = np.where(episode_start, 0, state) + 1
            seen.append((state, observation[:, 0]))
            return np.zeros((len(observation), 1)), state

    evaluate(Counts(), "MpdTests/Rarely-v0", seeds=3, num_envs=num_envs)
    assert len(seen) == 12 * (3 if num_envs == 1 else 2)
    for state, t in seen:
        np.testing.assert_array_equal(state, t + 1)


@pytest.mark.fault(
    "Evaluation", "an environment whose cost is not finite", "refused, with its step"
)
def test_costs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="finite cost, got nan at step 7 of seed 3"):
        evaluate(Says([0.0]), "MpdTests/Rarely-v0", seeds=[3], env_kwargs={"cost": np.nan})


@pytest.mark.fault(
    "Evaluation",
    "success, collision or ends of episodes that are no flags, infos that are no dict",
    "refused, nothing is counted",
)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("is_success", value) for value in ("no", np.nan, 0.4, None, np.zeros(2))),
        *(("terminated", value) for value in ("False", np.nan)),
        *(("truncated", None), ("collision", np.nan), ("info", None), ("info", [1])),
    ],
)
def test_flags_of_an_environment_are_flags(
    place: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(env: Any, action: Any) -> Any:
        answer = {"terminated": False, "truncated": False, "info": {}}
        answer |= {place: value} if place in answer else {"info": {place: value}}
        return np.zeros(3, np.float32), 0.0, *answer.values()

    monkeypatch.setattr(SaysSuccess, "step", step)
    monkeypatch.setattr(gym.registry["MpdTests/SaysSuccess-v0"], "disable_env_checker", True)
    with pytest.raises(InputError, match=f"env: expected .* as {place}, got"):
        evaluate(PendulumSwingUp(6.5), "MpdTests/SaysSuccess-v0", seeds=1)


@pytest.mark.fault(
    "Policies",
    "predict that returns no (action, state), or an action of another shape, kind or not finite",
    "refused before the environment sees it; the message names policy and environment",
)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"expected \(action, state\) from predict; got None"),
        (([[0.0]],), r"expected \(action, state\)"),
        (([[0.0]], None, None), r"expected \(action, state\)"),
        ((None, None), "finite action"),
        (("left", None), "expected numbers; got dtype <U4"),
        (([[0.0], [0.0, 1.0]], None), "expected numbers; .*inhomogeneous"),
        ((np.zeros(1), None), r"shape \(1, 1\) for Box.*of shape \(1,\)"),
        ((np.zeros((1, 2)), None), r"of shape \(1, 2\)"),
        ((np.zeros((1, 1), complex), None), "expected numbers; got dtype complex"),
        ((np.full((1, 1), np.nan), None), "got .*nan"),
        ((np.full((1, 1), np.inf), None), "got .*inf"),
    ],
)
def test_answers_that_are_no_actions_are_refused(answer: Any, message: str) -> None:
    class Answers:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return answer

    with pytest.raises(InputError, match=f"policy: .*{message}") as caught:
        evaluate(Answers(), "MpdTests/Rarely-v0", seeds=[0])
    assert "from Answers in MpdTests/Rarely-v0" in str(caught.value)


@pytest.mark.fault(
    "Spaces", "a policy of continuous actions in an environment of discrete ones", "refused"
)
def test_actions_of_a_discrete_space_are_whole_numbers() -> None:
    found = evaluate(Says(1), "CartPole-v1", seeds=3, num_envs=2)
    assert found.lengths.max() < 15  # pushes one way only
    for action in (0.5, np.array([0.3]), 2, -1):
        with pytest.raises(InputError, match=r"Discrete\(2\).*Says in CartPole-v1"):
            evaluate(Says(action), "CartPole-v1", seeds=1)


def test_episodes_that_end_early_stop_counting() -> None:
    env = gym.make("CarUMaze-v0")
    policy = SmoothRandom(env.action_space, env.observation_space)
    found = evaluate(policy, "CarUMaze-v0", seeds=range(6), num_envs=6)
    assert found.collisions is not None and found.collisions.any()
    assert (found.lengths[found.collisions] <= 64).all() and found.lengths.min() < 64
    measures = {"return", "length", "success", "success ever", "collision", "final error"}
    assert set(found.summary()) == measures


def test_final_error_is_the_distance_to_the_goal_at_the_end() -> None:
    env = gym.make("CarUMaze-v0")
    policy = SmoothRandom(env.action_space, env.observation_space)
    policy.reseed(7)
    found = evaluate(policy, "CarUMaze-v0", seeds=[3])
    policy.reseed(7)
    observation, _ = env.reset(seed=3)
    state, done = None, False
    while not done:
        action, state = policy.predict(observation, state, np.array([state is None]))
        observation, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    error = np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"])
    assert found.final_errors is not None
    np.testing.assert_allclose(found.final_errors, [error])
    assert evaluate(optimal()[1], "LQR-v0", seeds=[0]).final_errors is None


def test_a_stopwatch_times_each_call_and_changes_nothing() -> None:
    class Slow:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            time.sleep(0.02)
            return (observation, episode_start, deterministic), state

    watch = Stopwatch(Slow())
    assert watch.predict(1, 2, 3, True) == ((1, 3, True), 2)
    assert watch.predict(5) == ((5, None, False), None)
    assert len(watch.seconds) == 2 and min(watch.seconds) >= 0.02


def test_exact_starts_are_passed_on() -> None:
    env, policy = optimal()
    starts = [np.array([0.1, 0.0]), np.array([0.0, -0.1])]
    options = [{"state": start} for start in starts]
    found = evaluate(policy, "LQR-v0", seeds=[0, 0], reset_options=options)
    np.testing.assert_allclose(-found.returns, env.optimal_cost(np.stack(starts)), rtol=1e-5)


@pytest.mark.fault("Evaluation", "a policy that cannot act", "refused")
@pytest.mark.parametrize("policy", ["agent.safetensors", None, object])
def test_what_cannot_act_is_refused(policy: Any) -> None:
    with pytest.raises(ConfigError, match="policy: expected an object with predict"):
        evaluate(policy, "LQR-v0", seeds=[0])


@pytest.mark.fault("Evaluation", "numbers of episodes and copies that are none", "refused")
def test_bad_arguments_are_refused() -> None:
    _, policy = optimal()
    for seeds in ([], 0, -3, [-1], [1.5], ["x"], "x", None, 1.5, True, [True]):
        with pytest.raises(InputError, match="seeds: expected at least one, whole numbers"):
            evaluate(policy, "LQR-v0", seeds=seeds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_envs"):
        evaluate(policy, "LQR-v0", seeds=1, num_envs=0)
    for env_id, kwargs in (("Nope-v0", {}), ("LQR-v0", {"nope": 1})):
        with pytest.raises(ConfigError, match=f"env: {env_id} cannot be made"):
            evaluate(policy, env_id, seeds=1, env_kwargs=kwargs)
    with pytest.raises(InputError, match="reset_options"):
        evaluate(policy, "LQR-v0", seeds=[0, 1], reset_options=[{}])
    with pytest.raises(InputError, match="finite"):
        mean_interval(np.array([1.0, np.nan]))


def test_mean_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        interval = mean_interval(rng.normal(3.0, 2.0, 5))
        covered += interval.low <= 3.0 <= interval.high
    assert covered / 500 == pytest.approx(0.95, abs=0.03)
    assert mean_interval(np.array([1.0])).high == np.inf


def test_proportion_interval_is_wilsons() -> None:
    flags = np.array([True] * 9 + [False])
    interval = proportion_interval(flags)
    z, share, n = stats.norm.ppf(0.975), 0.9, 10
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half))
    assert proportion_interval(np.ones(10, bool)).low > 0.65


def test_plans_of_the_optimum_are_executed_as_planned() -> None:
    env, policy = optimal()
    start = env.reset(seed=4)[0]
    states, actions = [start], []
    for _ in range(10):
        actions.append(policy.predict(states[-1])[0])
        states.append(env.step(actions[-1])[0])
    rollout = execute_plans([np.stack(actions)], "LQR-v0", seeds=[4])[0]
    np.testing.assert_allclose(rollout.observations, states)
