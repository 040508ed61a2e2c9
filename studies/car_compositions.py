"""In which form, and where, the dynamics model earns its place in the U-maze (paper, Fig. 2).

The same planner samples alone and in every composition with its dynamics model. Open loop, all
actions of one plan are executed without looking, so that errors of the plan add up; closed loop, a
new plan follows after a chunk of actions. All forms share networks, starts and options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from studies.estimates import Estimate, average, share
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
from studies.peers import ALONE, LITERAL, OURS, RESAMPLED
from studies.report import Ordering, Report, Table
from studies.runner import Measurement, Run, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["study"]

ENV_ID = "CarUMaze-v0"
COMPOSITIONS: dict[str, dict[str, Any]] = {
    ALONE: {"composition": "planner_only"},
    LITERAL: {"composition": "alternating"},
    OURS: {"composition": "alternating_matched"},
    RESAMPLED: {"composition": "alternating_resampled"},
    "combined score, weight 1/2": {"composition": "combined_score", "dynamics_weight": 0.5},
    "combined score, weight 1": {"composition": "combined_score", "dynamics_weight": 1.0},
}
TEMPERATURES = (0.01, 0.5, 1.0)
STEPS = (None, 10)  # reverse steps; None for all K
OPTIONS: dict[str, Any] = {"guidance_scale": 1.0, "num_candidates": 1}
CLOSED: dict[str, Any] = {"temperature": 0.01, "num_steps": 10}
CHUNKS = (16, 4, 1)  # actions executed of each plan in closed loop
PUBLISHED = 95.3  # per cent of open-loop plans that arrive

Cells = Mapping[Any, dict[str, Any]]
Seeds = tuple[int, ...]


def study(run: Run) -> Report:
    """Measure everything and report."""
    opened, closed, seeds = _opened(run), _closed(run), run.scope.seeds
    rows = [
        [
            name,
            *(_safe(opened, name, temperature, STEPS[-1], seeds) for temperature in TEMPERATURES),
            PUBLISHED if name == LITERAL else "–",
        ]
        for name in COMPOSITIONS
    ]
    heads = ("form", *(f"temperature {one:g}" for one in TEMPERATURES), "published success")
    text = (
        f"Plans that arrive without touching a wall, %, open loop, {_shown(STEPS[-1])}. "
        f"{run.scope.told}."
    )
    return Report(
        "CarUMaze-v0: planner alone and compositions (Fig. 2)",
        "Where does the dynamics model help the car, and in which form?",
        Table("", heads, rows, text),
        _figure(opened, seeds),
        "Distance between planned and executed position: plans of the level-matched form are "
        "followed most closely.",
        "Unseen start-goal pairs, the same for all forms. Success: the car ends within 1 m of the "
        "goal; free: it touched no wall either.",
        [*(_open_table(opened, steps, seeds) for steps in STEPS), _closed_table(closed, seeds)],
        _orderings(opened, closed, seeds),
    )


def _safe(cells: Cells, name: str, temperature: float, steps: int | None, seeds: Seeds) -> str:
    return share(of_seeds(cells, name, temperature, _shown(steps), seeds=seeds), free).short


def _opened(run: Run) -> Cells:
    scope = run.scope
    return run.measure(
        {
            (name, temperature, _shown(steps), seed): Measurement(
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


def _closed(run: Run) -> Cells:
    scope = run.scope
    cells = {
        ("closed loop", chunk, name, seed): Measurement(
            scope.network(ENV_ID, seed),
            episodes,
            scope.starts,
            {**CLOSED, **OPTIONS, **COMPOSITIONS[name], "action_chunk": chunk},
        )
        for chunk in CHUNKS
        for name in (ALONE, OURS)
        for seed in scope.seeds
    }
    return {key[1:]: cell for key, cell in run.measure(cells).items()}


def _shown(steps: int | None) -> str:
    return "all steps" if steps is None else f"{steps} steps"


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
        for name in (ALONE, OURS):
            found = of_seeds(cells, chunk, name, seeds=seeds)
            success = share(found, lambda cell: cell["success"])
            rows.append([chunk, name, success, share(found, parked), average(found, "return")])
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
                for name in (OURS, ALONE)
            )
            place = f"open loop, temperature {temperature:g}, {_shown(steps)}"
            found.append(_ordering(place, ahead, behind))
    for chunk in CHUNKS:
        ahead, behind = (
            share(of_seeds(closed, chunk, name, seeds=seeds), parked) for name in (OURS, ALONE)
        )
        found.append(_ordering(f"closed loop, {chunk} actions of each plan", ahead, behind))
    return found


def _ordering(place: str, ahead: Estimate, behind: Estimate) -> Ordering:
    return Ordering(f"{OURS} above {ALONE}", ahead, behind, place=place)


def _figure(cells: Cells, seeds: Seeds) -> Figure:
    """Distance between planned and executed position for each step of the plan."""
    panels = []
    for temperature in TEMPERATURES:
        lines = {}
        for name in (ALONE, LITERAL, OURS):
            found = of_seeds(cells, name, temperature, _shown(STEPS[0]), seeds=seeds)
            mean = error_series(found)
            lines[name] = Curve(range(1, len(mean) + 1), mean)
        title = f"temperature {temperature:g}"
        panels.append(Panel(title, lines, "step of the plan", "planned to executed position, m"))
    return curves(panels)
