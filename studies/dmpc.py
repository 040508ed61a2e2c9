"""D-MPC beside MPDiffuser on the linear system.

The paper compares the two on data sets of robots only. D-MPC proposes actions first and predicts
the states that they lead to afterwards, so that it can only choose among what is proposed, by a
learned value; MPDiffuser's dynamics model takes part in making the plan.
"""

from __future__ import annotations

from studies.networks import Network
from studies.report import UNPUBLISHED, Ordering, Report
from studies.runner import Book, Scope
from studies.variants import LQR_NOISY, MATCHED, PLANNER, Task, Variant, compared

__all__ = ["study"]

CANDIDATES = (1, 16)
ONE = {"num_candidates": 1}


def study(book: Book) -> Report:
    """Measure every cell and report."""
    variants = {
        "planner": Variant({**PLANNER, **ONE}),
        "MPDiffuser": Variant({**MATCHED, **ONE}),
        "MPDiffuser, Algorithm 1": Variant({"composition": "alternating", **ONE}),
    }
    for count in CANDIDATES:
        options = {**PLANNER, "num_candidates": count}
        variants[f"D-MPC, N = {count}"] = Variant(options, _dmpc)
    (outcome,) = compared(book, [(LQR_NOISY, variants)])
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all, one candidate but for D-MPC; "
        "temperature chosen on validation starts with the first seed."
    )
    orderings: list[Ordering] = [
        outcome.ordering(ours, f"D-MPC, N = {count}", UNPUBLISHED)
        for ours in ("MPDiffuser", "MPDiffuser, Algorithm 1")
        for count in CANDIDATES
    ]
    return Report("D-MPC beside MPDiffuser", text, [outcome.table()], orderings)


def _dmpc(scope: Scope, task: Task, seed: int) -> Network:
    return task.network(scope, seed, method="dmpc")
