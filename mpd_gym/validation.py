"""Checks of episodes, for recording and reading.

Every array is checked against the spaces and the episode's length before use: `check_structure`
checks shapes and dtypes and reads no rows, `check_values` checks the values of given rows. Minari
and Gymnasium check none of this.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from mpd_gym.errors import ConfigError, DataError
from mpd_gym.types import Array, Episode, Observation

__all__ = [
    "STEP_ARRAYS",
    "Column",
    "EpisodeRules",
    "action_box",
    "check_episode",
    "check_structure",
    "check_values",
    "columns",
    "inside",
    "observation_arrays",
    "observation_leaves",
]

STEP_ARRAYS = ("actions", "rewards", "terminations", "truncations", "costs", "successes")
"""Fields of an `Episode` with one row for each step."""

_ACTION_TOLERANCE = 1e-5  # for float32 rounding at a bound
_FLAGS = ("terminations", "truncations", "successes")


class Column(Protocol):
    """Structure of an array; NumPy arrays and HDF5 data sets have it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        ...


@dataclass(frozen=True)
class EpisodeRules:
    """Requirements on the episodes of one source.

    Attributes:
        source: File or data set id, for messages.
        leaves: Box of each observation array, by key (``""`` for a plain Box).
        actions: Box of the actions, shape ``(nu,)``.
    """

    source: str
    leaves: Mapping[str, Box]
    actions: Box


def observation_leaves(space: gym.Space[Any]) -> dict[str, Box]:
    """Return the boxes of an observation space by key.

    Args:
        space: A Box, or a Dict of boxes, nested to any depth.

    Returns:
        ``{"": space}`` for a Box; for a Dict, its boxes by key, nested keys joined by ``/``.

    Raises:
        ConfigError: If the space holds another kind of space.
    """
    if isinstance(space, Box):
        return {"": space}
    if not isinstance(space, gym.spaces.Dict):
        raise ConfigError(
            f"observation space must be a Box or a Dict of Boxes, got {space}: "
            "wrap the environment, for example in gymnasium.wrappers.FlattenObservation"
        )
    leaves: dict[str, Box] = {}
    for key, part in space.spaces.items():
        for suffix, box in observation_leaves(part).items():
            leaves[f"{key}/{suffix}" if suffix else str(key)] = box
    return leaves


def action_box(space: gym.Space[Any]) -> Box:
    """Return the action space as a Box of shape ``(nu,)``.

    Raises:
        ConfigError: If it is another space.
    """
    if isinstance(space, Box) and len(space.shape) == 1:
        return space
    raise ConfigError(
        f"action space must be a Box of shape (nu,), got {space}: only continuous actions are "
        "supported"
    )


def observation_arrays(observations: Observation) -> dict[str, Array]:
    """Return the arrays of plain or Dict observations by key (``""`` for a plain array)."""
    return dict(observations) if isinstance(observations, Mapping) else {"": observations}


def columns(episode: Episode) -> dict[str, Array]:
    """Return the arrays of an episode by name; observations are named ``observations/key``."""
    arrays = {
        f"observations/{key}" if key else "observations": array
        for key, array in observation_arrays(episode.observations).items()
    }
    for name in STEP_ARRAYS:
        array = getattr(episode, name)
        if array is not None:
            arrays[name] = array
    return arrays


def check_structure(
    found: Mapping[str, Column], length: int, rules: EpisodeRules, episode: int
) -> None:
    """Check names, shapes and dtypes of an episode's arrays without reading rows.

    Args:
        found: Arrays by name, as from `columns`.
        length: Steps T of the episode.
        rules: Requirements.
        episode: Index of the episode, for messages.

    Raises:
        DataError: If the episode is empty, or an array is missing, of a wrong shape or dtype.
    """
    damage = functools.partial(DataError, source=rules.source, episode=episode)
    if length < 1:
        raise damage("the episode is empty, at least one step is needed: remove it")
    for name, (rows, shape) in _expected(rules, length).items():
        column = found.get(name)
        if column is None:
            if name in ("costs", "successes"):
                continue
            raise damage(f"'{name}' is missing; found {sorted(found)}")
        _check_shape(name, column.shape, (rows, *shape), rules.source, episode)
        if column.dtype.kind not in "fiub":
            raise damage(f"'{name}' must hold numbers, got dtype {column.dtype}")


