"""The picture of `LQR-v0`: the phase plane or all states over time, plans, cost and action."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpd_gym.envs.drawing import Canvas, mix
from mpd_gym.envs.palette import AMBER, AXIS, BLUE, GRID, INK, PAPER
from mpd_gym.envs.plans import DrawnPlans, paint_plans
from mpd_gym.types import Array

__all__ = ["PATH_LENGTH", "Moment", "paint"]

PATH_LENGTH = 201  # states in a picture: a whole episode
HALF = 0.84  # half width of the plot; the picture spans [-1, 1]

Moment = tuple[Array, Array | None, float]  # state, action that led to it, cost so far


def paint(
    canvas: Canvas,
    path: Sequence[Moment],
    plans: DrawnPlans | None,
    weights: Array,
    farthest: Array,
    max_action: Array,
) -> None:
    """Draw the path since the start, the plans, the cost so far and the latest action.

    Args:
        canvas: To draw on.
        path: Since the start, at least one moment.
        plans: Planned states, if any.
        weights: Q of the cost xᵀQx, ``[nx, nx]``.
        farthest: Largest start in each dimension, ``[nx]``.
        max_action: Largest action in each dimension, ``[nu]``.
    """
    states = np.array([moment[0] for moment in path])
    reach = np.maximum(np.abs(states).max(0), farthest)
    reach = np.where(reach > 0, 1.15 * reach, 1.0)
    canvas.fill(PAPER)
    if states.shape[1] == 2:
        _paint_plane(canvas, states / reach, weights * np.outer(reach, reach), reach)
        if plans is not None:
            paint_plans(canvas, HALF * plans.states / reach, plans.chosen, radius=0.009)
    else:
        _paint_series(canvas, states / reach)
        if plans is not None:
            _paint_planned_series(canvas, plans.states[plans.chosen] / reach, len(states))
    canvas.text(f"cost {path[-1][2]:.3f}", (0.0, 0.94), INK, height=24)
    _paint_action(canvas, [moment[1] for moment in path], max_action)


def _paint_action(canvas: Canvas, actions: Sequence[Array | None], limit: Array) -> None:
    """Draw a bar for each dimension of the latest action, as a share of the greatest so far."""
    taken = np.array([np.zeros_like(limit), *(action for action in actions if action is not None)])
    taken = np.clip(taken, -limit, limit)
    share = taken[-1] / np.maximum(np.abs(taken).max(0), 1e-9 * limit)
    label = "actions" if len(limit) > 1 else f"action {taken[-1, 0]:+.2f}"
    canvas.text(label, (-HALF, -0.91), INK, height=20, anchor="midleft")
    middle, height = (HALF - 0.4) / 2, 0.1 / len(share)
    for index, part in enumerate(share):
        top = -0.86 - index * height
        canvas.box(-0.4, top - 0.85 * height, HALF, top, GRID)
        left, right = sorted((middle, middle + part * (HALF - middle)))
        canvas.box(left, top - 0.85 * height, right, top, AMBER)
        canvas.box(middle - 0.004, top - height, middle + 0.004, top + 0.15 * height, INK)


def _paint_plane(canvas: Canvas, points: Array, weights: Array, reach: Array) -> None:
    """Phase plane: level lines of a state's cost xᵀQx, and the path fading into the past."""
    angles = np.linspace(0.0, 2 * np.pi, 97)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    costs = (directions @ weights * directions).sum(-1)
    radii = 1.0 / np.sqrt(np.maximum(costs / max(costs.max(), 1e-300), 1e-6))
    for level in (0.25, 0.5, 0.75, 1.0):
        rounded = level * radii[:, None] * directions
        rounded[(np.abs(rounded) > 1.0 + 1e-9).any(-1)] = np.nan
        canvas.line(HALF * rounded, GRID, 2.0)
    _paint_axes(canvas)
    canvas.text(f"x1  {reach[0]:.2g}", (HALF + 0.12, 0.06), INK, height=18, anchor="bottomright")
    canvas.text(f"x2  {reach[1]:.2g}", (0.03, HALF), INK, height=18, anchor="midleft")
    count = len(points)
    for index in range(1, count):
        color = mix(GRID, BLUE, index / count)
        canvas.line(HALF * points[index - 1 : index + 1], color, 4.0)
    canvas.disc(HALF * points[0], 0.02, AXIS)
    canvas.disc(HALF * points[-1], 0.035, BLUE)


def _paint_series(canvas: Canvas, points: Array) -> None:
    """All states over time, each as a share of its greatest value and in its own colour."""
    for level in (-0.5, 0.5):
        canvas.line([(-HALF, HALF * level), (HALF, HALF * level)], GRID, 2.0)
    _paint_axes(canvas, left=-HALF)
    times = _times(0, len(points))
    size = points.shape[1]
    for index in range(size):
        color = mix(BLUE, AMBER, index / max(size - 1, 1))
        line = np.stack([times, HALF * points[:, index]], axis=-1)
        canvas.line(line, color, 3.0)
        canvas.disc(line[-1], 0.025, color)
        place = (HALF - 0.12 * (size - 1 - index), 0.8)
        canvas.text(f"x{index + 1}", place, color, height=20)


def _paint_planned_series(canvas: Canvas, points: Array, begin: int) -> None:
    """The states to come of one plan, over the times from `begin` on."""
    times = _times(begin, len(points))
    for column in points.T:
        canvas.line(np.stack([times, HALF * column], axis=-1), AMBER, 2.0)


def _times(begin: int, count: int) -> Array:
    """Where `count` moments from the one of index `begin` on lie in the plot, ``[count]``."""
    return -HALF + 2 * HALF * (begin + np.arange(count)) / (PATH_LENGTH - 1)


def _paint_axes(canvas: Canvas, left: float = 0.0) -> None:
    canvas.line([(-HALF, 0.0), (HALF, 0.0)], AXIS, 1.5)
    canvas.line([(left, -HALF), (left, HALF)], AXIS, 1.5)
