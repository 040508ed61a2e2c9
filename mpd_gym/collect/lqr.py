"""Linear state feedback with occasional input noise, for the data of the LQR study."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike

from mpd_gym.collect.scripted import clip_to_box, observation_rows
from mpd_gym.errors import ConfigError
from mpd_gym.types import Array

__all__ = ["NoisyLQR"]


@final
class NoisyLQR:
    """u = Kx + d·w with d ~ Bernoulli(p) and w ~ N(0, σ²I), independent over time.

    Source: the MPDiffuser paper, eq. 5, where σ = 0.25. Each step draws one d for all inputs. A
    recorder calls `reseed` before each episode (see `mpd_gym.collect.scripted`).

    Args:
        gain: K with its minus sign, ``[nu, nx]``.
        probability: p of a noisy step, in [0, 1].
        noise_std: σ, in units of the action.
        action_space: Box that clips actions and gives their dtype; None leaves them unclipped, in
            float64.
        seed: Seed of the generator.

    Raises:
        ConfigError: If an argument is out of range or the shapes do not match.
    """

    def __init__(
        self,
        gain: ArrayLike,
        probability: float,
        noise_std: float = 0.25,
        *,
        action_space: spaces.Box | None = None,
        seed: int = 0,
    ) -> None:
        self.gain = np.array(gain, dtype=np.float64)
        if self.gain.ndim != 2 or not np.isfinite(self.gain).all():
            raise ConfigError(f"gain: expected a finite matrix [nu, nx], got {gain!r}")
        if not 0.0 <= probability <= 1.0:
            raise ConfigError(f"probability: expected a number in [0, 1], got {probability}")
        if not (np.isfinite(noise_std) and noise_std >= 0.0):
            raise ConfigError(f"noise_std: expected a number >= 0, got {noise_std}")
        if action_space is not None and action_space.shape != self.gain.shape[:1]:
            raise ConfigError(
                f"action_space: expected shape {self.gain.shape[:1]} to match gain "
                f"{self.gain.shape}, got {action_space.shape}"
            )
        self.probability = probability
        self.noise_std = noise_std
        self.action_space = action_space
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the random numbers of an episode."""
        self._rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, Any]:
        """Return the action for x ``[nx]`` or ``[n, nx]``, and `state` unchanged; see `Policy`.

        Raises:
            InputError: If `observation` has another shape or is not finite.
        """
        rows, single = observation_rows(observation, self.gain.shape[1])
        actions = rows @ self.gain.T
        if not deterministic:
            noisy = self._rng.random((len(rows), 1)) < self.probability
            actions = actions + noisy * self._rng.normal(0.0, self.noise_std, actions.shape)
        if self.action_space is not None:
            actions = clip_to_box(actions, self.action_space)
        return actions[0] if single else actions, state
