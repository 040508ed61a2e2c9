"""D-MPC beside MPDiffuser on the linear system.

The paper compares the two on data sets of robots only. D-MPC proposes actions first and predicts
the states that they lead to afterwards, so that it can only choose among what is proposed, by a
learned value; MPDiffuser's dynamics model takes part in making the plan.
"""

from __future__ import annotations

from studies.networks import Network
from studies.peers import ALONE, LITERAL, OURS
from studies.report import Report
from studies.runner import Run, Scope
from studies.variants import (
    LQR_NOISY,
    MATCHED,
    PLANNER,
    Testbed,
    Variant,
    compared,
    drawn,
    sampling,
    side_by_side,
)

__all__ = ["study"]

CANDIDATES = (1, 16)
ONE = {"num_candidates": 1}


def study(run: Run) -> Report:
    """Measure everything and report."""
    variants = {
        ALONE: Variant({**PLANNER, **ONE}),
        OURS: Variant({**MATCHED, **ONE}),
        LITERAL: Variant({"composition": "alternating", **ONE}),
    }
    for count in CANDIDATES:
        options = {**PLANNER, "num_candidates": count}
        variants[f"D-MPC, N = {count}"] = Variant(options, _dmpc)
    found = compared(run, [(LQR_NOISY, variants)])
    return Report(
        "D-MPC beside MPDiffuser",
        "Does a planner of states and actions beat one that proposes actions and predicts states?",
        side_by_side(found, {}, f"{run.scope.told}. Nothing is published for this task."),
        drawn(found),
        "Mean and 95 % interval over trials; lower is better.",
        "The same starts for all, one candidate but for D-MPC; temperature chosen on validation "
        f"starts with the first seed. {sampling(found)}",
        [one.table() for one in found],
        [
            found[0].ordering(ours, f"D-MPC, N = {count}")
            for ours in (OURS, LITERAL)
            for count in CANDIDATES
        ],
    )


def _dmpc(scope: Scope, testbed: Testbed, seed: int) -> Network:
    return testbed.network(scope, seed, method="dmpc")
