"""The pendulums: Pendulum-v1's numbers, the velocity limit, success, and frames."""

from __future__ import annotations

import hashlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv as GymnasiumPendulum

import mpd_gym  # noqa: F401  (registers the ids)
from mpd_gym.envs import image_pendulum
from mpd_gym.envs.constrained_pendulum import (
    HOLD_STEPS,
    ConstrainedPendulumVectorEnv,
    is_upright,
    observation,
    reward,
    transition,
)
from mpd_gym.envs.image_pendulum import draw
from mpd_gym.envs.pendulum_model import PendulumParameters
from mpd_gym.errors import InputError

IDS = ["ConstrainedPendulum-v0", "ImagePendulum-v0"]


def balancing_torque(observed: np.ndarray) -> np.ndarray:
    """A controller that holds the pendulum up once it is near."""
    angle = np.arctan2(observed[..., 1], observed[..., 0])
    return np.clip(-20.0 * angle - 5.0 * observed[..., 2], -2.0, 2.0)[..., None]


@pytest.mark.parametrize(
    "constants",
    [{}, {"g": 9.81}, {"m": 0.7, "l": 1.3, "dt": 0.02, "max_speed": 3.0, "max_torque": 4.0}],
)
def test_is_pendulum_v1(constants: dict[str, float]) -> None:
    theirs = GymnasiumPendulum()
    for name, value in constants.items():
        setattr(theirs, name, value)
    ours = gym.make("ConstrainedPendulum-v0", **constants)
    images = gym.make("ImagePendulum-v0", **constants)
    rng = np.random.default_rng(0)
    clipped = 0
    for seed in range(5):
        expected, _ = theirs.reset(seed=seed)
        assert np.array_equal(ours.reset(seed=seed)[0], expected)
        images.reset(seed=seed)
        bias = rng.uniform(-1, 1)
        for _ in range(200):
            torque = 3 * theirs.max_torque * (rng.uniform(-1, 1, 1) + bias)  # clipped at times
            expected, gained, *_ = theirs.step(torque)
            observed, our_gain, *_ = ours.step(torque)
            assert np.array_equal(observed, expected) and observed.dtype == expected.dtype
            assert our_gain == pytest.approx(gained, rel=1e-14)
            _, image_gain, _, _, info = images.step(torque)
            assert image_gain == our_gain and np.array_equal(info["state"], theirs.state)
            clipped += abs(theirs.state[1]) == theirs.max_speed
    assert clipped > 0


@pytest.mark.parametrize("name", IDS)
def test_spaces_and_bounds_of_starts_are_pendulum_v1s(name: str) -> None:
    theirs, ours = gym.make("Pendulum-v1"), gym.make(name)
    assert ours.action_space == theirs.action_space
    options = {"x_init": 0.3, "y_init": 0.1}
    theirs.reset(seed=4, options=options)
    ours.reset(seed=4, options=options)
    assert np.array_equal(ours.unwrapped.state, theirs.unwrapped.state)
    assert gym.make("ConstrainedPendulum-v0").observation_space == theirs.observation_space


def test_functions_are_vectorised() -> None:
    rng = np.random.default_rng(1)
    states, actions = rng.normal(0, 4, (3, 5, 2)), rng.normal(0, 2, (3, 5, 1))
    moved, gained, seen = transition(states, actions), reward(states, actions), observation(states)
    assert moved.shape == (3, 5, 2) and gained.shape == (3, 5) and seen.shape == (3, 5, 3)
    for index in np.ndindex(3, 5):
        assert np.array_equal(moved[index], transition(states[index], actions[index]))
        assert gained[index] == reward(states[index], actions[index])
        assert np.array_equal(seen[index], observation(states[index]))


@pytest.mark.parametrize("name", IDS)
def test_the_start_can_be_given_exactly(name: str) -> None:
    env = gym.make(name)
    env.reset(seed=0, options={"state": [2.0, -7.9]})
    assert np.array_equal(env.unwrapped.state, [2.0, -7.9])
    for wrong in ([1.0], [np.inf, 0.0], [0.0, 8.1], "up"):
        with pytest.raises(InputError, match="options"):
            env.reset(options={"state": wrong})
    for wrong in ({"y_init": 9.0}, {"x_init": -1.0}, {"x_init": "wide"}, {"theta": 0.0}):
        with pytest.raises(InputError, match="options"):
            env.reset(options=wrong)
    assert np.array_equal(env.unwrapped.state, [2.0, -7.9])


