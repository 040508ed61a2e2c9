"""The contract of every agent: Stable-Baselines3's `predict`, `plan`, options, rewards and costs.

A method (`mpd_gym.agents.mpdiffuser`, …) supplies how trajectories are sampled and how its networks
learn; what surrounds that is here and in `mpd_gym.agents.trained`, and is the same for all.
"""

from __future__ import annotations

import functools
import pickle
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.latency import LatencyChoice, LatencyProfile, Timings, choose
from mpd_gym.agents.objective import GoalStepFunction, StepFunction, learned_objective, with_goals
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.planning import (
    Candidates,
    Request,
    SharedNoise,
    as_array,
    candidates_of,
    learned_actions,
    rank,
    request_of,
    shifted,
)
from mpd_gym.agents.serialization import AgentParts
from mpd_gym.agents.spaces import InverseDynamics, Reading
from mpd_gym.agents.state import AgentState
from mpd_gym.errors import InputError, check_function, check_integer
from mpd_gym.latent.encoder import ImageEncoder
from mpd_gym.types import Array, BoolArray, Noise, Plan, Ranker

__all__ = ["Agent"]

C = TypeVar("C", bound=AgentConfig)

# Trajectories sampled in one pass through the networks; more go in several, to bound memory.
MAX_ROWS = 4096


