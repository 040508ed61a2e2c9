"""Estimates from the cells of all training seeds, with their 95 % intervals over trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from mpd_gym.evaluation.returns import Interval, mean_interval, proportion_interval

__all__ = ["Estimate", "average", "cost_ratio", "ratio_of", "share"]

Cell = Mapping[str, Any]
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
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    digits: int = 3

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return f"{value:.{self.digits}f}"

        each = ", ".join(map(shown, self.seeds)) if len(self.seeds) > 1 else "one seed"
        return f"**{shown(self.mean)}** [{shown(self.low)}, {shown(self.high)}] ({each})"


def share(cells: Sequence[Cell], flags: Callable[[Cell], Any]) -> Estimate:
    """Share of trials in per cent with its Wilson interval.

    Args:
        cells: One of each seed.
        flags: Booleans of a cell's trials.
    """
    parts = [np.asarray(flags(cell), bool) for cell in cells]
    found = proportion_interval(np.concatenate(parts))
    return _scaled(found, [float(part.mean()) for part in parts], 100.0, 1)


def average(cells: Sequence[Cell], name: str, digits: int = 3) -> Estimate:
    """Mean of a value over trials with its t interval.

    Args:
        cells: One of each seed.
        name: Of the value.
        digits: After the point, in text.
    """
    parts = [np.asarray(cell[name], float) for cell in cells]
    found = mean_interval(np.concatenate(parts))
    return _scaled(found, [float(part.mean()) for part in parts], 1.0, digits)


def cost_ratio(cells: Sequence[Cell]) -> Estimate:
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
    return Estimate(float(costs.mean() / best.mean()), float(low), float(high), each)


def ratio_of(cell: Cell) -> float:
    """Mean cost of a cell's trials ÷ mean least possible cost."""
    return float(np.mean(cell["costs"]) / np.mean(cell["optimal_costs"]))


def _scaled(found: Interval, seeds: Sequence[float], factor: float, digits: int) -> Estimate:
    mean, low, high = (factor * value for value in (found.mean, found.low, found.high))
    return Estimate(mean, low, high, tuple(factor * value for value in seeds), digits)
