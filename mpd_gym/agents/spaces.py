"""What an environment shows and takes, as flat vectors, with every check before any work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from gymnasium import spaces

from mpd_gym.boundary import as_numbers, as_typed, returned
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.types import Array

__all__ = ["InverseDynamics", "Reading", "Spaces", "read_off"]

InverseDynamics = Callable[[Array, Array, Array], Array]
"""``fn(observations [N, H, nx], actions [N, H, nu], next_observations [N, H, nx]) -> actions``, in
environment units: ``[N, H, nu]`` that lead from each planned state to the next."""


@dataclass(frozen=True)
class Reading:
    """E observations, split into their parts.

    Attributes:
        x: Flat observation, float64 ``[E, nx]``.
        goal: ``desired_goal``, ``[E, ng]``; None where the space has none.
        budget: Remaining cost budget supplied by a wrapper, ``[E]``; None where there is none.
        single: True if one observation came without a batch axis.
        numbers: Of the rows in the batch, for messages, ``[E]``.
    """

    x: Array
    goal: Array | None
    budget: Array | None
    single: bool
    numbers: Array

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, chosen: Array) -> Reading:
        """Some of the observations, as a batch: where an array of indices or flags says."""
        goal, budget = (None if part is None else part[chosen] for part in (self.goal, self.budget))
        return Reading(self.x[chosen], goal, budget, False, self.numbers[chosen])


@final
class Spaces:
    """Spaces of observations and actions: reads what an environment shows, writes what it takes.

    Observations are a Box, or a Dict with a Box under ``observation``. A Dict may also hold
    ``desired_goal`` (Gymnasium-Robotics' convention) and ``remaining_budget`` (as
    `mpd_gym.envs.wrappers.RemainingBudget` supplies it); other keys are ignored.

    Args:
        observation: The environment's observation space.
        action: The environment's action space, a Box.
        encoder: Makes observations out of stacked frames, which are then read as well; None reads
            observations only.

    Attributes:
        nx: Size of a flat observation.
        nu: Size of a flat action.
        goal_size: Size of a goal; 0 without one.
        accepts: Spaces of what is read: without the keys that are ignored; the encoder's stacks.

    Raises:
        ConfigError: If a space is of another kind, or the encoder gives other observations.
    """

    def __init__(
        self,
        observation: spaces.Space[Any],
        action: spaces.Space[Any],
        encoder: ImageEncoder | None = None,
    ) -> None:
        if not isinstance(action, spaces.Box):
            raise ConfigError(f"action space: planners need a Box, got {action}")
        if encoder is not None and encoder.latent_space.shape != observation.shape:
            raise ConfigError(
                f"encoder: its latents have shape {encoder.latent_space.shape}, the agent's "
                f"observations {observation.shape}; take the encoder that the agent was trained "
                "with"
            )
        observation, action = copy.deepcopy((observation, action))  # the caller may change them
        self.observation, self.action, self.encoder = observation, action, encoder
        self._parts = _parts(observation)
        sizes = {key: int(np.prod(part.shape)) for key, part in self._parts.items()}
        self.nx, self.goal_size = sizes["observation"], sizes.get("desired_goal", 0)
        self.nu = int(np.prod(action.shape))
        plain = isinstance(observation, spaces.Box)
        read: spaces.Space[Any] = observation if plain else spaces.Dict({**self._parts})
        self.accepts = (read,) if encoder is None else (read, encoder.image_space)

    def with_encoder(self, encoder: ImageEncoder | None) -> Spaces:
        """The same spaces with another encoder."""
        return Spaces(self.observation, self.action, encoder)

    def clip(self, actions: Array) -> Array:
        """Cut flat actions ``[…, nu]`` to the bounds."""
        return np.clip(actions, self.action.low.reshape(-1), self.action.high.reshape(-1))

    def write(self, actions: Array, *, single: bool) -> Array:
        """Actions ``[E, nu]`` in the space's shape and type, without axis E for a single one.

        They are cut once more: float32 rounding must not leave the Box.
        """
        space = self.action
        rows = actions.reshape(len(actions), *space.shape)
        shaped: Array = np.clip(as_typed(rows, space), space.low, space.high)
        return shaped[0] if single else shaped

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
            observation = self.encoder.encode(as_numbers("observation", observation))
        entries = self._entries(observation)
        read = {key: self._read_part(key, entries[key]) for key in self._parts}
        sizes = {key: None if single else len(rows) for key, (rows, single) in read.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"observation: its parts differ in their number: {sizes}")
        rows, single = read["observation"]
        goal = read["desired_goal"][0] if "desired_goal" in read else None
        budget = read["remaining_budget"][0][:, 0] if "remaining_budget" in read else None
        return Reading(rows, goal, budget, single, np.arange(len(rows)))

    def _entries(self, observation: Any) -> Mapping[str, Any]:
        if not isinstance(self.observation, spaces.Dict):
            if isinstance(observation, Mapping):
                raise InputError(
                    f"observation: expected an array of shape {self.observation.shape}, got a "
                    f"mapping with keys {sorted(observation)}"
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
        shape, name = self._parts[key].shape, f"observation {key!r}"
        try:
            array = as_numbers(name, value).astype(np.float64)  # a copy
        except InputError:
            if isinstance(value, Sequence):
                for row, part in enumerate(value):
                    if as_numbers(f"{name}, row {row}", part).shape != shape:
                        raise InputError(f"{name}, row {row}: expected shape {shape}") from None
            raise
        if array.shape == shape:
            single = True
        elif array.ndim == len(shape) + 1 and array.shape[1:] == shape and len(array) > 0:
            single = False
        else:
            raise InputError(
                f"{name}: expected shape {shape} or (n, *{shape}) with n >= 1, got {array.shape}"
            )
        rows = array.reshape(1 if single else len(array), -1)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise InputError(
                f"{name}: row {int(bad.argmax())} holds NaN or infinity: {rows[bad.argmax()]}"
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


def read_off(function: InverseDynamics, observations: Array, actions: Array) -> Array:
    """Actions that lead along planned states, instead of the planned actions.

    Args:
        function: The caller's inverse dynamics.
        observations: x_0 … x_H, ``[N, H + 1, nx]``.
        actions: u_0 … u_{H-1} as planned, ``[N, H, nu]``.

    Raises:
        InputError: If the function returns another shape, or what is not finite.
    """
    steps = (observations[:, :-1], actions, observations[:, 1:])
    return returned("inverse dynamics", function, *steps, shape=actions.shape, finite=True)
