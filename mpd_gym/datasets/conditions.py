"""Values of conditions, from episodes for training and from users at prediction time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import accumulate
from typing import Any, final

import numpy as np

from mpd_gym.boundary import as_numbers, returned
from mpd_gym.datasets.config import ConditionSpec, WindowConfig
from mpd_gym.datasets.normalizers import Normalizer, Normalizers
from mpd_gym.datasets.source import EpisodeSource
from mpd_gym.datasets.traversal import (
    as_sources,
    flat_observations,
    goal_observations,
    visit_episodes,
)
from mpd_gym.errors import CheckpointError, ConfigError, InputError, check_choice
from mpd_gym.types import Array, Episode

__all__ = [
    "ConditionFunction",
    "ConditionScaling",
    "FittedConditions",
    "discounted_sums",
    "fit_conditions",
]

ConditionFunction = Callable[[Episode], Array]  # episode of T steps -> [T, size]


@final
@dataclass(frozen=True)
class ConditionScaling:
    """Scaling of a return or cost: `low` maps to 0 and `high` to 1.

    Attributes:
        low: Value that maps to 0, in environment units.
        high: Value that maps to 1, above `low`.
        minimum: Smallest value at a window's first step in the data.
        maximum: Largest such value.

    Raises:
        CheckpointError: If the values are not finite or `high` is not above `low`.
    """

    low: float
    high: float
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not np.isfinite(astuple(self)).all() or not self.low < self.high:
            raise CheckpointError(f"condition scaling: expected finite low < high, got {self}")

    def scale(self, value: Array) -> Array:
        """Map environment units to scaled ones, elementwise."""
        return (value - self.low) / (self.high - self.low)


@final
@dataclass(frozen=True, eq=False)
class FittedConditions:
    """Conditions with constants that were fitted to training data.

    Args:
        config: Declares the conditions, the horizon and the discount.
        normalizers: Normalisers of observations and goals.
        scalings: For every condition of kind ``"return"`` or ``"cost"``, by name.
        functions: For conditions of kind ``"custom"``, by name. Only `values` needs them; `arrays`
            does not hold them.

    Raises:
        ConfigError: If a scaling, a goal normaliser, or the declaration of a function is missing.
    """

    config: WindowConfig
    normalizers: Normalizers
    scalings: Mapping[str, ConditionScaling]
    functions: Mapping[str, ConditionFunction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        specs = self.config.conditions
        scaled = sorted(spec.name for spec in specs if spec.scaling)
        if sorted(self.scalings) != scaled:
            raise ConfigError(f"scalings: expected {scaled}, got {sorted(self.scalings)}")
        _check_functions(specs, self.functions)
        if any(spec.kind == "goal" for spec in specs) and self.normalizers.goal is None:
            raise ConfigError(
                "conditions: kind 'goal' needs Dict observations with 'desired_goal'; the data "
                "has none"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each condition's value."""
        return {
            spec.name: spec.size or self._normalizer(spec).size for spec in self.config.conditions
        }

    def values(self, episode: Episode) -> dict[str, Array]:
        """Compute every condition at every step of an episode.

        Returns:
            For each condition float64 ``[T, size]``, scaled or normalised.

        Raises:
            ConfigError: If the function of a custom condition is missing.
            InputError: If the episode lacks data for a condition, or a function does not return
                finite numbers of shape ``[T, size]``.
        """
        return {spec.name: self._values(spec, episode) for spec in self.config.conditions}

    def _values(self, spec: ConditionSpec, episode: Episode) -> Array:
        if spec.kind == "custom":
            return _custom(spec, episode, self.functions)
        if spec.kind == "goal":
            return self._normalizer(spec).normalize(_goals(episode))
        if spec.kind == "final_state":
            last = self._normalizer(spec).normalize(flat_observations(episode.observations)[-1])
            return np.broadcast_to(last, (len(episode), len(last)))
        return self.scalings[spec.name].scale(_sums(spec, episode, self.config))[:, None]

    def encode(self, name: str, value: Any) -> Array:
        """Turn a user's value into the networks' units.

        Args:
            name: Name of the condition.
            value: ``[..., size]``, or a plain number if size is 1. ``"return"`` and ``"custom"``
                are in scaled units (1 asks for the largest return); ``"cost"`` is a budget,
                ``"goal"`` and ``"final_state"`` are a goal or observation, in environment units.

        Returns:
            float32 ``[..., size]``.

        Raises:
            ConfigError: If there is no such condition.
            InputError: If the value has the wrong shape or is not finite.
        """
        specs = {spec.name: spec for spec in self.config.conditions}
        check_choice("condition", name, specs)
        spec = specs[name]
        array = _numbers(name, value, self.sizes[name])
        if spec.kind == "cost":
            array = self.scalings[name].scale(array)
        elif spec.kind in ("goal", "final_state"):
            array = self._normalizer(spec).normalize(array)
        return array.astype(np.float32)

    def arrays(self) -> dict[str, Array]:
        """Return what `from_arrays` needs besides configuration and normalisers."""
        return {name: np.array(astuple(scaling)) for name, scaling in self.scalings.items()}

    @classmethod
    def from_arrays(
        cls,
        config: WindowConfig,
        normalizers: Normalizers,
        arrays: Mapping[str, Array],
        functions: Mapping[str, ConditionFunction] | None = None,
    ) -> FittedConditions:
        """Restore conditions from the result of `arrays`, without a data set.

        Raises:
            CheckpointError: If the arrays do not fit the configuration.
        """
        names = sorted(spec.name for spec in config.conditions if spec.scaling)
        shapes = {name: np.shape(array) for name, array in arrays.items()}
        if shapes != dict.fromkeys(names, (4,)):
            raise CheckpointError(
                f"conditions: expected arrays of shape (4,) for {names}, got {shapes}"
            )
        scalings = {name: ConditionScaling(*map(float, array)) for name, array in arrays.items()}
        return cls(config, normalizers, scalings, functions or {})

    def _normalizer(self, spec: ConditionSpec) -> Normalizer:
        goal = self.normalizers.goal
        return goal if spec.kind == "goal" and goal is not None else self.normalizers.observation


