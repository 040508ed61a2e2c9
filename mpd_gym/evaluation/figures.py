"""Tables for the terminal, plots, and GIFs of rollouts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from rich.table import Table

from mpd_gym.atomic import atomic_path, user_path
from mpd_gym.boundary import check_answer, check_spaces, stepped
from mpd_gym.datasets import DataReport, EpisodeSource, load_episodes
from mpd_gym.envs.checks import make_env
from mpd_gym.envs.drawing import Canvas
from mpd_gym.envs.palette import INK, PAPER
from mpd_gym.errors import InputError
from mpd_gym.evaluation.open_loop import OpenLoopErrors
from mpd_gym.evaluation.returns import Evaluation, Interval, mean_interval
from mpd_gym.evaluation.style import BAND, DPI, WIDTH, legend_below, looks, styled
from mpd_gym.types import Array, Episode, Policy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpd_gym.agents.trained import TrainedAgent

__all__ = [
    "agent_table",
    "captioned",
    "dataset_table",
    "dimension_table",
    "dimensions_figure",
    "draws_plan",
    "evaluation_table",
    "halved",
    "open_loop_table",
    "rollout_frames",
    "save_figure",
    "save_gif",
    "side_by_side",
    "state_error_figure",
]

Draw = Callable[[gym.Env[Any, Any], Any], None]

UNKNOWN = "–"
FRAMES_PER_SECOND = 20
SHARES = {"success", "success ever", "violation", "collision"}


def evaluation_table(title: str, evaluations: Mapping[str, Evaluation]) -> Table:
    """One row for each policy: measures with 95 % intervals, and milliseconds per action.

    Args:
        title: Heading, for example the environment's id.
        evaluations: Evaluations by policy name.
    """
    summaries = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    found = dict.fromkeys(key for summary in summaries.values() for key in summary)
    measures = [key for key in found if key != "length"]
    counts = {len(evaluation.returns) for evaluation in evaluations.values()}
    episodes = " or ".join(str(count) for count in sorted(counts))
    caption = f"{episodes} episodes each: mean with its 95 % interval; in brackets, 99th percentile"
    table = _policy_table(title, caption, [*measures, "ms/action (p99)"])
    for name, evaluation in evaluations.items():
        cells = [_cell(measure, summaries[name].get(measure)) for measure in measures]
        taken = 1e3 * evaluation.seconds  # with action chunks few calls plan: no median
        mean, p99 = float(np.mean(taken)), float(np.percentile(taken, 99))
        table.add_row(name, *cells, f"{_three_digits(mean)} ({_three_digits(p99)})")
    return table


def _policy_table(title: str, caption: str, measures: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("policy", overflow="fold")
    for measure in measures:
        table.add_column(measure, justify="right")
    return table


def _cell(measure: str, interval: Interval | None) -> str:
    """``12.3 ± 0.4``, or ``93 % [85, 97]`` for shares."""
    if interval is None:
        return UNKNOWN
    if measure in SHARES:
        return f"{interval.mean:.0%} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
    half = interval.high - interval.mean
    if not 0 < half < math.inf:
        return f"{interval.mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))  # two digits of the uncertainty
    return f"{interval.mean:.{digits}f} ± {half:.{digits}f}"


def _three_digits(number: float) -> str:
    """``0.12``, ``1.23``, ``12.3``, ``1234``."""
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def open_loop_table(title: str, found: Mapping[str, OpenLoopErrors]) -> Table:
    """One row for each agent: errors of its plans after some steps, and how long they hold.

    Args:
        title: Heading.
        found: Result of `mpd_gym.evaluation.open_loop.open_loop_error`.
    """
    plans = len(next(iter(found.values())).seeds)
    caption = (
        f"{plans} plans each, executed open loop: root mean square error of the states in units of "
        "their standard deviation, mean with its 95 % interval. Good for: number of steps in which "
        "95 % of the plans are off by at most 0.1"
    )
    horizon = max(errors.gaps.shape[1] for errors in found.values())
    steps = sorted({1, max(1, horizon // 4), max(1, horizon // 2), horizon})
    table = _policy_table(title, caption, [*(f"step {step}" for step in steps), "good for"])
    for label, errors in found.items():
        relative = errors.relative
        known = [relative[:, step - 1 : step] for step in steps]  # empty beyond a plan's end
        known = [values[np.isfinite(values)] for values in known]
        cells = [_cell("error", mean_interval(one) if len(one) else None) for one in known]
        table.add_row(label, *cells, f"{errors.good_for()} of {relative.shape[1]}")
    return table


def dataset_table(names: Sequence[str]) -> Table:
    """One row for each data set: episodes, steps, returns, lengths; costs and success if known.

    Args:
        names: Minari ids or files; each is read once and checked.
    """
    table = Table(title="data sets", caption="mean ± standard deviation over episodes")
    columns = ("data set", "episodes", "steps", "return", "length", "cost", "violating", "success",
               "success ever")  # fmt: skip
    rows = [_dataset_row(load_episodes(name)) for name in names]
    told = [i for i in range(len(columns)) if any(row[i] != UNKNOWN for row in rows)]
    for i in told:
        kind: Any = {"justify": "right"} if i else {"min_width": 16}
        table.add_column(columns[i], overflow="fold", **kind)  # never cuts numbers
    for row in rows:
        table.add_row(*(row[i] for i in told))
    return table


def _dataset_row(source: EpisodeSource) -> list[str]:
    episodes = [_episode_row(source.episode(index)) for index in range(len(source))]
    returns, costs, *successes = zip(*episodes, strict=True)
    known = None not in costs
    return [
        source.name,
        str(len(source)),
        str(int(source.lengths.sum())),
        _spread(returns),
        _spread(source.lengths),
        _spread(costs) if known else UNKNOWN,
        f"{np.mean([cost > 0 for cost in costs]):.1%}" if known else UNKNOWN,
        *(UNKNOWN if None in flags else f"{np.mean(flags):.1%}" for flags in successes),
    ]


def _episode_row(episode: Episode) -> tuple[float, float | None, bool | None, bool | None]:
    return (
        float(episode.rewards.sum()),
        None if episode.costs is None else float(episode.costs.sum()),
        None if episode.successes is None else bool(episode.successes[-1]),
        None if episode.successes is None else bool(episode.successes.any()),
    )


def _spread(values: Any) -> str:
    return f"{_plain(np.mean(values), 4)} ± {_plain(np.std(values), 3)}"


def _plain(number: float, digits: int) -> str:
    """Format with at least `digits` digits and no exponent: ``12345``, ``1.234``."""
    whole = len(str(int(abs(number))))
    return np.format_float_positional(
        number, precision=max(digits, whole), unique=False, fractional=False, trim="-"
    )


_QUANTILES = (0.01, 0.5, 0.99)


def dimension_table(title: str, report: DataReport) -> Table:
    """One row for each dimension of the data: range, quantiles, standard deviation.

    Args:
        title: Heading.
        report: Result of `mpd_gym.datasets.check_data`.
    """
    table = Table(title=title)
    for column in ("", "min", "1 %", "median", "99 %", "max", "std"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, rows in report.rows.items():
        (low, high), middle = report.ranges[name], np.quantile(rows, _QUANTILES, axis=0)
        for j, values in enumerate(np.vstack([low, middle, high, rows.std(axis=0)]).T):
            table.add_row(f"{name} {j}", *(f"{value:.4g}" for value in values))
    return table


@styled()
def dimensions_figure(report: DataReport) -> Figure:
    """Where the values of each dimension lie in its range: outliers leave no room for the rest.

    Args:
        report: Result of `mpd_gym.datasets.check_data`.
    """
    from matplotlib.figure import Figure

    names = [f"{name} {j}" for name, rows in report.rows.items() for j in range(rows.shape[1])]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.18 * len(names)), layout="constrained")
    axes, place = figure.subplots(), 0
    for name, rows in report.rows.items():
        low, high = report.ranges[name]
        shares = (rows - low) / np.where(high > low, high - low, 1.0)
        for column in shares.T:
            heights = np.histogram(column, bins=100, range=(0, 1))[0] ** 0.5
            axes.fill_between(
                np.linspace(0, 1, 100), place, place - 0.8 * heights / heights.max(), step="mid"
            )
            axes.plot(np.quantile(column, _QUANTILES), [place] * 3, "|-", color="black")
            place += 1
    axes.set(yticks=range(place), yticklabels=names, xticks=[0, 1], xticklabels=["min", "max"],
             title="1 %, median, 99 %, and square roots of counts")  # fmt: skip
    axes.invert_yaxis()
    return figure


def agent_table(path: str, agent: TrainedAgent[Any]) -> Table:
    """Describe the content of an agent's file.

    Args:
        path: The file, for the title.
        agent: The agent.
    """
    table = Table(title=path, show_header=False)
    table.add_row("method", agent.name)
    table.add_row("observations", str(agent.observation_space))
    table.add_row("actions", str(agent.action_space))
    table.add_row("plans", f"{agent.horizon} steps, {agent.num_levels} diffusion levels")
    for role, model in agent.models.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        told = [f"{count:,} parameters"]
        told += [f"{key} {_shown(entry)}" for key, entry in agent.history.get(role, {}).items()]
        table.add_row(f"{role} model", ", ".join(told).replace("_", " "))
    for name in agent.history.keys() - agent.models.keys():
        table.add_row(f"history: {name}", str(agent.history[name]))
    config = asdict(replace(agent.config, sampling=agent.options))
    config["conditions"] = ", ".join(
        f"{spec.name} ({spec.horizon})" if spec.horizon else spec.name
        for spec in agent.config.conditions
    )
    for name, value in config.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, entry in parts:
            table.add_row(f"{name}.{part}" if part else name, str(entry))
    return table


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rollout_frames(
    policy: Policy,
    env_id: str,
    *,
    seed: int,
    env_kwargs: Mapping[str, Any] | None = None,
    draw: Draw | None = None,
    deterministic: bool = True,
    max_frames: int = 1000,
) -> Iterator[Array]:
    """Play one episode and yield its pictures, uint8 ``[height, width, 3]``.

    Args:
        policy: Anything with Stable-Baselines3's `predict`.
        env_id: Registered id.
        seed: Seed of the reset.
        env_kwargs: Keyword arguments of the environment.
        draw: Called with the environment and the policy's state before each picture, for example
            `draws_plan(policy)`.
        deterministic: Passed to `predict`.
        max_frames: Most pictures.
    """
    env = make_env(env_id, {**(env_kwargs or {}), "render_mode": "rgb_array"})
    try:
        check_spaces(policy, env)
        observation, _ = env.reset(seed=seed)
        state, start, done = None, True, False
        for _ in range(max_frames):
            answer = policy.predict(observation, state, np.array([start]), deterministic)
            action, state = check_answer(answer, policy, env)
            if draw is not None:
                draw(env, state)
            yield np.asarray(env.render())
            if done:
                return
            observation, _, terminated, truncated, _ = stepped(env, action)
            start, done = False, terminated or truncated
    finally:
        env.close()


def draws_plan(policy: Any) -> Draw | None:
    """Return a `draw` function for `rollout_frames` that shows the executed plan.

    Args:
        policy: An agent of this package; policies without `planned` have nothing to draw.

    Returns:
        A function that passes the future states to the environment's `draw_plan`, if it has one.
        It decodes latents and passes their newest frames.
    """
    planned, encoder = getattr(policy, "planned", None), getattr(policy, "encoder", None)
    if planned is None:
        return None

    def draw(env: gym.Env[Any, Any], state: Any) -> None:
        show = getattr(env.unwrapped, "draw_plan", None)
        if show is not None:
            states = planned(state)[0][0]
            states = states[state.position[0] - 1 :]  # the first follows the action of this call
            show(states if encoder is None else encoder.decode(states)[:, -1])

    return draw


def save_gif(
    frames: Sequence[Array] | Iterator[Array],
    path: str | os.PathLike[str],
    *,
    fps: int = FRAMES_PER_SECOND,
) -> Path:
    """Write an endless GIF, whole or not at all.

    Args:
        frames: uint8 ``[height, width, 3]`` each.
        path: File to write; its folder is created if missing.
        fps: Pictures per second, at most 50 (a limit of the format).

    Raises:
        InputError: If there is no frame.
    """
    import imageio.v3 as iio

    pictures = list(frames)
    if not pictures:
        raise InputError("frames: expected at least one picture, got none")
    film = iio.imwrite("<bytes>", pictures, extension=".gif", duration=1000 / fps, loop=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(film)
    return user_path(path)


def side_by_side(columns: Sequence[Sequence[Array]], gap: int = 8) -> list[Array]:
    """Join rollouts in one film; shorter ones keep their last picture.

    Args:
        columns: Frames of each rollout, all of one size.
        gap: Width of the white gap, pixels.
    """
    length = max(len(column) for column in columns)
    white = np.full((columns[0][0].shape[0], gap, 3), 255, np.uint8)
    frames = []
    for index in range(length):
        parts: list[Array] = []
        for column in columns:
            parts += [column[min(index, len(column) - 1)], white]
        frames.append(np.concatenate(parts[:-1], axis=1))
    return frames


def captioned(frames: Sequence[Array], text: str) -> list[Array]:
    """Put a line of text above frames; of a long text it keeps the end."""
    width = frames[0].shape[1]
    fitting = width // 9
    text = text if len(text) <= fitting else f"…{text[1 - fitting :]}"
    canvas = Canvas((width, 24), centre=(0.0, 0.0), scale=1.0)
    canvas.fill(PAPER)
    canvas.text(text, (0.0, 0.0), INK, height=20)
    line = canvas.array()
    return [np.concatenate([line, frame]) for frame in frames]


def halved(frame: Array) -> Array:
    """Halve a picture by averaging 2×2 pixels, so that films stay small."""
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    wide = frame[:height, :width].astype(np.uint16)
    total = wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2]
    return np.asarray((total + 2) // 4, np.uint8)


@styled()
def state_error_figure(errors: Mapping[str, Array], unit: str = "m") -> Figure:
    """State error between plan and execution, per step (paper, Fig. 2 and 4).

    Args:
        errors: Errors ``[trials, H]`` by method name; NaN after the end of an episode.
        unit: Unit of the error.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    handles = {}
    for name, look in looks(list(errors)).items():
        values = errors[name]
        steps = np.arange(1, values.shape[1] + 1)
        count = np.isfinite(values).sum(axis=0)
        mean = np.nanmean(values, axis=0)
        half = 1.96 * np.nanstd(values, axis=0, ddof=1) / np.sqrt(count)
        (handles[name],) = axes.plot(steps, mean, **look)
        axes.fill_between(steps, mean - half, mean + half, alpha=BAND, color=look["color"])
    axes.set(xlabel="step", ylabel=f"state error, planned to executed [{unit}]", ylim=(0, None))
    legend_below(figure, handles)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, as PNG or by the path's suffix, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
    return user_path(path)
