"""Linear system with quadratic cost (LQR-v0), whose optimal controller is known exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike

from mpd_gym.envs.batched import BatchedEnv, Infos
from mpd_gym.envs.checks import checked_action, checked_array, checked_options
from mpd_gym.envs.drawing import RENDER_MODES, Renderer
from mpd_gym.envs.lqr_model import (
    LinearQuadraticProblem,
    checked_matrix,
    double_integrator,
    reward,
    transition,
)
from mpd_gym.envs.lqr_picture import PATH_LENGTH, Moment, paint
from mpd_gym.envs.plans import DrawnPlans, checked_plans
from mpd_gym.errors import InputError
from mpd_gym.types import Array, BoolArray

__all__ = [
    "LQREnv",
    "LQRVectorEnv",
    "LinearQuadraticProblem",
    "double_integrator",
    "reward",
    "transition",
]

MAX_ACTION = 10.0
START_RANGE = (-0.2, 0.2)
FPS = 10


class LQREnv(gym.Env[Array, Array]):
    """Linear system with quadratic cost: the task whose best controller is known.

    ## Description
    The state moves by x⁺ = Ax + Bu. By default this is a mass on a rail, pushed by a force: the
    double integrator x'' = u, discretised exactly at 0.1 s (paper: MPDiffuser, appendix E). The
    task is to bring the state to the origin with little effort.

    ## Action Space
    `Box(-10, 10, (nu,), float32)`; values outside are clipped. By default:

    | Num | Action | Min | Max | Unit |
    |-----|--------|-----|-----|------|
    | 0   | acceleration (force on a unit mass) | -10 | 10 | m/s² |

    ## Observation Space
    The state, `Box(-inf, inf, (nx,), float64)`. By default:

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0   | position    | -inf | inf | m   |
    | 1   | velocity    | -inf | inf | m/s |

    ## Rewards
    −(xᵀQx + uᵀRu) at the state before the step; by default Q = I and R = 0.1·I. `optimal_gain` is
    K of the best controller u = Kx (K includes the minus sign). `optimal_cost(x0)` is its cost
    over an infinite horizon; 200 steps reach it to nearly all digits.

    ## Starting State
    Uniform in `start_range`, by default [−0.2, 0.2] in each dimension;
    `reset(options={"state": x})` starts at x exactly.

    ## Episode End
    Truncated after 200 steps; the state never ends an episode.

    ## Arguments
    `A` `[nx, nx]`, `B` `[nx, nu]`, `Q` `[nx, nx]`, `R` `[nu, nu]`: arrays or nested lists. A and B
    default to `double_integrator()`; a single one must fit the default of the other. Q defaults
    to I and R to 0.1·I, with sizes from B. `start_range`: lowest and highest start, numbers or
    `[nx]` each. `max_action`: largest |action|, a number or `[nu]`. `render_mode`: `"rgb_array"`
    or `"human"`; two states are drawn in the phase plane, others over time. `draw_plan` adds
    planned states.

    ```python
    >>> import gymnasium as gym
    >>> env = gym.make("mpd_gym:LQR-v0")
    >>> observation, _ = env.reset(seed=0, options={"state": [0.2, 0.0]})
    >>> action = env.unwrapped.optimal_gain @ observation
    ```

    Raises:
        InputError: If an argument has the wrong shape, sign or range.

    ## Version History
    * v0: first version.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        A: ArrayLike | None = None,
        B: ArrayLike | None = None,
        Q: ArrayLike | None = None,
        R: ArrayLike | None = None,
        start_range: tuple[ArrayLike, ArrayLike] = START_RANGE,
        max_action: ArrayLike = MAX_ACTION,
    ) -> None:
        self._system = _system(A, B, Q, R, start_range, max_action)
        self.problem = self._system.problem
        self.observation_space = self._system.observation_space
        self.action_space = self._system.action_space
        self.render_mode = render_mode
        self._renderer = Renderer(
            render_mode, size=(500, 500), centre=(0.0, 0.0), scale=250.0, fps=FPS, title="LQR"
        )
        self.state: Array | None = None
        self._path: deque[Moment] = deque(maxlen=PATH_LENGTH)
        self._plans: DrawnPlans | None = None

    @property
    def optimal_gain(self) -> Array:
        """K ``[nu, nx]`` of the best controller u = Kx; see `LinearQuadraticProblem.gain`."""
        return self.problem.gain

    def optimal_cost(self, x0: Array) -> Array:
        """Least cost from `x0` ``[..., nx]``, ``[...]``; see `LinearQuadraticProblem.cost`."""
        return self.problem.cost(x0)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode; the option ``"state"`` ``[nx]`` sets the exact start.

        Raises:
            InputError: If an option is unknown, or not finite numbers of the right shape.
        """
        bounds = self._system.start_bounds(options)
        super().reset(seed=seed)
        self.state = self.np_random.uniform(*bounds)
        self._path.clear()
        self._plans = None
        self._record(None, 0.0)
        return self.state.copy(), {}

    def step(self, action: Any) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Take one step.

        Raises:
            InputError: If `action` has the wrong shape or a non-finite value.
            ResetNeeded: Before the first reset.
        """
        state = self._require_state()
        action = checked_action(action, self.action_space)
        self.state, gained = self._system.advance(state, action)
        self._record(action, float(gained))
        return self.state.copy(), float(gained), False, False, {}

    def draw_plan(self, plans: Array | None, chosen: int = 0) -> None:
        """Add planned states to the coming pictures, until the next call or reset.

        Args:
            plans: Future states ``[H, nx]``, or candidates ``[N, H, nx]``; None for no plan.
            chosen: Index of the candidate to draw thick; the others are thin.

        Raises:
            InputError: If `plans` has another shape, or there is no candidate `chosen`.
            ResetNeeded: Before the first reset.
        """
        self._plans = checked_plans(plans, chosen, len(self._require_state()))

    def render(self) -> Any:
        """Draw the phase plane (two states), or all states over time.

        Raises:
            ResetNeeded: Before the first reset.
        """
        self._require_state()
        system, path = self._system, list(self._path)
        farthest = np.maximum(np.abs(system.lowest), np.abs(system.highest))
        scales = (self.problem.Q, farthest, system.max_action)
        return self._renderer.render(lambda canvas: paint(canvas, path, self._plans, *scales))

    def close(self) -> None:
        """Close the window, if there is one."""
        self._renderer.close()

    def _require_state(self) -> Array:
        if self.state is None:
            raise ResetNeeded("Cannot step or render before calling reset()")
        return self.state

    def _record(self, action: Array | None, gained: float) -> None:
        """Keep what the picture shows: the states, actions and costs since the start."""
        if self.render_mode is None or self.state is None:
            return
        cost = self._path[-1][2] - gained if self._path else 0.0
        self._path.append((self.state.copy(), action, cost))
        if self.render_mode == "human":
            self.render()


