"""Replay buffers of Stable-Baselines3, extended by costs and successes, as episodes.

Needs the extra ``collect``: importing this module without it raises `MissingExtraError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, final

import numpy as np
from gymnasium import spaces

from mpd_gym.boundary import succeeded
from mpd_gym.errors import CheckpointError, ConfigError, DataError, require
from mpd_gym.types import Array, Episode, Observation

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
else:
    _buffers = require("stable_baselines3.common.buffers", "collect", "A replay buffer")
    DictReplayBuffer, ReplayBuffer = _buffers.DictReplayBuffer, _buffers.ReplayBuffer

__all__ = [
    "RecordingDictReplayBuffer",
    "RecordingReplayBuffer",
    "buffer_arrays",
    "replay_episodes",
    "restore_buffer",
]

SOURCE = "replay buffer"


@final
class Extras:
    """Parts of each transition that SB3 does not keep; arrays ``[rows, environments]``.

    Attributes:
        costs: ``info["cost"]``; NaN if there was none.
        successes: Result of `succeeded`; −1 if unknown.
        rewards: ``info["reward"]`` (from `CostPenalty`), or else the reward.
        cuts: True if the environment was reset before its episode ended.
    """

    def __init__(self, rows: int, environments: int) -> None:
        shape = rows, environments
        self.costs = np.full(shape, np.nan)
        self.successes = np.full(shape, -1, dtype=np.int8)
        self.rewards = np.zeros(shape)
        self.cuts = np.zeros(shape, dtype=np.bool_)

    def write(self, row: int, rewards: Array, infos: Sequence[Mapping[str, Any]]) -> None:
        """Keep the extras of one transition of every environment."""
        for i, info in enumerate(infos):
            self.costs[row, i] = np.nan_to_num(info["cost"], nan=np.inf) if "cost" in info else None
            success = succeeded(info)
            self.successes[row, i] = -1 if success is None else success
            self.rewards[row, i] = info.get("reward", rewards[i])
        self.cuts[row] = False


class _Recording:
    """Makes one of SB3's replay buffers keep costs, successes and unpenalised rewards too."""

    buffer_size: int
    n_envs: int
    pos: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extras = Extras(self.buffer_size, self.n_envs)

    def add(
        self, obs: Any, next_obs: Any, action: Array, reward: Array, done: Array, infos: Any
    ) -> None:
        """Store one transition of every environment."""
        self.extras.write(self.pos, reward, infos)
        super().add(obs, next_obs, action, reward, done, infos)  # type: ignore[misc]


@final
class RecordingReplayBuffer(_Recording, ReplayBuffer):
    """SB3's `ReplayBuffer` that also keeps costs, successes and unpenalised rewards.

    Pass it as ``replay_buffer_class``; `replay_episodes` reads it. Arguments as in SB3.
    """


@final
class RecordingDictReplayBuffer(_Recording, DictReplayBuffer):
    """`RecordingReplayBuffer` for Dict observations. Arguments as in SB3."""


def replay_episodes(model: BaseAlgorithm) -> Iterator[Episode]:
    """Return the replay buffer of an off-policy model as episodes, oldest first.

    Actions are in the environment's units. An episode that had not ended, because training
    stopped or the environment was reset, ends as truncated. In a buffer that has wrapped around,
    the first episode of each environment may lack its beginning. The buffer of `train_sb3` also
    records costs, successes and the rewards before a penalty.

    Args:
        model: SAC, TD3, DDPG or DQN model with its replay buffer in memory.

    Raises:
        ConfigError: If the model has no replay buffer, or one that forgets final observations
            (``optimize_memory_usage=True``).
        DataError: If a number is not finite, or an observation differs from the next observation
            of the step before; names the episode and step.
    """
    buffer = getattr(model, "replay_buffer", None)
    if not isinstance(buffer, ReplayBuffer):
        raise ConfigError(
            f"model: expected one with a replay buffer, got {type(model).__name__}; use off-policy "
            "models such as SAC, and `record` for others"
        )
    if buffer.optimize_memory_usage:
        raise ConfigError(
            "model: its replay buffer has overwritten the last observation of each episode; train "
            "with optimize_memory_usage=False"
        )
    return _episodes(model, buffer)


def _episodes(model: BaseAlgorithm, buffer: ReplayBuffer) -> Iterator[Episode]:
    oldest = buffer.pos if buffer.full else 0
    order = (oldest + np.arange(buffer.size())) % buffer.buffer_size
    for index, span in enumerate(_spans(buffer, order)):
        rows = order[span.start : span.stop], span.environment
        actions = buffer.actions[rows]
        if isinstance(model.action_space, spaces.Box):
            box = model.action_space
            # The same expression as SB3's own before env.step; the Box is met up to rounding.
            actions = model.policy.unscale_action(actions.reshape(-1, *box.shape))
            actions = np.clip(actions, box.low, box.high)
        yield _episode(buffer, rows, actions, index)


class _Span(NamedTuple):
    start: int
    environment: int
    stop: int


def _spans(buffer: ReplayBuffer, order: Array) -> list[_Span]:
    """Steps of each episode, oldest first; `start` and `stop` count from the oldest row."""
    ends = buffer.dones[order] > 0
    extras = _extras(buffer)
    if extras is not None:
        ends = ends | extras.cuts[order]
    ends[-1:] = True
    spans = []
    for environment in range(buffer.n_envs):
        stops = np.flatnonzero(ends[:, environment]) + 1
        starts = [0, *stops[:-1]]
        spans += [
            _Span(int(start), environment, int(stop))
            for start, stop in zip(starts, stops, strict=True)
        ]
    return sorted(spans)


