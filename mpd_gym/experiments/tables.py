"""Markdown tables of studies: every seed beside the mean and its interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mpd_gym.evaluation import mean_interval, proportion_interval
from mpd_gym.types import Array

__all__ = ["markdown_table", "pooled_share", "seed_mean"]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def seed_mean(values: Sequence[float], digits: int = 3, *, scale: float = 1.0) -> str:
    """Mean over training seeds with its 95 % t interval, and each seed.

    Args:
        values: One for each seed.
        digits: After the point.
        scale: Factor on all, such as 100 for per cent.
    """
    scaled = scale * np.asarray(values, float)
    each = ", ".join(f"{value:.{digits}f}" for value in scaled)
    if len(scaled) == 1:
        return f"**{each}** (one seed)"
    mean = mean_interval(scaled)
    return f"**{mean.mean:.{digits}f}** [{mean.low:.{digits}f}, {mean.high:.{digits}f}] ({each})"


def pooled_share(outcomes: Sequence[Sequence[bool] | Array]) -> str:
    """Share of successes of all seeds' trials together, in per cent, with its 95 % interval.

    Args:
        outcomes: Of each seed's trials.
    """
    flat = np.concatenate([np.asarray(part, bool) for part in outcomes])
    found = proportion_interval(flat)
    each = ", ".join(f"{100 * np.mean(part):.1f}" for part in outcomes)
    return f"**{100 * found.mean:.1f}** [{100 * found.low:.1f}, {100 * found.high:.1f}] ({each})"
