"""What is suspicious about data: statistics, and findings with episode and step.

Readers refuse what is damaged. Here is what can be read and still lies: outliers, dead sensors,
shifted rows, goals of another episode, copies, time limits marked as terminations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, final
from zlib import crc32

import gymnasium as gym
import numpy as np

from mpd_gym.datasets.alignment import SHIFTS, shifted_rows, threshold_breaks
from mpd_gym.datasets.config import WindowConfig
from mpd_gym.datasets.fitting import counts_as_constant, rounding
from mpd_gym.datasets.source import EpisodeSource
from mpd_gym.datasets.traversal import as_sources, flat_observations, goal_observations
from mpd_gym.errors import DataError, InputError
from mpd_gym.types import Array, Episode

__all__ = ["DataReport", "check_data"]

_SPREAD = 20.0  # widths of the middle 96 % that a dimension's range must have for an outlier
_FEW = 0.005  # share of rows that outliers are at most
_FEWEST = 50  # rows to judge outliers and bounds
_GAP = 4.0  # times the reach of all other episodes that that of at most a tenth is suspicious
_AT_BOUND = 0.99  # share of an action's values that is suspicious
_COPIED = 5  # steps that an episode must share with another
_STUCK = 20  # steps, and at least half of the episode, that a sensor rests to look dead
_STUCK_SHARE = 0.2  # of the episodes, at most; else it may well rest
_WIDEST = 256  # larger observations are pictures, which regressions do not explain
_READ = {"observation", "achieved_goal", "desired_goal", "remaining_budget"}


class DataReport(NamedTuple):
    """Result of `check_data`.

    Attributes:
        errors: What cannot be right, with source, episode and step.
        warnings: What may be wrong, what to do, and the first episode and step where it is.
        rows: Observations, actions, goals, rewards and costs ``[M, d]`` of every n-th episode.
        ranges: Their smallest and largest values in all episodes, ``[2, d]``.
    """

    errors: list[DataError]
    warnings: list[DataError]
    rows: Mapping[str, Array]
    ranges: Mapping[str, Array]


def check_data(
    sources: EpisodeSource | Sequence[EpisodeSource],
    windows: WindowConfig | None = None,
    *,
    held_out: float = 0.0,
    rows: int = 20_000,
) -> DataReport:
    """Look for what is suspicious, in one pass over the data.

    Args:
        sources: Episodes of one or several data sets with equal spaces.
        windows: Of the planned training; None leaves lengths unjudged.
        held_out: Share of each source that is held out for validation.
        rows: Most steps, about, that are compared: of large data those of every n-th episode.

    Returns:
        Statistics and findings; episodes that cannot be read are errors.
    """
    data = _Data(as_sources(sources), rows)
    single = [source.name for source in data.sources if len(source) == 1]
    problem = "this is one episode: agents see one start, and none can be held out"
    remedy = "; record more, or set validation_fraction=0" if held_out else "; record more"
    lonely = [DataError(problem + remedy, source=name) for name in single]
    errors = [*data.damage, *(lonely if held_out else ())]
    found = [*(() if held_out else lonely), *_unused(data)]
    if data.episodes:
        for check in (_constants, _outliers, _stuck, _bounds, _goals, _copies, _time_limits,
                      _shifted, _contradictions):  # fmt: skip
            found += check(data)
        found += [] if windows is None else _short(data, windows)
    return DataReport(errors, found, data.rows, data.ranges)


@final
@dataclass(frozen=True)
class _Seen:
    """What is remembered of every episode."""

    source: EpisodeSource
    index: int
    length: int
    terminated: bool
    ranges: Mapping[str, Array]  # [2, d]
    goals: Array | None  # the first and the last
    goal_change: int  # first step with another goal than before; 0 for none
    resting: Array  # rows at the end in which each observation does not change, [nx]
    copied: tuple[int, int, int] | None  # step, position and step of the original

    def finding(self, problem: str, step: int | None = None) -> DataError:
        return DataError(problem, source=self.source.name, episode=self.index, step=step)


@final
class _Data:
    """Gathers, in one pass, what the checks need."""

    def __init__(self, sources: tuple[EpisodeSource, ...], rows: int) -> None:
        self.sources = tuple(dict.fromkeys(sources))
        self.every = max(1, sum(int(source.lengths.sum()) for source in sources) // rows)
        self.episodes: list[_Seen] = []
        self.kept: dict[int, dict[str, Array]] = {}  # by position
        self.damage: list[DataError] = []
        self._rows: dict[int, tuple[int, int]] = {}  # check sum -> position and step
        for source in sources:
            for index in range(len(source)):
                try:
                    self._add(source, index, source.episode(index))
                except DataError as error:
                    self.damage.append(error)
                except InputError as error:
                    self.damage.append(DataError(str(error), source=source.name, episode=index))

    def _add(self, source: EpisodeSource, index: int, episode: Episode) -> None:
        rows, position = _columns(episode), len(self.episodes)
        x, goals = rows["observation"], rows.get("goal", np.zeros((1, 0)))
        moved, change = (x != x[-1])[::-1], (goals[1:] != goals[:-1]).any(axis=1)
        seen = _Seen(
            source, index, len(episode), bool(episode.terminations[-1]),
            {name: np.stack([part.min(0), part.max(0)]) for name, part in rows.items()},
            goals[[0, -1]] if goals.size else None,
            int(change.argmax()) + 1 if change.any() else 0,
            np.where(moved.any(axis=0), moved.argmax(axis=0), len(x)),
            self._copied(position, np.hstack([x[:-1], rows["action"], x[1:]])),
        )  # fmt: skip
        self.episodes.append(seen)
        if position % self.every == 0:
            self.kept[position] = rows

    def _copied(self, position: int, steps: Array) -> tuple[int, int, int] | None:
        """Where the first step stood before, if most steps, or of large data the whole, did."""
        sums = {crc32(row.tobytes()): step for step, row in enumerate(steps)}
        if len(sums) < _COPIED:
            return None
        seen = {key: step for key, step in sums.items() if key % self.every == 0}
        known = [key for key in seen if key in self._rows]
        whole = crc32(steps.tobytes())
        if len(known) >= max(_COPIED, len(seen) / 2):
            whole = known[0]
        seen.setdefault(whole, 0)
        copied = (seen[whole], *self._rows[whole]) if whole in self._rows else None
        for key, step in seen.items():
            self._rows.setdefault(key, (position, step))
        return copied

    @cached_property
    def rows(self) -> dict[str, Array]:
        kept = list(self.kept.values())
        names = [name for name in (kept[0] if kept else {}) if name != "distance"]
        return {name: np.concatenate([part[name] for part in kept]) for name in names}

    @cached_property
    def ranges(self) -> dict[str, Array]:
        bounds = {name: np.stack([e.ranges[name] for e in self.episodes]) for name in self.rows}
        return {name: np.stack([b[:, 0].min(0), b[:, 1].max(0)]) for name, b in bounds.items()}

    def finding(self, problem: str) -> DataError:
        return DataError(problem, source=self.sources[0].name)


def _columns(episode: Episode) -> dict[str, Array]:
    """Columns of an episode as float64; the distance from achieved to desired goal, if any."""
    whole, goals = episode.observations, goal_observations(episode.observations)
    found = {"observation": flat_observations(whole), "action": episode.actions}
    if goals is not None and isinstance(whole, Mapping):
        found["goal"], reached = goals, whole.get("achieved_goal")
        if reached is not None and reached.size == goals.size:
            gap = np.subtract(reached.reshape(goals.shape), goals, dtype=np.float64)
            found["distance"] = np.linalg.norm(gap, axis=1, keepdims=True)
    found["reward"] = episode.rewards[:, None]
    if episode.costs is not None:
        found["cost"] = episode.costs[:, None]
    return {name: np.asarray(rows, dtype=np.float64) for name, rows in found.items()}


def _unused(data: _Data) -> Iterator[DataError]:
    """Parts of Dict observations that agents do not read."""
    space = data.sources[0].observation_space
    unused = sorted(set(space.spaces) - _READ) if isinstance(space, gym.spaces.Dict) else []
    if unused:
        yield data.finding(
            f"agents do not read {unused} of the observations; put what they need into "
            "'observation', pictures as latents (mpd_gym.latent.encode_episodes)"
        )


def _constants(data: _Data) -> Iterator[DataError]:
    """Dimensions that hardly vary; one goal for all episodes is nothing strange."""
    for name in ("observation", "action"):
        low, high = data.ranges[name]
        still = counts_as_constant(low, high, rounding(data.rows[name]))
        hardly = counts_as_constant(low, high, np.asarray(np.finfo(np.float32).eps)) & ~still
        for found, told in (
            (still, "agents ignore it, whatever it is when they act: is a sensor dead?"),
            (hardly, "normalizers stretch what may be noise of a dead sensor: round it"),
        ):
            where = np.flatnonzero(found)
            shown = ", ".join(f"{j} ({low[j]:g}, range {high[j] - low[j]:.1g})" for j in where[:5])
            more = f" and {len(where) - 5} more" if len(where) > 5 else ""
            if len(where):
                yield data.finding(f"{name}s hardly vary in dimension {shown}{more}; {told}")


def _outliers(data: _Data) -> Iterator[DataError]:
    """Few values that are far from all others; rewards at an episode's end may be."""
    for name, rows in data.rows.items():
        ordered, (lowest, highest) = np.sort(rows, axis=0), data.ranges[name]
        low, high = ordered[len(rows) // 50], ordered[49 * (len(rows) - 1) // 50]
        width, centre = high - low, (low + high) / 2
        count = (np.abs(rows - centre) > _SPREAD / 4 * width).sum(axis=0)
        far = highest - lowest > _SPREAD * np.maximum(width, 1e-12 * np.abs(highest))
        few = (count <= np.where(width > 0, _FEW * len(rows), 1)) & (len(rows) >= _FEWEST)
        bounds = np.stack([episode.ranges[name] for episode in data.episodes])
        reach = np.sort(np.abs(bounds - centre).max(axis=1), axis=0)[-(len(bounds) // 10 + 1) :]
        gap = reach[1:] > _GAP * np.maximum(reach[:-1], width / 2)
        for j in np.flatnonzero(far & few | gap.any(axis=0) & (width > 0)):
            above = highest[j] - centre[j] > centre[j] - lowest[j]
            value = float(highest[j] if above else lowest[j])
            where = next(e for e in data.episodes if e.ranges[name][int(above), j] == value)
            column = _columns(where.source.episode(where.index))[name][:, j]
            step = int((column == value).argmax())
            if name in ("reward", "cost") and (step == where.length - 1 or not width[j]):
                continue
            yield where.finding(
                f"{name} {j} is {value:g} here, 96 % of its values lie in [{low[j]:g}, "
                f"{high[j]:g}], which 'minmax' and 'gaussian' then hardly tell apart; correct it, "
                "leave the episode out (select), or set normalizer to 'cdf'",
                step,
            )


def _stuck(data: _Data) -> Iterator[DataError]:
    """Sensors that rest to the end of few episodes while most others move."""
    judged = [episode for episode in data.episodes if episode.length >= 2 * _STUCK]
    still = np.array([e.resting >= max(_STUCK, e.length / 2) for e in judged])
    if not still.any():
        return
    still &= still.mean(axis=1, keepdims=True) < 0.5  # or the whole system rests
    share = still.mean(axis=0)
    for j in np.flatnonzero((share > 0) & (share <= _STUCK_SHARE)):
        first = judged[int(still[:, j].argmax())]
        yield first.finding(
            f"observation {j} stays the same from here to the end, so in {still[:, j].sum()} of "
            f"{len(judged)} episodes: is a sensor dead? Leave them out (select)",
            first.length + 1 - int(first.resting[j]),
        )


def _bounds(data: _Data) -> Iterator[DataError]:
    """Actions that are nearly always at a bound, as after a clip in other units."""
    space: Any = data.sources[0].action_space
    rows = data.rows["action"]
    share = (np.isclose(rows, space.low) | np.isclose(rows, space.high)).mean(axis=0)
    vary = np.ptp(data.ranges["action"], axis=0) > 0
    for j in np.flatnonzero((share >= _AT_BOUND) & vary & (len(rows) >= _FEWEST)):
        yield data.finding(
            f"action {j} is at a bound of [{space.low[j]:g}, {space.high[j]:g}] in {share[j]:.0%} "
            "of the steps; were actions of another unit clipped?"
        )


def _goals(data: _Data) -> Iterator[DataError]:
    """Goals of the episode before, and goals that change."""
    having = [(e, e.goals) for e in data.episodes if e.goals is not None]
    fresh = len({goals[0].tobytes() for _, goals in having}) > max(4, 0.8 * len(having))
    old = [
        e.goal_change == 1 or fresh if np.array_equal(goals[0], before[1]) else False
        for (_, before), (e, goals) in pairwise(having)
    ]
    changing = [e.goal_change > 0 for e, _ in having]
    changing[1:] = [moves and not stale for moves, stale in zip(changing[1:], old, strict=True)]
    if any(old):
        yield having[old.index(True) + 1][0].finding(
            f"desired_goal is that of the episode before, so in {sum(old)} of {len(having)} "
            "episodes; was it read before the reset?",
            0,
        )
    if any(changing):
        first = having[changing.index(True)][0]
        yield first.finding(
            f"desired_goal changes here, and in {sum(changing)} of {len(having)} episodes; "
            "windows learn the goal of their first step: cut episodes where it changes",
            first.goal_change,
        )


def _copies(data: _Data) -> Iterator[DataError]:
    """Episodes of which most steps stand in an earlier one."""
    copies = [(e, e.copied) for e in data.episodes if e.copied]
    for episode, (step, position, there) in copies[:1]:
        first = data.episodes[position]
        yield episode.finding(
            f"from here on it repeats {first.source.name}, episode {first.index}, step {there}; "
            f"{len(copies)} of {len(data.episodes)} episodes repeat others, count twice, and may "
            "be both learned and held out: leave them out",
            step,
        )


def _time_limits(data: _Data) -> Iterator[DataError]:
    """Terminations that all come at the largest length."""
    for source in data.sources:
        ended = [e for e in data.episodes if e.source is source and e.terminated]
        longest, limit = int(source.lengths.max()), source.metadata.get("max_episode_steps")
        alike = longest > 1 and len(ended) > 2 and {e.length for e in ended} == {longest}
        if alike and limit in (None, longest):
            yield ended[0].finding(
                f"all {len(ended)} terminated episodes have {longest} steps: if this is a time "
                "limit, mark it as truncation, or plans learn that all ends there",
                longest - 1,
            )


def _short(data: _Data, windows: WindowConfig) -> Iterator[DataError]:
    """Episodes without windows, and windows that are mostly padding."""
    horizon = windows.horizon
    for source in data.sources:
        episodes = [e for e in data.episodes if e.source is source]
        counts = [windows.windows_in(e.length, e.terminated) for e in episodes]
        begun = zip(episodes, counts, strict=True)
        padding = [max(0, t + horizon - e.length) for e, count in begun for t in range(count)]
        share = sum(padding) / max(1, len(padding) * horizon)
        lost = counts.count(0) / max(1, len(counts))
        if max(lost, share) > 0.5:
            mean = np.mean([e.length for e in episodes])
            yield DataError(
                f"{lost:.0%} of the episodes give no window, and {share:.0%} of what plans of "
                f"{horizon} steps learn is padding ({windows.padding!r}): episodes have "
                f"{mean:.3g} steps on average; shorten horizon",
                source=source.name,
            )


def _shifted(data: _Data) -> Iterator[DataError]:
    """Actions and rewards that the states around another step explain."""
    kept = {e: rows for e, rows in data.kept.items() if len(rows["action"]) > 2}
    if not kept or data.rows["observation"].shape[1] > _WIDEST:
        return
    around = [np.hstack([r["observation"][:-1], r["observation"][1:]]) for r in kept.values()]
    for name, others in (("action", ()), ("reward", ("action", "goal", "distance"))):
        contexts = [
            np.hstack([x, *(rows[other][-len(x) :] for other in others if other in rows)])
            for x, rows in zip(around, kept.values(), strict=True)
        ]
        found = shifted_rows(contexts, [rows[name] for rows in kept.values()])
        # Observations with a history, such as latents of frames, may explain all earlier rewards.
        if found is not None and (name == "action" or 2 * len(found.episodes) < len(kept)):
            yield data.episodes[list(kept)[found.episodes[0]]].finding(
                f"{name}s seem to stand one step too {SHIFTS[found.kind]}, so in "
                f"{len(found.episodes)} of {len(kept)} episodes: states around leave "
                f"{found.recorded:.0%} of them unexplained, shifted back {found.shifted:.0%}; row "
                f"t must hold the {name} between observations t and t + 1",
                0,
            )


def _contradictions(data: _Data) -> Iterator[DataError]:
    """Rewards that do not follow from the distance to the goal where nearly all do."""
    kept = {e: rows for e, rows in data.kept.items() if "distance" in rows}
    distances = [rows["distance"][1:, 0] for rows in kept.values()]
    found = threshold_breaks(distances, [rows["reward"][:, 0] for rows in kept.values()])
    if found is not None:
        kind, threshold, episode, step = found
        way = f"stand one step too {SHIFTS[kind]}" if kind else "contradict the goal here"
        yield data.episodes[list(kept)[episode]].finding(
            f"rewards {way}: elsewhere they follow from a distance of achieved_goal to "
            f"desired_goal up to {threshold:.3g}; are they shifted, or is it another goal?",
            step,
        )
