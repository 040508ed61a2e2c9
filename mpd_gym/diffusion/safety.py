"""Keeping states in a set by a control barrier function (SafeDiffuser, Xiao et al. 2023).

A reverse step that takes a state z to z' is a control u = z' − z of the trivial system
"z follows u". For a set {h >= 0} the control is replaced by the nearest one with

    ∇h(z) · u + rate · h(z) >= 0        for each constraint h,

a projection onto half-spaces. With rate 1 and a linear h the new state is in the set, whatever the
old state was; with a smaller rate, or from outside, each step brings h closer to 0 by that share.
Three variants differ in how early this binds:

- robust (RoS): at every level, with h lowered by a margin;
- relaxed (ReS): with a slack r in the condition, at a price r², which the last levels remove;
- time-varying (TVS): for a larger set {h >= γ_k} that shrinks to the set itself at level 0.

If h is not linear, the condition holds to first order. The states of the last level are then
projected again until they are in the set (Newton's method, at most thirty times).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mpd_gym.errors import ConfigError, InputError, check_choice, check_integer, check_number
from mpd_gym.types import Noise, Step

__all__ = ["VARIANTS", "Barrier", "SafetyConfig", "box_barrier", "function_barrier", "projected"]

VARIANTS = ("robust", "relaxed", "time_varying")
MOST_SWEEPS = 100  # over the constraints; for orthogonal ones the first is exact
SETTLED = 1e-7  # change of the multipliers in the last sweep
MOST_FINAL_PROJECTIONS = 30
TOLERANCE = 1e-6  # of h
TINY = 1e-12

Barrier = Callable[[Tensor], tuple[Tensor, Tensor]]
"""``states [..., nx] -> (h [..., C], ∇h [..., C, nx])`` of C constraints, normalised states."""


@final
@dataclass(frozen=True)
class SafetyConfig:
    """Options of the projection; the defaults are the SafeDiffuser authors'.

    Attributes:
        variant: ``"robust"`` (RoS), ``"relaxed"`` (ReS) or ``"time_varying"`` (TVS).
        rate: Largest share of the way to the boundary in one step, in (0, 1].
        margin: Distance to keep from the boundary, in units of h.
        slack: Weight w of the slack in ∇h · u + rate · h >= −w r (relaxed).
        strict_levels: Number of lowest levels without slack (relaxed).
        looseness: −γ at high levels, in the units of h (time-varying).
        tightening_level: Level around which γ goes to 0 (time-varying).

    Raises:
        ConfigError: If a value is unknown or out of range.
    """

    variant: str = "robust"
    rate: float = 1.0
    margin: float = 0.0
    slack: float = 100.0
    strict_levels: int = 10
    looseness: float = 1.0
    tightening_level: float = 5.0

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_number("rate", self.rate, 0, 1, above=True)
        for name in ("margin", "slack", "looseness", "tightening_level"):
            check_number(name, getattr(self, name), 0)
        check_integer("strict_levels", self.strict_levels, 0)

    def bound(self, k: int) -> float:
        """γ_k, the lower bound of h at level k; `margin` at level 0."""
        if self.variant != "time_varying":
            return self.margin
        start = _sigmoid(self.tightening_level)
        return self.margin - self.looseness * (1 - _sigmoid(self.tightening_level - k) / start)

    def slack_at(self, k: int) -> float:
        """Weight of the slack at level k."""
        relaxed = self.variant == "relaxed" and k > self.strict_levels
        return self.slack if relaxed else 0.0


def projected(step: Step, barrier: Barrier, nx: int, config: SafetyConfig | None = None) -> Step:
    """Project the states of every reverse step, after its draw.

    Args:
        step: Step to wrap.
        barrier: Constraints on single normalised states.
        nx: Columns of the states.
        config: Variant and its numbers.
    """
    settings = config or SafetyConfig()

    def safe(trajectory: Tensor, k: int, k_next: int, noise: Noise) -> Tensor:
        moved = step(trajectory, k, k_next, noise)
        before, states = trajectory[..., :nx], moved[..., :nx]
        bound = settings.bound(k)
        h, gradient = barrier(before)
        needed = settings.bound(k_next) - bound - settings.rate * (h - bound)
        slack = settings.slack_at(k_next)
        states = before + _nearest(states - before, gradient, needed, slack)
        if k_next == 0:
            states = _inside(states, barrier, settings.margin)
        return torch.cat((states, moved[..., nx:]), dim=-1)

    return safe


def _inside(states: Tensor, barrier: Barrier, margin: float) -> Tensor:
    """Project states until h reaches the margin everywhere."""
    for _ in range(MOST_FINAL_PROJECTIONS):
        h, gradient = barrier(states)
        if bool((h >= margin - TOLERANCE).all()):
            break
        states = states + _nearest(torch.zeros_like(states), gradient, margin - h, 0.0)
    return states


def box_barrier(low: Tensor, high: Tensor) -> Barrier:
    """Constraints low <= z <= high; infinite bounds do not constrain.

    Args:
        low: ``[nx]``.
        high: ``[nx]``.

    Raises:
        ConfigError: If no bound is finite, or `low` is not below `high`.
    """
    if not bool((low < high).all()):
        raise ConfigError(f"limits: expected low < high in every dimension; got {low} and {high}")
    below, above = low.isfinite().nonzero()[:, 0], high.isfinite().nonzero()[:, 0]
    if not len(below) + len(above):
        raise ConfigError("limits: expected at least one finite bound; got none")
    normals = torch.zeros(len(below) + len(above), len(low), device=low.device, dtype=low.dtype)
    normals[torch.arange(len(below)), below] = 1.0
    normals[len(below) + torch.arange(len(above)), above] = -1.0
    offsets = torch.cat((-low[below], high[above]))

    def barrier(states: Tensor) -> tuple[Tensor, Tensor]:
        h = states @ normals.T + offsets
        return h, normals.expand(*states.shape[:-1], *normals.shape)

    return barrier


def function_barrier(function: Callable[[Tensor], Tensor]) -> Barrier:
    """Constraints of a differentiable function, with gradients by automatic differentiation.

    The barrier raises `InputError` if the function is not differentiable.

    Args:
        function: ``states [..., nx] -> [...]``, or ``[..., C]`` for several constraints; each
            value depends on its own state only.
    """

    def barrier(states: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = states.detach().requires_grad_()
            h = function(point)
            if not h.requires_grad:
                raise InputError(
                    "constraint: expected a function of the states in torch operations, which "
                    "gives gradients; got a result without one"
                )
            h = h[..., None] if h.ndim == point.ndim - 1 else h
            gradients = [
                torch.autograd.grad(h[..., index].sum(), point, retain_graph=True)[0]
                for index in range(h.shape[-1])
            ]
        return h.detach(), torch.stack(gradients, dim=-2)

    return barrier


def _nearest(control: Tensor, normals: Tensor, needed: Tensor, slack: float) -> Tensor:
    """Nearest u to a control with ``normals · u >= needed``, by dual ascent (Hildreth 1957).

    Args:
        control: ``[..., nx]``.
        normals: ``[..., C, nx]``; constraints with normal 0 are ignored.
        needed: ``[..., C]``.
        slack: w; a constraint may be violated by w r at the price r².
    """
    count = normals.shape[-2]
    gram = normals @ normals.transpose(-1, -2)  # [..., C, C]
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    reached = (normals @ control[..., None])[..., 0]
    multipliers = torch.zeros_like(needed)
    for _ in range(1 if count == 1 else MOST_SWEEPS):
        before = multipliers.clone()
        for c in range(count):
            rest = (gram[..., c, :] * multipliers).sum(-1) - lengths[..., c] * multipliers[..., c]
            missing = needed[..., c] - reached[..., c] - rest
            weight = missing / (lengths[..., c] + slack**2).clamp(min=TINY)
            usable = torch.where(lengths[..., c] > TINY, weight, torch.zeros_like(weight))
            multipliers[..., c] = usable.clamp(min=0)
        if count > 1 and bool(((multipliers - before).abs() <= SETTLED).all()):
            break
    return control + (multipliers[..., None] * normals).sum(-2)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
