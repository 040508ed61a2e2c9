"""Many copies of one environment, stepped in one NumPy call per operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import Space, spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mpd_gym.envs.checks import checked_array
from mpd_gym.errors import InputError
from mpd_gym.types import Array, BoolArray

__all__ = ["BatchedEnv", "Infos", "Observations"]

Infos = dict[str, Array]
Observations = Array | dict[str, Array]
Seed = int | Sequence[int | None] | None


class BatchedEnv(VectorEnv[Any, Array, Array], ABC):
    """A `gymnasium.vector.VectorEnv` whose copies are the rows of one state array.

    It behaves as `gymnasium.vector.SyncVectorEnv` over single copies inside a `TimeLimit`: equal
    seeds, observations, rewards, flags, infos with their ``_key`` masks, ``final_obs`` /
    ``final_info``, ``options["reset_mask"]`` and all three autoreset modes. Two things differ: it
    checks all actions before any copy moves, and it does not modify ``options``. It ignores the
    actions of copies that a step only resets.

    A subclass supplies three pure functions, which never write to their arguments: `_initial`,
    `_advance` and `_observe`. A state row holds everything that decides a copy's future, also
    goals and counters of the episode; only the number of steps since the reset is kept here.

    Args:
        num_envs: Number of copies, at least 1.
        observation_space: Space of one copy.
        action_space: Box of one copy.
        max_episode_steps: Steps after which a copy is truncated; None for no limit.
        autoreset_mode: When to reset a copy that ended, by value or name (``"NextStep"``: in the
            next step, ``"SameStep"``: at once, ``"Disabled"``: by the caller).
        render_mode: Only None; single copies draw pictures.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        observation_space: Space[Any],
        action_space: spaces.Box,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        _check_count("num_envs", num_envs)
        if max_episode_steps is not None:
            _check_count("max_episode_steps", max_episode_steps)
        if render_mode is not None:
            raise InputError(
                f"render_mode: batched copies draw no pictures, got {render_mode!r}; "
                "use gymnasium.make, or make_vec(…, vectorization_mode='sync')"
            )
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.render_mode = None
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self._generators: dict[int, tuple[np.random.Generator, int]] = {}
        self._states: Array | None = None
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=np.bool_)

    @abstractmethod
    def _initial(
        self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> tuple[Array, Infos]:
        """Draw the first states of M copies.

        Args:
            generators: One for each of the M copies. Each copy draws from its own generator what
                a single environment draws in `reset`.
            options: Options of `reset` without ``"reset_mask"``; empty for automatic resets. Check
                them before you draw.

        Returns:
            States ``[M, …]`` and the infos of `reset`, each ``[M, …]``.
        """

    @abstractmethod
    def _advance(self, states: Array, actions: Array) -> tuple[Array, Array, BoolArray, Infos]:
        """Take one step of every copy.

        Args:
            states: ``[num_envs, …]``.
            actions: ``[num_envs, nu]``, float64, finite, not yet clipped.

        Returns:
            New arrays: next states ``[num_envs, …]``, rewards ``[num_envs]`` (float64),
            terminations ``[num_envs]``, and the infos of `step`, each ``[num_envs, …]``.
        """

    @abstractmethod
    def _observe(self, states: Array) -> Observations:
        """Return the observations of M states in the space's dtype: new arrays, never views."""

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """Generators of the copies."""
        return tuple(generator for generator, _ in self._all_generators())

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """Seeds of the copies' generators."""
        return tuple(seed for _, seed in self._all_generators())

    def reset(
        self, *, seed: Seed = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observations, Infos]:
        """Reset all copies, or those in ``options["reset_mask"]``.

        Args:
            seed: The copies get seed, seed + 1, …; or one seed (or None) for each copy.
            options: Options of the single environment, for every copy, and ``"reset_mask"``, bool
                ``[num_envs]``, at least one True.

        Returns:
            Observations of all copies, and infos of the copies that were reset.

        Raises:
            InputError: If the seeds, the mask or an option are of the wrong type or shape.
            ResetNeeded: If a first reset leaves copies out.
        """
        rest = dict(options or {})
        mask = self._reset_mask(rest.pop("reset_mask", None))
        if self._states is None and not mask.all():
            raise ResetNeeded("the first reset must reset all copies: leave out 'reset_mask'")
        generators = self._seeded(seed, np.flatnonzero(mask))
        states, infos = self._initial([generator for generator, _ in generators.values()], rest)
        if self._states is None:
            self._states = np.array(states)
        else:
            self._states[mask] = states
        self._generators.update(generators)
        self._elapsed[mask] = 0
        self._ended[mask] = False
        return self._observe(self._states), _scattered((mask, infos))

    def step(
        self, actions: Array
    ) -> tuple[Observations, Array, BoolArray, BoolArray, dict[str, Any]]:
        """Step every copy; the autoreset mode decides when copies that ended are reset.

        Args:
            actions: ``[num_envs, nu]``; values out of range are clipped in a copy.

        Returns:
            Observations, rewards, terminations, truncations and infos, one row for each copy.

        Raises:
            InputError: If `actions` has the wrong shape or a non-finite value.
            ResetNeeded: Before the first reset, and in mode ``"Disabled"`` while a copy has ended.
        """
        fresh = self._resetting()
        states = self._require_states()
        states, rewards, terminated, infos = self._advance(states, self._checked(actions, fresh))
        self._states = states
        self._elapsed += 1
        truncated = self._truncated()
        if fresh is not None:
            rewards[fresh] = 0.0
            terminated[fresh] = truncated[fresh] = False
        self._ended = ended = terminated | truncated
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            fresh, final = ended, self._final_infos(ended, infos)
        if fresh is None:
            infos = _scattered((np.ones(self.num_envs, dtype=np.bool_), infos))
        else:
            infos = _scattered((~fresh, infos), (fresh, self._restart(fresh)))
        return self._observe(states), rewards, terminated, truncated, {**final, **infos}

    def _resetting(self) -> BoolArray | None:
        """Copies that this step only resets; None if there are none."""
        if self.autoreset_mode is AutoresetMode.SAME_STEP or not self._ended.any():
            return None
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            return self._ended
        raise ResetNeeded(
            f"copies {np.flatnonzero(self._ended).tolist()} have ended: with autoreset_mode "
            "'Disabled' call reset(options={'reset_mask': terminations | truncations}) first"
        )

    def _require_states(self) -> Array:
        if self._states is None:
            raise ResetNeeded("Cannot call step() before calling reset()")
        return self._states

    def _truncated(self) -> BoolArray:
        if self.max_episode_steps is None:
            return np.zeros(self.num_envs, dtype=np.bool_)
        return self._elapsed >= self.max_episode_steps

    def _restart(self, mask: BoolArray) -> Infos:
        """Give the copies in `mask` a new start, and return the infos of their resets."""
        generators = [self._generators[index][0] for index in np.flatnonzero(mask).tolist()]
        self._require_states()[mask], infos = self._initial(generators, {})
        self._elapsed[mask] = 0
        return infos

    def _final_infos(self, ended: BoolArray, infos: Infos) -> dict[str, Any]:
        """Last observations and infos of the copies that ended."""
        observations = self._observe(self._require_states()[ended])
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row, index in enumerate(np.flatnonzero(ended)):
            final_obs[index] = _row(observations, row)
        return {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": _scattered((ended, infos)),
            "_final_info": ended.copy(),
        }

    def _checked(self, actions: Array, ignored: BoolArray | None) -> Array:
        """Return `actions` as float64 with zeros for the `ignored` copies."""
        shape = self.action_space.shape or ()
        if ignored is not None and np.shape(actions) == shape:
            actions = np.where(ignored.reshape(-1, *[1] * (len(shape) - 1)), 0.0, actions)
        return checked_array("actions", actions, shape)

    def _reset_mask(self, mask: Any) -> BoolArray:
        if mask is None:
            return np.ones(self.num_envs, dtype=np.bool_)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise InputError(
                f"options['reset_mask']: expected a bool array, got {getattr(mask, 'dtype', mask)}"
            )
        if mask.shape != (self.num_envs,) or not mask.any():
            raise InputError(
                f"options['reset_mask']: expected shape ({self.num_envs},) with at least one True, "
                f"got shape {mask.shape} with {mask.sum()}"
            )
        return mask

    def _all_generators(self) -> list[tuple[np.random.Generator, int]]:
        self._generators.update(self._seeded(None, np.arange(self.num_envs)))
        return [self._generators[index] for index in range(self.num_envs)]

    def _seeded(self, seed: Seed, indices: Array) -> dict[int, tuple[np.random.Generator, int]]:
        """Generators and seeds of the copies at `indices`: new ones where a seed is given."""
        seeds = self._seeds(seed)
        return {
            index: seeding.np_random(seeds[index])
            if seeds[index] is not None or index not in self._generators
            else self._generators[index]
            for index in indices.tolist()
        }

    def _seeds(self, seed: Seed) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int):
            return range(seed, seed + self.num_envs)
        if len(seed) != self.num_envs:
            raise InputError(
                f"seed: expected one for each of {self.num_envs} copies, got {len(seed)}"
            )
        return seed


def _scattered(*parts: tuple[BoolArray, Infos]) -> Infos:
    """Spread infos over all copies, with zeros elsewhere and a mask of the copies that gave each.

    Args:
        parts: Masks ``[num_envs]`` and infos, with rows for all copies or for those in the mask.
    """
    result: Infos = {}
    for mask, infos in parts:
        for key, value in infos.items() if mask.any() else ():
            rows = value[mask] if len(value) == len(mask) else value
            if key not in result:
                result[key] = np.zeros((len(mask), *rows.shape[1:]), dtype=rows.dtype)
                result[f"_{key}"] = np.zeros(len(mask), dtype=np.bool_)
            result[key][mask] = rows
            result[f"_{key}"] |= mask
    return result


def _row(observations: Observations, index: int) -> Observations:
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]  # type: ignore[no-any-return]


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name}: expected a positive integer, got {value!r}")


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        names = [known.value for known in AutoresetMode]
        raise InputError(f"autoreset_mode: expected one of {names}, got {mode!r}") from error
