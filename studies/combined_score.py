"""Alternation against one move along both scores (paper, appendix I, Table 13).

The combined score moves the states along a convex combination of both predictions; its weight is
searched over a grid, as published. All variants share networks and starts.
"""

from __future__ import annotations

from studies.report import Report
from studies.runner import Book
from studies.variants import TASKS, Variant, compared

__all__ = ["study"]

WEIGHTS = (0.1, 0.25, 0.5, 0.75, 1.0)
PUBLISHED = "102.4 : 98.2"  # normalised return, mean of three Hopper data sets


def study(book: Book) -> Report:
    """Measure every cell and report."""
    variants = {
        "combined score": Variant(
            {"composition": "combined_score"},
            grid=[{"dynamics_weight": weight} for weight in WEIGHTS],
        ),
        "alternating": Variant(),
        "alternating, Algorithm 1": Variant({"composition": "alternating"}),
    }
    found = compared(book, [(task, variants) for task in TASKS])
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all; weight of the dynamics model "
        f"{WEIGHTS} and temperature chosen on validation starts with the first seed. "
        '"alternating" is the level-matched form.'
    )
    orderings = [
        outcome.ordering(name, "combined score", PUBLISHED)
        for outcome in found
        for name in ("alternating", "alternating, Algorithm 1")
    ]
    tables = [outcome.table() for outcome in found]
    return Report("Alternating against combined scores (Table 13)", text, tables, orderings)
