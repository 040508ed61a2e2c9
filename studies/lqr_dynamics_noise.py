"""How much error of the dynamics model MPDiffuser bears (paper, appendix F, Table 11).

One planner; dynamics models that learned from the same data with Gaussian noise on every measured
state.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from studies.lqr_noise import noisy_data
from studies.networks import Network
from studies.report import Curve, Panel, Report, curves
from studies.runner import Book, Scope
from studies.variants import (
    LQR_NOISY,
    MATCHED,
    PLANNER,
    Outcome,
    Task,
    Variant,
    compared,
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


def study(book: Book) -> Report:
    """Measure every cell and report."""
    task = replace(LQR_NOISY, title=f"LQR-v0, p = {PERCENT / 100}", data=noisy_data(PERCENT))
    variants = {"planner": Variant(PLANNER)}
    for sigma in SIGMAS:
        network = functools.partial(_noisy, sigma=sigma)
        variants[_name(sigma)] = Variant(MATCHED, network)
    hot = replace(task, title=f"{task.title}, {AT_ONE}")
    found = [*compared(book, [(task, variants)]), *compared(book, [(hot, variants)], (1.0,))]
    text = (
        f"{book.scope.trials} trials a cell, the same starts for all. The dynamics model learned "
        "from states with noise of standard deviation σ; the planner is one and the same. "
        "Temperature chosen on validation starts with the first seed, and 1. Published: "
        + ", ".join(f"{cost} at σ = {sigma:g}" for sigma, cost in PUBLISHED.items())
        + "."
    )
    orderings = [
        outcome.ordering(_name(sigma), "planner", f"{PUBLISHED[sigma]} : –")
        for outcome in found
        for sigma in SIGMAS
    ]
    return Report(
        "LQR-v0: a dynamics model that learned from noisy states (Table 11)",
        text,
        [outcome.table() for outcome in found],
        orderings,
        curves([_panel(outcome) for outcome in found]),
    )


def _name(sigma: float) -> str:
    return f"σ = {sigma:g}"


def _noisy(scope: Scope, task: Task, seed: int, *, sigma: float) -> Network:
    usual = task.network(scope, seed)
    if sigma == 0:
        return usual
    noisy = tuple(replace(part, state_noise=sigma) for part in task.data)
    return task.network(scope, seed, dynamics_data=noisy, planner=usual)


def _panel(outcome: Outcome) -> Panel:
    planner = outcome.estimates["planner"]
    lines = {
        "MPDiffuser": Curve(
            SIGMAS,
            [outcome.estimates[_name(sigma)] for sigma in SIGMAS],
            [PUBLISHED[sigma] for sigma in SIGMAS],
        ),
        "planner": Curve(SIGMAS, [planner] * len(SIGMAS)),
    }
    y = "cost ÷ optimal cost (dashed: published)"
    return Panel(outcome.task.title, lines, "noise of the states σ", y)
