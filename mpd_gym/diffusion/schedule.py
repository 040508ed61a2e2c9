"""Noise schedules: the share of a trajectory that remains at each diffusion level.

Coefficients are Python floats in double precision. A product of a tensor and a float needs no copy
to the device and no synchronisation, works in every precision, and is a constant for a compiler or
a CUDA graph. Training needs a different level for each example and reads the same numbers as a
tensor from `NoiseSchedule.table`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import NamedTuple, final

import torch
from torch import Tensor

from mpd_gym.errors import ConfigError, check_choice, check_integer

__all__ = ["MIN_LOG_RATIO", "SCHEDULES", "SPACINGS", "NoiseSchedule", "Posterior", "make_schedule"]

MAX_BETA = 0.999  # keeps √ᾱ_K, by which x̂_0 is divided, above 0
MIN_LOG_RATIO = -3.0
"""λ (see `NoiseSchedule.log_ratio`) below which the signal is less than a 400th of a trajectory's
variance. A network's x̂_0 is a guess there, so ``"log_snr"`` spends no steps on it."""

SPACINGS = ("even", "log_snr")
COSINE_OFFSET = 0.008
VP_BETA_MIN, VP_BETA_MAX = 0.1, 10.0
LINEAR_BETA_MIN, LINEAR_BETA_MAX = 0.1, 20.0


class Posterior(NamedTuple):
    """Gaussian τ^j given τ^k and τ^0: mean ``clean · τ^0 + noisy · τ^k``, standard deviation."""

    clean: float
    noisy: float
    std: float


