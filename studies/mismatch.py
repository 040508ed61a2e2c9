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
from studies.peers import ALONE
from studies.report import UNPUBLISHED, Report, Table
from studies.runner import Run, Scope
from studies.variants import (
    FEW_DRIVES,
    LQR_CLEAN,
    MATCHED,
    PLANNER,
    RANDOM,
    Testbed,
    Variant,
    compared,
    drawn,
    sampling,
)

__all__ = ["study"]

LQR = replace(LQR_CLEAN, title="LQR-v0", data=())
PERCENTS = (10, 80)
GOOD, POOR, MIXED = "both good", "both poor", "planner good, dynamics poor"
PUBLISHED = {GOOD: 109.9, POOR: 98.2, MIXED: 70.3}  # normalised return, Hopper


def study(run: Run) -> Report:
    """Measure every cell and report."""
    good, poor = (noisy_data(percent) for percent in PERCENTS)
    linear = {
        f"{ALONE}, good": Variant(PLANNER, _of(good, good)),
        GOOD: Variant(MATCHED, _of(good, good)),
        POOR: Variant(MATCHED, _of(poor, poor)),
        MIXED: Variant(MATCHED, _of(good, poor)),
        "planner poor, dynamics good": Variant(MATCHED, _of(poor, good)),
    }
    driving = {
        ALONE: Variant(PLANNER),
        "expert and random": Variant(MATCHED),
        "expert": Variant(MATCHED, functools.partial(_dynamics, data=FEW_DRIVES.data)),
        "random": Variant(MATCHED, functools.partial(_dynamics, data=(Data(RANDOM),))),
    }
    found = compared(run, [(LQR, linear), (FEW_DRIVES, driving)])
    rows = [
        [one.testbed.title, name, estimate.short, PUBLISHED.get(name, UNPUBLISHED)]
        for one in found
        for name, estimate in one.estimates.items()
    ]
    text = (
        f"{run.scope.told}. LQR-v0: cost ÷ optimal cost, lower is better; good data have noise in "
        "a tenth of the steps, poor data in four fifths. CarUMaze-v0: success %, by data of the "
        "dynamics model. Published: Algorithm 1, Hopper, normalised return."
    )
    published = f"{PUBLISHED[GOOD]} : {PUBLISHED[MIXED]}", f"{PUBLISHED[POOR]} : {PUBLISHED[MIXED]}"
    return Report(
        "Planner and dynamics model of different data (Table 16)",
        "What if planner and dynamics model learned from data of different quality?",
        Table("", ("environment", "variant", "here", "published"), rows, text),
        drawn(found),
        "Mean and 95 % interval over trials: on the linear system the planner's data decide.",
        "The same starts for all; temperature chosen on validation starts with the first seed. "
        f"{sampling(found)} All networks of CarUMaze-v0 learned for {FEW_DRIVES.steps:,} steps.",
        [one.table() for one in found],
        [
            found[0].ordering(GOOD, MIXED, published[0], "Table 16"),
            found[0].ordering(POOR, MIXED, published[1], "Table 16"),
            found[1].ordering("expert and random", "expert"),
            found[1].ordering("expert and random", "random"),
        ],
    )


def _of(planner: tuple[Data, ...], dynamics: tuple[Data, ...]) -> functools.partial[Network]:
    return functools.partial(_mixed, planner=planner, dynamics=dynamics)


def _mixed(
    scope: Scope,
    testbed: Testbed,
    seed: int,
    *,
    planner: tuple[Data, ...],
    dynamics: tuple[Data, ...],
) -> Network:
    usual = testbed.network(scope, seed, data=planner)
    if planner == dynamics:
        return usual
    return testbed.network(scope, seed, data=planner, dynamics_data=dynamics, planner=usual)


def _dynamics(scope: Scope, testbed: Testbed, seed: int, *, data: tuple[Data, ...]) -> Network:
    """The planner of the task with another dynamics model."""
    usual = testbed.network(scope, seed)
    return testbed.network(scope, seed, dynamics_data=data, planner=usual)
