"""Fitting normalisers to data, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import numpy as np

from mpd_gym.datasets.normalizers import KINDS, AffineNormalizer, CdfNormalizer, Normalizer
from mpd_gym.errors import InputError, check_choice
from mpd_gym.types import Array, BoolArray

__all__ = ["KNOTS", "NormalizerFitter", "counts_as_constant", "fit_normalizer", "rounding"]

KNOTS = 2048  # most knots of a CDF table, per dimension
_SKETCH = 2**16  # most distinct values that a CDF keeps per dimension between pieces
_BUFFER = 2**22  # numbers gathered before they are merged into the sketch
_LARGEST = 1e100  # squares of larger values, and their sums, leave the range of float64
# Smallest step between the levels of two knots (less the rounding of evenly spaced levels), and
# between values that count as different, absolute and relative to their magnitude, in roundings of
# the data: smaller steps would let the rounding of a dead sensor fill the normalised range.
_LEVEL_STEP = 2 / (KNOTS - 1) * (1 - 1e-9)
_VALUE_STEP = 4
_SMALLEST = 1e-100


@final
class NormalizerFitter:
    """Fits a normaliser to data in pieces, which may be larger than memory.

    ``"minmax"`` is exact, ``"gaussian"`` exact to rounding. ``"cdf"`` keeps at most 65,536
    weighted values per dimension between pieces, always with the smallest and the largest.

    Args:
        kind: One of `KINDS`.

    Raises:
        ConfigError: If `kind` is unknown.
    """

    def __init__(self, kind: str) -> None:
        check_choice("normalizer kind", kind, KINDS)
        self._summary: _Quantiles | _Moments = _Quantiles() if kind == "cdf" else _Moments(kind)
        self._size: int | None = None
        self._rounding = np.array(np.inf)

    @property
    def empty(self) -> bool:
        """True before the first `add`."""
        return self._size is None

    def add(self, data: Array) -> None:
        """Add M rows ``[M, d]``, in environment units.

        Raises:
            InputError: If the shape is wrong, d differs from earlier rows, or a value is not finite
                or beyond 1e100.
        """
        rows = np.asarray(data, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != (self._size or rows.shape[1]) or not rows.size:
            width = "d" if self._size is None else self._size
            raise InputError(f"data: expected shape (M >= 1, {width}), got {rows.shape}")
        usable = (np.abs(rows) < _LARGEST).all(axis=1)
        if not usable.all():
            bad = int(usable.argmin())
            raise InputError(f"data: expected finite values, got row {bad}: {rows[bad]}")
        self._size = rows.shape[1]
        self._rounding = np.minimum(self._rounding, rounding(rows))
        self._summary.add(rows)

    def fit(self) -> Normalizer:
        """Return the normaliser of all rows so far.

        Raises:
            InputError: If there are no rows.
        """
        if self._size is None:
            raise InputError("data: expected at least one row to fit a normalizer to, got none")
        return self._summary.normalizer(self._rounding)


def fit_normalizer(kind: str, data: Array | Iterable[Array]) -> Normalizer:
    """Fit a normaliser.

    Args:
        kind: One of `KINDS`.
        data: Rows ``[M, d]`` in environment units, or an iterable of such pieces.

    Raises:
        ConfigError: If `kind` is unknown.
        InputError: If the data is empty, not finite, or has the wrong shape.
    """
    fitter = NormalizerFitter(kind)
    for piece in (data,) if isinstance(data, np.ndarray) else data:
        fitter.add(piece)
    return fitter.fit()


@final
class _Moments:
    """Running range, mean and variance (Chan et al. 1979)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count = 0
        self.low, self.high, self.mean, self.squares = (np.array(0.0) for _ in range(4))

    def add(self, rows: Array) -> None:
        low, high, mean = rows.min(axis=0), rows.max(axis=0), rows.mean(axis=0)
        if not self.count:
            self.low, self.high = low, high
        before, self.count = self.count, self.count + len(rows)
        gap = mean - self.mean
        self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
        self.squares = (
            self.squares
            + np.square(rows - mean).sum(axis=0)
            + gap**2 * (before * len(rows) / self.count)
        )
        self.mean = self.mean + gap * (len(rows) / self.count)

    def normalizer(self, rounding: Array) -> Normalizer:
        low, high = self.low, self.high
        shift, scale = low / 2 + high / 2, high / 2 - low / 2
        constant = counts_as_constant(low, high, rounding)
        if self.kind == "gaussian":
            deviation = np.sqrt(self.squares / self.count)
            constant |= deviation <= _SMALLEST
            shift, scale = np.where(constant, shift, self.mean), deviation
        return AffineNormalizer(self.kind, shift, np.where(constant, 0.0, scale), low, high)


