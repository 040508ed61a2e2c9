"""Random driving that avoids walls, as data for a dynamics model of the car."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import numpy as np
from scipy.special import ndtri

from mpd_gym.collect.scripted import SmoothRandom
from mpd_gym.envs.car_model import DEFAULT, CarUMazeParameters, collides, drive
from mpd_gym.errors import ConfigError, check_integer
from mpd_gym.types import Array, BoolArray

__all__ = ["RandomDriver"]


@final
class RandomDriver:
    """Smooth random actions for `CarUMaze-v0`, replaced where the car could not stop in time.

    Unchecked random actions end in a wall after about nine steps, which is shorter than a usual
    horizon. This policy takes an action only if the car can brake to a stop after it without
    touching a wall. Otherwise it takes the first of some uniform actions that pass this test, or
    brakes fully if none does. Braking was possible one step earlier, so it always is: a car that
    starts at rest never collides.

    `state` and `reseed` are as in `mpd_gym.collect.scripted.SmoothRandom`.

    Args:
        env: `CarUMaze-v0`, for its spaces and parameters.
        correlation: Correlation of successive actions, in [0, 1).
        proposals: Number of uniform actions to try, at least 1.
        seed: Seed of the random numbers.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(
        self, env: Any, *, correlation: float = 0.9, proposals: int = 16, seed: int = 0
    ) -> None:
        check_integer("proposals", proposals, 1)
        parameters = getattr(env.unwrapped, "parameters", None)
        if not isinstance(parameters, CarUMazeParameters):
            raise ConfigError(f"env: expected CarUMaze-v0, got {env}")
        self._parameters = parameters
        self._smooth = SmoothRandom(
            env.action_space, env.observation_space, correlation=correlation, seed=seed
        )
        self._proposals = proposals
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Start the random numbers of an episode."""
        self._smooth.reseed(seed)
        self._rng = np.random.default_rng([seed, 1])

    def predict(
        self,
        observation: Mapping[str, Array],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, Array]:
        """Return the next action and the state of the smooth random numbers; see `Policy`.

        Raises:
            InputError: If the arguments do not match.
        """
        actions, z = self._smooth.predict(observation, state, episode_start, deterministic)
        single = actions.ndim == 1
        cars = np.atleast_2d(np.asarray(observation["observation"], float))
        chosen, z = np.atleast_2d(actions).astype(float), z.copy()
        for row in np.flatnonzero(~self._can_stop(cars, chosen)):
            chosen[row] = self._another(cars[row])
            low, high = self._smooth.action_space.low, self._smooth.action_space.high
            share = np.clip((chosen[row] - low) / (high - low), 1e-3, 1 - 1e-3)
            z[row] = ndtri(share)  # so that the next action follows on this one
        chosen = chosen.astype(actions.dtype)
        return chosen[0] if single else chosen, z

    def _another(self, car: Array) -> Array:
        box = self._smooth.action_space
        tries = self._rng.uniform(box.low, box.high, (self._proposals, 2))
        fine = self._can_stop(np.broadcast_to(car, (self._proposals, 5)), tries)
        best: Array = tries[fine.argmax()] if fine.any() else _brake(car[None], self._parameters)[0]
        return best

    def _can_stop(self, cars: Array, actions: Array) -> BoolArray:
        """Whether the car touches no wall in the step and while it brakes to a stop."""
        parameters = self._parameters
        slowing = parameters.max_acceleration * parameters.dt
        fine = np.ones(len(cars), bool)
        for _ in range(1 + math.ceil(parameters.max_speed / slowing)):
            for parts in drive(tuple(cars.T), tuple(actions.T), parameters):
                cars = np.stack(parts, axis=-1)
                fine &= ~collides(cars, parameters)
            actions = _brake(cars, parameters)
        return fine


def _brake(cars: Array, parameters: CarUMazeParameters = DEFAULT) -> Array:
    """Return actions ``[n, 2]`` that stop as fast as possible and hold the wheels."""
    limit = parameters.max_acceleration
    slowing = np.clip(-cars[:, 3] / parameters.dt, -limit, limit)
    return np.stack([slowing, np.zeros(len(cars))], axis=-1)
