"""Whole plans executed open loop in the U-maze, and closed loop (paper, Table 8 and Fig. 2).

The planner learns from expert drives, the dynamics model from expert and random ones. An open-loop
trial executes all H actions of one plan without looking; it succeeds if the car ends within a metre
of the goal, and is free if it never touched a wall. All methods have the same data, training steps
and starts; temperature and guidance of each are chosen on validation starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mpd_gym.experiments.estimates import Estimate, average, share
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
TEMPERATURES = (0.01, 0.5, 1.0)
GUIDANCES = (1.0, 1.5)
CLOSED = {"action_chunk": 4}
PUBLISHED = {"Diffuser": 68.8, "Decision Diffuser": 42.2, "MPDiffuser": 95.3}

Cells = Mapping[Any, dict[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    chosen, peers = _compared(book)
    closed = _closed(book, chosen)
    seeds = book.scope.seeds
    free_share = {name: share(of_seeds(peers, name, seeds=seeds), free) for name in chosen}
    near = {name: share(of_seeds(peers, name, seeds=seeds), arrived) for name in chosen}
    tables = [
        _peer_table(peers, chosen, free_share, near, seeds),
        _closed_table(closed, seeds),
    ]
    others = [name for name in chosen if not name.startswith("MPDiffuser")]
    orderings = [
        Ordering(
            f"MPDiffuser above {name}{suffix}",
            shares["MPDiffuser"],
            shares[name],
            f"{PUBLISHED['MPDiffuser']} : {PUBLISHED[name]}"
            if name in PUBLISHED and not suffix
            else "–",
        )
        for suffix, shares in (("", near), (", without collisions", free_share))
        for name in others
    ]
    text = (
        f"Success of {book.scope.trials} unseen start-goal pairs, the same for all, in per cent "
        "with the 95 % Wilson interval over the trials of all training seeds "
        f"({', '.join(map(str, seeds))}), and each seed. Without heed of walls, as published: the "
        "car ends within 1 m of the goal; free: it touched no wall either. Temperature "
        f"{TEMPERATURES} and guidance {GUIDANCES} of each method were chosen by free success on "
        "validation starts with the first seed."
    )
    return Report(
        "CarUMaze-v0: whole plans executed open loop (Table 8, Fig. 2)",
        text,
        tables,
        orderings,
        _figure(peers, list(chosen), seeds),
    )


def _compared(book: Book) -> tuple[dict[str, dict[str, Any]], Cells]:
    """Options of each method, and its cells by name and seed."""
    scope = book.scope
    names = [name for name in PEERS if name != BC]
    tried = grid(TEMPERATURES, GUIDANCES)
    rivals = {name: contender(scope, name, ENV_ID, open_loop, {}, tried) for name in names}
    tuned = book.tune(rivals, lambda cell: float(np.mean(free(cell))))
    chosen = {name: choice.options for name, choice in tuned.items()}
    cells = book.measure(
        {
            (name, seed): Cell(
                replace(rivals[name].network, seed=seed), open_loop, scope.starts, chosen[name]
            )
            for name in names
            for seed in scope.seeds
        }
    )
    return chosen, cells


def _closed(book: Book, chosen: Mapping[str, Mapping[str, Any]]) -> Cells:
    """Closed-loop cells of all methods, behaviour cloning among them."""
    scope = book.scope
    options: dict[str, dict[str, Any]] = {BC: {}}
    options |= {name: {**one, **CLOSED} for name, one in chosen.items()}
    cells = {
        ("closed loop", name, seed): Cell(
            scope.network(ENV_ID, seed, PEERS[name].method), episodes, scope.starts, one
        )
        for name, one in options.items()
        for seed in scope.seeds
    }
    return {key[1:]: cell for key, cell in book.measure(cells).items()}


def _peer_table(
    cells: Cells,
    chosen: Mapping[str, Mapping[str, Any]],
    free_share: Mapping[str, Estimate],
    near: Mapping[str, Estimate],
    seeds: tuple[int, ...],
) -> Table:
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
                near[name],
                PUBLISHED.get(name, "–"),
                free_share[name],
                ", ".join(f"{end:.2f}" for end in ends),
                ", ".join(f"{mean_error(cell):.3f}" for cell in found),
            ]
        )
    return Table("Methods", heads, rows)


def _closed_table(cells: Cells, seeds: tuple[int, ...]) -> Table:
    names = list(dict.fromkeys(name for name, _ in cells))
    rows = []
    for name in names:
        found = of_seeds(cells, name, seeds=seeds)
        rows.append(
            [
                name,
                share(found, lambda cell: cell["success"]),
                share(found, lambda cell: np.array(cell["success"]) & ~np.array(cell["collision"])),
                average(found, "return", 2),
            ]
        )
    heads = ("method", "success %", "free success %", "return")
    text = "At the goal at the end of 64 steps; plans are made anew after every 4 actions."
    return Table("Closed loop", heads, rows, text)


def _figure(cells: Cells, names: list[str], seeds: tuple[int, ...]) -> Any:
    lines = {}
    for name in names:
        mean = error_series(of_seeds(cells, name, seeds=seeds))
        lines[name] = Curve(range(1, len(mean) + 1), mean)
    title = "planned and executed position"
    return curves([Panel(title, lines, "step of the plan", "distance m")])
