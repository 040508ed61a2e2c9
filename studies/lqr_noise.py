"""How noise in the data hurts each method on the linear system (paper, Table 10 and Fig. 12).

The data comes from the optimal gain with noise in a share p of the steps; plans are asked to end at
the origin. What counts is the cost of 200 steps in closed loop, divided by the least possible cost
from the same starts. At low temperature even a small planner is close to the optimum, so all
temperatures are shown. First plans are compared with the optimal trajectory, as they were planned
and as their actions turn out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from studies.estimates import Estimate, cost_ratio, ratio_of
from studies.measures import regulation
from studies.networks import Data
from studies.peers import BC, PEERS, contender, grid
from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, Choice, Contender, Scope, of_seeds

__all__ = ["ENV_ID", "OPTIONS", "noisy_data", "study"]

ENV_ID = "LQR-v0"
PERCENTS = (10, 20, 30, 40, 80)
ALL_SEEDS_AT = 40  # per cent at which every training seed is measured; elsewhere the first one
FIGURE_AT = 80
TEMPERATURES = (0.001, 0.1, 1.0)
GUIDANCES = (1.0, 1.5)
OPTIONS: dict[str, Any] = {"num_steps": 5, "action_chunk": 8}
ERRORS = ("planned_error", "simulated_error", "state_error")
PUBLISHED = {
    "Diffuser": (2.38, 3.50, 4.40, 5.27),
    "Decision Diffuser": (2.34, 3.12, 5.48, 5.59),
    "planner": (1.36, 2.63, 4.40, 5.00),
    "MPDiffuser": (1.27, 1.54, 3.38, 3.99),
}

OURS = ("MPDiffuser", "MPDiffuser, Algorithm 1")

Place = tuple[str, int]  # method, per cent of noisy steps
Found = Mapping[tuple[str, int, float], list[dict[str, Any]]]  # with the temperature
Estimates = Mapping[tuple[str, int, float], Estimate]


def noisy_data(percent: int) -> tuple[Data, ...]:
    """Data of the optimal gain with noise in a share of the steps."""
    return (Data(f"mpd_gym/lqr/noisy-p{percent}-v0"),)


def study(book: Book) -> Report:
    """Measure every cell and report."""
    scope = book.scope
    rivals = _contenders(scope)
    chosen = book.tune(rivals, lambda cell: -ratio_of(cell))
    cells = book.measure(
        {
            (*place, temperature, seed): Cell(
                replace(rivals[place].network, seed=seed),
                regulation,
                scope.starts,
                choice.among(**_at(place[0], temperature)),
            )
            for place, choice in chosen.items()
            for temperature in _temperatures(place[0])
            for seed in _seeds(scope, place[1])
        }
    )
    found = {
        (*place, temperature): of_seeds(cells, *place, temperature, seeds=_seeds(scope, place[1]))
        for place in chosen
        for temperature in _temperatures(place[0])
    }
    ratios = {key: cost_ratio(one) for key, one in found.items()}
    best = {place: choice.options.get("temperature", 0.0) for place, choice in chosen.items()}
    return Report(
        "LQR-v0: noise in the data (Table 10, Fig. 12)",
        _text(scope),
        [
            _tuned_table(ratios, best),
            *(_temperature_table(ratios, chosen, percent) for percent in PERCENTS),
            _error_table(found, best),
            _consistency_table(found),
        ],
        _orderings(ratios, best),
        _figure(ratios, found, best),
    )


def _seeds(scope: Scope, percent: int) -> tuple[int, ...]:
    return scope.seeds if percent == ALL_SEEDS_AT else scope.seeds[:1]


def _temperatures(name: str) -> tuple[float, ...]:
    return (0.0,) if name == BC else TEMPERATURES  # it samples nothing


def _at(name: str, temperature: float) -> dict[str, float]:
    return {} if name == BC else {"temperature": temperature}


def _contenders(scope: Scope) -> dict[Place, Contender]:
    tried = grid(TEMPERATURES, GUIDANCES)
    return {
        (name, percent): contender(
            scope, PEERS[name], ENV_ID, regulation, OPTIONS, tried, data=noisy_data(percent)
        )
        for percent in PERCENTS
        for name in PEERS
    }


def _text(scope: Scope) -> str:
    seeds = ", ".join(map(str, scope.seeds))
    return (
        f"Cost of 200 closed-loop steps ÷ least possible cost; {scope.trials} trials a cell, the "
        "same starts in all, with the 95 % bootstrap interval over trials. Training seeds "
        f"{seeds} at p = {ALL_SEEDS_AT / 100}, one seed elsewhere. Options {OPTIONS}; guidance "
        f"{GUIDANCES} was chosen for each method and temperature on validation starts with the "
        "first seed, and so was the temperature of the first table. The published temperature is "
        "not known."
    )


def _tuned_table(ratios: Estimates, best: Mapping[Place, float]) -> Table:
    rows = []
    for name in PEERS:
        row: list[Any] = [name]
        for index, percent in enumerate(PERCENTS):
            known = PUBLISHED.get(name, ())
            published = f"{known[index]}" if index < len(known) else "–"
            temperature = best[name, percent]
            at = "" if name == BC else f" at {temperature:g}"
            row += [f"{ratios[name, percent, temperature]}{at}", published]
        rows.append(row)
    heads = ["method"]
    for percent in PERCENTS:
        heads += [f"p = {percent / 100}", "published"]
    return Table("At the temperature that validation chose", heads, rows)


def _temperature_table(
    ratios: Estimates,
    chosen: Mapping[Place, Choice],
    percent: int,
) -> Table:
    rows = []
    for name in PEERS:
        if name == BC:
            rows.append([name, *[str(ratios[name, percent, 0.0])] * len(TEMPERATURES)])
            continue
        row = [name]
        for temperature in TEMPERATURES:
            options = chosen[name, percent].among(temperature=temperature)
            guidance = options["guidance_scale"]
            row.append(f"{ratios[name, percent, temperature]} ω = {guidance:g}")
        rows.append(row)
    heads = ["method", *(f"temperature {temperature:g}" for temperature in TEMPERATURES)]
    return Table(f"p = {percent / 100}, every temperature", heads, rows)


def _error_table(found: Found, best: Mapping[Place, float]) -> Table:
    """Fig. 12 in numbers."""
    rows = []
    for name in PEERS:
        temperature = best[name, FIGURE_AT]
        cells = found[name, FIGURE_AT, temperature]
        rows.append([name, f"{temperature:g}", *(_mean(cells, error) for error in ERRORS)])
    text = (
        "Mean distance over the steps of the first plan: planned states to the optimal trajectory, "
        "states under the planned actions to it, and both to each other. Plans of behaviour "
        "cloning are one step long."
    )
    heads = ("method", "temperature", "planned", "simulated", "planned to simulated")
    return Table(f"State error at p = {FIGURE_AT / 100}", heads, rows, text)


def _consistency_table(found: Found) -> Table:
    """Where a dynamics model has something to correct."""
    rows = [
        [name, *(_mean(found[name, ALL_SEEDS_AT, one], "state_error") for one in TEMPERATURES)]
        for name in PEERS
        if name != BC
    ]
    text = (
        "Mean distance over the steps of the first plan between planned states and those under the "
        "planned actions."
    )
    heads = ("method", *(f"temperature {temperature:g}" for temperature in TEMPERATURES))
    return Table(f"Planned to simulated at p = {ALL_SEEDS_AT / 100}", heads, rows, text)


def _mean(cells: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{np.mean([np.mean(cell[name]) for cell in cells]):.4f}"


def _orderings(ratios: Estimates, best: Mapping[Place, float]) -> list[Ordering]:
    """MPDiffuser against each other method, tuned and at temperature 1; there in both forms."""
    orderings = []
    settings = [(OURS[0], "tuned"), *((name, "temperature 1") for name in OURS)]
    for winner, at in settings:
        for loser in (name for name in PEERS if name not in OURS):
            for index, percent in enumerate(PERCENTS[:-1]):
                known = PUBLISHED.get(loser, ())
                published = f"{PUBLISHED['MPDiffuser'][index]} : {known[index]}" if known else "–"
                ours, theirs = (
                    ratios[one, percent, _temperature(one, percent, at, best)]
                    for one in (winner, loser)
                )
                statement = f"{winner} below {loser}, p = {percent / 100}, {at}"
                orderings.append(Ordering(statement, ours, theirs, published, higher=False))
    return orderings


def _temperature(name: str, percent: int, at: str, best: Mapping[Place, float]) -> float:
    return best[name, percent] if at == "tuned" or name == BC else 1.0


def _figure(ratios: Estimates, found: Found, best: Mapping[Place, float]) -> Any:
    """Cost over temperature for each p, and Fig. 12's two errors over the steps."""
    names = [name for name in PEERS if name != BC]
    panels = [
        Panel(
            f"p = {percent / 100}",
            {
                name: Curve(TEMPERATURES, [ratios[name, percent, one] for one in TEMPERATURES])
                for name in names
            },
            "temperature",
            "cost ÷ optimal cost",
            log=True,
        )
        for percent in PERCENTS
    ]
    for error in ERRORS[:2]:
        lines = {}
        for name in names:
            cells = found[name, FIGURE_AT, best[name, FIGURE_AT]]
            mean = np.mean([cell[error] for cell in cells], axis=0)
            lines[name] = Curve(range(1, len(mean) + 1), list(mean))
        title = f"{error.split('_')[0]} states, p = {FIGURE_AT / 100}"
        panels.append(Panel(title, lines, "step of the plan", "distance to the optimal state"))
    return curves(panels)
