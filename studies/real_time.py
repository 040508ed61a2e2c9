"""What a setting costs: return against milliseconds per action, on the agents that ship.

Samplers, reverse steps, warm starts, action chunks and candidates are varied around each agent's
own options; where those plan with means of samples, around single samples, too. The reference
visits all K levels. A setting is as good if its return is not lower from
the same starts, by the 95 % interval of the differences, and if at most 2 % of the episodes more
fail, or violate; of those that are, the cheapest per action is recommended.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from matplotlib.figure import Figure

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.serialization import agent_path
from mpd_gym.errors import DataError
from mpd_gym.evaluation.returns import Interval, evaluate, mean_interval, proportion_interval
from studies.report import Report, Table
from studies.results import Results
from studies.runner import Book, Scope

__all__ = ["Setting", "clock", "play", "recommended", "settings", "study"]

ENVIRONMENTS = ("LQR-v0", "CarUMaze-v0", "ConstrainedPendulum-v0")
SAMPLERS = ("ddpm", "ddim", "dpm++")
STEPS = (3, 5, 10)
WARM_STEPS = (1, 2, 4)
CHUNKS = (4, 16)
EVERY_ACTION = (1, 8)  # chunk and candidates of a plan for every action
MARGIN = 0.02  # share of the episodes
CANDIDATES = {
    "LQR-v0": (1,),  # nothing ranks them
    "CarUMaze-v0": (1, 4),
    "ConstrainedPendulum-v0": (1, 4, 8, 16),
}
# Single samples, around which settings vary where the agent's own plans are means of samples: these
# have a higher temperature, for which only warm-started plans are meant.
SINGLE: dict[str, dict[str, Any]] = {
    "LQR-v0": {"samples_per_candidate": 1, "temperature": 0.1, "action_chunk": 8},
}
FEW, GRID = 5, 10  # steps where other options vary, and of the first plan before warm starts
FIRST_TRIAL = 0  # seed of the first episode; the training data's seeds are far from these
TIMED_EPISODES = 3
PROCESSES = 2
COLORS = {"ddpm": "tab:blue", "ddim": "tab:orange", "dpm++": "tab:green"}

Cell = Mapping[str, Any]


@final
class Setting(NamedTuple):
    """Sampling options that cost time.

    Attributes:
        sampler: Name of the sampler.
        steps: Reverse steps of a full plan; None for all K.
        warm: Reverse steps of a warm-started plan; 0 for full plans.
        chunk: Actions executed of each plan.
        candidates: N.
        samples: Samples whose mean is a candidate.
        temperature: Of the reverse process.
    """

    sampler: str
    steps: int | None
    warm: int
    chunk: int
    candidates: int
    samples: int
    temperature: float

    @property
    def options(self) -> dict[str, Any]:
        """As `with_options` takes them."""
        return {
            "sampler": self.sampler,
            "num_steps": self.steps,
            "warm_start_steps": self.warm,
            "action_chunk": self.chunk,
            "num_candidates": self.candidates,
            "samples_per_candidate": self.samples,
            "temperature": self.temperature,
        }

    def __str__(self) -> str:
        steps = "all steps" if self.steps is None else f"{self.steps} steps"
        warm = f", warm start {self.warm}" if self.warm else ""
        mean = f", mean of {self.samples}" if self.samples > 1 else ""
        return f"{self.sampler}, {steps}{warm}, chunk {self.chunk}, N = {self.candidates}{mean}"


def settings(
    own: SamplingConfig, single: Mapping[str, Any], candidates: Sequence[int]
) -> list[Setting]:
    """What is measured; the reference comes first.

    Args:
        own: The agent's options.
        single: Options in their place for plans that are single samples.
        candidates: Numbers of candidates that make sense in its environment.
    """
    base = _setting(own.updated(dict(single)))._replace(sampler="ddpm", steps=None, warm=0)
    few = base._replace(steps=FEW)
    found = [base, *(base._replace(steps=steps) for steps in STEPS)]
    found += [few._replace(sampler=name) for name in SAMPLERS]
    for first, warm in itertools.product((GRID, FEW), WARM_STEPS):
        warmed = base._replace(steps=first, warm=warm)
        found += [warmed, warmed._replace(chunk=EVERY_ACTION[0], candidates=EVERY_ACTION[1])]
        found += [_setting(own)._replace(sampler="ddpm", steps=first, warm=warm)] if single else []
    for chunk in CHUNKS:
        found += [few._replace(chunk=chunk)]
        found += [base._replace(steps=GRID, warm=WARM_STEPS[-1], chunk=chunk)]
    found += [few._replace(candidates=count) for count in candidates]
    return list(dict.fromkeys([*found, _setting(own)]))


def _setting(options: SamplingConfig) -> Setting:
    return Setting(
        options.sampler,
        options.num_steps,
        options.warm_start_steps,
        options.action_chunk,
        options.num_candidates,
        options.samples_per_candidate,
        options.temperature,
    )


def study(book: Book) -> Report:
    """Play and time every setting of the agents that ship; training seeds play no part.

    Times are taken one after the other, after all episodes, with one thread; nothing else should
    run beside them. An agent ``agents/ENV_ID.safetensors`` in the study's folder takes the place of
    the one that ships.
    """
    scope = book.scope
    if book.read_only and not all(_file(scope.folder, env).exists() for env in ENVIRONMENTS):
        raise DataError("the study has not run", source=str(scope.folder))
    return _report({env: _measured(scope, env) for env in ENVIRONMENTS}, scope)


def _file(folder: Path, env_id: str) -> Path:
    return folder / f"real-time-{env_id}.json"


class _Measured(NamedTuple):
    own: Setting  # of the agent as it ships
    cells: Mapping[Setting, Cell]  # the reference first


def _measured(scope: Scope, env_id: str) -> _Measured:
    """Outcomes and times of every setting in one environment."""
    folder, trials = scope.folder, scope.trials
    precision = {} if scope.precision == "fp32" else {"precision": scope.precision}
    given = folder / "agents" / f"{env_id}.safetensors"
    path = given if given.exists() else agent_path(env_id)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    results = Results(
        _file(folder, env_id),
        {"trials": trials, "timed_episodes": TIMED_EPISODES, "agent": digest, **precision},
    )
    own = MPDiffuserAgent.load(path, device="cpu").options
    single = SINGLE.get(env_id, {}) if own.samples_per_candidate > 1 else {}
    chosen = settings(own, single, CANDIDATES[env_id])
    options = {one: {**one.options, **precision} for one in chosen}
    played = results.fill(
        {str(one): (path, env_id, options[one], trials) for one in chosen}, play, PROCESSES
    )
    timed = results.fill(
        {f"time of {one}": (path, env_id, options[one], TIMED_EPISODES) for one in chosen},
        clock,
        processes=1,
    )
    cells = {one: {**played[str(one)], **timed[f"time of {one}"]} for one in chosen}
    return _Measured(_setting(own), cells)


def play(path: Path, env_id: str, options: dict[str, Any], trials: int) -> dict[str, Any]:
    """Outcome of every episode, all played at once.

    Args:
        path: The agent's file.
        env_id: Environment.
        options: Sampling options.
        trials: Episodes.

    Returns:
        ``returns``, and ``successes`` and ``violations`` or None, one entry for each episode.
    """
    agent = MPDiffuserAgent.load(path, device="cpu", **options)
    seeds = range(FIRST_TRIAL, FIRST_TRIAL + trials)
    played = evaluate(agent, env_id, seeds=seeds, num_envs=trials)
    return {
        "returns": [round(float(value), 6) for value in played.returns],
        "successes": None if played.successes is None else played.successes.tolist(),
        "violations": None if played.costs is None else (played.costs > 0).tolist(),
    }


def clock(path: Path, env_id: str, options: dict[str, Any], episodes: int) -> dict[str, Any]:
    """Milliseconds per action of single episodes in a row.

    Args:
        path: The agent's file.
        env_id: Environment.
        options: Sampling options.
        episodes: How many.

    Returns:
        ``milliseconds``: median over episodes of the mean over their actions; ``p99``: 99th
        percentile of all actions, of which those that plan take the time.
    """
    agent = MPDiffuserAgent.load(path, device="cpu", **options)
    agent.predict(agent.observation_space.sample())  # what is made once, is made before
    played = evaluate(agent, env_id, seeds=range(FIRST_TRIAL, FIRST_TRIAL + episodes))
    each = np.split(1e3 * played.seconds, np.cumsum(played.lengths)[:-1])
    return {
        "milliseconds": round(float(np.median([np.mean(part) for part in each])), 4),
        "p99": round(float(np.quantile(1e3 * played.seconds, 0.99)), 4),
    }


def recommended(cells: Mapping[Setting, Cell]) -> Setting:
    """The cheapest setting that is as good as the first one, by the rule of this module.

    Args:
        cells: Outcomes and times; the reference first.
    """
    reference = next(iter(cells.values()))
    good = [one for one, cell in cells.items() if _as_good(cell, reference)]
    return min(good, key=lambda one: float(cells[one]["milliseconds"]))


def _as_good(cell: Cell, reference: Cell) -> bool:
    enough = [bool(_difference(cell, reference).high >= 0)]
    for name, sign in (("successes", 1), ("violations", -1)):
        if reference[name] is not None:
            gain = sign * (np.mean(cell[name]) - np.mean(reference[name]))
            enough.append(bool(gain >= -MARGIN - 1e-9))
    return all(enough)


def _difference(cell: Cell, reference: Cell) -> Interval:
    """Return less that of the reference, start by start."""
    return mean_interval(np.subtract(cell["returns"], reference["returns"]))


def _report(found: Mapping[str, _Measured], scope: Scope) -> Report:
    text = (
        f"{scope.trials} episodes of each setting in {scope.precision}, the same starts for all; "
        "mean with its 95 % interval. Milliseconds: one environment, one thread, mean over the "
        f"actions of an episode, median of {TIMED_EPISODES} episodes; p99 over all their actions. "
        "The first row of each table visits all levels; differences from it are taken start by "
        "start. Recommended, in bold: the cheapest setting whose difference has an interval that "
        f"does not end below 0, with at most {100 * MARGIN:g} % of the episodes more that fail, or "
        "violate. In italics: the options of the agent as it ships. A mean of samples has the "
        "agent's own temperature; single samples the one that suits them."
    )
    heads = (
        *("setting", "return", "difference", "success %", "violations %"),
        *("ms per action", "p99 ms", "× all levels"),
    )
    tables = []
    for env_id, (own, cells) in found.items():
        best, (reference, *others) = recommended(cells), cells
        order = [reference, *sorted(others, key=lambda one: -float(cells[one]["milliseconds"]))]
        names = {own: f"*{own}*", best: f"**{best}**" if best != own else f"***{best}***"}
        rows = [[names.get(one, str(one)), *_row(one, cells)] for one in order]
        tables.append(Table(env_id, heads, rows, f"Recommended: **{best}**."))
    return Report("Return against milliseconds per action", text, tables, (), _figure(found))


def _row(setting: Setting, cells: Mapping[Setting, Cell]) -> list[str]:
    cell, reference = cells[setting], next(iter(cells.values()))
    shares = []
    for name in ("successes", "violations"):
        known = None if cell[name] is None else proportion_interval(cell[name])
        shares.append(
            "–"
            if known is None
            else f"{100 * known.mean:.1f} [{100 * known.low:.1f}, {100 * known.high:.1f}]"
        )
    times = [f"{cell[key]:.2f}" for key in ("milliseconds", "p99")]
    times.append(f"{reference['milliseconds'] / cell['milliseconds']:.1f}")
    returns = mean_interval(cell["returns"]), _difference(cell, reference)
    return [*map(str, returns), *shares, *times]


def _figure(found: Mapping[str, _Measured]) -> Figure:
    """Return over milliseconds per action, one panel for each environment."""
    figure = Figure(figsize=(4.2 * len(found), 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found)))
    for axes, (env_id, (_, cells)) in zip(panels, found.items(), strict=True):
        _draw(axes, cells)
        axes.set(xlabel="milliseconds per action", ylabel="return", title=env_id)
    for name, color in COLORS.items():
        panels[0].plot([], [], "o", color=color, markersize=4, label=name)
    panels[0].plot([], [], "^", color="0.4", markersize=4, label="warm start")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _draw(axes: Any, cells: Mapping[Setting, Cell]) -> None:
    """One environment: the reference's interval as a band, the recommended setting in a ring."""
    intervals = {one: mean_interval(cell["returns"]) for one, cell in cells.items()}
    reference = next(iter(intervals.values()))
    axes.axhspan(reference.low, reference.high, color="0.9", label="all levels")
    for one, value in intervals.items():
        axes.errorbar(
            cells[one]["milliseconds"],
            value.mean,
            yerr=(value.high - value.low) / 2,
            fmt="^" if one.warm else "o",
            color=COLORS[one.sampler],
            markersize=4,
            linewidth=1,
        )
    best = recommended(cells)
    place = (cells[best]["milliseconds"], intervals[best].mean)
    axes.plot(*place, "ko", markersize=12, markerfacecolor="none", label="recommended")
    margin = reference.high - reference.low
    axes.set(xscale="log", ylim=_view([value.mean for value in intervals.values()], margin))
    axes.grid(alpha=0.3)


def _view(means: Sequence[float], margin: float) -> tuple[float, float]:
    """Range of the returns without the failures, which would flatten all others."""
    typical = float(np.median(means))
    low = max(min(means), typical - 8 * (max(means) - typical) - 4 * margin)
    return low - margin, max(means) + margin
