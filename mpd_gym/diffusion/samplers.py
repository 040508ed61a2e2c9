"""Reverse moves of DDPM, DDIM and DPM-Solver++, and the one loop that runs them.

A move is a function of (τ^k, x̂_0, k, k_next, schedule) that returns mean and standard deviation of
τ^{k_next}; it acts on each entry alone, so it moves states or actions just as whole trajectories.
A composition turns moves and denoisers into a step; `sample` runs the steps. Temperature is a
factor on every variance: that of the start and of every draw.

DPM-Solver++ (2M) is DDIM with x̂_0 extrapolated from the last two predictions. What it remembers
belongs to a denoiser, not to a move: `with_history` binds it to one denoiser and one reverse pass,
so that every composition works with it as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mpd_gym.diffusion.schedule import MIN_LOG_RATIO, NoiseSchedule
from mpd_gym.errors import ConfigError, check_choice
from mpd_gym.types import Denoiser, Noise, Step

__all__ = [
    "SAMPLERS",
    "Move",
    "Sampler",
    "ddim_move",
    "ddpm_posterior",
    "draw",
    "make_move",
    "multistep",
    "noise_to_level",
    "normal_noise",
    "sample",
    "start_noise",
    "with_history",
]

Move = Callable[[Tensor, Tensor, int, int, NoiseSchedule], tuple[Tensor, float]]


def ddpm_posterior(
    noisy: Tensor, clean: Tensor, k: int, k_next: int, schedule: NoiseSchedule
) -> tuple[Tensor, float]:
    """Posterior of level k_next given level k and the predicted clean trajectory (Ho et al. 2020).

    Args:
        noisy: τ^k, any shape.
        clean: x̂_0, same shape.
        k: Current level, 1 … K.
        k_next: Next level, 0 … k − 1; levels may be skipped.
        schedule: Noise schedule.

    Returns:
        Mean, and standard deviation; 0 when k_next is 0.
    """
    posterior = schedule.posterior(k, k_next)
    return posterior.clean * clean + posterior.noisy * noisy, posterior.std


def ddim_move(
    noisy: Tensor, clean: Tensor, k: int, k_next: int, schedule: NoiseSchedule, *, eta: float = 0.0
) -> tuple[Tensor, float]:
    """Move along the direction of the predicted noise (Song et al. 2021, eq. 12 and 16).

    The noise is derived from `noisy` and `clean`, so that it agrees with a clean trajectory that
    was clipped or replaced after the network's prediction.

    Args:
        noisy: τ^k, any shape.
        clean: x̂_0, same shape.
        k: Current level, 1 … K.
        k_next: Next level, 0 … k − 1.
        schedule: Noise schedule.
        eta: Stochasticity in [0, 1]. 0 is deterministic; at 1 mean and standard deviation are
            those of `ddpm_posterior`, whose variance is that of the posterior, β̃.

    Returns:
        Mean, and standard deviation.
    """
    std = eta * schedule.posterior(k, k_next).std
    noise = (noisy - schedule.signal(k) * clean) / schedule.noise(k)
    direction = math.sqrt(max(schedule.noise(k_next) ** 2 - std**2, 0.0))
    return schedule.signal(k_next) * clean + direction * noise, std


def multistep(denoiser: Denoiser, levels: Sequence[int], schedule: NoiseSchedule) -> Denoiser:
    """Extrapolate x̂_0 to the middle of the coming move (DPM-Solver++ 2M, Lu et al. 2022).

    In λ = log(√ᾱ / √(1 − ᾱ)), with h the length of the coming move and h' that of the last, the
    result is x̂_0 + h / (2 h') (x̂_0 − x̂_0'). Given to `ddim_move` with eta 0 this is Algorithm 2 of
    the paper, of second order; with eta 1 it is the multistep solver of the SDE. Of first order,
    with x̂_0 itself, are the first move, the one to level 0, where h is infinite, and any whose last
    level was not predicted or lies below `MIN_LOG_RATIO`: the guess made there must not be
    extrapolated.

    Made anew for each reverse pass, it never mixes plans, environments or threads.

    Args:
        denoiser: Predicts x̂_0, clipped; of several calls at one level the last is remembered.
        levels: Levels of this pass, falling; 0 follows the last.
        schedule: Noise schedule.

    Returns:
        Denoiser for this pass. What it returns may leave the range that x̂_0 is clipped to.
    """
    factors = _extrapolation(levels, schedule)
    seen: dict[int, Tensor] = {}

    def denoise(trajectory: Tensor, k: int) -> Tensor:
        nonlocal seen
        clean = denoiser(trajectory, k)
        before, factor = factors.get(k, (k, 0.0))
        if before == k or before not in seen:
            seen = {k: clean}
            return clean
        seen = {k: clean, before: seen[before]}
        return clean + factor * (clean - seen[before])

    return denoise


def _extrapolation(levels: Sequence[int], schedule: NoiseSchedule) -> dict[int, tuple[int, float]]:
    """By level the one before it and h / (2 h'), where the move from it is of second order."""
    ratios = [schedule.log_ratio(k) for k in levels]
    gaps = [after - before for before, after in pairwise(ratios)]
    return {
        k: (before, coming / (2 * gone))
        for before, k, gone, coming in zip(levels, levels[1:], gaps, gaps[1:], strict=False)
        if schedule.log_ratio(before) >= MIN_LOG_RATIO
    }


class Sampler(NamedTuple):
    """One row of `SAMPLERS`.

    Attributes:
        move: From eta in [0, 1] to the move.
        history: Makes the denoiser of one reverse pass, which may remember its predictions; None
            takes the denoiser as it is.
        spacing: Name in `SPACINGS` of the levels that suit it where levels are skipped.
    """

    move: Callable[[float], Move]
    history: Callable[[Denoiser, Sequence[int], NoiseSchedule], Denoiser] | None = None
    spacing: str = "even"


def _ddim(eta: float) -> Move:
    return functools.partial(ddim_move, eta=eta)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(lambda eta: ddpm_posterior),
    "ddim": Sampler(_ddim),
    "dpm++": Sampler(_ddim, history=multistep, spacing="log_snr"),
}
"""Samplers by name."""


