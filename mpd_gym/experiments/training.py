"""Agents of studies: loaded from a study's folder, or trained into it first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.agents.mpdiffuser_config import MPDiffuserConfig
from mpd_gym.agents.presets import DATASETS, preset
from mpd_gym.collect.recipes import collect
from mpd_gym.datasets import EpisodeSource, load_episodes
from mpd_gym.errors import DataError

__all__ = ["collected", "trained"]


def collected(dataset_id: str) -> EpisodeSource:
    """Load a data set of the package, or make it first."""
    try:
        return load_episodes(dataset_id, download=False)
    except DataError:
        return load_episodes(collect(dataset_id))


def trained(
    path: Path,
    env_id: str,
    seed: int,
    *,
    config: MPDiffuserConfig | None = None,
    data: tuple[str, ...] | None = None,
) -> MPDiffuserAgent:
    """Load an agent, or train it first; an interrupted training goes on.

    Args:
        path: File of the agent; checkpoints lie in a folder beside it.
        env_id: Names preset and data.
        seed: Of weights, data split, batches and noise.
        config: In place of the laptop preset.
        data: What all models learn from, in place of the environment's usual data sets.
    """
    if not path.exists():
        planner, dynamics = DATASETS[env_id] if data is None else (data, None)
        config = config or preset("laptop", env_id)
        config = replace(
            config,
            seed=seed,
            training=replace(config.training, seed=seed),
            regressor_training=replace(config.regressor_training, seed=seed),
        )
        agent = MPDiffuserAgent.fit(
            [collected(name) for name in planner],
            config,
            dynamics_dataset=None if dynamics is None else [collected(name) for name in dynamics],
            directory=path.with_suffix(""),
            parallel=True,
        )
        agent.save(path)
    return MPDiffuserAgent.load(path, device="cpu")
