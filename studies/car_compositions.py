"""In which form, and where, the dynamics model earns its place in the U-maze (paper, Fig. 2).

The same planner samples alone and in every composition with its dynamics model. Open loop, all
actions of one plan are executed without looking, so that errors of the plan add up; closed loop, a
new plan follows after a chunk of actions. All forms share networks, starts and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from studies.estimates import Estimate, average, share
from studies.measures import (
    arrived,
    episodes,
    error_series,
    free,
    mean_error,
    open_loop,
)
from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, of_seeds

__all__ = ["study"]

ENV_ID = "CarUMaze-v0"
PLANNER, MATCHED = "planner only", "level-matched"
COMPOSITIONS: dict[str, dict[str, Any]] = {
    PLANNER: {"composition": "planner_only"},
    "Algorithm 1": {"composition": "alternating"},
    MATCHED: {"composition": "alternating_matched"},
    "resampled": {"composition": "alternating_resampled"},
    "combined 1/2": {"composition": "combined_score", "dynamics_weight": 0.5},
    "combined 1": {"composition": "combined_score", "dynamics_weight": 1.0},
}
TEMPERATURES = (0.01, 0.5, 1.0)
STEPS = (None, 10)  # reverse steps; None for all K
OPTIONS: dict[str, Any] = {"guidance_scale": 1.0, "num_candidates": 1}
CLOSED: dict[str, Any] = {"temperature": 0.01, "num_steps": 10}
CHUNKS = (16, 4, 1)  # actions executed of each plan in closed loop
PUBLISHED = 95.3  # per cent of open-loop plans that arrive

Cells = Mapping[Any, dict[str, Any]]
Seeds = tuple[int, ...]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    opened, closed, seeds = _opened(book), _closed(book), book.scope.seeds
    text = (
        f"{book.scope.trials} unseen start-goal pairs for each of the training seeds "
        f"({', '.join(map(str, seeds))}), the same for all forms; per cent with the 95 % Wilson "
        "interval over all trials, and each seed. Success: the car ends within 1 m of the goal; "
        f"free: it touched no wall either. Published for MPDiffuser, open loop: {PUBLISHED} % "
        "success."
    )
    return Report(
        "CarUMaze-v0: planner alone and compositions (Fig. 2)",
        text,
        [*(_open_table(opened, steps, seeds) for steps in STEPS), _closed_table(closed, seeds)],
        _orderings(opened, closed, seeds),
        _figure(opened, seeds),
    )


def _opened(book: Book) -> Cells:
    scope = book.scope
    return book.measure(
        {
            (name, temperature, _shown(steps), seed): Cell(
                scope.network(ENV_ID, seed),
                open_loop,
                scope.starts,
                {**OPTIONS, **form, "temperature": temperature, "num_steps": steps},
            )
            for name, form in COMPOSITIONS.items()
            for temperature in TEMPERATURES
            for steps in STEPS
            for seed in scope.seeds
        }
    )


def _closed(book: Book) -> Cells:
    scope = book.scope
    cells = {
        ("closed loop", chunk, name, seed): Cell(
            scope.network(ENV_ID, seed),
            episodes,
            scope.starts,
            {**CLOSED, **OPTIONS, **COMPOSITIONS[name], "action_chunk": chunk},
        )
        for chunk in CHUNKS
        for name in (PLANNER, MATCHED)
        for seed in scope.seeds
    }
    return {key[1:]: cell for key, cell in book.measure(cells).items()}


def _shown(steps: int | None) -> str:
    return "all steps" if steps is None else f"{steps} steps"


def _driven(cell: Mapping[str, Any]) -> Any:
    """Whether each episode ended at the goal and touched no wall."""
    return np.array(cell["success"]) & ~np.array(cell["collision"])


def _open_table(cells: Cells, steps: int | None, seeds: Seeds) -> Table:
    rows = []
    for temperature in TEMPERATURES:
        for name in COMPOSITIONS:
            found = of_seeds(cells, name, temperature, _shown(steps), seeds=seeds)
            errors = ", ".join(f"{mean_error(cell):.3f}" for cell in found)
            rows.append([name, f"{temperature:g}", share(found, arrived), share(found, free)])
            rows[-1].append(errors)
    heads = ("form", "temperature", "success %", "free success %", "plan to execution m")
    return Table(f"One whole plan, open loop, {_shown(steps)}", heads, rows)


def _closed_table(cells: Cells, seeds: Seeds) -> Table:
    rows = []
    for chunk in CHUNKS:
        for name in (PLANNER, MATCHED):
            found = of_seeds(cells, chunk, name, seeds=seeds)
            success = share(found, lambda cell: cell["success"])
            rows.append([chunk, name, success, share(found, _driven), average(found, "return")])
    heads = ("actions of each plan", "form", "success %", "free success %", "return")
    text = (
        "At the goal at the end of 64 steps. Plans of one sample in 10 steps at temperature 0.01."
    )
    return Table("Closed loop", heads, rows, text)


def _orderings(opened: Cells, closed: Cells, seeds: Seeds) -> list[Ordering]:
    found = []
    for temperature in TEMPERATURES:
        for steps in STEPS:
            ahead, behind = (
                share(of_seeds(opened, name, temperature, _shown(steps), seeds=seeds), free)
                for name in (MATCHED, PLANNER)
            )
            place = f"open loop, temperature {temperature:g}, {_shown(steps)}"
            found.append(_ordering(place, ahead, behind))
    for chunk in CHUNKS:
        ahead, behind = (
            share(of_seeds(closed, chunk, name, seeds=seeds), _driven)
            for name in (MATCHED, PLANNER)
        )
        found.append(_ordering(f"closed loop, {chunk} actions of each plan", ahead, behind))
    return found


def _ordering(place: str, ahead: Estimate, behind: Estimate) -> Ordering:
    return Ordering(f"MPDiffuser above its planner, {place}", ahead, behind, "–")


def _figure(cells: Cells, seeds: Seeds) -> Any:
    """Distance between planned and executed position for each step of the plan."""
    panels = []
    for temperature in TEMPERATURES:
        lines = {}
        for name in (PLANNER, "Algorithm 1", MATCHED):
            found = of_seeds(cells, name, temperature, _shown(STEPS[0]), seeds=seeds)
            mean = error_series(found)
            lines[name] = Curve(range(1, len(mean) + 1), mean)
        title = f"temperature {temperature:g}"
        panels.append(Panel(title, lines, "step of the plan", "plan to execution m"))
    return curves(panels)
