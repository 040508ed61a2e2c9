"""Linear system with quadratic cost (LQR-v0), whose optimal controller is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike

from mpd_gym.envs.batched import BatchedEnv
from mpd_gym.envs.wrappers import checked_action
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


def double_integrator(dt: float = 0.1) -> tuple[Array, Array]:
    """Return A ``[2, 2]`` and B ``[2, 1]`` of x'' = u, discretised exactly.

    Args:
        dt: Time that each action is held, in seconds.
    """
    return np.array([[1.0, dt], [0.0, 1.0]]), np.array([[0.5 * dt**2], [dt]])


def transition(state: Array, action: Array, A: Array, B: Array) -> Array:
    """Return A x + B u.

    Args:
        state: x, ``[..., nx]``.
        action: u, ``[..., nu]``.
        A: ``[nx, nx]``.
        B: ``[nx, nu]``.
    """
    return np.asarray(state @ A.T + action @ B.T)


def reward(state: Array, action: Array, Q: Array, R: Array) -> Array:
    """Return −(xᵀQx + uᵀRu), ``[...]``.

    Args:
        state: x before the step, ``[..., nx]``.
        action: u, ``[..., nu]``.
        Q: ``[nx, nx]``.
        R: ``[nu, nu]``.
    """
    return np.asarray(-((state @ Q * state).sum(-1) + (action @ R * action).sum(-1)))


@dataclass(frozen=True, eq=False)
class LinearQuadraticProblem:
    """x⁺ = Ax + Bu with cost Σ xᵀQx + uᵀRu, and its solution without action limits.

    Args:
        A: ``[nx, nx]``.
        B: ``[nx, nu]``.
        Q: ``[nx, nx]``, symmetric and positive semidefinite.
        R: ``[nu, nu]``, symmetric and positive definite.

    Raises:
        InputError: If a matrix has the wrong shape, sign or symmetry, or a non-finite value.
    """

    A: Array
    B: Array
    Q: Array
    R: Array

    def __post_init__(self) -> None:
        for name in ("A", "B", "Q", "R"):
            object.__setattr__(self, name, _matrix(name, getattr(self, name)))
        states, actions = self.B.shape
        for name, size in (("A", states), ("Q", states), ("R", actions)):
            shape = getattr(self, name).shape
            if shape != (size, size):
                raise InputError(
                    f"{name}: expected shape {(size, size)} to go with B {self.B.shape}, got {shape}"
                )
        _check_definite("Q", self.Q, strictly=False)
        _check_definite("R", self.R, strictly=True)

    @cached_property
    def cost_to_go(self) -> Array:
        """P of the discrete algebraic Riccati equation, ``[nx, nx]``.

        Raises:
            InputError: If there is no stabilising solution.
        """
        from scipy.linalg import solve_discrete_are

        try:
            return np.asarray(solve_discrete_are(self.A, self.B, self.Q, self.R))
        except np.linalg.LinAlgError as error:
            raise InputError(
                "A, B, Q: no stabilising controller exists; every unstable or undamped mode of A "
                "must be reached by B and seen by Q"
            ) from error

    @cached_property
    def gain(self) -> Array:
        """K ``[nu, nx]`` of the optimal controller u = Kx: the minus sign is in K.

        Raises:
            InputError: If there is no stabilising controller.
        """
        P = self.cost_to_go
        return -np.linalg.solve(self.R + self.B.T @ P @ self.B, self.B.T @ P @ self.A)

    def cost(self, x0: Array) -> Array:
        """Return x₀ᵀPx₀, the least cost from `x0` over an infinite horizon.

        Args:
            x0: First states, ``[..., nx]``.

        Returns:
            ``[...]``: minus the return of the best controller, as long as it keeps within the
            limits of the actions and the episode lasts until the state is at rest.

        Raises:
            InputError: If there is no stabilising controller.
        """
        x0 = np.asarray(x0, dtype=np.float64)
        return np.asarray((x0 @ self.cost_to_go * x0).sum(-1))


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
    the K of the best controller u = Kx (its minus sign included), `optimal_cost(x0)` the cost of
    that controller over an infinite horizon, which 200 steps reach to nearly all digits.

    ## Starting State
    Uniform in `start_range`, by default [−0.2, 0.2] in each dimension. `reset(options={"state": x})`
    starts at x exactly.

    ## Episode End
    Truncated after 200 steps; the state never ends an episode.

    ## Arguments
    `A` `[nx, nx]`, `B` `[nx, nu]`, `Q` `[nx, nx]`, `R` `[nu, nu]`: arrays or nested lists. A and B
    default to `double_integrator()`, and if only one is given it must fit to the other's default.
    Q defaults to I and R to 0.1·I of the sizes that B asks for. `start_range`: lowest and highest
    start, numbers or `[nx]` each. `max_action`: largest |action|, a number or `[nu]`.
    `render_mode`: `"rgb_array"` or `"human"`; the phase plane with the path since the start for
    two states, otherwise all states over time.

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

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 10}  # noqa: RUF012

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
        self.problem = _problem(A, B, Q, R)
        self._start = _start_bounds(start_range, self.problem)
        self.observation_space, self.action_space = _spaces(self.problem, max_action)
        self._limit = self.action_space.high.astype(np.float64)
        self._renderer = Renderer(
            render_mode, size=(500, 500), centre=(0.0, 0.0), scale=250.0, fps=10, title="LQR"
        )
        self.render_mode = render_mode
        self._path: list[Array] = []
        self.last_action: Array | None = None

    @property
    def optimal_gain(self) -> Array:
        """K ``[nu, nx]`` of the best controller u = Kx; see `LinearQuadraticProblem.gain`."""
        return self.problem.gain

    def optimal_cost(self, x0: Array) -> Array:
        """Least cost from `x0` ``[..., nx]``, ``[...]``; see `LinearQuadraticProblem.cost`."""
        return self.problem.cost(x0)
