"""Linear denoisers, exact denoisers of Gaussian data, and steps by hand, for several test files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpd_gym.diffusion.composition import (
    Parts,
)
from mpd_gym.diffusion.samplers import (
    Move,
    ddpm_posterior,
)
from mpd_gym.diffusion.schedule import NoiseSchedule, make_schedule
from mpd_gym.types import Array, Denoiser

H, NX, NU = 2, 2, 1
D = NX + NU
SCHEDULE = make_schedule("cosine", 12)
RNG = np.random.default_rng(0)
PLANNER = 0.4 * RNG.normal(size=(H * D, H * D)), 0.2 * RNG.normal(size=H * D)
DYNAMICS = 0.4 * RNG.normal(size=(H * NX, H * D)), 0.2 * RNG.normal(size=H * NX)


def linear(weights: tuple[Array, Array], columns: int, *, scale: float = 0.05) -> Denoiser:
    """x̂_0 = (1 + scale · k) W τ + w on flattened trajectories."""
    matrix, offset = (torch.from_numpy(weight) for weight in weights)

    def denoise(trajectory: Tensor, k: int) -> Tensor:
        flat = (1 + scale * k) * trajectory.flatten(1) @ matrix.T + offset
        return flat.reshape(-1, H, columns)

    return denoise


def by_hand(weights: tuple[Array, Array], columns: int, trajectory: Array, k: int) -> Array:
    matrix, offset = weights
    rows = [(1 + 0.05 * k) * (matrix @ row.reshape(-1)) + offset for row in trajectory]
    return np.array(rows).reshape(-1, H, columns)


def parts(move: Move = ddpm_posterior, temperature: float = 1.0) -> Parts:
    return Parts(linear(PLANNER, D), linear(DYNAMICS, NX), SCHEDULE, NX, move, temperature)


def hand_move(noisy: Array, clean: Array, k: int, k_next: int, eta: float | None) -> Any:
    """Mean and standard deviation, from the textbook formulas; eta None is DDPM."""
    far, near = SCHEDULE.alphas_bar[k], SCHEDULE.alphas_bar[k_next]
    alpha = far / near
    beta = 1 - alpha
    variance = beta * (1 - near) / (1 - far)
    if eta is None:
        mean = near**0.5 * beta / (1 - far) * clean + alpha**0.5 * (1 - near) / (1 - far) * noisy
        return mean, variance**0.5
    epsilon = (noisy - far**0.5 * clean) / (1 - far) ** 0.5
    std = eta * variance**0.5
    return near**0.5 * clean + (1 - near - std**2) ** 0.5 * epsilon, std


def hand_step(
    name: str,
    trajectory: Array,
    k: int,
    k_next: int,
    draws: list[Array],
    *,
    eta: float | None,
    temperature: float,
    weight: float,
) -> Array:
    """One step of a composition; `draws` are its standard normal tensors in order."""
    states, actions = trajectory[..., :NX], trajectory[..., NX:]
    root = temperature**0.5
    clean_states = by_hand(DYNAMICS, NX, trajectory, k)
    if name == "combined_score":
        clean = by_hand(PLANNER, D, trajectory, k)
        clean[..., :NX] = weight * clean_states + (1 - weight) * clean[..., :NX]
    else:
        if name.startswith("alternating"):
            moved, spread = hand_move(states, clean_states, k, k_next, eta)
            alpha = SCHEDULE.alphas_bar[k] / SCHEDULE.alphas_bar[k_next]
            if name == "alternating_matched":
                moved = alpha**0.5 * moved + root * (1 - alpha) ** 0.5 * draws.pop(0)[..., :NX]
            if name == "alternating_resampled":
                total = (1 - alpha + alpha * spread**2) ** 0.5
                moved = alpha**0.5 * moved + root * total * draws.pop(0)[..., :NX]
            trajectory = np.concatenate([moved, actions], axis=-1)
        if name == "planner_resampled":
            moved, spread = hand_move(
                trajectory, by_hand(PLANNER, D, trajectory, k), k, k_next, eta
            )
            alpha = SCHEDULE.alphas_bar[k] / SCHEDULE.alphas_bar[k_next]
            total = (1 - alpha + alpha * spread**2) ** 0.5
            trajectory = alpha**0.5 * moved + root * total * draws.pop(0)
        clean = by_hand(PLANNER, D, trajectory, k)
    mean, std = hand_move(trajectory, clean, k, k_next, eta)
    moved = mean + root * std * draws.pop(0) if std > 0 else mean
    return np.asarray(moved)


def waves(count: int, rows: int = 3) -> list[Array]:
    """Reproducible numbers of the size of noise, independent of any library's generator."""
    index = np.arange(count * rows * H * D, dtype=float)
    return list((1.5 * np.sin(index * index + 0.3)).reshape(count, rows, H, D))


FACTOR = np.array([[0.7, 0, 0], [0.4, 0.3, 0], [-0.3, 0.2, 0.5]])
COVARIANCE = FACTOR @ FACTOR.T  # of one row: two states, one action


def exact(schedule: NoiseSchedule, columns: int) -> Denoiser:
    """E[τ^0 | τ^k] for rows of τ^0 ~ N(0, COVARIANCE), the first `columns` of it."""

    def denoise(trajectory: Tensor, k: int) -> Tensor:
        kept = schedule.alphas_bar[k]
        gain = (
            np.sqrt(kept) * COVARIANCE @ np.linalg.inv(kept * COVARIANCE + (1 - kept) * np.eye(3))
        )
        return trajectory @ torch.from_numpy(gain[:columns].T)

    return denoise
