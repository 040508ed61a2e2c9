"""How a network learns the initial state: inpainted or through FiLM (paper, appendix D, Table 9).

Inpainted trajectories hold x_0 in their first row and plan one step less. Published for the planner
alone; MPDiffuser is beside it.
"""

from __future__ import annotations

from studies.networks import Network
from studies.peers import ALONE
from studies.report import Report
from studies.runner import Run, Scope
from studies.variants import (
    RETRAINED,
    Testbed,
    compared,
    drawn,
    sampling,
    side_by_side,
    two_kinds,
    usual_above,
)

__all__ = ["study"]

KINDS = "FiLM", "inpainting"
PUBLISHED = (99.7, 95.6)  # normalised return, mean of three Hopper data sets


def study(run: Run) -> Report:
    """Measure everything and report."""
    found = compared(run, [(testbed, two_kinds(*KINDS, _inpainting)) for testbed in RETRAINED])
    return Report(
        "The initial state: inpainting against FiLM (Table 9)",
        "Should a network get the initial state as a row of the trajectory, or as a condition?",
        side_by_side(
            found,
            {f"{ALONE}, {kind}": value for kind, value in zip(KINDS, PUBLISHED, strict=True)},
            f"{run.scope.told}. Published: Hopper, normalised return.",
        ),
        drawn(found),
        "Mean and 95 % interval over trials: in the maze FiLM is far ahead with either method; on "
        "the linear system it depends on the noise in the data.",
        "The same starts for all; temperature chosen on validation starts with the first "
        f"seed. {sampling(found)}",
        [one.table() for one in found],
        usual_above(found, *KINDS, " : ".join(map(str, PUBLISHED)), ALONE, "Table 9"),
    )


def _inpainting(scope: Scope, testbed: Testbed, seed: int) -> Network:
    return testbed.network(scope, seed, changes={"initial_state": "inpaint"})
