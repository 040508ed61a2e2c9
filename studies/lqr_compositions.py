"""Planner alone against every composition on the linear system (paper, appendix E).

Networks are trained on noisy LQR data and asked to end at the origin; what counts is the cost of
200 steps in closed loop, divided by the least possible cost from the same starts. All compositions
share the networks, the starts and all options but the temperature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mpd_gym.models import UnetConfig
from studies.estimates import Estimate, cost_ratio
from studies.figures import Curve, Panel, curves
from studies.lqr_noise import ENV_ID, noisy_data
from studies.measures import regulation
from studies.networks import Network
from studies.peers import ALONE, LITERAL, OURS, RESAMPLED
from studies.report import Ordering, Report, Table, in_words
from studies.runner import Measurement, Run, Scope, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COMPOSITIONS", "narrow", "study"]

PERCENTS = (10, 40)
TEMPERATURES = (0.001, 0.1, 1.0)
COMPOSITIONS: dict[str, dict[str, Any]] = {
    ALONE: {"composition": "planner_only"},
    LITERAL: {"composition": "alternating"},
    OURS: {"composition": "alternating_matched"},
    RESAMPLED: {"composition": "alternating_resampled"},
    "combined score, weight 1/2": {"composition": "combined_score", "dynamics_weight": 0.5},
    "combined score, weight 1": {"composition": "combined_score", "dynamics_weight": 1.0},
}
# All K levels, because skipping them is not the same for every composition; long chunks save time.
OPTIONS: dict[str, Any] = {
    "guidance_scale": 1.0,
    "action_chunk": 16,
    "sampler": "ddpm",
    "num_steps": None,
}
NETWORK = UnetConfig(width=16, multipliers=(1, 2, 4))  # half the preset's width, to save time
PUBLISHED = {10: "1.27 : 1.36", 40: "3.99 : 5.00"}

Found = Mapping[tuple[int, str, float], list[dict[str, Any]]]
Ratios = Mapping[tuple[int, str, float], Estimate]


def narrow(scope: Scope, percent: int, seed: int) -> Network:
    """Networks of half the width, trained on noisy data."""
    return scope.network(ENV_ID, seed, data=noisy_data(percent), changes={"unet": NETWORK})


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    keys = [
        (percent, name, temperature)
        for percent in PERCENTS
        for temperature in TEMPERATURES
        for name in COMPOSITIONS
    ]
    cells = run.measure(
        {
            (f"p={percent / 100}", name, temperature, seed): Measurement(
                narrow(scope, percent, seed),
                regulation,
                scope.starts,
                {**OPTIONS, **COMPOSITIONS[name], "temperature": temperature},
            )
            for percent, name, temperature in keys
            for seed in scope.seeds
        }
    )
    found = {
        (percent, name, temperature): of_seeds(
            cells, f"p={percent / 100}", name, temperature, seeds=scope.seeds
        )
        for percent, name, temperature in keys
    }
    ratios = {key: cost_ratio(one) for key, one in found.items()}
    rows = [
        [
            name,
            *(ratios[percent, name, one].short for percent in PERCENTS for one in TEMPERATURES[1:]),
        ]
        for name in COMPOSITIONS
    ]
    heads = [
        f"p = {percent / 100}, temperature {one:g}"
        for percent in PERCENTS
        for one in TEMPERATURES[1:]
    ]
    published = "; ".join(f"{PUBLISHED[percent]} at p = {percent / 100}" for percent in PERCENTS)
    text = (
        f"Cost of 200 steps ÷ least possible cost, lower is better. {scope.told}. Published, "
        f"{LITERAL} : {ALONE}, at a temperature that is not given: {published}."
    )
    return Report(
        "LQR-v0: planner alone and compositions",
        "Which composition of planner and dynamics model costs least on the linear system?",
        Table("", ["composition", *heads], rows, text),
        _figure(found, ratios),
        "Above: cost with its 95 % interval over temperature; below: distance of planned to "
        "simulated states. Narrow samplers cost less at high temperature.",
        f"The same starts for all; {in_words(OPTIONS)}. State error: mean distance between planned "
        "and simulated states over the steps of the first plan.",
        [_table(percent, found, ratios) for percent in PERCENTS],
        _orderings(ratios),
    )


def _table(percent: int, found: Found, ratios: Ratios) -> Table:
    rows = [
        [name, f"{temperature:g}", ratios[key], f"{_error(found[key]):.4f}"]
        for key in found
        for at, name, temperature in [key]
        if at == percent
    ]
    heads = ("composition", "temperature", "cost ratio", "state error")
    return Table(f"p = {percent / 100}", heads, rows)


def _error(cells: list[dict[str, Any]]) -> float:
    return float(np.mean([np.mean(cell["state_error"]) for cell in cells]))


def _orderings(ratios: Ratios) -> list[Ordering]:
    return [
        Ordering(
            f"{name} below {ALONE}",
            ratios[percent, name, temperature],
            ratios[percent, ALONE, temperature],
            PUBLISHED[percent],
            higher=False,
            place=f"p = {percent / 100}, temperature {temperature:g}",
        )
        for percent in PERCENTS
        for temperature in TEMPERATURES
        for name in (LITERAL, OURS)
    ]


def _figure(found: Found, ratios: Ratios) -> Figure:
    """Cost ratio over temperature above, state error of the plans per step below."""
    panels = []
    for percent in PERCENTS:
        lines = {
            name: Curve(TEMPERATURES, [ratios[percent, name, one] for one in TEMPERATURES])
            for name in COMPOSITIONS
        }
        title = f"p = {percent / 100}"
        panels.append(Panel(title, lines, "temperature", "cost ÷ optimal cost", log=True))
    for percent in PERCENTS:
        lines = {}
        for name in COMPOSITIONS:
            cells = found[percent, name, TEMPERATURES[-1]]
            mean = np.mean([cell["state_error"] for cell in cells], axis=0)
            lines[name] = Curve(range(1, len(mean) + 1), list(mean))
        title = f"p = {percent / 100}, temperature {TEMPERATURES[-1]:g}"
        panels.append(Panel(title, lines, "step of the plan", "state error"))
    return curves(panels)
