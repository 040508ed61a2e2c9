"""How many expert drives it takes before the dynamics model is of no more use.

With 2,000 expert drives the planner alone is about as good as MPDiffuser (Table 8 here). The method
is made for less: the dynamics model also learns from drives that lead nowhere, which are easy to
get. Here the planner learns from few expert drives, the dynamics model from the same ones and 1,000
random drives; it is told the goal, as the paper's is, or not, and predicts noise or x̂_0. D-MPC
learns from the same data, and picks the proposal whose predicted end is nearest to the goal (Zhou
et al. 2025, with a known objective in the place of a learned one); so do the others where they have
as many candidates.

Random drives are not like those that are planned. So one dynamics model learns from 1,000 drives of
the expert with errors in its actions in their place.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from studies.estimates import share
from studies.measures import free, mean_error
from studies.networks import Data, Network
from studies.report import UNPUBLISHED, Ordering, Report, Table
from studies.runner import Book, Scope
from studies.variants import (
    MATCHED,
    NOISY,
    PLANNER,
    Outcome,
    Task,
    Variant,
    compared,
    driving,
)

__all__ = ["study"]

DRIVES = (50, 200)
MANY = {"num_candidates": 64}  # ranked by the distance of their planned end to the goal
ALONE, TOLD, DMPC = "planner alone", "MPDiffuser", "D-MPC"
UNTOLD, CLEAN = f"{TOLD}, goal untold", f"{TOLD}, goal untold, x̂_0"
NEAR = f"{TOLD}, noisy drives"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    ALONE: (PLANNER, TOLD),
    TOLD: (MATCHED, TOLD),
    f"{TOLD}, Algorithm 1": ({"composition": "alternating"}, TOLD),
    UNTOLD: (MATCHED, UNTOLD),
    CLEAN: (MATCHED, CLEAN),
    NEAR: (MATCHED, NEAR),
    f"{NEAR}, Algorithm 1": ({"composition": "alternating"}, NEAR),
    f"{ALONE}, N = 64": ({**PLANNER, **MANY}, TOLD),
    f"{CLEAN}, N = 64": ({**MATCHED, **MANY}, CLEAN),
    f"{DMPC}, N = 64": ({**PLANNER, **MANY}, DMPC),
}
"""Sampling options, and whose networks."""
CHANGES: dict[str, dict[str, Any]] = {
    UNTOLD: {"dynamics_conditions": False},
    CLEAN: {"dynamics_conditions": False, "dynamics_prediction": "x0"},
}
"""Of the dynamics model."""


def study(book: Book) -> Report:
    """Measure every cell and report."""
    variants = {
        name: Variant(options, functools.partial(_network, owner=owner))
        for name, (options, owner) in VARIANTS.items()
    }
    tasks = [driving(count) for count in DRIVES]
    found = compared(book, [(task, variants) for task in tasks])
    text = (
        f"{book.scope.trials} unseen start-goal pairs a cell, the same for all: a whole plan is "
        "executed without looking, and succeeds if the car ends within a metre of the goal. All "
        f"networks learned for {tasks[0].steps:,} steps. Temperature was chosen on validation "
        "starts with the first seed. N candidates are ranked by the distance of their planned end "
        "to the goal; otherwise N = 1. Goal untold: the dynamics model does not see it; x̂_0: it "
        "predicts the clean states, as D-MPC's does, in the place of their noise. Noisy drives: it "
        "learned from noisy in the place of random drives."
    )
    pairs = [(name, ALONE) for name in (TOLD, UNTOLD, CLEAN, NEAR)]
    pairs += [(f"{name}, N = 64", f"{ALONE}, N = 64") for name in (CLEAN, DMPC)]
    orderings: list[Ordering] = [
        outcome.ordering(*pair, UNPUBLISHED) for outcome in found for pair in pairs
    ]
    title = "Few expert drives: where the dynamics model earns its place"
    return Report(title, text, [_table(outcome) for outcome in found], orderings)


def _network(scope: Scope, task: Task, seed: int, *, owner: str) -> Network:
    if owner == DMPC:  # without a value network
        changes = {"conditions": task.network(scope, seed).config.conditions}
        return task.network(scope, seed, method="dmpc", changes=changes)
    told = task.network(scope, seed)
    if owner == TOLD:
        return told
    if owner == NEAR:
        near = (*task.data, Data(NOISY))
        return task.network(scope, seed, dynamics_data=near, planner=told)
    return task.network(scope, seed, changes=CHANGES[owner], planner=told)


def _table(outcome: Outcome) -> Table:
    rows = []
    for name, estimate in outcome.estimates.items():
        cells = outcome.cells[name]
        planned = np.mean([np.mean(cell["planned_error"]) for cell in cells])
        error = np.mean([mean_error(cell) for cell in cells])
        temperature = f"{outcome.choices[name].options['temperature']:g}"
        rows.append(
            [name, temperature, estimate, share(cells, free), f"{planned:.2f}", f"{error:.3f}"]
        )
    heads = ("variant", "temperature", "success %", "free success %", "planned end to goal m",
             "state error m")  # fmt: skip
    return Table(outcome.task.title, heads, rows)
