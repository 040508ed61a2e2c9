"""Sources of episodes: the abstract one, a selection, and memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from mpd_gym.boundary import as_numbers, decided
from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.types import Array, Episode, Observation
from mpd_gym.validation import (
    STEP_ARRAYS,
    EpisodeRules,
    action_box,
    check_structure,
    check_values,
    columns,
    observation_arrays,
    observation_leaves,
)

__all__ = [
    "EpisodeSource",
    "MemorySource",
    "Selection",
    "array_digest",
    "cost_at_most",
    "stack_frames",
    "stacked_space",
]


class EpisodeSource(ABC):
    """Episodes that are read on demand and checked before they are returned.

    The first access checks the structure of an episode (names, shapes, dtypes); each read checks
    the values of the rows it reads.

    Args:
        name: File or data set id.
        lengths: Steps of each episode, ``[E]``.
        metadata: Facts about the data. Always `observation_space` and `action_space` (of stored
            rows) and `frame_stack`; if known `env_id`, `env_kwargs`, `max_episode_steps`,
            `ref_min_score`, `ref_max_score` and further entries of a file.
        clip_actions: Clip actions into the action space; by default actions outside are refused.
        frames: Frames to stack in each observation when reading.
        numbers: Number of each episode in its file, for messages; by default from 0 on.

    Raises:
        DataError: If the spaces are not supported.
    """

    def __init__(
        self,
        name: str,
        lengths: Array,
        metadata: Mapping[str, Any],
        *,
        clip_actions: bool = False,
        frames: int = 1,
        numbers: Sequence[int] | None = None,
    ) -> None:
        try:
            leaves = observation_leaves(metadata["observation_space"])
            self._rules = EpisodeRules(name, leaves, action_box(metadata["action_space"]))
        except ConfigError as error:
            raise DataError(str(error), source=name) from error
        self._name = name
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._lengths.flags.writeable = False
        self._numbers = range(len(self._lengths)) if numbers is None else numbers
        self._metadata = dict(metadata)
        self._clip_actions = clip_actions
        self._frames = frames
        self._known: set[int] = set()
        self._digests: dict[int, bytes] = {}  # of episodes that were read whole, by number
        self._metadata["observation_space"] = _space_as_read(leaves, frames)

    @property
    def name(self) -> str:
        """File or data set id, as in messages."""
        return self._name

    @property
    def lengths(self) -> Array:
        """Steps of each episode, int64 ``[E]``."""
        return self._lengths

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Space of one observation as read."""
        space: gym.Space[Any] = self._metadata["observation_space"]
        return space

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of one action."""
        return self._rules.actions

    @property
    def metadata(self) -> dict[str, Any]:
        """Facts about the data; spaces describe the episodes as read."""
        return dict(self._metadata)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of the content: all episodes in order as they are read, and spaces.

        Data of equal content have equal digests, whatever their name and format. An episode is
        hashed when it is first read whole (2 s for 1 GB); those not yet read are read here.

        Raises:
            DataError: If an episode is damaged.
        """
        boxes = {**self._rules.leaves, "actions": self._rules.actions}
        bounds = {f"{key} {side}": getattr(box, side)
                  for key, box in boxes.items() for side in ("low", "high")}  # fmt: skip
        content = hashlib.blake2b(array_digest(bounds) + bytes([self._frames]), digest_size=16)
        for index, number in enumerate(self._numbers):
            if number not in self._digests:
                self.episode(index)
            content.update(self._digests[number])
        return content.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that distinguish the data from any other; see `digest`."""
        sizes = {"episodes": len(self), "steps": int(self._lengths.sum())}
        return {**sizes, "digest": self.digest}

    def same_as(self, other: EpisodeSource) -> bool:
        """Whether the content is equal; data are read only where the lengths are equal."""
        return np.array_equal(self.lengths, other.lengths) and self.digest == other.digest

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Episode:
        return self.episode(index)

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(index) for index in range(len(self)))

    def episode(self, index: int) -> Episode:
        """Read and check a whole episode.

        Raises:
            DataError: If it is damaged; names file, episode and step.
            InputError: If there is no such episode.
        """
        return self.window(index, 0, int(self._lengths[self._valid(index)]))

    def window(self, index: int, start: int, stop: int) -> Episode:
        """Read and check steps `start` … `stop` - 1 of an episode, and no other rows.

        Args:
            index: Episode; negative numbers count from the end.
            start: First step.
            stop: Step after the last.

        Returns:
            Episode of ``stop - start`` steps with one more observation.

        Raises:
            DataError: If it is damaged; names file, episode and step.
            InputError: If there are no such steps.
        """
        index = self._valid(index)
        length = int(self._lengths[index])
        if index not in self._known:
            self._check(index)
            self._known.add(index)
        if not 0 <= start < stop <= length:
            raise InputError(
                f"window: expected 0 <= start < stop <= {length} (episode {index} of {self.name}), "
                f"got start {start}, stop {stop}"
            )
        lead = min(start, self._frames - 1)
        episode = self._read(index, start, stop, lead)
        if self._clip_actions:
            box = self._rules.actions
            actions = np.clip(episode.actions, box.low, box.high)  # keeps NaN, refused below
            episode = replace(episode, actions=actions)
        number = self._numbers[index]
        check_values(episode, self._rules, number, start=start, length=length, lead=lead)
        flags = ("terminations", "truncations", "successes")
        found = {name: getattr(episode, name) for name in flags}
        booleans: dict[str, Any] = {
            name: None if flag is None else flag.astype(np.bool_) for name, flag in found.items()
        }
        episode = replace(episode, **booleans)
        if stop - start == length and number not in self._digests:
            self._digests[number] = array_digest(columns(episode))
        return replace(episode, observations=self._stacked(episode.observations, lead))

    def validate_all(self, *, progress: bool = False) -> None:
        """Read and check every episode, one at a time.

        Args:
            progress: Show a progress bar.

        Raises:
            DataError: For the first damaged episode.
        """
        for index in tqdm(range(len(self)), "checking", unit="episode", disable=not progress):
            self.episode(index)

    def select(self, indices: Iterable[int]) -> EpisodeSource:
        """Return a source of the given episodes, in the given order.

        Raises:
            InputError: If there is no such episode.
        """
        return Selection(self, [self._valid(int(index)) for index in indices])

    def where(self, keep: Callable[[Episode], bool], *, progress: bool = False) -> EpisodeSource:
        """Return a source of the episodes that a function accepts; it reads each episode once.

        Args:
            keep: True for the episodes to keep, for example `cost_at_most(10)`.
            progress: Show a progress bar.

        Raises:
            DataError: If it accepts none.
        """
        order = tqdm(range(len(self)), "selecting", unit="episode", disable=not progress)
        indices = [index for index in order if decided("keep", keep, self.episode(index))]
        if not indices:
            raise DataError(
                f"the condition keeps none of the {len(self)} episodes", source=self.name
            )
        name = f"{self.name} ({len(indices)} of {len(self)} episodes)"
        return Selection(self, indices, name)

    def _valid(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise InputError(f"{self.name} has {len(self)} episodes, got index {index}")
        return index % len(self)

    def _stacked(self, observations: Observation, lead: int) -> Observation:
        if self._frames == 1:
            return observations
        frames = observation_arrays(observations)[""]
        return stack_frames(frames, self._frames)[lead:]

    @abstractmethod
    def _check(self, index: int) -> None:
        """Check the structure of an episode without reading its rows."""

    @abstractmethod
    def _read(self, index: int, start: int, stop: int, lead: int) -> Episode:
        """Read steps `start` … `stop` - 1, with `lead` more observations before them."""


@final
class Selection(EpisodeSource):
    """Some episodes of another source.

    Args:
        parent: Source of all episodes.
        indices: Its episodes to use, in order.
        name: Name of the selection; the parent's by default.
    """

    def __init__(
        self, parent: EpisodeSource, indices: Sequence[int], name: str | None = None
    ) -> None:
        super().__init__(
            name or parent.name,
            parent.lengths[list(indices)],
            parent.metadata,
            numbers=[parent._numbers[index] for index in indices],
        )
        self._digests = parent._digests
        self._parent = parent
        self._indices = tuple(indices)

    def _check(self, index: int) -> None:
        pass  # the parent checks what it reads

    def _read(self, index: int, start: int, stop: int, lead: int) -> Episode:
        return self._parent.window(self._indices[index], start, stop)


@final
class MemorySource(EpisodeSource):
    """Episodes in memory: copies of the caller's, whose arrays cannot be written to.

    Args:
        episodes: At least one.
        metadata: Facts about them; missing spaces get no bounds and the first episode's shapes.
        name: Name for messages.
        clip_actions: As for `EpisodeSource`.

    Raises:
        InputError: If there are no episodes, or other objects.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        metadata: Mapping[str, Any],
        *,
        name: str = "episodes in memory",
        clip_actions: bool = False,
    ) -> None:
        if not episodes or not all(isinstance(episode, Episode) for episode in episodes):
            kinds = sorted({type(episode).__name__ for episode in episodes})
            raise InputError(f"episodes: expected at least one Episode, got {kinds or 'none'}")
        owned = tuple(_owned(episode, name, index) for index, episode in enumerate(episodes))
        known = {"frame_stack": 1, **_inferred_spaces(owned[0], name), **metadata}
        lengths = np.array([len(episode) for episode in owned])
        super().__init__(name, lengths, known, clip_actions=clip_actions)
        self._episodes = owned

    def _check(self, index: int) -> None:
        episode = self._episodes[index]
        check_structure(columns(episode), len(episode), self._rules, index)

    def _read(self, index: int, start: int, stop: int, lead: int) -> Episode:
        episode = self._episodes[index]
        observations: Observation
        if isinstance(episode.observations, Mapping):
            observations = {k: v[start : stop + 1] for k, v in episode.observations.items()}
        else:
            observations = episode.observations[start : stop + 1]
        arrays: dict[str, Any] = {name: getattr(episode, name) for name in STEP_ARRAYS}
        steps: dict[str, Any] = {
            name: None if rows is None else rows[start:stop] for name, rows in arrays.items()
        }
        return Episode(observations=observations, seed=episode.seed, **steps)


