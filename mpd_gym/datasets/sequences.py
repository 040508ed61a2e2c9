"""Training windows: H successive steps of an episode, normalised and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mpd_gym.datasets.conditions import FittedConditions
from mpd_gym.datasets.config import WindowConfig
from mpd_gym.datasets.fitting import NormalizerFitter
from mpd_gym.datasets.normalizers import Normalizer, Normalizers
from mpd_gym.datasets.source import EpisodeSource, array_digest
from mpd_gym.datasets.traversal import (
    as_sources,
    flat_observations,
    goal_observations,
    visit_episodes,
)
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.types import Array, Batch, Episode

__all__ = ["WindowSampler", "fit_normalizers"]

_EXTRA = 4  # columns of a row after observation and action: reward, cost, termination, mask


def fit_normalizers(sources: EpisodeSource | Sequence[EpisodeSource], kind: str) -> Normalizers:
    """Fit the normalisers of observations, actions and goals, in one pass over the data.

    Args:
        sources: Episodes of one or several data sets, which share the normalisers.
        kind: ``"cdf"``, ``"minmax"`` or ``"gaussian"``.

    Returns:
        (observation, action, goal); goal is None if no episode has a ``desired_goal``.

    Raises:
        ConfigError: If `kind` is unknown.
        DataError: If episodes differ in the size of observations, actions or goals.
    """
    observation, action, goal = (NormalizerFitter(kind) for _ in range(3))

    def visit(episode: Episode) -> None:
        observation.add(flat_observations(episode.observations))
        action.add(episode.actions)
        goals = goal_observations(episode.observations)
        if goals is not None:
            goal.add(goals)

    visit_episodes(sources, visit)
    return Normalizers(observation.fit(), action.fit(), None if goal.empty else goal.fit())


@final
class WindowSampler:
    """Draws windows from episodes; no window crosses an episode's end.

    Windows start at every step. Without padding they start where H steps remain; if a time limit
    ended the episode, where the steps of each condition's sum remain too.

    A window at step t has x_0 = observation t, targets x_1 … x_H and actions u_0 … u_{H-1}. The
    configuration says how to pad steps after the episode's end; they have mask 0. For Dict
    observations x is the part ``observation``.

    If all normalised steps fit into `memory_limit`, they are kept as float32, and a batch costs
    tens of microseconds. Otherwise each draw reads windows from the source and normalises them;
    only the conditions stay in memory. Both ways give the same batches.

    Args:
        sources: Episodes of one or several data sets with equal spaces.
        config: Shape of the windows.
        normalizers: Normalisers of observations and actions.
        conditions: Result of `fit_conditions` for `config`; needed if it declares conditions.
        weights: Share of each source among the drawn windows, in any positive scale; by default
            in proportion to the steps.
        memory_limit: Most bytes of normalised steps.

    Raises:
        ConfigError: If arguments contradict each other.
        DataError: If an episode does not fit the normalisers or lacks data for a condition, or if
            windows are not padded and a source has no episode of H steps.
    """

    def __init__(
        self,
        sources: EpisodeSource | Sequence[EpisodeSource],
        config: WindowConfig,
        normalizers: Normalizers,
        conditions: FittedConditions | None = None,
        *,
        weights: Sequence[float] | None = None,
        memory_limit: int = 4 * 2**30,
    ) -> None:
        _check_conditions(config, conditions)
        self.config = config
        self._index = _Index(as_sources(sources))
        self._shares = None if weights is None else _shares(weights, len(self._index.sources))
        encoder = _Encoder.make(normalizers, config)
        rows = self._index.steps + len(self._index.lengths) * config.horizon
        self.in_memory = rows * encoder.width * 4 <= memory_limit
        self._blocks: _MemoryBlocks | _DiskBlocks = (
            _MemoryBlocks(self._index, encoder, config.horizon)
            if self.in_memory
            else _DiskBlocks(self._index, encoder, config.horizon)
        )
        self._conditions = _ConditionTable(self._index, conditions)
        self._nx, self._nu = encoder.nx, encoder.nu
        self._load()

    def _load(self) -> None:
        """Read the data once if needed, and settle where windows begin."""
        terminated: list[bool] = []

        def visit(episode: Episode) -> None:
            number = len(terminated)
            terminated.append(bool(episode.terminations[-1]))
            self._blocks.store(number, episode)
            self._conditions.store(number, episode)

        if self.in_memory or self._conditions.needed or self.config.padding in ("terminal", "none"):
            visit_episodes(self._index.sources, visit)
        self._index.choose(self.config, terminated or [False] * len(self._index.lengths))

    @property
    def condition_digest(self) -> str:
        """32 hexadecimal digits of every condition's values, as functions may compute them."""
        return self._conditions.digest

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._index.windows)

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Draw windows with replacement, uniformly or by the sources' weights.

        Args:
            batch_size: Number of windows B.
            rng: Equal generators give equal batches.

        Raises:
            InputError: If `batch_size` is below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size: expected at least 1, got {batch_size}")
        index = self._index
        if self._shares is None:
            steps = index.windows[rng.integers(len(self), size=batch_size)]
        else:
            sources = np.searchsorted(self._shares, rng.random(batch_size), side="right")
            first, last = index.source_bounds[sources], index.source_bounds[sources + 1]
            steps = index.windows[first + rng.integers(last - first)]
        if self.config.first_step_share:
            moved = rng.random(batch_size) < self.config.first_step_share
            steps = np.where(moved, index.starts[index.locate(steps)[0]], steps)
        return self._batch(steps)

    def windows(self, indices: Sequence[int] | Array) -> Batch:
        """Return the windows with given numbers, for example for validation.

        Args:
            indices: ``[B]``, from 0 to ``len(self) - 1``, in the order of sources, episodes, steps.

        Raises:
            InputError: If `indices` is empty, not of whole numbers, or out of range.
        """
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in "iu":
            raise InputError(f"indices: expected a list of whole numbers, got {indices!r}")
        low, high = int(chosen.min()), int(chosen.max())
        if low < 0 or high >= len(self):
            raise InputError(f"indices: expected 0 to {len(self) - 1}, got {low} to {high}")
        return self._batch(self._index.windows[chosen])

    def _batch(self, indices: Array) -> Batch:
        """Return windows by their first steps, numbered through all episodes."""
        episodes, steps = self._index.locate(indices)
        block = self._blocks.read(episodes, steps)  # [B, H + 1, nx + nu + 4]
        now, sides = block[:, :-1], self._nx + self._nu
        return Batch(
            initial=block[:, 0, : self._nx],
            observations=block[:, 1:, : self._nx],
            actions=now[..., self._nx : sides],
            conditions=self._conditions.read(indices, episodes),
            rewards=now[..., sides],
            costs=now[..., sides + 1],
            terminations=now[..., sides + 2],
            mask=now[..., sides + 3],
        )


