"""Planning around the sampling pass: what it starts from, and which candidate is executed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym.agents.config import INVERSE_DYNAMICS
from mpd_gym.agents.objective import Objective, predicted_returns
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.serialization import AgentParts
from mpd_gym.agents.spaces import InverseDynamics, Reading, read_off
from mpd_gym.datasets import FittedConditions
from mpd_gym.errors import ConfigError, PlanningError
from mpd_gym.rankers import RANKERS, ranked
from mpd_gym.types import Array, BoolArray, Noise, Ranker, Ranking

__all__ = [
    "Candidates",
    "Request",
    "SharedNoise",
    "as_array",
    "candidates_of",
    "condition_columns",
    "given_columns",
    "learned_actions",
    "rank",
    "request_of",
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


def request_of(
    parts: AgentParts[Any],
    options: SamplingConfig,
    reading: Reading,
    budgets: Array,
    warm: Array | None,
    noise: Noise,
) -> Request:
    """Normalise and encode what a sampling pass starts from.

    Args:
        parts: Of the agent.
        options: Return and cost scale, and the values of other conditions.
        reading: The E observations.
        budgets: Remaining budgets ``[E]``; infinite without one.
        warm: As in `Request`.
        noise: As in `Request`.
    """

    def rows(values: Array) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=parts.device)

    values, present = _condition_rows(parts.conditions, options, reading, budgets)
    return Request(
        initial=rows(parts.normalizers.observation.normalize(reading.x)),
        conditions=rows(values),
        present=rows(present),
        noise=noise,
        warm=None if warm is None else rows(warm),
    )


def _condition_rows(
    conditions: FittedConditions, options: SamplingConfig, reading: Reading, budgets: Array
) -> tuple[Array, BoolArray]:
    """Encoded conditions ``[E, ny]``, and which of them are given ``[E, nc]``."""
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


def learned_actions(
    models: Mapping[str, nn.Module], initial: Tensor, future: Tensor, planned: Tensor
) -> Tensor:
    """Normalised actions ``[E · N, H, nu]`` that learned inverse dynamics find, else the planned.

    Args:
        models: Of the agent.
        initial: x_0 of each observation, ``[E, nx]``.
        future: x_1 … x_H of N candidates for each, ``[E · N, H, nx]``.
        planned: Planned actions.
    """
    inverse = models.get(INVERSE_DYNAMICS)
    if inverse is None:
        return planned
    first = initial.repeat_interleave(len(future) // len(initial), 0)[:, None]
    actions: Tensor = inverse(torch.cat((first, future[:, :-1]), dim=1), future)
    return actions


def _in_units(
    parts: AgentParts[Any],
    reading: Reading,
    future: Tensor,
    controls: Tensor,
    inverse: InverseDynamics | None,
) -> tuple[Array, Array]:
    """x_0 … x_H of candidates, and their actions inside the bounds, in environment units."""
    x = parts.normalizers.observation.unnormalize(as_array(future))
    start = np.repeat(reading.x, len(x) // len(reading), 0)[:, None]
    observations = np.concatenate([start, x], axis=1)
    actions = parts.spaces.clip(parts.normalizers.action.unnormalize(as_array(controls)))
    if inverse is not None:
        actions = parts.spaces.clip(read_off(inverse, observations, actions))
    return observations, actions


def as_array(tensor: Tensor) -> Array:
    """A tensor on any device in NumPy, float32."""
    return np.asarray(tensor.float().cpu())


@final
@dataclass(frozen=True)
class Candidates:
    """N sampled candidates for each of E environments, in environment units unless stated.

    Attributes:
        trajectories: What was sampled, normalised, ``[E, N, L, D]``.
        observations: x_0 … x_H, ``[E, N, H + 1, nx]``.
        actions: u_0 … u_{H-1}, ``[E, N, H, nu]``.
        returns: Predicted returns, ``[E, N]``; None where none are predicted.
        costs: Predicted costs, ``[E, N]``; None where none are predicted.
        rankings: One for each environment.
        seconds: Wall-clock time of the parts.
    """

    trajectories: Array
    observations: Array
    actions: Array
    returns: Array | None
    costs: Array | None
    rankings: Sequence[Ranking] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


def candidates_of(
    parts: AgentParts[Any],
    options: SamplingConfig,
    objective: Objective,
    reading: Reading,
    trajectories: Tensor,
    future: Tensor,
    controls: Tensor,
) -> Candidates:
    """N candidates for each of E observations in environment units, not ranked yet.

    Args:
        parts: Of the agent.
        options: What ends and costs count.
        objective: Returns, costs, and the caller's inverse dynamics.
        reading: The E observations.
        trajectories: What was sampled, normalised, ``[E · N, L, D]``.
        future: Its x_1 … x_H, ``[E · N, H, nx]``.
        controls: Normalised actions, ``[E · N, H, nu]``.
    """
    count, num = len(reading), len(trajectories) // len(reading)
    observations, actions = _in_units(parts, reading, future, controls, objective.inverse_dynamics)
    returns, costs = objective.totals(
        observations,
        actions,
        None if reading.goal is None else np.repeat(reading.goal, num, 0),
        options.termination_penalty,
        options.cost_threshold,
    )
    if returns is None:
        returns = predicted_returns(parts, trajectories)
    return Candidates(
        trajectories=as_array(trajectories).reshape(count, num, *trajectories.shape[1:]),
        observations=observations.reshape(count, num, *observations.shape[1:]),
        actions=actions.reshape(count, num, *actions.shape[1:]),
        returns=None if returns is None else returns.reshape(count, num),
        costs=None if costs is None else costs.reshape(count, num),
    )


def rank(
    found: Candidates, budgets: Array, reading: Reading, name: str | None, own: Ranker | None
) -> list[Ranking]:
    """Rank the candidates of every environment.

    Args:
        found: Candidates, not ranked yet.
        budgets: Remaining budgets, ``[E]``; infinite without one.
        reading: The E observations, with their goals.
        name: A key of `RANKERS`; None takes what suits what is known.
        own: The caller's ranker; it replaces `name`.

    Raises:
        PlanningError: If no candidate of an environment is finite; names its row.
        InputError: If the caller's ranker returns no `Ranking` of these candidates.
    """
    rankings = []
    for row, budget in enumerate(budgets):
        plans = found.observations[row], found.actions[row]
        returns, costs, goal = (
            None if values is None else values[row]
            for values in (found.returns, found.costs, reading.goal)
        )
        limit = float(budget) if costs is not None and np.isfinite(budget) else None
        known: dict[str, Any] = {"returns": returns, "costs": costs, "budget": limit, "goal": goal}
        ranker = RANKERS[name or _usual_ranker(returns, limit, goal)]
        if own is not None:
            ranker = functools.partial(ranked, own)
        try:
            rankings.append(ranker(*plans, **known))
        except PlanningError as error:
            raise PlanningError(f"observation {reading.numbers[row]}: {error}") from error
    return rankings


def _usual_ranker(returns: Array | None, budget: float | None, goal: Array | None) -> str:
    """Ranker for what is known, where the options name none."""
    if returns is not None:
        return "highest_return" if budget is None else "within_budget"
    return "first" if goal is None else "nearest_goal"
