"""Compositions: how planner and dynamics model share a reverse step.

Each composition is a function of two denoisers that returns a `Step` for `samplers.sample`.
`COMPOSITIONS` lists them; all have the same signature. A trajectory holds the states in its first
nx columns and the actions in the rest; the dynamics model reads both and predicts the states.

Sampled distribution. With exact denoisers, `alternating` halves the state variance (Gaussian data,
`ddpm_posterior`) at any K: it moves the states twice per level with one draw of noise.
`alternating_matched` loses about a third of the variance with `ddpm_posterior` and nothing with
`ddim_move`. All others keep the distribution, with an error that falls as K grows.

Skipped levels. When levels are skipped (k_next < k − 1), `alternating` moves states across the
whole gap twice, first to a level far below the actions, before the planner sees both.
`combined_score` with weight 1 replaces the states' x̂_0 by the dynamics model's and stays at level
k; `ddim_move` derives the noise from τ^k and x̂_0, so this replaces their noise too.
`alternating_resampled` is also level-consistent, but draws new noise at each step, even with a
deterministic move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mpd_gym.diffusion.samplers import Move, ddpm_posterior, draw
from mpd_gym.diffusion.schedule import NoiseSchedule
from mpd_gym.errors import ConfigError, check_choice
from mpd_gym.types import Denoiser, Noise, Step

__all__ = [
    "COMPOSITIONS",
    "PLANNER_COMPOSITIONS",
    "Composition",
    "Parts",
    "alternating",
    "alternating_matched",
    "alternating_resampled",
    "at_levels",
    "combined_score",
    "compose",
    "inpaint",
    "inpaint_denoiser",
    "planner_only",
    "planner_resampled",
]


@final
@dataclass(frozen=True)
class Parts:
    """Arguments of every composition.

    Attributes:
        planner: Predicts x̂_0 of states and actions, ``[M, H, D]``.
        dynamics: Predicts x̂_0 of the states, ``[M, H, nx]``; None for `planner_only`.
        schedule: Noise schedule of both.
        nx: Columns of the states.
        move: `ddpm_posterior`, or `ddim_move` with its eta bound; see `make_move`.
        temperature: Factor of the variance of every draw, >= 0.

    Raises:
        ConfigError: If `temperature` is negative or not finite.
    """

    planner: Denoiser
    dynamics: Denoiser | None
    schedule: NoiseSchedule
    nx: int
    move: Move = ddpm_posterior
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: expected a finite value >= 0; got {self.temperature}")


Composition = Callable[[Parts], Step]


def planner_only(parts: Parts) -> Step:
    """The planner alone. Takes one noise tensor."""

    def step(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        clean = parts.planner(trajectory, k)
        return _moved(parts, trajectory, clean, k, k_next, noise)

    return step


def planner_resampled(parts: Parts) -> Step:
    """The planner alone, twice at each level: as many network calls as `alternating`.

    For comparisons at equal cost (appendix H). The trajectory takes a reverse step, is noised back
    to its level (Lugmayr et al. 2022), and takes the step again. One draw serves the first step and
    the noising. Takes two noise tensors.
    """

    def step(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        clean = parts.planner(trajectory, k)
        mean, std = parts.move(trajectory, clean, k, k_next, parts.schedule)
        factor, back = parts.schedule.forward(k_next, k)
        again = draw(factor * mean, math.hypot(back, factor * std), noise, parts.temperature)
        return _moved(parts, again, parts.planner(again, k), k, k_next, noise)

    return step


def combined_score(parts: Parts, weight: float = 0.5) -> Step:
    """One move with a convex combination of both predictions of the states (appendix I).

    Scores, noise and x̂_0 are affine in each other, so their convex combinations are the same. Takes
    one noise tensor.

    Args:
        parts: Denoisers, schedule and move.
        weight: Weight of the dynamics model in the states, in [0, 1]; 0 is `planner_only`. The
            actions follow the planner.

    Raises:
        ConfigError: If `weight` is outside [0, 1], or there is no dynamics model.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight: expected a value in [0, 1]; got {weight}")
    if weight == 0:
        return planner_only(parts)
    dynamics = _dynamics(parts)

    def step(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        clean, states = parts.planner(trajectory, k), dynamics(trajectory, k)
        states = (1 - weight) * clean[..., : parts.nx] + weight * states
        clean = torch.cat((states, clean[..., parts.nx :]), dim=-1)
        return _moved(parts, trajectory, clean, k, k_next, noise)

    return step


def alternating(parts: Parts) -> Step:
    """Algorithm 1 to the letter, as the authors run it.

    The dynamics model moves the states to their mean at the next level. The planner, still at level
    k, sees these states with the noisy actions and moves both. Then one draw. Takes one noise
    tensor.

    Raises:
        ConfigError: If there is no dynamics model.
    """

    def refined(mean: Tensor, std: float, k: int, k_next: int, noise: Noise) -> Tensor:
        return mean

    return _alternation(parts, refined)


def alternating_matched(parts: Parts) -> Step:
    """Alternation that noises the states back to level k for the planner.

    As `alternating`, but one forward move noises the states' mean from the next level back to level
    k, so the planner sees states and actions at one level. With `ddpm_posterior` the noise is too
    small, as the mean lacks the spread of the posterior. `alternating_resampled` adds it, and is
    equal with a deterministic move. Takes two noise tensors; the first for the states only.

    Raises:
        ConfigError: If there is no dynamics model.
    """

    def refined(mean: Tensor, std: float, k: int, k_next: int, noise: Noise) -> Tensor:
        factor, back = parts.schedule.forward(k_next, k)
        return draw(factor * mean, back, noise, parts.temperature)

    return _alternation(parts, refined)


def alternating_resampled(parts: Parts) -> Step:
    """Alternation with exact noise levels: the states are sampled down, then noised back.

    As `alternating_matched`, but the states take a full reverse step, mean and draw, before the
    forward move; one draw serves both Gaussians. With an exact dynamics model, small steps and
    temperature 1 this resampling (Lugmayr et al. 2022) keeps the states' distribution at level k.
    Takes two noise tensors; the first for the states only.

    Raises:
        ConfigError: If there is no dynamics model.
    """

    def refined(mean: Tensor, std: float, k: int, k_next: int, noise: Noise) -> Tensor:
        factor, back = parts.schedule.forward(k_next, k)
        return draw(factor * mean, math.hypot(back, factor * std), noise, parts.temperature)

    return _alternation(parts, refined)


PLANNER_COMPOSITIONS: dict[str, Composition] = {
    "planner_only": planner_only,
    "planner_resampled": planner_resampled,
}
"""Compositions without a dynamics model."""

COMPOSITIONS: dict[str, Composition] = {
    **PLANNER_COMPOSITIONS,
    "alternating": alternating,
    "alternating_matched": alternating_matched,
    "alternating_resampled": alternating_resampled,
    "combined_score": combined_score,
}


def compose(
    name: str,
    parts: Parts,
    *,
    dynamics_weight: float = 0.5,
    dynamics_levels: tuple[float, float] = (0.0, 1.0),
) -> Step:
    """Build a composition by name.

    Args:
        name: A key of `COMPOSITIONS`.
        parts: Denoisers, schedule and move.
        dynamics_weight: Weight of ``"combined_score"``; others ignore it.
        dynamics_levels: Levels at which the dynamics model takes part, as a range of k / K:
            ``(0.5, 1.0)`` is the first, noisy half of a reverse pass. At other levels the planner
            acts alone.

    Raises:
        ConfigError: If the name is unknown, a value out of range, or a dynamics model missing.
    """
    check_choice("composition", name, COMPOSITIONS)
    low, high = dynamics_levels
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"dynamics_levels: expected a range low < high in [0, 1]; got {dynamics_levels}"
        )
    build = COMPOSITIONS[name]
    if build is combined_score:
        build = functools.partial(combined_score, weight=dynamics_weight)
    if (low, high) == (0.0, 1.0):
        return build(parts)
    levels = parts.schedule.num_levels
    return at_levels(build(parts), planner_only(parts), lambda k: low < k / levels <= high)