def make_move(name: str, eta: float = 0.0) -> Move:
    """Return the move of a sampler, a name in `SAMPLERS`; DDPM has no `eta`.

    Denoisers of a sampler with a history need `with_history`.

    Raises:
        ConfigError: If the name is unknown or `eta` outside [0, 1].
    """
    check_choice("sampler", name, SAMPLERS)
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta: expected a value in [0, 1]; got {eta}")
    return SAMPLERS[name].move(eta)


def with_history(
    name: str, denoiser: Denoiser, levels: Sequence[int], schedule: NoiseSchedule
) -> Denoiser:
    """Return the denoiser that a sampler wants in one reverse pass over `levels`.

    Args:
        name: Sampler.
        denoiser: Predicts x̂_0, clipped.
        levels: Levels of this pass, from `NoiseSchedule.levels`.
        schedule: Noise schedule.
    """
    history = SAMPLERS[name].history
    return denoiser if history is None else history(denoiser, levels, schedule)


def draw(mean: Tensor, std: float, noise: Noise, temperature: float) -> Tensor:
    """Draw N(mean, temperature · std²); takes no noise where the variance is 0.

    The test is on Python floats, so that it neither waits for the device nor depends on data.
    """
    scale = math.sqrt(temperature) * std
    return mean + scale * noise() if scale > 0 else mean


def start_noise(noise: Noise, temperature: float = 1.0) -> Tensor:
    """τ^K ~ N(0, temperature · I), the start of a reverse pass (Algorithm 1, line 1)."""
    return math.sqrt(temperature) * noise()


def noise_to_level(
    clean: Tensor, k: int, schedule: NoiseSchedule, noise: Noise, temperature: float = 1.0
) -> Tensor:
    """Start of a warm-started pass: a plan noised to level k (Balim et al. 2025, appendix G).

    Args:
        clean: Previous plan, shifted, normalised.
        k: Level, 0 … K. Level 0 is the plan itself. Level K is pure noise, as at the start of a
            full pass, so that a warm start of K steps is a full plan.
        schedule: Noise schedule.
        noise: Source of standard normal tensors; called once, unless k is 0.
        temperature: Factor on the variance of the noise.

    Raises:
        ConfigError: If `k` is not a level of `schedule`.
    """
    if not 0 <= k <= schedule.num_levels:
        raise ConfigError(f"k: expected a level in 0 … {schedule.num_levels}; got {k}")
    if k == schedule.num_levels:
        return start_noise(noise, temperature)
    return draw(schedule.signal(k) * clean, schedule.noise(k), noise, temperature)


def normal_noise(
    shape: Sequence[int], generator: torch.Generator, *, dtype: torch.dtype = torch.float32
) -> Noise:
    """Return a source of standard normal tensors of one shape, on the generator's device."""

    def noise() -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)

    return noise


@torch.no_grad()
def sample(
    step: Step,
    trajectory: Tensor,
    levels: Sequence[int],
    noise: Noise,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run reverse steps down to level 0: the only reverse loop.

    Args:
        step: One reverse step, from `mpd_gym.diffusion.composition`.
        trajectory: τ at the first of `levels`, ``[M, H, D]``.
        levels: Falling levels to visit, from `NoiseSchedule.levels`; 0 follows the last.
        noise: Source of standard normal tensors.
        callback: Called with (level, trajectory) after each step.

    Returns:
        τ^0, ``[M, H, D]``.

    Raises:
        ConfigError: If `levels` do not fall or end below 1.
    """
    pairs = list(zip(levels, (*levels[1:], 0), strict=True))
    if any(k_next >= k for k, k_next in pairs):
        raise ConfigError(f"levels: expected falling levels from 1 on; got {list(levels)}")
    for k, k_next in pairs:
        trajectory = step(trajectory, k, k_next, noise)
        if callback is not None:
            callback(k_next, trajectory)
    return trajectory
