"""SafeDiffuser (Xiao et al. 2023): states projected into a set at every reverse step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, final

import numpy as np
import torch
from torch import Tensor

from mpd_gym.agents.config import DiffusionConfig, FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.losses import DenoisingTask
from mpd_gym.agents.planner import planner_of
from mpd_gym.agents.planning import Request
from mpd_gym.agents.serialization import AgentParts
from mpd_gym.datasets import AffineNormalizer, CdfNormalizer, Normalizer
from mpd_gym.diffusion import (
    Barrier,
    SafetyConfig,
    box_barrier,
    function_barrier,
    projected,
    sample,
)
from mpd_gym.errors import (
    ConfigError,
    InputError,
    check_integer,
    check_number,
    from_mapping,
)
from mpd_gym.types import Array

__all__ = [
    "LIMITS",
    "Constraint",
    "SafeDiffuserAgent",
    "SafeDiffuserConfig",
    "StateLimit",
    "environment_units",
]

Constraint = Callable[[Tensor], Tensor]
"""Differentiable ``h(states [..., nx]) -> [...]``, or ``[..., C]`` for several constraints, in
environment units; a state is safe where all are >= 0."""


@final
@dataclass(frozen=True)
class StateLimit:
    """Bounds of one entry of an observation.

    Attributes:
        index: Which entry of the flat observation.
        low: Lower bound in environment units; None for none.
        high: Upper bound; None for none.

    Raises:
        ConfigError: If there is no bound, or they are in the wrong order.
    """

    index: int
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_integer("index", self.index, 0)
        low, high = self.bounds
        if not low < high or not np.isfinite([low, high]).any():
            raise ConfigError(
                f"limit of entry {self.index}: expected a finite low or high, and low < high, got "
                f"{self.low} and {self.high}"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """Both bounds, infinite where there is none."""
        return (
            -np.inf if self.low is None else check_number("low", self.low),
            np.inf if self.high is None else check_number("high", self.high),
        )


def _one_each(name: str, limits: tuple[StateLimit, ...]) -> None:
    if len({limit.index for limit in limits}) < len(limits):
        raise ConfigError(f"{name}: expected one for each entry at most, got {limits}")


LIMITS: dict[str, tuple[StateLimit, ...]] = {
    "ConstrainedPendulum-v0": (StateLimit(2, low=-6.5, high=6.5),),
}
"""Sets that SafeDiffuser keeps to, where bounds on single entries describe the task's own."""


@final
@dataclass(frozen=True)
class SafeDiffuserConfig(DiffusionConfig):
    """Configuration of SafeDiffuser: MPDiffuser's planner, a set of states and a projection.

    The other fields are those of `DiffusionConfig` and `AgentConfig`.

    Attributes:
        limits: The set, where bounds on single entries describe it; `set_constraint` takes any
            other.
        safety: The projection.
        initial_state: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps.
    """

    own = ("planner",)

    limits: tuple[StateLimit, ...] = field(default=(), metadata={"check": _one_each})
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    initial_state: str = "film"

    @classmethod
    def changes(cls, base: FactoredConfig, env_id: str) -> dict[str, Any]:
        """The set that describes the environment's task, where bounds do."""
        return {"limits": LIMITS.get(env_id, ())}