def check_values(
    episode: Episode,
    rules: EpisodeRules,
    index: int,
    *,
    start: int = 0,
    length: int | None = None,
    lead: int = 0,
) -> None:
    """Check the values of an episode, or of a window of it.

    Args:
        episode: Steps `start` … of the episode, with `lead` more observations before them.
        rules: Requirements.
        index: Index of the episode, for messages.
        start: First step of the window.
        length: Steps of the whole episode; None if `episode` is the whole one.
        lead: Extra observations before `start`.

    Raises:
        DataError: If a value is not finite, an action is outside its Box, or the episode ends
            before its last step.
    """
    last = (len(episode) if length is None else length) - 1
    for name, array in columns(episode).items():
        first = start - lead if name.startswith("observations") else start
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            _fail(rules, index, first, bad, f"'{name}' is not finite (NaN or infinity)")
        if name in ("terminations", "truncations"):
            early = array.astype(bool) & (start + np.arange(len(array)) < last)
            if early.any():
                problem = f"'{name}' is set here, but the episode goes on to step {last}"
                _fail(rules, index, start, early, problem)
        if name in _FLAGS and array.dtype != np.bool_ and ((array != 0) & (array != 1)).any():
            bad = (array != 0) & (array != 1)
            _fail(rules, index, start, bad, f"'{name}' must be 0 or 1")
    kept = inside(episode.actions, rules.actions)
    if not kept.all():
        problem = f"'actions' leave the action space {rules.actions}: clip them when reading"
        _fail(rules, index, start, ~kept, f"{problem} (clip_actions=True) or correct the space")


def check_episode(episode: Episode, rules: EpisodeRules, index: int) -> None:
    """Check the structure and all values of one episode.

    Raises:
        DataError: With the source, the episode and, if there is one, the step.
    """
    check_structure(columns(episode), len(episode), rules, index)
    check_values(episode, rules, index)


def inside(actions: Array, box: Box) -> Array:
    """Whether each row lies in the box, up to float32 rounding.

    Args:
        actions: ``[…, nu]``.
        box: Bounds.

    Returns:
        Booleans ``[…]``; False for rows that are not finite.
    """
    low = box.low - _ACTION_TOLERANCE * np.maximum(1.0, np.abs(box.low))
    high = box.high + _ACTION_TOLERANCE * np.maximum(1.0, np.abs(box.high))
    kept = (actions >= low) & (actions <= high) & np.isfinite(actions)
    return np.asarray(kept.all(axis=-1))


def _expected(rules: EpisodeRules, length: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    expected = {
        f"observations/{key}" if key else "observations": (length + 1, box.shape)
        for key, box in rules.leaves.items()
    }
    steps = {name: (length, ()) for name in STEP_ARRAYS}
    return {**expected, **steps, "actions": (length, rules.actions.shape)}


def _check_shape(
    name: str, shape: tuple[int, ...], wanted: tuple[int, ...], source: str, episode: int
) -> None:
    if shape == wanted:
        return
    problem = f"'{name}' must have shape {wanted}, got {shape}"
    if name.startswith("observations") and shape == (wanted[0] - 1, *wanted[1:]):
        problem += f": T = {shape[0]} rows where T + 1 are needed; the final observation is missing"
    step = None
    if shape[1:] == wanted[1:]:
        step = min(shape[0], wanted[0])  # the first missing or surplus row
    raise DataError(problem, source=source, episode=episode, step=step)


def _fail(rules: EpisodeRules, index: int, first: int, bad: Any, problem: str) -> None:
    step = first + int(np.argmax(bad))  # the first True
    raise DataError(problem, source=rules.source, episode=index, step=step)