def array_digest(arrays: Mapping[str, Array]) -> bytes:
    """16 bytes that tell named arrays from any others, by names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        rows = np.ascontiguousarray(array)
        digest.update(f"{name} {rows.dtype.str} {rows.shape} ".encode())
        digest.update(rows.reshape(-1).view(np.uint8).data)
    return digest.digest()


def cost_at_most(limit: float) -> Callable[[Episode], bool]:
    """Return a function for `EpisodeSource.where`: is an episode's undiscounted cost <= `limit`?

    The function raises `InputError` if an episode has no costs.
    """

    def keep(episode: Episode) -> bool:
        if episode.costs is None:
            raise InputError("cost_at_most: the episode has no costs")
        return bool(np.sum(episode.costs) <= limit)

    return keep


def stack_frames(frames: Array, number: int) -> Array:
    """Stack each frame on its predecessors, as an environment with stacked frames does.

    Args:
        frames: ``[M, …]``; the first frame is repeated before the start.
        number: Frames in each stack.

    Returns:
        ``[M, number, …]``, the oldest frame first.
    """
    before = np.repeat(frames[:1], number - 1, axis=0)
    windows = sliding_window_view(np.concatenate((before, frames)), number, axis=0)
    return np.ascontiguousarray(np.moveaxis(windows, -1, 1))


def stacked_space(box: Box, number: int) -> Box:
    """Return the space of `number` stacked frames of a space."""
    low, high = np.stack([box.low] * number), np.stack([box.high] * number)
    return Box(low, high, dtype=box.dtype.type)


def _owned(episode: Episode, source: str, index: int) -> Episode:
    """Copy an episode; lists and tensors become arrays."""

    def copied(name: str, values: Any) -> Any:
        if values is None:
            return None
        try:
            array = as_numbers(name, values).copy()
        except InputError as error:
            raise DataError(str(error), source=source, episode=index) from error
        array.flags.writeable = False
        return array

    found: Any = episode.observations
    if isinstance(found, Mapping):
        found = {key: copied(f"observations/{key}", values) for key, values in found.items()}
    else:
        found = copied("observations", found)
    arrays = {name: copied(name, getattr(episode, name)) for name in STEP_ARRAYS}
    return replace(episode, observations=found, **arrays)


def _space_as_read(leaves: Mapping[str, Box], frames: int) -> gym.Space[Any]:
    if "" in leaves:
        return stacked_space(leaves[""], frames) if frames > 1 else leaves[""]
    return gym.spaces.Dict({**leaves})  # nested keys are joined, as in the episodes


def _inferred_spaces(episode: Episode, name: str) -> dict[str, gym.Space[Any]]:
    arrays = observation_arrays(episode.observations)
    if any(np.ndim(array) < 1 for array in (*arrays.values(), episode.actions)):
        raise DataError("observations and actions must have a time axis", source=name, episode=0)
    boxes = {key: _unbounded(array) for key, array in arrays.items()}
    return {
        "observation_space": _space_as_read(boxes, 1),
        "action_space": _unbounded(episode.actions),
    }


def _unbounded(array: Array) -> Box:
    """Return the widest Box of the rows of an array."""
    shape = np.shape(array)[1:]
    if np.issubdtype(array.dtype, np.integer):
        limits = np.iinfo(array.dtype)
        return Box(limits.min, limits.max, shape, array.dtype.type)
    return Box(-np.inf, np.inf, shape, np.float32)
