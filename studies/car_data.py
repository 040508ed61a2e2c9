"""How many expert drives it takes before the dynamics model is of no more use.

With 2,000 expert drives the planner alone is about as good as MPDiffuser (Table 8 here). The method
is made for less: the dynamics model also learns from drives that lead nowhere, which are easy to
get. Here the planner learns from few expert drives, the dynamics model from the same ones and 1,000
random drives; it is told the goal, as the paper's is, or not, and predicts noise or x̂_0. D-MPC
learns from the same data, and picks the proposal whose predicted end is nearest to the goal (Zhou
et al. 2025, with a known objective instead of a learned one); so do the others where they have
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
from studies.peers import ALONE, LITERAL, OURS
from studies.report import Report, Table
from studies.runner import Run, Scope
from studies.variants import (
    MATCHED,
    NOISY,
    PLANNER,
    Comparison,
    Testbed,
    Variant,
    compared,
    drawn,
    driving,
    side_by_side,
)

__all__ = ["study"]

DRIVES = (50, 200)
MANY = {"num_candidates": 64}  # ranked by the distance of their planned end to the goal
DMPC = "D-MPC"
UNTOLD, CLEAN = f"{OURS}, goal untold", f"{OURS}, goal untold, x̂_0"
NEAR = f"{OURS}, noisy drives"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    ALONE: (PLANNER, OURS),
    OURS: (MATCHED, OURS),
    LITERAL: ({"composition": "alternating"}, OURS),
    UNTOLD: (MATCHED, UNTOLD),
    CLEAN: (MATCHED, CLEAN),
    NEAR: (MATCHED, NEAR),
    f"{LITERAL}, noisy drives": ({"composition": "alternating"}, NEAR),
    f"{ALONE}, N = 64": ({**PLANNER, **MANY}, OURS),
    f"{CLEAN}, N = 64": ({**MATCHED, **MANY}, CLEAN),
    f"{DMPC}, N = 64": ({**PLANNER, **MANY}, DMPC),
}
"""Sampling options, and whose networks."""
CHANGES: dict[str, dict[str, Any]] = {
    UNTOLD: {"dynamics_conditions": False},
    CLEAN: {"dynamics_conditions": False, "dynamics_prediction": "x0"},
}
"""Of the dynamics model."""


def study(run: Run) -> Report:
    """Measure everything and report."""
    variants = {
        name: Variant(options, functools.partial(_network, owner=owner))
        for name, (options, owner) in VARIANTS.items()
    }
    found = compared(run, [(driving(count), variants) for count in DRIVES])
    text = (
        f"{run.scope.told}. Goal untold: the dynamics model does not see it; x̂_0: it predicts "
        "clean states, as D-MPC's does, not their noise; noisy drives: it learned from drives of "
        "the expert with errors in its actions, not from random ones. Nothing is published."
    )
    pairs = [(name, ALONE) for name in (OURS, UNTOLD, CLEAN, NEAR)]
    pairs += [(f"{name}, N = 64", f"{ALONE}, N = 64") for name in (CLEAN, DMPC)]
    return Report(
        "Few expert drives: does the dynamics model earn its place?",
        "How few expert drives does it take before the dynamics model, which also learns from "
        "random drives, is of use?",
        side_by_side(found, {}, text),
        drawn(found),
        "Success with its 95 % interval: with one training, no form of MPDiffuser is apart from "
        "its planner but those that are behind.",
        "The same unseen start-goal pairs for all: a whole plan is executed without looking, and "
        "succeeds if the car ends within a metre of the goal. All networks learned for "
        f"{found[0].testbed.steps:,} steps. Temperature was chosen on validation starts with the "
        "first seed. N candidates are ranked by the distance of their planned end to the goal; "
        "otherwise N = 1.",
        [_table(one) for one in found],
        [one.ordering(*pair) for one in found for pair in pairs],
    )


def _network(scope: Scope, testbed: Testbed, seed: int, *, owner: str) -> Network:
    if owner == DMPC:  # without a value network
        changes = {"conditions": testbed.network(scope, seed).config.conditions}
        return testbed.network(scope, seed, method="dmpc", changes=changes)
    told = testbed.network(scope, seed)
    if owner == OURS:
        return told
    if owner == NEAR:
        near = (*testbed.data, Data(NOISY))
        return testbed.network(scope, seed, dynamics_data=near, planner=told)
    return testbed.network(scope, seed, changes=CHANGES[owner], planner=told)


def _table(found: Comparison) -> Table:
    rows = []
    for name, estimate in found.estimates.items():
        cells = found.cells[name]
        planned = np.mean([np.mean(cell["planned_error"]) for cell in cells])
        error = np.mean([mean_error(cell) for cell in cells])
        temperature = f"{found.choices[name].options['temperature']:g}"
        rows.append(
            [name, temperature, estimate, share(cells, free), f"{planned:.2f}", f"{error:.3f}"]
        )
    heads = ("variant", "temperature", "success %", "free success %", "planned end to goal m",
             "state error m")  # fmt: skip
    return Table(found.testbed.title, heads, rows)