@final
@dataclass(frozen=True)
class NoiseSchedule:
    """Forward process q(τ^k | τ^0) = N(√ᾱ_k τ^0, (1 − ᾱ_k) I) for k = 0 … K.

    Attributes:
        name: Name in `SCHEDULES`.
        alphas_bar: ᾱ_0 … ᾱ_K, strictly falling from exactly 1 to above 0.

    Raises:
        ConfigError: If `alphas_bar` does not fall strictly from 1.
    """

    name: str
    alphas_bar: tuple[float, ...]

    def __post_init__(self) -> None:
        values = self.alphas_bar
        falling = all(before > after for before, after in pairwise(values))
        if len(values) < 2 or values[0] != 1.0 or not falling or values[-1] <= 0:
            raise ConfigError(
                "alphas_bar: expected at least two values that fall strictly from 1 to above 0; "
                f"got {values}"
            )

    @property
    def num_levels(self) -> int:
        """K."""
        return len(self.alphas_bar) - 1

    def signal(self, k: int) -> float:
        """√ᾱ_k, the factor on the clean trajectory at level k."""
        return math.sqrt(self.alphas_bar[k])

    def noise(self, k: int) -> float:
        """√(1 − ᾱ_k), the standard deviation of the noise at level k."""
        return math.sqrt(1 - self.alphas_bar[k])

    def log_ratio(self, k: int) -> float:
        """λ_k = log(√ᾱ_k / √(1 − ᾱ_k)), half the logarithm of the signal-to-noise ratio, k >= 1."""
        return math.log(self.alphas_bar[k] / (1 - self.alphas_bar[k])) / 2

    def forward(self, start: int, end: int) -> tuple[float, float]:
        """Factor and noise of the forward move between two levels, q(τ^end | τ^start).

        Args:
            start: Level to start at.
            end: Noisier level, `end` >= `start`.

        Returns:
            √(ᾱ_end / ᾱ_start) and √(1 − ᾱ_end / ᾱ_start).
        """
        kept = self.alphas_bar[end] / self.alphas_bar[start]
        return math.sqrt(kept), math.sqrt(1 - kept)

    def posterior(self, k: int, k_next: int) -> Posterior:
        """Gaussian of a less noisy level given level k and the clean trajectory.

        For k_next = k − 1 this is Ho et al. 2020, eq. 6 and 7. A longer move uses the same
        equations with the betas of the two levels (respacing, Nichol and Dhariwal 2021, section 4).

        Args:
            k: Level of the noisy trajectory, 1 … K.
            k_next: Level to move to, 0 … k − 1. At 0 the posterior is the clean trajectory.
        """
        before, after = self.alphas_bar[k], self.alphas_bar[k_next]
        kept, beta = before / after, 1 - before / after
        return Posterior(
            clean=math.sqrt(after) * beta / (1 - before),
            noisy=math.sqrt(kept) * (1 - after) / (1 - before),
            std=math.sqrt((1 - after) / (1 - before) * beta),
        )

    def levels(
        self, num_steps: int | None = None, start: int | None = None, spacing: str = "even"
    ) -> tuple[int, ...]:
        """Levels that a reverse pass visits before it ends at 0.

        Args:
            num_steps: Reverse steps, 1 … `start`; None for all of them.
            start: First level, 1 … K; None for K. A warm start begins lower.
            spacing: ``"even"`` in k, or ``"log_snr"``: even in the logarithm of the signal-to-noise
                ratio, cut at `MIN_LOG_RATIO`.

        Returns:
            Falling levels from `start` to 1; `start` alone for a single step.

        Raises:
            ConfigError: If an argument is out of range.
        """
        check_choice("spacing", spacing, SPACINGS)
        first = self.num_levels if start is None else start
        steps = first if num_steps is None else num_steps
        if not 1 <= first <= self.num_levels:
            raise ConfigError(f"start: expected a level in 1 … {self.num_levels}; got {first}")
        if not 1 <= steps <= first:
            raise ConfigError(f"num_steps: expected 1 … {first}, the start level; got {steps}")
        if spacing == "log_snr":
            return self._even_in_log_snr(first, steps)
        gaps = max(steps - 1, 1)
        # integer rounding keeps levels distinct
        return tuple(first - (2 * i * (first - 1) + gaps) // (2 * gaps) for i in range(steps))

    def _even_in_log_snr(self, first: int, steps: int) -> tuple[int, ...]:
        """Return the nearest levels, moved apart if two would coincide."""
        ratios = [max(self.log_ratio(k), MIN_LOG_RATIO) for k in range(1, first + 1)]
        found = [first]
        for left in range(steps - 1, 0, -1):
            wanted = ratios[0] + (ratios[-1] - ratios[0]) * (left - 1) / max(steps - 1, 1)
            free = range(left, found[-1])  # room for the levels that follow
            distances = [abs(ratios[k - 1] - wanted) for k in free]
            found.append(free[distances.index(min(distances))])
        return tuple(found)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """ᾱ_0 … ᾱ_K as a float32 tensor, ``[K + 1]``, cached."""
        return _table(self.alphas_bar, torch.device(device))


@functools.lru_cache(maxsize=16)
def _table(alphas_bar: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(alphas_bar, dtype=torch.float32, device=device)


def make_schedule(name: str, num_levels: int) -> NoiseSchedule:
    """Build a schedule by name.

    Args:
        name: ``"cosine"`` (Nichol and Dhariwal 2021, s = 0.008), ``"linear"`` (Ho et al. 2020, with
            the betas scaled by 1000 / K), or ``"vp"`` (variance preserving, Song et al. 2021, in
            the discretisation of Xiao et al. 2022). Betas are cut at 0.999.
        num_levels: K, at least 2.

    Raises:
        ConfigError: If the name is unknown or `num_levels` too small.
    """
    check_choice("schedule", name, SCHEDULES)
    check_integer("num_levels", num_levels, 2)
    betas = SCHEDULES[name](num_levels)
    kept = (1 - min(beta, MAX_BETA) for beta in betas)
    return NoiseSchedule(name, tuple(accumulate(kept, mul, initial=1.0)))


def _cosine(num_levels: int) -> Sequence[float]:
    def kept(k: int) -> float:
        phase = (k / num_levels + COSINE_OFFSET) / (1 + COSINE_OFFSET)
        return math.cos(phase * math.pi / 2) ** 2

    return [1 - kept(k) / kept(k - 1) for k in range(1, num_levels + 1)]


def _linear(num_levels: int) -> Sequence[float]:
    last = num_levels - 1
    return [
        (LINEAR_BETA_MIN + (LINEAR_BETA_MAX - LINEAR_BETA_MIN) * i / last) / num_levels
        for i in range(num_levels)
    ]


def _vp(num_levels: int) -> Sequence[float]:
    slope = (VP_BETA_MAX - VP_BETA_MIN) / 2
    return [
        1 - math.exp(-VP_BETA_MIN / num_levels - slope * (2 * k - 1) / num_levels**2)
        for k in range(1, num_levels + 1)
    ]


SCHEDULES: dict[str, Callable[[int], Sequence[float]]] = {
    "cosine": _cosine,
    "linear": _linear,
    "vp": _vp,
}
