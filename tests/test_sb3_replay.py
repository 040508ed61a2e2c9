"""Replay buffers of Stable-Baselines3 as episodes, and the penalty on costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import SB3_TINY

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

import mpd_gym  # noqa: F401  (registers the environments)
from mpd_gym.collect.sb3 import CostPenalty, replay_episodes, train_sb3
from mpd_gym.collect.sb3_replay import RecordingReplayBuffer
from mpd_gym.errors import ConfigError, DataError
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


RANDOM = {**SB3_TINY, "learning_starts": 10**9}  # never learns: quick


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
    extras = model.replay_buffer.extras
    extras.write(9, np.zeros(1), [{"cost": np.nan}])
    with pytest.raises(DataError, match=r"episode 1, step 2.*cost is not finite"):
        list(replay_episodes(model))
    extras.write(9, np.zeros(1), [{}])  # costs that are told only when they occur
    episodes = list(replay_episodes(model))
    assert [one.costs is None for one in episodes] == [False] * len(episodes)
    np.testing.assert_array_equal(episodes[1].costs, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0])
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
