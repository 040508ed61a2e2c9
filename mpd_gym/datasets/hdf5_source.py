"""Episodes of flat HDF5 files in the layout of D4RL and DSRL, read with h5py alone.

The arrays ``observations, next_observations, actions, rewards, costs, terminals, timeouts`` hold
all episodes in sequence; an episode ends where ``terminals`` or ``timeouts`` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from gymnasium.spaces import Box

from mpd_gym.datasets.hdf5_files import Hdf5File
from mpd_gym.datasets.source import EpisodeSource
from mpd_gym.errors import ConfigError, DataError
from mpd_gym.types import Array, Episode
from mpd_gym.validation import Column, check_structure

__all__ = ["FlatFormat", "FlatSource"]

_BLOCK = 1 << 20  # rows of flags per scan
_CONTINUITY = 1e-5  # relative and absolute rounding between two copies of an observation


@final
@dataclass(frozen=True)
class FlatFormat:
    """Reading options for incomplete flat files.

    Args:
        episode_length: Time limit of the environment, for files without ``timeouts``: an episode
            also ends after this many steps.
        drop_last_transition: For files without ``next_observations``: use the last row of an
            episode only as the final observation. This loses the last step and its termination,
            and episodes of a single row.
        check_continuity: Refuse episodes in which ``next_observations`` and the next row's
            ``observations`` differ: an end between them is not marked.

    Raises:
        ConfigError: If `episode_length` is not positive.
    """

    episode_length: int | None = None
    drop_last_transition: bool = False
    check_continuity: bool = True

    def __post_init__(self) -> None:
        if self.episode_length is not None and self.episode_length < 1:
            raise ConfigError(
                f"episode_length: expected a positive number or None, got {self.episode_length}"
            )


@final
class FlatSource(EpisodeSource):
    """Episodes of a flat D4RL or DSRL file.

    Rows after the last marked end form an episode that the end of the file cuts; its last step is
    truncated.

    Args:
        path: File.
        metadata: Further knowledge; missing spaces get no bounds.
        layout: Reading options.
        clip_actions: As for `EpisodeSource`.

    Raises:
        DataError: If the file is damaged, or incomplete and `layout` does not say how to read it.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Any],
        *,
        layout: FlatFormat,
        clip_actions: bool = False,
    ) -> None:
        name = str(path)
        self._file = Hdf5File(path, name)
        self._layout = layout
        self._has_next = self._file.exists("next_observations")
        self._has_timeouts = self._file.exists("timeouts")
        self._has_costs = self._file.exists("costs")
        rows = self._count_rows(name)
        ends = self._find_ends(rows, name)
        starts = np.concatenate(([0], ends[:-1]))
        lengths = ends - starts - (0 if self._has_next else 1)
        self._starts = starts[lengths > 0]
        known = {"frame_stack": 1, **self._spaces(), **metadata}
        super().__init__(name, lengths[lengths > 0], known, clip_actions=clip_actions)

    def _count_rows(self, name: str) -> int:
        """Check that all arrays have the same number of rows, and return it."""
        names = ["observations", "actions", "rewards", "terminals"]
        names += ["next_observations"] * self._has_next + ["costs"] * self._has_costs
        names += ["timeouts"] * self._has_timeouts
        shapes = {key: self._file.array(key).shape for key in names}
        rows = {key: shape[0] if shape else None for key, shape in shapes.items()}
        if len(set(rows.values())) > 1 or not rows["observations"]:
            raise DataError(
                f"all arrays must have the same number of rows, at least 1; got {rows}", source=name
            )
        for flags in ("terminals", "timeouts"):
            if len(shapes.get(flags, (1,))) != 1:
                raise DataError(f"'{flags}' must have shape [N], got {shapes[flags]}", source=name)
        if not (self._has_next or self._layout.drop_last_transition):
            raise DataError(
                "'next_observations' is missing, so the observation after the last step of each "
                "episode is unknown: pass layout=FlatFormat(drop_last_transition=True) to drop "
                "these steps",
                source=name,
            )
        if not (self._has_timeouts or self._layout.episode_length):
            raise DataError(
                "'timeouts' is missing, so the ends of episodes that did not terminate are "
                "unknown: pass layout=FlatFormat(episode_length=...) with the time limit",
                source=name,
            )
        return int(shapes["observations"][0])

    def _find_ends(self, rows: int, name: str) -> Array:
        """Return the row after the last one of each episode."""
        marked = [np.zeros(0, dtype=np.int64)]
        for start in range(0, rows, _BLOCK):
            stop = min(start + _BLOCK, rows)
            ended = self._flags("terminals", start, stop, name)
            if self._has_timeouts:
                ended = ended | self._flags("timeouts", start, stop, name)
            marked.append(start + 1 + np.flatnonzero(ended))
        ends = np.unique(np.concatenate((*marked, [rows])))
        limit = self._layout.episode_length
        if self._has_timeouts or limit is None:
            return ends
        starts = np.concatenate(([0], ends[:-1]))
        pieces = [np.arange(a + limit, b, limit) for a, b in zip(starts, ends, strict=True)]
        return np.unique(np.concatenate((*pieces, ends)))

    def _flags(self, key: str, start: int, stop: int, name: str) -> Array:
        flags = self._file.rows(key, start, stop)
        if flags.dtype.kind not in "fiub" or ((flags != 0) & (flags != 1)).any():
            raise DataError(f"'{key}' must be 0 or 1", source=name)
        return flags.astype(np.bool_)

    def _spaces(self) -> dict[str, Box]:
        shapes = {"observation_space": "observations", "action_space": "actions"}
        return {
            space: Box(-np.inf, np.inf, self._file.array(key).shape[1:], np.float32)
            for space, key in shapes.items()
        }

    def _check(self, index: int) -> None:
        length = int(self._lengths[index])
        found: dict[str, Column] = {}
        for name, key in self._stored().items():
            stored = self._file.array(key, index)
            rows = length + 1 if name == "observations" else length
            found[name] = _Part((rows, *stored.shape[1:]), stored.dtype)
        found["truncations"] = found["terminations"]  # `_read` computes them
        check_structure(found, length, self._rules, index)
        if self._has_next:
            self._check_next(found["observations"], index)

    def _check_next(self, observations: Column, index: int) -> None:
        stored = self._file.array("next_observations", index)
        if stored.shape[1:] != observations.shape[1:] or stored.dtype.kind not in "fiub":
            problem = (
                f"'next_observations' must hold numbers of shape {observations.shape[1:]}, got "
                f"{stored.dtype} of shape {stored.shape[1:]}"
            )
            raise DataError(problem, source=self._name, episode=index)

    def _stored(self) -> dict[str, str]:
        """Return the keys of arrays in the file by their names in an Episode."""
        stored = {name: name for name in ("observations", "actions", "rewards")}
        stored |= {"costs": "costs"} if self._has_costs else {}
        return stored | {"terminations": "terminals"}

    def _read(self, index: int, start: int, stop: int, lead: int) -> Episode:
        first = int(self._starts[index])
        length = int(self._lengths[index])
        arrays = {
            name: self._file.rows(key, first + start, first + stop, index)
            for name, key in self._stored().items()
        }
        arrays["observations"] = self._observations(arrays["observations"], index, start, stop)
        if self._has_timeouts:
            cut = self._file.rows("timeouts", first + start, first + stop, index).astype(np.bool_)
        else:
            cut = np.zeros(stop - start, dtype=np.bool_)
        if not self._has_next:  # the episode's last row is only its last observation
            cut[:] = start + np.arange(stop - start) == length - 1
        elif stop == length and not arrays["terminations"][-1]:
            cut[-1] = True  # an unmarked time limit, or the end of the file
        return Episode(truncations=cut, seed=None, **arrays)

    def _observations(self, here: Array, index: int, start: int, stop: int) -> Array:
        """Return observations `start` … `stop`, given all but the last."""
        first = int(self._starts[index])
        if not self._has_next:
            last = self._file.rows("observations", first + stop, first + stop + 1, index)
            return np.concatenate((here, last))
        following = self._file.rows("next_observations", first + start, first + stop, index)
        if self._layout.check_continuity:
            same = np.isclose(following[:-1], here[1:], rtol=_CONTINUITY, atol=_CONTINUITY)
            same |= ~np.isfinite(here[1:])  # refused later
            if not same.all():
                step = start + int(np.argmin(same.reshape(len(same), -1).all(axis=1)))
                problem = (
                    "the next row does not continue from 'next_observations': the end of an "
                    "episode is not marked here; correct 'timeouts', or pass "
                    "layout=FlatFormat(check_continuity=False) if the file is right"
                )
                raise DataError(problem, source=self._name, episode=index, step=step)
        return np.concatenate((here, following[-1:]))


@final
@dataclass(frozen=True)
class _Part:
    """Shape and dtype of one episode's rows of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
