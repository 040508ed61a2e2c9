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
from mpd_gym.experiments.measures import episodes, open_loop
from mpd_gym.experiments.peers import BC, PEERS, contender, grid
from mpd_gym.experiments.report import Curve, Ordering, Panel, Report, Table, curves

__all__ = ["arrived", "free", "study"]

ENV_ID = "CarUMaze-v0"
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "planner only": {"composition": "planner_only"},
    "Algorithm 1": {"composition": "alternating"},
    "level-matched": {"composition": "alternating_matched"},
    "resampled": {"composition": "alternating_resampled"},
    "combined 1/2": {"composition": "combined_score", "dynamics_weight": 0.5},
    "combined 1": {"composition": "combined_score", "dynamics_weight": 1.0},
}
TEMPERATURES = (0.01, 0.5, 1.0)
GUIDANCES = (1.0, 1.5)
STEPS = (10, None)  # reverse steps; None for all K
CLOSED = {"action_chunk": 4}
PUBLISHED = {"Diffuser": 68.8, "Decision Diffuser": 42.2, "MPDiffuser": 95.3}
REACH = 1.0  # metres from the goal that count as there

Cells = Mapping[Any, dict[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    chosen, peers = _compared(book)
    closed = _closed(book, chosen)
    forms = _compositions(book)
    seeds = book.scope.seeds
    free_share = {name: share(of_seeds(peers, name, seeds=seeds), free) for name in chosen}
    near = {name: share(of_seeds(peers, name, seeds=seeds), arrived) for name in chosen}
    tables = [
        _peer_table(peers, chosen, free_share, near, seeds),
        _closed_table(closed, seeds),
        *(_composition_table(forms, steps, seeds) for steps in STEPS),
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


def arrived(cell: Mapping[str, Any]) -> Any:
    """Whether each trial ended at the goal."""
    return np.array(cell["final_error"]) < REACH


def free(cell: Mapping[str, Any]) -> Any:
    """Whether each trial ended at the goal and touched no wall."""
    return arrived(cell) & ~np.array(cell["collision"])


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


def _compositions(book: Book) -> Cells:
    """Every composition of MPDiffuser's networks."""
    scope = book.scope
    return book.measure(
        {
            (name, temperature, steps, seed): Cell(
                scope.network(ENV_ID, seed),
                open_loop,
                scope.starts,
                {
                    **options,
                    "temperature": temperature,
                    "guidance_scale": 1.0,
                    "num_steps": steps,
                },
            )
            for name, options in COMPOSITIONS.items()
            for temperature in TEMPERATURES
            for steps in STEPS
            for seed in scope.seeds
        }
    )


def _mean_error(cell: Mapping[str, Any]) -> float:
    """Mean over the steps of the distance between planned and executed position."""
    return float(np.nanmean(np.array(cell["state_error"], float)))


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
                ", ".join(f"{_mean_error(cell):.3f}" for cell in found),
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


def _composition_table(cells: Cells, steps: int | None, seeds: tuple[int, ...]) -> Table:
    rows = []
    for temperature in TEMPERATURES:
        for name in COMPOSITIONS:
            found = of_seeds(cells, name, temperature, steps, seeds=seeds)
            errors = ", ".join(f"{_mean_error(cell):.3f}" for cell in found)
            rows.append([name, f"{temperature:g}", share(found, arrived), share(found, free)])
            rows[-1].append(errors)
    title = f"Compositions, {'all' if steps is None else steps} reverse steps"
    heads = ("composition", "temperature", "success %", "free success %", "state error m")
    return Table(title, heads, rows)


def _figure(cells: Cells, names: list[str], seeds: tuple[int, ...]) -> Any:
    lines = {}
    for name in names:
        series = [cell["state_error"] for cell in of_seeds(cells, name, seeds=seeds)]
        mean = np.nanmean(np.array(series, float), axis=0)
        lines[name] = Curve(range(1, len(mean) + 1), list(mean))
    title = "planned and executed position"
    return curves([Panel(title, lines, "step of the plan", "distance m")])
