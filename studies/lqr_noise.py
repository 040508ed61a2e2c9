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
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.estimates import Estimate, cost_ratio, ratio_of
from studies.figures import Curve, Panel, curves
from studies.measures import regulation
from studies.networks import Data
from studies.peers import ALONE, BC, LITERAL, OURS, PEERS, contender, grid
from studies.report import UNPUBLISHED, Ordering, Report, Table, in_words
from studies.runner import Choice, Contender, Measurement, Run, Scope, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ENV_ID", "OPTIONS", "noisy_data", "study"]

ENV_ID = "LQR-v0"
PERCENTS = (10, 20, 30, 40, 80)
ALL_SEEDS_AT = 40  # per cent at which every training seed is measured; elsewhere the first one
DRAWN = (10, 40)  # per cent, in the figure, and of its plans:
FIGURE_AT = 80
TUNED, AT_ONE = "tuned", "temperature 1"
TEMPERATURES = (0.001, 0.1, 1.0)
GUIDANCES = (1.0, 1.5)
OPTIONS: dict[str, Any] = {"num_steps": 5, "action_chunk": 8}
ERRORS = ("planned_error", "simulated_error", "state_error")
PUBLISHED = {
    "Diffuser": (2.38, 3.50, 4.40, 5.27),
    "Decision Diffuser": (2.34, 3.12, 5.48, 5.59),
    ALONE: (1.36, 2.63, 4.40, 5.00),
    LITERAL: (1.27, 1.54, 3.38, 3.99),
}

Place = tuple[str, int]  # method, per cent of noisy steps
Found = Mapping[tuple[str, int, float], list[dict[str, Any]]]  # with the temperature
Estimates = Mapping[tuple[str, int, float], Estimate]


def noisy_data(percent: int) -> tuple[Data, ...]:
    """Data of the optimal gain with noise in a share of the steps."""
    return (Data(f"mpd_gym/lqr/noisy-p{percent}-v0"),)


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    rivals = _contenders(scope)
    chosen = run.tune(rivals, lambda cell: -ratio_of(cell))
    cells = run.measure(
        {
            (*place, temperature, seed): Measurement(
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
        "How does noise in the data, in a share p of the steps, hurt each method?",
        _main_table(ratios, scope),
        _figure(ratios, found, best),
        "Cost with its 95 % interval over temperature, and distance of planned and "
        "simulated states to the optimal ones. All are near the optimum at low temperature.",
        _text(),
        [
            _tuned_table(ratios, best),
            *(_temperature_table(ratios, chosen, percent) for percent in PERCENTS),
            _error_table(found, best),
            _consistency_table(found),
        ],
        _orderings(ratios, best),
    )


def _main_table(ratios: Estimates, scope: Scope) -> Table:
    rows = []
    for name in PEERS:
        known = [f" ({one:g})" for one in PUBLISHED.get(name, ())] + [""] * len(PERCENTS)
        temperature = 0.0 if name == BC else 1.0
        cells = [
            f"{ratios[name, percent, temperature].short}{one}"
            for percent, one in zip(PERCENTS, known, strict=False)
        ]
        rows.append([name, *cells])
    heads = ("method", *(f"p = {percent / 100}" for percent in PERCENTS))
    text = (
        "Cost of 200 steps ÷ least possible cost at temperature 1 [95 % interval] (published, "
        f"temperature not given); lower is better. {scope.trials} trials; training seeds "
        f"{', '.join(map(str, scope.seeds))} at p = {ALL_SEEDS_AT / 100}, one elsewhere."
    )
    return Table("", heads, rows, text)


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


def _text() -> str:
    return (
        f"The same starts for all; {in_words(OPTIONS)}. Guidance {GUIDANCES} was chosen for each "
        "method and temperature on validation starts with the first seed, and so was the "
        "temperature of the first table below."
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
    """Both forms of MPDiffuser against each other method, tuned and at temperature 1."""
    settings = [(winner, at) for at in (TUNED, AT_ONE) for winner in (OURS, LITERAL)]
    on_page = {(LITERAL, AT_ONE, name) for name in PUBLISHED}
    on_page |= {(name, TUNED, ALONE) for name in (OURS, LITERAL)}
    return [
        Ordering(
            f"{winner} below {loser}, {at}",
            ratios[winner, percent, _temperature(winner, percent, at, best)],
            ratios[loser, percent, _temperature(loser, percent, at, best)],
            _published(loser, index),
            higher=False,
            place=f"p = {percent / 100}",
            table="Table 10" if (winner, at, loser) in on_page else "",
        )
        for winner, at in settings
        for loser in PEERS
        if loser not in (OURS, LITERAL)
        for index, percent in enumerate(PERCENTS[:-1])
    ]


def _published(loser: str, index: int) -> str:
    if loser not in PUBLISHED:
        return UNPUBLISHED
    return f"{PUBLISHED[LITERAL][index]} : {PUBLISHED[loser][index]}"


def _temperature(name: str, percent: int, at: str, best: Mapping[Place, float]) -> float:
    return best[name, percent] if at == TUNED or name == BC else 1.0


def _figure(ratios: Estimates, found: Found, best: Mapping[Place, float]) -> Figure:
    """Cost over temperature, and Fig. 12's two errors over the steps."""
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
        for percent in DRAWN
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
