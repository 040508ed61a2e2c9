"""Maps between environment units and the normalised range of diffusion.

| kind | normalised data | outside the data's range | constant dimension |
|---|---|---|---|
| ``"cdf"`` | empirical CDF, uniform on [-1, 1] (the authors' choice) | clipped, both ways | 0 |
| ``"minmax"`` | linear, [-1, 1] | linear | 0 |
| ``"gaussian"`` | linear, mean 0, standard deviation 1 | linear | 0 |

Each dimension has its own map. Inside the data's range ``unnormalize`` inverts ``normalize`` to
float64 rounding (for the CDF about 1e-12 of the range, as its slope is up to 1000). A constant
dimension maps to 0, and every value maps back to the constant; constant is also one whose values
differ by rounding only, float32's where they hold no finer numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import numpy as np

from mpd_gym.errors import CheckpointError, InputError, check_choice
from mpd_gym.types import Array

__all__ = [
    "KINDS",
    "AffineNormalizer",
    "CdfNormalizer",
    "Normalizer",
    "Normalizers",
    "normalizer_from_arrays",
]

KINDS = ("cdf", "gaussian", "minmax")


class Normalizer(ABC):
    """A map of ``[..., d]`` arrays, dimension by dimension. Instances are immutable."""

    kind: str

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of dimensions d."""

    @property
    @abstractmethod
    def clip_range(self) -> tuple[Array, Array]:
        """Smallest and largest normalised value of the data, each ``[d]``.

        A sampler may clip its x̂_0 to this range: [-1, 1] for ``"cdf"`` and ``"minmax"``, wider for
        ``"gaussian"``, and [0, 0] for constant dimensions.
        """

    @abstractmethod
    def normalize(self, x: Array) -> Array:
        """Map environment units ``[..., d]`` to float64 normalised units.

        Raises:
            InputError: If the last axis is not d long.
        """

    @abstractmethod
    def unnormalize(self, z: Array) -> Array:
        """Map normalised ``[..., d]`` back to float64 environment units.

        Raises:
            InputError: If the last axis is not d long.
        """

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Return what `normalizer_from_arrays` needs besides the kind."""


class Normalizers(NamedTuple):
    """The normalisers of one task; `goal` is None if the data has no ``desired_goal``."""

    observation: Normalizer
    action: Normalizer
    goal: Normalizer | None = None


@final
@dataclass(frozen=True, eq=False)
class AffineNormalizer(Normalizer):
    """``z = (x - shift) / scale``: the kinds ``"minmax"`` and ``"gaussian"``.

    Attributes:
        kind: ``"minmax"`` or ``"gaussian"``.
        shift: ``[d]``; the constant if `scale` is 0.
        scale: ``[d]``, 0 for constant dimensions.
        low: Smallest value of the data, ``[d]``.
        high: Largest value of the data, ``[d]``.

    Raises:
        CheckpointError: If the arrays do not fit together.
    """

    kind: str
    shift: Array
    scale: Array
    low: Array
    high: Array
    _inverse: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        arrays = [np.array(a, dtype=np.float64) for a in self.arrays().values()]
        if any(a.shape != (arrays[0].size,) or not np.isfinite(a).all() for a in arrays):
            raise CheckpointError(
                f"{self.kind} normalizer: expected four finite vectors of one length, got shapes "
                f"{[a.shape for a in arrays]}"
            )
        _, scale, low, high = arrays
        if (scale < 0).any() or (low > high).any():
            raise CheckpointError(f"{self.kind} normalizer: a scale or range is negative")
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        names = ("shift", "scale", "low", "high", "_inverse")
        _freeze(self, dict(zip(names, [*arrays, inverse], strict=True)))

    @property
    def size(self) -> int:
        """Number of dimensions d."""
        return len(self.shift)

    @property
    def clip_range(self) -> tuple[Array, Array]:
        """Smallest and largest normalised value of the data, each ``[d]``."""
        if self.kind == "minmax":
            bound = np.where(self.scale > 0, 1.0, 0.0)
            return -bound, bound
        return self.normalize(self.low), self.normalize(self.high)

    def normalize(self, x: Array) -> Array:
        """Map environment units ``[..., d]`` to normalised units; see `Normalizer`."""
        return (_checked(x, self.size) - self.shift) * self._inverse

    def unnormalize(self, z: Array) -> Array:
        """Map normalised ``[..., d]`` to environment units; see `Normalizer`."""
        return _checked(z, self.size) * self.scale + self.shift

    def arrays(self) -> dict[str, Array]:
        """Return what `normalizer_from_arrays` needs besides the kind."""
        return {"shift": self.shift, "scale": self.scale, "low": self.low, "high": self.high}


@final
@dataclass(frozen=True, eq=False)
class CdfNormalizer(Normalizer):
    """Piecewise-linear empirical CDF, strictly increasing between its knots.

    A repeated value has the level of its middle rank. Levels are stretched so that the smallest
    value maps to -1 and the largest to 1. `fit_normalizer` keeps at most 2048 knots per dimension
    with levels at least 2 / 2047 apart: the inverse is well conditioned, and normalised data is
    uniform to within two such steps, apart from ties.

    Attributes:
        values: Knots in environment units, all dimensions in one vector, ``[P]``.
        levels: Their normalised values, ``[P]``: from -1 to 1, or 0 for a constant dimension.
        counts: Number of knots of each dimension, ``[d]``.

    Raises:
        CheckpointError: If the arrays do not form such a table.
    """

    values: Array
    levels: Array
    counts: Array
    kind: str = field(default="cdf", init=False)
    _tables: tuple[tuple[Array, Array], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        counts = np.array(self.counts)
        vectors = [np.array(a, dtype=np.float64) for a in (self.values, self.levels)]
        whole = counts.ndim == 1 and counts.dtype.kind in "iu" and (counts > 0).all()
        shape = (int(counts.sum()),) if whole else None
        if any(a.shape != shape or not np.isfinite(a).all() for a in vectors):
            raise CheckpointError(
                "cdf normalizer: expected finite values and levels, one for each counted knot, got "
                f"shapes {[a.shape for a in vectors]} for {counts}"
            )
        ends = np.cumsum(counts)[:-1]
        tables = tuple(zip(*(np.split(a, ends) for a in vectors), strict=True))
        for dimension, (values, levels) in enumerate(tables):
            _check_table(dimension, values, levels)
        fields = {"values": vectors[0], "levels": vectors[1], "counts": counts.astype(np.int64)}
        _freeze(self, fields)
        object.__setattr__(self, "_tables", tables)

    @property
    def size(self) -> int:
        """Number of dimensions d."""
        return len(self.counts)

    @property
    def clip_range(self) -> tuple[Array, Array]:
        """Smallest and largest normalised value of the data, each ``[d]``."""
        bound = np.where(self.counts > 1, 1.0, 0.0)
        return -bound, bound

    def normalize(self, x: Array) -> Array:
        """Map environment units ``[..., d]`` to normalised units; see `Normalizer`."""
        x = _checked(x, self.size)
        out = np.empty(x.shape)
        for j, (values, levels) in enumerate(self._tables):
            out[..., j] = np.interp(x[..., j], values, levels)
        return out

    def unnormalize(self, z: Array) -> Array:
        """Map normalised ``[..., d]`` to environment units; see `Normalizer`."""
        z = _checked(z, self.size)
        out = np.empty(z.shape)
        for j, (values, levels) in enumerate(self._tables):
            out[..., j] = np.interp(z[..., j], levels, values)
        return out

    def arrays(self) -> dict[str, Array]:
        """Return what `normalizer_from_arrays` needs besides the kind."""
        return {"values": self.values, "levels": self.levels, "counts": self.counts}


def normalizer_from_arrays(kind: str, arrays: Mapping[str, Array]) -> Normalizer:
    """Make a normaliser from the result of `Normalizer.arrays`, without a data set.

    Raises:
        ConfigError: If `kind` is unknown.
        CheckpointError: If the arrays do not fit the kind.
    """
    check_choice("normalizer kind", kind, KINDS)
    names = {"values", "levels", "counts"} if kind == "cdf" else {"shift", "scale", "low", "high"}
    if set(arrays) != names:
        raise CheckpointError(
            f"{kind} normalizer: expected arrays {sorted(names)}, got {sorted(arrays)}"
        )
    return CdfNormalizer(**arrays) if kind == "cdf" else AffineNormalizer(kind, **arrays)


def _freeze(normalizer: Normalizer, fields: Mapping[str, Array]) -> None:
    """Set the fields of a frozen normaliser to read-only arrays."""
    for name, value in fields.items():
        value.flags.writeable = False
        object.__setattr__(normalizer, name, value)


def _check_table(dimension: int, values: Array, levels: Array) -> None:
    """Check the knots of one dimension."""
    ends = (-1.0, 1.0) if len(levels) > 1 else (0.0, 0.0)
    if not ((np.diff(values) > 0).all() and (np.diff(levels) > 0).all()):
        raise CheckpointError(f"cdf normalizer: the knots of dimension {dimension} do not increase")
    if (levels[0], levels[-1]) != ends:
        raise CheckpointError(
            f"cdf normalizer: the levels of dimension {dimension} go from {levels[0]} to "
            f"{levels[-1]}; expected {ends[0]} to {ends[1]}"
        )


def _checked(x: Array, size: int) -> Array:
    """View `x` as float64 with a last axis of `size`."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim == 0 or x.shape[-1] != size:
        raise InputError(f"normalizer: expected an array [..., {size}], got shape {x.shape}")
    return x
