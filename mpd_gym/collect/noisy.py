"""Any policy with smooth errors in its actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from mpd_gym.collect.scripted import SmoothRandom, clip_to_box
from mpd_gym.errors import ConfigError
from mpd_gym.types import Array, Policy

__all__ = ["NoisyPolicy", "NoisyState"]


@dataclass(frozen=True)
class NoisyState:
    """State of `NoisyPolicy` between steps.

    Attributes:
        policy: State of the policy itself.
        z: State of the smooth random numbers, see `SmoothRandom`.
    """

    policy: Any
    z: Array

    @property
    def solved(self) -> Any:
        """Whether the policy's solver succeeded; None without a solver."""
        return getattr(self.policy, "solved", None)


@final
class NoisyPolicy:
    """A policy with smooth random errors in its actions, which it may correct later.

    Each action gets a share of an action of `SmoothRandom`, so the error is uniform and changes
    smoothly; the sum is clipped to the bounds. Such data surround the policy's own behaviour.

    Args:
        policy: Policy that acts.
        env: Its environment, with a bounded Box of actions.
        noise: Size of the errors as a share of the range of actions, at least 0.
        correlation: Correlation of successive errors, in [0, 1).
        seed: Seed of the random numbers.

    Raises:
        ConfigError: If an argument is out of range, or the action space is no bounded Box.
    """

    def __init__(
        self, policy: Policy, env: Any, *, noise: float, correlation: float = 0.9, seed: int = 0
    ) -> None:
        if not (np.isfinite(noise) and noise >= 0.0):
            raise ConfigError(f"noise: expected a number >= 0, got {noise}")
        self.policy, self.noise = policy, noise
        self._smooth = SmoothRandom(
            env.action_space, env.observation_space, correlation=correlation, seed=seed
        )
        box = self._smooth.action_space
        self._middle = (box.low.astype(np.float64) + box.high) / 2

    def reseed(self, seed: int) -> None:
        """Start the random numbers of an episode."""
        self._smooth.reseed(seed)
        reseed: Any = getattr(self.policy, "reseed", None)
        if reseed is not None:
            reseed(seed ^ 1)  # or both would draw the same numbers

    def predict(
        self,
        observation: Any,
        state: NoisyState | None = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, NoisyState]:
        """Return the policy's action with an error, or without if `deterministic`; see `Policy`.

        Raises:
            InputError: If the arguments do not match.
        """
        inner, z = (None, None) if state is None else (state.policy, state.z)
        drawn, z = self._smooth.predict(observation, z, episode_start)
        actions, inner = self.policy.predict(observation, inner, episode_start, deterministic)
        if not deterministic:
            errors = self.noise * (drawn - self._middle)
            actions = clip_to_box(actions + errors, self._smooth.action_space)
        return actions, NoisyState(inner, z)
