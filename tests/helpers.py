"""Small agents and data that several test files share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np

import mpd_gym  # noqa: F401 - registers the environments
from mpd_gym.agents.mpdiffuser import MPDiffuserAgent, MPDiffuserConfig
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.collect.scripted import SmoothRandom
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig
from mpd_gym.types import Episode

TINY = MPDiffuserConfig(
    horizon=8,
    unet=UnetConfig(width=8, multipliers=(1, 2), groups=4),
    diffusion_steps=6,
    training=TrainingConfig(steps=20, batch_size=8, learning_rate=1e-3, validation_batches=1),
    regressor_training=TrainingConfig(steps=20, batch_size=8, validation_batches=1),
    sampling=SamplingConfig(temperature=0.5),
    validation_fraction=0.25,
)
PENDULUM = "ConstrainedPendulum-v0"
SB3_TINY: dict[str, Any] = {"policy_kwargs": {"net_arch": [8, 8]}, "batch_size": 16}


def play(
    env_id: str, episodes: int = 4, steps: int = 24, first_seed: int = 0, **env_kwargs: Any
) -> list[Episode]:
    """Episodes of smooth random actions."""
    env = gym.make(env_id, **env_kwargs)
    policy = SmoothRandom(env.action_space, env.observation_space)
    found = []
    for seed in range(first_seed, first_seed + episodes):
        policy.reseed(seed)
        rows, infos = [], []
        observation, _ = env.reset(seed=seed)
        observations, state = [observation], None
        for _ in range(steps):
            action, state = policy.predict(observation, state)
            observation, reward, terminated, truncated, info = env.step(action)
            observations.append(observation)
            rows.append((action, reward, terminated, truncated))
            infos.append(info)
            if terminated or truncated:
                break
        found.append(_episode(observations, rows, infos, seed))
    env.close()
    return found


def _episode(observations: list[Any], rows: list[Any], infos: list[Any], seed: int) -> Episode:
    actions, rewards, terminations, truncations = map(np.array, zip(*rows, strict=True))
    truncations[-1] = not terminations[-1]
    costs = np.array([info["cost"] for info in infos]) if "cost" in infos[0] else None
    return Episode(
        stacked(observations), actions, rewards, terminations, truncations, costs, seed=seed
    )


def source(env_id: str, **kwargs: Any) -> Any:
    """Played episodes as an `EpisodeSource`."""
    from mpd_gym.datasets import load_episodes

    env = gym.make(env_id)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    env.close()
    return load_episodes(play(env_id, **kwargs), metadata=spaces)


def tiny_agent(env_id: str = "LQR-v0", **changes: Any) -> MPDiffuserAgent:
    """An agent trained for a few steps: everything works, nothing is good."""
    return MPDiffuserAgent.fit(source(env_id), replace(TINY, **changes), progress=False)


def observations(agent: MPDiffuserAgent, count: int) -> Any:
    """Where episodes of the environment of a small agent begin, stacked."""
    agent.observation_space.seed(0)
    env = gym.make({3: PENDULUM, 2: "LQR-v0", 5: "CarUMaze-v0"}[agent.parts.spaces.nx])
    rows = [env.reset(seed=seed)[0] for seed in range(count)]
    env.close()
    return stacked(rows)


def stacked(rows: list[Any]) -> Any:
    """Observations in one batch."""
    if isinstance(rows[0], Mapping):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def pick(batch: Any, index: Any) -> Any:
    """Rows of a batch of observations."""
    if isinstance(batch, dict):
        return {key: rows[index] for key, rows in batch.items()}
    return batch[index]
