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
from studies.estimates import average, share
from studies.measures import free, mean_error
from studies.networks import Network
from studies.report import UNPUBLISHED, Ordering, Report, Table
from studies.runner import Book, Scope
from studies.variants import (
    CAR,
    MATCHED,
    PLANNER,
    Outcome,
    Task,
    Variant,
    compared,
)

__all__ = ["study"]

ALONE, OURS = "planner alone", ("MPDiffuser", "MPDiffuser, Algorithm 1")
METHODS: dict[str, Mapping[str, Any]] = dict(
    zip((ALONE, *OURS), (PLANNER, MATCHED, {"composition": "alternating"}), strict=True)
)
ACTIONS = {"planned": "planned", "read off": "inverse_dynamics"}


def study(book: Book) -> Report:
    """Measure every cell and report."""
    variants = {
        f"{name}, {word}": Variant({**options, "actions": actions}, _network)
        for word, actions in ACTIONS.items()
        for name, options in METHODS.items()
    }
    (outcome,) = compared(book, [(replace(CAR, score=quality), variants)])
    text = (
        f"{book.scope.trials} unseen start-goal pairs a cell and training seed, the same for all: "
        "a whole plan of one sample is executed without looking, with its own actions or with "
        "those that learned inverse dynamics read off its states. Success: the car ends within a "
        "metre of the goal; free: it touched no wall either. Temperature of each variant was "
        "chosen on validation starts with the first seed."
    )
    title = "CarUMaze-v0: planned actions, and actions read off planned states"
    return Report(title, text, [_table(outcome)], _orderings(outcome))


def _network(scope: Scope, task: Task, seed: int) -> Network:
    return task.network(scope, seed, changes={"inverse_dynamics": True})


def _orderings(outcome: Outcome) -> list[Ordering]:
    """MPDiffuser nearer to the goal than its planner, and reading off nearer than planning."""
    near = {name: average(cells, "final_error") for name, cells in outcome.cells.items()}
    pairs = [(f"{name}, {word}", f"{ALONE}, {word}") for word in ACTIONS for name in OURS]
    pairs += [(f"{name}, read off", f"{name}, planned") for name in METHODS]
    return [
        Ordering(
            f"{ours} ends nearer than {theirs}, m",
            near[ours],
            near[theirs],
            UNPUBLISHED,
            higher=False,
        )
        for ours, theirs in pairs
    ]


def _table(outcome: Outcome) -> Table:
    rows = []
    for name, estimate in outcome.estimates.items():
        cells = outcome.cells[name]
        temperature = f"{outcome.choices[name].options['temperature']:g}"
        errors = _told(cells, mean_error), _told(cells, functools.partial(_mean, "planned_error"))
        rows.append(
            [
                name,
                temperature,
                estimate,
                share(cells, free),
                average(cells, "final_error"),
                *errors,
            ]
        )
    heads = ("variant", "temperature", "success %", "free success %", "end to goal m",
             "state error m (each seed)", "planned end to goal m")  # fmt: skip
    return Table(outcome.task.title, heads, rows)


def _mean(name: str, cell: Mapping[str, Any]) -> float:
    return float(np.mean(cell[name]))


def _told(cells: Sequence[Mapping[str, Any]], value: Any) -> str:
    each = [value(cell) for cell in cells]
    return f"{np.mean(each):.3f} ({', '.join(f'{one:.3f}' for one in each)})"
