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
    MPDIFFUSER,
    PEERS,
    contender,
    grid,
    orderings,
)
from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, of_seeds

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
PUBLISHED = {"Diffuser": 68.8, "Decision Diffuser": 42.2, MPDIFFUSER: 95.3}

Cells = Mapping[Any, dict[str, Any]]
Seeds = tuple[int, ...]
Options = Mapping[str, Mapping[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    seeds = book.scope.seeds
    tables, found, panels = [], [], []
    for form in FORMS:
        chosen, cells = _opened(book, form)
        tables.append(_open_table(form, chosen, cells, seeds))
        found += _opened_orderings(form, cells, seeds)
        panels.append(_panel(form, cells, seeds))
    closed = _closed(book, chosen)
    found += _closed_orderings(closed, seeds)
    text = (
        f"Success of {book.scope.trials} unseen start-goal pairs, the same for all, in per cent "
        "with the 95 % Wilson interval over the trials of all training seeds "
        f"({', '.join(map(str, seeds))}), and each seed. Without heed of walls, as published: the "
        "car ends within 1 m of the goal; free: it touched no wall either. Temperature "
        f"{TEMPERATURES} and guidance {GUIDANCES} of each method were chosen by free success on "
        "validation starts with the first seed, apart for plans that are one sample and plans that "
        "are the mean of eight."
    )
    return Report(
        "CarUMaze-v0: whole plans executed open loop (Table 8, Fig. 2)",
        text,
        [*tables, _closed_table(closed, seeds)],
        found,
        curves(panels),
    )


def _opened(book: Book, form: str) -> tuple[Options, Cells]:
    """Options of each method whose plans have a form, and its cells by name and seed."""
    scope = book.scope
    names = [name for name in METHODS if name != BC]
    tried = grid(TEMPERATURES, GUIDANCES)
    rivals = {
        (form, name): contender(scope, METHODS[name], ENV_ID, open_loop, FORMS[form], tried)
        for name in names
    }
    tuned = book.tune(rivals, quality)
    chosen = {name: choice.options for (_, name), choice in tuned.items()}
    cells = book.measure(
        {
            (form, name, seed): Cell(
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


def _closed(book: Book, chosen: Options) -> Cells:
    """Closed-loop cells by method and seed; behaviour cloning plans nothing and has no options."""
    options: dict[str, dict[str, Any]] = {BC: {}}
    options |= {name: {**one, **CLOSED} for name, one in chosen.items()}
    cells = book.measure(
        {
            ("closed loop", name, seed): Cell(
                METHODS[name].network(book.scope, ENV_ID, seed),
                episodes,
                book.scope.starts,
                one,
            )
            for name, one in options.items()
            for seed in book.scope.seeds
        }
    )
    return {key[1:]: cell for key, cell in cells.items()}


def _opened_orderings(form: str, cells: Cells, seeds: Seeds) -> list[Ordering]:
    """MPDiffuser above every other method, as published and without collisions."""
    names = [name for name in METHODS if name != BC]
    near = {name: share(of_seeds(cells, name, seeds=seeds), arrived) for name in names}
    untouched = {name: share(of_seeds(cells, name, seeds=seeds), free) for name in names}
    return [
        *orderings(near, PUBLISHED, f", {form}"),
        *orderings(untouched, {}, f", {form}, without collisions"),
    ]


def _closed_orderings(cells: Cells, seeds: Seeds) -> list[Ordering]:
    safe = {name: share(of_seeds(cells, name, seeds=seeds), parked) for name in METHODS}
    return orderings(safe, {}, ", closed loop, without collisions")


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
