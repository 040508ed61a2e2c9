"""Whether the dynamics model should know the task (paper, appendix J, Table 14).

The unconditional dynamics model stands beside the same planner and learns from the same data.
"""

from __future__ import annotations

from studies.networks import Network
from studies.report import Report
from studies.runner import Book, Scope
from studies.variants import MATCHED, PLANNER, TASKS, Task, Variant, compared

__all__ = ["study"]

PUBLISHED = "74.4 : 71.1"  # normalised return, mean of three medium-replay data sets


def study(book: Book) -> Report:
    """Measure every cell and report."""
    variants = {
        "planner alone": Variant(PLANNER),
        "unconditional": Variant(MATCHED, _unconditional),
        "conditional": Variant(MATCHED),
    }
    found = compared(book, [(task, variants) for task in TASKS])
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all; temperature chosen on "
        "validation starts with the first seed. Conditions: the final state on LQR-v0, the goal "
        "in the maze."
    )
    orderings = [outcome.ordering("conditional", "unconditional", PUBLISHED) for outcome in found]
    tables = [outcome.table() for outcome in found]
    return Report("Conditions of the dynamics model (Table 14)", text, tables, orderings)


def _unconditional(scope: Scope, task: Task, seed: int) -> Network:
    changes = {"dynamics_conditions": False}
    return task.network(scope, seed, changes=changes, planner=task.network(scope, seed))
