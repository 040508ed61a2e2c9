"""Causal against acausal denoisers (paper, appendix K, Table 15).

In the causal planner and dynamics model no step of a prediction sees a later step of the noisy
trajectory: their convolutions and normalisations see the past only. Both kinds have as many
weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from studies.networks import Network
from studies.report import Report
from studies.runner import Book, Scope
from studies.variants import RETRAINED, Task, compared, two_kinds, usual_above

__all__ = ["study"]

PUBLISHED = "74.4 : 69.0"  # normalised return, mean of three medium-replay data sets


def study(book: Book) -> Report:
    """Measure every cell and report."""
    kinds = "acausal", "causal"
    variants = two_kinds(*kinds, _causal)
    found = compared(book, [(task, variants) for task in RETRAINED])
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all; temperature chosen on "
        "validation starts with the first seed."
    )
    orderings = usual_above(found, *kinds, {"MPDiffuser": PUBLISHED})
    tables = [outcome.table() for outcome in found]
    return Report("Causal against acausal denoisers (Table 15)", text, tables, orderings)


def _causal(scope: Scope, task: Task, seed: int) -> Network:
    config: Any = task.network(scope, seed).config
    return task.network(scope, seed, changes={"unet": replace(config.unet, causal=True)})
