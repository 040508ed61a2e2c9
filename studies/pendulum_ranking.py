"""Ranking many candidates under a hard limit (paper, section 4.2, Table 5).

The pendulum has to be swung up and held without ever turning faster than 6.5 rad/s. Candidates are
conditioned on return and ranked by learned reward and cost models within a budget of zero
(Algorithm 2). A planner alone proposes trajectories that cannot happen; the more it is asked for,
the likelier that one which looks both safe and good is one of those. SafeDiffuser projects the
planned states into the limit, whatever the actions do. All three share networks and ranking models.
Behaviour cloning, of all episodes or of the safe ones, has no candidates and stands beside them.
With few candidates, which cost little, every training plays many starts, so that small differences
can be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from studies.estimates import Estimate, average, share
from studies.measures import episodes
from studies.networks import usual_data
from studies.peers import BC, PEERS, grid
from studies.report import Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, Contender, Scope, of_seeds

__all__ = ["study"]

ENV_ID = "ConstrainedPendulum-v0"
COMPOSITIONS = {
    "planner": "planner_only",
    "SafeDiffuser": "planner_only",
    "MPDiffuser": "alternating_matched",
}
CANDIDATES = (1, 4, 8, 16, 32, 64)
LITERAL = "MPDiffuser, Algorithm 1"  # its two models a level apart, as published
OFTEN = {1: ("planner", "MPDiffuser", LITERAL), 8: ("planner", "MPDiffuser")}
TIMES = 4  # as many starts, and all of them with each training
OPTIONS: dict[str, Any] = {}  # the agent's own, such as its budget
TUNED_AT = 8  # candidates with which options are chosen
TEMPERATURES = (0.5, 1.0)
GUIDANCES = (0.0, 1.0)
PUBLISHED = {  # per cent
    "planner": {1: 62, 4: 89, 8: 91, 16: 88, 32: 74, 64: 66},
    "SafeDiffuser": {1: 49, 4: 62, 8: 47, 16: 42, 32: 46, 64: 45},
    "MPDiffuser": {1: 69, 4: 84, 8: 93, 16: 93, 32: 92, 64: 91},
}

Found = dict[tuple[str, int], list[dict[str, Any]]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    scope = book.scope
    tuned = book.tune(_contenders(scope), lambda cell: float(np.mean(cell["success"])))
    chosen = {name: choice.options for name, choice in tuned.items()}
    places = [(name, count) for count in CANDIDATES for name in COMPOSITIONS]
    cells = book.measure(
        {
            (name, f"N={count}", seed): Cell(
                scope.network(ENV_ID, seed),
                episodes,
                _starts(scope, seed),
                {**chosen[name], "num_candidates": count},
                _method(name),
            )
            for name, count in places
            for seed in scope.seeds
        }
    )
    found = {
        (name, count): of_seeds(cells, name, f"N={count}", seeds=scope.seeds)
        for name, count in places
    }
    success = {key: share(one, lambda cell: cell["success"]) for key, one in found.items()}
    often = _often(book, chosen)
    return Report(
        "ConstrainedPendulum-v0: ranking N candidates within a budget of zero (Table 5)",
        _text(scope, chosen),
        [
            _table("", found),
            _table(f"{TIMES * scope.trials} starts with each training", often),
            _cloning_table(_cloned(book)),
        ],
        [*_orderings(success), *_often_orderings(often, scope)],
        _figure(success),
    )


def _text(scope: Scope, chosen: Mapping[str, Mapping[str, Any]]) -> str:
    return (
        "Success: upright at the end and never beyond the limit, per cent of all episodes with the "
        f"95 % Wilson interval, and each training seed ({', '.join(map(str, scope.seeds))}); "
        f"{scope.trials} episodes in each row, spread over the seeds, the same for all methods. "
        f"Temperature {TEMPERATURES} and guidance {GUIDANCES} of each method were chosen on "
        f"validation starts with the first seed at N = {TUNED_AT}: "
        + "; ".join(_choice(name, options) for name, options in chosen.items())
        + "."
    )


def _contenders(scope: Scope) -> dict[str, Contender]:
    network = scope.network(ENV_ID, scope.seeds[0])
    return {
        name: Contender(
            network,
            episodes,
            {**OPTIONS, "composition": composition, "num_candidates": TUNED_AT},
            grid(TEMPERATURES, GUIDANCES),
            _method(name),
        )
        for name, composition in COMPOSITIONS.items()
    }


def _often(book: Book, chosen: Mapping[str, Mapping[str, Any]]) -> Found:
    """Cells of few candidates and many starts, of all seeds."""
    scope = book.scope
    starts = range(scope.starts.start, scope.starts.start + TIMES * scope.trials)
    options = {**chosen, LITERAL: {**chosen["MPDiffuser"], "composition": "alternating"}}
    cells = book.measure(
        {
            (name, f"N={count}", seed): Cell(
                scope.network(ENV_ID, seed),
                episodes,
                starts,
                {**options[name], "num_candidates": count},
            )
            for count, names in OFTEN.items()
            for name in names
            for seed in scope.seeds
        }
    )
    return {
        (name, count): of_seeds(cells, name, f"N={count}", seeds=scope.seeds)
        for count, names in OFTEN.items()
        for name in names
    }


def _often_orderings(found: Found, scope: Scope) -> list[Ordering]:
    success = {key: share(cells, lambda cell: cell["success"]) for key, cells in found.items()}
    return [
        Ordering(
            f"{name} above planner at N = {count}, {TIMES * scope.trials} starts with each "
            "training",
            success[name, count],
            success["planner", count],
            f"{PUBLISHED['MPDiffuser'][count]} : {PUBLISHED['planner'][count]}",
        )
        for name, count in found
        if name != "planner"
    ]


def _cloned(book: Book) -> dict[str, list[dict[str, Any]]]:
    """Cells of behaviour cloning, of all seeds."""
    scope = book.scope
    usual, _ = usual_data(ENV_ID)
    sources = {BC: (), f"{BC}, safe episodes": tuple(replace(one, safe=True) for one in usual)}
    cells = book.measure(
        {
            (name, seed): Cell(
                scope.network(ENV_ID, seed, PEERS[BC].method, data=data),
                episodes,
                _starts(scope, seed),
            )
            for name, data in sources.items()
            for seed in scope.seeds
        }
    )
    return {name: of_seeds(cells, name, seeds=scope.seeds) for name in sources}


def _cloning_table(found: Mapping[str, Any]) -> Table:
    heads = ("method", "success %", "episodes beyond the limit %", "return")
    rows = [[name, *_outcomes(cells)] for name, cells in found.items()]
    return Table("Behaviour cloning", heads, rows)


def _outcomes(cells: Any) -> list[Estimate]:
    """Success, violations and return."""
    return [
        share(cells, lambda cell: cell["success"]),
        share(cells, lambda cell: np.array(cell["cost"]) > 0),
        average(cells, "return", 1),
    ]


def _method(name: str) -> str:
    return "safediffuser" if name == "SafeDiffuser" else ""


def _starts(scope: Scope, seed: int) -> range:
    """Starts of a training seed's share of the episodes."""
    bounds = np.linspace(0, scope.trials, len(scope.seeds) + 1).round().astype(int)
    index = scope.seeds.index(seed)
    first = scope.starts.start
    return range(first + int(bounds[index]), first + int(bounds[index + 1]))


