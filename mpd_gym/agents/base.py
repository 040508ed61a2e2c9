"""The contract of every agent: Stable-Baselines3's `predict`, `plan`, options, rewards and costs.

A method (`mpd_gym.agents.mpdiffuser`, …) supplies how trajectories are sampled and how it is
trained; what surrounds that is here and is the same for all.
"""

from __future__ import annotations

import copy
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mpd_gym.agents.actions import ActionWriter, InverseDynamics, read_off
from mpd_gym.agents.candidates import Candidates, rank
from mpd_gym.agents.latency import (
    LatencyChoice,
    LatencyProfile,
    choose,
    measured,
    profiled,
)
from mpd_gym.agents.objective import GoalStepFunction, Objective, StepFunction, ignoring_goals
from mpd_gym.agents.observations import ObservationReader, Reading
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.request import Request, SharedNoise, condition_rows, shifted
from mpd_gym.agents.state import AgentState
from mpd_gym.datasets import FittedConditions, Normalizers
from mpd_gym.errors import ConfigError, InputError, check_function, check_integer
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.types import Array, BoolArray, Noise, Plan, Ranker

__all__ = ["Agent"]

# Trajectories sampled in one pass through the networks; more go in several, to bound memory.
MAX_ROWS = 4096


class Agent(ABC):
    """A diffusion planner that acts.

    It keeps no episode state: plans, chunk positions and budgets go in and out of `predict`
    through `state`, so that vectorised environments and resets are right by construction.
    The only mutable part is its own random generator.
    """

    name: str

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        normalizers: Normalizers,
        conditions: FittedConditions,
        objective: Objective,
        options: SamplingConfig,
        *,
        trajectory_shape: tuple[int, int],
        horizon: int,
        num_levels: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.normalizers = normalizers
        self.conditions = conditions
        self.objective = objective
        self.device = device
        self.seed = seed
        self._reader = ObservationReader(observation_space)
        self._writer = ActionWriter(action_space)
        self.horizon = horizon
        self.num_levels = num_levels
        self._trajectory_shape = trajectory_shape
        self._ranker: Ranker | None = None
        self._inverse: InverseDynamics | None = None
        self._constraint: Callable[[Tensor], Tensor] | None = None  # of methods that take one
        self._timings: dict[Any, Any] = {}  # of `mpd_gym.agents.latency`, shared by all copies
        self.latency: LatencyChoice | None = None
        self._generator = torch.Generator(device).manual_seed(seed)
        self.options = self._checked(options)

    def __repr__(self) -> str:
        """The method, sizes, and the options that are not the defaults."""
        usual = SamplingConfig()
        pairs: dict[str, Any] = {
            "observation": self.observation_space,
            "action": self.action_space,
            "horizon": self.horizon,
        }
        for option in fields(usual):
            value = getattr(self.options, option.name)
            if value != getattr(usual, option.name):
                pairs[option.name] = value
        return f"{type(self).__name__}({', '.join(f'{key}={pairs[key]!r}' for key in pairs)})"

    # --- what a method supplies -------------------------------------------------------------

    @abstractmethod
    def _sample(self, request: Request) -> Tensor:
        """Return M normalised trajectories ``[M, L, D]``."""

    @abstractmethod
    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised ``(x_1 … x_H, u_0 … u_{H-1})`` of trajectories ``[M, L, D]``."""

    def _executed(self, initial: Tensor, future: Tensor, controls: Tensor) -> Tensor:
        """Normalised actions ``[E · N, H, nu]`` that plans lead to; the planned ones here.

        Args:
            initial: x_0 of each observation, ``[E, nx]``.
            future: x_1 … x_H of N candidates for each, ``[E · N, H, nx]``.
            controls: Planned actions.
        """
        return controls

    @abstractmethod
    def _returns(self, trajectories: Tensor) -> Array | None:
        """Returns ``[M]`` from a value network of the method's own, in environment units.

        Candidates are ranked by them where there is neither a reward function nor a reward model.
        """

    @abstractmethod
    def _check_options(self, options: SamplingConfig) -> None:
        """Refuse, with a `ConfigError`, options that the method cannot follow."""

    # --- acting ------------------------------------------------------------------------------

    def predict(
        self,
        observation: Any,
        state: AgentState | None = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, AgentState]:
        """Choose the action for one or many observations (Stable-Baselines3's contract).

        Args:
            observation: One observation of the space, or a batch of E of them.
            state: What the last call returned; None starts anew and plans from scratch.
            episode_start: E flags; where True, that environment's plan and budget are forgotten.
            deterministic: Use one noise tensor, re-seeded from the configuration and shared by
                all environments: equal observations and states give equal actions, while the N
                candidates still differ.

        Returns:
            The action in environment units, inside the action Box, without a batch axis for a
            single observation; and the state for the next call.

        Raises:
            InputError: For NaN, wrong shapes or keys, a tuple, or another environment's state.
            PlanningError: If no candidate is finite.
        """
        reading = self._reader.read(observation)
        state = self._remember(state, reading, episode_start)
        due = (state.position < 0) | (state.position >= self.options.action_chunk)
        if due.any():
            state = self._replan(state, reading, due, deterministic)
        action = state.actions[np.arange(len(state)), state.position]
        state = replace(
            state,
            position=state.position + 1,
            observation=reading.x,
            action=action,
            started=np.ones(len(state), bool),
        )
        return self._writer.write(action, single=reading.single), state

    def plan(
        self,
        observation: Any,
        num_candidates: int | None = None,
        *,
        budget: float | None = None,
        deterministic: bool = False,
    ) -> Plan:
        """Sample and rank candidates from one observation.

        Args:
            observation: One observation, without a batch axis.
            num_candidates: N; the option by default.
            budget: Remaining cost budget; the option by default.
            deterministic: As in `predict`.

        Returns:
            All candidates in environment units, their scores and which one is executed.
        """
        began = time.perf_counter()
        reading = self._reader.read(observation)
        if not reading.single:
            raise InputError(
                f"observation: plan takes one observation, got {len(reading)}; use predict"
            )
        agent = self if num_candidates is None else self.with_options(num_candidates=num_candidates)
        remaining = self.options.budget if budget is None else budget
        if remaining is not None:
            self.objective.check_cost()
        budgets = np.array([np.inf if remaining is None else remaining])
        found = agent._candidates(reading, budgets, None, deterministic)
        ranking = found.rankings[0]
        return Plan(
            observations=found.observations[0, :, 1:],
            actions=found.actions[0],
            scores=ranking.scores,
            feasible=ranking.feasible,
            chosen=ranking.chosen,
            returns=None if found.returns is None else found.returns[0],
            costs=None if found.costs is None else found.costs[0],
            seconds={**found.seconds, "total": time.perf_counter() - began},
        )

    def planned(self, state: AgentState) -> tuple[Array, Array]:
        """The plans that `predict` is executing, in environment units.

        Args:
            state: What `predict` returned.

        Returns:
            x_1 … x_H ``[E, H, nx]`` and u_0 … u_{H-1} ``[E, H, nu]``, counted from the
            observation that each plan was made for.
        """
        future, _ = self._split(torch.as_tensor(state.plan))
        return self.normalizers.observation.unnormalize(_numpy(future)), state.actions

    # --- what can change at run time -----------------------------------------------------------

    def with_options(self, *, latency_budget: float | None = None, **options: Any) -> Self:
        """Return a second agent with other sampling options, sharing the weights.

        Args:
            latency_budget: Seconds that 99 % of the calls of `predict` may take, but for the first
                plan of an episode where plans are warm-started. Steps and samples are cut until
                they fit, as `mpd_gym.agents.latency.choose` says, from a profile of this machine
                that is measured once, in less than a second for laptop-size networks. The new
                agent's `latency` tells what was chosen and measured.
            options: Of `SamplingConfig`.

        Raises:
            ConfigError: If a name is unknown or a value out of range, or if the fastest setting
                exceeds `latency_budget`; the message says how long that takes.
        """
        other = copy.copy(self)
        other._generator = torch.Generator(self.device).manual_seed(self.seed)
        other.options = other._checked(self.options.updated(options))
        other.latency = None
        if latency_budget is not None:
            timing = functools.partial(measured, other)
            other.latency = choose(other.options, self.num_levels, latency_budget, timing)
            other.options = other._checked(other.options.updated(other.latency.options))
        return other

    def reseed(self, seed: int) -> None:
        """Draw what is random from another seed from now on; a recorder does before each episode.

        `deterministic` plans do not change.

        Raises:
            ConfigError: If the seed is no integer of at least 0.
        """
        check_integer("seed", seed, 0)
        self._generator.manual_seed(seed)

    def profile(self) -> LatencyProfile:
        """Measure how long a call of `predict` takes on this machine.

        For one environment and the present options, by steps and number of samples, that of the
        options and fewer. Kept, so that a second call is free.
        """
        return profiled(self)

    @property
    def encoder(self) -> ImageEncoder | None:
        """Encoder of an agent that plans in a latent space; None where observations are states."""
        return self._reader.encoder

    def set_encoder(self, encoder: ImageEncoder | None) -> None:
        """Let `predict` and `plan` take the encoder's stacked frames beside its latents.

        Agents that learned from `mpd_gym.latent.encode_episodes` have the encoder already.

        Raises:
            ConfigError: If its latents have another shape than the agent's observations.
        """
        self._reader = ObservationReader(self.observation_space, encoder)

    def set_reward(
        self, function: StepFunction | GoalStepFunction | None, *, goals: bool = False
    ) -> None:
        """Rank by a caller's reward instead of the learned one; None takes the learned one again.

        Args:
            function: ``fn(observations, actions, next_observations) -> [N, H]`` on NumPy arrays
                ``[N, H, nx]``, ``[N, H, nu]``, ``[N, H, nx]`` in environment units.
            goals: Whether it takes a fourth argument, the goals ``[N, ng]`` of the candidates.

        Raises:
            ConfigError: If it is no function, or wants goals and observations have no
                ``desired_goal``.
        """
        self.objective = replace(self.objective, reward=self._seeing(function, goals))

    def set_cost(
        self, function: StepFunction | GoalStepFunction | None, *, goals: bool = False
    ) -> None:
        """Count a caller's cost instead of the learned one, in ranking and against the budget.

        Arguments and errors are those of `set_reward`.
        """
        self.objective = replace(self.objective, cost=self._seeing(function, goals))

    def set_inverse_dynamics(self, function: InverseDynamics | None) -> None:
        """Execute the actions that lead along the planned states; None executes the planned ones.

        Errors of planned actions add up over a plan, those of planned states do not. Where an
        action is the rate of something that the state shows, such as an acceleration of a speed, it
        is easily read off.

        Args:
            function: ``fn(observations, actions, next_observations) -> [N, H, nu]`` on NumPy arrays
                ``[N, H, nx]``, ``[N, H, nu]``, ``[N, H, nx]`` in environment units; `actions` are
                the planned ones. The result is cut to the bounds of actions.

        Raises:
            ConfigError: If it is no function.
        """
        check_function("function", function)
        self._inverse = function

    def set_budget(self, budget: float | None) -> None:
        """Limit the cost of an episode; None removes the limit."""
        self.options = self._checked(self.options.updated({"budget": budget}))

    def set_ranker(self, ranker: Ranker | str | None) -> None:
        """Choose candidates by a caller's ranker, or by a name in `RANKERS`.

        Raises:
            ConfigError: If it is neither.
        """
        if isinstance(ranker, str):
            self.options = self._checked(self.options.updated({"ranker": ranker}))
            ranker = None
        check_function("ranker", ranker)
        self._ranker = ranker

    def follow(self, other: Agent) -> None:
        """Take over the functions that were set on another agent."""
        objective = other.objective
        self.objective = replace(self.objective, reward=objective.reward, cost=objective.cost)
        self._ranker, self._inverse = other._ranker, other._inverse

    @property
    def has_caller_functions(self) -> bool:
        """Whether any function of the caller is set; `save` cannot keep those."""
        ranked = (self.objective.reward, self.objective.cost, self._ranker)
        return any(part is not None for part in (*ranked, self._inverse, self._constraint))

    # --- inside --------------------------------------------------------------------------------

    def _seeing(self, function: Any, goals: bool) -> GoalStepFunction | None:
        check_function("function", function)
        if goals and not self._reader.goal_size:
            raise ConfigError("goals: observations of this agent have no 'desired_goal'")
        seeing: GoalStepFunction | None = function
        return seeing if function is None or goals else ignoring_goals(function)

    def _checked(self, options: SamplingConfig) -> SamplingConfig:
        if options.action_chunk > self.horizon:
            raise ConfigError(
                f"action_chunk: a plan has {self.horizon} actions, got {options.action_chunk}"
            )
        for name in ("num_steps", "warm_start_steps"):
            if (getattr(options, name) or 0) > self.num_levels:
                raise ConfigError(
                    f"{name}: the agent has {self.num_levels} diffusion levels, got "
                    f"{getattr(options, name)}"
                )
        for name, value in options.condition_values.items():
            self.conditions.encode(name, value)  # refuses unknown names and wrong sizes
        self._check_options(options)
        return options

    def _remember(
        self, state: AgentState | None, reading: Reading, episode_start: Any
    ) -> AgentState:
        """The state of now: resets done, and the cost of the last step taken off the budget."""
        budget = self.options.budget
        if state is None:
            sizes = (self._trajectory_shape, self.horizon, self._reader.size, self._writer.size)
            state = AgentState.fresh(len(reading), *sizes, budget)
        elif not isinstance(state, AgentState):
            raise InputError(
                f"state: expected what predict returned, got {type(state).__name__}; pass None "
                "to start anew"
            )
        state = state.checked(len(reading), self._trajectory_shape)
        state = state.reset(episode_start, budget)
        if reading.budget is not None:
            return replace(state, budget=np.maximum(reading.budget, 0.0))
        if np.isfinite(state.budget).any():
            self.objective.check_cost()
        spent = state.started & np.isfinite(state.budget)
        if not spent.any():
            return state
        cost = self.objective.step_cost(
            state.observation[spent],
            state.action[spent],
            reading.x[spent],
            None if reading.goal is None else reading.goal[spent],
            self.options.cost_threshold,
        )
        remaining = state.budget.copy()
        remaining[spent] = np.maximum(remaining[spent] - cost, 0.0)
        return replace(state, budget=remaining)

    def _replan(
        self, state: AgentState, reading: Reading, due: BoolArray, deterministic: bool
    ) -> AgentState:
        """New plans where they are due: warm-started ones together, fresh ones together."""
        warm = due & (state.position > 0) & (self.options.warm_start_steps > 0)
        plan, actions, position = state.plan.copy(), state.actions.copy(), state.position.copy()
        rows_at_once = max(1, MAX_ROWS // self.options.num_samples)
        for group in (warm, due & ~warm):
            indices = np.flatnonzero(group)
            for first in range(0, len(indices), rows_at_once):
                rows = indices[first : first + rows_at_once]
                last = shifted(state.plan[rows], state.position[rows]) if warm[rows[0]] else None
                part = Reading(
                    reading.x[rows],
                    None if reading.goal is None else reading.goal[rows],
                    None,
                    single=False,
                )
                found = self._candidates(part, state.budget[rows], last, deterministic)
                chosen = np.array([ranking.chosen for ranking in found.rankings])
                here = np.arange(len(rows))
                plan[rows] = found.trajectories[here, chosen]
                actions[rows] = found.actions[here, chosen]
                position[rows] = 0
        return replace(state, plan=plan, actions=actions, position=position)

    def _candidates(
        self, reading: Reading, budgets: Array, warm: Array | None, deterministic: bool
    ) -> Candidates:
        """Sample N candidates for each of E observations, and rank them."""
        began = time.perf_counter()
        count, num = len(reading), self.options.num_candidates
        with torch.no_grad():
            request = self._request(reading, budgets, warm, deterministic)
            samples = self._sample(request)
            trajectories = samples.reshape(count * num, -1, *samples.shape[1:]).mean(dim=1)
            future, controls = self._split(trajectories)
            controls = self._executed(request.initial, future, controls)
        sampled = time.perf_counter()
        x = self.normalizers.observation.unnormalize(_numpy(future))
        u = self._writer.clip(self.normalizers.action.unnormalize(_numpy(controls)))
        start = np.broadcast_to(np.repeat(reading.x, num, 0)[:, None], (len(x), 1, x.shape[-1]))
        observations = np.concatenate([start, x], axis=1)
        if self._inverse is not None:
            u = self._writer.clip(read_off(self._inverse, observations, u))
        returns, costs = self.objective.totals(
            observations,
            u,
            None if reading.goal is None else np.repeat(reading.goal, num, 0),
            self.options.termination_penalty,
            self.options.cost_threshold,
        )
        returns = self._returns(trajectories) if returns is None else returns
        found = Candidates(
            trajectories=_numpy(trajectories).reshape(count, num, *trajectories.shape[1:]),
            observations=observations.reshape(count, num, *observations.shape[1:]),
            actions=u.reshape(count, num, *u.shape[1:]),
            returns=None if returns is None else returns.reshape(count, num),
            costs=None if costs is None else costs.reshape(count, num),
            rankings=[],
            seconds={"sample": sampled - began},
        )
        rankings = rank(found, budgets, reading.goal, self.options.ranker, self._ranker)
        ranked = time.perf_counter() - sampled
        return replace(found, rankings=rankings, seconds={**found.seconds, "rank": ranked})

    def _request(
        self, reading: Reading, budgets: Array, warm: Array | None, deterministic: bool
    ) -> Request:
        def rows(values: Array) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=self.device)

        values, present = condition_rows(self.conditions, self.options, reading, budgets)
        return Request(
            initial=rows(self.normalizers.observation.normalize(reading.x)),
            conditions=rows(values),
            present=rows(present),
            noise=self._noise(len(reading), deterministic),
            warm=None if warm is None else rows(warm),
        )

    def _noise(self, num_envs: int, deterministic: bool) -> Noise:
        generator = self._generator
        if deterministic:
            generator = torch.Generator(self.device).manual_seed(self.seed)
        shape = (self.options.num_samples, *self._trajectory_shape)
        return SharedNoise(generator, shape, num_envs, shared=deterministic)


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.float().cpu())
