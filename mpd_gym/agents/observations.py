"""From what an environment shows to what a planner sees, with every check before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from gymnasium import spaces

from mpd_gym.errors import ConfigError, InputError
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.types import Array

__all__ = ["ObservationReader", "Reading"]


@dataclass(frozen=True)
class Reading:
    """E observations, split into their parts.

    Attributes:
        x: Flat observation, float64 ``[E, nx]``.
        goal: ``desired_goal``, ``[E, ng]``; None where the space has none.
        budget: Remaining cost budget supplied by a wrapper, ``[E]``; None where there is none.
        single: True if one observation came without a batch axis.
    """

    x: Array
    goal: Array | None
    budget: Array | None
    single: bool

    def __len__(self) -> int:
        return len(self.x)


@final
class ObservationReader:
    """Reads one or many observations of a Box, or of a Dict with an ``observation`` key.

    A Dict may also hold ``desired_goal`` (Gymnasium-Robotics' convention) and
    ``remaining_budget`` (as `mpd_gym.envs.wrappers.RemainingBudget` supplies it); other keys are
    checked for nothing and ignored.

    Args:
        space: The environment's observation space.
        encoder: Makes observations of `space` out of stacked frames, which are then read as well;
            None reads observations of `space` only.

    Raises:
        ConfigError: If the space is neither of the two, or the encoder gives others.
    """

    def __init__(self, space: spaces.Space[Any], encoder: ImageEncoder | None = None) -> None:
        if encoder is not None and encoder.latent_space.shape != space.shape:
            raise ConfigError(
                f"encoder: its latents have shape {encoder.latent_space.shape}, the agent's "
                f"observations {space.shape}; take the encoder that the agent was trained with"
            )
        self.encoder = encoder
        self.space = space
        self._parts = _parts(space)
        self.size = int(np.prod(self._parts["observation"].shape))
        goal = self._parts.get("desired_goal")
        self.goal_size = 0 if goal is None else int(np.prod(goal.shape))

    def read(self, observation: Any) -> Reading:
        """Check and split one or many observations.

        Args:
            observation: Array ``[*shape]`` or ``[E, *shape]``, or a mapping of such arrays; with
                an encoder also stacks ``[F, H, W]`` or ``[E, F, H, W]``.

        Raises:
            InputError: For an ``(obs, info)`` tuple, a wrong or missing key, a wrong shape, or a
                value that is not a finite number.
        """
        if isinstance(observation, tuple):
            raise InputError(
                "observation: expected an array or a mapping, got a tuple; pass only the first "
                "element of what env.reset() returns"
            )
        if self.encoder is not None and np.ndim(observation) > 2:  # latents have one or two axes
            observation = self.encoder.encode(observation)
        entries = self._entries(observation)
        read = {key: self._read_part(key, entries[key]) for key in self._parts}
        sizes = {key: None if single else len(rows) for key, (rows, single) in read.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"observation: its parts differ in their number: {sizes}")
        rows, single = read["observation"]
        goal = read["desired_goal"][0] if "desired_goal" in read else None
        budget = read["remaining_budget"][0][:, 0] if "remaining_budget" in read else None
        return Reading(rows, goal, budget, single)

    def _entries(self, observation: Any) -> Mapping[str, Any]:
        if not isinstance(self.space, spaces.Dict):
            if isinstance(observation, Mapping):
                raise InputError(
                    f"observation: expected an array of shape {self.space.shape}, got a mapping "
                    f"with keys {sorted(observation)}"
                )
            return {"observation": observation}
        if not isinstance(observation, Mapping):
            raise InputError(
                f"observation: expected a mapping with keys {sorted(self._parts)}, got "
                f"{type(observation).__name__}"
            )
        missing = sorted(set(self._parts) - set(observation))
        if missing:
            raise InputError(
                f"observation: key {missing[0]!r} is missing; keys are {sorted(observation)}"
            )
        return observation

    def _read_part(self, key: str, value: Any) -> tuple[Array, bool]:
        shape = self._parts[key].shape
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"observation {key!r}: expected numbers; {error}") from error
        if array.shape == shape:
            single = True
        elif array.ndim == len(shape) + 1 and array.shape[1:] == shape and len(array) > 0:
            single = False
        else:
            raise InputError(
                f"observation {key!r}: expected shape {shape} or (n, *{shape}) with n >= 1, got "
                f"{array.shape}"
            )
        rows = array.reshape(1 if single else len(array), -1)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise InputError(
                f"observation {key!r}: row {int(bad.argmax())} holds NaN or infinity: "
                f"{rows[bad.argmax()]}"
            )
        return rows, single


def _parts(space: spaces.Space[Any]) -> dict[str, spaces.Box]:
    """Box of every part that a planner reads."""
    found: dict[str, spaces.Box] = {}
    if isinstance(space, spaces.Box):
        return {"observation": space}
    if isinstance(space, spaces.Dict) and "observation" in space.spaces:
        for key in ("observation", "desired_goal", "remaining_budget"):
            part = space.spaces.get(key)
            if isinstance(part, spaces.Box):
                found[key] = part
        if "observation" in found:
            return found
    raise ConfigError(
        "observation space: expected a Box, or a Dict with a Box under 'observation' (and "
        f"'desired_goal' for goals), got {space}; flatten it with "
        "gymnasium.wrappers.FlattenObservation"
    )