@final
class _Index:
    """First step of each window. Steps and episodes are numbered through all sources."""

    windows: Array
    """First step of each window."""
    source_bounds: Array
    """Bounds between the window numbers of the sources."""

    def __init__(self, sources: tuple[EpisodeSource, ...]) -> None:
        self.sources = sources
        self.lengths = np.concatenate([source.lengths for source in sources]).astype(np.int64)
        self._ends = np.cumsum(self.lengths)
        self.starts = self._ends - self.lengths
        self.steps = int(self._ends[-1])
        counts = np.array([len(source) for source in sources])
        self._owners = np.repeat(np.arange(len(sources)), counts)
        self._first_episodes = np.cumsum(counts) - counts

    def choose(self, config: WindowConfig, terminated: Sequence[bool]) -> None:
        """Settle where windows begin.

        Args:
            config: Shape of the windows.
            terminated: Whether the environment, not a time limit, ended each episode.

        Raises:
            DataError: If a source has no windows.
        """
        counts = map(config.windows_in, self.lengths.tolist(), terminated)
        lasts = self.starts + np.fromiter(counts, np.int64, len(self.lengths))
        steps = np.arange(self.steps)
        self.windows = steps[steps < np.repeat(lasts, self.lengths)]
        limits = np.cumsum([0, *(int(source.lengths.sum()) for source in self.sources)])
        self.source_bounds = np.searchsorted(self.windows, limits)
        for source, count in zip(self.sources, np.diff(self.source_bounds), strict=True):
            if not count:
                raise config.no_windows(source.name)

    def locate(self, indices: Array) -> tuple[Array, Array]:
        """Return the episode of each step, and its number within it."""
        episodes = np.searchsorted(self._ends, indices, side="right")
        return episodes, indices - self.starts[episodes]

    def read(self, episode: int, start: int, horizon: int) -> Episode:
        """Read up to `horizon` steps of one episode from its source."""
        owner = int(self._owners[episode])
        stop = min(start + horizon, int(self.lengths[episode]))
        return self.sources[owner].window(episode - int(self._first_episodes[owner]), start, stop)


@final
@dataclass(frozen=True)
class _Encoder:
    """Writes steps as rows (observation, action, reward, cost, termination, mask)."""

    normalizers: Normalizers
    repeat: bool  # pad with the last observation
    no_observation: Array  # [nx], normalised zeros
    no_action: Array  # [nu]

    @classmethod
    def make(cls, normalizers: Normalizers, config: WindowConfig) -> _Encoder:
        return cls(
            normalizers,
            config.padding in ("repeat", "terminal"),
            _normalized_zeros(normalizers.observation),
            _normalized_zeros(normalizers.action),
        )

    @property
    def nx(self) -> int:
        return len(self.no_observation)

    @property
    def nu(self) -> int:
        return len(self.no_action)

    @property
    def width(self) -> int:
        return self.nx + self.nu + _EXTRA

    def write(self, part: Episode, rows: Array) -> None:
        """Write n steps and n + 1 observations to the first rows; pad the rest."""
        n, x, u = len(part), rows[:, : self.nx], rows[:, self.nx : self.nx + self.nu]
        x[: n + 1] = self.normalizers.observation.normalize(flat_observations(part.observations))
        x[n + 1 :] = x[n] if self.repeat else self.no_observation
        u[:n] = self.normalizers.action.normalize(part.actions)
        u[n:] = self.no_action
        extra = rows[:, -_EXTRA:]
        extra[n:] = 0.0
        extra[:n, 0] = part.rewards
        extra[:n, 1] = 0.0 if part.costs is None else part.costs
        extra[:n, 2] = part.terminations
        extra[:n, 3] = 1.0


