"""The demonstration: every environment under a simple controller, as GIFs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from mpd_gym.collect.lqr import NoisyLQR
from mpd_gym.collect.scripted import PendulumSwingUp, SmoothRandom
from mpd_gym.evaluation import Evaluation, evaluate
from mpd_gym.reports import rollout_frames, save_gif
from mpd_gym.types import Array, Policy

__all__ = ["SCENES", "Scene", "run_demo"]


@final
@dataclass(frozen=True)
class Scene:
    """One environment of the demonstration.

    Attributes:
        env_id: Registered id.
        controller: What acts, in words.
        make: Makes the controller for an environment.
    """

    env_id: str
    controller: str
    make: Callable[[gym.Env[Any, Any]], Policy]


def _lqr(env: gym.Env[Any, Any]) -> Policy:
    inner: Any = env.unwrapped
    return NoisyLQR(inner.optimal_gain, 0.2, action_space=inner.action_space)


def _nmpc(env: gym.Env[Any, Any]) -> Policy:
    from mpd_gym.collect.nmpc import NMPC

    return NMPC()


def _smooth(env: gym.Env[Any, Any]) -> Policy:
    return SmoothRandom(env.action_space, env.observation_space)


SCENES = (
    Scene("CarUMaze-v0", "nonlinear MPC", _nmpc),
    Scene("ConstrainedPendulum-v0", "energy shaping", lambda _: PendulumSwingUp(6.5)),
    Scene("LQR-v0", "optimal gain with noise", _lqr),
    Scene("ImagePendulum-v0", "smooth random actions", _smooth),
    Scene("Walker2dTorqueDefect-v0", "smooth random actions", _smooth),
)


def run_demo(folder: Path, *, episodes: int = 5, max_frames: int = 120) -> dict[str, Evaluation]:
    """Play every environment, and leave a GIF of each.

    Args:
        folder: Where the GIFs go.
        episodes: Episodes that each controller is measured on, with seeds 0, 1, ….
        max_frames: Pictures of each GIF at most.

    Returns:
        Environment and controller to its measures.
    """
    results: dict[str, Evaluation] = {}
    for scene in tqdm(SCENES, desc="demo", unit="environment"):
        env = gym.make(scene.env_id)
        policy = scene.make(env)
        env.close()
        results[f"{scene.env_id}\n{scene.controller}"] = evaluate(
            policy, scene.env_id, seeds=range(episodes)
        )
        frames = rollout_frames(policy, scene.env_id, seed=0, max_frames=max_frames)
        save_gif([_small(frame) for frame in frames], folder / f"{scene.env_id}.gif")
    return results


def _small(frame: Array) -> Array:
    """Halve a picture by averaging 2×2 pixels, so that GIFs stay small."""
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    blocks = frame[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
    return np.asarray(blocks.mean(axis=(1, 3)).round().astype(np.uint8))
