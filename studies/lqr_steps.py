"""What skipped levels do to each composition, on the networks of `lqr_compositions`.

Of the K = 50 levels 5, 10 or 25 are visited, with DDPM's and with DDIM's moves, at p = 0.1 and
temperature 1. Literal alternation moves the states twice over each gap; the other forms stay at the
level. `lqr_compositions` has all 50 levels.
"""

from __future__ import annotations

from typing import Any

from studies.estimates import cost_ratio
from studies.lqr_compositions import COMPOSITIONS, narrow
from studies.measures import regulation
from studies.report import Report, Table
from studies.runner import Book, Cell, of_seeds

__all__ = ["study"]

OPTIONS: dict[str, Any] = {"guidance_scale": 1.0, "action_chunk": 16, "temperature": 1.0}
NAMES = tuple(name for name in COMPOSITIONS if name != "combined_score 0.5")
PERCENT = 10  # of noisy steps in the training data
STEPS = (5, 10, 25)
SAMPLERS = ("ddpm", "ddim")


def study(book: Book) -> Report:
    """Measure every cell and report."""
    scope = book.scope
    cells = book.measure(
        {
            (sampler, f"{steps} steps", name, seed): Cell(
                narrow(scope, PERCENT, seed),
                regulation,
                scope.starts,
                {**OPTIONS, **COMPOSITIONS[name], "sampler": sampler, "num_steps": steps},
            )
            for sampler in SAMPLERS
            for steps in STEPS
            for name in NAMES
            for seed in scope.seeds
        }
    )

    def row(sampler: str, name: str) -> list[Any]:
        return [
            cost_ratio(of_seeds(cells, sampler, f"{steps} steps", name, seeds=scope.seeds))
            for steps in STEPS
        ]

    text = (
        "Cost of 200 closed-loop steps ÷ least possible cost, by the number of reverse steps out "
        f"of K = 50; {scope.trials} trials a cell, the same starts in all; options {OPTIONS}; with "
        "the 95 % bootstrap interval over trials, and each training seed "
        f"({', '.join(map(str, scope.seeds))})."
    )
    tables = [
        Table(
            sampler,
            ["composition", *(f"{steps} steps" for steps in STEPS)],
            [[name, *row(sampler, name)] for name in NAMES],
        )
        for sampler in SAMPLERS
    ]
    return Report("LQR-v0, p = 0.1: skipped levels", text, tables)
