"""Pairs of successive frame stacks, drawn from memory that holds each frame once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from mpd_gym.datasets import EpisodeSource
from mpd_gym.datasets.traversal import visit_episodes
from mpd_gym.errors import DataError, InputError
from mpd_gym.types import Array, Episode

__all__ = ["FramePairs", "StackPairs", "stack_shape"]


@final
@dataclass(frozen=True)
class StackPairs:
    """B steps of an environment with stacked frames.

    Attributes:
        frames: Frames of the stacks before and after the step, uint8 ``[B, F + 1, H, W]``.
        actions: u, in the environment's units, float32 ``[B, nu]``.
    """

    frames: Array
    actions: Array


@final
class FramePairs:
    """Draws steps from episodes whose observations are stacks of their last frames.

    Stacks overlap, so memory holds each frame once, as uint8.

    Args:
        source: Episodes with observations uint8 ``[T + 1, F, H, W]``, the newest frame last; the
            first stack is free, each other stack must continue the one before.

    Raises:
        DataError: If the observations have another form.
    """

    def __init__(self, source: EpisodeSource) -> None:
        self._stack = stack_shape(source)[0]
        rows = source.lengths + self._stack  # frames of each episode
        first = np.cumsum(rows) - rows
        self._starts = np.concatenate(  # first frame of each step's pair
            [begin + np.arange(steps) for begin, steps in zip(first, source.lengths, strict=True)]
        )
        shape = source.metadata["observation_space"].shape[1:]
        self._frames = np.empty((int(rows.sum()), *shape), np.uint8)
        actions: list[Array] = []
        places = zip(first.tolist(), rows.tolist(), strict=True)

        def visit(episode: Episode) -> None:
            begin, count = next(places)
            self._frames[begin : begin + count] = _single_frames(episode)
            actions.append(episode.actions.astype(np.float32))

        visit_episodes(source, visit)
        self._actions = np.concatenate(actions)

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self._starts)

    @property
    def actions(self) -> Array:
        """Actions of all steps, float32 ``[steps, nu]``."""
        return self._actions

    def sample(self, batch_size: int, rng: np.random.Generator) -> StackPairs:
        """Draw steps uniformly, with replacement.

        Args:
            batch_size: B.
            rng: Equal generators give equal batches.
        """
        chosen = rng.integers(len(self), size=batch_size)
        rows = self._starts[chosen, None] + np.arange(self._stack + 1)
        return StackPairs(self._frames[rows], self._actions[chosen])


def stack_shape(source: EpisodeSource) -> tuple[int, int, int]:
    """Return the shape (F, H, W) of a source's observations.

    Raises:
        DataError: If they are not uint8 stacks of square frames.
    """
    space = source.metadata["observation_space"]
    shape: Any = space.shape or ()
    if space.dtype != np.uint8 or len(shape) != 3 or shape[1] != shape[2]:
        raise DataError(
            "expected observations of stacked square frames, uint8 [frames, size, size], got "
            f"{shape} of {space.dtype}; record an environment inside StackedFrames",
            source=source.name,
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _single_frames(episode: Episode) -> Array:
    """Return frames ``[T + F, H, W]`` of an episode: the first stack, then the newest of each."""
    stacks = episode.observations
    assert isinstance(stacks, np.ndarray)  # stack_shape has refused Dict spaces
    if not np.array_equal(stacks[1:, :-1], stacks[:-1, 1:]):
        raise InputError(
            "a stack does not continue the one before it; frames must be stacked one by one, the "
            "newest last"
        )
    return np.concatenate((stacks[0], stacks[1:, -1]))