def _episode(buffer: ReplayBuffer, rows: tuple[Array, int], actions: Array, index: int) -> Episode:
    extras = _extras(buffer)
    rewards = buffer.rewards if extras is None else extras.rewards
    terminations = (buffer.dones[rows] > 0) & (buffer.timeouts[rows] == 0)
    truncations = np.zeros_like(terminations)
    truncations[-1] = not terminations[-1]
    episode = Episode(
        observations=_observations(buffer, rows, index),
        actions=actions,
        rewards=rewards[rows].astype(np.float64),
        terminations=terminations,
        truncations=truncations,
        costs=None if extras is None else _told(extras.costs, np.isnan(extras.costs), rows),
        successes=None
        if extras is None
        else _told(extras.successes > 0, extras.successes < 0, rows),
    )
    for name, values in vars(episode).items():
        if name in ("actions", "rewards", "costs") and values is not None:
            _check_finite(name.removesuffix("s"), values, index)
    return episode


def _observations(buffer: ReplayBuffer, rows: tuple[Array, int], index: int) -> Observation:
    """T + 1 observations; each next observation must equal the following step's observation."""
    before, after = buffer.observations, buffer.next_observations
    if isinstance(before, dict) and isinstance(after, dict):
        return {key: _aligned(before[key][rows], after[key][rows], index) for key in before}
    return _aligned(before[rows], after[rows], index)


def _aligned(before: Array, after: Array, index: int) -> Array:
    _check_finite("observation", before, index)
    _check_finite("next observation", after, index)
    follows = (before[1:] == after[:-1]).reshape(len(before) - 1, -1).all(axis=1)
    if not follows.all():
        problem = (
            "the next observation is not the observation of the following step; the environment "
            "was reset or the buffer altered from outside: train with train_sb3, which marks this"
        )
        _fail(problem, index, np.logical_not(follows))
    return np.concatenate([before, after[-1:]])


def _told(values: Array, missing: Array, rows: tuple[Array, int]) -> Array | None:
    """An episode's part of `values`, 0 where a step told nothing; None if no step of any tells."""
    return None if missing.all() else np.where(missing[rows], values.dtype.type(0), values[rows])


def _check_finite(name: str, values: Array, index: int) -> None:
    bad = np.logical_not(np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if bad.any():
        _fail(f"the {name} is not finite; look for the cause in the environment", index, bad)


def _fail(problem: str, index: int, bad: Array) -> NoReturn:
    raise DataError(problem, source=SOURCE, episode=index, step=int(np.argmax(bad)))


def _extras(buffer: ReplayBuffer) -> Extras | None:
    return buffer.extras if isinstance(buffer, _Recording) else None


def _arrays(buffer: ReplayBuffer) -> dict[str, Array]:
    """All arrays of a recording buffer by name, not copied; rows are the first axis."""
    arrays: dict[str, Array] = {}
    for name in ("observations", "next_observations"):
        part = getattr(buffer, name)
        named = part if isinstance(part, dict) else {"": part}
        arrays |= {f"{name}/{key}": array for key, array in named.items()}
    for name in ("actions", "rewards", "dones", "timeouts"):
        arrays[name] = getattr(buffer, name)
    extras = _extras(buffer)
    kept = {} if extras is None else vars(extras)
    return arrays | {f"extras/{name}": array for name, array in kept.items()}


def buffer_arrays(buffer: ReplayBuffer) -> dict[str, Array]:
    """Return copies of the filled rows of every array of `buffer`, for saving."""
    return {name: array[: buffer.size()].copy() for name, array in _arrays(buffer).items()}


def restore_buffer(
    buffer: ReplayBuffer, arrays: Mapping[str, Array], *, pos: int, full: bool
) -> None:
    """Fill `buffer` with saved arrays, each row in its old position.

    Args:
        buffer: Buffer for the same spaces and number of environments.
        arrays: Result of `buffer_arrays`.
        pos: `pos` of the saved buffer.
        full: `full` of the saved buffer.

    Raises:
        CheckpointError: If an array is missing or has another shape or dtype.
    """
    own = _arrays(buffer)
    if set(own) != set(arrays):
        raise CheckpointError(f"replay buffer: expected arrays {sorted(own)}, got {sorted(arrays)}")
    count = len(arrays["rewards"])
    if count > buffer.buffer_size or (full and pos > 0 and count != buffer.buffer_size):
        raise CheckpointError(
            f"replay buffer: saved with {count} rows, which do not fit into {buffer.buffer_size}; "
            "resume with the same buffer_size"
        )
    for name, array in own.items():
        saved = arrays[name]
        if saved.shape != (count, *array.shape[1:]) or saved.dtype != array.dtype:
            raise CheckpointError(
                f"replay buffer: {name}: expected {(count, *array.shape[1:])} {array.dtype}, got "
                f"{saved.shape} {saved.dtype}"
            )
        array[:count] = saved
    wrapped = full and pos > 0
    buffer.pos = pos if wrapped else count % buffer.buffer_size
    buffer.full = count == buffer.buffer_size
