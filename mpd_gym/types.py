"""The nouns that the layers share.

Symbols, everywhere in the package: `t` environment time, `k` diffusion level (1 … K, 0 is clean),
`T` episode length, `H` horizon, `B` batch, `N` candidates, `nx` and `nu` the sizes of a flat
observation and action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SUCCESS_KEYS",
    "Array",
    "Batch",
    "BoolArray",
    "Denoiser",
    "Episode",
    "Noise",
    "Observation",
    "Plan",
    "Policy",
    "Ranker",
    "Ranking",
    "Step",
    "reported",
]

Array = NDArray[Any]
BoolArray = NDArray[np.bool_]
Observation = Array | Mapping[str, Array]

SUCCESS_KEYS = ("is_success", "success")
"""Names of success in an environment's infos: Fetch's and ours; PointMaze's and Adroit's."""


def reported(values: Sequence[float | None], dtype: type) -> Array | None:
    """Return an array of what was reported, 0 where nothing was; None if nothing ever was."""
    if all(value is None for value in values):
        return None
    return np.array([0 if value is None else value for value in values], dtype)


@dataclass(frozen=True)
class Episode:
    """One episode of T steps, in the environment's units.

    Attributes:
        observations: ``[T + 1, …]``, or one such array for each key of a Dict space.
        actions: ``[T, nu]``.
        rewards: ``[T]``.
        terminations: ``[T]``, True if the environment ended the episode.
        truncations: ``[T]``, True if a time limit ended it.
        costs: ``[T]``, ``info["cost"]`` after each step; None without costs.
        successes: ``[T]``, result of `succeeded` after each step; None if unknown.
        seed: Seed of the episode's reset, if known.
    """

    observations: Observation
    actions: Array
    rewards: Array
    terminations: BoolArray
    truncations: BoolArray
    costs: Array | None = None
    successes: BoolArray | None = None
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.actions)


@dataclass(frozen=True)
class Batch:
    """B training windows of H steps: float32 NumPy arrays, normalised unless stated.

    Attributes:
        initial: x_0, ``[B, nx]``.
        observations: x_1 … x_H, ``[B, H, nx]``.
        actions: u_0 … u_{H-1}, ``[B, H, nu]``.
        conditions: For each declared condition ``[B, size]``, at the window's first step.
        rewards: ``[B, H]``, in the environment's units.
        costs: ``[B, H]``, in the environment's units; zeros without costs.
        terminations: ``[B, H]``, 1.0 if step t ended the episode by failure or success.
        mask: ``[B, H]``, 1.0 for recorded steps, 0.0 for padding after the end of an episode.
    """

    initial: Array
    observations: Array
    actions: Array
    conditions: Mapping[str, Array]
    rewards: Array
    costs: Array
    terminations: Array
    mask: Array

    def __len__(self) -> int:
        return len(self.initial)


@dataclass(frozen=True)
class Ranking:
    """Result of ranking N candidates.

    Attributes:
        scores: ``[N]``, higher is better; −inf for candidates that are not finite.
        feasible: ``[N]``, True if the candidate keeps the budget; all True without a budget.
        chosen: Index of the winner.
    """

    scores: Array
    feasible: BoolArray
    chosen: int


@dataclass(frozen=True)
class Plan:
    """N candidate plans from one observation, in the environment's units.

    Attributes:
        observations: x_1 … x_H, ``[N, H, nx]``; the ``observation`` part for Dict spaces.
        actions: u_0 … u_{H-1}, ``[N, H, nu]``.
        scores: ``[N]``, from the ranker; higher is better.
        feasible: ``[N]``, True if the predicted cost is within the budget.
        chosen: Index of the candidate that is executed.
        returns: ``[N]``, predicted discounted return; None without a reward model or function.
        costs: ``[N]``, predicted discounted cost; None without a cost model or function.
        seconds: Wall-clock time of each stage.
    """

    observations: Array
    actions: Array
    scores: Array
    feasible: BoolArray
    chosen: int
    returns: Array | None = None
    costs: Array | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """Anything that acts: SB3 models, controllers and the agents of this package."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """Return the action for one or many observations, and the policy's next state.

        Args:
            observation: One observation, or a batch of n.
            state: Result of the last call; None starts an episode in every environment.
            episode_start: Flags ``[n]`` of the environments where an episode starts.
            deterministic: Act without random numbers.
        """
        ...


class Ranker(Protocol):
    """Chooses among N candidates.

    Args (of the call), NumPy, environment units:
        observations: x_0 … x_H, ``[N, H + 1, nx]``.
        actions: ``[N, H, nu]``.
        returns: ``[N]`` predicted discounted returns, or None.
        costs: ``[N]`` predicted discounted costs, or None.
        budget: Remaining cost budget, or None for no limit.
        goal: Desired goal of a goal-conditioned task, or None.
    """

    def __call__(
        self,
        observations: Array,
        actions: Array,
        *,
        returns: Array | None = None,
        costs: Array | None = None,
        budget: float | None = None,
        goal: Array | None = None,
    ) -> Ranking:
        """Score the candidates and choose one."""
        ...


if TYPE_CHECKING:
    # A denoiser bound to its conditions: (τ^k [B, H, D], k) -> x̂_0 [B, H, D_out], guided, clipped.
    Denoiser = Callable[[Tensor, int], Tensor]
    # One fresh standard normal tensor of the trajectory's shape at each call.
    Noise = Callable[[], Tensor]
    # One reverse step: (τ^k, k, next level, noise) -> τ^{next level}.
    Step = Callable[[Tensor, int, int, Noise], Tensor]
else:
    Denoiser = Noise = Step = Callable