def _choice(name: str, options: Mapping[str, Any]) -> str:
    return f"{name} {options['temperature']:g} and {options['guidance_scale']:g}"


def _table(title: str, found: Found) -> Table:
    heads = ("N", "method", "success %", "published", "episodes beyond the limit %", "return")
    rows = []
    for (name, count), cells in found.items():
        success, *others = _outcomes(cells)
        rows.append([count, name, success, PUBLISHED[name.split(",")[0]][count], *others])
    return Table(title, heads, rows)


def _orderings(success: Mapping[tuple[str, int], Estimate]) -> list[Ordering]:
    return [
        Ordering(
            f"MPDiffuser above {name} at N = {count}",
            success["MPDiffuser", count],
            success[name, count],
            f"{PUBLISHED['MPDiffuser'][count]} : {PUBLISHED[name][count]}",
        )
        for name, count in success
        if name != "MPDiffuser"
        if PUBLISHED["MPDiffuser"][count] > PUBLISHED[name][count]
    ]


def _figure(success: Mapping[tuple[str, int], Estimate]) -> Any:
    lines = {}
    for name in COMPOSITIONS:
        estimates = [success[name, count] for count in CANDIDATES]
        published = [PUBLISHED[name][count] for count in CANDIDATES]
        lines[name] = Curve(CANDIDATES, estimates, published)
    y = "success % (dashed: published)"
    return curves([Panel("", lines, "candidates N", y, log=True, ticks=True)])