@final
class _Quantiles:
    """Sorted weighted values of each dimension, at most about `_SKETCH`."""

    def __init__(self) -> None:
        self.tables: list[tuple[Array, Array]] = []
        self.pieces: list[Array] = []
        self.pending = 0

    def add(self, rows: Array) -> None:
        self.pieces.append(rows.copy())
        self.pending += rows.size
        if self.pending >= _BUFFER:
            self._merge()

    def _merge(self) -> None:
        if not self.pieces:
            return
        rows = np.concatenate(self.pieces)
        self.pieces, self.pending = [], 0
        tables = self.tables or [(np.empty(0), np.empty(0))] * rows.shape[1]
        self.tables = [
            _compressed(*_distinct(column, *table))
            for column, table in zip(rows.T, tables, strict=True)
        ]

    def normalizer(self, rounding: Array) -> Normalizer:
        self._merge()
        knots = [_knots(*table, step) for table, step in zip(self.tables, rounding, strict=True)]
        return CdfNormalizer(
            values=np.concatenate([values for values, _ in knots]),
            levels=np.concatenate([levels for _, levels in knots]),
            counts=np.array([len(values) for values, _ in knots]),
        )


def _distinct(column: Array, values: Array, weights: Array) -> tuple[Array, Array]:
    """Add a column of weight 1 to distinct sorted values with weights."""
    merged = np.concatenate([values, column])
    order = merged.argsort()
    merged = merged[order]
    weights = np.concatenate([weights, np.ones(len(column))])[order]
    first = np.flatnonzero(np.diff(merged, prepend=np.nan) != 0)
    return merged[first], np.add.reduceat(weights, first)


def _compressed(values: Array, weights: Array) -> tuple[Array, Array]:
    """Merge neighbours into at most `_SKETCH` groups of equal weight; keep both ends."""
    if len(values) <= _SKETCH:
        return values, weights
    centre = np.cumsum(weights) - weights / 2
    group = (centre / weights.sum() * _SKETCH).astype(np.int64)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    last = np.append(first[1:], len(values)) - 1
    kept = values[(first + last) // 2]
    kept[0], kept[-1] = values[0], values[-1]
    return kept, np.add.reduceat(weights, first)


def _knots(values: Array, weights: Array, rounding: Array) -> tuple[Array, Array]:
    """Choose the knots of one dimension from distinct sorted values and weights."""
    low, high = values[0], values[-1]
    if counts_as_constant(low, high, rounding):
        return np.array([low / 2 + high / 2]), np.zeros(1)
    rank = np.cumsum(weights) - weights / 2
    levels = 2 * ((rank - rank[0]) / (rank[-1] - rank[0])) - 1
    last = len(values) - 1
    kept, index = [0], 0
    while True:
        above = np.searchsorted(levels, levels[index] + _LEVEL_STEP)
        value_step = _value_step(values[index], values[index], rounding)
        index = max(int(above), int(np.searchsorted(values, values[index] + value_step)))
        if index >= last:
            break
        kept.append(index)
    near_end = levels[last] - levels[kept[-1]] < _LEVEL_STEP
    if len(kept) > 1 and (near_end or high - values[kept[-1]] < _value_step(high, high, rounding)):
        kept.pop()
    kept.append(last)
    return values[kept], levels[kept]


def rounding(rows: Array) -> Array:
    """Return the relative rounding of each column: float32's where it holds no finer number."""
    with np.errstate(over="ignore"):
        single = (rows == rows.astype(np.float32)).all(axis=0)
    return np.asarray(np.where(single, np.finfo(np.float32).eps, np.finfo(np.float64).eps))


def counts_as_constant(low: Array, high: Array, rounding: Array) -> BoolArray:
    """Return, per dimension, whether values from `low` to `high` differ by rounding at most."""
    return np.asarray(high / 2 - low / 2 <= _value_step(low, high, rounding))


def _value_step(low: Array, high: Array, rounding: Array) -> Array:
    """Smallest difference, per dimension, between values that count as different."""
    magnitude = np.maximum(np.abs(low), np.abs(high))
    return np.asarray(np.maximum(_VALUE_STEP * rounding * magnitude, _SMALLEST))
