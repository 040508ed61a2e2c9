"""Training with Stable-Baselines3: runs that stop and go on, their checkpoints and their logs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SB3_TINY

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.base_class import BaseAlgorithm

from mpd_gym.collect.sb3 import CostPenalty, SB3Policy, load_sb3, replay_episodes, train_sb3
from mpd_gym.errors import CheckpointError, ConfigError


def same_weights(a: BaseAlgorithm, b: BaseAlgorithm) -> bool:
    one, two = a.policy.state_dict(), b.policy.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


def same_optimizers(a: BaseAlgorithm, b: BaseAlgorithm) -> bool:
    one, two = a.get_parameters(), b.get_parameters()
    states = [
        (one[name]["state"], two[name]["state"]) for name in one if name.endswith("optimizer")
    ]
    assert states and all(state for state, _ in states), "nothing has been optimised"
    return all(
        torch.equal(x, y)
        for state, other in states
        for i in state
        for x, y in zip(state[i].values(), other[i].values(), strict=True)
    )


PPO_TINY = {"policy_kwargs": {"net_arch": [8]}, "n_steps": 32, "batch_size": 16, "n_epochs": 2}
RUNS: dict[str, dict[str, Any]] = {
    "sac": {**SB3_TINY, "learning_starts": 40},
    "ppo": PPO_TINY,
}


def short_run(algorithm: Any, steps: int, **kwargs: Any) -> BaseAlgorithm:
    given = {"seed": 3, "num_envs": 2, "checkpoint_every": 64, "progress": False}
    given["hyperparameters"] = RUNS[algorithm]
    return train_sb3(algorithm, "Pendulum-v1", steps=steps, **(given | kwargs))


@pytest.mark.parametrize("algorithm", ["sac", "ppo"])
def test_a_stopped_run_goes_on_to_the_same_end(algorithm: str, tmp_path: Path) -> None:
    whole = short_run(algorithm, 192)
    file = tmp_path / "run.zip"
    half = short_run(algorithm, 128, checkpoint=file)
    assert not same_weights(whole, half)
    rest = short_run(algorithm, 192, checkpoint=file)
    assert rest.num_timesteps == whole.num_timesteps == 192
    assert same_weights(whole, rest)
    assert same_optimizers(whole, rest)
    if algorithm == "sac":
        torch.testing.assert_close(rest.log_ent_coef, whole.log_ent_coef, rtol=0, atol=0)
        for one, two in zip(replay_episodes(whole), replay_episodes(rest), strict=True):
            np.testing.assert_array_equal(one.observations, two.observations)
            np.testing.assert_array_equal(one.actions, two.actions)
            np.testing.assert_array_equal(one.rewards, two.rewards)
    done = short_run(algorithm, 192, checkpoint=file)  # nothing left to do
    assert same_weights(whole, done)


def test_a_wrapped_buffer_is_resumed_as_it_was(tmp_path: Path) -> None:
    small = {"hyperparameters": {**RUNS["sac"], "buffer_size": 100}}
    whole = short_run("sac", 192, **small)
    short_run("sac", 128, checkpoint=tmp_path / "run.zip", **small)
    rest = short_run("sac", 192, checkpoint=tmp_path / "run.zip", **small)
    assert same_weights(whole, rest)


def test_a_resumed_run_must_have_the_same_arguments(tmp_path: Path) -> None:
    file = tmp_path / "run.zip"
    short_run("sac", 64, checkpoint=file)
    for change in (
        {"seed": 4},
        {"num_envs": 1},
        {"wrappers": [partial(CostPenalty, penalty=1.0)]},
        {"hyperparameters": {**RUNS["sac"], "gamma": 0.9}},
    ):
        with pytest.raises(ConfigError, match=next(iter(change))):
            short_run("sac", 128, checkpoint=file, **change)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.zip"
    short_run("sac", 64, checkpoint=file)
    content = file.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"run\.zip"):
            short_run("sac", 128, checkpoint=file)
    short_run("sac", 64, save_path=tmp_path / "policy.zip")
    with pytest.raises(CheckpointError, match=r"header\.json"):
        short_run("sac", 128, checkpoint=tmp_path / "policy.zip")


def test_checkpoints_hold_no_pickled_objects(tmp_path: Path) -> None:
    short_run("sac", 64, checkpoint=tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert set(archive.namelist()) == {"header.json", "state.pth", "replay.safetensors"}
        assert b"serialized" not in archive.read("header.json")
        torch.load(io.BytesIO(archive.read("state.pth")), weights_only=True)


KILLED = """
import sys
from mpd_gym.collect.sb3 import train_sb3
train_sb3("sac", "Pendulum-v1", steps=100_000, seed=3, num_envs=2, checkpoint_every=64,
          progress=False, checkpoint=sys.argv[1],
          hyperparameters=dict(policy_kwargs=dict(net_arch=[8, 8]), batch_size=16,
                               learning_starts=40))
