"""Wrappers that turn known environments into those of this package; they fit others too.

Each wrapper records its arguments, so `env.spec` can make the wrapped environment again, and can
be pickled if the environment inside can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from mpd_gym.envs.checks import checked_action, checked_number
from mpd_gym.errors import InputError, check_integer
from mpd_gym.types import Array

__all__ = ["RemainingBudget", "StackedFrames", "TorqueDefect", "VelocityLimit", "states_metadata"]

StepResult = tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]
Maker = TypeVar("Maker", bound=Callable[..., Any])


class VelocityLimit(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Adds ``info["cost"]``: 1.0 if the speed after the step is over a limit, else 0.0.

    Observations, rewards and episode ends do not change. `reset` gives a cost of 0.0.

    Args:
        env: Environment to watch.
        limit: Largest allowed ``|velocity|``, in the velocity's unit; not negative.
        velocity: Index of the velocity in the flat observation, or a function of the observation.
            With an index the environment's specification can be written as JSON.

    Raises:
        InputError: If `limit` is negative or not finite, or the observation has no such index.
    """

    def __init__(
        self, env: gym.Env[Any, Any], limit: float, velocity: int | Callable[[Any], float]
    ) -> None:
        RecordConstructorArgs.__init__(self, limit=limit, velocity=velocity)
        super().__init__(env)
        self.limit = checked_number("limit", limit)
        self._velocity = velocity
        if not callable(velocity):
            _flat_box("velocity", velocity, env.observation_space, "observation")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment; the cost of a start is 0.0."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "cost": 0.0}

    def step(self, action: Any) -> StepResult:
        """Step the environment and add the cost of the new state."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        velocity = self._velocity
        speed = velocity(observation) if callable(velocity) else observation[velocity]
        info = {**info, "cost": float(not abs(speed) <= self.limit)}  # NaN is over the limit
        return observation, reward, terminated, truncated, info


class RemainingBudget(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Shows the rest of a cost budget as ``observation["remaining_budget"]``.

    A Box observation becomes a Dict with the keys ``observation`` and ``remaining_budget``; a Dict
    gets the second key. Agents of this package then read the budget from the observation and do
    not count costs themselves.

    Args:
        env: Environment that gives ``info["cost"]`` on every step.
        budget: Cost that an episode may have, not negative.

    Raises:
        InputError: If `budget` is negative or not finite; from `step`, without a cost.
    """

    def __init__(self, env: gym.Env[Any, Any], budget: float) -> None:
        RecordConstructorArgs.__init__(self, budget=budget)
        super().__init__(env)
        self.budget = checked_number("budget", budget)
        inner = env.observation_space
        parts = inner.spaces if isinstance(inner, spaces.Dict) else {"observation": inner}
        left = spaces.Box(0.0, np.inf, (1,), np.float64)
        self.observation_space = spaces.Dict({**parts, "remaining_budget": left})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment and the budget."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._left = self.budget
        return self._shown(observation), info

    def step(self, action: Any) -> StepResult:
        """Step the environment and subtract the cost from the budget, down to 0."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "cost" not in info:
            raise InputError("info: expected the key 'cost', which RemainingBudget counts")
        self._left = max(self._left - float(info["cost"]), 0.0)
        return self._shown(observation), reward, terminated, truncated, info

    def _shown(self, observation: Any) -> dict[str, Any]:
        parts = observation if isinstance(observation, Mapping) else {"observation": observation}
        return {**parts, "remaining_budget": np.array([self._left])}


class StackedFrames(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Observe the last frames of an environment with pictures, channel first.

    Frames ``[height, width]`` become ``[count, height, width]`` and frames
    ``[height, width, channels]`` become ``[count · channels, height, width]``, the newest last.
    `reset` fills the stack with the first frame. If an environment observes no pictures, wrap it
    in Gymnasium's `AddRenderObservation` and `ResizeObservation` first.

    Args:
        env: Environment whose observations are uint8 pictures.
        count: Number of frames, at least 1.

    Raises:
        InputError: If the observations are no uint8 pictures.
        ConfigError: If `count` is no positive integer.
    """

    def __init__(self, env: gym.Env[Any, Any], count: int = 4) -> None:
        RecordConstructorArgs.__init__(self, count=count)
        super().__init__(env)
        space = env.observation_space
        if (
            not isinstance(space, spaces.Box)
            or space.dtype != np.uint8
            or len(space.shape) not in (2, 3)
        ):
            raise InputError(
                "env: expected uint8 observations [height, width] or [height, width, channels], "
                f"got {space}; put AddRenderObservation inside for an environment without pictures"
            )
        check_integer("count", count, 1)
        self.count = count
        self.observation_space = spaces.Box(
            np.concatenate([_channels_first(space.low)] * self.count),
            np.concatenate([_channels_first(space.high)] * self.count),
            dtype=np.uint8,
        )
        self._frames: Array | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset the environment and fill the stack with its first frame."""
        frame, info = self.env.reset(seed=seed, options=options)
        self._frames = np.concatenate([_channels_first(frame)] * self.count)
        return self._frames.copy(), info

    def step(self, action: Any) -> StepResult:
        """Step the environment; its frame replaces the oldest of the stack."""
        if self._frames is None:
            raise gym.error.ResetNeeded("Cannot call step() before calling reset()")
        frame, reward, terminated, truncated, info = self.env.step(action)
        newest = _channels_first(frame)
        self._frames = np.concatenate([self._frames[len(newest) :], newest])
        return self._frames.copy(), reward, terminated, truncated, info


class TorqueDefect(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """A weak joint: one dimension of the action is clipped before it reaches the environment.

    The action space does not change, so every policy for the environment still runs. `step` gives
    ``info["applied_action"]``, the action that the environment received.

    Args:
        env: Environment with a flat Box of actions.
        joint: Index of the weak action dimension.
        limit: Bound of that joint's action, [−limit, limit]; not negative.

    Raises:
        InputError: If `limit` is negative or not finite, or there is no such joint.
    """

    def __init__(self, env: gym.Env[Any, Any], joint: int, limit: float) -> None:
        RecordConstructorArgs.__init__(self, joint=joint, limit=limit)
        super().__init__(env)
        self._space = _flat_box("joint", joint, env.action_space, "action")
        self.joint, self.limit = int(joint), checked_number("limit", limit)

    def step(self, action: Any) -> StepResult:
        """Step the environment with the weakened action.

        Raises:
            InputError: If `action` has the wrong shape or a non-finite value.
        """
        applied = checked_action(action, self._space).astype(self._space.dtype)
        applied[self.joint] = min(max(applied[self.joint], -self.limit), self.limit)
        observation, reward, terminated, truncated, info = self.env.step(applied.copy())
        info = {**info, "applied_action": applied}
        return observation, reward, terminated, truncated, info


def states_metadata(metadata: Mapping[str, Any]) -> Callable[[Maker], Maker]:
    """Attach environment `metadata` to a function that makes environments.

    `gymnasium.make` reads there which render modes an entry point has, and adds the others
    (``"rgb_array_list"``) itself.
    """

    def decorate(maker: Maker) -> Maker:
        maker.metadata = dict(metadata)  # type: ignore[attr-defined]
        return maker

    return decorate


def _channels_first(frame: Array) -> Array:
    return frame[None] if frame.ndim == 2 else np.moveaxis(frame, -1, 0)


def _flat_box(name: str, index: Any, space: spaces.Space[Any], kind: str) -> spaces.Box:
    """Return the space if it is a Box of vectors and `index` one of its dimensions."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise InputError(f"{name}: an index needs a flat Box as the {kind} space, got {space}")
    size = space.shape[0]
    if not isinstance(index, (int, np.integer)) or not -size <= index < size:
        raise InputError(
            f"{name}: expected an index of the {size} {kind} dimensions, got {index!r}"
        )
    return space
