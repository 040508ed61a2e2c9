"""What an agent remembers between two calls of `predict`, for each environment on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from mpd_gym.agents.config import Layout
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.spaces import Reading, Spaces
from mpd_gym.boundary import as_numbers
from mpd_gym.errors import InputError
from mpd_gym.types import Array, BoolArray

__all__ = ["AgentState"]

_ROUNDING = 1e-6  # of float32, a few units in the last place


@final
@dataclass(frozen=True)
class AgentState:
    """Immutable memory of E environments; `predict` takes one and returns the next.

    Attributes:
        plan: Chosen normalised trajectory of the last planning, float32 ``[E, L, D]``.
        actions: Its actions in environment units, ``[E, H, nu]``.
        position: Index of the next action within the plan, ``[E]``; −1 without a plan.
        budget: Remaining cost budget, ``[E]``; infinite without one.
        spent: Cost that was taken off it, ``[E]``.
        observation: x at the previous call, ``[E, nx]``.
        action: u at the previous call, ``[E, nu]``.
        started: True where a step of the current episode was taken, ``[E]``.
        goal: What the plan was made for, ``[E, ng]``; no columns without goals.
        asked: What else all plans were made for, see `SamplingConfig.asked`.
    """

    plan: Array
    actions: Array
    position: Array
    budget: Array
    spent: Array
    observation: Array
    action: Array
    started: BoolArray
    goal: Array
    asked: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.position)

    @classmethod
    def resumed(
        cls,
        state: AgentState | None,
        reading: Reading,
        layout: Layout,
        spaces: Spaces,
        options: SamplingConfig,
        episode_start: Any,
    ) -> AgentState:
        """What `predict` was given, checked and reset; or a fresh state.

        Args:
            state: What the last call returned; None starts anew.
            reading: E observations.
            layout: Of plans.
            spaces: Of the agent.
            options: With the cost budget of a new episode.
            episode_start: Flags ``[E]``, True where an environment's past is forgotten; None resets
                nothing. Never kept or changed: Stable-Baselines3 mutates its array in place.

        Raises:
            InputError: If the state is of another kind, agent or number of environments, or there
                is not one flag for each environment.
        """
        count, limit = len(reading), np.inf if options.budget is None else float(options.budget)
        shapes: dict[str, tuple[int, ...]] = {
            "plan": (count, *layout.shape),
            "actions": (count, layout.horizon, spaces.nu),
            "observation": (count, spaces.nx),
            "action": (count, spaces.nu),
            "goal": (count, spaces.goal_size),
        }
        if state is None:
            kinds: dict[str, Any] = {"plan": np.float32}
            return cls(
                **{name: np.zeros(shape, kinds.get(name)) for name, shape in shapes.items()},
                position=np.full(count, -1),
                budget=np.full(count, limit),
                spent=np.zeros(count),
                started=np.zeros(count, bool),
                asked=options.asked,
            )
        if not isinstance(state, AgentState):
            raise InputError(
                f"state: expected what predict returned, got {type(state).__name__}; pass None "
                "to start anew"
            )
        for name, shape in shapes.items():
            found = getattr(state, name).shape
            if found != shape:
                raise InputError(
                    f"state: its {name} of shape {found} should have {shape}: it is of another "
                    "agent or number of environments; pass state=None to start anew"
                )
        if state.asked["budget"] != options.budget:
            state = replace(state, budget=np.maximum(limit - state.spent, 0.0))
        return state if episode_start is None else state._reset(episode_start, limit)

    def outdated(self, reading: Reading, options: SamplingConfig) -> BoolArray:
        """Rows whose plan was made for another goal, condition or budget of the episode, ``[E]``.

        A goal counts as the same within float32 rounding of its largest entry.
        """
        if self.asked != options.asked:
            return np.ones(len(self), bool)
        if reading.goal is None or (reading.goal == self.goal).all():
            return np.zeros(len(self), bool)
        gap = np.abs(reading.goal - self.goal).max(axis=1, initial=0.0)
        moved: BoolArray = gap > _ROUNDING * np.abs(self.goal).max(axis=1, initial=0.0)
        return moved

    def _reset(self, episode_start: Any, limit: float) -> AgentState:
        flags = as_numbers("episode_start", episode_start).reshape(-1)
        whole = flags.dtype == np.bool_ or np.isin(flags, (0, 1)).all()
        if flags.shape != (len(self),) or not whole:
            raise InputError(
                f"episode_start: expected {len(self)} flags, one for each observation, got "
                f"{episode_start!r}"
            )
        flags = flags.astype(bool)
        if not flags.any():
            return self
        return replace(
            self,
            position=np.where(flags, -1, self.position),
            budget=np.where(flags, limit, self.budget),
            spent=np.where(flags, 0.0, self.spent),
            started=self.started & ~flags,
        )