def fit_conditions(
    sources: EpisodeSource | Sequence[EpisodeSource],
    config: WindowConfig,
    normalizers: Normalizers,
    functions: Mapping[str, ConditionFunction] | None = None,
) -> FittedConditions:
    """Fit the scaling of every return and cost condition, in one pass over the data.

    Only steps at which windows begin count.

    Args:
        sources: Episodes of one or several data sets.
        config: Declares the conditions.
        normalizers: Normalisers of observations and goals.
        functions: ``{name: function}`` for conditions of kind ``"custom"``.

    Raises:
        ConfigError: If the functions do not match the declared conditions, all values of a
            condition are equal, or the scaling ``"authors"`` would divide by a return that is not
            positive.
        DataError: If an episode lacks data for a condition.
    """
    functions = functions or {}
    _check_functions(config.conditions, functions)
    missing = [s.name for s in config.conditions if s.kind == "custom" and s.name not in functions]
    if missing:
        raise ConfigError(f"functions: condition {missing[0]!r} is 'custom' and needs a function")
    scaled = [spec for spec in config.conditions if spec.scaling]
    found: dict[str, list[tuple[float, float, float]]] = {spec.name: [] for spec in scaled}

    def visit(episode: Episode) -> None:
        drawn = config.windows_in(len(episode), bool(episode.terminations[-1]))
        for spec in scaled if drawn else ():
            sums = _sums(spec, episode, config)[:drawn]
            found[spec.name].append((sums.min(), sums.max(), sums[0]))

    if scaled:
        visit_episodes(sources, visit)
        if not all(found.values()):
            raise config.no_windows(", ".join(one.name for one in as_sources(sources)))
    scalings = {spec.name: _scaling(spec, np.array(found[spec.name])) for spec in scaled}
    return FittedConditions(config, normalizers, scalings, functions)