@final
class SafeDiffuserAgent(DiffusionAgent[SafeDiffuserConfig]):
    """A planner whose planned states keep to a set; whether its actions lead there is not known.

    x_0 reaches the network through FiLM by default, as in the MPDiffuser paper's comparison. Make
    one with `fit` or `load`, or with `of` from an agent whose planner is trained already.
    """

    name = "safediffuser"
    config_type = SafeDiffuserConfig

    def __init__(self, parts: AgentParts[SafeDiffuserConfig]) -> None:
        for limit in parts.config.limits:
            if limit.index >= parts.spaces.nx:
                raise ConfigError(
                    f"limits: observations have {parts.spaces.nx} entries, counted from 0; got "
                    f"{limit}"
                )
        super().__init__(parts)

    @classmethod
    def of(
        cls,
        agent: DiffusionAgent[Any],
        *,
        limits: Sequence[StateLimit] = (),
        constraint: Constraint | None = None,
        safety: SafetyConfig | None = None,
    ) -> SafeDiffuserAgent:
        """Project what another agent's planner samples; they share the weights.

        Args:
            agent: Such as an `MPDiffuserAgent`; see `planner_of`.
            limits: Bounds on single entries of the observation.
            constraint: Any other set.
            safety: The projection.
        """
        made = planner_of(cls, agent, limits=tuple(limits), safety=safety or SafetyConfig())
        made.set_constraint(constraint)
        return made

    def set_constraint(self, constraint: Constraint | None) -> None:
        """Keep planned states where a function of theirs is not negative, beside the `limits`.

        Args:
            constraint: See `Constraint`; None removes it. It is not saved.
        """
        self._set(constraint=constraint)

    def with_safety(self, *, limits: Sequence[StateLimit] | None = None, **changes: Any) -> Self:
        """Return a second agent with another set or projection, sharing the weights.

        Args:
            limits: Instead of the present ones.
            changes: Fields of `SafetyConfig`, such as ``variant="relaxed"``.

        Raises:
            ConfigError: If a name is unknown or a value out of range.
        """
        config = replace(
            self.config,
            limits=self.config.limits if limits is None else tuple(limits),
            safety=from_mapping(SafetyConfig, {**vars(self.config.safety), **changes}),
            sampling=self.options,
        )
        return self._beside(config, {})

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        step = self._composed(request, levels, self._known(request.initial))
        step = projected(step, self._barrier(), self.parts.spaces.nx, self.config.safety)
        return sample(step, start, levels, request.noise)

    def _barrier(self) -> Barrier:
        """All constraints on normalised states."""
        barriers = []
        if self.config.limits:
            barriers.append(self._box())
        constraint = self.objective.constraint
        if constraint is not None:
            barriers.append(function_barrier(self._normalized_constraint(constraint)))
        if not barriers:
            raise ConfigError(
                "constraint: SafeDiffuser needs a set to keep to; call set_constraint(fn), or "
                "with_safety(limits=[StateLimit(...)])"
            )
        return barriers[0] if len(barriers) == 1 else _joined(barriers)

    def _box(self) -> Barrier:
        bounds = np.full((2, self.parts.spaces.nx), [[-np.inf], [np.inf]])
        for limit in self.config.limits:
            bounds[:, limit.index] = limit.bounds
        inside = np.nan_to_num(bounds, neginf=0.0, posinf=0.0)
        scaled = self.normalizers.observation.normalize(inside)
        scaled = np.where(np.isfinite(bounds), scaled, bounds)
        low, high = torch.as_tensor(scaled, dtype=torch.float32, device=self.device)
        return box_barrier(low, high)

    def _normalized_constraint(self, constraint: Constraint) -> Constraint:
        units = environment_units(self.normalizers.observation, self.device)

        def normalized(states: Tensor) -> Tensor:
            h = constraint(units(states))
            if not isinstance(h, Tensor) or h.shape[: states.ndim - 1] != states.shape[:-1]:
                found = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
                raise InputError(
                    f"constraint: expected a tensor of shape {list(states.shape[:-1])}, with an "
                    f"axis more for several constraints; got {found}"
                )
            return h

        return normalized

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role)


def _joined(barriers: Sequence[Barrier]) -> Barrier:
    """All constraints of several barriers."""

    def barrier(states: Tensor) -> tuple[Tensor, Tensor]:
        h, gradients = zip(*(part(states) for part in barriers), strict=True)
        return torch.cat(h, dim=-1), torch.cat(gradients, dim=-2)

    return barrier


def environment_units(normalizer: Normalizer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `Normalizer.unnormalize` for tensors ``[..., d]``, differentiable.

    Beyond the range of the data a CDF, which ends there, goes on as its last piece does, so that
    noisy values keep a gradient.
    """
    if isinstance(normalizer, AffineNormalizer):
        scale, shift = (_tensor(part, device) for part in (normalizer.scale, normalizer.shift))
        return lambda states: states * scale + shift
    assert isinstance(normalizer, CdfNormalizer)
    counts = normalizer.counts.tolist()
    values = torch.split(_tensor(normalizer.values, device), counts)
    levels = torch.split(_tensor(normalizer.levels, device), counts)
    tables = list(zip(values, levels, strict=True))

    def units(states: Tensor) -> Tensor:
        columns = [_interpolated(states[..., j], *table) for j, table in enumerate(tables)]
        return torch.stack(columns, dim=-1)

    return units


def _interpolated(z: Tensor, values: Tensor, levels: Tensor) -> Tensor:
    if len(values) == 1:  # a constant
        return values[0] + 0 * z
    right = torch.searchsorted(levels, z.detach().contiguous()).clamp(1, len(levels) - 1)
    slope = (values[right] - values[right - 1]) / (levels[right] - levels[right - 1])
    return values[right - 1] + slope * (z - levels[right - 1])


def _tensor(array: Array, device: torch.device) -> Tensor:
    return torch.tensor(array, dtype=torch.float32, device=device)
