"""How a network learns the initial state: inpainted or through FiLM (paper, appendix D, Table 9).

Inpainted trajectories hold x_0 in their first row and plan one step less. Published for the planner
alone; MPDiffuser is beside it.
"""

from __future__ import annotations

from studies.networks import Network
from studies.report import Report
from studies.runner import Book, Scope
from studies.variants import RETRAINED, Task, compared, two_kinds, usual_above

__all__ = ["study"]

PUBLISHED = "99.7 : 95.6"  # normalised return, mean of three Hopper data sets


def study(book: Book) -> Report:
    """Measure every cell and report."""
    kinds = "FiLM", "inpainting"
    variants = two_kinds(*kinds, _inpainting)
    found = compared(book, [(task, variants) for task in RETRAINED])
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all; temperature chosen on "
        "validation starts with the first seed."
    )
    orderings = usual_above(found, *kinds, {"planner": PUBLISHED})
    tables = [outcome.table() for outcome in found]
    return Report("The initial state: inpainting against FiLM (Table 9)", text, tables, orderings)


def _inpainting(scope: Scope, task: Task, seed: int) -> Network:
    return task.network(scope, seed, changes={"initial_state": "inpaint"})
