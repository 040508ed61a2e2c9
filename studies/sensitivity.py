"""How much guidance and the number of candidates matter (paper, appendix M, Tables 17 and 18).

Published for FetchPickAndPlace, where the candidate that ends nearest to the goal is executed; here
for the maze with the same ranker, and for the pendulum, whose ranker is learned.
"""

from __future__ import annotations

from typing import Any

from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book
from studies.variants import CAR, MATCHED, PENDULUM, Outcome, Variant, compared

__all__ = ["study"]

GUIDANCES = {1.0: None, 1.5: 72, 1.75: 80.3, 2.0: 81.5, 2.25: 76.5, 2.5: 72}
SAMPLES = {1: 60, 2: 62, 4: 70, 8: 73, 16: 75, 32: 72}
TEMPERATURE = 0.5
TASKS = (CAR, PENDULUM)


def study(book: Book) -> Report:
    """Measure every cell and report."""
    guided = {
        f"ω = {scale:g}": Variant({**MATCHED, "guidance_scale": scale}) for scale in GUIDANCES
    }
    sampled = {f"N = {count}": Variant({**MATCHED, "num_candidates": count}) for count in SAMPLES}
    found = compared(book, [(task, {**guided, **sampled}) for task in TASKS], (TEMPERATURE,))
    text = (
        f"MPDiffuser, {book.scope.trials} trials a cell, the same starts for all; temperature "
        f"{TEMPERATURE}. Published for FetchPickAndPlace, per cent: guidance "
        + ", ".join(f"{scale:g} {rate}" for scale, rate in GUIDANCES.items() if rate)
        + "; candidates "
        + ", ".join(f"{count} {rate}" for count, rate in SAMPLES.items())
        + "."
    )
    tables: list[Table] = []
    panels = []
    for outcome in found:
        tables += [_table(outcome, "guidance", guided), _table(outcome, "candidates", sampled)]
        panels += [_panel(outcome, "ω", GUIDANCES), _panel(outcome, "N", SAMPLES)]
    low, high = (f"N = {count}" for count in (min(SAMPLES), max(SAMPLES)))
    orderings: list[Ordering] = [
        outcome.ordering(high, low, f"{SAMPLES[max(SAMPLES)]} : {SAMPLES[min(SAMPLES)]}")
        for outcome in found
    ]
    title = "Guidance and number of candidates (Tables 17 and 18)"
    return Report(title, text, tables, orderings, curves(panels))


def _table(outcome: Outcome, head: str, names: Any) -> Table:
    title = f"{outcome.task.title}, {head}"
    rows = [[name, outcome.estimates[name]] for name in names]
    return Table(title, (head, outcome.task.unit), rows)


def _panel(outcome: Outcome, symbol: str, places: Any) -> Panel:
    line = Curve(list(places), [outcome.estimates[f"{symbol} = {place:g}"] for place in places])
    label = "guidance ω" if symbol == "ω" else "candidates N"
    title, unit = outcome.task.title, outcome.task.unit
    return Panel(title, {"MPDiffuser": line}, label, unit, log=symbol == "N", ticks=True)
