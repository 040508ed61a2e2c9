"""ImagePendulum-v0: Pendulum-v1 seen through four stacked frames."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike

from mpd_gym.envs.drawing import RENDER_MODES, Canvas, Renderer, mix
from mpd_gym.envs.palette import AMBER, PAPER, SLATE
from mpd_gym.envs.pendulum_model import Pendulum, PendulumParameters, transition
from mpd_gym.envs.plans import checked_plans
from mpd_gym.envs.wrappers import StackedFrames, states_metadata
from mpd_gym.errors import InputError
from mpd_gym.types import Array

__all__ = ["PendulumFrameEnv", "draw", "make_image_pendulum", "transition"]

SIZE = 64  # pixels, width and height
FRAMES = 4
FPS = 20
METADATA = {"render_modes": list(RENDER_MODES), "render_fps": FPS}

_DIRECTIONS = 8192  # that a rod can point to
_LENGTH = 26  # from the axle to the middle of the rod's round end, pixels
_FINE = 4096  # scale of the integer directions
_UNIT = 512  # scale of the integer distances, for each pixel
_RADIUS_BITS = 12  # 2^12 units = twice the rod's half-width, 4 pixels
_GHOSTS = (0.15, 0.9)  # brightness of the first and of the last planned frame
_CHUNK = 32  # frames drawn at once, so few that they stay in the cache


@states_metadata(METADATA)
def make_image_pendulum(render_mode: str | None = None, **constants: float) -> StackedFrames:
    """Swing a pendulum up and balance it, seeing only pictures.

    ## Description
    Gymnasium's Pendulum-v1, observed through centred grayscale frames (paper: MPDiffuser, section
    4.3). One frame shows no velocity, so an observation stacks four. The environment is
    `PendulumFrameEnv`, which observes one frame, inside the wrapper `StackedFrames`. `draw` draws
    the frame of any angle with integers only, so frames are the same on every machine.

    ## Action Space
    `Box(-2, 2, (1,), float32)`; values outside are clipped.

    | Num | Action | Min | Max | Unit |
    |-----|--------|-----|-----|------|
    | 0   | torque, counter-clockwise | -2 | 2 | N·m |

    ## Observation Space
    `Box(0, 255, (4, 64, 64), uint8)`

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0 … 3 | frames, 64×64, the newest last; at first four times the same | 0 | 255 | – |

    `info["state"]`, float64, is the true state that the newest frame shows:

    | Num | State | Min | Max | Unit |
    |-----|-------|-----|-----|------|
    | 0   | angle, 0 is upright, not wrapped | -inf | inf | rad |
    | 1   | angular velocity | -8 | 8 | rad/s |

    ## Rewards
    −(angle² + 0.1·velocity² + 0.001·torque²) at the state before the step, angle in [−π, π).

    ## Starting State
    Angle uniform in [−π, π], velocity in [−1, 1] rad/s. `reset(options=…)` takes `"state"`, the
    exact angle and velocity, or Pendulum-v1's `"x_init"` and `"y_init"`, other bounds.

    ## Episode End
    Truncated after 200 steps, never terminated.

    ## Arguments
    `g` (10 m/s²), `m` (1 kg), `l` (1 m), `dt` (0.05 s), `max_speed` (8 rad/s), `max_torque`
    (2 N·m): constants of Pendulum-v1; the picture does not depend on them. `render_mode`:
    `"rgb_array"` or `"human"`, the newest frame enlarged and tinted, with its axle.
    `env.unwrapped.draw_plan` adds planned frames to the picture.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("mpd_gym:ImagePendulum-v0")
    >>> frames, info = env.reset(seed=0, options={"state": [3.14, 0.0]})
    ```

    Raises:
        InputError: If a constant is out of range.

    ## Version History
    * v0: first version.
    """
    return StackedFrames(PendulumFrameEnv(render_mode, **constants), count=FRAMES)


class PendulumFrameEnv(Pendulum):
    """Pendulum-v1 seen through the latest frame alone, with the state in ``info["state"]``.

    Args:
        render_mode: None, ``"rgb_array"`` or ``"human"``.
        constants: Fields of `PendulumParameters`.

    Raises:
        InputError: If a constant is out of range.
    """

    metadata = METADATA

    def __init__(self, render_mode: str | None = None, **constants: float) -> None:
        renderer = Renderer(
            render_mode,
            size=(8 * SIZE, 8 * SIZE),
            centre=(SIZE / 2, -SIZE / 2),
            scale=8.0,
            fps=FPS,
            title="ImagePendulum",
        )
        space = spaces.Box(0, 255, (SIZE, SIZE), np.uint8)
        super().__init__(space, PendulumParameters(**constants), renderer)

    def draw_plan(self, plans: Array | None, chosen: int = 0) -> None:
        """Add planned frames, overlaid, to the coming pictures until the next call or reset.

        Args:
            plans: Newest frame of each future step ``[H, 64, 64]``, 0 … 255, or candidates
                ``[N, H, 64, 64]``; None for no plan.
            chosen: Index of the candidate to draw.

        Raises:
            InputError: If `plans` has another shape, or there is no candidate `chosen`.
            ResetNeeded: Before the first reset.
        """
        self._require_state()
        if plans is not None:
            shape = np.shape(plans)
            if shape[-2:] != (SIZE, SIZE):
                raise InputError(f"plans: expected frames [..., {SIZE}, {SIZE}], got {shape}")
            plans = np.reshape(plans, (*shape[:-2], SIZE * SIZE))
        self._plans = checked_plans(plans, chosen, SIZE * SIZE)

    def _observe(self, state: Array) -> tuple[Array, dict[str, Any]]:
        return draw(state[0]), {"state": state.copy()}

    def _paint(self, canvas: Canvas, state: Array, torque: float) -> None:
        frame, planned = draw(state[0]) / 255, self._planned()
        canvas.fill(SLATE)
        for row, column in np.argwhere((frame > 0) | (planned > 0)).tolist():
            ground = mix(SLATE, AMBER, planned[row, column])
            shade = mix(ground, PAPER, frame[row, column])
            canvas.box(column, -row - 1, column + 1, -row, shade)
        canvas.disc(self._renderer.centre, 0.8, SLATE)

    def _planned(self) -> Array:
        """Brightness of the planned frames, later ones brighter, ``[64, 64]`` in [0, 1]."""
        if self._plans is None:
            return np.zeros((SIZE, SIZE))
        frames = np.nan_to_num(self._plans.states[self._plans.chosen]) / 255  # [H, 64 · 64]
        fading = np.linspace(*_GHOSTS, len(frames))[:, None]
        brightest: Array = (fading * frames).max(axis=0, initial=0.0)
        return brightest.reshape(SIZE, SIZE).round(2)


def draw(angle: ArrayLike) -> Array:
    """Draw a pendulum at one or many angles, bit for bit the same on every machine.

    A white rod with round, anti-aliased ends points from the centre of a black frame, up at angle
    0 and left at π / 2. The angle is rounded to a multiple of 2π / 8192 and looked up in a table
    of integers, whose entries lie far from the halves where rounding could differ between machines.
    All further arithmetic is in integers.

    Args:
        angle: rad, ``[...]``.

    Returns:
        uint8 ``[..., 64, 64]``.

    Raises:
        InputError: If an angle is not finite.
    """
    angles = np.asarray(angle, dtype=np.float64)
    if not np.isfinite(angles).all():
        raise InputError("angle: expected finite numbers (rad), got NaN or infinity")
    turns = np.floor(angles * (_DIRECTIONS / (2 * np.pi)) + 0.5).astype(np.int64) % _DIRECTIONS
    directions = _directions()[turns.reshape(-1)]
    frames = np.empty((len(directions), SIZE, SIZE), dtype=np.uint8)
    for first in range(0, len(directions), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        frames[chunk] = _rods(directions[chunk])
    return frames.reshape(*angles.shape, SIZE, SIZE)


@cache
def _directions() -> Array:
    """Integer unit vectors (x to the right, y upwards) of all angles, ``[directions, 2]``."""
    angles = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS)
    exact = _FINE * np.stack([-np.sin(angles), np.cos(angles)], axis=-1)
    return np.asarray(np.rint(exact), dtype=np.int32)


def _rods(directions: Array) -> Array:
    """Frames of rods that point along integer unit vectors ``[M, 2]``, uint8 ``[M, 64, 64]``."""
    half_pixels = 2 * np.arange(SIZE, dtype=np.int32) - (SIZE - 1)  # of centres, from the middle
    x, y = directions[:, 0, None, None], directions[:, 1, None, None]
    across, up = half_pixels[None, None, :], -half_pixels[None, :, None]
    shift = 2 * _FINE // _UNIT
    along = (across * x + up * y) // shift
    aside = np.abs(across * y - up * x) // shift
    beyond = np.maximum(np.maximum(-along, along - _LENGTH * _UNIT), 0)
    # r² − d² over 2r is the distance to the outline near it, for d the distance to the rod's axis
    radius = 1 << (_RADIUS_BITS - 1)
    inside = (radius * radius - beyond * beyond - aside * aside) >> _RADIUS_BITS
    bright = np.minimum(np.maximum(inside + _UNIT // 2, 0), _UNIT - 1) >> 1
    return np.asarray(bright, dtype=np.uint8)
