"""Calibration: what ranked plans of the pendulum promise, and keep (why Table 5 comes out so).

The published planner gets worse with more candidates, because the ranker believes states that the
actions do not lead to. Here one plan is chosen from each start among N and executed without
looking: its promised peak speed and return stand beside the executed ones. The ranker counts a step
where a violation is likelier than a threshold; a low one leaves a margin that hides small errors,
and so does planning again soon, which is seen in closed loop with long chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpd_gym.envs.constrained_pendulum import LIMIT
from studies.estimates import Estimate, average, share
from studies.figures import Curve, Panel, curves
from studies.measures import calibration, episodes
from studies.peers import ALONE, OURS
from studies.report import Ordering, Report, Table, in_words
from studies.runner import Measurement, Run, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["study"]

ENV_ID = "ConstrainedPendulum-v0"
COMPOSITIONS = {ALONE: "planner_only", OURS: "alternating_matched"}
CANDIDATES = (1, 4, 8, 16, 32, 64)
THRESHOLDS = (0.01, 0.5)
OPTIONS: dict[str, Any] = {}  # the agent's own
CLOSED = {"action_chunk": 16, "cost_threshold": 0.5}
CLOSED_CANDIDATES = (8,)
PUBLISHED = "93 : 91"  # success in per cent at N = 8, in closed loop

Cells = Mapping[Any, dict[str, Any]]
Found = Sequence[Mapping[str, Any]]


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    planned, closed = _planned(run), _closed(run)
    found = {
        (threshold, count, name): of_seeds(planned, threshold, count, name, seeds=scope.seeds)
        for threshold in THRESHOLDS
        for count in CANDIDATES
        for name in COMPOSITIONS
    }
    broken = {key: share(cells, _broken) for key, cells in found.items()}
    rows = [
        [
            count,
            *(
                broken[threshold, count, name].short
                for threshold in THRESHOLDS
                for name in COMPOSITIONS
            ),
        ]
        for count in CANDIDATES
    ]
    heads = ["N", *(f"{name}, threshold {one:g}" for one in THRESHOLDS for name in COMPOSITIONS)]
    return Report(
        "ConstrainedPendulum-v0: what the ranked plans promise and keep (Table 5)",
        "Do the plans that the ranker chooses among N keep what they promise?",
        Table(
            "",
            heads,
            rows,
            f"Executed plans beyond the limit, %. {run.scope.told}. Nothing is published.",
        ),
        _figure(found, broken),
        "Above: executed plans beyond the limit; below: how far peak speeds exceed their promise, "
        "with 95 % intervals. Choice among many makes plans of both methods optimistic.",
        "One plan from each start, chosen among N and executed without looking; threshold: "
        "probability of a violation from which the ranker counts a step.",
        [_table(threshold, found, broken) for threshold in THRESHOLDS] + [_closed_table(closed)],
        _orderings(broken, closed),
    )


def _planned(run: Run) -> Cells:
    scope = run.scope
    return run.measure(
        {
            (threshold, count, name, seed): Measurement(
                scope.network(ENV_ID, seed),
                calibration,
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


def _closed(run: Run) -> dict[tuple[int, str], Estimate]:
    """Success in closed loop with the first seed."""
    scope = run.scope
    cells = run.measure(
        {
            ("closed loop", count, name): Measurement(
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
    text = f"Whole episodes with the first seed; {in_words(CLOSED)}, all else the agent's own."
    return Table("Closed loop with long chunks", ("N", "method", "success %"), rows, text)


def _orderings(
    broken: Mapping[tuple[float, int, str], Estimate],
    closed: Mapping[tuple[int, str], Estimate],
) -> list[Ordering]:
    most, last = max(CANDIDATES), max(CLOSED_CANDIDATES)
    return [
        *(
            Ordering(
                f"executed plans of {OURS} beyond the limit less often than of {ALONE}",
                broken[threshold, most, OURS],
                broken[threshold, most, ALONE],
                higher=False,
                place=f"N = {most}, threshold {threshold:g}",
            )
            for threshold in THRESHOLDS
        ),
        Ordering(
            f"{OURS} above {ALONE}",
            closed[last, OURS],
            closed[last, ALONE],
            PUBLISHED,
            place=f"closed loop with long chunks, N = {last}",
        ),
    ]


def _figure(
    found: Mapping[tuple[float, int, str], Found],
    broken: Mapping[tuple[float, int, str], Estimate],
) -> Figure:
    """Executed violations and broken promises of speed over N, a column for each threshold."""

    def exceeded(threshold: float, count: int, name: str) -> Estimate:
        return _gap(found[threshold, count, name], "promised_peak", "executed_peak", -1)

    def violated(threshold: float, count: int, name: str) -> Estimate:
        return broken[threshold, count, name]

    return curves(
        [
            Panel(
                f"threshold {threshold:g}",
                {
                    name: Curve(CANDIDATES, [value(threshold, one, name) for one in CANDIDATES])
                    for name in COMPOSITIONS
                },
                "candidates N",
                label,
                log=True,
                ticks=True,
            )
            for value, label in (
                (violated, "executed beyond the limit %"),
                (exceeded, "peak above its promise rad/s"),
            )
            for threshold in THRESHOLDS
        ]
    )
