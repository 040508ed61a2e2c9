"""Walker2dTorqueDefect-v0: Walker2d but for one torque."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import mpd_gym  # noqa: F401  (registers the ids)
from mpd_gym.errors import ConfigError, InputError, MissingExtraError

ID = "Walker2dTorqueDefect-v0"


@pytest.fixture
def walker(request: pytest.FixtureRequest) -> gym.Env:
    pytest.importorskip("mujoco")
    env = gym.make(ID, **getattr(request, "param", {}))
    env.reset(seed=0)
    return env


def original(version: str) -> gym.Env:
    if version == "v4":
        with pytest.warns(DeprecationWarning, match="out of date"):
            return gym.make("Walker2d-v4")
    return gym.make(f"Walker2d-{version}")


@pytest.mark.parametrize("version", ["v5", "v4"])
def test_without_a_defect_it_is_walker2d(version: str) -> None:
    pytest.importorskip("mujoco")
    ours, theirs = gym.make(ID, version=version, limit=1.0), original(version)
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    assert ours.spec.max_episode_steps == theirs.spec.max_episode_steps
    ours.action_space.seed(0)
    for seed in range(3):
        assert np.array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
        ended = False
        while not ended:
            action = ours.action_space.sample()
            observed, gained, ended, _, info = ours.step(action)
            expected, reward, terminated, _, expected_info = theirs.step(action)
            assert np.array_equal(observed, expected) and gained == reward and ended == terminated
            assert np.array_equal(info.pop("applied_action"), action)
            assert info == expected_info


@pytest.mark.parametrize(
    ("walker", "joint", "limit"),
    [({}, 2, 0.5)] + [({"joint": j, "limit": 0.25}, j, 0.25) for j in range(6)],
    indirect=["walker"],
)
def test_exactly_one_torque_is_clipped(walker: gym.Env, joint: int, limit: float) -> None:
    rng = np.random.default_rng(joint)
    for _ in range(20):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        action[rng.integers(6)] = rng.choice([-1.0, 1.0])
        _, _, terminated, _, info = walker.step(action)
        expected = action.copy()
        expected[joint] = np.clip(action[joint], -limit, limit)
        assert np.array_equal(info["applied_action"], expected)
        assert info["applied_action"].dtype == np.float32
        assert np.array_equal(walker.unwrapped.data.ctrl, expected)  # what MuJoCo got
        if terminated:
            walker.reset()


def test_the_defect_is_walker2d_with_the_clipped_action(walker: gym.Env) -> None:
    theirs = gym.make("Walker2d-v5")
    theirs.reset(seed=0)
    action = np.array([0.3, -0.2, 0.9, 0.1, 0.0, -0.8], np.float32)
    observed, gained, *_ = walker.step(action)
    action[2] = 0.5
    expected, reward, *_ = theirs.step(action)
    assert np.array_equal(observed, expected) and gained == reward


def test_infos_keep_no_action_of_the_caller(walker: gym.Env) -> None:
    action = np.zeros(6, np.float32)
    info = walker.step(action)[-1]
    info["applied_action"][:] = 9.0
    assert (action == 0).all() and (walker.unwrapped.data.ctrl == 0).all()


def test_a_nan_never_reaches_mujoco(walker: gym.Env) -> None:
    data = walker.unwrapped.data
    before = data.qpos.copy(), data.qvel.copy(), data.ctrl.copy(), data.time
    with pytest.raises(InputError, match="finite"):
        walker.step(np.array([0, 0, np.nan, 0, 0, 0], np.float32))
    for kept, now in zip(before, (data.qpos, data.qvel, data.ctrl, data.time), strict=True):
        assert np.array_equal(kept, now)


@pytest.mark.parametrize(
    ("keywords", "error", "word"),
    [
        ({"version": "v3"}, ConfigError, "version"),
        ({"joint": 6}, InputError, "joint"),
        ({"joint": 1.5}, InputError, "joint"),
        ({"limit": -0.1}, InputError, "limit"),
        ({"limit": float("nan")}, InputError, "limit"),
    ],
)
def test_wrong_arguments_are_refused(
    keywords: dict[str, Any], error: type[Exception], word: str
) -> None:
    pytest.importorskip("mujoco")
    with pytest.raises(error, match=word):
        gym.make(ID, **keywords)


@pytest.mark.parametrize("walker", [{"healthy_reward": 3.0, "frame_skip": 2}], indirect=True)
def test_walker2ds_own_arguments_go_through(walker: gym.Env) -> None:
    assert walker.unwrapped.frame_skip == 2
    assert walker.step(np.zeros(6, np.float32))[-1]["reward_survive"] == 3.0


def test_without_mujoco_the_error_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mpd-gym\[mujoco\]'"):
        gym.make(ID)


def test_render_modes_are_walker2ds() -> None:
    pytest.importorskip("mujoco")
    from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv

    from mpd_gym.envs.walker2d_torque_defect import METADATA

    assert set(METADATA["render_modes"]) >= set(Walker2dEnv.metadata["render_modes"])
    assert gym.make(ID).metadata["render_modes"] == METADATA["render_modes"]
    assert gym.make(ID).metadata["render_fps"] == METADATA["render_fps"]
