"""Batched environments give what `SyncVectorEnv` gives for single copies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from mpd_gym.envs.batched import BatchedEnv
from mpd_gym.envs.car_umaze import CarUMazeEnv, CarUMazeVectorEnv
from mpd_gym.errors import InputError

COPIES, LIMIT = 7, 20
MODES = list(AutoresetMode)


class Walk(gym.Env):
    """A random-start walk that ends beyond ±2; reset and step give different infos."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        start = (options or {}).get("start")
        self.position = self.np_random.uniform(-1, 1) if start is None else float(start)
        return np.array([self.position, 0.0]), {"start": self.position, "kind": 1}

    def step(self, action):
        before, self.position = self.position, self.position + float(action[0])
        info = {"moves": np.array([before, self.position]), "kind": 2, "left": self.position < 0}
        observation = np.array([self.position, before])
        return observation, -self.position, abs(self.position) > 2, False, info


class BatchedWalk(BatchedEnv):
    def __init__(self, num_envs, **kwargs):
        spaces_of_one = {
            "observation_space": Walk.observation_space,
            "action_space": Walk.action_space,
        }
        super().__init__(num_envs, **spaces_of_one, **kwargs)

    def _initial(self, generators, options):
        start = options.get("start")
        row = [g.uniform(-1, 1) if start is None else float(start) for g in generators]
        states = np.column_stack([row, np.zeros(len(row))])
        return states, {"start": states[:, 0].copy(), "kind": np.ones(len(row), dtype=int)}

    def _advance(self, states, actions):
        position = states[:, 0] + actions[:, 0]
        following = np.column_stack([position, states[:, 0]])
        infos = {
            "moves": following[:, ::-1].copy(),
            "kind": np.full(len(states), 2),
            "left": position < 0,
        }
        return following, -position, np.abs(position) > 2, infos

    def _observe(self, states):
        return states.copy()


def walks(mode: AutoresetMode) -> tuple[BatchedEnv, SyncVectorEnv]:
    batched = BatchedWalk(COPIES, max_episode_steps=LIMIT, autoreset_mode=mode)
    return batched, copies(Walk, mode)


def cars(mode: AutoresetMode, **constants: Any) -> tuple[BatchedEnv, SyncVectorEnv]:
    limits = {"max_episode_steps": LIMIT, "autoreset_mode": mode}
    return CarUMazeVectorEnv(COPIES, **limits, **constants), copies(
        lambda: CarUMazeEnv(**constants), mode
    )


def dense_cars(mode: AutoresetMode) -> tuple[BatchedEnv, SyncVectorEnv]:
    return cars(mode, reward_type="dense", max_acceleration=5.0)


def copies(make: Callable[[], gym.Env], mode: AutoresetMode) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: TimeLimit(make(), LIMIT)] * COPIES, autoreset_mode=mode)


