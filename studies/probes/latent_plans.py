"""Whether plans made from pictures are possible.

Latents of plans are decoded, and the rod's angle is read from the pictures. The pendulum turns by
0.4 rad in a step at most; a plan that turns further between two steps jumps.
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np

import mpd_gym  # noqa: F401 - registers the environments
from mpd_gym import MPDiffuserAgent
from mpd_gym.types import Array

ENV_ID = "LatentPendulum-v0"
FIRST_START, STARTS = 100_000, 40
HIGHEST_TURN = 8.0 * 0.05  # rad per step
TOLERANCE = 0.2  # rad, of angles read from decoded pictures
ANGLES = (0.5, 1.5, 2.5, 3.1)  # rad from upright, at rest


def read_angles(frames: Array) -> Array:
    """Angle of the rod in pictures ``[…, S, S]``, rad in [-π, π), 0 upright, left positive."""
    size = frames.shape[-1]
    places = np.arange(size) - (size - 1) / 2
    weights = frames / np.maximum(frames.sum((-2, -1), keepdims=True), 1)
    right, down = (weights * places).sum((-2, -1)), (weights * places[:, None]).sum((-2, -1))
    angles: Array = np.arctan2(-right, -down)
    return angles


def main() -> None:
    """Print, for each way of sampling and each start, how many plans jump, and where they end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("agent", nargs="?", default=ENV_ID)
    parser.add_argument("--temperature", type=float)
    given = parser.parse_args()
    agent = MPDiffuserAgent.load(given.agent)
    if given.temperature is not None:
        agent = agent.with_options(temperature=given.temperature)
    encoder = agent.encoder
    assert encoder is not None, "the agent plans from pictures"
    env = gym.make(ENV_ID)
    print(
        f"{STARTS} plans from rest at each angle, jumps beyond {HIGHEST_TURN + TOLERANCE:.1f} rad"
    )
    print("composition          guidance  " + "  ".join(f"{angle:>14.1f}" for angle in ANGLES))
    for composition in ("alternating_matched", "planner_only"):
        for guidance in (0.0, 1.0, 1.5):
            told = []
            for angle in ANGLES:
                sampler = agent.with_options(composition=composition, guidance_scale=guidance)
                plans = []
                for seed in range(FIRST_START, FIRST_START + STARTS):
                    sign = 1 if seed % 2 else -1
                    state = {"state": [sign * angle, 0.0]}
                    latent, _ = env.reset(seed=seed, options=state)
                    plan = sampler.plan(latent)
                    plans.append(np.concatenate([latent[None], plan.observations[plan.chosen]]))
                angles = read_angles(encoder.decode(np.stack(plans))[:, :, -1].astype(float))
                turns = np.abs((np.diff(angles, axis=1) + np.pi) % (2 * np.pi) - np.pi)
                jumps = (turns > HIGHEST_TURN + TOLERANCE).any(axis=1).mean()
                upright = (np.abs(angles[:, -1]) < 0.3).mean()
                told.append(f"{100 * jumps:3.0f} % ({100 * upright:3.0f} %)")
            print(f"{composition:20s} {guidance:8.1f}  " + "  ".join(f"{one:>14s}" for one in told))
    print("plans with a jump (plans that end within 0.3 rad of upright)")
