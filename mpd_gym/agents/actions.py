"""From a plan's actions to what an environment takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
from gymnasium import spaces

from mpd_gym.errors import ConfigError, InputError
from mpd_gym.types import Array

__all__ = ["ActionWriter", "InverseDynamics", "action_size", "read_off"]

InverseDynamics = Callable[[Array, Array, Array], Array]
"""``fn(observations [N, H, nx], actions [N, H, nu], next_observations [N, H, nx]) -> actions``, in
environment units: ``[N, H, nu]`` that lead from each planned state to the next."""


def action_size(space: spaces.Space[Any]) -> int:
    """Number of action dimensions.

    Raises:
        ConfigError: If the space is not a Box.
    """
    if not isinstance(space, spaces.Box):
        raise ConfigError(f"action space: planners need a Box, got {space}")
    return int(np.prod(space.shape))


def read_off(function: InverseDynamics, observations: Array, actions: Array) -> Array:
    """Actions that lead along planned states, in the place of the planned actions.

    Args:
        function: The caller's inverse dynamics.
        observations: x_0 … x_H, ``[N, H + 1, nx]``.
        actions: u_0 … u_{H-1} as planned, ``[N, H, nu]``.

    Raises:
        InputError: If the function returns another shape, or what is not finite.
    """
    found = np.asarray(function(observations[:, :-1], actions, observations[:, 1:]), float)
    if found.shape != actions.shape or not np.isfinite(found).all():
        raise InputError(
            f"inverse dynamics: expected finite actions of shape {actions.shape}, got "
            f"{found.shape}{'' if np.isfinite(found).all() else ' with NaN or infinity'}: "
            "correct the function that set_inverse_dynamics was given"
        )
    return found


@final
class ActionWriter:
    """Gives actions the bounds, shape and type of a space.

    Args:
        space: The environment's action space.

    Raises:
        ConfigError: If the space is not a Box.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.size = action_size(space)
        assert isinstance(space, spaces.Box)  # checked by action_size
        self._space = space

    def clip(self, actions: Array) -> Array:
        """Cut flat actions ``[…, nu]`` to the bounds."""
        space = self._space
        return np.clip(actions, space.low.reshape(-1), space.high.reshape(-1))

    def write(self, actions: Array, *, single: bool) -> Array:
        """Actions ``[E, nu]`` in the space's shape and type, without axis E for a single one.

        They are cut once more: float32 rounding must not leave the Box.
        """
        space = self._space
        rows = actions.reshape(len(actions), *space.shape).astype(space.dtype)
        shaped: Array = np.clip(rows, space.low, space.high)
        return shaped[0] if single else shaped
