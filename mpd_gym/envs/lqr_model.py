"""Linear systems with quadratic cost: dynamics, reward, and the solution by Riccati's equation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mpd_gym.envs.checks import checked_array
from mpd_gym.errors import InputError
from mpd_gym.types import Array

__all__ = ["LinearQuadraticProblem", "checked_matrix", "double_integrator", "reward", "transition"]


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
    return _product(A, np.asarray(state)) + _product(B, np.asarray(action))


def reward(state: Array, action: Array, Q: Array, R: Array) -> Array:
    """Return −(xᵀQx + uᵀRu), ``[...]``.

    Args:
        state: x before the step, ``[..., nx]``.
        action: u, ``[..., nu]``.
        Q: ``[nx, nx]``.
        R: ``[nu, nu]``.
    """
    state, action = np.asarray(state), np.asarray(action)
    cost = (_product(Q, state) * state).sum(-1) + (_product(R, action) * action).sum(-1)
    return np.asarray(-cost)


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
            object.__setattr__(self, name, checked_matrix(name, getattr(self, name)))
        states, actions = self.B.shape
        for name, size in (("A", states), ("Q", states), ("R", actions)):
            shape = getattr(self, name).shape
            if shape != (size, size):
                raise InputError(
                    f"{name}: expected {(size, size)} to go with B of {self.B.shape}, got {shape}"
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
            ``[...]``: minus the return of the best controller, if no action limit binds and the
            episode lasts until the state is at rest.

        Raises:
            InputError: If there is no stabilising controller.
        """
        x0 = np.asarray(x0, dtype=np.float64)
        return np.asarray((x0 @ self.cost_to_go * x0).sum(-1))


def _product(matrix: Array, vectors: Array) -> Array:
    """Return M v for vectors ``[..., n]``: the same bits for one vector as for many.

    BLAS would sum a batch in another order, and differently on other machines.
    """
    result = vectors[..., :1] * matrix[:, 0]
    for column in range(1, matrix.shape[1]):
        result += vectors[..., column : column + 1] * matrix[:, column]
    return result


def checked_matrix(name: str, value: Any) -> Array:
    """Return a read-only float64 copy of a matrix argument.

    Raises:
        InputError: If it is no matrix of finite numbers.
    """
    try:
        shape = np.shape(value)
    except ValueError as error:
        raise InputError(f"{name}: expected a matrix, got rows of several lengths") from error
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"{name}: expected a matrix, got shape {shape}")
    array = checked_array(name, value, shape)
    array.flags.writeable = False
    return array


def _check_definite(name: str, matrix: Array, *, strictly: bool) -> None:
    size = np.abs(matrix).max()
    if not np.allclose(matrix, matrix.T, rtol=0.0, atol=1e-12 * size):
        raise InputError(f"{name}: expected a symmetric matrix, got {matrix.tolist()}")
    least = np.linalg.eigvalsh(matrix)[0]
    if (strictly and least <= 0) or least < -1e-12 * size:
        kind = "definite" if strictly else "semidefinite"
        raise InputError(f"{name}: expected a positive {kind} matrix, got an eigenvalue {least:g}")
