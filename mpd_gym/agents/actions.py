"""From a plan's actions to what an environment takes."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from gymnasium import spaces

from mpd_gym.errors import ConfigError
from mpd_gym.types import Array

__all__ = ["ActionWriter", "action_size"]


def action_size(space: spaces.Space[Any]) -> int:
    """Number of action dimensions.

    Raises:
        ConfigError: If the space is not a Box.
    """
    if not isinstance(space, spaces.Box):
        raise ConfigError(f"action space: planners need a Box, got {space}")
    return int(np.prod(space.shape))


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
