"""What ranked plans of the pendulum promise and what they keep: why Table 5 comes out as it does.

The published planner gets worse with more candidates, because the ranker believes states that the
actions do not lead to. Here one plan is chosen from each start among N and executed without
looking: its promised peak speed and return stand beside the executed ones. The ranker counts a step
where a violation is likelier than a threshold; a low one leaves a margin that hides small errors,
and so does planning again soon, which is seen in closed loop with long chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpd_gym.envs.constrained_pendulum import LIMIT
from studies.estimates import Estimate, average, share
from studies.measures import episodes, promises
from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, of_seeds

__all__ = ["study"]

ENV_ID = "ConstrainedPendulum-v0"
PLANNER, MPDIFFUSER = "planner", "MPDiffuser"
COMPOSITIONS = {PLANNER: "planner_only", MPDIFFUSER: "alternating_matched"}
CANDIDATES = (1, 4, 8, 16, 32, 64)
THRESHOLDS = (0.01, 0.5)
OPTIONS: dict[str, Any] = {}  # the agent's own
CLOSED = {"action_chunk": 16, "cost_threshold": 0.5}
CLOSED_CANDIDATES = (8,)
PUBLISHED = "93 : 91"  # success in per cent at N = 8, in closed loop

Cells = Mapping[Any, dict[str, Any]]
Found = Sequence[Mapping[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    scope = book.scope
    planned, closed = _planned(book), _closed(book)
    found = {
        (threshold, count, name): of_seeds(planned, threshold, count, name, seeds=scope.seeds)
        for threshold in THRESHOLDS
        for count in CANDIDATES
        for name in COMPOSITIONS
    }
    broken = {key: share(cells, _broken) for key, cells in found.items()}
    text = (
        f"{scope.trials} starts for each of the training seeds "
        f"({', '.join(map(str, scope.seeds))}), the same for all; 95 % intervals over all trials, "
        "and each seed. One plan from each start, chosen among N and executed without looking; "
        "threshold: probability of a violation from which the ranker counts a step."
    )
    return Report(
        "ConstrainedPendulum-v0: what the ranked plans promise and keep (Table 5)",
        text,
        [_table(threshold, found, broken) for threshold in THRESHOLDS] + [_closed_table(closed)],
        _orderings(broken, closed),
        _figure(found, broken),
    )


def _planned(book: Book) -> Cells:
    scope = book.scope
    return book.measure(
        {
            (threshold, count, name, seed): Cell(
                scope.network(ENV_ID, seed),
                promises,
                scope.starts,
                {
                    **OPTIONS,
                    "composition": composition,
                    "num_candidates": count,
                    "cost_threshold": threshold,
                },
            )
            for threshold in THRESHOLDS
            for count in CANDIDATES
            for name, composition in COMPOSITIONS.items()
            for seed in scope.seeds
        }
    )


def _closed(book: Book) -> dict[tuple[int, str], Estimate]:
    """Success in closed loop with the first seed."""
    scope = book.scope
    cells = book.measure(
        {
            ("closed loop", count, name): Cell(
                scope.network(ENV_ID, scope.seeds[0]),
                episodes,
                scope.starts,
                {**OPTIONS, **CLOSED, "composition": composition, "num_candidates": count},
            )
            for count in CLOSED_CANDIDATES
            for name, composition in COMPOSITIONS.items()
        }
    )
    return {key[1:]: share([cell], lambda one: one["success"]) for key, cell in cells.items()}


def _broken(cell: Mapping[str, Any]) -> Any:
    """Whether each executed plan went beyond the limit."""
    return np.array(cell["executed_peak"]) > LIMIT


def _gap(cells: Found, promised: str, executed: str, sign: int) -> Estimate:
    """Mean by which promises were better than what was kept."""
    gaps = [{"gap": sign * (np.array(cell[promised]) - np.array(cell[executed]))} for cell in cells]
    return average(gaps, "gap")


def _table(
    threshold: float,
    found: Mapping[tuple[float, int, str], Found],
    broken: Mapping[tuple[float, int, str], Estimate],
) -> Table:
    rows = []
    for count in CANDIDATES:
        for name in COMPOSITIONS:
            cells = found[threshold, count, name]
            promised = share(cells, lambda cell: np.array(cell["promised_peak"]) > LIMIT)
            speed = _gap(cells, "promised_peak", "executed_peak", -1)
            returns = _gap(cells, "promised_return", "executed_return", 1)
            rows.append([count, name, promised, broken[threshold, count, name], speed, returns])
    heads = ("N", "method", "promised beyond the limit %", "executed beyond the limit %",
             "peak speed above its promise rad/s", "return below its promise")  # fmt: skip
    return Table(f"Threshold {threshold:g}", heads, rows)


def _closed_table(closed: Mapping[tuple[int, str], Estimate]) -> Table:
    rows = [[count, name, success] for (count, name), success in closed.items()]
    text = f"Whole episodes with the first seed; {CLOSED}, all else the agent's own."
    return Table("Closed loop with long chunks", ("N", "method", "success %"), rows, text)


def _orderings(
    broken: Mapping[tuple[float, int, str], Estimate],
    closed: Mapping[tuple[int, str], Estimate],
) -> list[Ordering]:
    most = max(CANDIDATES)
    found = [
        Ordering(
            f"{MPDIFFUSER}'s executed plans beyond the limit less often, N = {most}, threshold "
            f"{threshold:g}",
            broken[threshold, most, MPDIFFUSER],
            broken[threshold, most, PLANNER],
            "–",
            higher=False,
        )
        for threshold in THRESHOLDS
    ]
    last = max(CLOSED_CANDIDATES)
    return [
        *found,
        Ordering(
            f"{MPDIFFUSER} above its planner, closed loop with long chunks, N = {last}",
            closed[last, MPDIFFUSER],
            closed[last, PLANNER],
            PUBLISHED,
        ),
    ]


def _figure(
    found: Mapping[tuple[float, int, str], Found],
    broken: Mapping[tuple[float, int, str], Estimate],
) -> Any:
    """Executed violations and broken promises of speed over N, a column for each threshold."""
    panels = []
    for threshold in THRESHOLDS:
        lines = {
            name: Curve(CANDIDATES, [broken[threshold, count, name] for count in CANDIDATES])
            for name in COMPOSITIONS
        }
        title = f"threshold {threshold:g}"
        y = "plans executed beyond the limit %"
        panels.append(Panel(title, lines, "candidates N", y, log=True, ticks=True))
    for threshold in THRESHOLDS:
        lines = {
            name: Curve(
                CANDIDATES,
                [
                    _gap(found[threshold, count, name], "promised_peak", "executed_peak", -1)
                    for count in CANDIDATES
                ],
            )
            for name in COMPOSITIONS
        }
        y = "peak speed above its promise rad/s"
        panels.append(Panel(f"threshold {threshold:g}", lines, "candidates N", y, log=True,
                            ticks=True))  # fmt: skip
    return curves(panels)
