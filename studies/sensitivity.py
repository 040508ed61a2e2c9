"""How much guidance and the number of candidates matter (paper, appendix M, Tables 17 and 18).

Published for FetchPickAndPlace, where the candidate that ends nearest to the goal is executed; here
for the maze with the same ranker, and for the pendulum, whose ranker is learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from studies.figures import Curve, Panel, curves
from studies.peers import OURS
from studies.report import Report
from studies.runner import Run
from studies.variants import CAR, MATCHED, PENDULUM, Comparison, Variant, compared, side_by_side

__all__ = ["study"]

GUIDANCES = {1.0: None, 1.5: 72, 1.75: 80.3, 2.0: 81.5, 2.25: 76.5, 2.5: 72}
SAMPLES = {1: 60, 2: 62, 4: 70, 8: 73, 16: 75, 32: 72}
TEMPERATURE = 0.5
TESTBEDS = (CAR, PENDULUM)


def study(run: Run) -> Report:
    """Measure everything and report."""
    guided = {
        f"ω = {scale:g}": Variant({**MATCHED, "guidance_scale": scale}) for scale in GUIDANCES
    }
    sampled = {f"N = {count}": Variant({**MATCHED, "num_candidates": count}) for count in SAMPLES}
    found = compared(
        run, [(testbed, {**guided, **sampled}) for testbed in TESTBEDS], (TEMPERATURE,)
    )
    samples, scales = (f"N = {max(SAMPLES)}", f"N = {min(SAMPLES)}"), ("ω = 2", "ω = 1.5")
    panels = [
        _panel(one, symbol, places)
        for one in found
        for symbol, places in (("ω", GUIDANCES), ("N", SAMPLES))
    ]
    published = {f"ω = {scale:g}": rate for scale, rate in GUIDANCES.items() if rate}
    published |= {f"N = {count}": rate for count, rate in SAMPLES.items()}
    return Report(
        "Guidance and number of candidates (Tables 17 and 18)",
        "How much do the guidance scale ω and the number of candidates N matter?",
        side_by_side(
            found,
            published,
            f"{run.scope.told}. Published: Algorithm 1, FetchPickAndPlace, success %.",
        ),
        curves(panels),
        "Success with 95 % intervals: more candidates help the pendulum, whose ranker is learned, "
        "and more guidance helps neither.",
        f"{OURS}, the same starts for all, temperature {TEMPERATURE}; one option differs from the "
        "usual ones at a time.",
        (),
        [
            *(one.ordering(*samples, _pair(SAMPLES, 32, 1), "Table 18") for one in found),
            *(one.ordering(*scales, _pair(GUIDANCES, 2.0, 1.5), "Table 17") for one in found),
        ],
    )


def _pair(published: Mapping[Any, float | None], high: float, low: float) -> str:
    return f"{published[high]:g} : {published[low]:g}"


def _panel(found: Comparison, symbol: str, places: Iterable[float]) -> Panel:
    estimates = [found.estimates[f"{symbol} = {place:g}"] for place in places]
    label = "guidance ω" if symbol == "ω" else "candidates N"
    title, unit = found.testbed.title, found.testbed.unit
    return Panel(title, {OURS: Curve(list(places), estimates)}, label, unit, symbol == "N", True)
