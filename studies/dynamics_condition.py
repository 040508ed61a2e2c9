"""Whether the dynamics model should know the task (paper, appendix J, Table 14).

The unconditional dynamics model stands beside the same planner and learns from the same data.
"""

from __future__ import annotations

from studies.networks import Network
from studies.peers import ALONE, OURS
from studies.report import Report
from studies.runner import Run, Scope
from studies.variants import (
    MATCHED,
    PLANNER,
    TESTBEDS,
    Testbed,
    Variant,
    compared,
    drawn,
    sampling,
    side_by_side,
)

__all__ = ["study"]

CONDITIONAL, UNCONDITIONAL = (f"{OURS}, {kind}" for kind in ("conditional", "unconditional"))
PUBLISHED = {CONDITIONAL: 74.4, UNCONDITIONAL: 71.1}  # normalised return, three data sets


def study(run: Run) -> Report:
    """Measure everything and report."""
    variants = {
        ALONE: Variant(PLANNER),
        UNCONDITIONAL: Variant(MATCHED, _unconditional),
        CONDITIONAL: Variant(MATCHED),
    }
    found = compared(run, [(testbed, variants) for testbed in TESTBEDS])
    return Report(
        "Conditions of the dynamics model (Table 14)",
        "Should the dynamics model know what the planner is asked for?",
        side_by_side(
            found,
            PUBLISHED,
            f"{run.scope.told}. Published: Algorithm 1, locomotion, normalised return.",
        ),
        drawn(found),
        "Mean and 95 % interval over trials: the two dynamics models are nearly level.",
        "The same starts for all; temperature chosen on validation starts with the first seed. "
        f"{sampling(found)} Conditions: the final state on LQR-v0, the goal in the maze.",
        [one.table() for one in found],
        [one.ordering(CONDITIONAL, UNCONDITIONAL, "74.4 : 71.1", "Table 14") for one in found],
    )


def _unconditional(scope: Scope, testbed: Testbed, seed: int) -> Network:
    changes = {"dynamics_conditions": False}
    return testbed.network(scope, seed, changes=changes, planner=testbed.network(scope, seed))
