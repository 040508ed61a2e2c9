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
from studies.figures import Curve, Panel, curves
from studies.measures import Measure, episodes, free, open_loop, parked
from studies.networks import Data, Network
from studies.peers import ALONE, BC, DECISION_DIFFUSER_FILM, FILM, LITERAL, OURS, TWICE
from studies.report import Ordering, Report, Table
from studies.runner import Measurement, Run, Scope
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


class Entrant(NamedTuple):
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


CLEAN_ALONE, CLEAN_OURS = f"{ALONE}, x̂_0", f"{OURS}, x̂_0"
CLEAN = {"loss": replace(preset("laptop", ENV_ID).loss, prediction="x0")}
NARROW = f"{OURS}, dynamics model of expert drives"
ENTRANTS: dict[str, Entrant] = {
    ALONE: Entrant(PLANNER),
    TWICE: Entrant({"composition": "planner_resampled"}),
    OURS: Entrant(MATCHED),
    LITERAL: Entrant({"composition": "alternating"}),
    NARROW: Entrant(MATCHED, every_seed=False),
    CLEAN_ALONE: Entrant(PLANNER, changes=CLEAN),
    CLEAN_OURS: Entrant(MATCHED, changes=CLEAN),
    "Diffuser": Entrant(
        {"temperature": 0.5}, "diffuser", {"planned": "planned"}, (open_loop,), every_seed=False
    ),
    "Decision Diffuser": Entrant(
        {"temperature": 0.01}, "decision_diffuser", {"read off": "inverse_dynamics"}, (open_loop,)
    ),
    FILM: Entrant(
        {"temperature": 0.01},
        DECISION_DIFFUSER_FILM.method,
        {"read off": "inverse_dynamics"},
        changes=DECISION_DIFFUSER_FILM.changes,
    ),
    BC: Entrant({}, "behavior_cloning", {"planned": None}, (episodes,)),
}
"""Options of the peers are those that validation chose for Table 8."""

PAIRS = ((OURS, ALONE), (CLEAN_OURS, CLEAN_ALONE))  # compared in words
DRAWN = (ALONE, TWICE, OURS, CLEAN_ALONE, FILM, BC)
Found = Mapping[Any, Mapping[str, Any]]


def study(run: Run) -> Report:
    """Measure everything and report."""
    scope = run.scope
    found = run.measure(
        {
            (series.title, value, name, word, seed): Measurement(
                _network(scope, name, seed),
                series.measure,
                scope.starts,
                _options(series, name, word),
                env_kwargs={series.constant: value},
            )
            for series in SERIES
            for word in BOTH
            for name in _entrants(series, word)
            for value in series.values
            for seed in _seeds(scope, name)
        }
    )
    pairs = [(series, word) for word in BOTH for series in SERIES]
    return Report(
        "CarUMaze-v0 away from its data",
        "What is the dynamics model worth where starts, or the car, are not those of the data?",
        _main_table(scope, found),
        curves([_panel(scope, found, series) for series in SERIES]),
        "Success with its 95 % interval, actions read off planned states (behaviour cloning: its "
        "own). MPDiffuser is above its planner where noise is predicted, and x̂_0 (dashed) makes "
        "up for most of it.",
        "Unseen start-goal pairs, the same for all. Success: the car is at the goal at the end and "
        "touched no wall. Open loop: a whole plan is executed without looking; closed loop: a plan "
        "for every action, the first in 10 steps from noise, each further one in a single step "
        "from the last. The data have first headings up to 0.1 rad from the corridor's and a "
        "wheelbase of 1 m. Actions are those of the plan, or those that learned inverse dynamics "
        "read off its states. Temperature is 0.1, which validation chose in the study car-actions; "
        "that of Diffuser (0.5) and Decision Diffuser (0.01) was chosen for Table 8. Nothing was "
        f"tuned on what is measured here. {NARROW}: not of random drives as well. x̂_0: the "
        "networks predict the clean trajectory, not its noise.",
        [
            *(_gains(scope, found, *pair) for pair in pairs),
            *(_table(scope, found, *pair) for pair in pairs),
        ],
        _orderings(scope, found),
    )


