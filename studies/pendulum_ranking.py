"""Ranking many candidates under a hard limit (paper, section 4.2, Table 5).

The pendulum has to be swung up and held without ever turning faster than 6.5 rad/s. Candidates are
conditioned on return and ranked by learned reward and cost models within a budget of zero
(Algorithm 2). A planner alone proposes trajectories that cannot happen; the more it is asked for,
the likelier that one which looks both safe and good is one of those. SafeDiffuser projects the
planned states into the limit, whatever the actions do. All three share networks and ranking models.
Behaviour cloning, of all episodes or of the safe ones, has no candidates and stands beside them.
With few candidates, which cost little, every training plays many starts, to tell small differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.estimates import Estimate, average, share
from studies.figures import Curve, Panel, curves
from studies.measures import episodes
from studies.networks import usual_data
from studies.peers import ALONE, BC, LITERAL, OURS, PEERS, grid
from studies.report import UNPUBLISHED, Ordering, Report, Table
from studies.runner import Contender, Measurement, Run, Scope, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["study"]

ENV_ID = "ConstrainedPendulum-v0"
SAFE = "SafeDiffuser"
COMPOSITIONS = {ALONE: "planner_only", SAFE: "planner_only", OURS: "alternating_matched"}
CANDIDATES = (1, 4, 8, 16, 32, 64)
OFTEN = {1: (ALONE, OURS, LITERAL), 8: (ALONE, OURS)}
TIMES = 4  # as many starts, and all of them with each training
OPTIONS: dict[str, Any] = {}  # the agent's own, such as its budget
TUNED_AT = 8  # candidates with which options are chosen
TEMPERATURES = (0.5, 1.0)
GUIDANCES = (0.0, 1.0)
PUBLISHED = {  # per cent
    ALONE: {1: 62, 4: 89, 8: 91, 16: 88, 32: 74, 64: 66},
    SAFE: {1: 49, 4: 62, 8: 47, 16: 42, 32: 46, 64: 45},
    LITERAL: {1: 69, 4: 84, 8: 93, 16: 93, 32: 92, 64: 91},
}
PUBLISHED[OURS] = PUBLISHED[LITERAL]

Found = dict[tuple[str, int], list[dict[str, Any]]]


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    tuned = run.tune(_contenders(scope), lambda cell: float(np.mean(cell["success"])))
    chosen = {name: choice.options for name, choice in tuned.items()}
    places = [(name, count) for count in CANDIDATES for name in COMPOSITIONS]
    cells = run.measure(
        {
            (name, f"N={count}", seed): Measurement(
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
    often = _often(run, chosen)
    return Report(
        "ConstrainedPendulum-v0: ranking N candidates within a budget of zero (Table 5)",
        "Does a dynamics model keep the ranking of many candidates honest under a hard limit?",
        _main_table(success, scope),
        _figure(success),
        "Success over the number of candidates with its 95 % interval; dotted: published. All "
        "methods gain from candidates; the published fall of two of them is not seen.",
        _text(scope, chosen),
        [
            _table("All methods", found),
            _table(f"{TIMES * scope.trials} starts of each training", often),
            _cloning_table(_cloned(run)),
        ],
        [*_often_orderings(often, scope), *_orderings(success)],
    )


def _main_table(success: Mapping[tuple[str, int], Estimate], scope: Scope) -> Table:
    rows = [
        [
            count,
            *(f"{success[name, count].short} ({PUBLISHED[name][count]})" for name in COMPOSITIONS),
        ]
        for count in CANDIDATES
    ]
    text = (
        f"Success % [95 % interval] (published); {scope.trials} episodes in each cell, spread over "
        f"the training seeds {', '.join(map(str, scope.seeds))}. Published for {LITERAL}."
    )
    return Table("", ("N", *COMPOSITIONS), rows, text)


def _text(scope: Scope, chosen: Mapping[str, Mapping[str, Any]]) -> str:
    return (
        "Success: upright at the end and never beyond the limit; the same episodes for all. "
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


def _often(run: Run, chosen: Mapping[str, Mapping[str, Any]]) -> Found:
    """Few candidates and many starts, all seeds."""
    scope = run.scope
    starts = range(scope.starts.start, scope.starts.start + TIMES * scope.trials)
    options = {**chosen, LITERAL: {**chosen[OURS], "composition": "alternating"}}
    cells = run.measure(
        {
            (name, f"N={count}", seed): Measurement(
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
            f"{name} above {ALONE}",
            success[name, count],
            success[ALONE, count],
            f"{PUBLISHED[name][count]} : {PUBLISHED[ALONE][count]}",
            place=f"N = {count}, {TIMES * scope.trials} starts of each training",
            table="Table 5" if name == OURS else "",
        )
        for name, count in found
        if name != ALONE
    ]


def _cloned(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Behaviour cloning, all seeds."""
    scope = run.scope
    usual, _ = usual_data(ENV_ID)
    sources = {BC: (), f"{BC}, safe episodes": tuple(replace(one, safe=True) for one in usual)}
    cells = run.measure(
        {
            (name, seed): Measurement(
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
    rows = [[name, *_summary(cells)] for name, cells in found.items()]
    return Table("Behaviour cloning", heads, rows)


def _summary(cells: Any) -> list[Estimate]:
    """Success, violations and return."""
    return [
        share(cells, lambda cell: cell["success"]),
        share(cells, lambda cell: np.array(cell["cost"]) > 0),
        average(cells, "return", 1),
    ]


def _method(name: str) -> str:
    return "safediffuser" if name == SAFE else ""


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
        success, *others = _summary(cells)
        beside = name == OURS and (LITERAL, count) in found
        published = UNPUBLISHED if beside else PUBLISHED[name][count]
        rows.append([count, name, success, published, *others])
    return Table(title, heads, rows, f"Published for {LITERAL}.")


def _orderings(success: Mapping[tuple[str, int], Estimate]) -> list[Ordering]:
    """MPDiffuser against the others wherever it is published to be above them."""
    return [
        Ordering(
            f"{OURS} above {name}",
            success[OURS, count],
            success[name, count],
            f"{PUBLISHED[OURS][count]} : {PUBLISHED[name][count]}",
            place=f"N = {count}",
            table="Table 5" if count == CANDIDATES[-1] else "",
        )
        for name, count in success
        if name != OURS
        if PUBLISHED[OURS][count] > PUBLISHED[name][count]
    ]


def _figure(success: Mapping[tuple[str, int], Estimate]) -> Figure:
    lines = {
        name: Curve(
            CANDIDATES,
            [success[name, count] for count in CANDIDATES],
            [PUBLISHED[name][count] for count in CANDIDATES],
        )
        for name in COMPOSITIONS
    }
    y = "success % (dotted: published)"
    return curves([Panel("", lines, "candidates N", y, log=True, ticks=True)])