def discounted_sums(series: Array, discount: float, horizon: int | None = None) -> Array:
    """Sum ``γ^i series[t + i]`` from every t on.

    Args:
        series: ``[T]``.
        discount: γ.
        horizon: Steps of the sum; None for all up to the end. No sum goes beyond the end.

    Returns:
        float64 ``[T]``.
    """
    backwards = np.asarray(series, dtype=np.float64)[::-1]
    if horizon is None:
        sums = accumulate(backwards.tolist(), lambda later, now: now + discount * later)
        return np.fromiter(sums, np.float64, len(backwards))[::-1]
    weights = discount ** np.arange(min(horizon, len(backwards)))
    return np.convolve(backwards, weights)[: len(backwards)][::-1]


def _sums(spec: ConditionSpec, episode: Episode, config: WindowConfig) -> Array:
    """Discounted return or cost at every step, ``[T]``, in environment units."""
    if spec.kind == "return":
        series = episode.rewards + spec.terminal_penalty * _failures(episode)
    elif episode.costs is None:
        raise InputError(f"condition {spec.name!r} needs costs; the episode has none")
    else:
        series = episode.costs
    return discounted_sums(series, config.discount, config.steps_summed(spec))


def _failures(episode: Episode) -> Array:
    """1.0 if a step terminated the episode without success, ``[T]``."""
    failed = episode.terminations
    if episode.successes is not None:
        failed = failed & ~episode.successes
    return failed.astype(np.float64)


def _scaling(spec: ConditionSpec, extremes: Array) -> ConditionScaling:
    """Make the scaling from each episode's (smallest, largest, first) sum."""
    minimum, maximum = float(extremes[:, 0].min()), float(extremes[:, 1].max())
    if spec.scaling == "raw":
        return ConditionScaling(0.0, 1 / spec.scale, minimum, maximum)
    if spec.scaling == "authors":
        largest = float(extremes[:, 2].max())
        if largest <= 0:
            raise ConfigError(
                f"condition {spec.name!r}: scaling 'authors' divides by the largest return at "
                f"t = 0, here {largest:g}, which would swap best and worst; use 'range'"
            )
        return ConditionScaling(0.0, largest, minimum, maximum)
    if maximum - minimum <= 1e-12 * max(abs(minimum), abs(maximum)):
        raise ConfigError(
            f"condition {spec.name!r}: its value is {minimum:g} everywhere in the data, so plans "
            "cannot depend on it; remove the condition"
        )
    return ConditionScaling(minimum, maximum, minimum, maximum)


def _goals(episode: Episode) -> Array:
    """Goal at every step, ``[T, ng]``, in environment units."""
    goals = goal_observations(episode.observations)
    if goals is None:
        raise InputError("condition 'goal' needs Dict observations with 'desired_goal'")
    return goals[:-1]


def _custom(
    spec: ConditionSpec, episode: Episode, functions: Mapping[str, ConditionFunction]
) -> Array:
    """Value of a caller's function at every step, checked."""
    if spec.name not in functions:
        raise ConfigError(
            f"condition {spec.name!r} is 'custom', and functions are not saved: pass "
            f"functions={{{spec.name!r}: ...}}"
        )
    assert spec.size is not None  # of kind "custom"
    name, shape = f"function of condition {spec.name!r}", (len(episode), spec.size)
    return returned(name, functions[spec.name], episode, shape=shape, finite=True)


def _check_functions(
    specs: Sequence[ConditionSpec], functions: Mapping[str, ConditionFunction]
) -> None:
    """Check that every function belongs to a custom condition."""
    custom = [spec.name for spec in specs if spec.kind == "custom"]
    unknown = sorted(set(functions) - set(custom))
    if unknown:
        raise ConfigError(
            f"functions: {unknown[0]!r} is not the name of a 'custom' condition; these are {custom}"
        )


def _numbers(name: str, value: Any, size: int) -> Array:
    """Read a user's value as finite float64 ``[..., size]``."""
    array = as_numbers(f"condition {name!r}", value).astype(np.float64)
    if array.ndim == 0 and size == 1:
        array = array[None]
    if array.ndim == 0 or array.shape[-1] != size:
        raise InputError(f"condition {name!r}: expected shape [..., {size}], got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"condition {name!r}: expected finite numbers, got {value}")
    return array
