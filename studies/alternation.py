"""Whether it is the alternation, or only more denoising (paper, appendix H, Table 12).

MPDiffuser calls two networks at each of K levels. Beside it: its planner alone at K levels, its
planner with every level taken twice, and a planner that was trained with 2 K levels, where this
study trains one.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from studies.networks import Network
from studies.report import Curve, Ordering, Panel, Report, curves
from studies.runner import Book, Scope
from studies.variants import (
    FEW_DRIVES,
    LQR_NOISY,
    MATCHED,
    PENDULUM,
    PLANNER,
    Outcome,
    Task,
    Variant,
    compared,
)

__all__ = ["study"]

PLANS: tuple[tuple[Task, tuple[int, ...], tuple[float, ...]], ...] = (
    (LQR_NOISY.changed(num_steps=None, action_chunk=16), (10, 50, 100, 200), (0.1,)),
    (FEW_DRIVES.changed(num_steps=None), (10, 50, 100, 200), ()),
    (PENDULUM.changed(num_steps=None, num_candidates=1), (10, 50, 100, 200), (0.5,)),
)
"""Tasks, their K, and temperatures to choose from, the usual ones if none are given.

All levels are visited, which takes long where an episode takes many plans: there the temperature is
the one that the other studies found.
"""
METHODS = {
    "planner": PLANNER,
    "planner, levels twice": {"composition": "planner_resampled"},
    "MPDiffuser": MATCHED,
    "MPDiffuser, Algorithm 1": {"composition": "alternating"},
}
TWICE = "planner, 2 K levels"
PUBLISHED = {"planner": "74.4 : 69.3", "planner, levels twice": "–", TWICE: "74.4 : 68.8"}


def study(book: Book) -> Report:
    """Measure every cell and report."""
    found = [
        compared(book, [(task, _variants(levels))], temperatures)[0]
        for task, levels, temperatures in PLANS
    ]
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all, one candidate; networks for "
        "each K, all K levels visited. The car's temperature was chosen on validation starts with "
        "the first seed; LQR-v0 has 0.1 and the pendulum 0.5. Published with K = 100, means of "
        "three data sets."
    )
    orderings = []
    for outcome, (_, levels, _) in zip(found, PLANS, strict=True):
        orderings += _orderings(outcome, levels)
    panels = [_panel(outcome, levels) for outcome, (_, levels, _) in zip(found, PLANS, strict=True)]
    return Report(
        "Alternation against more denoising steps (Table 12)",
        text,
        [outcome.table() for outcome in found],
        orderings,
        curves(panels),
    )


def _variants(levels: tuple[int, ...]) -> dict[str, Variant]:
    variants = {}
    for count in levels:
        network = functools.partial(_network, levels=count)
        for name, options in METHODS.items():
            variants[_name(name, count)] = Variant(options, network)
        if 2 * count in levels:
            twice = functools.partial(_network, levels=2 * count)
            variants[_name(TWICE, count)] = Variant(PLANNER, twice)
    return variants


def _name(method: str, levels: int) -> str:
    return f"{method}, K = {levels}"


def _network(scope: Scope, task: Task, seed: int, *, levels: int) -> Network:
    sampling = replace(task.network(scope, seed).config.sampling, num_steps=None)
    changes = {"diffusion_steps": levels, "sampling": sampling}
    return task.network(scope, seed, changes=changes)


def _orderings(outcome: Outcome, levels: tuple[int, ...]) -> list[Ordering]:
    return [
        outcome.ordering(_name(ours, count), _name(theirs, count), published)
        for count in levels
        for ours in ("MPDiffuser", "MPDiffuser, Algorithm 1")
        for theirs, published in PUBLISHED.items()
        if _name(theirs, count) in outcome.estimates
    ]


def _panel(outcome: Outcome, levels: tuple[int, ...]) -> Panel:
    lines = {}
    for method in (*METHODS, TWICE):
        known = [count for count in levels if _name(method, count) in outcome.estimates]
        values = [outcome.estimates[_name(method, count)] for count in known]
        if known:
            lines[method] = Curve(known, values)
    title, unit = outcome.task.title, outcome.task.unit
    return Panel(title, lines, "diffusion levels K", unit, log=True, ticks=True)
