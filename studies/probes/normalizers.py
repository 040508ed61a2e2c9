"""What one bad dimension of the data does to actions, for each normaliser.

Clones `PendulumSwingUp` on `Pendulum-v1` from 2,000 steps, one dimension of whose observations is
changed, with every normaliser and three training seeds. Prints how much of the normalised range the
middle 96 % of the dimension takes, and how far actions on 20 new episodes are from the policy's, as
a root mean square in N m (torques are within 2). A sensor that is dead in the data reads 0.001 more
on the new episodes.

Usage: ``python -m studies normalizers [--steps 1000] [--seeds 0 1 2]``
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

from mpd_gym.agents.behavior_cloning import BehaviorCloningAgent, BehaviorCloningConfig
from mpd_gym.collect.scripted import PendulumSwingUp
from mpd_gym.datasets import load_episodes
from mpd_gym.training import TrainingConfig
from mpd_gym.types import Array, Episode

KINDS = ("minmax", "gaussian", "cdf")
Change = Callable[[Array, np.random.Generator, bool], Array]  # rows [n, 3], whether they are new


def _beside(rows: Array, column: Array) -> Array:
    return np.column_stack([rows, column])


def _glitch(rows: Array, rng: np.random.Generator, new: bool) -> Array:
    rows = rows.astype(np.float64)
    if not new:
        rows[1234, 2] = 1e3
    return rows


def _heavy(rows: Array, rng: np.random.Generator, new: bool) -> Array:
    speed = rows[:, 2]
    return _beside(rows[:, :2], np.sign(speed) * np.expm1(np.abs(speed)))


DIMENSIONS: dict[str, Change] = {
    "as it is: speed": lambda rows, rng, new: rows,
    "one glitch of 1e3 in the speed": _glitch,
    "constant 5 added": lambda rows, rng, new: _beside(rows, np.full(len(rows), 5 + 1e-3 * new)),
    "float32 rounding of 5 added": lambda rows, rng, new: _beside(
        rows, (5 + 5e-7 * rng.integers(-1, 2, len(rows)) + 1e-3 * new).astype(np.float32)
    ),
    "5 ± 1e-7 in float64 added": lambda rows, rng, new: _beside(
        rows, 5 + 1e-7 * rng.normal(size=len(rows)) + 1e-3 * new
    ),
    "heavy-tailed: ±(exp of the speed - 1)": _heavy,
    "two-valued: sign of the speed added": lambda rows, rng, new: _beside(
        rows, np.sign(rows[:, 2])
    ),
}


def played(episodes: int, seed: int) -> list[Episode]:
    """Episodes of the controller."""
    policy, env = PendulumSwingUp(), gym.make("Pendulum-v1")
    found = []
    for number in range(episodes):
        x, rows, actions, rewards, ended = env.reset(seed=seed + number)[0], [], [], [], False
        rows.append(x)
        while not ended:
            action = policy.predict(x)[0]
            x, reward, _, ended, _ = env.step(action)
            rows.append(x)
            actions.append(action)
            rewards.append(reward)
        ends = np.arange(len(actions)) == len(actions) - 1
        found.append(
            Episode(np.array(rows), np.array(actions), np.array(rewards), 0 * ends > 0, ends)
        )
    return found


def changed(episodes: list[Episode], change: Change, new: bool) -> list[Episode]:
    """The same episodes with a changed dimension."""
    whole = change(
        np.concatenate([e.observations for e in episodes]), np.random.default_rng(0), new
    )
    parts = np.split(whole, np.cumsum([len(e) + 1 for e in episodes])[:-1])
    return [replace(e, observations=part) for e, part in zip(episodes, parts, strict=True)]


def measured(kind: str, change: Change, steps: int, seeds: list[int]) -> tuple[float, list[float]]:
    """Share of the range that the middle 96 % takes, and the error of actions for each seed."""
    known = changed(played(10, 0), change, new=False)
    fresh = changed(played(20, 1000), change, new=True)
    errors = []
    for seed in seeds:
        training = TrainingConfig(steps=steps, batch_size=128, learning_rate=1e-3, seed=seed)
        config = BehaviorCloningConfig(
            normalizer=kind,
            hidden=(64, 64),
            training=training,
            regressor_training=training,
            seed=seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the last column is about
            agent = BehaviorCloningAgent.fit(load_episodes(known), config, progress=False)
        gaps = [agent.predict(e.observations[:-1])[0] - e.actions for e in fresh]  # type: ignore[index]
        errors.append(float(np.sqrt(np.mean(np.square(np.concatenate(gaps))))))
    normalizer = agent.normalizers.observation
    column = np.concatenate([normalizer.normalize(np.asarray(e.observations)) for e in known])[
        :, -1
    ]
    low, high = np.quantile(column, (0.02, 0.98))
    return float((high - low) / max(np.ptp(column), 1e-300)), errors


def main() -> None:
    """Print one row for each dimension, two columns for each normaliser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    table = Table(
        "dimension", *(f"{kind}: {what}" for kind in KINDS for what in ("range", "error"))
    )
    for name, change in DIMENSIONS.items():
        cells = []
        for kind in KINDS:
            share, errors = measured(kind, change, given.steps, given.seeds)
            cells += [
                f"{share:.1%}",
                f"{np.mean(errors):.2f} ({min(errors):.2f}-{max(errors):.2f})",
            ]
        table.add_row(name, *cells)
    Console(width=160).print(table)
