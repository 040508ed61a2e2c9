"""What the dynamics model is worth when the actions that lead along planned states are executed.

Alternation corrects the states of a plan (paper, Algorithm 1), and what is usually executed are its
actions. Here the same plans are executed twice: with the planned actions, and with those that
inverse dynamics, learned from the planner's data, read off the planned states.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from studies.car_umaze import quality
from studies.estimates import Estimate, average, share
from studies.figures import dots
from studies.measures import free, mean_error
from studies.networks import Network
from studies.peers import ALONE, LITERAL, OURS
from studies.report import Ordering, Report, Table
from studies.runner import Run, Scope
from studies.variants import (
    CAR,
    MATCHED,
    PLANNER,
    Comparison,
    Testbed,
    Variant,
    compared,
)

__all__ = ["study"]

METHODS: dict[str, Mapping[str, Any]] = {
    ALONE: PLANNER,
    OURS: MATCHED,
    LITERAL: {"composition": "alternating"},
}
ACTIONS = {"planned": "planned", "read off": "inverse_dynamics"}


def study(run: Run) -> Report:
    """Measure everything and report."""
    variants = {
        f"{name}, {word}": Variant({**options, "actions": actions}, _network)
        for word, actions in ACTIONS.items()
        for name, options in METHODS.items()
    }
    (found,) = compared(run, [(replace(CAR, score=quality), variants)])
    ends = {name: average(cells, "final_error") for name, cells in found.cells.items()}
    rows = [
        [name, found.estimates[name].short, share(found.cells[name], free).short, end.short]
        for name, end in ends.items()
    ]
    text = (
        f"{run.scope.told}. Success: the car ends within a metre of the goal; free: it touched no "
        "wall either. Nothing is published."
    )
    return Report(
        "CarUMaze-v0: planned actions, and actions read off planned states",
        "Alternation corrects planned states. What is it worth if the actions that lead along "
        "these states are executed, not the planned ones?",
        Table("", ("variant", "success %", "free success %", "end to goal m"), rows, text),
        dots({"whole plans, open loop": ends}, "distance of the car's end to the goal, m"),
        "Mean and 95 % interval over trials: with actions read off, plans end much nearer to the "
        "goal, and both forms of MPDiffuser nearer than their planner.",
        "The same starts for all: a whole plan of one sample is executed without looking, with its "
        "own actions or with those that learned inverse dynamics read off its states. Temperature "
        "of each variant was chosen on validation starts with the first seed.",
        [_table(found)],
        _orderings(ends),
    )


def _network(scope: Scope, testbed: Testbed, seed: int) -> Network:
    return testbed.network(scope, seed, changes={"inverse_dynamics": True})


def _orderings(ends: Mapping[str, Estimate]) -> list[Ordering]:
    """MPDiffuser nearer to the goal than its planner, and reading off nearer than planning."""
    pairs = [
        (f"{ours}, {word}", f"{ALONE}, {word}") for word in ACTIONS for ours in (OURS, LITERAL)
    ]
    pairs += [(f"{name}, read off", f"{name}, planned") for name in METHODS]
    return [
        Ordering(f"{near} ends nearer than {far}, m", ends[near], ends[far], higher=False)
        for near, far in pairs
    ]


def _table(found: Comparison) -> Table:
    rows = [
        [
            name,
            f"{found.choices[name].options['temperature']:g}",
            estimate,
            share(found.cells[name], free),
            average(found.cells[name], "final_error"),
            _told(found.cells[name], mean_error),
            _told(found.cells[name], functools.partial(_mean, "planned_error")),
        ]
        for name, estimate in found.estimates.items()
    ]
    heads = ("variant", "temperature", "success %", "free success %", "end to goal m",
             "state error m (each seed)", "planned end to goal m")  # fmt: skip
    return Table(found.testbed.title, heads, rows)


def _mean(name: str, cell: Mapping[str, Any]) -> float:
    return float(np.mean(cell[name]))


def _told(cells: Sequence[Mapping[str, Any]], value: Any) -> str:
    each = [value(cell) for cell in cells]
    return f"{np.mean(each):.3f} ({', '.join(f'{one:.3f}' for one in each)})"
