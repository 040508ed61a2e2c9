"""How much error of the dynamics model MPDiffuser bears (paper, appendix F, Table 11).

One planner; dynamics models that learned from the same data with Gaussian noise on every measured
state.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from studies.figures import Curve, Panel, curves
from studies.lqr_noise import noisy_data
from studies.networks import Network
from studies.peers import ALONE, OURS
from studies.report import UNPUBLISHED, Report, Table
from studies.runner import Run, Scope
from studies.variants import (
    LQR_NOISY,
    MATCHED,
    PLANNER,
    Comparison,
    Testbed,
    Variant,
    compared,
    sampling,
)

__all__ = ["study"]

PERCENT = 80  # of noisy steps
PUBLISHED = {
    0.0: 1.54,
    0.001: 1.97,
    0.002: 2.08,
    0.003: 2.19,
    0.004: 2.33,
    0.005: 2.56,
    0.01: 3.67,
    0.02: 5.25,
}
SIGMAS = tuple(PUBLISHED)
AT_ONE = "temperature 1"


def study(run: Run) -> Report:
    """Measure everything and report."""
    testbed = replace(LQR_NOISY, title=f"LQR-v0, p = {PERCENT / 100}", data=noisy_data(PERCENT))
    variants = {ALONE: Variant(PLANNER)}
    for sigma in SIGMAS:
        network = functools.partial(_noisy, sigma=sigma)
        variants[_name(sigma)] = Variant(MATCHED, network)
    hot = replace(testbed, title=f"{testbed.title}, {AT_ONE}")
    found = [*compared(run, [(testbed, variants)]), *compared(run, [(hot, variants)], (1.0,))]
    published = {_name(sigma): PUBLISHED[sigma] for sigma in SIGMAS}
    rows = [
        [name, *(one.estimates[name].short for one in found), published]
        for name, published in {ALONE: UNPUBLISHED, **published}.items()
    ]
    ends = _name(SIGMAS[0]), _name(SIGMAS[-1])
    heads = ("dynamics model", "temperature chosen", AT_ONE, "published")
    text = (
        f"Cost ÷ optimal cost, lower is better. {run.scope.told}. σ: standard deviation of the "
        "noise on every state that the dynamics model learned from. Published: Algorithm 1, "
        "temperature not given."
    )
    return Report(
        "LQR-v0: a dynamics model that learned from noisy states (Table 11)",
        "How much error of its dynamics model does MPDiffuser bear?",
        Table("", heads, rows, text),
        curves([_panel(one) for one in found]),
        "Cost with its 95 % interval; dotted: published. The published cost grows 3.4 times, the "
        "cost here hardly changes.",
        f"{OURS}, the same planner and starts for all, data with p = {PERCENT / 100}. Temperature "
        f"chosen on validation starts with the first seed, and 1. {sampling(found[:1])}",
        [one.table() for one in found],
        [
            *(
                one.ordering(*ends, " : ".join(f"{published[end]}" for end in ends), "Table 11")
                for one in found
            ),
            *(one.ordering(_name(sigma), ALONE) for one in found for sigma in SIGMAS),
        ],
    )


def _name(sigma: float) -> str:
    return f"σ = {sigma:g}"


def _noisy(scope: Scope, testbed: Testbed, seed: int, *, sigma: float) -> Network:
    usual = testbed.network(scope, seed)
    if sigma == 0:
        return usual
    noisy = tuple(replace(part, state_noise=sigma) for part in testbed.data)
    return testbed.network(scope, seed, dynamics_data=noisy, planner=usual)


def _panel(found: Comparison) -> Panel:
    planner = found.estimates[ALONE]
    lines = {
        OURS: Curve(
            SIGMAS,
            [found.estimates[_name(sigma)] for sigma in SIGMAS],
            [PUBLISHED[sigma] for sigma in SIGMAS],
        ),
        ALONE: Curve(SIGMAS, [planner] * len(SIGMAS)),
    }
    y = "cost ÷ optimal cost (dotted: published)"
    return Panel(found.testbed.title, lines, "noise of the states σ", y)
