"""Whole plans executed open loop in the U-maze, and closed loop (paper, Table 8 and Fig. 2).

The planner learns from expert drives, the dynamics model from expert and random ones. An open-loop
trial executes all H actions of one plan without looking; it succeeds if the car ends within a metre
of the goal, and is free if it never touched a wall. The plan is one sample, or the mean of eight.
All methods have the same data, training steps and starts; temperature and guidance of each are
chosen on validation starts. Decision Diffuser, which inpaints the initial state, is there a second
time with it as a condition (FiLM).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from studies.estimates import average, share
from studies.figures import Curve, Panel, curves
from studies.measures import (
    arrived,
    episodes,
    error_series,
    free,
    mean_error,
    open_loop,
    parked,
)
from studies.peers import (
    BC,
    DECISION_DIFFUSER_FILM,
    FILM,
    LITERAL,
    PEERS,
    contender,
    grid,
    orderings,
)
from studies.report import Ordering, Report, Table
from studies.runner import Measurement, Run, Scope, of_seeds

__all__ = ["quality", "study"]

ENV_ID = "CarUMaze-v0"
METHODS = {**PEERS, FILM: DECISION_DIFFUSER_FILM}
FORMS: dict[str, dict[str, Any]] = {
    "one sample": {"num_candidates": 1, "num_steps": 10},
    "mean of 8": {"num_candidates": 1, "samples_per_candidate": 8, "num_steps": 10},
}
TEMPERATURES = (0.01, 0.5, 1.0)
GUIDANCES = (1.0, 1.5)
CLOSED = {"action_chunk": 1, "warm_start_steps": 1}  # in closed loop, beside the last of the forms
PUBLISHED = {"Diffuser": 68.8, "Decision Diffuser": 42.2, LITERAL: 95.3}

Cells = Mapping[Any, dict[str, Any]]
Seeds = tuple[int, ...]
Options = Mapping[str, Mapping[str, Any]]


def study(run: Run) -> Report:
    """Measure everything and report."""
    seeds = run.scope.seeds
    opened: dict[str, Cells] = {}
    tables, found = [], []
    for form in FORMS:
        chosen, opened[form] = _opened(run, form)
        tables.append(_open_table(form, chosen, opened[form], seeds))
        found += _opened_orderings(form, opened[form], seeds)
    closed = _closed(run, chosen)
    return Report(
        "CarUMaze-v0: whole plans executed open loop (Table 8, Fig. 2)",
        "Whose plans take the car to the goal, executed without looking and in closed loop?",
        _main_table(opened, closed, run.scope),
        curves([_panel(form, cells, seeds) for form, cells in opened.items()]),
        "Distance between planned and executed position: plans of Decision Diffuser with FiLM are "
        "followed most closely.",
        f"Unseen start-goal pairs, the same for all. Success, as published: the car ends within 1 "
        f"m of the goal; free: it touched no wall either. Temperature {TEMPERATURES} and guidance "
        f"{GUIDANCES} of each method were chosen by free success on validation starts with the "
        "first seed, apart for plans that are one sample and plans that are the mean of eight.",
        [*tables, _closed_table(closed, seeds)],
        [*found, *_closed_orderings(closed, seeds)],
    )


def _main_table(opened: Mapping[str, Cells], closed: Cells, scope: Scope) -> Table:
    rows = []
    for name in METHODS:
        shares = [
            share(of_seeds(cells, name, seeds=scope.seeds), arrived).short if name != BC else "–"
            for cells in opened.values()
        ]
        driven = share(of_seeds(closed, name, seeds=scope.seeds), parked).short
        rows.append([name, *shares, PUBLISHED.get(name, "–"), driven])
    heads = ("method", *(f"open loop, {form}" for form in opened), "published", "closed loop, free")
    text = f"Success %; free: without touching a wall. {scope.told}. Published for {LITERAL}."
    return Table("", heads, rows, text)


def _opened(run: Run, form: str) -> tuple[Options, Cells]:
    """Options of each method for plans of a form, and what was measured by name and seed."""
    scope = run.scope
    names = [name for name in METHODS if name != BC]
    tried = grid(TEMPERATURES, GUIDANCES)
    rivals = {
        (form, name): contender(scope, METHODS[name], ENV_ID, open_loop, FORMS[form], tried)
        for name in names
    }
    tuned = run.tune(rivals, quality)
    chosen = {name: choice.options for (_, name), choice in tuned.items()}
    cells = run.measure(
        {
            (form, name, seed): Measurement(
                replace(rivals[form, name].network, seed=seed),
                open_loop,
                scope.starts,
                chosen[name],
            )
            for name in names
            for seed in scope.seeds
        }
    )
    return chosen, {key[1:]: cell for key, cell in cells.items()}


def quality(cell: Mapping[str, Any]) -> float:
    """Free success; where that is equal, how near the goal is."""
    return float(np.mean(free(cell)) - 1e-3 * np.mean(cell["final_error"]))


def _closed(run: Run, chosen: Options) -> Cells:
    """Closed-loop cells by method and seed; behaviour cloning plans nothing and has no options."""
    options: dict[str, dict[str, Any]] = {BC: {}}
    options |= {name: {**one, **CLOSED} for name, one in chosen.items()}
    cells = run.measure(
        {
            ("closed loop", name, seed): Measurement(
                METHODS[name].network(run.scope, ENV_ID, seed),
                episodes,
                run.scope.starts,
                one,
            )
            for name, one in options.items()
            for seed in run.scope.seeds
        }
    )
    return {key[1:]: cell for key, cell in cells.items()}


def _opened_orderings(form: str, cells: Cells, seeds: Seeds) -> list[Ordering]:
    """MPDiffuser above every other method, as published and without collisions."""
    names = [name for name in METHODS if name != BC]
    near = {name: share(of_seeds(cells, name, seeds=seeds), arrived) for name in names}
    untouched = {name: share(of_seeds(cells, name, seeds=seeds), free) for name in names}
    return [
        *orderings(near, PUBLISHED, form, "Table 8"),
        *orderings(untouched, {}, f"{form}, without collisions"),
    ]


def _closed_orderings(cells: Cells, seeds: Seeds) -> list[Ordering]:
    safe = {name: share(of_seeds(cells, name, seeds=seeds), parked) for name in METHODS}
    return orderings(safe, {}, "closed loop, without collisions")


def _open_table(form: str, chosen: Options, cells: Cells, seeds: Seeds) -> Table:
    heads = ("method", "temperature", "guidance", "success %", "published", "free success %",
             "median final error m", "state error m")  # fmt: skip
    rows = []
    for name, options in chosen.items():
        found = of_seeds(cells, name, seeds=seeds)
        ends = [float(np.median(cell["final_error"])) for cell in found]
        rows.append(
            [
                name,
                f"{options['temperature']:g}",
                f"{options['guidance_scale']:g}",
                share(found, arrived),
                PUBLISHED.get(name, "–"),
                share(found, free),
                ", ".join(f"{end:.2f}" for end in ends),
                ", ".join(f"{mean_error(cell):.3f}" for cell in found),
            ]
        )
    return Table(f"Open loop, a plan is {form}", heads, rows)


def _closed_table(cells: Cells, seeds: Seeds) -> Table:
    heads = ("method", "success %", "free success %", "return")
    rows = []
    for name in dict.fromkeys(name for name, _ in cells):
        found = of_seeds(cells, name, seeds=seeds)
        rows.append(
            [name, share(found, _at_goal), share(found, parked), average(found, "return", 2)]
        )
    text = (
        "For every action a plan, the mean of 8 samples: the first in 10 steps from noise, each "
        "further one in a single step from the last. Success: at the goal at the end of 64 steps."
    )
    return Table("Closed loop", heads, rows, text)


def _at_goal(cell: Mapping[str, Any]) -> Any:
    return cell["success"]


def _panel(form: str, cells: Cells, seeds: Seeds) -> Panel:
    lines = {}
    for name in dict.fromkeys(name for name, _ in cells):
        mean = error_series(of_seeds(cells, name, seeds=seeds))
        lines[name] = Curve(range(1, len(mean) + 1), mean)
    return Panel(form, lines, "step of the plan", "planned to executed position, m")
