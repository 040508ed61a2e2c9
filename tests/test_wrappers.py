"""The wrappers on environments of a user's own."""

from __future__ import annotations

import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import FrameStackObservation, GrayscaleObservation

from mpd_gym.envs.wrappers import RemainingBudget, StackedFrames, TorqueDefect, VelocityLimit
from mpd_gym.errors import ConfigError, InputError, MpdError


class Slider(gym.Env):
    """Its velocity is the action; it observes a Dict, a vector or pictures."""

    action_space = spaces.Box(-2, 2, (3,), np.float32)

    def __init__(self, observation_space: spaces.Space) -> None:
        self.observation_space = observation_space

    def _observe(self) -> Any:
        if isinstance(self.observation_space, spaces.Dict):
            return {"speed": self.velocity.copy()}
        shape, dtype = self.observation_space.shape, self.observation_space.dtype
        if dtype != np.uint8:
            return self.velocity.copy()
        return np.arange(np.prod(shape), dtype=dtype).reshape(shape) + np.uint8(self.steps)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.velocity, self.steps, self.received = np.zeros(3, np.float32), 0, []
        return self._observe(), {"cost": 5.0, "start": True}

    def step(self, action):
        self.velocity = np.array(action, dtype=np.float32)
        self.steps += 1
        self.received.append(np.array(action))
        action *= 0  # a rude environment
        return self._observe(), 1.5, self.steps == 4, False, {"mine": self.steps}


VECTOR = spaces.Box(-9, 9, (3,), np.float32)


def test_velocity_limit_gives_a_cost_and_changes_nothing_else() -> None:
    env = VelocityLimit(gym.make("MountainCarContinuous-v0"), 0.01, velocity=1)
    bare = gym.make("MountainCarContinuous-v0")
    assert np.array_equal(env.reset(seed=0)[0], bare.reset(seed=0)[0])
    costs = []
    for step in range(150):
        action = np.array([np.sign(np.sin(step / 12))], np.float32)
        observed, *rest, info = env.step(action)
        expected, *expected_rest, expected_info = bare.step(action)
        assert np.array_equal(observed, expected) and rest == expected_rest
        costs.append(info.pop("cost"))
        assert costs[-1] == float(abs(observed[1]) > 0.01) and info == expected_info
    assert 0 < sum(costs) < 150


@pytest.mark.parametrize(
    ("space", "velocity"),
    [(VECTOR, 1), (VECTOR, -2), (spaces.Dict({"speed": VECTOR}), lambda seen: seen["speed"][1])],
)
def test_velocity_limit_takes_an_index_or_a_function(space: spaces.Space, velocity: Any) -> None:
    env = VelocityLimit(Slider(space), 1.0, velocity)
    _, info = env.reset()
    assert info == {"cost": 0.0, "start": True}
    for speed, cost in ((1.0, 0.0), (1.01, 1.0), (-1.0, 0.0), (-1.5, 1.0), (np.nan, 1.0)):
        info = env.step(np.array([2.0, speed, 2.0], np.float32))[-1]
        assert info["cost"] == cost and isinstance(info["cost"], float) and "mine" in info


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3)])
def test_frames_are_stacked_channel_first(shape: tuple[int, ...], count: int) -> None:
    env = StackedFrames(Slider(spaces.Box(0, 255, shape, np.uint8)), count)
    channels = shape[2] if len(shape) == 3 else 1
    assert env.observation_space == spaces.Box(0, 255, (count * channels, 4, 6), np.uint8)
    for _ in range(2):  # the second episode shows nothing of the first
        stack, _ = env.reset()
        first = np.arange(np.prod(shape), dtype=np.uint8).reshape(4, 6, channels)
        frames = [np.moveaxis(first, -1, 0)] * count
        assert np.array_equal(stack, np.concatenate(frames))
        for step in range(1, 4):
            frames.append(np.moveaxis(first + np.uint8(step), -1, 0))
            stack = env.step(np.zeros(3, np.float32))[0]
            assert stack in env.observation_space
            assert np.array_equal(stack, np.concatenate(frames[-count:]))
            stack[:] = 0  # a caller's change reaches nothing


def test_gray_frames_are_stacked_as_gymnasium_stacks_them() -> None:
    def gray() -> gym.Env:
        return GrayscaleObservation(Slider(spaces.Box(0, 255, (8, 8, 3), np.uint8)))

    ours, theirs = StackedFrames(gray(), 3), FrameStackObservation(gray(), 3)
    assert ours.observation_space == theirs.observation_space
    assert np.array_equal(ours.reset()[0], theirs.reset()[0])
    for _ in range(4):
        action = np.zeros(3, np.float32)
        assert np.array_equal(ours.step(action)[0], theirs.step(action)[0])


def test_stacking_needs_a_reset() -> None:
    env = StackedFrames(Slider(spaces.Box(0, 255, (4, 6), np.uint8)))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(3, np.float32))


