"""Alternation against one move along both scores (paper, appendix I, Table 13).

The combined score moves the states along a convex combination of both predictions; its weight is
searched over a grid, as published. All variants share networks and starts.
"""

from __future__ import annotations

from studies.peers import LITERAL, OURS
from studies.report import Report, Table
from studies.runner import Run
from studies.variants import TESTBEDS, Comparison, Variant, compared, drawn, sampling, side_by_side

__all__ = ["study"]

WEIGHTS = (0.1, 0.25, 0.5, 0.75, 1.0)
COMBINED = "combined score"
PUBLISHED = {LITERAL: 102.4, COMBINED: 98.2}  # normalised return, mean of three Hopper data sets


def study(run: Run) -> Report:
    """Measure everything and report."""
    variants = {
        COMBINED: Variant(
            {"composition": "combined_score"},
            grid=[{"dynamics_weight": weight} for weight in WEIGHTS],
        ),
        OURS: Variant(),
        LITERAL: Variant({"composition": "alternating"}),
    }
    found = compared(run, [(testbed, variants) for testbed in TESTBEDS])
    return Report(
        "Alternating against combined scores (Table 13)",
        "Is it better to alternate between the two models, or to move along both scores at once?",
        side_by_side(found, PUBLISHED, f"{run.scope.told}. Published: Hopper, normalised return."),
        drawn(found),
        "Mean and 95 % interval over trials, at the temperature that validation chose: a combined "
        "score costs slightly less on the linear system.",
        f"The same starts for all; weight of the dynamics model {WEIGHTS} and temperature chosen "
        f"on validation starts with the first seed. {sampling(found)}",
        [*(one.table() for one in found), *map(_by_temperature, found)],
        [
            one.ordering(name, COMBINED, "102.4 : 98.2", "Table 13")
            for name in (LITERAL, OURS)
            for one in found
        ],
    )


def _by_temperature(found: Comparison) -> Table:
    """Scores on validation starts, the best weight at each temperature."""
    sign = 1 if found.testbed.higher else -1
    rows = []
    for name, choice in found.choices.items():
        best: dict[float, float] = {}
        for options, score in choice.tried:
            place = options["temperature"]
            best[place] = max(score, best.get(place, score))
        rows.append([name, *(f"{sign * best[place]:.3f}" for place in best)])
    heads = ["variant", *(f"temperature {place:g}" for place in best)]
    unit = "share that parks without touching a wall" if sign > 0 else found.testbed.unit
    text = f"{unit[0].upper()}{unit[1:]}, 64 starts with the first seed."
    return Table(f"{found.testbed.title}, validation starts", heads, rows, text)
