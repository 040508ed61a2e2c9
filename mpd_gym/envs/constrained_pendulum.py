"""ConstrainedPendulum-v0: Pendulum-v1 with a hard limit on the angular velocity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode

from mpd_gym.envs.batched import BatchedEnv, Infos
from mpd_gym.envs.checks import checked_number
from mpd_gym.envs.drawing import RENDER_MODES, Canvas, Renderer, mix
from mpd_gym.envs.palette import AMBER, AXIS, BLUE, GRID, INK, PAPER, RED, SLATE
from mpd_gym.envs.pendulum_model import (
    Pendulum,
    PendulumParameters,
    action_box,
    observation,
    observation_box,
    reward,
    start_bounds,
    transition,
)
from mpd_gym.envs.plans import DrawnPlans, checked_plans
from mpd_gym.envs.wrappers import VelocityLimit, states_metadata
from mpd_gym.types import Array, BoolArray

__all__ = [
    "ConstrainedPendulumVectorEnv",
    "HeldUpright",
    "PendulumEnv",
    "PendulumParameters",
    "is_upright",
    "make_constrained_pendulum",
    "observation",
    "reward",
    "transition",
]

LIMIT = 6.5  # rad/s
UPRIGHT_ANGLE, UPRIGHT_VELOCITY = 0.2, 0.5  # rad, rad/s
HOLD_STEPS = 20
FPS = 20
SPAN = 2.5  # rad of the ring of velocities from 0 to the greatest
METADATA = {"render_modes": list(RENDER_MODES), "render_fps": FPS}


@states_metadata(METADATA)
def make_constrained_pendulum(
    render_mode: str | None = None, *, limit: float = LIMIT, **constants: float
) -> HeldUpright:
    """Swing a pendulum up and balance it, never turning faster than a limit.

    ## Description
    Gymnasium's Pendulum-v1 with a hard limit on the angular velocity (paper: MPDiffuser, section
    4.2). The environment is `PendulumEnv`, which is Pendulum-v1, inside the wrappers
    `VelocityLimit`, which gives the cost, and `HeldUpright`, which reports success.

    ## Action Space
    `Box(-2, 2, (1,), float32)`; values outside are clipped.

    | Num | Action | Min | Max | Unit |
    |-----|--------|-----|-----|------|
    | 0   | torque, counter-clockwise | -2 | 2 | N·m |

    ## Observation Space
    `Box([-1, -1, -8], [1, 1, 8], (3,), float32)`

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0   | cos(angle), angle 0 is upright | -1 | 1 | – |
    | 1   | sin(angle) | -1 | 1 | – |
    | 2   | angular velocity | -8 | 8 | rad/s |

    ## Rewards
    −(angle² + 0.1·velocity² + 0.001·torque²) at the state before the step, angle in [−π, π). The
    limit does not change it. `info["cost"]` is 1.0 if the step leads to an |angular velocity| above
    the limit, else 0.0.

    ## Starting State
    Angle uniform in [−π, π], velocity in [−1, 1] rad/s. `reset(options=…)` takes `"state"`, the
    exact angle and velocity, or Pendulum-v1's `"x_init"` and `"y_init"`, other bounds.

    ## Episode End
    Truncated after 200 steps, never terminated. `info["is_success"]` is True if |angle| < 0.2 rad
    and |velocity| < 0.5 rad/s on each of the last 20 steps and no step of the episode had a cost.
    Its value at the last step judges the episode.

    ## Arguments
    `limit`: on |angular velocity|, rad/s, default 6.5. `g` (10 m/s²), `m` (1 kg), `l` (1 m), `dt`
    (0.05 s), `max_speed` (8 rad/s), `max_torque` (2 N·m): constants of Pendulum-v1. `render_mode`:
    `"rgb_array"` or `"human"`; the ring around the pendulum shows the velocity, red beyond the
    limit. `env.unwrapped.draw_plan` adds a plan to the picture.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("mpd_gym:ConstrainedPendulum-v0", limit=5.0, g=9.81)
    ```

    Raises:
        InputError: If a constant is out of range.

    ## Version History
    * v0: first version.
    """
    env = PendulumEnv(render_mode, limit=limit, **constants)
    return HeldUpright(VelocityLimit(env, limit, velocity=2))


class PendulumEnv(Pendulum):
    """Pendulum-v1, drawn with a gauge that shows a limit of the velocity.

    Args:
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        limit: End of the gauge's safe part, rad/s; without other effect.
        constants: Fields of `PendulumParameters`.

    Raises:
        InputError: If a constant is out of range.
    """

    metadata = METADATA

    def __init__(
        self, render_mode: str | None = None, *, limit: float = LIMIT, **constants: float
    ) -> None:
        parameters = PendulumParameters(**constants)
        self._limit = checked_number("limit", limit)
        renderer = Renderer(
            render_mode,
            size=(500, 500),
            centre=(0.0, 0.0),
            scale=250.0,
            fps=FPS,
            title="ConstrainedPendulum",
        )
        super().__init__(observation_box(parameters), parameters, renderer)

    def draw_plan(self, plans: Array | None, chosen: int = 0) -> None:
        """Add planned rods and velocities to the coming pictures, until the next call or reset.

        Args:
            plans: Future observations ``[H, 3]``, or candidates ``[N, H, 3]``; None for no plan.
            chosen: Index of the candidate to draw step by step; of the others only the last rod is
                drawn.

        Raises:
            InputError: If `plans` has another shape, or there is no candidate `chosen`.
            ResetNeeded: Before the first reset.
        """
        self._require_state()
        self._plans = checked_plans(plans, chosen, 3)

    def _observe(self, state: Array) -> tuple[Array, dict[str, Any]]:
        return observation(state), {}

    def _paint(self, canvas: Canvas, state: Array, torque: float) -> None:
        over = abs(state[1]) > self._limit
        canvas.fill(PAPER)
        _paint_gauge(canvas, float(state[1]), self._limit, self.parameters.max_speed)
        if self._plans is not None:
            _paint_plans(canvas, self._plans, self.parameters.max_speed)
        _paint_rod(canvas, float(state[0]), RED if over else BLUE)
        _paint_torque(canvas, torque / self.parameters.max_torque)


class HeldUpright(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Adds ``info["is_success"]``: the pendulum was held upright, and no step had a cost.

    True if |angle| < 0.2 rad and |velocity| < 0.5 rad/s on each of the last 20 steps, and no step
    since the reset had a cost above 0.

    Args:
        env: Observes (cos θ, sin θ, θ̇), and gives ``info["cost"]``.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._held, self._violated = 0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; a start is not a success."""
        observed, info = self.env.reset(seed=seed, options=options)
        self._held, self._violated = 0, False
        return observed, {**info, "is_success": False}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment and add whether the episode is a success so far."""
        observed, gained, terminated, truncated, info = self.env.step(action)
        self._held = self._held + 1 if is_upright(observed) else 0
        self._violated = self._violated or info["cost"] > 0
        success = self._held >= HOLD_STEPS and not self._violated
        return observed, gained, terminated, truncated, {**info, "is_success": success}


class ConstrainedPendulumVectorEnv(BatchedEnv):
    """Many copies of ConstrainedPendulum-v0, stepped in one NumPy call.

    Args:
        num_envs: Number of copies.
        max_episode_steps: Steps after which a copy is truncated.
        autoreset_mode: As in `BatchedEnv`.
        render_mode: Only None.
        limit: Limit of the absolute angular velocity, rad/s.
        constants: Fields of `PendulumParameters`.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        limit: float = LIMIT,
        **constants: float,
    ) -> None:
        self.parameters = PendulumParameters(**constants)
        self.limit = checked_number("limit", limit)
        super().__init__(
            num_envs,
            observation_space=observation_box(self.parameters),
            action_space=action_box(self.parameters),
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )

    def _initial(
        self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> tuple[Array, Infos]:
        bounds = start_bounds(options, self.parameters)
        # angle, velocity, steps held upright, whether a step had a cost
        states = np.zeros((len(generators), 4))
        states[:, :2] = [generator.uniform(*bounds) for generator in generators]
        return states, _infos(np.zeros(len(states)), np.zeros(len(states), dtype=np.bool_))

    def _advance(self, states: Array, actions: Array) -> tuple[Array, Array, BoolArray, Infos]:
        moved = transition(states[:, :2], actions, self.parameters)
        observed = observation(moved)
        costs = (~(np.abs(observed[:, 2]) <= self.limit)).astype(np.float64)
        held = np.where(is_upright(observed), states[:, 2] + 1, 0.0)
        violated = np.maximum(states[:, 3], costs)
        success = (held >= HOLD_STEPS) & (violated == 0)
        states_next = np.column_stack([moved, held, violated])
        gained = reward(states[:, :2], actions, self.parameters)
        return states_next, gained, np.zeros(len(states), dtype=np.bool_), _infos(costs, success)

    def _observe(self, states: Array) -> Array:
        return observation(states[:, :2])


def is_upright(observed: Array) -> BoolArray:
    """Return |angle| < 0.2 rad and |velocity| < 0.5 rad/s of observations ``[..., 3]``."""
    angle = np.arctan2(observed[..., 1], observed[..., 0])
    slow = np.abs(observed[..., 2]) < UPRIGHT_VELOCITY
    return np.asarray((np.abs(angle) < UPRIGHT_ANGLE) & slow)


def _infos(costs: Array, success: BoolArray) -> Infos:
    return {"cost": costs, "is_success": success}


def _arc(radius: float, start: float, stop: float) -> Array:
    """Points of an arc; angles are counter-clockwise from straight up, rad."""
    count = 2 + int(abs(stop - start) / 0.04)
    return _at(radius, np.linspace(start, stop, count))


def _at(radius: float, angles: Array) -> Array:
    """Points at the angles ``[...]``, counter-clockwise from straight up, rad: ``[..., 2]``."""
    return radius * np.stack([-np.sin(angles), np.cos(angles)], axis=-1)


def _paint_gauge(canvas: Canvas, velocity: float, limit: float, greatest: float) -> None:
    """Draw a ring: zero at the top, counter-clockwise velocities left, red beyond the limit."""
    span = SPAN / greatest
    safe = min(limit, greatest)
    over = abs(velocity) > limit
    for sign in (-1.0, 1.0):
        canvas.line(_arc(0.84, 0.0, sign * safe * span), GRID, 14.0)
        if limit < greatest:
            beyond = _arc(0.84, sign * (limit + 0.05) * span, sign * greatest * span)
            canvas.line(beyond, mix(PAPER, RED, 0.25), 14.0)
            tick = _arc(1.0, sign * limit * span, sign * limit * span)[0]
            canvas.line([0.79 * tick, 0.89 * tick], RED, 2.5)
            canvas.text(f"{limit:g}", 0.95 * tick, RED, height=17)
    canvas.line(_arc(0.84, 0.0, velocity * span), RED if over else BLUE, 14.0)
    canvas.line([(0.0, 0.78), (0.0, 0.9)], INK, 2.0)
    text = f"{velocity:+.2f} rad/s"
    canvas.text(text, (0.0, -0.8), RED if over else INK, height=26)


def _paint_plans(canvas: Canvas, plans: DrawnPlans, greatest: float) -> None:
    """Draw a fan of rods, later ones paler, and a dot for each velocity on the ring."""
    tips = _at(0.62, np.arctan2(plans.states[..., 1], plans.states[..., 0]))
    marks = _at(0.84, plans.states[plans.chosen, :, 2] * SPAN / greatest)
    for tip in np.delete(tips[:, -1], plans.chosen, axis=0):
        canvas.line([(0.0, 0.0), tip], mix(PAPER, AMBER, 0.2), 2.0)
    for step in reversed(range(len(marks))):  # the nearest on top
        color, tip = mix(AMBER, PAPER, 0.15 + 0.7 * step / len(marks)), tips[plans.chosen, step]
        if np.isfinite(tip).all():
            canvas.line([(0.0, 0.0), tip], color, 2.5)
        canvas.disc(tip, 0.02, color)
        canvas.disc(marks[step], 0.016, color)


def _paint_rod(canvas: Canvas, angle: float, color: tuple[int, int, int]) -> None:
    tip = _arc(0.62, angle, angle)[0]
    canvas.line([(0.0, 0.0), tip], color, 34.0)
    canvas.line([(0.0, 0.0), tip], mix(color, PAPER, 0.15), 28.0)
    canvas.disc((0.0, 0.0), 0.04, SLATE)
    canvas.disc((0.0, 0.0), 0.012, AXIS)


def _paint_torque(canvas: Canvas, share: float) -> None:
    """Draw an arrow about the axle, as long as the torque's share of the largest."""
    if abs(share) < 0.02:
        return
    end = 2.4 * share
    canvas.line(_arc(0.15, 0.0, end), AMBER, 5.0)
    head = _arc(1.0, end, end + np.sign(share) * 0.35)
    canvas.polygon([0.2 * head[0], 0.1 * head[0], 0.15 * head[-1]], AMBER)