def test_cost_is_one_on_every_step_beyond_the_limit() -> None:
    env = gym.make("ConstrainedPendulum-v0")
    _, info = env.reset(options={"state": [np.pi, 8.0]})
    assert info["cost"] == 0.0
    costs, speeds = [], []
    for _ in range(60):
        observed, _, terminated, _, info = env.step([0.0])
        assert not terminated and isinstance(info["cost"], float)
        costs.append(info["cost"])
        speeds.append(abs(float(observed[2])))
    assert costs == [1.0 if speed > 6.5 else 0.0 for speed in speeds]
    assert 0 < sum(costs) < 60


@pytest.mark.parametrize("make", ["single", "batched"])
def test_the_limit_itself_is_allowed(make: str) -> None:
    """Without gravity and torque the velocity stays: 6.5 is no violation, the next number is."""
    for speed, cost in ((6.5, 0.0), (np.nextafter(np.float32(6.5), np.float32(7)), 1.0)):
        if make == "single":
            env = gym.make("ConstrainedPendulum-v0", g=0.0)
            env.reset(options={"state": [0.0, -float(speed)]})
            assert env.step([0.0])[-1]["cost"] == cost
        else:
            batched = ConstrainedPendulumVectorEnv(2, g=0.0)
            batched.reset(options={"state": [0.0, -float(speed)]})
            assert batched.step(np.zeros((2, 1)))[-1]["cost"].tolist() == [cost, cost]


def test_upright_is_within_both_bounds() -> None:
    states = np.array([[0.19, 0.49], [-0.19, -0.49], [0.21, 0.0], [0.0, 0.51], [np.pi, 0.0]])
    states = np.concatenate([states, states + np.array([2 * np.pi, 0.0])])
    assert is_upright(observation(states)).tolist() == 2 * [True, True, False, False, False]


def test_success_is_twenty_steps_upright_without_a_violation() -> None:
    env = gym.make("ConstrainedPendulum-v0")

    def hold(observed: np.ndarray, steps: int) -> list[bool]:
        flags = []
        for _ in range(steps):
            observed, _, _, _, info = env.step(balancing_torque(observed))
            assert type(info["is_success"]) is bool
            flags.append(info["is_success"])
        return flags

    observed, info = env.reset(options={"state": [0.05, 0.0]})
    assert info["is_success"] is False
    assert hold(observed, 200) == 19 * [False] + 181 * [True]

    observed, _ = env.reset(options={"state": [0.05, 0.0]})  # the count starts anew
    hold(observed, 10)
    env.unwrapped.state = np.array([0.3, 0.0])  # leaves the upright range for some steps
    flags = hold(observation(env.unwrapped.state), 60)
    first = flags.index(True)
    assert first >= HOLD_STEPS and all(flags[first:])

    env.reset(options={"state": [0.0, 7.5]})
    assert env.step([0.0])[-1]["cost"] == 1.0
    env.unwrapped.state = np.array([0.0, 0.0])
    assert not any(hold(observation(env.unwrapped.state), 100))

    observed, _ = env.reset(options={"state": [0.05, 0.0]})  # the violation is forgotten
    assert hold(observed, 25)[-1]


def test_batched_success_agrees_with_single() -> None:
    single = gym.make_vec("ConstrainedPendulum-v0", num_envs=12, vectorization_mode="sync")
    batched = gym.make_vec("ConstrainedPendulum-v0", num_envs=12)
    for options in ({"x_init": 0.3, "y_init": 0.5}, {"x_init": 0.1, "y_init": 8.0}):
        observed, _ = single.reset(seed=0, options=dict(options))
        batched.reset(seed=0, options=options)
        ends = []
        for _ in range(200):
            torque = balancing_torque(observed)
            observed, _, _, _, theirs = single.step(torque)
            ours = batched.step(torque)[-1]
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert (
                    np.array_equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
                )
            ends = ours["is_success"]
        assert ends.any()


@pytest.mark.parametrize(
    "constants", [{"m": 0.0}, {"l": -1.0}, {"dt": np.nan}, {"g": -1.0}, {"max_torque": "big"}]
)
def test_constants_out_of_range_are_refused(constants: dict[str, Any]) -> None:
    for name in IDS:
        with pytest.raises(InputError, match=next(iter(constants))):
            gym.make(name, **constants)
    with pytest.raises(InputError, match=next(iter(constants))):
        PendulumParameters(**constants)


