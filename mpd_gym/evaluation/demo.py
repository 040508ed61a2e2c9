"""The demonstration: the shipped agents against other policies, and against the planner alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym

from mpd_gym.agents.serialization import shipped_agents
from mpd_gym.collect.lqr import NoisyLQR
from mpd_gym.errors import CheckpointError
from mpd_gym.evaluation.comparison import Entry, compare, load_entries
from mpd_gym.evaluation.returns import Evaluation
from mpd_gym.types import Policy

__all__ = ["REFERENCES", "run_demo", "scenes"]

FIRST_SEED = 1_000_000  # far from the seeds of training and tuning


def _optimal_gain(env: gym.Env[Any, Any]) -> Policy:
    inner: Any = env.unwrapped
    return NoisyLQR(inner.optimal_gain, 0.0, action_space=inner.action_space)


def _nonlinear_mpc(env: gym.Env[Any, Any]) -> Policy:
    from mpd_gym.collect.nmpc import NMPC

    return NMPC(on_failure="report")


REFERENCES: dict[str, tuple[str, Callable[[gym.Env[Any, Any]], Policy]]] = {
    "CarUMaze-v0": ("nonlinear MPC, knows the car", _nonlinear_mpc),
    "LQR-v0": ("optimal gain, knows the system", _optimal_gain),
}
"""Controllers that know an environment's equations, as a bound, by environment id."""


def scenes() -> dict[str, list[str]]:
    """Return the entries of each environment with a shipped agent, for `load_entries`.

    Stable-Baselines3 policies are zips in the agents' folder, ``NAME-ENV.zip``.

    Raises:
        CheckpointError: If no agent ships with this installation.
    """
    found: dict[str, list[str]] = {}
    for env_id, path in shipped_agents().items():
        texts = [
            f"MPDiffuser (level-matched)={path}",
            f"planner alone={path},composition=planner_only",
        ]
        for file in sorted(path.parent.glob(f"*-{env_id}.zip")):
            name = file.name.removesuffix(f"-{env_id}.zip")
            texts.append(f"{name.upper().replace('-', ' ')} (SB3)=sb3:{file}")
        found[env_id] = texts
    if not found:
        raise CheckpointError(
            "pretrained: this installation holds no trained agents, so there is nothing to play; "
            "install the package again from its repository"
        )
    return found


def run_demo(folder: Path, *, episodes: int = 10) -> Iterator[tuple[str, dict[str, Evaluation]]]:
    """Play every shipped agent and its rivals from the same unseen starts.

    All files are loaded before the first episode.

    Args:
        folder: Parent of one folder per environment, with the files of `compare`.
        episodes: Episodes of each policy.

    Yields:
        Environment id and the measures of its policies, one environment at a time.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    loaded = {env_id: load_entries(texts, env_id) for env_id, texts in scenes().items()}
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    for env_id, entries in loaded.items():
        if env_id in REFERENCES:
            label, make = REFERENCES[env_id]
            env = gym.make(env_id)
            entries.append(Entry(label, make(env), deterministic=True))
            env.close()
        yield (
            env_id,
            compare(
                entries,
                env_id,
                seeds=seeds,
                num_envs=episodes,
                folder=folder / env_id,
                progress=True,
            ),
        )
