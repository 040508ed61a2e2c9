"""What the dynamics model is worth away from the data that the planner has seen.

On starts like those of the data, a planner that learned from 2,000 drives of an expert needs no
help (Table 8 here). So the car starts more aslant than any recorded drive does, or its axles are
nearer together or further apart than the recorded car's, which nobody tells the agents. Networks
and options are those of other studies; nothing is tuned on what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mpd_gym.evaluation import mean_interval
from mpd_gym.experiments.estimates import Estimate, share
from mpd_gym.experiments.frame import Book, Cell, Scope
from mpd_gym.experiments.measures import Measure, episodes, free, open_loop, parked
from mpd_gym.experiments.networks import Data, Network
from mpd_gym.experiments.report import UNPUBLISHED, Curve, Ordering, Panel, Report, Table, curves
from mpd_gym.experiments.variants import EXPERT, MATCHED, PLANNER

__all__ = ["study"]

ENV_ID = "CarUMaze-v0"
OPTIONS: dict[str, Any] = {
    "num_candidates": 1,
    "num_steps": 10,
    "guidance_scale": 1.0,
    "temperature": 0.1,  # what validation chose for every variant of the study car-actions
}
CLOSED = {"action_chunk": 1, "warm_start_steps": 1}


class Series(NamedTuple):
    """One constant of the environment that is changed, and how drives are made."""

    title: str
    constant: str
    label: str
    values: tuple[float, ...]
    measure: Measure
    options: Mapping[str, Any]
    succeeds: Callable[[Mapping[str, Any]], Any]


HEADINGS = (0.1, 0.25, 0.4, 0.55)  # rad; the data have up to 0.1
WHEELBASES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)  # m; the data's car has 1
_HEADING = ("heading_noise", "greatest deviation of the first heading, rad")
SERIES = (
    Series("starts aslant, open loop", *_HEADING, HEADINGS, open_loop, {}, free),
    Series("starts aslant, closed loop", *_HEADING, HEADINGS, episodes, CLOSED, parked),
    Series(
        "another car, closed loop",
        "wheelbase",
        "wheelbase, m",
        WHEELBASES,
        episodes,
        CLOSED,
        parked,
    ),
)
ALONE, TWICE, OURS, LITERAL = (
    "planner alone",
    "planner, levels twice",
    "MPDiffuser",
    "MPDiffuser, Algorithm 1",
)
NARROW = "MPDiffuser, dynamics model of expert drives"
METHODS: dict[str, Mapping[str, Any]] = {
    ALONE: PLANNER,
    TWICE: {"composition": "planner_resampled"},
    OURS: MATCHED,
    LITERAL: {"composition": "alternating"},
    NARROW: MATCHED,
}
ACTIONS = {"planned": "planned", "read off": "inverse_dynamics"}

Key = tuple[str, float, str, str, int]
Found = Mapping[Key, Mapping[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    found = book.measure(
        {
            (series.title, value, name, word, seed): Cell(
                _network(book.scope, name, seed),
                series.measure,
                book.scope.starts,
                {**OPTIONS, **series.options, **options, "actions": actions},
                env_kwargs={series.constant: value},
            )
            for series in SERIES
            for value in series.values
            for name, options in METHODS.items()
            for word, actions in ACTIONS.items()
            for seed in _seeds(book.scope, name)
        }
    )
    tables = [_table(book.scope, found, series, word) for series in SERIES for word in ACTIONS]
    gains = [_gains(book.scope, found, series) for series in SERIES]
    text = (
        f"{book.scope.trials} unseen start-goal pairs a cell and training seed, the same for all. "
        "Success: the car is at the goal at the end and touched no wall. Open loop: a whole plan "
        "is executed without looking; closed loop: a plan for every action, the first in 10 steps "
        "from noise, each further one in a single step from the last. The data have first headings "
        "up to 0.1 rad from the corridor's and a wheelbase of 1 m. Actions are those of the plan, "
        "or those that learned inverse dynamics read off its states. Temperature 0.1 for all; "
        f"nothing was tuned here. {NARROW}: not of random drives as well; first training seed only."
    )
    title = "CarUMaze-v0 away from its data"
    panels = [_panel(book.scope, found, series, word) for word in ACTIONS for series in SERIES]
    return Report(title, text, [*gains, *tables], _orderings(book.scope, found), curves(panels))


def _network(scope: Scope, name: str, seed: int) -> Network:
    changes = {"inverse_dynamics": True}
    if name != NARROW:
        return scope.network(ENV_ID, seed, changes=changes)
    planner = scope.network(ENV_ID, seed)
    data = (Data(EXPERT),)
    return scope.network(
        ENV_ID, seed, data=data, dynamics_data=data, planner=planner, changes=changes
    )


def _seeds(scope: Scope, name: str) -> tuple[int, ...]:
    return scope.seeds[:1] if name == NARROW else scope.seeds


def _estimate(
    scope: Scope, found: Found, series: Series, value: float, name: str, word: str
) -> Estimate:
    cells = [found[series.title, value, name, word, seed] for seed in _seeds(scope, name)]
    return share(cells, series.succeeds)


def _orderings(scope: Scope, found: Found) -> list[Ordering]:
    """MPDiffuser above its planner alone, wherever something differs from the data."""
    return [
        Ordering(
            f"{OURS} above {ALONE}, {word}, {series.title}, {value:g}",
            _estimate(scope, found, series, value, OURS, word),
            _estimate(scope, found, series, value, ALONE, word),
            UNPUBLISHED,
        )
        for series in SERIES
        for word in ACTIONS
        for value in series.values
    ]


def _table(scope: Scope, found: Found, series: Series, word: str) -> Table:
    rows = [
        [name, *(_estimate(scope, found, series, value, name, word) for value in series.values)]
        for name in METHODS
    ]
    heads = ["success %", *(f"{value:g}" for value in series.values)]
    return Table(f"{series.title}: actions {word}; columns: {series.label}", heads, rows)


def _gains(scope: Scope, found: Found, series: Series) -> Table:
    """What each method gains on the planner alone, start by start."""
    rows = []
    for word in ACTIONS:
        for name in METHODS:
            if name == ALONE:
                continue
            gains = [_gain(scope, found, series, (value, name, word)) for value in series.values]
            rows.append([f"{name}, {word}", *gains])
    heads = ["points above planner alone", *(f"{value:g}" for value in series.values)]
    text = "Mean of the differences from start to start with its 95 % t interval, all seeds."
    return Table(f"{series.title}: gain; columns: {series.label}", heads, rows, text)


def _gain(scope: Scope, found: Found, series: Series, place: tuple[float, str, str]) -> str:
    value, name, word = place
    differences = np.concatenate(
        [
            100.0 * series.succeeds(found[series.title, value, name, word, seed])
            - 100.0 * series.succeeds(found[series.title, value, ALONE, word, seed])
            for seed in _seeds(scope, name)
        ]
    )
    interval = mean_interval(differences)
    return f"{interval.mean:+.1f} ± {interval.high - interval.mean:.1f}"


def _panel(scope: Scope, found: Found, series: Series, word: str) -> Panel:
    lines = {
        name: Curve(
            series.values,
            [_estimate(scope, found, series, value, name, word) for value in series.values],
        )
        for name in METHODS
        if name != NARROW
    }
    return Panel(f"{series.title}, {word}", lines, series.label, "success %", ticks=True)
