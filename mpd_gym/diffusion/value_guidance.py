"""Guidance by the gradient of a value (Janner et al. 2022, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mpd_gym.diffusion.schedule import NoiseSchedule
from mpd_gym.errors import ConfigError, check_integer
from mpd_gym.types import Noise, Step

__all__ = ["Value", "ascend"]

Value = Callable[[Tensor, Tensor], Tensor]
"""``(τ^k [M, L, D], levels [1]) -> [M]``, differentiable."""


def ascend(
    step: Step,
    value: Value,
    schedule: NoiseSchedule,
    *,
    scale: float,
    num_ascents: int = 2,
    free_levels: int = 2,
    hold: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """Climb the value before each reverse step, by gradient times posterior variance.

    τ^k ← τ^k + scale · σ²_k ∇V(τ^k, k), `num_ascents` times, then `step`. With the value
    V = log E[exp(r) | τ^k] and small steps, one ascent of scale 1 samples the data's distribution
    times exp(r); more ascents multiply r.

    Args:
        step: Reverse step that follows the ascents.
        value: Predicts values from noisy trajectories.
        schedule: Noise schedule of both.
        scale: >= 0; 0 returns `step`.
        num_ascents: Ascents at each level.
        free_levels: Number of lowest levels without ascents.
        hold: Restores known entries after each ascent.

    Raises:
        ConfigError: If a number is out of range.
    """
    if not 0 <= scale < math.inf:
        raise ConfigError(f"scale: expected a finite value >= 0; got {scale}")
    check_integer("num_ascents", num_ascents, 1)
    check_integer("free_levels", free_levels, 0)
    if scale == 0:
        return step

    def guided(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        rate = scale * schedule.posterior(k, k_next).std ** 2
        if k > free_levels and rate > 0:
            for _ in range(num_ascents):
                trajectory = trajectory + rate * _gradient(value, trajectory, k)
                trajectory = trajectory if hold is None else hold(trajectory)
        return step(trajectory, k, k_next, noise)

    return guided


def _gradient(value: Value, trajectory: Tensor, k: int) -> Tensor:
    levels = torch.full((1,), k, dtype=torch.long, device=trajectory.device)
    with torch.enable_grad():
        point = trajectory.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(point, levels).sum(), point)
    return gradient
