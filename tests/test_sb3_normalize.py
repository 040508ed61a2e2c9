"""Policies trained under VecNormalize: the same actions, a warning without statistics, no code."""

from __future__ import annotations

import base64
import json
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from mpd_gym.collect.sb3 import SB3Policy, load_sb3
from mpd_gym.collect.sb3_normalize import trained_normalized
from mpd_gym.errors import CheckpointError, InputError
from mpd_gym.evaluation.comparison import load_entries
from mpd_gym.evaluation.returns import evaluate

ANGLE = spaces.Box(-np.pi, np.pi, (2,), np.float32)
FREE = spaces.Box(-np.inf, np.inf, (2, 2), np.float64)
PARTS = spaces.Dict(angle=ANGLE, free=FREE)


class Numbers(gym.Env[Any, Any]):
    """Random observations, far from normalised."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.observation_space = space
        self.action_space = spaces.Box(-2.0, 2.0, (1,), np.float32)

    def look(self) -> Any:
        wide = {"angle": self.np_random.uniform(1, 3, 2).astype(np.float32),
                "free": self.np_random.normal(50.0, 20.0, (2, 2))}  # fmt: skip
        return wide if self.observation_space is PARTS else wide["free"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.look(), 1.0, False, self.t == 10, {}


def trained(folder: Path, make: Any, algorithm: Any = PPO, normal: Any = None) -> tuple[Any, Any]:
    """A model and its environments, saved as model.zip and, under VecNormalize, statistics.pkl."""
    venv: Any = DummyVecEnv([make])
    if normal is not None:
        venv = VecNormalize(venv, **normal)
    kind = "MultiInputPolicy" if isinstance(venv.observation_space, spaces.Dict) else "MlpPolicy"
    sizes: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 1}
    if algorithm is SAC:
        sizes = {"buffer_size": 100, "learning_starts": 100}
    model = algorithm(kind, venv, device="cpu", seed=0, **sizes).learn(64)
    model.save(folder / "model.zip")
    if normal is not None:
        venv.save(folder / "statistics.pkl")
        venv.training = False
    return model, venv


@pytest.mark.parametrize(
    ("space", "normal"),
    [
        (FREE, {"clip_obs": 1.5}),
        (PARTS, {}),
        (PARTS, {"norm_obs_keys": ["free"], "epsilon": 0.5}),
        (FREE, {"norm_obs": False}),
    ],
)
def test_actions_are_those_of_sb3(space: Any, normal: dict[str, Any], tmp_path: Path) -> None:
    model, venv = trained(tmp_path, lambda: Numbers(space), normal=normal)
    policy = load_sb3(
        tmp_path / "model.zip", Numbers(space), vecnormalize=tmp_path / "statistics.pkl"
    )
    env = Numbers(space)
    env.reset(seed=1)
    for observation in (env.look(), venv.reset()):
        before = pickle.dumps(observation)
        found, _ = policy.predict(observation, deterministic=True)
        expected, _ = model.predict(venv.normalize_obs(observation), deterministic=True)
        np.testing.assert_array_equal(found, expected)
        assert pickle.dumps(observation) == before
    for other in ((env.look(), {}), np.zeros(1)):
        with pytest.raises(InputError, match="observation: expected one of"):
            policy.predict(other)


@pytest.mark.fault(
    "Policies",
    "an SB3 policy trained under VecNormalize, with its statistics and without",
    "the returns of SB3; a warning that names the option",
)
def test_it_plays_as_it_was_trained(tmp_path: Path) -> None:
    model, venv = trained(tmp_path, lambda: gym.make("Pendulum-v1"), normal={})
    expected = []
    for seed in range(3):
        venv.seed(seed)
        observation, done, rewards = venv.reset(), False, 0.0
        while not done:
            action, _ = model.predict(observation, deterministic=True)
            observation, _, (done,), _ = venv.step(action)
            rewards += venv.get_original_reward()[0]
        expected.append(rewards)
    text = f"sb3:{tmp_path / 'model.zip'}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (entry,) = load_entries(
            [f"x={text},vecnormalize={tmp_path / 'statistics.pkl'}"], "Pendulum-v1"
        )
    found = evaluate(entry.policy, "Pendulum-v1", seeds=3, num_envs=3, deterministic=True)
    np.testing.assert_allclose(found.returns, expected, rtol=1e-4)
    with pytest.warns(UserWarning, match=r"model.zip: was trained under VecNormalize.*=FILE"):
        (entry,) = load_entries([text], "Pendulum-v1")
    found = evaluate(entry.policy, "Pendulum-v1", seeds=3, num_envs=3, deterministic=True)
    assert np.abs(found.returns - expected).min() > 1.0


@pytest.mark.fault(
    "Policies",
    "a model of SB3 itself that was trained under VecNormalize",
    "a warning with the way",
)
def test_models_that_sb3_loaded_are_noticed(tmp_path: Path) -> None:
    model, venv = trained(tmp_path, lambda: gym.make("Pendulum-v1"), normal={})
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    for policy in (model, loaded):
        with pytest.warns(UserWarning, match="policy: was trained under VecNormalize.*statistics="):
            evaluate(policy, "Pendulum-v1", seeds=1)
    plain, _ = trained(tmp_path, lambda: gym.make("Pendulum-v1"))
    given = SB3Policy(model.policy, statistics=venv.normalize_obs)
    file = load_sb3(tmp_path / "model.zip", "Pendulum-v1", vecnormalize=tmp_path / "statistics.pkl")
    x = np.float32([[0.6, 0.8, 5.0]])
    expected, _ = model.predict(venv.normalize_obs(x), deterministic=True)
    np.testing.assert_array_equal(given.predict(x, deterministic=True)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in (plain, given, file):
            evaluate(policy, "Pendulum-v1", seeds=1)


@pytest.mark.parametrize("algorithm", [PPO, SAC])
@pytest.mark.parametrize("space", [FREE, PARTS])
def test_a_file_shows_whether_it_was_trained_normalized(
    algorithm: Any, space: Any, tmp_path: Path
) -> None:
    for normal, expected in ((None, False), ({"norm_obs": False}, None), ({}, True)):
        trained(tmp_path, lambda: Numbers(space), algorithm, normal)
        fields = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
        if expected is not None or space is FREE:  # float32 of PPO may be normalised or not
            assert trained_normalized(fields, space) is bool(expected)


def test_observations_beyond_their_bounds_are_normalized(tmp_path: Path) -> None:
    trained(tmp_path, lambda: Numbers(FREE), SAC, {})
    fields = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    fields["_last_original_obs"] = None
    assert not trained_normalized(fields, FREE)
    assert trained_normalized(fields, spaces.Box(-1e-3, 1e-3, (2, 2)))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


@pytest.mark.fault("Policies", "code in a file of VecNormalize's statistics", "not run")
def test_no_code_of_the_statistics_runs(tmp_path: Path) -> None:
    _, venv = trained(tmp_path, lambda: Numbers(FREE), normal={})
    file, place = tmp_path / "statistics.pkl", tmp_path / "ran"
    venv.epsilon_of_another = Bomb(place)
    venv.save(file)
    policy = load_sb3(tmp_path / "model.zip", Numbers(FREE), vecnormalize=file)
    observation = 50 + np.arange(4.0).reshape(2, 2)
    normal = venv.normalize_obs(observation)
    np.testing.assert_array_equal(policy.statistics(observation), normal)
    for content in (Bomb(place), {"obs_rms": Bomb(place)}):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match="not what VecNormalize"):
            load_sb3(tmp_path / "model.zip", Numbers(FREE), vecnormalize=file)
    armed = {":serialized:": base64.b64encode(pickle.dumps(Bomb(place))).decode()}
    assert not trained_normalized({"_last_obs": armed, "_last_original_obs": armed}, FREE)
    assert not place.exists()
    pickle.loads(file.read_bytes())
    assert place.exists()


@pytest.mark.fault(
    "Policies", "statistics of VecNormalize that are damaged, or of another policy", "refused"
)
def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    _, venv = trained(tmp_path, lambda: Numbers(FREE), normal={})
    file = tmp_path / "statistics.pkl"
    content = file.read_bytes()

    def refused(match: str, **kwargs: Any) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            load_sb3(tmp_path / "model.zip", Numbers(FREE), vecnormalize=file, **kwargs)
        assert str(file) in str(caught.value)

    venv.obs_rms.mean[0, 0] = np.nan
    venv.save(file)
    refused("statistics of '' that are not finite")
    venv.obs_rms = SimpleNamespace(mean=np.zeros(3), var=np.ones(3))
    venv.save(file)
    refused(r"statistics of shape \(3,\) for '' Box")
    for size in (0, 1, 50, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        refused("damaged")
    asks = b"\x80\x04Nr" + struct.pack("<I", 2**32 - 1) + b"."  # 64 GB for one object
    file.write_bytes(asks)
    refused("damaged")
    file.write_bytes(bytes(2**20))
    refused("no such file of at most", max_bytes=2**19)
    file.unlink()
    refused("no such file")
