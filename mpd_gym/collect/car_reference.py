"""The U-shaped, time-parameterised reference that the car's expert tracks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpd_gym.envs.car_model import DEFAULT, CarUMazeParameters
from mpd_gym.errors import ConfigError
from mpd_gym.types import Array

__all__ = ["DEFAULT_PROFILE", "SpeedProfile", "reference"]

_BLEND = 5.0  # m over which the reference leaves a start's, and reaches a goal's, lateral offset


@dataclass(frozen=True)
class SpeedProfile:
    """Speed profile of the reference; it depends on the path's length only.

    The speed rises along half a cosine wave, stays constant, and falls along half a cosine wave to
    zero. The default reaches every goal after 30 steps of 0.3 s, at up to 2.8 m/s and 2.2 m/s².

    Attributes:
        arrival: Time at the goal, s.
        ramp: Duration of the rise and of the fall, s; at most half of `arrival`.

    Raises:
        ConfigError: If a value is out of range.
    """

    arrival: float = 9.0
    ramp: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < 2.0 * self.ramp <= self.arrival < math.inf:
            raise ConfigError(
                "SpeedProfile: expected 0 < 2 * ramp <= arrival, "
                f"got ramp={self.ramp!r}, arrival={self.arrival!r}"
            )

    def travelled(self, times: Array, length: float, first_speed: float) -> tuple[Array, Array]:
        """Return distance (m) and speed (m/s) along a path at given times.

        Args:
            times: Times since the start, s, ``[M]``.
            length: Length of the path, m.
            first_speed: Speed at time 0, m/s.
        """
        cruise = (length - first_speed * self.ramp / 2) / (self.arrival - self.ramp)
        clock = np.clip(times, 0.0, self.arrival)
        rise, fall = clock, clock - (self.arrival - self.ramp)
        gain = cruise - first_speed
        distance = first_speed * clock + gain * self._ramp_distance(rise)
        speed = first_speed + gain * self._ramp_speed(rise)
        return (
            distance - cruise * self._ramp_distance(fall),
            speed - cruise * self._ramp_speed(fall),
        )

    def peaks(self, length: float) -> tuple[float, float]:
        """Return the largest speed (m/s) and acceleration (m/s²) on a path, from rest."""
        cruise = length / (self.arrival - self.ramp)
        return cruise, cruise * math.pi / (2.0 * self.ramp)

    def _ramp_speed(self, elapsed: Array) -> Array:
        phase = np.clip(elapsed / self.ramp, 0.0, 1.0)
        return (1.0 - np.cos(np.pi * phase)) / 2.0

    def _ramp_distance(self, elapsed: Array) -> Array:
        """Integral of `_ramp_speed`; after the ramp it grows with slope 1."""
        phase = np.clip(elapsed / self.ramp, 0.0, 1.0)
        within = self.ramp * (phase / 2.0 - np.sin(np.pi * phase) / (2.0 * np.pi))
        return within + np.maximum(elapsed - self.ramp, 0.0)


DEFAULT_PROFILE = SpeedProfile()


def reference(
    start: Array,
    goal: Array,
    times: Array,
    parameters: CarUMazeParameters = DEFAULT,
    timing: SpeedProfile = DEFAULT_PROFILE,
) -> Array:
    """Return the U-shaped reference from a state to a goal, at given times.

    It follows one arm, a half circle (its radius is half the arms' separation, so it touches the
    bend's centre line), and the other arm. The lateral offsets of start and goal fade out and in
    smoothly. After `timing.arrival` the reference stands at the goal.

    Args:
        start: x, y (m), heading (rad), speed (m/s), …: ``[>= 4]``.
        goal: x, y (m), ``[2]``.
        times: Times since the start, s, ``[M]``.
        parameters: Parameters of the environment.
        timing: Speed profile.

    Returns:
        x, y, heading (rad, continuous, with the turns of the start's heading), speed and steering
        angle, ``[M, 5]``.
    """
    radius = parameters.separation / 2
    straight = parameters.arm_length - radius
    first, first_offset = _project(start[0], start[1], straight, radius)
    last, last_offset = _project(goal[0], goal[1], straight, radius)
    direction = 1.0 if last >= first else -1.0
    length = abs(last - first)
    distance, speed = timing.travelled(times, length, float(start[3]))

    blend = min(_BLEND, length / 2)
    scale = max(blend, 1e-9)  # a start on the goal has no path to blend over
    out, out_slope = _smooth_step(distance / scale)
    into, into_slope = _smooth_step((distance - (length - blend)) / scale)
    offset = first_offset * (1.0 - out) + last_offset * into
    slope = (last_offset * into_slope - first_offset * out_slope) / scale

    along = first + direction * distance
    angle = np.clip((along - straight) / radius, 0.0, np.pi)  # of the tangent, towards the top
    beyond = np.maximum(along - straight - np.pi * radius, 0.0)  # of the half circle's end
    curvature = np.where((angle > 0.0) & (angle < np.pi), 1.0 / radius, 0.0)
    stretch = 1.0 + curvature * offset  # length of the offset path over the U's
    first_angle = min(max((first - straight) / radius, 0.0), math.pi)
    behind = math.pi if direction < 0 else 0.0
    turns = round((float(start[2]) - first_angle + behind) / (2 * math.pi))
    heading = angle - behind + 2 * math.pi * turns - direction * np.arctan2(slope, stretch)
    return np.stack(
        [
            np.minimum(along, straight) + (radius + offset) * np.sin(angle) - beyond,
            -(radius + offset) * np.cos(angle),
            heading,
            speed * np.hypot(stretch, slope),
            direction * np.arctan(parameters.wheelbase * curvature / stretch),
        ],
        axis=-1,
    )


def _project(x: float, y: float, straight: float, radius: float) -> tuple[float, float]:
    """Project a point on the U; return arc length from the lower dead end, and outward offset."""
    if x > straight:
        angle = math.atan2(x - straight, -y)
        return straight + radius * angle, math.hypot(x - straight, y) - radius
    return (x if y < 0 else 2 * straight + math.pi * radius - x), abs(y) - radius


def _smooth_step(fraction: Array) -> tuple[Array, Array]:
    """Quintic from 0 to 1 with flat ends, and its slope."""
    f = np.clip(fraction, 0.0, 1.0)
    return f**3 * (10.0 + f * (6.0 * f - 15.0)), 30.0 * (f * (1.0 - f)) ** 2
