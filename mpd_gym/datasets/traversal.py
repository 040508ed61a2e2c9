"""Loops over episodes that locate errors, parts of observations, and splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpd_gym.datasets.source import EpisodeSource
from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.types import Array, Episode, Observation

__all__ = [
    "as_sources",
    "flat_observations",
    "goal_observations",
    "split_episodes",
    "visit_episodes",
]


def split_episodes(
    source: EpisodeSource, fraction: float, seed: int
) -> tuple[EpisodeSource, EpisodeSource]:
    """Split episodes at random into training and validation.

    Args:
        source: At least two episodes.
        fraction: Share held out for validation, in (0, 1); each side gets at least one episode.
        seed: Seed of the choice.

    Returns:
        Views of the training and of the validation episodes, each in the source's order.

    Raises:
        ConfigError: If `fraction` is out of range.
        DataError: If there are fewer than two episodes.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction: expected a value between 0 and 1, got {fraction!r}")
    count = len(source)
    if count < 2:
        raise DataError("expected at least 2 episodes to split, got 1", source=source.name)
    held_out = min(max(round(fraction * count), 1), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    training, validation = np.sort(order[held_out:]), np.sort(order[:held_out])
    return source.select(training), source.select(validation)


def as_sources(sources: EpisodeSource | Sequence[EpisodeSource]) -> tuple[EpisodeSource, ...]:
    """Return one or several sources as a tuple.

    Raises:
        InputError: If there is no source, or another object.
    """
    found = (sources,) if isinstance(sources, EpisodeSource) else tuple(sources)
    if not found or not all(isinstance(source, EpisodeSource) for source in found):
        raise InputError(
            "sources: expected one or several EpisodeSource objects, got "
            f"{[type(source).__name__ for source in found]}; use load_episodes"
        )
    return found


def visit_episodes(
    sources: EpisodeSource | Sequence[EpisodeSource], visit: Callable[[Episode], None]
) -> None:
    """Call `visit` with every episode, one in memory at a time.

    Raises:
        DataError: With source and episode, if `visit` raises an `InputError`.
    """
    for source in as_sources(sources):
        for index in range(len(source)):
            episode = source.episode(index)
            try:
                visit(episode)
            except InputError as error:
                raise DataError(str(error), source=source.name, episode=index) from error


def flat_observations(observations: Observation) -> Array:
    """Return rows ``[n, nx]`` for a planner: the key ``observation`` of a Dict, flattened.

    Raises:
        InputError: If there is no such key.
    """
    if isinstance(observations, Mapping):
        if "observation" not in observations:
            raise InputError(
                "expected Dict observations with the key 'observation', got keys "
                f"{sorted(observations)}"
            )
        observations = observations["observation"]
    return observations.reshape(len(observations), -1)


def goal_observations(observations: Observation) -> Array | None:
    """Return rows ``[n, ng]`` of ``desired_goal``; None if the observations have no goal."""
    if not isinstance(observations, Mapping) or "desired_goal" not in observations:
        return None
    goals = observations["desired_goal"]
    return goals.reshape(len(goals), -1)