@final
class _MemoryBlocks:
    """All steps, each episode followed by its padding."""

    def __init__(self, index: _Index, encoder: _Encoder, horizon: int) -> None:
        self._encoder = encoder
        self._first = index.starts + np.arange(len(index.starts)) * horizon  # row of each episode
        self._lengths = index.lengths + horizon  # rows of each episode
        self._rows = np.empty((int(self._lengths.sum()), encoder.width), np.float32)
        # Entry r is the rows r to r + H as one run of memory, copied at once.
        runs = sliding_window_view(self._rows.reshape(-1), (horizon + 1) * encoder.width)
        self._runs = runs[:: encoder.width]

    def store(self, number: int, episode: Episode) -> None:
        first = self._first[number]
        self._encoder.write(episode, self._rows[first : first + self._lengths[number]])

    def read(self, episodes: Array, steps: Array) -> Array:
        runs: Array = self._runs[self._first[episodes] + steps]
        return runs.reshape(len(runs), -1, self._encoder.width)


@final
class _DiskBlocks:
    """Steps that are read from their source at each draw."""

    def __init__(self, index: _Index, encoder: _Encoder, horizon: int) -> None:
        self._index, self._encoder, self._horizon = index, encoder, horizon

    def store(self, number: int, episode: Episode) -> None:
        pass

    def read(self, episodes: Array, steps: Array) -> Array:
        block = np.empty((len(steps), self._horizon + 1, self._encoder.width), np.float32)
        for rows, episode, step in zip(block, episodes.tolist(), steps.tolist(), strict=True):
            self._encoder.write(self._index.read(episode, step, self._horizon), rows)
        return block


@final
class _ConditionTable:
    """Condition values by step, or by episode if they are constant in an episode."""

    def __init__(self, index: _Index, conditions: FittedConditions | None) -> None:
        self._index, self._conditions = index, conditions
        specs = {spec.name: spec for spec in conditions.config.conditions} if conditions else {}
        sizes = conditions.sizes if conditions else {}
        self._fixed = {name for name, spec in specs.items() if spec.kind == "final_state"}
        self._values = {
            name: np.empty(
                (len(index.lengths) if name in self._fixed else index.steps, size), np.float32
            )
            for name, size in sizes.items()
        }

    @property
    def needed(self) -> bool:
        return self._conditions is not None

    @property
    def digest(self) -> str:
        return array_digest(self._values).hex()

    def store(self, number: int, episode: Episode) -> None:
        if self._conditions is None:
            return
        start = self._index.starts[number]
        for name, values in self._conditions.values(episode).items():
            if name in self._fixed:
                self._values[name][number] = values[0]
            else:
                self._values[name][start : start + len(values)] = values

    def read(self, indices: Array, episodes: Array) -> Mapping[str, Array]:
        return {
            name: values[episodes if name in self._fixed else indices]
            for name, values in self._values.items()
        }


def _normalized_zeros(normalizer: Normalizer) -> Array:
    """Normalised zeros of the environment, clipped to the range of the data."""
    return np.clip(normalizer.normalize(np.zeros(normalizer.size)), *normalizer.clip_range)


def _check_conditions(config: WindowConfig, conditions: FittedConditions | None) -> None:
    """Check that the declared conditions were fitted."""
    if conditions is None:
        if config.conditions:
            raise ConfigError(
                f"conditions: the configuration declares {[s.name for s in config.conditions]}; "
                "pass what fit_conditions returns"
            )
    elif conditions.config != config:
        raise ConfigError(
            f"conditions: they were fitted for {conditions.config}, the windows are {config}"
        )


def _shares(weights: Sequence[float], count: int) -> Array:
    """Cumulative share of each source among the drawn windows."""
    values = np.asarray(weights, dtype=np.float64)
    usable = values.shape == (count,) and np.isfinite(values).all() and (values >= 0).all()
    if not usable or not values.sum() > 0:
        raise ConfigError(
            f"weights: expected one non-negative number for each of {count} sources, and one "
            f"above 0, got {weights!r}"
        )
    cumulative = np.cumsum(values)
    shares: Array = cumulative / cumulative[-1]
    return shares