def _main_table(scope: Scope, found: Found) -> Table:
    """The hardest of each kind, where most methods can be compared."""
    places = ((SERIES[0], 0.4), (SERIES[1], 0.55), (SERIES[2], 0.85), (SERIES[2], 1.15))
    rows = []
    for name in DRAWN:
        word = _shown(name)
        cells = [
            _estimate(scope, found, series, word, name, value).short
            if name in _entrants(series, word)
            else "–"
            for series, value in places
        ]
        rows.append([name, *cells])
    heads = ("success %", *(f"{series.title}, {value:g}" for series, value in places))
    text = (
        f"Actions read off planned states; rad, and m of wheelbase. {scope.told}. Nothing is "
        "published."
    )
    return Table("", heads, rows, text)


def _entrants(series: Series, word: str) -> list[str]:
    return [
        name
        for name, entrant in ENTRANTS.items()
        if word in entrant.actions and series.measure in entrant.measures
    ]


def _options(series: Series, name: str, word: str) -> dict[str, Any]:
    entrant = ENTRANTS[name]
    actions = entrant.actions[word]
    if actions is None:  # it plans nothing
        return {}
    return {**OPTIONS, **series.options, **entrant.options, "actions": actions}


def _network(scope: Scope, name: str, seed: int) -> Network:
    entrant = ENTRANTS[name]
    if entrant.agent != "mpdiffuser":
        return scope.network(ENV_ID, seed, entrant.agent, changes=entrant.changes)
    changes = {"inverse_dynamics": True, **entrant.changes}
    if name != NARROW:
        return scope.network(ENV_ID, seed, changes=changes)
    data, planner = (Data(EXPERT),), scope.network(ENV_ID, seed)
    return scope.network(
        ENV_ID, seed, data=data, dynamics_data=data, planner=planner, changes=changes
    )


def _seeds(scope: Scope, name: str) -> tuple[int, ...]:
    return scope.seeds if ENTRANTS[name].every_seed else scope.seeds[:1]


def _estimate(
    scope: Scope, found: Found, series: Series, word: str, name: str, value: float
) -> Estimate:
    cells = [found[series.title, value, name, word, seed] for seed in _seeds(scope, name)]
    return share(cells, series.succeeds)


def _orderings(scope: Scope, found: Found) -> list[Ordering]:
    """MPDiffuser above its planner, with noise and with x̂_0 predicted, actions read off."""
    word = "read off"
    return [
        Ordering(
            f"{ours} above {theirs}",
            _estimate(scope, found, series, word, ours, value),
            _estimate(scope, found, series, word, theirs, value),
            place=f"{series.title}, {value:g}",
        )
        for ours, theirs in PAIRS
        for series in SERIES
        for value in series.values
    ]


def _table(scope: Scope, found: Found, series: Series, word: str) -> Table:
    rows = [
        [name, *(_estimate(scope, found, series, word, name, value) for value in series.values)]
        for name in _entrants(series, word)
    ]
    heads = ["success %", *(f"{value:g}" for value in series.values)]
    return Table(f"{series.title}, actions {word}, by {series.label}", heads, rows)


def _gains(scope: Scope, found: Found, series: Series, word: str) -> Table:
    """What each method gains on the planner alone, start by start."""
    rows = [
        [name, *(_gain(scope, found, series, word, name, value) for value in series.values)]
        for name in _entrants(series, word)
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


def _panel(scope: Scope, found: Found, series: Series) -> Panel:
    lines = {
        name: Curve(
            series.values,
            [_estimate(scope, found, series, _shown(name), name, value) for value in series.values],
        )
        for name in DRAWN
        if name in _entrants(series, _shown(name))
    }
    return Panel(series.title, lines, series.label, "success %", ticks=True)


def _shown(name: str) -> str:
    """Which of a method's actions the figure shows."""
    return "read off" if "read off" in ENTRANTS[name].actions else "planned"
