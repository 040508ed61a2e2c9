"""Return against milliseconds per action with warm-started plans (paper, appendix G, Fig. 13).

After the first plan of an episode, the last plan is shifted, noised to level m and denoised from
there, so that a plan takes m reverse steps in the place of K. A new plan is made for every action.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from studies.estimates import Estimate, average
from studies.measures import clocked, episodes
from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, of_seeds
from studies.variants import CAR, LQR_NOISY, MATCHED, Task

__all__ = ["study"]

TASKS = (CAR, LQR_NOISY)
STEPS = (1, 2, 5, 10, 0)  # of a warm-started plan; 0 plans from scratch with all K
OPTIONS: dict[str, Any] = {
    **MATCHED,
    "num_steps": None,
    "num_candidates": 1,
    "action_chunk": 1,
    "temperature": 0.1,
    "guidance_scale": 1.0,
}
TIMED_EPISODES = 3
PUBLISHED = "10 steps: 94.9 at 58 ms; all 100: 583 ms on an RTX 4090"


def study(book: Book) -> Report:
    """Measure every cell and report; nothing else should run while times are taken."""
    played = [_played(book, task) for task in TASKS]
    times = [_timed(book, task) for task in TASKS]  # last, so that they can be taken in quiet
    found = [
        (task, {steps: (returns[steps], taken[steps]) for steps in STEPS})
        for task, returns, taken in zip(TASKS, played, times, strict=True)
    ]
    text = (
        f"MPDiffuser, {book.scope.trials} episodes a cell, the same starts for all, {OPTIONS}. "
        "Milliseconds: one environment, one thread, mean over the actions of an episode, median of "
        f"{TIMED_EPISODES} episodes with the first seed. Published, Hopper: {PUBLISHED}."
    )
    tables = [_table(task, cells) for task, cells in found]
    ten = max(step for step in STEPS if step <= 10)
    orderings = [
        Ordering(f"all steps above {ten}, {task.env_id}", cells[0][0], cells[ten][0], "about equal")
        for task, cells in found
    ]
    panels = [_panel(task, cells) for task, cells in found]
    title = "Return against time with warm starts (Fig. 13)"
    return Report(title, text, tables, orderings, curves(panels))


def _options(steps: int) -> dict[str, Any]:
    return {**OPTIONS, "warm_start_steps": steps}


def _played(book: Book, task: Task) -> dict[int, Estimate]:
    """Return for each number of steps."""
    scope = book.scope
    cells = book.measure(
        {
            (task.title, steps, seed): Cell(
                task.network(scope, seed), episodes, scope.starts, _options(steps)
            )
            for steps in STEPS
            for seed in scope.seeds
        }
    )
    return {
        steps: average(of_seeds(cells, task.title, steps, seeds=scope.seeds), "return")
        for steps in STEPS
    }


def _timed(book: Book, task: Task) -> dict[int, float]:
    """Milliseconds per action for each number of steps."""
    scope = book.scope
    network, first = task.network(scope, scope.seeds[0]), scope.starts.start
    starts = range(first, first + TIMED_EPISODES)
    cells = book.measure(
        {
            (task.title, "time", steps): Cell(network, clocked, starts, _options(steps))
            for steps in STEPS
        },
        alone=True,
    )
    return {
        steps: float(np.median(cells[task.title, "time", steps]["milliseconds"])) for steps in STEPS
    }


def _table(task: Task, cells: Mapping[int, tuple[Estimate, float]]) -> Table:
    rows = [
        [str(steps) if steps else "all, from scratch", estimate, f"{milliseconds:.2f}"]
        for steps, (estimate, milliseconds) in cells.items()
    ]
    return Table(task.env_id, ("reverse steps", "return", "ms per action"), rows)


def _panel(task: Task, cells: Mapping[int, tuple[Estimate, float]]) -> Panel:
    ordered = sorted(cells.values(), key=lambda pair: pair[1])
    line = Curve([time for _, time in ordered], [estimate for estimate, _ in ordered])
    return Panel(task.env_id, {"MPDiffuser": line}, "milliseconds per action", "return", log=True)