def test_a_limit_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="limit"):
        gym.make("ConstrainedPendulum-v0", limit=-1.0)
    with pytest.raises(InputError, match="limit"):
        ConstrainedPendulumVectorEnv(2, limit=np.nan)


def test_the_picture_turns_red_beyond_the_limit() -> None:
    env = gym.make("ConstrainedPendulum-v0", render_mode="rgb_array", limit=5.0)
    reds = []
    for speed in (4.5, 5.5):
        env.reset(options={"state": [np.pi / 2, speed]})
        red, green, blue = np.moveaxis(env.render().astype(int), -1, 0)
        reds.append(((red > 200) & (green < 80) & (blue < 80)).sum())
    env.close()
    assert reds[1] > 20 * max(reds[0], 1)


# Frames


def test_frames_are_the_same_on_every_machine() -> None:
    frames = draw(np.linspace(-10.0, 10.0, 101))
    digest = hashlib.sha256(frames.tobytes()).hexdigest()
    assert digest == "091ec9ac98f7eae8aad47e188f9a066a19a8dc4e951abe82e8985ac47aa52652"


def test_the_table_of_directions_rounds_the_same_everywhere() -> None:
    """Sines differ in the last bit between machines; no entry lies near enough to a half for it."""
    angles = np.arange(image_pendulum._DIRECTIONS) * (2 * np.pi / image_pendulum._DIRECTIONS)
    exact = image_pendulum._FINE * np.stack([-np.sin(angles), np.cos(angles)], axis=-1)
    assert np.abs(np.abs(exact % 1.0) - 0.5).min() > 1e-6


def test_frames_are_centred_and_point_where_the_pendulum_does() -> None:
    angles = np.random.default_rng(0).uniform(-np.pi, np.pi, 300)
    frames = draw(angles).astype(float)
    rows, columns = np.mgrid[0:64, 0:64] - 31.5
    mass = frames.sum(axis=(1, 2))
    right, up = (frames * columns).sum((1, 2)) / mass, (frames * -rows).sum((1, 2)) / mass
    error = np.angle(np.exp(1j * (np.arctan2(-right, up) - angles)))
    assert np.abs(error).max() < 0.01
    np.testing.assert_allclose(np.hypot(right, up), 13.0, atol=0.1)
    np.testing.assert_allclose(mass, mass.mean(), rtol=0.01)
    assert frames.max() == 255 and frames.min() == 0
    assert (frames[:, [0, -1]] == 0).all() and (frames[:, :, [0, -1]] == 0).all()


def test_frames_have_the_symmetries_of_the_pendulum() -> None:
    angles = np.random.default_rng(1).uniform(-20, 20, 50)
    frames = draw(angles)
    assert np.array_equal(draw(-angles), frames[:, :, ::-1])
    assert np.array_equal(draw(angles + np.pi), frames[:, ::-1, ::-1])
    assert np.array_equal(draw(angles + np.pi / 2), np.rot90(frames, axes=(1, 2)))


def test_frames_are_anti_aliased() -> None:
    """A turn of 0.2° can be seen."""
    frames = draw(np.deg2rad([10.0, 10.2]))
    assert (frames[0] != frames[1]).any()
    assert ((frames > 0) & (frames < 255)).any()


def test_drawing_is_vectorised() -> None:
    angles = np.random.default_rng(2).uniform(-4, 4, (7, 11))
    frames = draw(angles)
    assert frames.shape == (7, 11, 64, 64) and frames.dtype == np.uint8
    for index in np.ndindex(7, 11):
        assert np.array_equal(frames[index], draw(angles[index]))
    assert draw(0.0).shape == (64, 64) and draw([]).shape == (0, 64, 64)
    with pytest.raises(InputError, match="angle"):
        draw([0.0, np.nan])


def test_observations_are_the_last_four_frames() -> None:
    env = gym.make("ImagePendulum-v0")
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 64, 64), np.uint8)
    for seed in range(2):  # the second episode shows nothing of the first
        stack, info = env.reset(seed=seed)
        assert np.array_equal(stack, [draw(info["state"][0])] * 4)
        frames = list(stack)
        for _ in range(10):
            stack, _, _, _, info = env.step(env.action_space.sample())
            frames.append(draw(info["state"][0]))
            assert np.array_equal(stack, frames[-4:])
            stack[:] = 7  # a caller's change reaches nothing
            info["state"][:] = 7.0
