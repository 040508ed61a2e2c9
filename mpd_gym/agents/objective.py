"""What a candidate is worth: rewards and costs, learned or the caller's, summed along a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mpd_gym.agents.serialization import AgentParts
from mpd_gym.agents.spaces import InverseDynamics
from mpd_gym.boundary import returned
from mpd_gym.datasets import Normalizers
from mpd_gym.errors import ConfigError, InputError, check_function
from mpd_gym.models import Regressor
from mpd_gym.models.backends.threads import enough_threads, threads
from mpd_gym.types import Array, Ranker

__all__ = [
    "GoalStepFunction",
    "Objective",
    "StepFunction",
    "learned_objective",
    "predicted_returns",
    "with_goals",
]

StepFunction = Callable[[Array, Array, Array], Array]
"""``fn(observations [N, H, nx], actions [N, H, nu], next_observations [N, H, nx]) -> [N, H]``, in
environment units."""

GoalStepFunction = Callable[[Array, Array, Array, Array | None], Array]
"""A `StepFunction` that takes the goals ``[N, ng]`` as well; None on a task without goals."""


def with_goals(
    function: StepFunction | GoalStepFunction | None, goals: bool, goal_size: int
) -> GoalStepFunction | None:
    """A caller's function as one that takes goals, and leaves them aside unless `goals`.

    Raises:
        ConfigError: If it is no function, or wants goals and there are none.
    """
    check_function("function", function)
    if goals and not goal_size:
        raise ConfigError("goals: observations of this agent have no 'desired_goal'")
    given: Any = function
    if goals or function is None:
        taking: GoalStepFunction | None = given
        return taking
    return functools.partial(_without_goals, given)


def _without_goals(
    function: StepFunction, observations: Array, actions: Array, after: Array, goals: Array | None
) -> Array:
    """A `GoalStepFunction` of one that takes no goals."""
    return function(observations, actions, after)


@final
@dataclass(frozen=True)
class Objective:
    """Discounted return and cost of plans (paper, Algorithm 2, lines 3 and 4); caller's functions.

    A caller's reward or cost replaces the learned model; without either, there is no return or no
    cost.

    Attributes:
        discount: γ in (0, 1].
        reward: The caller's reward of a step.
        cost: The caller's cost of a step.
        ranker: The caller's ranker.
        inverse_dynamics: The caller's way from planned states to actions.
        constraint: The caller's set of states, of methods that keep to one.
        learned_reward: The reward model.
        learned_cost: The cost model.
        learned_termination: The termination model: positive where an episode is predicted to end.
    """

    discount: float
    reward: GoalStepFunction | None = None
    cost: GoalStepFunction | None = None
    ranker: Ranker | None = None
    inverse_dynamics: InverseDynamics | None = None
    constraint: Callable[[Tensor], Tensor] | None = None
    learned_reward: GoalStepFunction | None = None
    learned_cost: GoalStepFunction | None = None
    learned_termination: GoalStepFunction | None = None

    @property
    def functions(self) -> dict[str, Any]:
        """The caller's functions by name, None where there is none."""
        names = ("reward", "cost", "ranker", "inverse_dynamics", "constraint")
        return {name: getattr(self, name) for name in names}

    def totals(
        self,
        observations: Array,
        actions: Array,
        goals: Array | None,
        termination_penalty: float,
        cost_threshold: float = 0.0,
    ) -> tuple[Array | None, Array | None]:
        """Discounted return and cost of each candidate.

        Args:
            observations: x_0 … x_H, ``[N, H + 1, nx]``.
            actions: u_0 … u_{H-1}, ``[N, H, nu]``.
            goals: ``[N, ng]``; None on a task without goals.
            termination_penalty: Subtracted, discounted, at a predicted termination; rewards after
                it do not count.
            cost_threshold: Costs of a step below it count as none.

        Returns:
            Returns ``[N]`` or None, and costs ``[N]`` or None.

        Raises:
            InputError: If a caller's function returns another shape than ``[N, H]``.
        """
        steps = (observations[:, :-1], actions, observations[:, 1:])
        weights = self.discount ** np.arange(actions.shape[1])
        reward = _evaluated("reward", self.reward, self.learned_reward, steps, goals)
        cost = _evaluated("cost", self.cost, self.learned_cost, steps, goals)
        if reward is not None and self.learned_termination is not None:
            ends = self.learned_termination(*steps, goals) > 0
            ended_before = np.cumsum(ends, axis=1) - ends > 0
            reward = np.where(ended_before, 0.0, reward - termination_penalty * ends)
        returns = None if reward is None else reward @ weights
        if cost is None:
            return returns, None
        return returns, np.where(cost < cost_threshold, 0.0, cost) @ weights

    def check_cost(self) -> None:
        """Check that costs can be counted against a budget.

        Raises:
            ConfigError: If there is no cost function and no cost model.
        """
        if self.cost is None and self.learned_cost is None:
            raise ConfigError(
                "budget: a budget needs a cost to count; train with cost_model=True or call "
                "set_cost(fn)"
            )

    def step_cost(
        self,
        observations: Array,
        actions: Array,
        next_observations: Array,
        goals: Array | None,
        cost_threshold: float,
        rows: Array,
    ) -> Array:
        """Cost of one executed step in each of E environments, ``[E]``, never negative.

        Costs below `cost_threshold` count as none. `rows` are numbers for messages.

        Raises:
            ConfigError: If there is no cost function and no cost model.
            InputError: If the caller's function returns a wrong shape or a non-finite cost.
        """
        self.check_cost()
        steps = (observations[:, None], actions[:, None], next_observations[:, None])
        cost = _evaluated("cost", self.cost, self.learned_cost, steps, goals)
        assert cost is not None
        if not np.isfinite(cost).all():
            bad = np.flatnonzero(~np.isfinite(cost[:, 0]))[0]
            raise InputError(
                f"cost function: expected a finite cost, got {cost[bad, 0]} in row {rows[bad]}"
            )
        return np.where(cost[:, 0] < cost_threshold, 0.0, np.maximum(cost[:, 0], 0.0))