class Agent(ABC, Generic[C]):
    """A diffusion planner that acts.

    It keeps no episode state: plans, chunk positions and budgets go in and out of `predict`
    through `state`, so that vectorised environments and resets are right by construction.
    The only mutable part is its own random generator.

    Args:
        parts: What it is made of.
    """

    name: str

    def __init__(self, parts: AgentParts[C]) -> None:
        self.parts = parts
        self.config, self.models, self.device = parts.config, parts.models, parts.device
        self.normalizers, self.conditions = parts.normalizers, parts.conditions
        self.history = parts.history
        self.observation_space, self.action_space = parts.spaces.observation, parts.spaces.action
        self.layout = self.config.layout(parts.sizes)
        self.horizon, self.num_levels = self.layout.horizon, self.layout.levels
        self.objective = learned_objective(self.config.discount, parts)
        self.latency: LatencyChoice | None = None
        self._timings = Timings()  # shared by all copies
        self._generator = torch.Generator(self.device).manual_seed(self.config.seed)
        self.options = self._checked(self.config.sampling)

    def __getstate__(self) -> bytes:
        """Pickle to bytes: multiprocessing would send each weight as a file, of which few fit."""
        return pickle.dumps(vars(self))

    def __setstate__(self, content: bytes) -> None:
        """Restore what `__getstate__` gave."""
        vars(self).update(pickle.loads(content))

    def __repr__(self) -> str:
        """The method, sizes, and the options that are not the defaults."""
        usual, spaces = asdict(SamplingConfig()), (self.observation_space, self.action_space)
        pairs = dict(zip(("observation", "action"), spaces, strict=True), horizon=self.horizon)
        pairs |= {key: x for key, x in asdict(self.options).items() if x != usual[key]}
        return f"{type(self).__name__}({', '.join(f'{key}={pairs[key]!r}' for key in pairs)})"

    # --- what a method supplies -------------------------------------------------------------

    @abstractmethod
    def _sample(self, request: Request) -> Tensor:
        """Return M normalised trajectories ``[M, L, D]``."""

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
        reading = self.parts.spaces.read(observation)
        before = AgentState.resumed(
            state, reading, self.layout, self.parts.spaces, self.options, episode_start
        )
        state = self._budgeted(before, reading)
        outdated = before.outdated(reading, self.options)
        due = (state.position < 0) | (state.position >= self.options.action_chunk) | outdated
        if reading.budget is not None:
            due |= state.budget != before.budget
        if due.any():
            state = self._replan(state, reading, due, outdated, deterministic)
        action = state.actions[np.arange(len(state)), state.position]
        state = replace(
            state,
            position=state.position + 1,
            observation=reading.x,
            action=action,
            started=np.ones(len(state), bool),
        )
        return self.parts.spaces.write(action, single=reading.single), state

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
            budget: Remaining cost budget, infinite for none; the option by default.
            deterministic: As in `predict`.

        Returns:
            All candidates in environment units, their scores and which one is executed.

        Raises:
            ConfigError: If `budget` or `num_candidates` is out of range.
            InputError: As in `predict`.
            PlanningError: If no candidate is finite.
        """
        began = time.perf_counter()
        reading = self.parts.spaces.read(observation)
        if not reading.single:
            raise InputError(
                f"observation: plan takes one observation, got {len(reading)}; use predict"
            )
        agent = self if num_candidates is None else self.with_options(num_candidates=num_candidates)
        if budget is None:
            budget = self.options.budget
        elif budget != np.inf:
            self.options.updated({"budget": budget})  # refuses what is none
        if budget is not None:
            self.objective.check_cost()
        budgets = np.array([np.inf if budget is None else budget], float)
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
        future, _ = self.layout.split(torch.as_tensor(state.plan), self.parts.spaces.nx)
        return self.normalizers.observation.unnormalize(as_array(future)), state.actions.copy()

    # --- what can change at run time -----------------------------------------------------------

    def with_options(self, *, latency_budget: float | None = None, **options: Any) -> Self:
        """Return a second agent with other sampling options, sharing the weights.

        Args:
            latency_budget: Seconds that 99 % of the calls of `predict` may take; the first plan of
                an episode may take longer where plans are warm-started. A profile of this machine
                is measured once, in less than a second for laptop-size networks, and
                `mpd_gym.agents.latency.choose` cuts steps and samples until they fit. The new
                agent's `latency` tells what was chosen and measured.
            options: Of `SamplingConfig`.

        Raises:
            ConfigError: If a name is unknown or a value out of range, or if the fastest setting
                exceeds `latency_budget`; the message says how long that takes.
        """
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._generator = torch.Generator(self.device).manual_seed(self.config.seed)
        other.options = other._checked(self.options.updated(options))
        other.latency = None
        if latency_budget is not None:
            timing = functools.partial(self._timings.measured, other)
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
        return self._timings.profile(self)

    @property
    def accepts(self) -> tuple[spaces.Space[Any], ...]:
        """Spaces of what `predict` reads: its part of the agent's observations, or pictures."""
        return self.parts.spaces.accepts

    @property
    def encoder(self) -> ImageEncoder | None:
        """Encoder of an agent that plans in a latent space; None where observations are states."""
        return self.parts.spaces.encoder

    def set_encoder(self, encoder: ImageEncoder | None) -> None:
        """Let `predict` and `plan` take the encoder's stacked frames beside its latents.

        Agents that learned from `mpd_gym.latent.encode_episodes` have the encoder already.

        Raises:
            ConfigError: If its latents have another shape than the agent's observations.
        """
        self.parts = replace(self.parts, spaces=self.parts.spaces.with_encoder(encoder))

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
        self._set(reward=with_goals(function, goals, self.parts.spaces.goal_size))

    def set_cost(
        self, function: StepFunction | GoalStepFunction | None, *, goals: bool = False
    ) -> None:
        """Count a caller's cost instead of the learned one, in ranking and against the budget.

        Arguments and errors are those of `set_reward`.
        """
        self._set(cost=with_goals(function, goals, self.parts.spaces.goal_size))

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
        self._set(inverse_dynamics=function)

    def set_budget(self, budget: float | None) -> None:
        """Limit the cost of an episode; None removes the limit.

        A running episode plans anew, and costs count from where there was a limit first.

        Raises:
            ConfigError: If it is no finite number of at least 0.
        """
        self.options = self._checked(self.options.updated({"budget": budget}))

    def set_ranker(self, ranker: Ranker | str | None) -> None:
        """Choose candidates by a caller's ranker, or by a name in `RANKERS`.

        Raises:
            ConfigError: If it is neither.
        """
        if isinstance(ranker, str):
            self.options = self._checked(self.options.updated({"ranker": ranker}))
            ranker = None
        self._set(ranker=ranker)

    def follow(self, other: Agent[Any]) -> None:
        """Take over the functions that were set on another agent."""
        self._set(**other.objective.functions)

    @property
    def has_caller_functions(self) -> bool:
        """Whether any function of the caller is set; `save` cannot keep those."""
        return any(function is not None for function in self.objective.functions.values())

    # --- inside --------------------------------------------------------------------------------

    def _set(self, **functions: Any) -> None:
        for name, function in functions.items():
            check_function(name, function)
        self.objective = replace(self.objective, **functions)

    def _checked(self, options: SamplingConfig) -> SamplingConfig:
        options.check_plans(self.horizon, self.num_levels)
        for name, value in options.condition_values.items():
            self.conditions.encode(name, value)  # refuses unknown names and wrong sizes
        self._check_options(options)
        return options

    def _budgeted(self, state: AgentState, reading: Reading) -> AgentState:
        """The state with the cost of the last step taken off the budget."""
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
            reading.numbers[spent],
        )
        remaining, total = state.budget.copy(), state.spent.copy()
        remaining[spent] = np.maximum(remaining[spent] - cost, 0.0)
        total[spent] += cost
        return replace(state, budget=remaining, spent=total)

    def _replan(
        self,
        state: AgentState,
        reading: Reading,
        due: BoolArray,
        outdated: BoolArray,
        deterministic: bool,
    ) -> AgentState:
        """New plans where they are due: warm-started ones together, fresh ones together."""
        warm = due & ~outdated & (state.position > 0) & (self.options.warm_start_steps > 0)
        plan, actions, position = state.plan.copy(), state.actions.copy(), state.position.copy()
        rows_at_once = max(1, MAX_ROWS // self.options.num_samples)
        for group in (warm, due & ~warm):
            indices = np.flatnonzero(group)
            for first in range(0, len(indices), rows_at_once):
                rows = indices[first : first + rows_at_once]
                last = shifted(state.plan[rows], state.position[rows]) if warm[rows[0]] else None
                budgets = state.budget[rows]
                found = self._candidates(reading.rows(rows), budgets, last, deterministic)
                chosen = np.array([ranking.chosen for ranking in found.rankings])
                here = np.arange(len(rows))
                plan[rows] = found.trajectories[here, chosen]
                actions[rows] = found.actions[here, chosen]
                position[rows] = 0
        goal = (
            state.goal if reading.goal is None else np.where(due[:, None], reading.goal, state.goal)
        )
        asked = self.options.asked
        return replace(state, plan=plan, actions=actions, position=position, goal=goal, asked=asked)

    def _candidates(
        self, reading: Reading, budgets: Array, warm: Array | None, deterministic: bool
    ) -> Candidates:
        """Sample N candidates for each of E observations, and rank them."""
        began = time.perf_counter()
        count, num = len(reading), self.options.num_candidates
        with torch.no_grad():
            noise = self._noise(reading, deterministic)
            request = request_of(self.parts, self.options, reading, budgets, warm, noise)
            samples = self._sample(request)
            trajectories = samples.reshape(count * num, -1, *samples.shape[1:]).mean(dim=1)
            future, controls = self.layout.split(trajectories, self.parts.spaces.nx)
            if self.options.actions != "planned":
                controls = learned_actions(self.models, request.initial, future, controls)
        sampled = time.perf_counter()
        found = candidates_of(
            self.parts, self.options, self.objective, reading, trajectories, future, controls
        )
        rankings = rank(found, budgets, reading, self.options.ranker, self.objective.ranker)
        seconds = {"sample": sampled - began, "rank": time.perf_counter() - sampled}
        return replace(found, rankings=rankings, seconds=seconds)

    def _noise(self, reading: Reading, deterministic: bool) -> Noise:
        generator = self._generator
        if deterministic:
            generator = torch.Generator(self.device).manual_seed(self.config.seed)
        shape = (self.options.num_samples, *self.layout.shape)
        return SharedNoise(generator, shape, len(reading), shared=deterministic)
