"""Whole plans executed open loop in the U-maze, and closed loop (paper, Table 8 and Fig. 2).

The planner learns from expert drives, the dynamics model from expert and random ones. An open-loop
trial executes all H actions of one plan without looking; it succeeds if the car ends within a metre
of the goal, and is free if it never touched a wall. The plan is one sample, or the mean of eight.
All methods have the same data, training steps and starts; temperature and guidance of each are
chosen on validation starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mpd_gym.experiments.estimates import average, share
from mpd_gym.experiments.frame import Book, Cell, of_seeds
from mpd_gym.experiments.measures import (
    arrived,
    episodes,
    error_series,
    free,
    mean_error,
    open_loop,
)
from mpd_gym.experiments.peers import BC, PEERS, contender, grid
from mpd_gym.experiments.report import Curve, Ordering, Panel, Report, Table, curves

__all__ = ["study"]

ENV_ID = "CarUMaze-v0"
PLANNER, MPDIFFUSER = "planner", "MPDiffuser"
FORMS: dict[str, dict[str, Any]] = {
    "one sample": {"num_candidates": 1},
    "mean of 8": {"num_candidates": 1, "samples_per_candidate": 8},
}
TEMPERATURES = (0.01, 0.5, 1.0)
GUIDANCES = (1.0, 1.5)
CLOSED = {"action_chunk": 4}  # in closed loop, beside the last of the forms
PUBLISHED = {"Diffuser": 68.8, "Decision Diffuser": 42.2, MPDIFFUSER: 95.3}

Cells = Mapping[Any, dict[str, Any]]
Seeds = tuple[int, ...]
Options = Mapping[str, Mapping[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    seeds = book.scope.seeds
    tables, orderings, panels = [], [], []
    for form in FORMS:
        chosen, cells = _opened(book, form)
        tables.append(_open_table(form, chosen, cells, seeds))
        orderings += _orderings(form, cells, seeds)
        panels.append(_panel(form, cells, seeds))
    closed = _closed(book, chosen)
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
        [*tables, *_closed_tables(closed, seeds)],
        orderings,
        curves(panels),
    )


def _opened(book: Book, form: str) -> tuple[Options, Cells]:
    """Options of each method whose plans have a form, and its cells by name and seed."""
    scope = book.scope
    names = [name for name in PEERS if name != BC]
    tried = grid(TEMPERATURES, GUIDANCES)
    rivals = {
        (form, name): contender(scope, name, ENV_ID, open_loop, FORMS[form], tried)
        for name in names
    }
    tuned = book.tune(rivals, _quality)
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


def _quality(cell: Mapping[str, Any]) -> float:
    """Free success; where that is equal, how near the goal is."""
    return float(np.mean(free(cell)) - 1e-3 * np.mean(cell["final_error"]))


def _closed(book: Book, chosen: Options) -> Cells:
    """Closed-loop cells by loop, method and seed: chunks for all, and the agent's own options."""
    options: dict[tuple[str, str], Mapping[str, Any]] = {("chunks", BC): {}}
    options |= {("chunks", name): {**one, **CLOSED} for name, one in chosen.items()}
    options |= {("own", name): PEERS[name].options for name in (PLANNER, MPDIFFUSER)}
    return book.measure(
        {
            ("closed loop", *key, seed): Cell(
                book.scope.network(ENV_ID, seed, PEERS[key[1]].method),
                episodes,
                book.scope.starts,
                one,
            )
            for key, one in options.items()
            for seed in book.scope.seeds
        }
    )


def _orderings(form: str, cells: Cells, seeds: Seeds) -> list[Ordering]:
    """MPDiffuser above every other method, as published and without collisions."""
    names = list(dict.fromkeys(name for name, _ in cells))
    found = []
    for suffix, flags in (("", arrived), (", without collisions", free)):
        shares = {name: share(of_seeds(cells, name, seeds=seeds), flags) for name in names}
        for name in names:
            if not name.startswith(MPDIFFUSER):
                known = name in PUBLISHED and not suffix
                published = f"{PUBLISHED[MPDIFFUSER]} : {PUBLISHED[name]}" if known else "–"
                statement = f"{MPDIFFUSER} above {name}, {form}{suffix}"
                found.append(Ordering(statement, shares[MPDIFFUSER], shares[name], published))
    return found


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


def _closed_tables(cells: Cells, seeds: Seeds) -> list[Table]:
    heads = ("method", "success %", "free success %", "return")
    texts = {
        "chunks": "The mean of 8 samples, made anew after every 4 actions.",
        "own": "The agent's own options: a new plan for every action.",
    }
    rows: dict[str, list[Any]] = {loop: [] for loop in texts}
    for loop, name in dict.fromkeys(key[1:3] for key in cells):
        found = of_seeds(cells, "closed loop", loop, name, seeds=seeds)
        rows[loop].append(
            [
                name,
                share(found, lambda cell: cell["success"]),
                share(found, lambda cell: np.array(cell["success"]) & ~np.array(cell["collision"])),
                average(found, "return", 2),
            ]
        )
    ending = " At the goal at the end of 64 steps."
    return [
        Table(f"Closed loop, {title}", heads, rows[loop], texts[loop] + ending)
        for loop, title in (("chunks", "chunks of 4"), ("own", "as users run it"))
    ]


def _panel(form: str, cells: Cells, seeds: Seeds) -> Panel:
    lines = {}
    for name in dict.fromkeys(name for name, _ in cells):
        mean = error_series(of_seeds(cells, name, seeds=seeds))
        lines[name] = Curve(range(1, len(mean) + 1), mean)
    return Panel(form, lines, "step of the plan", "planned to executed position, m")