"""


@pytest.mark.slow
def test_a_run_killed_by_force_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "run.zip"
    for _ in range(2):
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(file)])
        try:
            limit = time.monotonic() + 60
            while not file.exists() or file.stat().st_mtime_ns == before:
                assert process.poll() is None and time.monotonic() < limit
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    with zipfile.ZipFile(file) as archive:
        reached = json.loads(archive.read("header.json"))["num_timesteps"]
    assert reached >= 128
    rest = short_run("sac", reached + 64, checkpoint=file)
    assert same_weights(rest, short_run("sac", reached + 64))


def test_logs_progress_and_policy_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "policy.zip"
    random_state = np.random.get_state()[1].copy()
    torch_state = torch.get_rng_state()
    model = short_run(
        "ppo", 512, num_envs=1, log_dir=tmp_path / "logs", save_path=path, progress=True
    )
    assert "ppo Pendulum-v1: 100%" in capsys.readouterr().err
    assert [file.name[:6] for file in (tmp_path / "logs").iterdir()] == ["events"]
    assert [file.name for file in path.parent.iterdir()] == ["policy.zip"]
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    loaded = load_sb3(path, "Pendulum-v1")
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    expected, _ = model.predict(x, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(x, deterministic=True)[0], expected)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"algorithm": "td3"}, "algorithm"),
        ({"steps": 0}, "steps"),
        ({"num_envs": 0}, "num_envs"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"save_path": "policy"}, "save_path"),
        ({"checkpoint": "run.pkl"}, "checkpoint"),
        ({"hyperparameters": {"seed": 1}}, "seed"),
    ],
)
def test_training_refuses_bad_arguments(kwargs: dict[str, Any], words: str) -> None:
    given = {"algorithm": "sac", "env_id": "Pendulum-v1", "steps": 10, "seed": 0} | kwargs
    with pytest.raises(ConfigError, match=words):
        train_sb3(**given)


@pytest.mark.slow
def test_sac_learns_the_pendulum() -> None:
    model = train_sb3(
        "sac",
        "Pendulum-v1",
        steps=16_000,
        seed=0,
        num_envs=8,
        hyperparameters={
            "policy_kwargs": {"net_arch": [64, 64]},
            "learning_rate": 1e-3,
            "gradient_steps": 2,
            "learning_starts": 800,
        },
        checkpoint_every=16_000,
        progress=False,
    )
    returns = [episode.rewards.sum() for episode in replay_episodes(model)]
    assert np.mean(returns[:8]) < -900.0
    assert np.mean(returns[-8:]) > -300.0


def test_a_trained_model_serves_as_policy() -> None:
    model = short_run("sac", 64)
    policy = SB3Policy(model.policy, seed=1)
    one, two = policy.predict(np.zeros(3)), policy.predict(np.zeros(3))
    assert one[0] in model.action_space
    assert not np.array_equal(one[0], two[0])