def at_levels(inside: Step, outside: Step, condition: Callable[[int], bool]) -> Step:
    """Return a step that is `inside` at levels k that meet the condition, else `outside`."""

    def step(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        chosen = inside if condition(k) else outside
        return chosen(trajectory, k, k_next, noise)

    return step


def inpaint(step: Step, mask: Tensor, values: Tensor) -> Step:
    """Hold entries of a trajectory at known values at every level (Janner et al. 2022).

    The step's input and output hold the values. If a step calls two denoisers, also wrap both with
    `inpaint_denoiser`.

    Args:
        step: Step to wrap.
        mask: True for held entries, broadcasts to ``[M, H, D]``.
        values: Normalised values, broadcasts to ``[M, H, D]``; only masked entries are read.
    """

    def held(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        moved = step(torch.where(mask, values, trajectory), k, k_next, noise)
        return torch.where(mask, values, moved)

    return held


def inpaint_denoiser(denoiser: Denoiser, mask: Tensor, values: Tensor) -> Denoiser:
    """Hold entries at known values in a denoiser's input and prediction.

    Args:
        denoiser: Planner or dynamics model, with D or nx output columns.
        mask: True for held entries, ``[H, D]`` or ``[M, H, D]``.
        values: Normalised values, broadcasts to ``[M, H, D]``; only masked entries are read.
    """

    def held(trajectory: Tensor, k: int) -> Tensor:
        clean = denoiser(torch.where(mask, values, trajectory), k)
        columns = clean.shape[-1]
        return torch.where(mask[..., :columns], values[..., :columns], clean)

    return held


def _dynamics(parts: Parts) -> Denoiser:
    if parts.dynamics is None:
        raise ConfigError("dynamics: this composition needs a dynamics model; got None")
    return parts.dynamics


def _moved(
    parts: Parts, trajectory: Tensor, clean: Tensor, k: int, k_next: int, noise: Noise
) -> Tensor:
    mean, std = parts.move(trajectory, clean, k, k_next, parts.schedule)
    return draw(mean, std, noise, parts.temperature)


def _alternation(parts: Parts, refined: Callable[[Tensor, float, int, int, Noise], Tensor]) -> Step:
    """Apply the dynamics model, then the planner; `refined` turns moved states into its input."""
    dynamics, nx = _dynamics(parts), parts.nx

    def step(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        states, actions = trajectory[..., :nx], trajectory[..., nx:]
        mean, std = parts.move(states, dynamics(trajectory, k), k, k_next, parts.schedule)
        states = refined(mean, std, k, k_next, lambda: noise()[..., :nx])
        mixed = torch.cat((states, actions), dim=-1)
        return _moved(parts, mixed, parts.planner(mixed, k), k, k_next, noise)

    return step
