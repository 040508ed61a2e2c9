"""The pendulum of Gymnasium's `Pendulum-v1` as pure functions, and the environment around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from mpd_gym.envs.checks import checked_action, checked_array, checked_number, checked_options
from mpd_gym.envs.drawing import Canvas, Renderer
from mpd_gym.envs.plans import DrawnPlans
from mpd_gym.errors import InputError
from mpd_gym.types import Array

__all__ = [
    "DEFAULT",
    "Pendulum",
    "PendulumParameters",
    "action_box",
    "observation",
    "observation_box",
    "reward",
    "start_bounds",
    "transition",
]

START = {"x_init": np.pi, "y_init": 1.0}  # starts lie within ± these


@dataclass(frozen=True)
class PendulumParameters:
    """Physical constants of a uniform rod that swings about one end.

    Attributes:
        g: Gravity, m/s², at least 0.
        m: Mass, kg.
        l: Length, m.
        dt: Duration of one step, s.
        max_speed: Bound of the absolute angular velocity, rad/s.
        max_torque: Bound of the absolute torque, N·m.

    Raises:
        InputError: If a constant is not finite or out of range.
    """

    g: float = 10.0
    m: float = 1.0
    l: float = 1.0  # noqa: E741  (Pendulum-v1's name)
    dt: float = 0.05
    max_speed: float = 8.0
    max_torque: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, checked_number(name, value, strictly=name != "g"))


DEFAULT = PendulumParameters()


def transition(state: Array, action: Array, parameters: PendulumParameters = DEFAULT) -> Array:
    """Return the state one step later, as Gymnasium's `PendulumEnv` computes it.

    Semi-implicit Euler: θ̇⁺ = θ̇ + (3g / 2l · sin θ + 3 / ml² · u) dt, clipped to ± `max_speed`, and
    θ⁺ = θ + θ̇⁺ dt, not wrapped.

    Args:
        state: Angle θ (rad, 0 upright, counter-clockwise) and velocity θ̇ (rad/s), ``[..., 2]``.
        action: Torque u (N·m), ``[..., 1]``; clipped to ± `max_torque`.
        parameters: Physical constants.
    """
    p = parameters
    angle, velocity = state[..., 0], state[..., 1]
    torque = _clipped(action, p)
    push = 3 * p.g / (2 * p.l) * np.sin(angle) + 3.0 / (p.m * p.l**2) * torque
    velocity = np.minimum(np.maximum(velocity + push * p.dt, -p.max_speed), p.max_speed)
    return np.stack([angle + velocity * p.dt, velocity], axis=-1)


def observation(state: Array) -> Array:
    """Return (cos θ, sin θ, θ̇) of states ``[..., 2]``, float32 ``[..., 3]``."""
    angle = state[..., 0]
    return np.stack([np.cos(angle), np.sin(angle), state[..., 1]], axis=-1).astype(np.float32)


def reward(state: Array, action: Array, parameters: PendulumParameters = DEFAULT) -> Array:
    """Return −(θ² + 0.1 θ̇² + 0.001 u²) at the state before the step, θ in [−π, π), ``[...]``.

    Args:
        state: ``[..., 2]``, as in `transition`.
        action: ``[..., 1]``, as in `transition`.
        parameters: Physical constants.
    """
    angle = (state[..., 0] + np.pi) % (2 * np.pi) - np.pi
    cost = angle**2 + 0.1 * state[..., 1] ** 2 + 0.001 * _clipped(action, parameters) ** 2
    return np.asarray(-cost)


def start_bounds(
    options: Mapping[str, Any] | None, parameters: PendulumParameters = DEFAULT
) -> tuple[Array, Array]:
    """Return the lowest and highest start of an episode, ``[2]`` each; equal for an exact start.

    Args:
        options: Options of `reset`: ``"state"`` is the exact start ``[2]``; ``"x_init"`` and
            ``"y_init"`` bound |angle| and |velocity|, by default π and 1.
        parameters: Physical constants.

    Raises:
        InputError: If an option is unknown, of the wrong shape or not finite, or a start could be
            faster than `max_speed`.
    """
    options = checked_options(options, {"state", *START})
    bounds = [checked_number(f"options['{key}']", options.get(key, START[key])) for key in START]
    highest = checked_array("options['state']", options.get("state", bounds), (2,))
    if abs(highest[1]) > parameters.max_speed:
        raise InputError(
            f"options: expected a speed of at most max_speed = {parameters.max_speed}, "
            f"got {highest[1]}"
        )
    return (highest if "state" in options else -highest), highest


def observation_box(parameters: PendulumParameters) -> spaces.Box:
    """Return the space of `observation`."""
    high = np.array([1.0, 1.0, parameters.max_speed], dtype=np.float32)
    return spaces.Box(-high, high, dtype=np.float32)


def action_box(parameters: PendulumParameters) -> spaces.Box:
    """Return the space of torques."""
    return spaces.Box(-parameters.max_torque, parameters.max_torque, (1,), np.float32)


class Pendulum(gym.Env[Array, Array], ABC):
    """Pendulum-v1; a subclass chooses observation and picture.

    Args:
        observation_space: Space of what `_observe` returns.
        parameters: Physical constants.
        renderer: Draws for the environment's render mode.
    """

    def __init__(
        self, observation_space: spaces.Box, parameters: PendulumParameters, renderer: Renderer
    ) -> None:
        self.parameters = parameters
        self.observation_space = observation_space
        self.action_space = action_box(parameters)
        self.render_mode = renderer.mode
        self.state: Array | None = None
        self._torque = 0.0
        self._plans: DrawnPlans | None = None
        self._renderer = renderer

    @abstractmethod
    def _observe(self, state: Array) -> tuple[Array, dict[str, Any]]:
        """Return the observation of a state ``[2]`` and its infos, as new objects."""

    @abstractmethod
    def _paint(self, canvas: Canvas, state: Array, torque: float) -> None:
        """Draw a state ``[2]`` and the torque that led to it, N·m."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode; `start_bounds` describes the options.

        Raises:
            InputError: If an option is unknown or out of range.
        """
        bounds = start_bounds(options, self.parameters)
        super().reset(seed=seed)
        self.state, self._torque = self.np_random.uniform(*bounds), 0.0
        self._plans = None
        if self.render_mode == "human":
            self.render()
        return self._observe(self.state)

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Raises:
            InputError: If `action` has the wrong shape or a non-finite value.
            ResetNeeded: Before the first reset.
        """
        state = self._require_state()
        action = checked_action(action, self.action_space)
        self.state = transition(state, action, self.parameters)
        self._torque = float(_clipped(action, self.parameters))
        if self.render_mode == "human":
            self.render()
        observed, info = self._observe(self.state)
        return observed, float(reward(state, action, self.parameters)), False, False, info

    def render(self) -> Any:
        """Draw the current state.

        Raises:
            ResetNeeded: Before the first reset.
        """
        state, torque = self._require_state(), self._torque
        return self._renderer.render(lambda canvas: self._paint(canvas, state, torque))

    def close(self) -> None:
        """Close the window, if there is one."""
        self._renderer.close()

    def _require_state(self) -> Array:
        if self.state is None:
            raise ResetNeeded("Cannot step or render before calling reset()")
        return self.state


def _clipped(action: Array, parameters: PendulumParameters) -> Array:
    """Torques ``[...]`` of actions ``[..., 1]``."""
    limit = parameters.max_torque
    return np.minimum(np.maximum(np.asarray(action, np.float64)[..., 0], -limit), limit)
