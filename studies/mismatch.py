"""Planner and dynamics model that learned from different data (paper, appendix L, Table 16).

Published: both of medium-expert or both of medium-replay data beat a planner of the former with a
dynamics model of the latter. Here the good data has noise in a tenth of the steps, the other in
four fifths; in the maze the planner learns from 200 expert drives, the dynamics model from those,
from random ones, or from both.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from studies.lqr_noise import noisy_data
from studies.networks import Data, Network
from studies.report import Ordering, Report
from studies.runner import Book, Scope
from studies.variants import (
    FEW_DRIVES,
    LQR_CLEAN,
    MATCHED,
    PLANNER,
    RANDOM,
    Task,
    Variant,
    compared,
)

__all__ = ["study"]

LQR = replace(LQR_CLEAN, title="LQR-v0", data=())
PERCENTS = (10, 80)
PUBLISHED = {"good": "109.9 : 70.3", "poor": "98.2 : 70.3"}  # normalised return, Hopper


def study(book: Book) -> Report:
    """Measure every cell and report."""
    good, poor = (noisy_data(percent) for percent in PERCENTS)
    linear = {
        "planner alone, good": Variant(PLANNER, _of(good, good)),
        "both good": Variant(MATCHED, _of(good, good)),
        "both poor": Variant(MATCHED, _of(poor, poor)),
        "planner good, dynamics poor": Variant(MATCHED, _of(good, poor)),
        "planner poor, dynamics good": Variant(MATCHED, _of(poor, good)),
    }
    driving = {
        "planner alone": Variant(PLANNER),
        "expert and random": Variant(MATCHED),
        "expert": Variant(MATCHED, functools.partial(_dynamics, data=FEW_DRIVES.data)),
        "random": Variant(MATCHED, functools.partial(_dynamics, data=(Data(RANDOM),))),
    }
    found = compared(book, [(LQR, linear), (FEW_DRIVES, driving)])
    good_name, poor_name = (f"p = {percent / 100}" for percent in PERCENTS)
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all; temperature chosen on "
        f"validation starts with the first seed. LQR-v0: good data has {good_name}, poor data "
        f"{poor_name}. CarUMaze-v0: data of the dynamics model beside a planner of expert drives; "
        f"all networks learned for {FEW_DRIVES.steps:,} steps."
    )
    tables = [outcome.table() for outcome in found]
    mixed = "planner good, dynamics poor"
    orderings: list[Ordering] = [
        found[0].ordering("both good", mixed, PUBLISHED["good"]),
        found[0].ordering("both poor", mixed, PUBLISHED["poor"]),
        found[1].ordering("expert and random", "expert", "–"),
        found[1].ordering("expert and random", "random", "–"),
    ]
    title = "Planner and dynamics model of different data (Table 16)"
    return Report(title, text, tables, orderings)


def _of(planner: tuple[Data, ...], dynamics: tuple[Data, ...]) -> functools.partial[Network]:
    return functools.partial(_mixed, planner=planner, dynamics=dynamics)


def _mixed(
    scope: Scope, task: Task, seed: int, *, planner: tuple[Data, ...], dynamics: tuple[Data, ...]
) -> Network:
    usual = task.network(scope, seed, data=planner)
    if planner == dynamics:
        return usual
    return task.network(scope, seed, data=planner, dynamics_data=dynamics, planner=usual)


def _dynamics(scope: Scope, task: Task, seed: int, *, data: tuple[Data, ...]) -> Network:
    """The planner of the task with another dynamics model."""
    usual = task.network(scope, seed)
    return task.network(scope, seed, dynamics_data=data, planner=usual)
