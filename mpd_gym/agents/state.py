"""What an agent remembers between two calls of `predict`, for each environment on its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from mpd_gym.agents.config import Layout
from mpd_gym.agents.spaces import Spaces
from mpd_gym.errors import InputError
from mpd_gym.types import Array, BoolArray

__all__ = ["AgentState"]


@final
@dataclass(frozen=True)
class AgentState:
    """Immutable memory of E environments; `predict` takes one and returns the next.

    Attributes:
        plan: Chosen normalised trajectory of the last planning, float32 ``[E, L, D]``.
        actions: Its actions in environment units, ``[E, H, nu]``.
        position: Index of the next action within the plan, ``[E]``; −1 without a plan.
        budget: Remaining cost budget, ``[E]``; infinite without one.
        observation: x at the previous call, ``[E, nx]``.
        action: u at the previous call, ``[E, nu]``.
        started: True where a step of the current episode was taken, ``[E]``.
    """

    plan: Array
    actions: Array
    position: Array
    budget: Array
    observation: Array
    action: Array
    started: BoolArray

    def __len__(self) -> int:
        return len(self.position)

    @classmethod
    def resumed(
        cls,
        state: AgentState | None,
        num_envs: int,
        layout: Layout,
        spaces: Spaces,
        budget: float | None,
        episode_start: Any,
    ) -> AgentState:
        """What `predict` was given, checked and reset; or a fresh state.

        Args:
            state: What the last call returned; None starts anew.
            num_envs: E.
            layout: Of plans.
            spaces: Of the agent.
            budget: Cost budget of a new episode; None for no limit.
            episode_start: Flags ``[E]``, True where an environment's past is forgotten; None resets
                nothing. Never kept or changed: Stable-Baselines3 mutates its array in place.

        Raises:
            InputError: If the state is of another kind, agent or number of environments, or there
                is not one flag for each environment.
        """
        if state is None:
            state = cls(
                plan=np.zeros((num_envs, *layout.shape), np.float32),
                actions=np.zeros((num_envs, layout.horizon, spaces.nu)),
                position=np.full(num_envs, -1),
                budget=np.full(num_envs, np.inf if budget is None else budget),
                observation=np.zeros((num_envs, spaces.nx)),
                action=np.zeros((num_envs, spaces.nu)),
                started=np.zeros(num_envs, bool),
            )
        elif not isinstance(state, AgentState):
            raise InputError(
                f"state: expected what predict returned, got {type(state).__name__}; pass None "
                "to start anew"
            )
        if len(state) != num_envs:
            raise InputError(
                f"state: it belongs to {len(state)} environments, but {num_envs} observations "
                "came; pass state=None to start anew"
            )
        if state.plan.shape[1:] != layout.shape:
            raise InputError(
                f"state: its plans have shape {state.plan.shape[1:]}, this agent's have "
                f"{layout.shape}; it comes from another agent, pass state=None"
            )
        return state if episode_start is None else state._reset(episode_start, budget)

    def _reset(self, episode_start: Any, budget: float | None) -> AgentState:
        flags = np.array(episode_start, dtype=bool).reshape(-1)
        if flags.shape != (len(self),):
            raise InputError(
                f"episode_start: expected {len(self)} flags, one for each observation, got "
                f"{flags.size}"
            )
        if not flags.any():
            return self
        return replace(
            self,
            position=np.where(flags, -1, self.position),
            budget=np.where(flags, np.inf if budget is None else budget, self.budget),
            started=self.started & ~flags,
        )