def test_torque_defect_clips_one_dimension_on_a_copy() -> None:
    env = TorqueDefect(Slider(VECTOR), joint=-1, limit=0.5)
    assert env.action_space == Slider.action_space
    env.reset()
    for last, applied in ((2.0, 0.5), (-2.0, -0.5), (0.5, 0.5), (0.1, 0.1)):
        action = np.array([2.0, -3.0, last], np.float32)  # others pass, beyond the bounds too
        expected = np.array([2.0, -3.0, applied], np.float32)
        info = env.step(action)[-1]
        assert np.array_equal(action, np.array([2.0, -3.0, last], np.float32))
        assert np.array_equal(env.unwrapped.received[-1], expected)
        assert np.array_equal(info["applied_action"], expected)


def picture_space(*shape: int, dtype: type = np.uint8) -> spaces.Box:
    return spaces.Box(0, 255, shape, dtype)


@pytest.mark.fault("Spaces", "wrappers around spaces that they cannot serve", "refused")
@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: VelocityLimit(Slider(VECTOR), -1.0, 0), InputError, "limit"),
        (lambda: VelocityLimit(Slider(VECTOR), np.nan, 0), InputError, "limit"),
        (lambda: VelocityLimit(Slider(VECTOR), 1.0, 3), InputError, "velocity"),
        (lambda: VelocityLimit(Slider(VECTOR), 1.0, "v"), InputError, "velocity"),
        (lambda: VelocityLimit(Slider(spaces.Dict(v=VECTOR)), 1.0, 0), InputError, "velocity"),
        (lambda: StackedFrames(Slider(VECTOR)), InputError, "env.*AddRenderObservation"),
        (lambda: StackedFrames(Slider(picture_space(8))), InputError, "env"),
        (lambda: StackedFrames(Slider(picture_space(2, 2, 2, 2))), InputError, "env"),
        (lambda: StackedFrames(Slider(picture_space(8, 8, dtype=np.float32))), InputError, "env"),
        (lambda: StackedFrames(Slider(picture_space(8, 8)), 0), ConfigError, "count"),
        (lambda: StackedFrames(Slider(picture_space(8, 8)), 2.5), ConfigError, "count"),
        (lambda: TorqueDefect(Slider(VECTOR), 3, 0.5), InputError, "joint"),
        (lambda: TorqueDefect(Slider(VECTOR), -4, 0.5), InputError, "joint"),
        (lambda: TorqueDefect(Slider(VECTOR), 0, -0.5), InputError, "limit"),
        (lambda: TorqueDefect(gym.make("CartPole-v1"), 0, 0.5), InputError, "joint"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, error: type[MpdError], word: str) -> None:
    with pytest.raises(error, match=word):
        make()


def test_wrapped_environments_pickle_and_can_be_made_again() -> None:
    env = VelocityLimit(gym.make("Pendulum-v1"), 3.0, velocity=2)
    env = TorqueDefect(env, joint=0, limit=1.0)
    again = [pickle.loads(pickle.dumps(env)), gym.make(EnvSpec.from_json(env.spec.to_json()))]
    for copy in again:
        assert str(copy) == str(env)
        env.reset(seed=0)
        copy.reset(seed=0)
        for _ in range(20):
            ours, theirs = env.step(np.array([2.0])), copy.step(np.array([2.0]))
            assert np.array_equal(ours[0], theirs[0])
            assert ours[-1]["cost"] == theirs[-1]["cost"]


def test_remaining_budget_counts_costs_down_to_zero_and_starts_anew() -> None:
    box = spaces.Box(-9, 9, (3,), np.float32)
    env = RemainingBudget(VelocityLimit(Slider(box), 1.0, 0), 2.0)
    fast = np.array([1.5, 0, 0], np.float32)
    for _ in range(2):
        observation, _ = env.reset(seed=0)
        left = [observation["remaining_budget"].item()]
        for action in (fast, 0 * fast, fast, fast):
            observation, *_ = env.step(action.copy())
            left.append(observation["remaining_budget"].item())
        assert left == [2.0, 1.0, 1.0, 0.0, 0.0]
        assert env.observation_space.contains(observation)


def test_remaining_budget_extends_a_dict_and_needs_costs() -> None:
    env = RemainingBudget(Slider(spaces.Dict({"speed": spaces.Box(-9, 9, (3,), np.float32)})), 1.0)
    observation, _ = env.reset(seed=0)
    assert set(observation) == {"speed", "remaining_budget"}
    bare = RemainingBudget(gym.make("Pendulum-v1"), 1.0)
    bare.reset(seed=0)
    with pytest.raises(InputError, match="cost"):
        bare.step(bare.action_space.sample())
    with pytest.raises(InputError, match="budget"):
        RemainingBudget(gym.make("Pendulum-v1"), -1.0)
