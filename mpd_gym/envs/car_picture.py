"""The picture of `CarUMaze-v0`: maze, goal, driven trail, plans and the car."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mpd_gym.envs.car_model import CarUMazeParameters
from mpd_gym.envs.drawing import Canvas, Color, mix
from mpd_gym.envs.palette import AXIS, BLUE, GREEN, GRID, INK, PAPER, RED, SLATE
from mpd_gym.envs.plans import DrawnPlans, paint_plans
from mpd_gym.types import Array

__all__ = ["Scene", "paint", "view"]

Polygon = list[tuple[float, float]] | Array

_WIDTH = 768  # of the picture, pixels
_MARGIN = 0.5  # of wall shown around the corridors, m

_WALL: Color = (214, 220, 229)
_GLASS: Color = (219, 234, 254)
_LAMP: Color = (253, 230, 138)


@dataclass
class Scene:
    """Contents of the picture.

    Attributes:
        state: x, y, heading, speed, steering angle, ``[5]``.
        goal: ``[2]``.
        trail: Positions since the start of the episode, the start first.
        time: Time since the start of the episode, s.
        collision: Whether the car touches a wall.
        plans: Planned positions, if any.
    """

    state: Sequence[float]
    goal: Sequence[float]
    trail: list[Sequence[float]] = field(default_factory=list)
    time: float = 0.0
    collision: bool = False
    plans: DrawnPlans | None = None


def view(parameters: CarUMazeParameters) -> tuple[tuple[int, int], tuple[float, float], float]:
    """Return size (pixels, multiples of 16), centre (m) and scale (pixels/m) of the picture."""
    left, bottom, right, top = parameters.outer
    scale = _WIDTH / (right - left + 2 * _MARGIN)
    height = 16 * round((top - bottom + 2 * _MARGIN) * scale / 16)
    return (_WIDTH, height), ((left + right) / 2, (bottom + top) / 2), scale


def paint(canvas: Canvas, scene: Scene, parameters: CarUMazeParameters) -> None:
    """Draw the whole picture."""
    _paint_maze(canvas, parameters)
    _paint_goal(canvas, scene, parameters)
    if scene.plans is not None:
        paint_plans(canvas, scene.plans.states, scene.plans.chosen, radius=0.055)
    _paint_trail(canvas, scene)
    _paint_car(canvas, scene, parameters)
    _paint_text(canvas, scene, parameters)


def _paint_maze(canvas: Canvas, parameters: CarUMazeParameters) -> None:
    canvas.fill(_WALL)
    canvas.box(*parameters.outer, PAPER)
    canvas.box(*parameters.inner, _WALL)
    (left, bottom, right, top), (_, low, end, high) = parameters.outer, parameters.inner
    outline = [(left, high), (left, top), (right, top), (right, bottom), (left, bottom)]
    outline += [(left, low), (end, low), (end, high), (left, high)]
    canvas.line(outline, AXIS, 2.5)
    half, arm = parameters.separation / 2, parameters.arm_length
    for start, stop in (
        ((0, half), (arm, half)),
        ((arm, half), (arm, -half)),
        ((arm, -half), (0, -half)),
    ):
        _dashes(canvas, np.array(start, float), np.array(stop, float))


def _dashes(canvas: Canvas, start: Array, stop: Array) -> None:
    """Draw a dashed line with dashes of about 0.3 m."""
    count = 2 * max(1, round(float(np.linalg.norm(stop - start)) / 0.6)) + 1
    points = start + np.linspace(0, 1, count + 1)[:, None] * (stop - start)
    for index in range(0, count, 2):
        canvas.line(points[index : index + 2], GRID, 3)


def _paint_goal(canvas: Canvas, scene: Scene, parameters: CarUMazeParameters) -> None:
    radius = parameters.success_radius
    canvas.disc(scene.goal, radius, mix(PAPER, GREEN, 0.14))
    canvas.ring(scene.goal, radius, mix(PAPER, GREEN, 0.75), 2.0)
    canvas.disc(scene.goal, 0.12, GREEN)
    if scene.trail:
        canvas.ring(scene.trail[0], 0.22, mix(PAPER, INK, 0.55), 2.5)


def _paint_trail(canvas: Canvas, scene: Scene) -> None:
    """Draw the driven path; older parts are paler."""
    count = len(scene.trail) - 1
    for index in range(count):
        shade = mix(PAPER, BLUE, 0.25 + 0.6 * index / count)
        canvas.line(scene.trail[index : index + 2], shade, 3.5)


def _paint_car(canvas: Canvas, scene: Scene, parameters: CarUMazeParameters) -> None:
    x, y, heading, _, steering = scene.state
    p = parameters

    def placed(points: Polygon) -> Array:
        return _moved(points, heading, (x, y))

    track, wheel = 0.5 * p.width - 0.06, 0.16 * p.wheelbase
    for axle, angle in ((0.0, 0.0), (p.wheelbase, steering)):
        for side in (-track, track):
            tyre = _moved(_rectangle(-wheel, -0.06, wheel, 0.06), angle, (axle, side))
            canvas.polygon(placed(tyre), SLATE)
    color = RED if scene.collision else BLUE
    half, back, front, cut = 0.5 * p.width - 0.07, -p.rear, p.front, 0.12
    body = [(back, half - cut), (back + cut, half), (front - 2 * cut, half), (front, half - cut)]
    body += [(a, -b) for a, b in reversed(body)]
    canvas.polygon(placed(body), color)
    length, cabin = front - back, half - 0.06
    canvas.polygon(
        placed(_rectangle(back + 0.22 * length, -cabin, back + 0.72 * length, cabin)),
        mix(color, SLATE, 0.3),
    )
    window = [(0.58, -cabin), (0.7, -cabin - 0.01), (0.7, cabin + 0.01), (0.58, cabin)]
    canvas.polygon(placed([(back + a * length, b) for a, b in window]), _GLASS)
    for side in (-1, 1):
        canvas.disc(placed([(front - 0.07, side * (half - 0.14))])[0], 0.045, _LAMP)


def _paint_text(canvas: Canvas, scene: Scene, parameters: CarUMazeParameters) -> None:
    left, bottom, right, top = parameters.inner
    middle, room = (bottom + top) / 2, right - left
    distance = math.dist(scene.state[:2], scene.goal)
    reached = distance < parameters.success_radius
    last, color = f"{distance:.1f} m to goal", INK
    if scene.collision:
        last, color = "collision", RED
    elif reached:
        last, color = "goal reached", GREEN
    texts = ((f"{scene.time:.1f} s", INK), (f"{scene.state[3]:+.1f} m/s", INK), (last, color))
    for share, (text, ink) in zip((0.15, 0.42, 0.76), texts, strict=True):
        canvas.text(text, (left + share * room, middle), ink, height=26)


def _rectangle(left: float, bottom: float, right: float, top: float) -> Polygon:
    return [(left, bottom), (right, bottom), (right, top), (left, top)]


def _moved(points: Polygon, angle: float, offset: tuple[float, float]) -> Array:
    """Turn points by `angle` about the origin, then shift them."""
    cos, sin = math.cos(angle), math.sin(angle)
    moved: Array = np.asarray(points) @ np.array([[cos, sin], [-sin, cos]]) + np.asarray(offset)
    return moved