def assert_same(actual: Any, expected: Any, path: str = "") -> None:
    """Equal keys, types, shapes and dtypes; numbers within 1e-12."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_same(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, np.ndarray) and expected.dtype == object:
        assert actual.dtype == object and actual.shape == expected.shape, path
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{path}[{index}]")
    elif expected is None:
        assert actual is None, path
    else:
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, path
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12, err_msg=path)


def biased_actions(env: gym.vector.VectorEnv, steps: int, seed: int) -> np.ndarray:
    """Random actions that drift, so that some copies terminate and others reach the time limit."""
    rng = np.random.default_rng(seed)
    shape = env.action_space.shape
    drift = np.linspace(0, 0.2, COPIES)[:, None] * np.eye(1, shape[1])
    return (0.4 * rng.uniform(-1, 1, (steps, *shape)) + drift) * env.action_space.high


@pytest.mark.parametrize("make", [walks, cars, dense_cars])
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_single_copies_through_ends_and_resets(make, mode) -> None:
    batched, single = make(mode)
    for actual, expected in zip(batched.reset(seed=5), single.reset(seed=5), strict=True):
        assert_same(actual, expected, "reset")
    terminations = truncations = 0
    for actions in biased_actions(batched, 150, seed=3):
        ours, theirs = batched.step(actions), single.step(actions)
        for name, actual, expected in zip(
            ("observation", "reward", "terminated", "truncated", "info"), ours, theirs, strict=True
        ):
            assert_same(actual, expected, name)
        terminations += ours[2].sum()
        truncations += ours[3].sum()
        ended = ours[2] | ours[3]
        if mode is AutoresetMode.DISABLED and ended.any():
            results = [env.reset(options={"reset_mask": ended.copy()}) for env in (batched, single)]
            for actual, expected in zip(*results, strict=True):
                assert_same(actual, expected, "masked reset")
    assert terminations > 10 and truncations > 10


@pytest.mark.parametrize("make", [walks, cars])
def test_seeds_and_masks_agree_with_single_copies(make) -> None:
    batched, single = make(AutoresetMode.NEXT_STEP)
    seeds = [11, 3, 11, 400, 5, 6, 7]
    assert_same(batched.reset(seed=seeds)[0], single.reset(seed=seeds)[0])
    assert batched.np_random_seed == single.np_random_seed == tuple(seeds)
    mask = np.arange(COPIES) % 2 == 0
    results = [env.reset(seed=90, options={"reset_mask": mask}) for env in (batched, single)]
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)
    assert batched.np_random_seed == (90, 3, 92, 400, 94, 6, 96)
    draws = [[g.random() for g in env.np_random] for env in (batched, single)]
    assert draws[0] == draws[1]


def test_unseeded_copies_differ_and_keep_their_generators() -> None:
    env = BatchedWalk(COPIES)
    first = env.reset()[0]
    assert len(np.unique(first[:, 0])) == COPIES
    seeds = env.np_random_seed
    assert not np.array_equal(env.reset()[0], first)
    assert env.np_random_seed == seeds
    env.reset(seed=[1, *[None] * (COPIES - 1)])
    assert env.np_random_seed == (1, *seeds[1:])


def test_options_reach_every_copy_and_are_left_as_they_were() -> None:
    env = BatchedWalk(COPIES)
    env.reset(seed=0)
    options = {"start": 0.5, "reset_mask": np.arange(COPIES) < 2}
    observations, infos = env.reset(options=options)
    assert (observations[:2, 0] == 0.5).all() and (observations[2:, 0] != 0.5).all()
    assert infos["_start"].tolist() == [True, True] + [False] * 5
    assert set(options) == {"start", "reset_mask"}


def test_actions_of_resetting_copies_are_ignored() -> None:
    env = BatchedWalk(2)
    env.reset(options={"start": 1.5})
    _, _, terminated, _, _ = env.step(np.array([[1.0], [-1.0]]))
    assert terminated.tolist() == [True, False]
    observations, rewards, terminated, _, infos = env.step(np.array([[np.nan], [0.25]]))
    assert abs(observations[0, 0]) <= 1 and rewards[0] == 0 and not terminated.any()
    assert observations[1, 0] == 0.75
    assert infos["_start"].tolist() == [True, False]
    assert infos["_moves"].tolist() == [False, True]


@pytest.mark.parametrize(
    "actions",
    [np.zeros((COPIES, 2)), np.zeros(COPIES), np.full((COPIES, 1), np.inf), "go", [[1], [1, 2]]],
)
def test_bad_actions_change_nothing(actions) -> None:
    env, twin = BatchedWalk(COPIES), BatchedWalk(COPIES)
    env.reset(seed=1), twin.reset(seed=1)
    with pytest.raises(InputError, match="actions: expected"):
        env.step(actions)
    good = np.full((COPIES, 1), 0.1)
    for actual, expected in zip(env.step(good), twin.step(good), strict=True):
        assert_same(actual, expected)


@pytest.mark.fault(
    "Observations and actions", "one bad row in a batch of actions", "refused; nothing changes"
)
def test_one_bad_row_is_found() -> None:
    env = BatchedWalk(COPIES)
    env.reset(seed=1)
    actions = np.zeros((COPIES, 1))
    actions[4] = np.nan
    with pytest.raises(InputError, match="finite"):
        env.step(actions)


@pytest.mark.fault(
    "Observations and actions",
    "observations that the caller changes",
    "the environment does not see it",
)
def test_returned_arrays_are_the_callers_own() -> None:
    env, twin = (CarUMazeVectorEnv(3, max_episode_steps=5) for _ in range(2))
    observations, _ = env.reset(seed=2)
    twin.reset(seed=2)
    for _ in range(12):
        for value in observations.values():
            value += 100.0
        actions = np.ones((3, 2))
        observations, rewards, terminated, truncated, infos = env.step(actions)
        assert (actions == 1).all()
        expected = twin.step(np.ones((3, 2)))
        assert_same(observations, expected[0])
        rewards -= 5
        terminated[:] = truncated[:] = True
        infos["collision"][:] = True


@pytest.mark.parametrize("mode", MODES)
def test_pickled_copy_goes_on_alike(mode) -> None:
    env = CarUMazeVectorEnv(3, max_episode_steps=6, autoreset_mode=mode)
    env.reset(seed=4)
    for _ in range(4):
        env.step(np.ones((3, 2)))
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(2):
        for actual, expected in zip(
            env.step(np.zeros((3, 2))), twin.step(np.zeros((3, 2))), strict=True
        ):
            assert_same(actual, expected)


def test_reset_is_needed() -> None:
    env = BatchedWalk(2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(np.zeros((2, 1)))
    with pytest.raises(ResetNeeded, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.reset(options={"start": 1.5})
    env.step(np.array([[1.0], [0.0]]))
    with pytest.raises(ResetNeeded, match=r"copies \[0\] have ended"):
        env.step(np.zeros((2, 1)))
    env.reset(options={"reset_mask": np.array([True, False])})
    env.step(np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_envs": 0}, "num_envs: expected a positive integer, got 0"),
        ({"num_envs": 2.5}, "num_envs"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"autoreset_mode": "Sometimes"}, "autoreset_mode: expected one of .*NextStep.*Sometimes"),
        ({"render_mode": "rgb_array"}, "render_mode: .*vectorization_mode='sync'"),
    ],
)
def test_arguments_are_checked(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        BatchedWalk(**{"num_envs": 2, **arguments})


@pytest.mark.parametrize(
    "mask", [[True, False], np.array([1, 0]), np.array([True]), np.zeros(2, dtype=bool)]
)
def test_masks_are_checked(mask) -> None:
    env = BatchedWalk(2)
    env.reset(seed=0)
    with pytest.raises(InputError, match="reset_mask"):
        env.reset(options={"reset_mask": mask})


def test_seed_list_needs_one_seed_for_each_copy() -> None:
    with pytest.raises(InputError, match="one for each of 2 copies, got 3"):
        BatchedWalk(2).reset(seed=[1, 2, 3])


def test_make_vec_and_vector_wrappers_take_it() -> None:
    gym.register(
        "BatchedTest/Walk-v0",
        entry_point=Walk,
        vector_entry_point=BatchedWalk,
        max_episode_steps=LIMIT,
    )
    try:
        env = gym.make_vec("BatchedTest/Walk-v0", num_envs=3, autoreset_mode="SameStep")
        assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
        assert env.max_episode_steps == LIMIT
        env = gym.wrappers.vector.RecordEpisodeStatistics(env)
        env.reset(seed=0, options={"start": 0.0})
        for _ in range(LIMIT):
            *_, truncated, infos = env.step(np.zeros((3, 1), dtype=np.float32))
        assert truncated.all() and (infos["episode"]["l"] == LIMIT).all()
        env.close()
    finally:
        gym.registry.pop("BatchedTest/Walk-v0")
