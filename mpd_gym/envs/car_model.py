"""The car and the maze of `CarUMaze-v0` as pure functions: dynamics, walls, centre line, reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from mpd_gym.envs.checks import checked_number
from mpd_gym.errors import InputError
from mpd_gym.types import Array, BoolArray

__all__ = [
    "DEFAULT",
    "CarUMazeParameters",
    "bicycle_step",
    "collides",
    "components",
    "draw_starts",
    "drive",
    "footprint",
    "goal_distance",
    "goal_reward",
    "inverse_transition",
    "path_length",
    "touches_wall",
    "transition",
]


@dataclass(frozen=True)
class CarUMazeParameters:
    """Physical constants in SI units, and the reward.

    The corridors' centre line runs from (0, separation / 2) to (arm_length, separation / 2), down
    to (arm_length, −separation / 2) and back to (0, −separation / 2). The walls are `half_width`
    away from it. The car's reference point is the middle of its rear axle.

    Attributes:
        wheelbase: Distance between the axles, m.
        front: From the rear axle to the front of the footprint, m.
        rear: From the rear axle to the back of the footprint, m.
        width: Width of the footprint, m.
        max_acceleration: Bound of action 0, m/s².
        max_steering_rate: Bound of action 1, rad/s.
        min_speed: Lowest speed, at most 0, m/s.
        max_speed: Highest speed, m/s.
        max_steering: Largest steering angle, below π/2, rad.
        dt: Duration of one environment step, s.
        substeps: RK4 steps in one environment step.
        arm_length: Length of an arm's centre line, m.
        separation: Distance between the centre lines of the arms, m.
        half_width: Distance from the centre line to the walls, m.
        min_path: Shortest centre line between start and goal, m.
        max_path: Longest centre line between start and goal, m.
        bend_clearance: Least distance of start and goal from the bend, m; with 2 m the default car
            turns without reversing.
        lateral_offset: Largest distance of start and goal from the centre line, m.
        heading_noise: Largest angle between the first heading and the arm, rad.
        success_radius: Distance below which the goal counts as reached, m.
        reward_type: ``"sparse"`` or ``"dense"``.

    Raises:
        InputError: If a value is out of range, or a start could touch a wall.
    """

    wheelbase: float = 1.0
    front: float = 1.2
    rear: float = 0.2
    width: float = 0.7
    max_acceleration: float = 3.0
    max_steering_rate: float = 1.5
    min_speed: float = -1.0
    max_speed: float = 4.0
    max_steering: float = 0.6
    dt: float = 0.3
    substeps: int = 3
    arm_length: float = 8.0
    separation: float = 4.0
    half_width: float = 1.5
    min_path: float = 12.0
    max_path: float = 20.0
    bend_clearance: float = 2.0
    lateral_offset: float = 0.5
    heading_noise: float = 0.1
    success_radius: float = 1.0
    reward_type: str = "sparse"

    def __post_init__(self) -> None:
        zero_allowed = {"rear", "bend_clearance", "lateral_offset", "heading_noise"}
        for name, value in vars(self).items():
            if name not in {"min_speed", "reward_type"}:
                checked_number(name, value, strictly=name not in zero_allowed)
        swing = self.front * math.sin(self.heading_noise) + self.width / 2
        shortest = self.separation + 2 * self.bend_clearance
        longest = self.separation + 2 * self.arm_length
        rules = {
            f"reward_type must be 'sparse' or 'dense', got {self.reward_type!r}": (
                self.reward_type in ("sparse", "dense")
            ),
            f"substeps must be an integer, got {self.substeps!r}": (
                isinstance(self.substeps, (int, np.integer))
            ),
            f"min_speed must be at most 0, got {self.min_speed!r}": -math.inf < self.min_speed <= 0,
            f"max_steering must be below π/2, got {self.max_steering!r}": (
                self.max_steering < math.pi / 2
            ),
            "separation must exceed twice half_width, so that a wall divides the arms": (
                self.separation > 2 * self.half_width
            ),
            "bend_clearance must not exceed arm_length": self.bend_clearance <= self.arm_length,
            f"min_path <= max_path must lie within {shortest} … {longest} m, which start and goal "
            f"allow, got {self.min_path} … {self.max_path}": (
                shortest <= self.min_path <= self.max_path <= longest
            ),
            "the corridor must be wide enough for a start at lateral_offset and heading_noise": (
                self.lateral_offset + swing < self.half_width
                and self.rear + self.width / 2 * math.sin(self.heading_noise) < self.half_width
                and self.front + self.width / 2 < self.bend_clearance + self.half_width
            ),
        }
        for rule, kept in rules.items():
            if not kept:
                raise InputError(rule)

    @property
    def outer(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top of the outer wall, m."""
        reach = self.separation / 2 + self.half_width
        return -self.half_width, -reach, self.arm_length + self.half_width, reach

    @property
    def inner(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top of the wall between the arms, m."""
        reach = self.separation / 2 - self.half_width
        return -self.half_width, -reach, self.arm_length - self.half_width, reach


DEFAULT = CarUMazeParameters()


def bicycle_step(
    state: Sequence[Any],
    action: Sequence[Any],
    parameters: CarUMazeParameters = DEFAULT,
    *,
    functions: ModuleType = np,
    bounded: bool = True,
) -> tuple[Any, ...]:
    """Integrate the kinematic bicycle over one substep (dt / substeps) with classical RK4.

    x' = v cos θ, y' = v sin θ, θ' = v tan δ / wheelbase, v' = acceleration, δ' = steering rate.
    Speed and steering angle are linear in time, so their end values are known first. The function
    clips these to their bounds and uses straight ramps to the clipped values in the four stages.
    The bounds then hold at every stage; inside them this is RK4 of the equations above. The
    heading is not wrapped.

    Args:
        state: Components x, y, heading, speed, steering: floats, arrays or CasADi expressions.
        action: Components acceleration and steering rate, within their bounds.
        parameters: Physical constants.
        functions: `math`, `numpy` or `casadi`, to match the components.
        bounded: Whether to clip. Optimisers that state the bounds as constraints, and need
            derivatives beyond them, pass False.

    Returns:
        The five components at the end of the substep.
    """
    x, y, heading, speed, steering = state
    acceleration, steering_rate = action
    h = parameters.dt / parameters.substeps
    cos, sin, tan = functions.cos, functions.sin, functions.tan
    end_speed = speed + h * acceleration
    end_steering = steering + h * steering_rate
    if bounded:
        end_speed = _clip(end_speed, parameters.min_speed, parameters.max_speed, functions)
        limit = parameters.max_steering
        end_steering = _clip(end_steering, -limit, limit, functions)
    mid_speed, mid_steering = (speed + end_speed) / 2, (steering + end_steering) / 2

    turn_1 = speed * tan(steering) / parameters.wheelbase
    turn_2 = mid_speed * tan(mid_steering) / parameters.wheelbase  # stages 2 and 3 agree
    turn_4 = end_speed * tan(end_steering) / parameters.wheelbase
    heading_2 = heading + h / 2 * turn_1
    heading_3 = heading + h / 2 * turn_2
    heading_4 = heading + h * turn_2
    along_x = speed * cos(heading) + end_speed * cos(heading_4)
    along_y = speed * sin(heading) + end_speed * sin(heading_4)
    return (
        x + h / 6 * (along_x + 2 * mid_speed * (cos(heading_2) + cos(heading_3))),
        y + h / 6 * (along_y + 2 * mid_speed * (sin(heading_2) + sin(heading_3))),
        heading + h / 6 * (turn_1 + 4 * turn_2 + turn_4),
        end_speed,
        end_steering,
    )


def drive(
    state: Sequence[Any],
    action: Sequence[Any],
    parameters: CarUMazeParameters = DEFAULT,
    *,
    functions: ModuleType = np,
) -> list[tuple[Any, ...]]:
    """Clip the action; return the state's components after each substep of one step.

    Args:
        state: As in `bicycle_step`.
        action: Components acceleration and steering rate.
        parameters: Physical constants.
        functions: As in `bicycle_step`.
    """
    limits = (parameters.max_acceleration, parameters.max_steering_rate)
    clipped = [
        _clip(value, -limit, limit, functions) for value, limit in zip(action, limits, strict=True)
    ]
    states = [tuple(state)]
    for _ in range(parameters.substeps):
        states.append(bicycle_step(states[-1], clipped, parameters, functions=functions))
    return states[1:]


def transition(state: Array, action: Array, parameters: CarUMazeParameters = DEFAULT) -> Array:
    """Return the state one environment step later; walls do not act.

    Args:
        state: x (m), y (m), heading (rad), speed (m/s), steering angle (rad), ``[…, 5]``.
        action: Acceleration (m/s²) and steering rate (rad/s), ``[…, 2]``; clipped to their bounds.
        parameters: Physical constants.
    """
    return np.stack(drive(components(state), components(action), parameters)[-1], axis=-1)


def inverse_transition(
    state: Array, next_state: Array, parameters: CarUMazeParameters = DEFAULT
) -> Array:
    """Return the action that leads to the next state's speed and steering angle.

    For two states of one drive this is the action between them. A car that executes the actions
    of a plan has the planned speeds and steering angles, also where the plan's positions are off.

    Args:
        state: As in `transition`, ``[…, 5]``.
        next_state: One environment step later, ``[…, 5]``.
        parameters: Physical constants.

    Returns:
        Acceleration (m/s²) and steering rate (rad/s), ``[…, 2]``, clipped to their bounds.
    """
    limits = np.array([parameters.max_acceleration, parameters.max_steering_rate])
    rates: Array = (next_state[..., 3:5] - state[..., 3:5]) / parameters.dt
    return np.clip(rates, -limits, limits)


def footprint(state: Array, parameters: CarUMazeParameters = DEFAULT) -> Array:
    """Return the corners of the car, ``[…, 4, 2]``: front left, front right, rear right, rear left.

    Args:
        state: ``[…, >= 3]``, beginning with x, y and heading.
        parameters: Physical constants.
    """
    x, y, heading = components(state)[:3]
    along = np.array([parameters.front, parameters.front, -parameters.rear, -parameters.rear])
    left = np.array([0.5, -0.5, -0.5, 0.5]) * parameters.width
    cos, sin = np.cos(heading)[..., None], np.sin(heading)[..., None]
    corners = (x[..., None] + cos * along - sin * left, y[..., None] + sin * along + cos * left)
    return np.stack(corners, axis=-1)


def collides(state: Array, parameters: CarUMazeParameters = DEFAULT) -> BoolArray:
    """Return whether the footprint touches or crosses a wall, ``[…]``.

    Args:
        state: ``[…, >= 3]``, beginning with x, y and heading.
        parameters: Physical constants.
    """
    touching: BoolArray = touches_wall(components(state), parameters, np)
    return touching


def path_length(start: Array, goal: Array, parameters: CarUMazeParameters = DEFAULT) -> Array:
    """Return the length of the centre line between start and goal, m, ``[…]``.

    Args:
        start: Position ``[…, 2]``, m; the nearest point on the centre line counts.
        goal: Position ``[…, 2]``, m; the nearest point on the centre line counts.
        parameters: Physical constants.
    """
    along = _centre_line(start, parameters) - _centre_line(goal, parameters)
    return np.abs(along)  # type: ignore[no-any-return]


def _centre_line(point: Array, parameters: CarUMazeParameters) -> Array:
    """Arc length from the upper dead end to the centre line's point nearest to `point`."""
    x, y = components(point)
    arm, half = parameters.arm_length, parameters.separation / 2
    along, across = np.clip(x, 0.0, arm), np.clip(y, -half, half)
    positions = np.stack([along, arm + half - across, 2 * arm + 2 * half - along])
    to_arms = np.hypot(x - along, y - half), np.hypot(x - along, y + half)
    distances = np.stack([to_arms[0], np.hypot(x - arm, y - across), to_arms[1]])
    nearest = np.argmin(distances, axis=0)[None]
    arc: Array = np.take_along_axis(positions, nearest, axis=0)[0]
    return arc


def components(array: Array) -> tuple[Array, ...]:
    """Split ``[…, n]`` into n contiguous float64 arrays ``[…]``."""
    return tuple(np.ascontiguousarray(np.moveaxis(np.asarray(array, dtype=np.float64), -1, 0)))


def _clip(value: Any, low: float, high: float, functions: ModuleType) -> Any:
    """Clip floats (`math` has no fmin), arrays or CasADi expressions."""
    smaller, larger = getattr(functions, "fmin", min), getattr(functions, "fmax", max)
    return larger(smaller(value, high), low)


def touches_wall(
    state: Sequence[Any], parameters: CarUMazeParameters, functions: ModuleType
) -> Any:
    """Return whether the footprint touches or crosses a wall; exact.

    The outer wall is convex, so the extent of the footprint decides. The test of the inner wall
    uses separating axes of the wall and of the car (the car's corners alone would miss a wall's
    corner in its side).

    Args:
        state: Components x, y, heading, …: floats or arrays.
        parameters: Physical constants.
        functions: `math` or `numpy`, to match the components.
    """
    p = parameters
    cos, sin = functions.cos(state[2]), functions.sin(state[2])
    length, width = (p.front + p.rear) / 2, p.width / 2
    x = state[0] + (p.front - p.rear) / 2 * cos
    y = state[1] + (p.front - p.rear) / 2 * sin
    cos_size, sin_size = abs(cos), abs(sin)
    reach_x, reach_y = length * cos_size + width * sin_size, length * sin_size + width * cos_size
    left, bottom, right, top = p.outer
    outside = (x - reach_x <= left) | (x + reach_x >= right)
    outside = outside | (y - reach_y <= bottom) | (y + reach_y >= top)

    left, bottom, right, top = p.inner
    half_x, half_y = (right - left) / 2, (top - bottom) / 2
    to_x, to_y = (left + right) / 2 - x, (bottom + top) / 2 - y
    ahead, aside = cos * to_x + sin * to_y, cos * to_y - sin * to_x
    overlap = (abs(to_x) <= half_x + reach_x) & (abs(to_y) <= half_y + reach_y)
    overlap = overlap & (abs(ahead) <= length + half_x * cos_size + half_y * sin_size)
    return outside | overlap & (abs(aside) <= width + half_x * sin_size + half_y * cos_size)


def goal_distance(dx: Any, dy: Any, functions: ModuleType) -> Any:
    """Return the Euclidean distance; the same to the last bit for floats and arrays."""
    return functions.sqrt(dx * dx + dy * dy)


def goal_reward(distance: Any, parameters: CarUMazeParameters) -> Any:
    """Return minus the distance (dense), or 0 within the success radius and −1 beyond (sparse)."""
    if parameters.reward_type == "dense":
        return -distance
    return (distance < parameters.success_radius) - 1.0


def draw_starts(
    uniforms: Array, parameters: CarUMazeParameters, upper: BoolArray | None = None
) -> tuple[Array, Array]:
    """Turn uniform numbers into starts and goals in different arms.

    The path's length is uniform in [min_path, max_path]. The start's share of it is uniform over
    the shares that leave both ends on their arms.

    Args:
        uniforms: Six numbers in [0, 1) for each start, ``[M, 6]``.
        parameters: Physical constants.
        upper: Whether the start lies in the upper arm, ``[M]``; None chooses with equal chance.

    Returns:
        States ``[M, 5]`` and goals ``[M, 2]``.
    """
    p = parameters
    side, length, share, start_across, goal_across, turn = components(uniforms)
    sign = np.where(side < 0.5 if upper is None else upper, 1.0, -1.0)
    to_bend = p.min_path + length * (p.max_path - p.min_path) - p.separation  # of both together
    least = np.maximum(p.bend_clearance, to_bend - p.arm_length)
    most = np.minimum(p.arm_length, to_bend - p.bend_clearance)
    start_to_bend = least + share * (most - least)
    half, spread = p.separation / 2, 2 * p.lateral_offset
    states = np.zeros((len(sign), 5))
    states[:, 0] = p.arm_length - start_to_bend
    states[:, 1] = sign * half + spread * (start_across - 0.5)
    states[:, 2] = 2 * p.heading_noise * (turn - 0.5)
    goal_x = p.arm_length - (to_bend - start_to_bend)
    goals = np.stack([goal_x, -sign * half + spread * (goal_across - 0.5)], axis=-1)
    return states, goals
