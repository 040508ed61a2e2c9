"""Small environments and policies for the tests of recording and reading.

They live in a module of their own so that worker processes can import them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict

from mpd_gym.collect.record import Progress, record
from mpd_gym.errors import SolverError
from mpd_gym.types import Episode

LIMIT = 12
ENV, ID = "MpdTests/Marked-v0", "tests/marked-v0"
quiet = partial(record, progress=False)


class Marked(gym.Env):
    """Every number tells which episode and step it belongs to.

    Observation: (mark, t), with a mark drawn at reset. Reward t, cost 1 at odd steps. Terminates
    after a number of steps that depends on the mark, or is cut at `LIMIT`.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-2.0, 2.0, (1,), np.float32)

    def __init__(
        self, costs: bool = True, gain: Any = 1.0, nan_at: int = -1, rare: bool = False
    ) -> None:
        self.costs, self.gain, self.nan_at = costs, np.asarray(gain), nan_at
        self.rare = rare  # infos hold what occurs only where it does

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.mark = 0, float(self.np_random.integers(1, 1_000_000))
        self.end = int(self.np_random.integers(3, LIMIT + 8))
        return self.observe(), {}

    def observe(self) -> Any:
        value = np.nan if self.t == self.nan_at else self.t
        return np.array([self.mark, value], np.float32)

    def step(self, action: Any) -> Any:
        self.t += 1
        info = {"is_success": self.t >= 8}
        if self.rare:
            info = {8: {"is_success": True}, 9: {"cost": 3.0}}.get(self.t, {})
        elif self.costs:
            info["cost"] = float(self.t % 2)
        reward = float(self.t + self.gain.sum() * action[0])
        return self.observe(), reward, self.t >= self.end, False, info


class Nested(gym.ObservationWrapper):
    """`Marked` with nested Dict observations."""

    def __init__(self) -> None:
        super().__init__(Marked())
        part = Box(-np.inf, np.inf, (1,), np.float32)
        self.observation_space = Dict(
            {"observation": Marked.observation_space, "goals": Dict({"near": part, "far": part})}
        )

    def observation(self, observation: Any) -> Any:
        goals = {"near": observation[:1] + 1, "far": observation[:1] + 2}
        return {"observation": observation, "goals": goals}


class Frames(gym.Wrapper):
    """`Marked` seen through four stacked 8 × 8 frames; the state is in `info`."""

    def __init__(self) -> None:
        super().__init__(Marked())
        self.observation_space = Box(0, 255, (4, 8, 8), np.uint8)

    def reset(self, **kwargs: Any) -> Any:
        observation, info = self.env.reset(**kwargs)
        self.frames = [self.picture(observation)] * 4
        return np.stack(self.frames), {**info, "state": observation}

    def step(self, action: Any) -> Any:
        observation, *rest, info = self.env.step(action)
        self.frames = [*self.frames[1:], self.picture(observation)]
        return np.stack(self.frames), *rest, {**info, "state": observation}

    @staticmethod
    def picture(observation: Any) -> Any:
        pixels = np.arange(64).reshape(8, 8) * int(observation[1] + 1) + int(observation[0])
        return (pixels % 256).astype(np.uint8)


class Noisy:
    """Random actions; stateless between episodes, as `reseed` starts them."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def reseed(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        time.sleep(self.pause)
        return self.rng.uniform(-1.0, 1.0, 1), state


class Sometimes(Noisy):
    """Reports an unsolved step in about a third of the episodes, or raises SolverError."""

    def __init__(self, share: float = 0.33, raises: bool = False) -> None:
        super().__init__()
        self.share, self.raises = share, raises

    def reseed(self, seed: int) -> None:
        super().reseed(seed)
        self.fails = self.rng.random() < self.share

    def predict(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        action, _ = super().predict(*args, **kwargs)
        if self.fails and self.raises:
            raise SolverError("no step found")
        return action, {"solved": np.array([not self.fails])}


class Fixed:
    """One given action."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def predict(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.action, None


def make_noisy() -> Noisy:
    return Noisy()


def make_slow() -> Noisy:
    return Noisy(pause=0.005)


def short(episode: Any) -> bool:
    return len(episode) < 9


def state_of(observation: Any, info: Any) -> Any:
    return info["state"]


class Watch(Noisy):
    """Writes down what it is shown."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        with open(self.path, "a", encoding="utf-8") as file:
            print(np.shape(observation), file=file)
        return super().predict(observation, *args, **kwargs)


for name in ("Marked", "Nested", "Frames"):
    gym.register(f"MpdTests/{name}-v0", f"recorders:{name}", max_episode_steps=LIMIT)


class Interrupt(Exception):
    pass


def stop_after(number: int) -> Any:
    def on_stored(now: Progress) -> None:
        if now.stored >= number:
            raise Interrupt

    return on_stored


def assert_same(left: Any, right: Any) -> None:
    assert [len(a) for a in left] == [len(b) for b in right]
    for a, b in zip(left, right, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def an_episode(length: int = 5, **changes: Any) -> Episode:
    rows = np.arange(length + 1, dtype=np.float32)
    ends = np.arange(length) == length - 1
    episode = Episode(
        observations=np.stack((rows, rows + 1), axis=1),
        actions=np.zeros((length, 1), np.float32),
        rewards=np.arange(length, dtype=np.float64),
        terminations=ends,
        truncations=np.zeros(length, bool),
        costs=np.ones(length),
    )
    return replace(episode, **changes)
