"""What a setting costs: return against milliseconds per action, on the agents that ship.

Samplers, reverse steps, warm starts, action chunks and candidates are varied around each agent's
own options; where those plan with means of samples, around single samples, too. The reference
visits all K levels. A setting is as good if its return is not lower from
the same starts, by the 95 % interval of the differences, and if at most 2 % of the episodes more
fail, or violate; of those that are, the cheapest per action is recommended.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mpd_gym.agents.base import Agent
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.serialization import agent_path
from mpd_gym.evaluation.returns import Interval, evaluate, mean_interval, proportion_interval
from mpd_gym.evaluation.style import WIDTH, legend_below, styled
from studies.networks import Shipped
from studies.report import Report, Table
from studies.runner import Measurement, Run, Scope

__all__ = ["Setting", "played", "recommended", "settings", "study", "timed"]

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
TIMED_EPISODES = 3
COLORS = {"ddpm": "#0072B2", "ddim": "#E69F00", "dpm++": "#009E73"}
RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 12,
    "markerfacecolor": "none",
    "markeredgecolor": "black",
}

Values = Mapping[str, Any]


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
        single: Options that replace these for plans that are single samples.
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


def study(run: Run) -> Report:
    """Play and time every setting of the agents that ship; training seeds play no part.

    Times are taken one after the other, after all episodes, with one thread; nothing else should
    run beside them. A file ``agents/ENV_ID.safetensors`` in the study's folder replaces the agent
    that ships.
    """
    scope = run.scope
    agents = {env_id: _shipped(scope.folder, env_id) for env_id in ENVIRONMENTS}
    own = {env_id: agent.load(scope.folder).options for env_id, agent in agents.items()}
    places = [(env_id, one) for env_id in ENVIRONMENTS for one in _settings(env_id, own[env_id])]
    outcomes = run.measure(
        {
            (env_id, str(one)): Measurement(agents[env_id], played, scope.starts, one.options)
            for env_id, one in places
        }
    )
    starts = range(scope.starts.start, scope.starts.start + TIMED_EPISODES)
    times = run.measure(
        {
            (env_id, f"time of {one}"): Measurement(agents[env_id], timed, starts, one.options)
            for env_id, one in places
        },
        alone=True,
    )
    found: dict[str, dict[Setting, Values]] = {env_id: {} for env_id in ENVIRONMENTS}
    for env_id, one in places:
        taken = times[env_id, f"time of {one}"]
        found[env_id][one] = {**outcomes[env_id, str(one)], **taken}
    return _report(found, {env_id: _setting(options) for env_id, options in own.items()}, scope)


def _shipped(folder: Path, env_id: str) -> Shipped:
    given = folder / "agents" / f"{env_id}.safetensors"
    return Shipped(env_id, given if given.exists() else agent_path(env_id))


def _settings(env_id: str, own: SamplingConfig) -> list[Setting]:
    single = SINGLE.get(env_id, {}) if own.samples_per_candidate > 1 else {}
    return settings(own, single, CANDIDATES[env_id])


def played(agent: Agent[Any], env_id: str, starts: Sequence[int]) -> dict[str, Any]:
    """Outcome of every episode, all played at once.

    Returns:
        ``returns``, and ``successes`` and ``violations`` or None, one entry for each episode.
    """
    found = evaluate(agent, env_id, seeds=starts, num_envs=len(starts))
    return {
        "returns": [round(float(value), 6) for value in found.returns],
        "successes": None if found.successes is None else found.successes.tolist(),
        "violations": None if found.costs is None else (found.costs > 0).tolist(),
    }


def timed(agent: Agent[Any], env_id: str, starts: Sequence[int]) -> dict[str, Any]:
    """Milliseconds per action of single episodes in a row.

    Returns:
        ``milliseconds``: median over episodes of the mean over their actions; ``p99``: 99th
        percentile of all actions, of which those that plan take the time.
    """
    agent.predict(agent.observation_space.sample())  # what is made once, is made before
    found = evaluate(agent, env_id, seeds=starts)
    each = np.split(1e3 * found.seconds, np.cumsum(found.lengths)[:-1])
    return {
        "milliseconds": round(float(np.median([np.mean(part) for part in each])), 4),
        "p99": round(float(np.quantile(1e3 * found.seconds, 0.99)), 4),
    }


def recommended(cells: Mapping[Setting, Values]) -> Setting:
    """The cheapest setting that is as good as the first one, by the rule of this module.

    Args:
        cells: Outcomes and times; the reference first.
    """
    reference = next(iter(cells.values()))
    good = [one for one, cell in cells.items() if _as_good(cell, reference)]
    return min(good, key=lambda one: float(cells[one]["milliseconds"]))


def _as_good(cell: Values, reference: Values) -> bool:
    enough = [bool(_difference(cell, reference).high >= 0)]
    for name, sign in (("successes", 1), ("violations", -1)):
        if reference[name] is not None:
            gain = sign * (np.mean(cell[name]) - np.mean(reference[name]))
            enough.append(bool(gain >= -MARGIN - 1e-9))
    return all(enough)


def _difference(cell: Values, reference: Values) -> Interval:
    """Return less that of the reference, start by start."""
    return mean_interval(np.subtract(cell["returns"], reference["returns"]))


def _report(
    found: Mapping[str, Mapping[Setting, Values]], own: Mapping[str, Setting], scope: Scope
) -> Report:
    heads = (
        *("setting", "return", "difference", "success %", "violations %"),
        *("ms per action", "p99 ms", "× all levels"),
    )
    chosen, tables = [], []
    for env_id, cells in found.items():
        best, (reference, *others) = recommended(cells), cells
        for kind, one in (("all levels", reference), ("ships", own[env_id]), ("cheapest", best)):
            row = _row(one, cells)
            chosen.append([env_id, f"{kind}: {one}", row[0], row[2], row[3], row[4]])
        order = [reference, *sorted(others, key=lambda one: -float(cells[one]["milliseconds"]))]
        rows = [[str(one), *_row(one, cells)] for one in order]
        tables.append(Table(env_id, heads, rows, f"Cheapest that is as good: {best}."))
    text = (
        f"{scope.trials} episodes of each setting, the same starts for all; mean [95 % interval]. "
        "Nothing is published for these environments."
    )
    return Report(
        "Return against milliseconds per action",
        "Which sampling settings of the agents that ship are as good as all levels, and cheapest?",
        Table("", ("environment", "setting", "return", *heads[3:6]), chosen, text),
        _figure(found),
        "Return with its 95 % interval over time per action. Grey: the interval of all levels; "
        "triangles: warm-started plans; ring: the cheapest setting that is as good."
        + "".join(_cut(env_id, cells) for env_id, cells in found.items()),
        f"Arithmetic: {scope.precision}. Milliseconds: one environment, one thread, mean over the "
        f"actions of an episode, median of {TIMED_EPISODES} episodes; p99 over all their actions. "
        "The first row of each table visits all levels; differences from it are taken start by "
        "start. As good: the interval of the difference does not end below 0, and at most "
        f"{100 * MARGIN:g} % of the episodes more fail, or violate. A mean of samples has the "
        "agent's own temperature; single samples the one that suits them.",
        tables,
    )


def _row(setting: Setting, cells: Mapping[Setting, Values]) -> list[str]:
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


@styled()
def _figure(found: Mapping[str, Mapping[Setting, Values]]) -> Figure:
    """Return over milliseconds per action, one panel for each environment."""
    figure = Figure(figsize=(WIDTH, 2.7 * len(found) + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(found), 1))
    for axes, (env_id, cells) in zip(panels, found.items(), strict=True):
        _draw(axes, cells)
        axes.set(xlabel="milliseconds per action", ylabel="return", title=env_id)
    handles = {
        name: Line2D([], [], marker="o", linestyle="", color=color)
        for name, color in COLORS.items()
    }
    handles["warm start"] = Line2D([], [], marker="^", linestyle="", color="0.4")
    handles["cheapest as good"] = Line2D([], [], linestyle="", **RING)
    handles["all levels"] = Line2D([], [], linewidth=8, color="0.9")
    legend_below(figure, handles)
    return figure


def _draw(axes: Any, cells: Mapping[Setting, Values]) -> None:
    """One environment: the reference's interval as a band, the recommended setting in a ring."""
    intervals = {one: mean_interval(cell["returns"]) for one, cell in cells.items()}
    reference = next(iter(intervals.values()))
    axes.axhspan(reference.low, reference.high, color="0.9")
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
    axes.plot(cells[best]["milliseconds"], intervals[best].mean, **RING)
    axes.set(xscale="log", ylim=_view(intervals))


def _cut(env_id: str, cells: Mapping[Setting, Values]) -> str:
    """What the caption says of returns that the figure does not show."""
    intervals = {one: mean_interval(cell["returns"]) for one, cell in cells.items()}
    low, _ = _view(intervals)
    cut = min(value.mean for value in intervals.values()) < low
    return f" Returns of {env_id} below {low:.0f} are cut." if cut else ""


def _view(intervals: Mapping[Setting, Interval]) -> tuple[float, float]:
    """Range of the returns without the failures, which would flatten all others."""
    reference, means = next(iter(intervals.values())), [one.mean for one in intervals.values()]
    margin = reference.high - reference.low
    typical = float(np.median(means))
    low = max(min(means), typical - 8 * (max(means) - typical) - 4 * margin)
    return low - margin, max(means) + margin
