"""How soon the plans of car agents answer when the car is moved aside.

States of recorded drives, from the second half of the expert's data set, are moved 0.3 m to either
side. Printed, per metre and averaged: how much of it is left in the planned states after 1, 2, 4
and 8 steps, and how much the executed steering rates 0 to 4 change.

Usage: ``python benchmarks/displaced.py AGENT...``
"""

from __future__ import annotations

import platform
import sys
from typing import Any

import numpy as np
import torch

from mpd_gym import load_agent
from mpd_gym.datasets import load_episodes
from mpd_gym.types import Array

DATA = "mpd_gym/car-umaze/expert-v0"
STATES, ASIDE = 128, 0.3  # m
FIRST, LAST = 4, 16  # steps of a drive
STEPS = (1, 2, 4, 8)


def main() -> None:
    """Draw states, plan from them and beside them, and print the answers."""
    torch.set_num_threads(1)
    data, rng = load_episodes(DATA), np.random.default_rng(0)
    episodes = [data.episode(int(one)) for one in rng.integers(len(data) // 2, len(data), STATES)]
    drawn = list(zip(episodes, rng.integers(FIRST, LAST, STATES), strict=True))
    states = np.stack([one.observations["observation"][step] for one, step in drawn])
    goals = np.stack([one.observations["desired_goal"][step] for one, step in drawn])
    print(f"{STATES} states, ±{ASIDE} m, {platform.machine()}, {torch.__version__}")
    for file in sys.argv[1:]:
        agent = load_agent(file, "cpu", num_candidates=1, samples_per_candidate=1, num_steps=10,
                           temperature=0.01, guidance_scale=1.0)  # fmt: skip
        left, steering = _answers(agent, states, goals)
        shown = ", ".join(f"{left[step - 1]:.2f}" for step in STEPS)
        rates = ", ".join(f"{one:+.2f}" for one in steering[:5])
        print(f"{file}: left after {STEPS} steps {shown}; steering rates 0 to 4 {rates} rad/s")


def _answers(agent: Any, states: Array, goals: Array) -> tuple[Array, Array]:
    """Displacement left in x_1 … x_H, and change of the steering rates, per metre."""
    aside = np.stack([-np.sin(states[:, 2]), np.cos(states[:, 2])], axis=-1)
    (base, still), *moved = (_plan(agent, states, goals, aside * by) for by in (0, -ASIDE, ASIDE))
    left, steering = [], []
    for by, (planned, actions) in zip((-ASIDE, ASIDE), moved, strict=True):
        across = ((planned - base)[..., :2] * aside[:, None]).sum(axis=-1)
        left.append(across.mean(axis=0) / by)
        steering.append((actions - still)[..., 1].mean(axis=0) / by)
    return np.mean(left, axis=0), np.mean(steering, axis=0)


def _plan(agent: Any, states: Array, goals: Array, by: Array) -> tuple[Array, Array]:
    moved = states.copy()
    moved[:, :2] += by
    observation = {
        "observation": moved.astype(np.float32),
        "achieved_goal": moved[:, :2].astype(np.float32),
        "desired_goal": goals.astype(np.float32),
    }
    _, state = agent.predict(observation, deterministic=True)
    plans: tuple[Array, Array] = agent.planned(state)
    return plans


if __name__ == "__main__":
    main()
