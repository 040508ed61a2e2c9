"""Whether it is the alternation, or only more denoising (paper, appendix H, Table 12).

MPDiffuser calls two networks at each of K levels. Beside it: its planner alone at K levels, its
planner with every level taken twice, and a planner that was trained with 2 K levels, where this
study trains one.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from studies.figures import Curve, Panel, curves
from studies.networks import Network
from studies.peers import ALONE, LITERAL, OURS, TWICE
from studies.report import UNPUBLISHED, Ordering, Report, Table
from studies.runner import Run, Scope
from studies.variants import (
    FEW_DRIVES,
    LQR_NOISY,
    MATCHED,
    PENDULUM,
    PLANNER,
    Comparison,
    Testbed,
    Variant,
    compared,
)

__all__ = ["study"]

PLANS: tuple[tuple[Testbed, tuple[int, ...], tuple[float, ...]], ...] = (
    (LQR_NOISY.changed(num_steps=None, action_chunk=16), (10, 50, 100, 200), (0.1,)),
    (FEW_DRIVES.changed(num_steps=None), (10, 50, 100, 200), ()),
    (PENDULUM.changed(num_steps=None, num_candidates=1), (10, 50, 100, 200), (0.5,)),
)
"""Tasks, their K, and temperatures to choose from, the usual ones if none are given.

All levels are visited, which takes long where an episode takes many plans: there the temperature is
the one that the other studies found.
"""
METHODS = {
    ALONE: PLANNER,
    TWICE: {"composition": "planner_resampled"},
    OURS: MATCHED,
    LITERAL: {"composition": "alternating"},
}
MORE = f"{ALONE}, 2 K levels"
SHOWN = 100  # levels in the table beside the published values, and in the row of the results page
PUBLISHED = {LITERAL: 74.4, ALONE: 69.3, MORE: 68.8}  # normalised return, K = 100, three data sets


def study(run: Run) -> Report:
    """Measure everything and report."""
    found = [
        compared(run, [(testbed, _variants(levels))], temperatures)[0]
        for testbed, levels, temperatures in PLANS
    ]
    rows = [
        [
            method,
            *(_short(one, _name(method, SHOWN)) for one in found),
            PUBLISHED.get(method, UNPUBLISHED),
        ]
        for method in (*METHODS, MORE)
    ]
    heads = [f"K = {SHOWN}", *(f"{one.testbed.title}, {one.testbed.unit}" for one in found)]
    text = f"{run.scope.told}. Published: locomotion, normalised return, K = 100."
    panels = [_panel(one, levels) for one, (_, levels, _) in zip(found, PLANS, strict=True)]
    return Report(
        "Alternation against more denoising steps (Table 12)",
        "Is it the alternation that helps, or only that two networks denoise twice as often?",
        Table("", [*heads, "published"], rows, text),
        curves(panels),
        "Mean with its 95 % interval over the number of levels K: no method is ahead in all three "
        "environments.",
        "The same starts for all, one candidate; networks for each K, all K levels visited. The "
        "car's temperature was chosen on validation starts with the first seed; LQR-v0 has 0.1 and "
        "the pendulum 0.5.",
        [one.table() for one in found],
        [
            ordering
            for one, (_, levels, _) in zip(found, PLANS, strict=True)
            for ordering in _orderings(one, levels)
        ],
    )


def _short(found: Comparison, name: str) -> str:
    estimate = found.estimates.get(name)
    return UNPUBLISHED if estimate is None else estimate.short


def _variants(levels: tuple[int, ...]) -> dict[str, Variant]:
    variants = {}
    for count in levels:
        network = functools.partial(_network, levels=count)
        for name, options in METHODS.items():
            variants[_name(name, count)] = Variant(options, network)
        if 2 * count in levels:
            twice = functools.partial(_network, levels=2 * count)
            variants[_name(MORE, count)] = Variant(PLANNER, twice)
    return variants


def _name(method: str, levels: int) -> str:
    return f"{method}, K = {levels}"


def _network(scope: Scope, testbed: Testbed, seed: int, *, levels: int) -> Network:
    sampling = replace(testbed.network(scope, seed).config.sampling, num_steps=None)
    changes = {"diffusion_steps": levels, "sampling": sampling}
    return testbed.network(scope, seed, changes=changes)


def _orderings(found: Comparison, levels: tuple[int, ...]) -> list[Ordering]:
    """MPDiffuser in both forms against more denoising; the paper's at its K is in the results."""
    return [
        found.ordering(
            _name(ours, count),
            _name(theirs, count),
            f"{PUBLISHED[LITERAL]} : {PUBLISHED[theirs]}"
            if count == SHOWN and theirs in PUBLISHED
            else UNPUBLISHED,
            "Table 12" if (count, theirs) == (SHOWN, ALONE) else "",
        )
        for count in levels
        for ours in (OURS, LITERAL)
        for theirs in (ALONE, TWICE, MORE)
        if _name(theirs, count) in found.estimates
    ]


def _panel(found: Comparison, levels: tuple[int, ...]) -> Panel:
    lines = {}
    for method in (*METHODS, MORE):
        known = [count for count in levels if _name(method, count) in found.estimates]
        values = [found.estimates[_name(method, count)] for count in known]
        if known:
            lines[method] = Curve(known, values)
    title, unit = found.testbed.title, found.testbed.unit
    return Panel(title, lines, "diffusion levels K", unit, log=True, ticks=True)