def _evaluated(
    name: str,
    function: GoalStepFunction | None,
    learned: GoalStepFunction | None,
    steps: tuple[Array, Array, Array],
    goals: Array | None,
) -> Array | None:
    """Values ``[N, H]`` of the caller's function, or else of the learned one."""
    if function is None:
        return None if learned is None else learned(*steps, goals)
    return returned(f"{name} function", function, *steps, goals, shape=steps[1].shape[:2])


def learned_objective(discount: float, parts: AgentParts[Any]) -> Objective:
    """Objective of an agent's reward, cost and termination models, those that it has.

    Args:
        discount: γ.
        parts: Of the agent.
    """
    learned: dict[str, Any] = {
        f"learned_{role}": functools.partial(_predicted, model, parts.normalizers, parts.device)
        for role, model in parts.models.items()
        if isinstance(model, Regressor)
    }
    return Objective(discount, **learned)


def _predicted(
    model: Regressor,
    normalizers: Normalizers,
    device: torch.device,
    observations: Array,
    actions: Array,
    next_observations: Array,
    goals: Array | None,
) -> Array:
    """A `GoalStepFunction`; of a termination model, positive where the episode ends."""

    def tensor(values: Array) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=device)

    work = actions[..., 0].size * sum(weight.numel() for weight in model.parameters())
    inputs = [
        tensor(normalizers.observation.normalize(observations)),
        tensor(normalizers.action.normalize(actions)),
        tensor(normalizers.observation.normalize(next_observations)),
    ]
    if model.config.goal_dim:
        assert goals is not None and normalizers.goal is not None  # the goal is a condition
        rows = tensor(normalizers.goal.normalize(goals))
        inputs.append(rows[:, None].expand(-1, actions.shape[1], -1))
    with torch.no_grad(), threads(enough_threads(work)):
        output = model.predict(*inputs)
    values: Array = output.cpu().numpy().astype(float)
    return values - 0.5 if model.config.target == "termination" else values


def predicted_returns(parts: AgentParts[Any], trajectories: Tensor) -> Array | None:
    """Returns ``[M]`` from a value network, in environment units; None without one.

    Args:
        parts: Of the agent.
        trajectories: Normalised, ``[M, L, D]``.
    """
    value, target = parts.models.get("value"), parts.config.condition("return")
    if value is None:
        return None
    assert target is not None  # or there would be no value network
    scaling = parts.conditions.scalings[target.name]
    k = torch.ones(1, dtype=torch.long, device=parts.device)
    with torch.no_grad():
        scaled = np.asarray(value(trajectories, k).float().cpu(), float)
    return scaling.low + (scaling.high - scaling.low) * scaled
