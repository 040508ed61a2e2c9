"""LQR with noise, smooth random actions, errors in actions, and the pendulum's swing-up."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from scipy import stats

import mpd_gym  # noqa: F401  (registers the environments)
from mpd_gym.collect.lqr import NoisyLQR
from mpd_gym.collect.noisy import NoisyPolicy
from mpd_gym.collect.random_driver import RandomDriver
from mpd_gym.collect.scripted import PendulumSwingUp, SmoothRandom
from mpd_gym.errors import ConfigError, InputError

GAIN = np.array([[-2.0, -1.0, 0.5], [0.25, 0.0, -1.0]])


def noise_of(policy: NoisyLQR, count: int) -> np.ndarray:
    """Noise of `count` successive steps, ``[count, nu]``."""
    return np.array([policy.predict(np.zeros(3))[0] for _ in range(count)])


# NoisyLQR


def test_deterministic_action_is_the_gain_alone() -> None:
    policy = NoisyLQR(GAIN, 1.0, seed=0)
    x = np.random.default_rng(0).normal(size=(7, 3))
    many, _ = policy.predict(x, deterministic=True)
    assert many.shape == (7, 2)
    np.testing.assert_allclose(many, x @ GAIN.T, rtol=1e-12)
    one, state = policy.predict(x[3], state="kept", deterministic=True)
    assert state == "kept"
    np.testing.assert_array_equal(one, many[3])


def test_noise_is_bernoulli_gaussian_and_independent_over_time() -> None:
    noise = noise_of(NoisyLQR(GAIN, 0.3, seed=1), 20_000)
    noisy = noise != 0.0
    assert (noisy[:, 0] == noisy[:, 1]).all()  # one d for all inputs of a step
    d, w = noisy[:, 0], noise[noisy[:, 0]]
    assert d.mean() == pytest.approx(0.3, abs=0.015)
    assert stats.kstest(w.ravel() / 0.25, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(w.T)[0, 1]) < 0.05
    assert abs(np.corrcoef(d[1:], d[:-1])[0, 1]) < 0.03


def test_noise_differs_between_the_rows_of_a_batch() -> None:
    actions, _ = NoisyLQR(GAIN, 0.5, seed=2).predict(np.zeros((2000, 3)))
    assert (actions[:, 0] != 0).mean() == pytest.approx(0.5, abs=0.05)
    assert len(np.unique(actions[actions[:, 0] != 0, 0])) > 900


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_noise_never_or_always(probability: float) -> None:
    noise = noise_of(NoisyLQR(GAIN, probability), 50)
    assert ((noise != 0.0) == bool(probability)).all()


def test_reseed_repeats_the_noise() -> None:
    policy = NoisyLQR(GAIN, 0.5, seed=3)
    first = noise_of(policy, 40)
    second = noise_of(policy, 40)
    policy.reseed(3)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(noise_of(policy, 40), first)
    copy = pickle.loads(pickle.dumps(policy))
    np.testing.assert_array_equal(noise_of(copy, 5), noise_of(policy, 5))


def test_actions_keep_to_the_box() -> None:
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    actions, _ = NoisyLQR(GAIN, 1.0, action_space=box).predict(np.full((50, 3), 3.0))
    assert actions.dtype == np.float32
    assert all(action in box for action in actions)


def test_optimal_gain_reaches_the_optimal_cost() -> None:
    env = gym.make("LQR-v0")
    problem: Any = env.unwrapped
    policy = NoisyLQR(problem.optimal_gain, 0.0)
    x, _ = env.reset(seed=5)
    optimum, cost, ended = problem.optimal_cost(x), 0.0, False
    while not ended:
        x, reward, _, ended, _ = env.step(policy.predict(x)[0])
        cost -= float(reward)
    assert cost == pytest.approx(float(optimum), rel=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"gain": [1.0, 2.0]}, "gain"),
        ({"gain": [[np.nan]]}, "gain"),
        ({"probability": 1.5}, "probability"),
        ({"probability": np.nan}, "probability"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"action_space": spaces.Box(-1, 1, (3,))}, "action_space"),
    ],
)
def test_lqr_refuses_bad_arguments(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        NoisyLQR(**{"gain": GAIN, "probability": 0.5} | kwargs)


@pytest.mark.parametrize(
    "observation",
    [(np.zeros(3), {}), np.zeros(4), np.zeros((2, 2, 3)), np.array([0.0, np.nan, 0.0]), {}],
)
def test_flat_observations_are_checked(observation: Any) -> None:
    for policy in (NoisyLQR(GAIN, 0.5), PendulumSwingUp()):
        with pytest.raises(InputError, match="observation"):
            policy.predict(observation)


# SmoothRandom

BOX = spaces.Box(np.float32([-1.0, 2.0]), np.float32([3.0, 2.5]))
OBSERVATIONS = spaces.Box(-1.0, 1.0, (4,))


def smooth(**kwargs: Any) -> SmoothRandom:
    return SmoothRandom(BOX, OBSERVATIONS, **kwargs)


def rollout(policy: SmoothRandom, steps: int, count: int | None = None) -> np.ndarray:
    """Actions of one episode, ``[steps, nu]`` or ``[steps, count, nu]``."""
    observation = np.zeros(4) if count is None else np.zeros((count, 4))
    actions, state = [], None
    for _ in range(steps):
        action, state = policy.predict(observation, state)
        actions.append(action)
    return np.array(actions)


def test_actions_cover_the_box_evenly() -> None:
    actions = rollout(smooth(correlation=0.5), 100, 200)
    assert all(action in BOX for action in actions[-1])
    share = (actions - BOX.low) / (BOX.high - BOX.low)
    for step in (0, 50, 99):  # uniform from the first step to the last
        for i in range(2):
            assert stats.kstest(share[step, :, i], "uniform").pvalue > 1e-3


def test_actions_change_smoothly() -> None:
    share = (rollout(smooth(correlation=0.95), 4000) - BOX.low) / (BOX.high - BOX.low)
    z = stats.norm.ppf(np.clip(share, 1e-6, 1 - 1e-6))
    assert np.corrcoef(z[1:, 0], z[:-1, 0])[0, 1] == pytest.approx(0.95, abs=0.02)
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.25  # dimensions move on their own
    assert np.abs(np.diff(share[:, 0])).mean() < 0.12  # 1/3 without correlation


def test_only_flagged_environments_start_anew() -> None:
    policy = smooth(correlation=0.9999, seed=4)
    _, state = policy.predict(np.zeros((3, 4)))
    flags = np.array([False, True, False])
    _, after = policy.predict(np.zeros((3, 4)), state, flags)
    moved = np.abs(after - state).max(axis=1)
    assert moved[1] > 0.3
    assert max(moved[0], moved[2]) < 0.1
    np.testing.assert_array_equal(flags, [False, True, False])


def test_smooth_random_repeats_after_reseed_and_without_noise() -> None:
    policy = smooth(seed=6)
    first = rollout(policy, 10)
    policy.reseed(6)
    np.testing.assert_array_equal(rollout(policy, 10), first)
    assert first.shape == (10, 2)
    _, state = policy.predict(np.zeros(4))
    calm = [policy.predict(np.zeros(4), state, deterministic=True)[0] for _ in range(2)]
    np.testing.assert_array_equal(calm[0], calm[1])


def test_smooth_random_reads_dict_observations() -> None:
    env = gym.make("CarUMaze-v0")
    policy = SmoothRandom(env.action_space, env.observation_space)
    observation, _ = env.reset(seed=0)
    action, _ = policy.predict(observation)
    assert action in env.action_space
    many = {key: np.stack([value] * 3) for key, value in observation.items()}
    assert policy.predict(many)[0].shape == (3, *action.shape)


def test_smooth_random_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="action_space"):
        SmoothRandom(spaces.Discrete(3), OBSERVATIONS)
    with pytest.raises(ConfigError, match="bounded"):
        SmoothRandom(spaces.Box(-np.inf, np.inf, (1,)), OBSERVATIONS)
    with pytest.raises(ConfigError, match="correlation"):
        smooth(correlation=1.0)
    with pytest.raises(InputError, match="tuple"):
        smooth().predict((np.zeros(4), {}))
    with pytest.raises(InputError, match="shape"):
        smooth().predict(np.zeros(5))
    with pytest.raises(InputError, match="state"):
        smooth().predict(np.zeros((2, 4)), np.zeros((3, 2)))
    with pytest.raises(InputError, match="episode_start"):
        smooth().predict(np.zeros((2, 4)), np.zeros((2, 2)), np.array([True]))


# PendulumSwingUp


def swing_up(policy: PendulumSwingUp, seed: int) -> tuple[float, float, bool]:
    """Return, cost and success of one episode."""
    env = gym.make("ConstrainedPendulum-v0")
    observation, _ = env.reset(seed=seed)
    total = cost = 0.0
    while True:
        action, _ = policy.predict(observation)
        observation, reward, _, truncated, info = env.step(action)
        total, cost = total + float(reward), cost + info["cost"]
        if truncated:
            return total, cost, bool(info["is_success"])


def test_constrained_task_is_solved_within_the_limit() -> None:
    results = [swing_up(PendulumSwingUp(velocity_limit=6.5), seed) for seed in range(20)]
    returns, costs, successes = map(np.array, zip(*results, strict=True))
    assert successes.all()
    assert costs.sum() == 0
    assert returns.mean() > -180.0


def test_without_the_limit_the_controller_exceeds_it() -> None:
    results = [swing_up(PendulumSwingUp(), seed) for seed in range(20)]
    returns, costs, _ = map(np.array, zip(*results, strict=True))
    assert (costs > 0).mean() > 0.3
    assert returns.mean() > -180.0


def test_swing_up_of_many_equals_one_by_one() -> None:
    angles = np.random.default_rng(0).uniform(-np.pi, np.pi, 50)
    speeds = np.random.default_rng(1).uniform(-8, 8, 50)
    rows = np.stack([np.cos(angles), np.sin(angles), speeds], axis=1)
    policy = PendulumSwingUp(velocity_limit=6.5)
    many, _ = policy.predict(rows)
    assert many.shape == (50, 1)
    assert all(action in policy.action_space for action in many)
    np.testing.assert_array_equal(many, np.stack([policy.predict(row)[0] for row in rows]))


@pytest.mark.parametrize("name", ["velocity_limit", "gravity", "mass", "length", "max_torque"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_swing_up_refuses_bad_constants(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        PendulumSwingUp(**{name: value})


def test_random_driver_never_touches_a_wall_and_keeps_moving() -> None:
    env = gym.make("CarUMaze-v0")
    policy = RandomDriver(env)
    speeds = []
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        policy.reseed(seed)
        state, ended = None, False
        while not ended:
            action, state = policy.predict(observation, state)
            observation, _, terminated, ended, _ = env.step(action)
            assert not terminated
            speeds.append(observation["observation"][3])
    assert np.std(speeds) > 0.5


def test_random_driver_follows_its_seed_and_takes_batches() -> None:
    env = gym.make("CarUMaze-v0")
    one, other = RandomDriver(env), RandomDriver(env)
    rows = [env.reset(seed=seed)[0] for seed in range(3)]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    for policy in (one, other):
        policy.reseed(5)
    first, _ = one.predict(batch)
    second, state = other.predict(batch)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (3, 2) and state.shape == (3, 2)
    with pytest.raises(ConfigError, match="CarUMaze"):
        RandomDriver(gym.make("Pendulum-v1"))


# NoisyPolicy


def with_errors(noise: float = 0.2, **kwargs: Any) -> tuple[NoisyPolicy, NoisyLQR]:
    """A policy with errors, and the one without; actions in [-1, 3]."""
    env = gym.Env[Any, Any]()
    env.action_space = spaces.Box(-1.0, 3.0, (2,), np.float64)
    env.observation_space = spaces.Box(-5.0, 5.0, (3,), np.float64)
    policy = NoisyLQR(GAIN, 0.0)
    return NoisyPolicy(policy, env, noise=noise, **kwargs), policy


def test_errors_are_a_share_of_the_range_of_actions() -> None:
    noisy, policy = with_errors(correlation=0.0)
    x = np.tile([-0.5, 0.0, -0.1], (4000, 1))
    errors = noisy.predict(x)[0] - policy.predict(x)[0]
    assert stats.kstest((errors.ravel() + 0.4) / 0.8, "uniform").pvalue > 1e-3
    np.testing.assert_allclose(noisy.predict(x, deterministic=True)[0], policy.predict(x)[0])


def test_errors_change_smoothly_follow_the_seed_and_keep_to_the_box() -> None:
    noisy, policy = with_errors(correlation=0.95)
    x, state, runs = np.array([-0.5, 0.0, -0.1]), None, []
    for _ in range(2):
        noisy.reseed(3)
        errors, state = [], None
        for _ in range(60):
            action, state = noisy.predict(x, state)
            errors.append(action - policy.predict(x)[0])
        runs.append(np.array(errors))
    np.testing.assert_array_equal(*runs)
    assert np.abs(np.diff(runs[0], axis=0)).mean() < 0.5 * runs[0].std()
    far, _ = noisy.predict(np.full((50, 3), 3.0))
    assert far.min() >= -1.0 and far.max() <= 3.0


def test_errors_start_anew_with_the_episode_and_a_failed_solver_shows() -> None:
    noisy, _ = with_errors(correlation=0.9999)
    x = np.zeros((2, 3))
    _, state = noisy.predict(x)
    _, after = noisy.predict(x, state, np.array([True, False]))
    changed = np.abs(after.z - state.z).max(axis=1)
    assert changed[0] > 0.2 > 0.1 > changed[1]
    assert state.solved is None
    assert replace(state, policy=SimpleNamespace(solved=False)).solved is False
    with pytest.raises(ConfigError, match="noise"):
        with_errors(-0.1)
