"""Stable-Baselines3: training, replay buffers as episodes, and zip files without their pickles."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

pytest.importorskip("stable_baselines3")

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

import mpd_gym  # noqa: F401  (registers the environments)
from mpd_gym.collect.sb3 import CostPenalty, SB3Policy, load_sb3, replay_episodes, train_sb3
from mpd_gym.collect.sb3_replay import RecordingReplayBuffer
from mpd_gym.errors import CheckpointError, ConfigError, DataError, InputError, MissingExtraError
from mpd_gym.types import Episode

# An environment whose observations say which copy, episode and step they belong to


class Marked(gym.Env[Any, Any]):
    """Observation (copy, episode, t); every third episode ends by itself, after 4 steps."""

    copies: ClassVar[int] = 0
    sent: ClassVar[dict[tuple[int, int, int], np.ndarray]] = {}

    def __init__(self, as_dict: bool = False) -> None:
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.as_dict = as_dict
        self.observation_space = spaces.Dict(a=box, b=box) if as_dict else box
        self.action_space = spaces.Box(np.float32([-1.0, 2.0]), np.float32([3.0, 2.5]))
        self.copy, self.episode, self.t = Marked.copies, -1, 0
        Marked.copies += 1

    def _observe(self) -> Any:
        mark = np.array([self.copy, self.episode, self.t], dtype=np.float32)
        return {"a": mark, "b": -mark} if self.as_dict else mark

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        Marked.sent[self.copy, self.episode, self.t] = np.array(action)
        self.t += 1
        ended = self.episode % 3 == 2 and self.t == 4
        info = {"cost": float(self.t % 2)} | ({"is_success": True} if ended else {})
        return self._observe(), 100.0 * self.episode + self.t, ended, False, info


@pytest.fixture
def marked() -> Iterator[str]:
    Marked.copies, Marked.sent = 0, {}
    gym.register("Marked-v0", Marked, max_episode_steps=7)
    yield "Marked-v0"
    del gym.registry["Marked-v0"]


TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8, 8]}, "batch_size": 16}
RANDOM = {**TINY, "learning_starts": 10**9}  # never learns: quick


def marks_of(episode: Episode) -> np.ndarray:
    observations = episode.observations
    if isinstance(observations, dict):
        np.testing.assert_array_equal(observations["a"], -observations["b"])
        return observations["a"]
    return np.asarray(observations)


def check_marked(episode: Episode) -> None:
    """Everything in `episode` must be of one copy and episode, step after step."""
    marks, length = marks_of(episode), len(episode)
    assert marks.shape == (length + 1, 3)
    copy, number, first = (int(value) for value in marks[0])
    np.testing.assert_array_equal(marks[:, :2], np.tile([copy, number], (length + 1, 1)))
    np.testing.assert_array_equal(marks[:, 2], first + np.arange(length + 1))
    sent = [Marked.sent[copy, number, first + t] for t in range(length)]
    np.testing.assert_array_equal(episode.actions, sent)
    t = marks[1:, 2]
    np.testing.assert_array_equal(episode.rewards, 100.0 * number + t)
    np.testing.assert_array_equal(episode.costs, t % 2)
    ended = number % 3 == 2 and t[-1] == 4
    np.testing.assert_array_equal(episode.terminations, [False] * (length - 1) + [bool(ended)])
    np.testing.assert_array_equal(episode.truncations, [False] * (length - 1) + [not ended])
    if episode.successes is not None:
        np.testing.assert_array_equal(episode.successes, episode.terminations)


# Replay buffers


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("as_dict", [False, True])
def test_whole_replay_buffer_comes_back_as_episodes(
    marked: str, num_envs: int, as_dict: bool
) -> None:
    model = train_sb3(
        "sac",
        marked,
        steps=150,
        seed=0,
        env_kwargs={"as_dict": as_dict},
        num_envs=num_envs,
        hyperparameters=RANDOM,
        progress=False,
    )
    episodes = list(replay_episodes(model))
    for episode in episodes:
        check_marked(episode)
    assert sum(map(len, episodes)) == 150 == len(Marked.sent)
    keys = [tuple(marks_of(episode)[0][:2]) for episode in episodes]
    assert len(set(keys)) == len(keys)
    assert all(marks_of(episode)[0][2] == 0 for episode in episodes)
    assert any(episode.terminations[-1] for episode in episodes)
    assert any(len(episode) == 7 for episode in episodes)
    numbers = [key[1] for key in keys]
    assert numbers == sorted(numbers)  # oldest first: all copies step together


@pytest.mark.parametrize("num_envs", [1, 2])
def test_wrapped_buffer_keeps_its_newest_steps_in_order(marked: str, num_envs: int) -> None:
    model = train_sb3(
        "sac",
        marked,
        steps=100,
        seed=0,
        num_envs=num_envs,
        hyperparameters={**RANDOM, "buffer_size": 44},
        progress=False,
    )
    episodes = list(replay_episodes(model))
    assert sum(map(len, episodes)) == 44
    for episode in episodes:
        check_marked(episode)
    assert marks_of(episodes[0])[0][2] > 0  # its beginning was overwritten
    assert all(marks_of(episode)[0][2] == 0 for episode in episodes[num_envs:])
    newest = sorted(Marked.sent)[-1]
    assert tuple(marks_of(episodes[-1])[-1]) == (newest[0], newest[1], newest[2] + 1)


def test_episodes_cut_by_a_checkpoint_end_as_truncated(marked: str) -> None:
    model = train_sb3(
        "sac",
        marked,
        steps=60,
        seed=0,
        hyperparameters=RANDOM,
        checkpoint_every=10,
        progress=False,
    )
    episodes = list(replay_episodes(model))
    for episode in episodes:
        check_marked(episode)
    ends = np.cumsum([len(episode) for episode in episodes])
    assert set(range(10, 61, 10)) <= set(ends)


def test_plain_buffers_are_exported_without_costs(marked: str) -> None:
    model = SAC("MlpPolicy", gym.make(marked), buffer_size=50, learning_starts=1000, device="cpu")
    model.learn(30)
    episodes = list(replay_episodes(model))
    assert sum(map(len, episodes)) == 30
    assert all(episode.costs is None and episode.successes is None for episode in episodes)


def damaged(model: BaseAlgorithm, name: str, row: int, value: float) -> None:
    array = getattr(model.replay_buffer, name)
    array[row] = value


@pytest.mark.parametrize(
    ("name", "row", "value", "words"),
    [
        ("observations", 3, np.nan, "episode 0, step 3.*observation is not finite"),
        ("next_observations", 9, np.inf, "episode 1, step 2.*next observation is not finite"),
        ("actions", 8, np.nan, "episode 1, step 1.*action is not finite"),
        ("next_observations", 2, 5.0, "episode 0, step 2.*not the observation of the following"),
    ],
)
def test_damaged_buffers_are_refused(
    marked: str, name: str, row: int, value: float, words: str
) -> None:
    model = train_sb3("sac", marked, steps=20, seed=0, hyperparameters=RANDOM, progress=False)
    damaged(model, name, row, value)
    with pytest.raises(DataError, match=words):
        list(replay_episodes(model))


def test_rewards_and_costs_of_the_buffer_are_checked(marked: str) -> None:
    model: Any = train_sb3("sac", marked, steps=20, seed=0, hyperparameters=RANDOM, progress=False)
    model.replay_buffer.extras.costs[9] = np.nan
    with pytest.raises(DataError, match=r"episode 1, step 2.*cost.*some steps only"):
        list(replay_episodes(model))
    model.replay_buffer.extras.costs[9] = 0.0
    model.replay_buffer.extras.rewards[1] = np.inf
    with pytest.raises(DataError, match=r"episode 0, step 1.*reward is not finite"):
        list(replay_episodes(model))


def test_models_without_usable_buffer_are_refused(marked: str) -> None:
    ppo = PPO("MlpPolicy", gym.make(marked), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ConfigError, match="replay buffer, got PPO"):
        replay_episodes(ppo)
    sac = SAC(
        "MlpPolicy",
        gym.make(marked),
        buffer_size=50,
        device="cpu",
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
    )
    with pytest.raises(ConfigError, match="optimize_memory_usage"):
        replay_episodes(sac)


def test_penalty_is_learned_from_but_not_exported(marked: str) -> None:
    model: Any = train_sb3(
        "sac",
        marked,
        steps=30,
        seed=0,
        wrappers=[partial(CostPenalty, penalty=1000.0)],
        hyperparameters=RANDOM,
        progress=False,
    )
    episodes = list(replay_episodes(model))
    for episode in episodes:
        check_marked(episode)
    own = np.concatenate([episode.rewards for episode in episodes])
    costs = np.concatenate([episode.costs for episode in episodes])
    np.testing.assert_array_equal(model.replay_buffer.rewards[:30, 0], own - 1000.0 * costs)


def test_cost_penalty_needs_a_cost() -> None:
    with pytest.raises(ConfigError, match="penalty"):
        CostPenalty(gym.make("Pendulum-v1"), -1.0)
    env = CostPenalty(gym.make("Pendulum-v1"), 1.0)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="cost"):
        env.step(env.action_space.sample())


def test_exported_pendulum_episodes_follow_its_dynamics() -> None:
    model = train_sb3(
        "sac",
        "ConstrainedPendulum-v0",
        steps=400,
        seed=0,
        num_envs=2,
        hyperparameters=RANDOM,
        progress=False,
    )
    episodes = list(replay_episodes(model))
    assert [len(episode) for episode in episodes] == [200, 200]
    for episode in episodes:
        assert episode.costs is not None and episode.successes is not None
        x, u = np.float64(episode.observations), np.float64(episode.actions[:, 0])
        speed = x[:-1, 2] + 0.05 * (15.0 * x[:-1, 1] + 3.0 * u)
        np.testing.assert_allclose(x[1:, 2], np.clip(speed, -8, 8), atol=1e-4)
        np.testing.assert_array_equal(episode.costs, np.abs(x[1:, 2]) > 6.5)


# Training


def same_weights(a: BaseAlgorithm, b: BaseAlgorithm) -> bool:
    one, two = a.policy.state_dict(), b.policy.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


def same_optimizers(a: BaseAlgorithm, b: BaseAlgorithm) -> bool:
    one, two = a.get_parameters(), b.get_parameters()
    return all(
        torch.equal(x, y)
        for name in one
        if name.endswith("optimizer")
        for i in one[name]["state"]
        for x, y in zip(one[name]["state"][i].values(), two[name]["state"][i].values(), strict=True)
    )


PPO_TINY = {"policy_kwargs": {"net_arch": [8]}, "n_steps": 32, "batch_size": 16, "n_epochs": 2}
RUNS: dict[str, dict[str, Any]] = {
    "sac": {**TINY, "learning_starts": 40},
    "ppo": PPO_TINY,
}


def short_run(algorithm: Any, steps: int, **kwargs: Any) -> BaseAlgorithm:
    given = {"seed": 3, "num_envs": 2, "checkpoint_every": 128, "progress": False}
    given["hyperparameters"] = RUNS[algorithm]
    return train_sb3(algorithm, "Pendulum-v1", steps=steps, **(given | kwargs))


@pytest.mark.parametrize("algorithm", ["sac", "ppo"])
def test_a_stopped_run_goes_on_to_the_same_end(algorithm: str, tmp_path: Path) -> None:
    whole = short_run(algorithm, 384)
    file = tmp_path / "run.zip"
    half = short_run(algorithm, 256, checkpoint=file)
    assert not same_weights(whole, half)
    rest = short_run(algorithm, 384, checkpoint=file)
    assert rest.num_timesteps == whole.num_timesteps == 384
    assert same_weights(whole, rest)
    assert same_optimizers(whole, rest)
    if algorithm == "sac":
        torch.testing.assert_close(rest.log_ent_coef, whole.log_ent_coef, rtol=0, atol=0)
        for one, two in zip(replay_episodes(whole), replay_episodes(rest), strict=True):
            np.testing.assert_array_equal(one.observations, two.observations)
            np.testing.assert_array_equal(one.actions, two.actions)
            np.testing.assert_array_equal(one.rewards, two.rewards)
    done = short_run(algorithm, 384, checkpoint=file)  # nothing left to do
    assert same_weights(whole, done)


def test_a_wrapped_buffer_is_resumed_as_it_was(tmp_path: Path) -> None:
    small = {"hyperparameters": {**RUNS["sac"], "buffer_size": 200}}
    whole = short_run("sac", 384, **small)
    short_run("sac", 256, checkpoint=tmp_path / "run.zip", **small)
    rest = short_run("sac", 384, checkpoint=tmp_path / "run.zip", **small)
    assert same_weights(whole, rest)


def test_a_resumed_run_must_have_the_same_arguments(tmp_path: Path) -> None:
    file = tmp_path / "run.zip"
    short_run("sac", 128, checkpoint=file)
    for change in (
        {"seed": 4},
        {"num_envs": 1},
        {"wrappers": [partial(CostPenalty, penalty=1.0)]},
        {"hyperparameters": {**RUNS["sac"], "gamma": 0.9}},
    ):
        with pytest.raises(ConfigError, match=next(iter(change))):
            short_run("sac", 256, checkpoint=file, **change)


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.zip"
    short_run("sac", 128, checkpoint=file)
    content = file.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"run\.zip"):
            short_run("sac", 256, checkpoint=file)
    short_run("sac", 128, save_path=tmp_path / "policy.zip")
    with pytest.raises(CheckpointError, match=r"header\.json"):
        short_run("sac", 256, checkpoint=tmp_path / "policy.zip")


def test_checkpoints_hold_no_pickled_objects(tmp_path: Path) -> None:
    short_run("sac", 128, checkpoint=tmp_path / "run.zip")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert set(archive.namelist()) == {"header.json", "state.pth", "replay.safetensors"}
        assert b"serialized" not in archive.read("header.json")
        torch.load(io.BytesIO(archive.read("state.pth")), weights_only=True)


KILLED = """
import sys
from mpd_gym.collect.sb3 import train_sb3
train_sb3("sac", "Pendulum-v1", steps=100_000, seed=3, num_envs=2, checkpoint_every=128,
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
    assert reached >= 256
    rest = short_run("sac", reached + 128, checkpoint=file)
    assert same_weights(rest, short_run("sac", reached + 128))


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


# Zip files: the safe way gives what the trusting way gives


def pictures(shape: tuple[int, ...] = (1, 36, 36)) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


UNIT = spaces.Box(-1.0, 1.0, (3,), np.float32)
SKEW = spaces.Box(np.float32([-1.0, 2.0]), np.float32([3.0, 2.5]))


class Blank(gym.Env[Any, Any]):
    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space


MODELS: dict[str, tuple[type[Any], Any, Any, dict[str, Any]]] = {
    "sac": (SAC, UNIT, SKEW, {}),
    "sac-deep": (
        SAC,
        UNIT,
        SKEW,
        {"net_arch": {"pi": [8, 9], "qf": [7]}, "activation_fn": torch.nn.Tanh, "n_critics": 3},
    ),
    "sac-linear": (SAC, UNIT, SKEW, {"net_arch": []}),
    "sac-sde": (SAC, UNIT, SKEW, {"use_sde": True, "clip_mean": 0.5, "use_expln": True}),
    "sac-image": (SAC, pictures((36, 36, 3)), SKEW, {"net_arch": [8]}),
    "sac-dict": (SAC, spaces.Dict(a=UNIT, b=pictures()), SKEW, {"net_arch": [8]}),
    "td3": (TD3, UNIT, SKEW, {"net_arch": [8, 5]}),
    "ddpg": (DDPG, UNIT, SKEW, {"net_arch": [8, 5]}),
    "dqn": (DQN, UNIT, spaces.Discrete(4), {}),
    "ppo": (PPO, UNIT, SKEW, {"net_arch": {"pi": [8, 9], "vf": [7]}}),
    "ppo-elu": (PPO, UNIT, SKEW, {"activation_fn": torch.nn.ELU, "log_std_init": -1.0}),
    "ppo-sde": (PPO, UNIT, SKEW, {"use_sde": True, "squash_output": True, "full_std": True}),
    "ppo-sde-reduced": (PPO, UNIT, SKEW, {"use_sde": True, "full_std": False}),
    "ppo-discrete": (PPO, UNIT, spaces.Discrete(4), {}),
    "ppo-image": (
        PPO,
        pictures(),
        SKEW,
        {"share_features_extractor": False, "features_extractor_kwargs": {"features_dim": 16}},
    ),
    "a2c": (A2C, UNIT, SKEW, {"net_arch": [8]}),
}


def new_model(name: str) -> Any:
    algorithm, observation_space, action_space, policy_kwargs = MODELS[name]
    kwargs: dict[str, Any] = {"policy": "MlpPolicy", "seed": 1, "device": "cpu"}
    if isinstance(observation_space, spaces.Dict):
        kwargs["policy"] = "MultiInputPolicy"
    elif len(observation_space.shape) == 3:
        kwargs["policy"] = "CnnPolicy"
    if algorithm in (PPO, A2C):
        kwargs["n_steps"] = 64
    else:
        kwargs["buffer_size"] = 10
    given = dict(policy_kwargs)
    if "use_sde" in given:
        kwargs["use_sde"] = given.pop("use_sde")
    env = Blank(observation_space, action_space)
    return algorithm(env=env, policy_kwargs=given, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a saved model by its name in `MODELS`; made once."""
    folder = tmp_path_factory.mktemp("models")

    def path_of(name: str) -> Path:
        path = folder / f"{name}.zip"
        if not path.exists():
            new_model(name).save(path)
        return path

    return path_of


def env_of(name: str) -> Any:
    return SimpleNamespace(observation_space=MODELS[name][1], action_space=MODELS[name][2])


@pytest.mark.parametrize("name", MODELS)
def test_the_safe_way_gives_the_same_actions(name: str, saved: Callable[[str], Path]) -> None:
    env = env_of(name)
    safe = load_sb3(saved(name), env, algorithm=name.split("-")[0])
    trusted = load_sb3(saved(name), env, trust_pickle=True)
    assert type(safe.policy) is type(trusted.policy) or "image" in name or "dict" in name
    env.observation_space.seed(0)
    for seed in range(5):
        observation = env.observation_space.sample()
        for deterministic in (True, False):
            safe.reseed(seed)
            trusted.reseed(seed)
            one, _ = safe.predict(observation, deterministic=deterministic)
            two, _ = trusted.predict(observation, deterministic=deterministic)
            np.testing.assert_array_equal(one, two)
            assert one in env.action_space


def test_policies_draw_from_a_stream_of_their_own(saved: Callable[[str], Path]) -> None:
    policy = load_sb3(saved("sac"), env_of("sac"), seed=5)
    x = np.zeros((6, 3), np.float32)
    before = torch.get_rng_state()
    first = [policy.predict(x)[0] for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(np.unique(np.concatenate(first))) == 36
    torch.manual_seed(0)
    policy.reseed(5)
    copy = pickle.loads(pickle.dumps(policy))
    for other in (policy, copy):
        np.testing.assert_array_equal([other.predict(x)[0] for _ in range(3)], first)
    with pytest.raises(InputError, match="finite"):
        policy.predict(np.full(3, np.nan))
    with pytest.raises(ValueError, match="tuple"):
        policy.predict((np.zeros(3), {}))


def test_a_trained_model_serves_as_policy() -> None:
    model = short_run("sac", 128)
    policy = SB3Policy(model.policy, seed=1)
    one, two = policy.predict(np.zeros(3)), policy.predict(np.zeros(3))
    assert one[0] in model.action_space
    assert not np.array_equal(one[0], two[0])


# Zip files: what is refused


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def altered(path: Path, target: Path, **entries: bytes) -> Path:
    """Copy of a zip with entries replaced; the first dot of their names is written ``__``."""
    given = {name.replace("__", "."): content for name, content in entries.items()}
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, given.get(name, source.read(name)))
    return target


def fields_of(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        fields: dict[str, Any] = json.loads(archive.read("data"))
        return fields


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(path) as archive:
        weights: dict[str, torch.Tensor] = torch.load(
            io.BytesIO(archive.read("policy.pth")), weights_only=True
        )
        return weights


def packed(weights: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def test_pickled_fields_run_only_on_request(saved: Callable[[str], Path], tmp_path: Path) -> None:
    import base64

    marker = tmp_path / "ran"
    text = base64.b64encode(pickle.dumps(Bomb(marker))).decode()
    fields = fields_of(saved("sac-deep"))
    for field in fields.values():
        if isinstance(field, dict) and ":serialized:" in field:
            field[":serialized:"] = text
    bad = altered(saved("sac-deep"), tmp_path / "bad.zip", data=json.dumps(fields).encode())
    policy = load_sb3(bad, env_of("sac-deep"))
    good = load_sb3(saved("sac-deep"), env_of("sac-deep"))
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(
        policy.predict(x, deterministic=True)[0], good.predict(x, deterministic=True)[0]
    )
    assert not marker.exists()
    with pytest.raises(Exception):  # noqa: B017  (what SB3 makes of the file does not matter)
        load_sb3(bad, env_of("sac-deep"), trust_pickle=True)
    assert marker.exists()  # the bomb was armed


def test_pickles_among_the_weights_never_run(saved: Callable[[str], Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    weights: dict[str, Any] = dict(weights_of(saved("sac")))
    weights["actor.mu.bias"] = Bomb(marker)
    for content in (packed(weights), pickle.dumps(Bomb(marker))):
        bad = altered(saved("sac"), tmp_path / "bad.zip", policy__pth=content)
        with pytest.raises(CheckpointError, match="without running code"):
            load_sb3(bad, env_of("sac"))
    assert not marker.exists()
    torch.load(io.BytesIO(packed(weights)), weights_only=False)
    assert marker.exists()


def test_truncated_and_foreign_files_are_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    env, file = env_of("ppo"), tmp_path / "policy.zip"
    content = saved("ppo").read_bytes()
    with pytest.raises(CheckpointError, match="no such file"):
        load_sb3(file, env)
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"policy\.zip"):
            load_sb3(file, env)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(CheckpointError, match="expected an entry 'data'"):
        load_sb3(file, env)


def test_no_flipped_byte_changes_an_action(saved: Callable[[str], Path], tmp_path: Path) -> None:
    env, file = env_of("ppo"), tmp_path / "policy.zip"
    content = saved("ppo").read_bytes()
    x = np.ones(3, np.float32)
    expected, _ = load_sb3(saved("ppo"), env).predict(x, deterministic=True)
    rng, refused = np.random.default_rng(0), 0
    for position in rng.integers(len(content), size=60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            action, _ = load_sb3(file, env).predict(x, deterministic=True)
        except CheckpointError:
            refused += 1
        else:  # a byte that is not read: another entry, a time stamp
            np.testing.assert_array_equal(action, expected)
    assert refused > 5


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"[" * 100_000, "not JSON")],
)
def test_bad_json_is_refused(
    saved: Callable[[str], Path], tmp_path: Path, data: bytes, words: str
) -> None:
    bad = altered(saved("ppo"), tmp_path / "bad.zip", data=data)
    with pytest.raises(CheckpointError, match=words):
        load_sb3(bad, env_of("ppo"))


def test_sizes_are_checked_before_memory_is_taken(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    env, file = env_of("ppo"), tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(30_000_000))
        archive.writestr("policy.pth", b"")
    with pytest.raises(CheckpointError, match="30000000 bytes unpacked"):
        load_sb3(file, env, max_bytes=2**20)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(30_000_000))
    bad = altered(saved("ppo"), file, policy__pth=inner.getvalue())
    with pytest.raises(CheckpointError, match="tensors take 30000000 bytes"):
        load_sb3(bad, env, max_bytes=2**20)


def broken_weights() -> dict[str, tuple[Callable[[dict[str, Any]], Any], str]]:
    mu = "actor.mu.bias"
    first = "actor.latent_pi.0.weight"

    def wide(w: dict[str, Any]) -> dict[str, Any]:
        return w | {first: torch.zeros(1).expand(10**9, 3), "actor.latent_pi.0.bias": w[mu]}

    return {
        "nan": (lambda w: w | {mu: w[mu] * np.nan}, "mu.bias.*NaN"),
        "dtype": (lambda w: w | {mu: w[mu].double()}, "mu.bias.*float64"),
        "shape": (lambda w: w | {mu: torch.zeros(3)}, "mu.bias"),
        "missing": (lambda w: {k: v for k, v in w.items() if k != mu}, "missing.*mu.bias"),
        "extra": (lambda w: w | {"actor.extra": w[mu]}, "not understood.*actor.extra"),
        "layer": (lambda w: w | {first: torch.zeros(256, 4)}, "reads 3 numbers"),
        "huge": (wide, "contiguous"),
        "sparse": (lambda w: w | {mu: w[mu].to_sparse()}, "dense"),
        "number": (lambda w: w | {mu: 1.0}, "dense"),
        "actor": (lambda w: {k: v for k, v in w.items() if k.startswith("actor")}, "critics"),
        "unknown": (lambda w: {"lstm.weight": w[mu]}, "not those of"),
        "list": (lambda w: [w[mu]], "not those of"),
    }


@pytest.mark.parametrize("kind", broken_weights())
def test_weights_must_fit_the_network(
    saved: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    change, words = broken_weights()[kind]
    content = packed(change(dict(weights_of(saved("sac")))))
    bad = altered(saved("sac"), tmp_path / "bad.zip", policy__pth=content)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_sb3(bad, env_of("sac"))
    assert str(bad) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy_class": {"__module__": "sb3_contrib.tqc.policies"}}, "sb3_contrib"),
        ({"policy_kwargs": {"lstm_hidden_size": 3}}, "lstm_hidden_size"),
        ({"policy_kwargs": {"activation_fn": "<class 'evil.Relu'>"}}, "activation_fn"),
        ({"policy_kwargs": {"features_extractor_class": "<class 'evil.Net'>"}}, "features"),
        ({"policy_kwargs": {"normalize_images": "no"}}, "normalize_images"),
    ],
)
def test_networks_of_other_makers_are_refused(
    saved: Callable[[str], Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = json.dumps(fields_of(saved("sac")) | change).encode()
    bad = altered(saved("sac"), tmp_path / "bad.zip", data=data)
    with pytest.raises(CheckpointError, match=words):
        load_sb3(bad, env_of("sac"))


@pytest.mark.parametrize(
    ("spaces_", "words"),
    [
        ({"observation_space": spaces.Box(-1, 1, (4,))}, r"observations of shape \(3,\)"),
        ({"action_space": spaces.Box(-1, 1, (1,))}, r"actions of shape \(2,\)"),
        ({"action_space": spaces.Box(-1, 1, (2,))}, r"actions with low \[-1\.  2\.\]"),
        ({"action_space": spaces.Discrete(2)}, "acts in"),
    ],
)
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_wrong_spaces_are_refused(
    saved: Callable[[str], Path], name: str, spaces_: dict[str, Any], words: str
) -> None:
    env = SimpleNamespace(**(vars(env_of(name)) | spaces_))
    with pytest.raises(CheckpointError, match=words):
        load_sb3(saved(name), env)


def test_wrong_algorithm_and_arguments_are_refused(saved: Callable[[str], Path]) -> None:
    with pytest.raises(CheckpointError, match="expected a policy of ppo"):
        load_sb3(saved("sac"), env_of("sac"), algorithm="ppo")
    with pytest.raises(ConfigError, match="algorithm"):
        load_sb3(saved("sac"), env_of("sac"), algorithm="sarsa")
    with pytest.raises(ConfigError, match="env_kwargs"):
        load_sb3(saved("sac"), env_of("sac"), env_kwargs={"g": 9.81})
    with pytest.raises(CheckpointError, match="cannot load it as ppo"):
        load_sb3(saved("sac"), env_of("sac"), algorithm="ppo", trust_pickle=True)


def test_files_of_old_versions_load(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Before SB3 1.7 features had one name only, and `gym` spaces called their shape `shape`."""
    weights = {
        name: tensor
        for name, tensor in weights_of(saved("ppo-image")).items()
        if not name.startswith(("pi_features", "vf_features"))
    }
    fields = fields_of(saved("ppo-image"))
    fields["action_space"]["shape"] = fields["action_space"].pop("_shape")
    old = altered(
        saved("ppo-image"),
        tmp_path / "old.zip",
        policy__pth=packed(weights),
        data=json.dumps(fields).encode(),
    )
    picture = np.full((1, 36, 36), 90, np.uint8)
    env = env_of("ppo-image")
    expected, _ = load_sb3(saved("ppo-image"), env).predict(picture, deterministic=True)
    actual, _ = load_sb3(old, env).predict(picture, deterministic=True)
    np.testing.assert_array_equal(actual, expected)


def test_missing_extra_is_named(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved("sac")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mpd-gym\[collect\]'"):
        load_sb3(path, env_of("sac"))
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.callbacks", None)
    monkeypatch.delitem(sys.modules, "mpd_gym.collect.sb3")
    with pytest.raises(MissingExtraError, match="collect"):
        import mpd_gym.collect.sb3  # noqa: F401


def test_recording_buffer_serves_in_a_model_of_ones_own() -> None:
    model = SAC(
        "MlpPolicy",
        "Pendulum-v1",
        buffer_size=20,
        replay_buffer_class=RecordingReplayBuffer,
        device="cpu",
    )
    model.learn(5)
    (episode,) = replay_episodes(model)
    assert len(episode) == 5 and episode.costs is None
