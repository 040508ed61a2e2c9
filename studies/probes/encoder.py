"""What the latents of an image encoder hold.

Plays episodes of ImagePendulum-v0 that the encoder never saw, half swung up by a controller, half
driven by smooth random torques. Reads angle and velocity from the latents, by ridge regression on
the latents alone and on them and their products, fitted on other episodes; redraws the frames; and
predicts the next latents. First stacks, which repeat a frame, are left out.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import mpd_gym  # noqa: F401 - registers the environments
from mpd_gym.collect.scripted import PendulumSwingUp, SmoothRandom
from mpd_gym.latent import ImageEncoder
from mpd_gym.types import Array

STEPS = 200
FITTED, TESTED = range(5000, 5040), range(9000, 9020)  # seeds of the episodes
LEAD = 3  # observations until all frames of a stack differ
RIDGE = 1e-4


@dataclass(frozen=True)
class Rollout:
    """An episode: stacks, states and latents have a row more than actions."""

    stacks: Array
    states: Array
    actions: Array
    latents: Array


def play(encoder: ImageEncoder, seed: int) -> Rollout:
    env = gym.make("ImagePendulum-v0")
    random = SmoothRandom(env.action_space, env.observation_space, seed=seed)
    swing_up = PendulumSwingUp()
    observation, info = env.reset(seed=seed)
    stacks, states, actions, memory = [observation], [info["state"]], [], None
    for _ in range(STEPS):
        angle, velocity = states[-1]
        if seed % 2:
            action, memory = random.predict(observation, memory)
        else:
            action, _ = swing_up.predict(np.array([np.cos(angle), np.sin(angle), velocity]))
        observation, *_, info = env.step(action)
        stacks.append(observation)
        states.append(info["state"])
        actions.append(action)
    seen, moves = np.stack(stacks)[LEAD:], np.stack(actions)[LEAD:]
    return Rollout(seen, np.stack(states)[LEAD:], moves, encoder.encode(seen))


def readout(fitted: list[Rollout], tested: list[Rollout], products: bool) -> tuple[float, float]:
    """Root mean square errors of angle, rad, and velocity, rad/s."""

    def inputs(rollouts: list[Rollout]) -> Array:
        rows = np.concatenate([rollout.latents for rollout in rollouts]).astype(float)
        i, j = np.triu_indices(rows.shape[1])
        parts = [np.ones((len(rows), 1)), rows, *([rows[:, i] * rows[:, j]] if products else [])]
        return np.concatenate(parts, axis=1)

    def targets(rollouts: list[Rollout]) -> Array:
        states = np.concatenate([rollout.states for rollout in rollouts])
        return np.stack([np.cos(states[:, 0]), np.sin(states[:, 0]), states[:, 1]], axis=1)

    x, y = inputs(fitted), targets(fitted)
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
    found, true = inputs(tested) @ weights, targets(tested)
    error = np.arctan2(found[:, 1], found[:, 0]) - np.arctan2(true[:, 1], true[:, 0])
    error = (error + np.pi) % (2 * np.pi) - np.pi
    return _rms(error), _rms(found[:, 2] - true[:, 2])


def redrawn(encoder: ImageEncoder, tested: list[Rollout]) -> tuple[float, float]:
    """Root mean square error of the pixels, of 255, and its share of their variance."""
    stacks = np.concatenate([rollout.stacks for rollout in tested])[::7]
    latents = np.concatenate([rollout.latents for rollout in tested])[::7]
    error = encoder.decode(latents).astype(float) - stacks
    return _rms(error), float(np.square(error).mean() / np.square(stacks - stacks.mean(0)).mean())


def predicted(encoder: ImageEncoder, tested: list[Rollout]) -> float:
    """Share of the latents' motion in a step that the latent dynamics miss."""
    missed = moved = 0.0
    for rollout in tested:
        now, after = rollout.latents[:-1], rollout.latents[1:]
        actions = torch.as_tensor(rollout.actions, dtype=torch.float32)
        guess = encoder.model.predict(torch.as_tensor(now), actions).numpy()
        missed += float(np.square(guess - after).sum())
        moved += float(np.square(after - now).sum())
    return missed / moved


def _rms(error: Any) -> float:
    return float(np.sqrt(np.square(error).mean()))


def main() -> None:
    """Print what each test finds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", nargs="?", default="ImagePendulum-v0")
    torch.set_num_threads(1)
    encoder = ImageEncoder.load(parser.parse_args().encoder)
    fitted = [play(encoder, seed) for seed in FITTED]
    tested = [play(encoder, seed) for seed in TESTED]
    velocities = np.concatenate([rollout.states[:, 1] for rollout in tested])
    print(f"standard deviation of the velocity: {velocities.std():.2f} rad/s")
    for products, name in ((False, "latents"), (True, "latents and their products")):
        angle, velocity = readout(fitted, tested, products)
        print(f"read from {name}: angle {angle:.4f} rad, velocity {velocity:.3f} rad/s (RMS)")
    pixels, share = redrawn(encoder, tested)
    print(f"redrawn frames: {pixels:.1f} of 255 (RMS), {100 * share:.1f} % of the variance")
    print(f"next latents: {100 * predicted(encoder, tested):.2f} % of the motion missed")
