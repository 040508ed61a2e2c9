"""What the dynamics model is worth away from the data that the planner has seen.

On starts like those of the data, a planner that learned from 2,000 drives of an expert needs no
help (Table 8 here). So the car starts more aslant than any recorded drive does, or its axles are
nearer together or further apart than the recorded car's, which nobody tells the agents. Networks
and options are those of other studies; nothing is tuned on what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mpd_gym.agents.presets import preset
from mpd_gym.evaluation.returns import mean_interval
from mpd_gym.types import Array
from studies.estimates import Estimate, share
from studies.measures import Measure, episodes, free, open_loop, parked
from studies.networks import Data, Network
from studies.peers import BC, DECISION_DIFFUSER_FILM, FILM
from studies.report import UNPUBLISHED, Curve, Ordering, Panel, Report, Table, curves
from studies.runner import Book, Cell, Scope
from studies.variants import EXPERT, MATCHED, PLANNER

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
    succeeds: Callable[[Mapping[str, Any]], Array]


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
BOTH = {"planned": "planned", "read off": "inverse_dynamics"}
"""Whose actions are executed."""


class Method(NamedTuple):
    """How plans are made.

    Attributes:
        options: Sampling options that differ from the others'.
        agent: A key of `mpd_gym.agents.AGENTS`.
        actions: Of `BOTH`.
        measures: What it is measured by.
        every_seed: Whether there is one of each training seed, not only of the first.
        changes: Fields of the preset's configuration that differ.
    """

    options: Mapping[str, Any]
    agent: str = "mpdiffuser"
    actions: Mapping[str, str | None] = BOTH
    measures: tuple[Measure, ...] = (open_loop, episodes)
    every_seed: bool = True
    changes: Mapping[str, Any] = {}


ALONE, OURS = "planner alone", "MPDiffuser"
CLEAN_ALONE, CLEAN_OURS = f"{ALONE}, x̂_0", f"{OURS}, x̂_0"
CLEAN = {"loss": replace(preset("laptop", ENV_ID).loss, prediction="x0")}
NARROW = "MPDiffuser, dynamics model of expert drives"
METHODS: dict[str, Method] = {
    ALONE: Method(PLANNER),
    "planner, levels twice": Method({"composition": "planner_resampled"}),
    OURS: Method(MATCHED),
    "MPDiffuser, Algorithm 1": Method({"composition": "alternating"}),
    NARROW: Method(MATCHED, every_seed=False),
    CLEAN_ALONE: Method(PLANNER, changes=CLEAN),
    CLEAN_OURS: Method(MATCHED, changes=CLEAN),
    "Diffuser": Method(
        {"temperature": 0.5}, "diffuser", {"planned": "planned"}, (open_loop,), every_seed=False
    ),
    "Decision Diffuser": Method(
        {"temperature": 0.01}, "decision_diffuser", {"read off": "inverse_dynamics"}, (open_loop,)
    ),
    FILM: Method(
        {"temperature": 0.01},
        DECISION_DIFFUSER_FILM.method,
        {"read off": "inverse_dynamics"},
        changes=DECISION_DIFFUSER_FILM.changes,
    ),
    BC: Method({}, "behavior_cloning", {"planned": None}, (episodes,)),
}
"""Options of the peers are those that validation chose for Table 8."""

Found = Mapping[Any, Mapping[str, Any]]


def study(book: Book) -> Report:
    """Measure every cell and report."""
    scope = book.scope
    found = book.measure(
        {
            (series.title, value, name, word, seed): Cell(
                _network(scope, name, seed),
                series.measure,
                scope.starts,
                _options(series, name, word),
                env_kwargs={series.constant: value},
            )
            for series in SERIES
            for word in BOTH
            for name in _methods(series, word)
            for value in series.values
            for seed in _seeds(scope, name)
        }
    )
    pairs = [(series, word) for word in BOTH for series in SERIES]
    tables = [_table(scope, found, *pair) for pair in pairs]
    gains = [_gains(scope, found, *pair) for pair in pairs]
    panels = [_panel(scope, found, *pair) for pair in pairs]
    text = (
        f"{scope.trials} unseen start-goal pairs a cell and training seed, the same for all. "
        "Success: the car is at the goal at the end and touched no wall. Open loop: a whole plan "
        "is executed without looking; closed loop: a plan for every action, the first in 10 steps "
        "from noise, each further one in a single step from the last. The data have first headings "
        "up to 0.1 rad from the corridor's and a wheelbase of 1 m. Actions are those of the plan, "
        "or those that learned inverse dynamics read off its states. Temperature is 0.1, which "
        "validation chose in the study car-actions; that of Diffuser (0.5) and Decision Diffuser "
        "(0.01) was chosen for Table 8. Nothing was tuned on what is measured here. "
        f"{NARROW}: not of random drives as well. x̂_0: the networks predict the clean trajectory "
        "in the place of its noise."
    )
    return Report(
        "CarUMaze-v0 away from its data",
        text,
        [*gains, *tables],
        _orderings(scope, found),
        curves(panels),
    )


def _methods(series: Series, word: str) -> list[str]:
    return [
        name
        for name, method in METHODS.items()
        if word in method.actions and series.measure in method.measures
    ]


def _options(series: Series, name: str, word: str) -> dict[str, Any]:
    method = METHODS[name]
    actions = method.actions[word]
    if actions is None:  # it plans nothing
        return {}
    return {**OPTIONS, **series.options, **method.options, "actions": actions}


def _network(scope: Scope, name: str, seed: int) -> Network:
    method = METHODS[name]
    if method.agent != "mpdiffuser":
        return scope.network(ENV_ID, seed, method.agent, changes=method.changes)
    changes = {"inverse_dynamics": True, **method.changes}
    if name != NARROW:
        return scope.network(ENV_ID, seed, changes=changes)
    data, planner = (Data(EXPERT),), scope.network(ENV_ID, seed)
    return scope.network(
        ENV_ID, seed, data=data, dynamics_data=data, planner=planner, changes=changes
    )


def _seeds(scope: Scope, name: str) -> tuple[int, ...]:
    return scope.seeds if METHODS[name].every_seed else scope.seeds[:1]


def _estimate(
    scope: Scope, found: Found, series: Series, word: str, name: str, value: float
) -> Estimate:
    cells = [found[series.title, value, name, word, seed] for seed in _seeds(scope, name)]
    return share(cells, series.succeeds)


def _orderings(scope: Scope, found: Found) -> list[Ordering]:
    """MPDiffuser above every other method that is no MPDiffuser; with x̂_0, above its planner."""
    return [
        Ordering(
            f"{ours} above {name}, {word}, {series.title}, {value:g}",
            _estimate(scope, found, series, word, ours, value),
            _estimate(scope, found, series, word, name, value),
            UNPUBLISHED,
        )
        for word in BOTH
        for series in SERIES
        for name in _methods(series, word)
        if not name.startswith(OURS)
        for ours in (CLEAN_OURS if name == CLEAN_ALONE else OURS,)
        for value in series.values
    ]


def _table(scope: Scope, found: Found, series: Series, word: str) -> Table:
    rows = [
        [name, *(_estimate(scope, found, series, word, name, value) for value in series.values)]
        for name in _methods(series, word)
    ]
    heads = ["success %", *(f"{value:g}" for value in series.values)]
    return Table(f"{series.title}, actions {word}, by {series.label}", heads, rows)


def _gains(scope: Scope, found: Found, series: Series, word: str) -> Table:
    """What each method gains on the planner alone, start by start."""
    rows = [
        [name, *(_gain(scope, found, series, word, name, value) for value in series.values)]
        for name in _methods(series, word)
        if name != ALONE
    ]
    heads = ["points", *(f"{value:g}" for value in series.values)]
    text = "Mean difference of success from start to start, with its 95 % t interval."
    title = f"Above the planner alone: {series.title}, actions {word}, by {series.label}"
    return Table(title, heads, rows, text)


def _gain(scope: Scope, found: Found, series: Series, word: str, name: str, value: float) -> str:
    differences = [
        100.0 * series.succeeds(found[series.title, value, name, word, seed])
        - 100.0 * series.succeeds(found[series.title, value, ALONE, word, seed])
        for seed in _seeds(scope, name)
    ]
    interval = mean_interval(np.concatenate(differences))
    return f"{interval.mean:+.1f} ± {interval.high - interval.mean:.1f}"


def _panel(scope: Scope, found: Found, series: Series, word: str) -> Panel:
    lines = {
        name: Curve(
            series.values,
            [_estimate(scope, found, series, word, name, value) for value in series.values],
        )
        for name in METHODS
        if name in _methods(series, word) and name != NARROW
    }
    return Panel(f"{series.title}, {word}", lines, series.label, "success %", ticks=True)
