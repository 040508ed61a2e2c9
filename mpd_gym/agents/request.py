"""From observations and options to what a sampling pass starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpd_gym.agents.observations import Reading
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.datasets import FittedConditions
from mpd_gym.errors import ConfigError
from mpd_gym.types import Array, BoolArray, Noise

__all__ = [
    "Request",
    "SharedNoise",
    "condition_columns",
    "condition_rows",
    "given_columns",
    "shifted",
]


@dataclass(frozen=True)
class Request:
    """Start of one sampling pass: E environments with N samples each, M = E·N trajectories.

    Attributes:
        initial: Normalised x_0, ``[E, nx]``.
        conditions: Encoded conditions y, ``[E, ny]``.
        present: 1.0 where a condition is given, ``[E, nc]``.
        noise: Source of standard normal tensors ``[M, L, D]``.
        warm: Previous normalised plan shifted to now, ``[E, L, D]``; None plans from scratch.
    """

    initial: Tensor
    conditions: Tensor
    present: Tensor
    noise: Noise
    warm: Tensor | None


class SharedNoise:
    """Standard normal noise ``[E·N, L, D]`` at each call.

    Args:
        generator: Source; its device is the tensors' device.
        shape: N, L and D.
        num_envs: E.
        shared: Draw for one environment and give all the same.
    """

    def __init__(
        self,
        generator: torch.Generator,
        shape: tuple[int, int, int],
        num_envs: int,
        *,
        shared: bool,
    ) -> None:
        self._generator, self._num_envs = generator, num_envs
        self._shape = (1 if shared else num_envs, *shape)

    def __call__(self) -> Tensor:
        """Draw once."""
        device = self._generator.device
        noise = torch.randn(self._shape, generator=self._generator, device=device)
        return noise.expand(self._num_envs, -1, -1, -1).flatten(0, 1)


def condition_rows(
    conditions: FittedConditions, options: SamplingConfig, reading: Reading, budgets: Array
) -> tuple[Array, BoolArray]:
    """Encode what the agent is conditioned on.

    Args:
        conditions: The agent's conditions.
        options: Return and cost scale, and the values of other conditions.
        reading: The E observations.
        budgets: Remaining budgets ``[E]``; infinite without one.

    Returns:
        Encoded values ``[E, ny]`` and which conditions are given ``[E, nc]``.
    """
    values = np.zeros((len(reading), 0))
    present = np.zeros((len(reading), 0), bool)
    for spec in conditions.config.conditions:
        raw, given = _raw(spec.kind, spec.name, options, reading, budgets)
        size = conditions.sizes[spec.name]
        absent = np.zeros((len(reading), size))
        encoded = absent if raw is None else conditions.encode(spec.name, raw)
        values = np.concatenate([values, encoded], axis=1)
        present = np.concatenate([present, given[:, None]], axis=1)
    return values, present


def _raw(
    kind: str, name: str, options: SamplingConfig, reading: Reading, budgets: Array
) -> tuple[Array | None, BoolArray]:
    """Value of one condition in the caller's units ``[E, size]``, and where it is given ``[E]``."""
    count = len(reading)
    everywhere = np.ones(count, bool)
    if kind == "return":
        return np.full((count, 1), options.return_scale), everywhere
    if kind == "cost":
        finite = np.isfinite(budgets)
        return np.where(finite, budgets, 0.0)[:, None] * options.cost_scale, finite
    if kind == "goal":
        return reading.goal, everywhere
    given = options.condition_values.get(name)
    if given is None:
        return None, ~everywhere
    return np.broadcast_to(np.asarray(given, float), (count, len(given))), everywhere


def condition_columns(
    request: Request, conditions: FittedConditions, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Values ``[E, …]`` of some conditions of a request, and which are given ``[E, len(names)]``.

    Args:
        request: With all conditions.
        conditions: The agent's.
        names: Which ones, in the order of the columns.
    """
    specs = [spec.name for spec in conditions.config.conditions]
    if list(names) == specs:
        return request.conditions, request.present
    parts = torch.split(request.conditions, [conditions.sizes[spec] for spec in specs], dim=1)
    columns = dict(zip(specs, parts, strict=True))
    values = torch.cat([request.initial[:, :0], *(columns[name] for name in names)], dim=-1)
    return values, request.present[:, [specs.index(name) for name in names]]


def given_columns(request: Request, conditions: FittedConditions, names: Sequence[str]) -> Tensor:
    """Values ``[E, …]`` of some conditions of a request, for networks that cannot do without.

    Args:
        request: With all conditions.
        conditions: The agent's.
        names: Which ones, in the order of the columns.

    Raises:
        ConfigError: If one has no value.
    """
    values, present = condition_columns(request, conditions, names)
    for name, given in zip(names, present.all(dim=0).tolist(), strict=True):
        if not given:
            raise ConfigError(
                f"condition {name!r}: this agent needs a value; set condition_values, or a budget "
                "for a cost"
            )
    return values


def shifted(plans: Array, executed: Array) -> Array:
    """Plans ``[E, L, D]`` moved forward by the executed steps ``[E]``, their last row repeated."""
    length = plans.shape[1]
    rows = np.minimum(np.arange(length) + executed[:, None], length - 1)
    return np.take_along_axis(plans, rows[:, :, None], axis=1)
