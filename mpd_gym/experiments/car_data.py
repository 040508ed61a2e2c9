"""How many expert drives it takes before the dynamics model is of no more use.

With 2,000 expert drives the planner alone is about as good as MPDiffuser (Table 8 here). The method
is made for less: the dynamics model also learns from drives that lead nowhere, which are easy to
get. Here the planner learns from few expert drives, the dynamics model from the same ones and 1,000
random drives; it is told the goal, as the paper's is, or not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpd_gym.experiments.estimates import share
from mpd_gym.experiments.frame import Book, Scope
from mpd_gym.experiments.measures import free, mean_error
from mpd_gym.experiments.networks import Data, Network
from mpd_gym.experiments.report import UNPUBLISHED, Curve, Ordering, Panel, Report, Table, curves
from mpd_gym.experiments.variants import (
    CAR,
    MATCHED,
    PLANNER,
    Outcome,
    Task,
    Variant,
    compared,
)

__all__ = ["study"]

DRIVES = (50, 200, 2000)
STEPS = 6_000  # of training
RANDOM = Data("mpd_gym/car-umaze/random-v0")
ALONE = "planner alone"
TOLD = "MPDiffuser"
UNTOLD = "MPDiffuser, goal unknown to the dynamics model"
VARIANTS = {
    ALONE: (PLANNER, True),
    TOLD: (MATCHED, True),
    "MPDiffuser, Algorithm 1": ({"composition": "alternating"}, True),
    UNTOLD: (MATCHED, False),
}


def study(book: Book) -> Report:
    """Measure every cell and report."""
    found = compared(book, [(_task(count), _variants(count)) for count in DRIVES])
    text = (
        f"{book.scope.trials} unseen start-goal pairs a cell, the same for all: a whole plan is "
        "executed without looking, and succeeds if the car ends within a metre of the goal. All "
        f"networks learned for {STEPS:,} steps. Temperature was chosen on validation starts with "
        "the first seed."
    )
    orderings: list[Ordering] = [
        outcome.ordering(ours, ALONE, UNPUBLISHED) for outcome in found for ours in (TOLD, UNTOLD)
    ]
    title = "Few expert drives: where the dynamics model earns its place"
    return Report(title, text, [_table(outcome) for outcome in found], orderings, _figure(found))


def _task(drives: int) -> Task:
    return replace(CAR, title=f"{drives} expert drives")


def _variants(drives: int) -> dict[str, Variant]:
    return {
        name: Variant(options, functools.partial(_network, drives=drives, told=told))
        for name, (options, told) in VARIANTS.items()
    }


def _network(scope: Scope, task: Task, seed: int, *, drives: int, told: bool) -> Network:
    expert = Data("mpd_gym/car-umaze/expert-v0", first=drives)
    training = replace(task.network(scope, seed).config.training, steps=STEPS)
    data = {"data": (expert,), "dynamics_data": (expert, RANDOM)}
    changes = {"training": training, **scope.changes}
    usual = task.network(scope, seed, changes=changes, **data)
    if told:
        return usual
    changes = {**changes, "dynamics_conditions": False}
    return task.network(scope, seed, changes=changes, planner=usual, **data)


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


def _figure(found: Sequence[Outcome]) -> Any:
    lines = {
        name: Curve(list(DRIVES), [outcome.estimates[name] for outcome in found])
        for name in VARIANTS
    }
    panel = Panel("CarUMaze-v0, open loop", lines, "expert drives", "success %", True, True)
    return curves([panel])
