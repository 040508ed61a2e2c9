"""Estimates from the cells of all training seeds, with their 95 % intervals over trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from mpd_gym.evaluation.returns import Interval, mean_interval, proportion_interval
from mpd_gym.types import Array

__all__ = ["Estimate", "average", "cost_ratio", "ratio_of", "share"]

Values = Mapping[str, Any]
RESAMPLES = 2000  # of the bootstrap


@final
@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over the trials of all seeds, and each seed's own.

    The interval is for the trained networks as they are; how far the seeds are apart tells what
    another training might give.

    Attributes:
        mean: Of all trials.
        low: End of the interval.
        high: End of the interval.
        seeds: The number of each training seed.
        digits: After the point, in text.
        trials: What the number is the mean of, by seed and start; empty if not known.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    digits: int = 3
    trials: Array = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return f"{value:.{self.digits}f}"

        each = ", ".join(map(shown, self.seeds)) if len(self.seeds) > 1 else "one seed"
        return f"**{shown(self.mean)}** [{shown(self.low)}, {shown(self.high)}] ({each})"

    def less(self, other: Estimate) -> Interval | None:
        """Mean difference to another estimate, trial by trial; None if the trials differ."""
        if len(self.trials) != len(other.trials) or not len(self.trials):
            return None
        return mean_interval(self.trials - other.trials)

    @property
    def short(self) -> str:
        """The mean and its interval."""
        low, high = (f"{value:.{self.digits}f}" for value in (self.low, self.high))
        return f"{self.mean:.{self.digits}f} [{low}, {high}]"


def share(cells: Sequence[Values], flags: Callable[[Values], Any]) -> Estimate:
    """Share of trials in per cent with its Wilson interval.

    Args:
        cells: One of each seed.
        flags: Booleans of a cell's trials.
    """
    parts = [np.asarray(flags(cell), bool) for cell in cells]
    return _scaled(proportion_interval(np.concatenate(parts)), parts, 100.0, 1)


def average(cells: Sequence[Values], name: str, digits: int = 3) -> Estimate:
    """Mean of a value over trials with its t interval.

    Args:
        cells: One of each seed.
        name: Of the value.
        digits: After the point, in text.
    """
    parts = [np.asarray(cell[name], float) for cell in cells]
    return _scaled(mean_interval(np.concatenate(parts)), parts, 1.0, digits)


def cost_ratio(cells: Sequence[Values]) -> Estimate:
    """Mean cost ÷ mean least possible cost, with its bootstrap interval over paired trials.

    Args:
        cells: Of `studies.measures.regulation`, one of each seed.
    """
    costs, best = (
        np.concatenate([np.asarray(cell[name], float) for cell in cells])
        for name in ("costs", "optimal_costs")
    )
    rows = np.random.default_rng(0).integers(len(costs), size=(RESAMPLES, len(costs)))
    drawn = costs[rows].mean(axis=1) / best[rows].mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    each = tuple(ratio_of(cell) for cell in cells)
    mean = float(costs.mean() / best.mean())
    return Estimate(mean, float(low), float(high), each, trials=costs / best.mean())


def ratio_of(cell: Values) -> float:
    """Mean cost of a cell's trials ÷ mean least possible cost."""
    return float(np.mean(cell["costs"]) / np.mean(cell["optimal_costs"]))


def _scaled(found: Interval, parts: Sequence[Array], factor: float, digits: int) -> Estimate:
    mean, low, high = (factor * value for value in (found.mean, found.low, found.high))
    seeds = tuple(factor * float(part.mean()) for part in parts)
    return Estimate(mean, low, high, seeds, digits, factor * np.concatenate(parts))