class LQRVectorEnv(BatchedEnv):
    """Many copies of `LQREnv`, stepped in one NumPy call.

    Args:
        num_envs: Number of copies.
        max_episode_steps: Steps after which a copy is truncated.
        autoreset_mode: As in `BatchedEnv`.
        render_mode: Only None.
        system: `A`, `B`, `Q`, `R`, `start_range` and `max_action`, as in `LQREnv`.

    Raises:
        InputError: If an argument has the wrong shape, sign or range.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **system: Any,
    ) -> None:
        self._system = _system(**system)
        self.problem = self._system.problem
        super().__init__(
            num_envs,
            observation_space=self._system.observation_space,
            action_space=self._system.action_space,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )

    def _initial(
        self, generators: Sequence[np.random.Generator], options: Mapping[str, Any]
    ) -> tuple[Array, Infos]:
        bounds = self._system.start_bounds(options)
        return np.stack([generator.uniform(*bounds) for generator in generators]), {}

    def _advance(self, states: Array, actions: Array) -> tuple[Array, Array, BoolArray, Infos]:
        states, rewards = self._system.advance(states, actions)
        return states, rewards, np.zeros(len(states), dtype=np.bool_), {}

    def _observe(self, states: Array) -> Array:
        return states.copy()


@dataclass(frozen=True, eq=False)
class _System:
    """What single and batched environments share: the problem, its starts and its limits."""

    problem: LinearQuadraticProblem
    lowest: Array  # [nx], of the starts
    highest: Array  # [nx]
    max_action: Array  # [nu]

    @property
    def observation_space(self) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, self.lowest.shape, np.float64)

    @property
    def action_space(self) -> spaces.Box:
        limit = self.max_action.astype(np.float32)
        return spaces.Box(-limit, limit, dtype=np.float32)

    def start_bounds(self, options: Mapping[str, Any] | None) -> tuple[Array, Array]:
        """Return the lowest and highest start, ``[nx]`` each; equal for an exact start."""
        options = checked_options(options, {"state"})
        if "state" not in options:
            return self.lowest, self.highest
        exact = checked_array("options['state']", options["state"], self.lowest.shape)
        return exact, exact

    def advance(self, state: Array, action: Array) -> tuple[Array, Array]:
        """Return the next states ``[..., nx]`` and the rewards ``[...]``; actions are clipped."""
        action = np.minimum(np.maximum(action, -self.max_action), self.max_action)
        problem = self.problem
        gained = reward(state, action, problem.Q, problem.R)
        return transition(state, action, problem.A, problem.B), gained


def _system(
    A: ArrayLike | None = None,
    B: ArrayLike | None = None,
    Q: ArrayLike | None = None,
    R: ArrayLike | None = None,
    start_range: tuple[ArrayLike, ArrayLike] = START_RANGE,
    max_action: ArrayLike = MAX_ACTION,
) -> _System:
    """Check the arguments and fill in the defaults."""
    default_A, default_B = double_integrator()
    input_matrix = checked_matrix("B", default_B if B is None else B)
    states, actions = input_matrix.shape
    problem = LinearQuadraticProblem(
        A=checked_matrix("A", default_A if A is None else A),
        B=input_matrix,
        Q=checked_matrix("Q", np.eye(states) if Q is None else Q),
        R=checked_matrix("R", 0.1 * np.eye(actions) if R is None else R),
    )
    try:
        lowest, highest = start_range
    except (TypeError, ValueError) as error:
        raise InputError(f"start_range: expected (lowest, highest), got {start_range!r}") from error
    lowest = checked_array("start_range[0]", _spread(lowest, states), (states,))
    highest = checked_array("start_range[1]", _spread(highest, states), (states,))
    limits = checked_array("max_action", _spread(max_action, actions), (actions,))
    if (lowest > highest).any():
        raise InputError(f"start_range: expected lowest <= highest, got {lowest} and {highest}")
    if (limits <= 0).any():
        raise InputError(f"max_action: expected positive numbers, got {limits}")
    return _System(problem, lowest, highest, limits)


def _spread(value: ArrayLike, size: int) -> Any:
    return np.full(size, value) if np.isscalar(value) else value
